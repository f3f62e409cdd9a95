"""Tries out one part of what a run needs: `python -m cli.probe library`.

Each part has a process of its own: a library that does not fit the others may crash or hang the process that it is
loaded into, and parts that are slow to load are loaded at the same time. A finding is a line of JSON on stdout as soon
as it is made. Nothing of the library is imported outside of a check, so that a package that is missing or does not
load is a finding like any other.
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
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `ok`; `low` if there is little of it; `absent`; `broken` if it is there and does not work.
        found: a version or an amount, or why it is not there.
        purpose: what it is for.
        remedy: what fixes it, a command if there is one; None if nothing has to be fixed.
        essential: whether nothing works without it, not even on the CPU.
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
"""What nothing works without, by the part that tries it, as it is reported if the part does not answer."""

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
_TIMM = _row("timm", "models named timm:NAME", "pip install 'clusterq-deploy[timm]'", essential=False)


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def gib(size: float) -> str:
    """Return a number of bytes in GiB, for people."""
    return f"{size / 2**30:.1f} GiB"


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; a check that fails is a finding too."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way, and the doctor is for those
        yield Finding(name, "broken", f"could not be looked at: {one_line(error)}", "")


def _cuda_of(driver: str) -> int | None:
    """Return the CUDA major release that a driver such as 580.65.06 runs; None if it runs none that is in use."""
    number = driver.partition(".")[0]
    branch = int(number) if number.isdecimal() else _OLDEST_CUDA_13
    return 13 if branch >= _OLDEST_CUDA_13 else 12 if branch >= _OLDEST_CUDA_12 else None


def torch_remedy(driver: str) -> str:
    """Return what installs a torch that computes on a GPU with that driver."""
    release = _cuda_of(driver)
    if release is None:
        return _OLD_DRIVER
    index = "cu130" if release == 13 else "cu126"  # torch 2.11 to 2.14 have both
    return f"{_TORCH} --index-url https://download.pytorch.org/whl/{index}"


def tensorrt_remedy(driver: str | None, *, again: bool) -> str:
    """Return what installs a TensorRT that runs with that driver.

    Args:
        driver: None if there is none.
        again: whether there is a TensorRT, which does not work.
    """
    release = 13 if driver is None else _cuda_of(driver)
    if release is None:
        return _OLD_DRIVER
    if release == 12:
        return f"pip install {'--force-reinstall ' if again else ''}'tensorrt-cu12>=10.3'"
    return "pip install --force-reinstall 'tensorrt>=10.3'" if again else "pip install 'clusterq-deploy[tensorrt]'"


def gpu_remedy(driver: str | None, cuda: str | None) -> str:
    """Return what lets torch see a GPU that it does not see.

    Args:
        driver: the NVIDIA driver, None if there is none.
        cuda: the CUDA release that torch was built for, None for a CPU build.
    """
    if driver is None:
        return "none is needed: runs compute on the CPU, in minutes with --effort fast; for a GPU see its driver's line"
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
    """Return the finding of a thing that works if `work` does, which returns a version or the like."""
    try:
        return replace(row, state="ok", found=work(), remedy=None)
    except Exception as error:  # a wheel whose libraries do not fit raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == row.name:
            return replace(row, state="absent", found="not installed")
        return replace(row, found=one_line(error))


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


def _library() -> Iterator[Finding]:
    """Try torch, the library, the processor, and GPUs last: to start one may fail in most ways."""
    torch, library = ESSENTIAL["library"]
    yield _try(torch, lambda: _convolve("cpu"))
    yield _try(library, lambda: _version("clusterq_deploy"))  # imports all that a run needs except torchvision
    yield from guarded("CPU", _cpu)
    yield from guarded("GPUs", _gpus)


def _torchvision() -> Iterator[Finding]:
    """Try torchvision, which takes longer to load than all else, and timm, which loads it."""
    for row in (*ESSENTIAL["torchvision"], _TIMM):
        yield _try(row, partial(_version, row.name))


def _runtime() -> Iterator[Finding]:
    """Try the ONNX packages and a graph on the CPU, and list the other providers."""
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
                yield Finding(title, "absent", "listed, not tried", "not used")


def _listed() -> list[str]:
    import onnxruntime

    names: list[str] = onnxruntime.get_available_providers()
    return names[::-1]


def _convolve(device: str) -> str:
    """Compute a convolution and its gradient on a device, and return torch's version.

    Raises:
        Exception: of any kind that torch raises if that does not work.
    """
    import torch

    weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4, device=device), weight).sum().backward()
    if weight.grad is None or float(weight.grad.sum()) != 36:
        raise RuntimeError(f"torch computes a wrong gradient on {device}")
    return str(torch.__version__)


def _cpu() -> Iterator[Finding]:
    """Look at the processor, and its instructions for 8 and 16 bits."""
    import torch

    from calib.support.amp import has_fast_bfloat16
    from clusterq_deploy.environment import available_cores, describe_cpu

    name, instructions = describe_cpu()
    yield Finding("CPU", "ok", f"{name}, {available_cores()} cores", "everything without a GPU")
    purpose, remedy = "INT8 faster than FP32 on the CPU", "another CPU: Intel from Cascade Lake, AMD from Zen 4"
    if instructions:
        yield Finding("CPU INT8", "ok", ", ".join(instructions), purpose)
    else:
        reason = "cannot be read" if instructions is None else "no VNNI, no AMX"
        yield Finding("CPU INT8", "absent", reason, purpose, remedy)
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
    for index in range(torch.cuda.device_count()):  # a driver may be too old, and torch without kernels for a GPU
        yield _try(Finding(f"GPU {index}", "broken", "", purpose, _TORCH), partial(_gpu, index))


def _gpu(index: int) -> str:
    """Compute on a GPU, and return its name and memory."""
    import torch

    _convolve(f"cuda:{index}")
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"


def _tensorrt() -> Iterator[Finding]:
    """Try TensorRT, whose builder may crash the process; its remedy depends on the driver and is not given here."""
    from clusterq_deploy.runtimes.tensorrt.gpu import gpu_problem, start_builder, tensorrt_problem

    if problem := tensorrt_problem():
        yield replace(TENSORRT, found=problem)
    elif problem := gpu_problem():
        yield replace(TENSORRT, found=problem, remedy=_SEE_GPU)
    else:
        start_builder()
        yield replace(TENSORRT, state="ok", found=_version("tensorrt"))


def _on_gpu(name: str) -> Iterator[Finding]:
    """Try a GPU provider of ONNX Runtime. Why one does not load is in its log on stderr, not in what it raises."""
    import torch  # noqa: F401  (brings the CUDA libraries that it finds in a run, too)

    if name.startswith("Tensorrt"):
        with suppress(ImportError, OSError):  # as in a run: it loads the libraries that its wheel has
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
    """Run the graph on `provider`, and raise if that does not work."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(graph(), providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    (total,) = session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    if total.item() != 9:
        raise RuntimeError(f"computes {total.item()}, but 9 is right")
    return "computes"


_CHECKS = {"library": _library, "torchvision": _torchvision, "runtime": _runtime, "tensorrt": _tensorrt}

if __name__ == "__main__":
    gc.disable()  # nothing that is imported is garbage, and to look for it takes a tenth of the time
    part, answers = sys.argv[1], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no finding
    try:
        for finding in _CHECKS[part]() if part in _CHECKS else _on_gpu(part):
            print(json.dumps(asdict(finding)), file=answers, flush=True)
    except Exception as error:
        sys.exit(one_line(error))
