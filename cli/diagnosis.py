"""What `clusterq doctor` looks at: each thing that a run may need, tried out, not only looked up.

Nothing of the library is imported outside of a check, so that a package that is missing or does not load is a finding
like any other.
"""

import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.machine import Finding, State, cpu, disk, gib, line, memory, temporary_disk

_PROBE_SECONDS = 60

_REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
_CUDA_TORCH = _REINSTALL_TORCH + " --index-url https://download.pytorch.org/whl/cu130"
_GPU_RUNTIME = (
    "pip uninstall --yes onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"  # two overwrite each other
)
_REINSTALL_TENSORRT = "pip install --force-reinstall 'tensorrt>=10.3'"
_PACKAGES = (
    ("torch", "synthesis and fine-tuning", _REINSTALL_TORCH),
    ("torchvision", "its classifiers, by name", _REINSTALL_TORCH),
    ("onnx", "writing and checking graphs", "pip install --force-reinstall onnx"),
    ("onnxruntime", "running graphs", "pip install --force-reinstall onnxruntime-gpu"),
    ("timm", "models named timm:NAME", "pip install 'clusterq-deploy[timm]'"),
)
_OPTIONAL = {"timm"}

_CPU_PROVIDER = "CPUExecutionProvider"
_PROVIDERS = {
    _CPU_PROVIDER: ("accuracy and latency of the INT8 graphs", "pip install --force-reinstall onnxruntime-gpu"),
    "CUDAExecutionProvider": (
        "the graphs in ONNX Runtime on the GPU",
        "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'",
    ),
    "TensorrtExecutionProvider": ("TensorRT inside ONNX Runtime", "pip install 'tensorrt>=10.3,<11'"),
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


def diagnose(folder: Path) -> list[Finding]:
    """Look at everything, on behalf of runs in `folder`. Takes some seconds, most of them to import torch."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _gpus, _providers, _tensorrt, cpu)
    found = [finding for check in checks for finding in _guarded(check)]
    return [*found, *_guarded(memory), disk("disk here", folder), temporary_disk()]


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


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it needs and cannot have is told by the packages' own lines."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way, and the doctor is for those
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "broken", f"could not be looked at: {line(error)}", "", None)


def _python() -> Iterator[Finding]:
    yield Finding("Python", "ok", platform.python_version(), "everything", essential=True)


def _packages() -> Iterator[Finding]:
    """The packages that are worth a line of their own, then the library, which imports all the others."""
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
    yield _library()


def _library() -> Finding:
    name, purpose = "clusterq-deploy", "the pipeline"
    try:
        importlib.import_module("clusterq_deploy.pipeline")
        version = importlib.import_module("clusterq_deploy.version").__version__
    except Exception as error:
        remedy = "pip install --upgrade --force-reinstall clusterq-deploy"
        return Finding(name, "broken", f"does not import: {line(error)}", purpose, remedy, essential=True)
    return Finding(name, "ok", version, purpose, essential=True)


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
        yield Finding("CUDA of torch", "absent", "CPU build", "GPUs", _CUDA_TORCH if driver else None)
    if not torch.cuda.is_available():
        yield Finding("GPU", "broken" if driver else "absent", "torch sees none", purpose, _gpu_remedy(driver))
        return
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            _convolve(f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:  # a driver that is too old, a GPU that torch has no kernels for
            yield Finding(name, "broken", line(error), purpose, _REINSTALL_TORCH)
        else:
            found = f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"
            yield Finding(name, "ok", found, purpose)


def _gpu_remedy(driver: str | None) -> str:
    """What gives torch a GPU that it does not see."""
    import torch

    if driver is None:
        return "none is needed: runs compute on the CPU, in minutes with --effort fast; for a GPU see its driver's line"
    if not torch.version.cuda:
        return _CUDA_TORCH
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1", "NoDevFiles"):
        return f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
    return "update the NVIDIA driver, or install a torch of the CUDA release that nvidia-smi shows"


def _providers() -> Iterator[Finding]:
    """Each provider that ONNX Runtime lists, tried out in a process of its own, all at once."""
    import onnxruntime
    import torch

    from clusterq_deploy.environment import driver_version

    names = onnxruntime.get_available_providers()[::-1]  # the CPU's first
    probes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "cli.probe", name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for name in names
    }
    for name, probe in probes.items():
        purpose, mends = _PROVIDERS.get(name, ("not used", None))
        essential = name == _CPU_PROVIDER
        title = "ONNX Runtime, " + name.removesuffix("ExecutionProvider")
        reason = _answer(probe)
        if reason is None:
            yield Finding(title, "ok", "computes", purpose, essential=essential)
        elif essential or (torch.cuda.is_available() and mends):
            yield Finding(title, "broken", reason, purpose, mends, essential=essential)
        else:
            found = reason if torch.cuda.is_available() else "listed, but there is no GPU for it"
            yield Finding(title, "absent", found, purpose)
    if torch.cuda.is_available() or driver_version():
        for name in (own for own in _PROVIDERS if own not in probes):
            title = "ONNX Runtime, " + name.removesuffix("ExecutionProvider")
            yield Finding(title, "absent", "not in this build of ONNX Runtime", _PROVIDERS[name][0], _GPU_RUNTIME)


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
    from clusterq_deploy.engine.availability import unavailable_reason

    name, purpose = "TensorRT", "engines"
    if importlib.util.find_spec("tensorrt") is None:
        yield Finding(name, "absent", "not installed", purpose, "pip install 'clusterq-deploy[tensorrt]'")
        return
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except Exception as error:  # a shared library is missing, or of another CUDA
        yield Finding(name, "broken", f"does not import: {line(error)}", purpose, _REINSTALL_TENSORRT)
        return
    reason = unavailable_reason()
    if reason is None:
        yield Finding(name, "ok", version, purpose)
    elif "too old" in reason:
        yield Finding(name, "broken", reason, purpose, _REINSTALL_TENSORRT)
    else:
        yield Finding(name, "broken", reason, purpose, "see the lines of the GPU and of its driver")
