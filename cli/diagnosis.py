"""What `clusterq doctor` looks at: each thing that a run may need, tried out, not only looked up.

Nothing of the library is imported outside of a check, so that a package that is missing or does not load is a finding
like any other.
"""

import importlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_ENOUGH_MEMORY, _ENOUGH_DISK = 2e9, 2e9  # bytes; the bundled model's run takes 1.7 GB of memory
_PROBE_SECONDS = 60
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
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

_COLOURS = re.compile(r"\x1b\[[\d;]*m")

State = Literal["ok", "low", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `ok`; `low` where there is little of it; `absent`; `broken` where it is there and does not work.
        found: a version or an amount, or why it is not there.
        purpose: what it is for.
        remedy: what mends it, a command where there is one; None where nothing has to be mended.
        essential: whether nothing works without it, on the CPU either.
    """

    name: str
    state: State
    found: str
    purpose: str
    remedy: str | None = None
    essential: bool = False


def diagnose(folder: Path) -> list[Finding]:
    """Look at everything, on behalf of runs in `folder`. Takes some seconds, most of them to import torch."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _gpus, _providers, _tensorrt, _cpu)
    found = [finding for check in checks for finding in _guarded(check)]
    return [*found, *_guarded(_memory), _disk("disk here", folder), _temporary_disk()]


def healthy(findings: list[Finding]) -> bool:
    """Whether the tool can run here, on the CPU at least."""
    return all(finding.state in {"ok", "low"} for finding in findings if finding.essential)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it needs and cannot have is told by the packages' own lines."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way, and the doctor is for those
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "broken", f"could not be looked at: {_line(error)}", "", None)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
            found = "not installed" if missing else _line(error)
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
        return Finding(name, "broken", f"does not import: {_line(error)}", purpose, remedy, essential=True)
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
    yield Finding("CUDA of torch", "ok" if torch.version.cuda else "absent", torch.version.cuda or "CPU build", "GPUs")
    if not torch.cuda.is_available():
        mends = None if not driver else _REINSTALL_TORCH if not torch.version.cuda else "update the NVIDIA driver"
        yield Finding("GPU", "broken" if driver else "absent", "torch sees none", purpose, mends)
        return
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            _convolve(f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:  # a driver that is too old, a GPU that torch has no kernels for
            yield Finding(name, "broken", _line(error), purpose, _REINSTALL_TORCH)
        else:
            found = f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} free"
            yield Finding(name, "ok", found, purpose)


def _providers() -> Iterator[Finding]:
    """Each provider that ONNX Runtime lists, tried out in a process of its own, all at once."""
    import onnxruntime
    import torch

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
    reason = unavailable_reason()
    if reason is None:
        yield Finding(name, "ok", str(importlib.import_module("tensorrt").__version__), purpose)
    elif importlib.util.find_spec("tensorrt") is None:
        yield Finding(name, "absent", "not installed", purpose, "pip install 'clusterq-deploy[tensorrt]'")
    else:
        yield Finding(name, "broken", reason, purpose, "see the lines of the GPU and of its driver")


def _cpu() -> Iterator[Finding]:
    import torch

    from calib.precision import has_fast_bfloat16
    from clusterq_deploy.environment import available_cores, describe_cpu

    name, instructions = describe_cpu()
    yield Finding("CPU", "ok", f"{name}, {available_cores()} cores", "everything without a GPU")
    purpose = "INT8 faster than FP32 on the CPU"
    if instructions:
        yield Finding("CPU INT8", "ok", ", ".join(instructions), purpose)
    else:
        found = "cannot be read" if instructions is None else "no VNNI, no AMX"
        yield Finding("CPU INT8", "absent", found, purpose, "another CPU: Intel from Cascade Lake, AMD from Zen 4")
    fast = has_fast_bfloat16(torch.device("cpu"))
    yield Finding("CPU bfloat16", "ok" if fast else "absent", "yes" if fast else "no", "synthesis in half the time")


def _memory() -> Iterator[Finding]:
    import psutil

    state, limit = psutil.virtual_memory(), memory_limit()
    total = state.total if limit is None else min(state.total, limit)
    free = min(state.available, total)
    purpose = "2 GB for digits, 6 to 12 GB for an ImageNet model"
    found = f"{_gib(free)} of {_gib(total)} free" + (" (the container's limit)" if total < state.total else "")
    if free < _ENOUGH_MEMORY:
        yield Finding("memory", "low", found, purpose, "end other programs, or raise the container's limit (-m)")
    else:
        yield Finding("memory", "ok", found, purpose)


def memory_limit(files: tuple[str, ...] = _CGROUP_LIMITS) -> int | None:
    """Bytes of memory that the container may use, None without a limit."""
    for file in files:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None  # "max" where there is none
    return None


def _temporary_disk() -> Finding:
    try:
        return _disk("disk for temporary files", Path(tempfile.gettempdir()), temporary=True)
    except OSError as error:
        remedy = "export TMPDIR=A_FOLDER_THAT_CAN_BE_WRITTEN"
        return Finding("disk for temporary files", "broken", _line(error), "export", remedy, essential=True)


def _disk(name: str, folder: Path, *, temporary: bool = False) -> Finding:
    purpose = "graphs while they are verified" if temporary else "run directories: about 1 GB for an ImageNet model"
    remedy = "export TMPDIR=ANOTHER_FOLDER" if temporary else "give --out a folder on another disk"
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror or error}"
        return Finding(name, "broken", found, purpose, remedy, essential=temporary)
    state: State = "ok" if free >= _ENOUGH_DISK else "low"
    return Finding(name, state, f"{_gib(free)} free", purpose, None if state == "ok" else remedy, essential=temporary)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
