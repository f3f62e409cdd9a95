"""The commands that mend what `clusterq doctor` finds missing or broken."""

import os

_OLDEST_CUDA_13, _OLDEST_CUDA_12 = 580, 525  # drivers, by NVIDIA's table of minor version compatibility
_INDEX = "https://download.pytorch.org/whl/"

REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
REINSTALL_RUNTIME = "pip install --force-reinstall onnxruntime-gpu"
GPU_RUNTIME = "pip uninstall --yes onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"  # two overwrite each other
CUDA_LIBRARIES = "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
TENSORRT_10 = "pip install 'tensorrt>=10.3,<11'"  # ONNX Runtime's provider is linked against its libraries
NO_GPU = "none is needed: runs compute on the CPU, in minutes with --effort fast; for a GPU see its driver's line"
OLD_DRIVER = f"update the NVIDIA driver to {_OLDEST_CUDA_12} or later, better to {_OLDEST_CUDA_13}"
SEE_GPU = "see the lines of the GPU and of its driver"


def _cuda(driver: str) -> int | None:
    """The CUDA major release that a driver such as 580.65.06 runs; None where it runs none that is in use."""
    number = driver.partition(".")[0]
    branch = int(number) if number.isdecimal() else _OLDEST_CUDA_13
    return 13 if branch >= _OLDEST_CUDA_13 else 12 if branch >= _OLDEST_CUDA_12 else None


def cuda_torch(driver: str) -> str:
    """What installs a torch that computes on a GPU with that driver."""
    release = _cuda(driver)
    if release is None:
        return OLD_DRIVER
    return f"{REINSTALL_TORCH} --index-url {_INDEX}{'cu130' if release == 13 else 'cu126'}"  # 2.11 to 2.14 have both


def tensorrt(driver: str | None, *, again: bool) -> str:
    """What installs a TensorRT that runs with that driver.

    Args:
        driver: None where there is none.
        again: whether one is there, which does not work.
    """
    release = 13 if driver is None else _cuda(driver)
    if release is None:
        return OLD_DRIVER
    if release == 12:
        return f"pip install {'--force-reinstall ' if again else ''}'tensorrt-cu12>=10.3'"
    return "pip install --force-reinstall 'tensorrt>=10.3'" if again else "pip install 'clusterq-deploy[tensorrt]'"


def gpu(driver: str | None, cuda: str | None) -> str:
    """What gives torch a GPU that it does not see.

    Args:
        driver: the NVIDIA driver, None where there is none.
        cuda: the CUDA release that torch was built for, None for a CPU build.
    """
    if driver is None:
        return NO_GPU
    if cuda is None:
        return cuda_torch(driver)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1", "NoDevFiles"):
        return f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
    if _cuda(driver) is None:
        return OLD_DRIVER
    if cuda.startswith("13") and _cuda(driver) == 12:
        return f"update the NVIDIA driver to {_OLDEST_CUDA_13} or later; or {cuda_torch(driver)}"
    return "nvidia-smi lists no GPU that torch can use: check it, and a container's --gpus"
