"""Test one part of what a run needs: `python -m cli.probe library`.

Each part has its own process: an incompatible library may crash or hang the process that loads it, and slow parts are
loaded at the same time. Each finding is printed to stdout at once, as a line of JSON. Packages are imported inside
checks only, so that one that is missing or fails to load is a finding too.
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

State = Literal["ok", "low", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of the thing that was checked.
        state: `ok`; `low` if there is little of it; `absent`; `broken` if it is installed but does not work.
        found: a version or an amount, or the reason of the state.
        purpose: what it is used for.
        remedy: how to fix it, by a command if there is one; None if nothing has to be fixed.
        essential: whether no run works without it, not even on the CPU.
    """

    name: str
    state: State
    found: str
    purpose: str
    remedy: str | None = None
    essential: bool = False


_GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
probe (float[1, 1, 3, 3] x) => (float[1, 1, 1, 1] y)
<float[1, 1, 3, 3] weight = {1, 1, 1, 1, 1, 1, 1, 1, 1}> { y = Conv(x, weight) }
"""
_CPU_PROVIDER = "CPUExecutionProvider"
_OLDEST_CUDA_13, _OLDEST_CUDA_12 = 580, 525  # drivers, by NVIDIA's table of minor version compatibility
_OLD_DRIVER = f"update the NVIDIA driver to {_OLDEST_CUDA_12} or later, better to {_OLDEST_CUDA_13}"
_SEE_GPU = "see the lines of the GPU and of its driver"
_TORCH = "pip install --force-reinstall torch torchvision"
_RUNTIME = "pip install --force-reinstall onnxruntime-gpu"


def _row(name: str, purpose: str, remedy: str | None, *, essential: bool = True) -> Finding:
    return Finding(name, "broken", "", purpose, remedy, essential)


ESSENTIAL = {
    "library": (
        _row("torch", "synthesis and fine-tuning", _TORCH),
        _row("clusterq-deploy", "the pipeline", "pip install --upgrade --force-reinstall clusterq-deploy"),
    ),
    "torchvision": (_row("torchvision", "its classifiers, by name", _TORCH),),
    "runtime": (
        _row("onnx", "writing and checking graphs", "pip install --force-reinstall onnx"),
        _row("onnxruntime", "running graphs", _RUNTIME),
        _row("ONNX Runtime, CPU", "accuracy and latency of the INT8 graphs", _RUNTIME),
    ),
}
"""The essential findings of each part, as they are reported if the part fails."""

_CUDA_LIBRARIES = "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
_TENSORRT_10 = "pip install 'tensorrt>=10.3,<11'"  # ONNX Runtime's provider is linked against its libraries
GPU_PROVIDERS = {
    "CUDAExecutionProvider": _row(
        "ONNX Runtime, CUDA", "the graphs in ONNX Runtime on the GPU", _CUDA_LIBRARIES, essential=False
    ),
    "TensorrtExecutionProvider": _row(
        "ONNX Runtime, Tensorrt", "TensorRT inside ONNX Runtime", _TENSORRT_10, essential=False
    ),
}
TENSORRT = _row("TensorRT", "engines", None, essential=False)
RTX = _row("TensorRT-RTX", "its engines, check --compile", "pip install 'clusterq-deploy[rtx]'", essential=False)
_TIMM = _row("timm", "models named timm:NAME", "pip install 'clusterq-deploy[timm]'", essential=False)


def one_line(error: BaseException) -> str:
    """Return the message of an error, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def gib(size: float) -> str:
    """Return a number of bytes as text in GiB."""
    return f"{size / 2**30:.1f} GiB"


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; a check that fails is a finding too."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way
        yield Finding(name, "broken", f"could not be checked: {one_line(error)}", "")


def _cuda_of(driver: str) -> int | None:
    """Return the CUDA major release that a driver such as 580.65.06 supports; None if it is too old."""
    number = driver.partition(".")[0]
    branch = int(number) if number.isdecimal() else _OLDEST_CUDA_13
    return 13 if branch >= _OLDEST_CUDA_13 else 12 if branch >= _OLDEST_CUDA_12 else None


def torch_remedy(driver: str) -> str:
    """Return the command that installs a torch for GPUs with that driver."""
    release = _cuda_of(driver)
    if release is None:
        return _OLD_DRIVER
    index = "cu130" if release == 13 else "cu126"  # torch 2.11 to 2.14 have both
    return f"{_TORCH} --index-url https://download.pytorch.org/whl/{index}"


def tensorrt_remedy(driver: str | None, *, again: bool) -> str:
    """Return the command that installs a TensorRT for that driver, over a broken one if `again`."""
    release = 13 if driver is None else _cuda_of(driver)
    if release is None:
        return _OLD_DRIVER
    if release == 12:
        return f"pip install {'--force-reinstall ' if again else ''}'tensorrt-cu12>=10.3'"
    return "pip install --force-reinstall 'tensorrt>=10.3'" if again else "pip install 'clusterq-deploy[tensorrt]'"


def gpu_remedy(driver: str | None, cuda: str | None) -> str:
    """Return how to let torch find the GPU; `cuda` is the release that torch was built for, None for a CPU build."""
    if driver is None:
        return "none is needed: runs work on the CPU, in minutes with --effort fast; for a GPU see its driver's line"
    if cuda is None:
        return torch_remedy(driver)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1", "NoDevFiles"):
        return f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
    if _cuda_of(driver) is None:
        return _OLD_DRIVER
    if cuda.startswith("13") and _cuda_of(driver) == 12:
        return f"update the NVIDIA driver to {_OLDEST_CUDA_13} or later; or {torch_remedy(driver)}"
    return "nvidia-smi lists no GPU that torch can use: check it, and a container's --gpus"


def _try(row: Finding, work: Callable[[], str]) -> Finding:
    """Return the finding of a part that works if `work` does; its result is a version or the like."""
    try:
        return replace(row, state="ok", found=work(), remedy=None)
    except Exception as error:  # a wheel with incompatible libraries can fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name == row.name:
            return replace(row, state="absent", found="not installed")
        return replace(row, found=one_line(error))


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


def _library() -> Iterator[Finding]:
    """Test torch, the library, the processor, and GPUs last: starting one may crash."""
    torch, library = ESSENTIAL["library"]
    yield _try(torch, lambda: _convolve("cpu"))
    yield _try(library, lambda: _version("clusterq_deploy"))  # imports all that a run needs except torchvision
    yield from guarded("CPU", _cpu)
    yield from guarded("GPUs", _gpus)


def _torchvision() -> Iterator[Finding]:
    """Test torchvision, the slowest to load, and timm, which imports it."""
    for row in (*ESSENTIAL["torchvision"], _TIMM):
        yield _try(row, partial(_version, row.name))


def _runtime() -> Iterator[Finding]:
    """Test the ONNX packages and a graph on the CPU, and list the other providers."""
    *packages, on_cpu = ESSENTIAL["runtime"]
    for row in packages:
        yield _try(row, partial(_version, row.name))
    yield _try(on_cpu, lambda: run_graph(_CPU_PROVIDER))
    with suppress(Exception):  # reported above
        for name in _listed():
            if name in GPU_PROVIDERS:
                reason = "listed, but there is no GPU for it"
                yield replace(GPU_PROVIDERS[name], state="absent", found=reason, remedy=_SEE_GPU)
            elif name != _CPU_PROVIDER:
                title = "ONNX Runtime, " + name.removesuffix("ExecutionProvider")
                yield Finding(title, "absent", "listed, not tested", "not used")


def _listed() -> list[str]:
    import onnxruntime

    names: list[str] = onnxruntime.get_available_providers()
    return names[::-1]


def _convolve(device: str) -> str:
    """Compute a convolution and its gradient on a device, and return torch's version."""
    import torch

    weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4, device=device), weight).sum().backward()
    if weight.grad is None or float(weight.grad.sum()) != 36:
        raise RuntimeError(f"torch computes a wrong gradient on {device}")
    return str(torch.__version__)


def _cpu() -> Iterator[Finding]:
    """Check the processor, and its instructions for 8 and 16 bits."""
    import torch

    from calib.support.amp import has_fast_bfloat16
    from clusterq_deploy.environment import available_cores, describe_cpu

    name, instructions = describe_cpu()
    yield Finding("CPU", "ok", f"{name}, {available_cores()} cores", "all commands without a GPU")
    purpose, remedy = "INT8 faster than FP32 on the CPU", "another CPU: Intel from Cascade Lake, AMD from Zen 4"
    if instructions:
        yield Finding("CPU INT8", "ok", ", ".join(instructions), purpose)
    else:
        yield Finding("CPU INT8", "absent", "unknown" if instructions is None else "no VNNI, no AMX", purpose, remedy)
    fast = has_fast_bfloat16(torch.device("cpu"))
    yield Finding("CPU bfloat16", "ok" if fast else "absent", "yes" if fast else "no", "synthesis in half the time")


def _gpus() -> Iterator[Finding]:
    import torch

    from clusterq_deploy.environment import driver_version

    driver, cuda, purpose = driver_version(), torch.version.cuda, "larger models in minutes, TensorRT"
    if driver:
        yield Finding("NVIDIA driver", "ok", driver, "GPUs")
    else:
        remedy = "with an NVIDIA GPU, install its driver; start a container with docker run --gpus all"
        yield Finding("NVIDIA driver", "absent", "no nvidia-smi", "GPUs", remedy)
    if cuda:
        yield Finding("CUDA of torch", "ok", cuda, "GPUs")
    else:
        yield Finding("CUDA of torch", "absent", "CPU build", "GPUs", torch_remedy(driver) if driver else None)
    if not torch.cuda.is_available():
        yield Finding("GPU", "broken" if driver else "absent", "torch sees none", purpose, gpu_remedy(driver, cuda))
        return
    for index in range(torch.cuda.device_count()):  # torch may have no kernels for it
        yield _try(Finding(f"GPU {index}", "broken", "", purpose, _TORCH), partial(_gpu, index))


def _gpu(index: int) -> str:
    """Compute on a GPU, and return its name and memory."""
    import torch

    _convolve(f"cuda:{index}")
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"


def _tensorrt() -> Iterator[Finding]:
    """Test TensorRT, whose builder may crash the process; the doctor adds the remedy, which depends on the driver."""
    from clusterq_deploy.runtimes.tensorrt.gpu import gpu_problem, start_builder
    from clusterq_deploy.runtimes.tensorrt.library import library_problem

    if problem := library_problem():
        yield replace(TENSORRT, found=problem)
    elif problem := gpu_problem():
        yield replace(TENSORRT, found=problem, remedy=_SEE_GPU)
    else:
        start_builder()
        yield replace(TENSORRT, state="ok", found=_version("tensorrt"))


def _rtx() -> Iterator[Finding]:
    """Test TensorRT-RTX, whose builder needs no GPU."""
    from clusterq_deploy.runtimes.tensorrt import library_version
    from clusterq_deploy.runtimes.tensorrt.gpu import start_builder
    from clusterq_deploy.runtimes.tensorrt.library import library_problem, using

    if problem := library_problem("tensorrt_rtx"):
        yield replace(RTX, found=problem)
        return
    with using("tensorrt_rtx"):
        start_builder()
    yield replace(RTX, state="ok", found=library_version("tensorrt_rtx"), remedy=None)


def _on_gpu(name: str) -> Iterator[Finding]:
    """Test a GPU provider of ONNX Runtime. Its log on stderr, not its exception, says why one does not load."""
    import torch  # noqa: F401  (loads the CUDA libraries, as in a run)

    if name.startswith("Tensorrt"):
        with suppress(ImportError, OSError):  # as in a run: loads the libraries of its wheel
            import tensorrt  # noqa: F401
    row = GPU_PROVIDERS[name]
    if name in _listed():
        yield replace(row, state="ok", found=run_graph(name), remedy=None)
    else:  # the two packages overwrite each other
        remedy = "pip uninstall --yes onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
        yield replace(row, state="absent", found="not in this build", remedy=remedy)


def graph() -> bytes:
    """Return an ONNX graph of a convolution that adds up nine values: x (1, 1, 3, 3) float32 to y (1, 1, 1, 1)."""
    from onnx import parser

    data: bytes = parser.parse_model(_GRAPH).SerializeToString()
    return data


def run_graph(provider: str) -> str:
    """Run the graph on `provider`; raise if the result is wrong."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(graph(), providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    (total,) = session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    if total.item() != 9:
        raise RuntimeError(f"computes {total.item()} instead of 9")
    return "computes"


_CHECKS = {"library": _library, "torchvision": _torchvision, "runtime": _runtime, "tensorrt": _tensorrt, "rtx": _rtx}

if __name__ == "__main__":
    gc.disable()  # saves a tenth of the time of imports
    part, output = sys.argv[1], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout too
    try:
        for finding in _CHECKS[part]() if part in _CHECKS else _on_gpu(part):
            print(json.dumps(asdict(finding)), file=output, flush=True)
    except Exception as error:
        sys.exit(one_line(error))
