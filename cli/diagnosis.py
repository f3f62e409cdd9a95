"""What `clusterq doctor` looks at: each thing that a run may need, tried out, not only looked up.

Nothing of the library is imported outside of a check, so that a package that is missing or does not load is a finding
like any other.
"""

import importlib
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli import remedies
from cli.machine import Finding, State, cpu, disk, gib, line, memory, temporary_disk

if TYPE_CHECKING:
    from calib.progress import Progress

_PROBE_SECONDS = 60

_PACKAGES = (
    ("torch", "synthesis and fine-tuning", remedies.REINSTALL_TORCH),
    ("torchvision", "its classifiers, by name", remedies.REINSTALL_TORCH),
    ("onnx", "writing and checking graphs", "pip install --force-reinstall onnx"),
    ("onnxruntime", "running graphs", remedies.REINSTALL_RUNTIME),
    ("timm", "models named timm:NAME", "pip install 'clusterq-deploy[timm]'"),
)
_OPTIONAL = {"timm"}

_CPU_PROVIDER = "CPUExecutionProvider"
_PROVIDERS = {
    _CPU_PROVIDER: ("accuracy and latency of the INT8 graphs", remedies.REINSTALL_RUNTIME),
    "CUDAExecutionProvider": ("the graphs in ONNX Runtime on the GPU", remedies.CUDA_LIBRARIES),
    "TensorrtExecutionProvider": ("TensorRT inside ONNX Runtime", remedies.TENSORRT_10),
}

REQUIRABLE = {
    "gpu": "GPU",
    "tensorrt": "TensorRT",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime, Tensorrt",
    "timm": "timm",
}
"""What a run can do without and a user may require, and how its findings' names begin."""

_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def diagnose(folder: Path, progress: "Progress") -> list[Finding]:
    """Look at everything, on behalf of runs in `folder`. Takes ten seconds and more, most of them to import torch."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "clusterq-deploy": _library,
        "GPUs": _gpus,
        "ONNX Runtime": _providers,
        "TensorRT": _tensorrt,
        "CPU": cpu,
        "memory": memory,
        "disk here": partial(disk, "disk here", folder),
        "disk for temporary files": temporary_disk,
    }
    found: list[Finding] = []
    with progress.task("Doctor", len(checks)) as advance:
        for name, check in checks.items():
            found += _guarded(name, check)
            advance()
    return found


def healthy(findings: list[Finding]) -> bool:
    """Whether the tool can run here, on the CPU at least."""
    return all(finding.state in {"ok", "low"} for finding in findings if finding.essential)


def unmet(findings: list[Finding], required: tuple[str, ...]) -> list[str]:
    """Those of the required things, by their names in `REQUIRABLE`, that no finding says to work."""
    working = [finding.name for finding in findings if finding.state == "ok"]
    return [
        name
        for name in required
        if not any(own == REQUIRABLE[name] or own.startswith(f"{REQUIRABLE[name]} ") for own in working)
    ]


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it needs and cannot have is told by the packages' own lines."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way, and the doctor is for those
        yield Finding(name, "broken", f"could not be looked at: {line(error)}", "", None)


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", platform.python_version(), "everything", essential=True)


def _packages() -> Iterator[Finding]:
    """The packages that are worth a line of their own."""
    for module, purpose, remedy in _PACKAGES:
        optional = module in _OPTIONAL
        try:
            version = str(importlib.import_module(module).__version__)
            if module == "torch":
                _convolve("cpu")
        except Exception as error:  # a wheel whose libraries do not fit raises what it likes
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            state: State = "absent" if missing else "broken"
            found = "not installed" if missing else line(error)
            yield Finding(module, state, found, purpose, remedy, essential=not optional)
        else:
            yield Finding(module, "ok", version, purpose, essential=not optional)


def _library() -> Iterator[Finding]:
    """The library, which imports all the others."""
    name, purpose = "clusterq-deploy", "the pipeline"
    try:
        importlib.import_module("clusterq_deploy.pipeline")
        version = importlib.import_module("clusterq_deploy.version").__version__
    except Exception as error:
        remedy = "pip install --upgrade --force-reinstall clusterq-deploy"
        yield Finding(name, "broken", f"does not import: {line(error)}", purpose, remedy, essential=True)
    else:
        yield Finding(name, "ok", version, purpose, essential=True)


def _convolve(device: str) -> None:
    """A convolution and its gradient on a device; raises what torch raises where that does not work."""
    import torch

    weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4, device=device), weight).sum().backward()
    if weight.grad is None or float(weight.grad.sum()) != 36:
        raise RuntimeError(f"torch computes a wrong gradient on {device}")


def _gpus() -> Iterator[Finding]:
    import torch

    from clusterq_deploy.environment import driver_version

    driver, purpose = driver_version(), "larger models in minutes, TensorRT"
    if driver:
        yield Finding("NVIDIA driver", "ok", driver, "GPUs")
    else:
        remedy = "with an NVIDIA GPU, install its driver; start a container with docker run --gpus all"
        yield Finding("NVIDIA driver", "absent", "no nvidia-smi", "GPUs", remedy)
    if torch.version.cuda:
        yield Finding("CUDA of torch", "ok", torch.version.cuda, "GPUs")
    else:
        yield Finding("CUDA of torch", "absent", "CPU build", "GPUs", remedies.cuda_torch(driver) if driver else None)
    if not torch.cuda.is_available():
        remedy = remedies.gpu(driver, torch.version.cuda)
        yield Finding("GPU", "broken" if driver else "absent", "torch sees none", purpose, remedy)
        return
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            _convolve(f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:  # a driver that is too old, a GPU that torch has no kernels for
            yield Finding(name, "broken", line(error), purpose, remedies.REINSTALL_TORCH)
        else:
            found = f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"
            yield Finding(name, "ok", found, purpose)


def _providers() -> Iterator[Finding]:
    """Each provider that ONNX Runtime lists and the machine may have a device for, tried in processes of their own."""
    import onnxruntime
    import torch

    from clusterq_deploy.environment import driver_version

    beside_gpu = torch.cuda.is_available() or driver_version() is not None
    names = onnxruntime.get_available_providers()[::-1]  # the CPU's first
    probes = {name: _probe(name) for name in names if beside_gpu or name == _CPU_PROVIDER}
    for name in names:
        purpose, mends = _PROVIDERS.get(name, ("not used", None))
        essential, title = name == _CPU_PROVIDER, _title(name)
        if name not in probes:
            found = "listed, but there is no GPU for it" if mends else "listed, not tried"
            yield Finding(title, "absent", found, purpose, remedies.SEE_GPU if mends else None)
        elif reason := _answer(probes[name]):
            state: State = "broken" if mends else "absent"
            yield Finding(title, state, reason, purpose, mends, essential=essential)
        else:
            yield Finding(title, "ok", "computes", purpose, essential=essential)
    for name in _PROVIDERS if beside_gpu else ():
        if name not in names:
            yield Finding(_title(name), "absent", "not in this build", _PROVIDERS[name][0], remedies.GPU_RUNTIME)


def _title(provider: str) -> str:
    return "ONNX Runtime, " + provider.removesuffix("ExecutionProvider")


def _probe(what: str) -> "subprocess.Popen[str]":
    """Try a provider, or TensorRT, in a process of its own; see `cli.probe`."""
    command = [sys.executable, "-m", "cli.probe", what]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _answer(probe: "subprocess.Popen[str]") -> str | None:
    """Why a probe failed, None where it did not."""
    try:
        _, log = probe.communicate(timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return f"gives no answer in {_PROBE_SECONDS} s"
    return probe_reason(probe.returncode, log) if probe.returncode else None


def probe_reason(code: int, log: str) -> str:
    """Why a probe failed, in a line: the first thing that ONNX Runtime logged as an error, else the last line."""
    if code < 0:
        return f"crashes with signal {-code}"
    lines = [line for line in _COLOURS.sub("", log).splitlines() if line.strip()]
    logged = next((line for line in lines if ":onnxruntime:" in line), lines[-1] if lines else "no reason given")
    return " ".join(logged.rpartition("] ")[2].rpartition(" with error: ")[2].split())


def _tensorrt() -> Iterator[Finding]:
    from clusterq_deploy.engine.availability import gpu_problem, tensorrt_problem
    from clusterq_deploy.environment import driver_version

    name, purpose, driver = "TensorRT", "engines", driver_version()
    if importlib.util.find_spec("tensorrt") is None:
        yield Finding(name, "absent", "not installed", purpose, remedies.tensorrt(driver, again=False))
    elif problem := tensorrt_problem():
        yield Finding(name, "broken", problem, purpose, remedies.tensorrt(driver, again=True))
    elif problem := gpu_problem():
        yield Finding(name, "broken", problem, purpose, remedies.SEE_GPU)
    elif problem := _answer(_probe("tensorrt")):
        yield Finding(name, "broken", problem, purpose, remedies.tensorrt(driver, again=True))
    else:
        yield Finding(name, "ok", str(importlib.import_module("tensorrt").__version__), purpose)
