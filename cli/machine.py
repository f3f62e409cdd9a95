"""What `clusterq doctor` says of a thing, and the machine's part of it: processor, memory, disk."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_ENOUGH_MEMORY, _ENOUGH_DISK = 2e9, 2e9  # bytes; the bundled model's run takes 1.7 GB of memory
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

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


def line(error: BaseException) -> str:
    """What an error says, in a line."""
    return " ".join(str(error).split()) or type(error).__name__


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it needs and cannot have is told by the packages' own lines."""
    try:
        yield from check()
    except Exception as error:  # a broken installation can fail in any way, and the doctor is for those
        yield Finding(name, "broken", f"could not be looked at: {line(error)}", "")


def cpu() -> Iterator[Finding]:
    """The processor, and what it has for 8 and 16 bits."""
    import torch

    from calib.support.amp import has_fast_bfloat16
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


def memory() -> Iterator[Finding]:
    """The memory that is free."""
    import psutil

    state, limit = psutil.virtual_memory(), memory_limit()
    total = state.total if limit is None else min(state.total, limit)
    free = min(state.available, total)
    purpose = "2 GB for digits, 6 to 12 GB for an ImageNet model"
    found = f"{gib(free)} of {gib(total)} free" + (" (the container's limit)" if total < state.total else "")
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


def temporary_disk() -> Iterator[Finding]:
    """The disk that graphs are verified on."""
    try:
        yield from disk("disk for temporary files", Path(tempfile.gettempdir()), temporary=True)
    except OSError as error:
        remedy = "export TMPDIR=A_FOLDER_THAT_CAN_BE_WRITTEN"
        yield Finding("disk for temporary files", "broken", line(error), "export", remedy, essential=True)


def disk(name: str, folder: Path, *, temporary: bool = False) -> Iterator[Finding]:
    """The disk of a folder, tried by a temporary file."""
    purpose = "graphs while they are verified" if temporary else "run directories: about 1 GB for an ImageNet model"
    remedy = "export TMPDIR=ANOTHER_FOLDER" if temporary else "give --out a folder on another disk"
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror or error}"
        yield Finding(name, "broken", found, purpose, remedy, essential=temporary)
        return
    state: State = "ok" if free >= _ENOUGH_DISK else "low"
    yield Finding(name, state, f"{gib(free)} free", purpose, None if state == "ok" else remedy, essential=temporary)


def gib(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB"
