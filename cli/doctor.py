"""`clusterq doctor`: tests each thing that a run may need.

Parts that are slow to load or may crash are tested in separate processes, all at the same time; see `cli.probe`.
"""

import ctypes
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import options
from cli.probe import ESSENTIAL, GPU_PROVIDERS, RTX, TENSORRT, Finding, gib, guarded, tensorrt_remedy

if TYPE_CHECKING:
    from calib.support.progress import Progress

_LIMIT = 60.0  # seconds for a part: on a cold disk importing torch takes half of them

_EXPECTED = {
    **ESSENTIAL,
    **{name: (row,) for name, row in GPU_PROVIDERS.items()},
    "tensorrt": (TENSORRT,),
    "rtx": (RTX,),
}
"""The findings of each part, as they are reported if the part fails."""

_TITLES = {part: rows[0].name for part, rows in _EXPECTED.items()} | {
    "library": "torch and clusterq-deploy",
    "runtime": "ONNX Runtime",
}

REQUIRABLE = {
    "gpu": "GPU",
    "tensorrt": "TensorRT",
    "rtx": "TensorRT-RTX",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime, Tensorrt",
    "timm": "timm",
}
"""Optional parts that a user may require, and the first words of the names of their findings."""

_TEMPORARY = "disk for temporary files"
_ENOUGH_MEMORY, _ENOUGH_DISK = 2e9, 2e9  # bytes; the bundled model's run takes 1.7 GB of memory
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@options.command(
    click.option(
        "--require",
        multiple=True,
        type=click.Choice(list(REQUIRABLE)),
        help="Also exit with 1 if this does not work; may be repeated.  [default: none]",
    )
)
def doctor(ctx: click.Context, /, require: tuple[str, ...], as_json: bool) -> None:
    """Test what a run needs on this machine, and show how to fix what is missing.

    Slow parts are tested at the same time, each in a separate process, which is killed after 60 seconds.

    The exit code is 0 if runs work, at least on the CPU, and 1 if an essential part, or one in --require, does not:
    the command can be a container's health check.
    """
    from cli import render

    findings = diagnose(Path.cwd(), render.LiveProgress(ctx.obj["quiet"]))
    missing = unmet(findings, require)
    works = healthy(findings) and not missing
    if as_json:
        rows = [asdict(finding) for finding in findings]
        render.print_json({"healthy": works, "required": list(require), "unmet": missing, "findings": rows})
    else:
        render.print_table(render.findings_table(findings))
        for finding in findings:
            if finding.remedy and finding.state != "ok":
                render.print_line(f"{finding.name}: {finding.remedy}")
        render.print_line("Runs work here." if healthy(findings) else "Runs do not work here: fix what is broken.")
        if missing:
            render.print_line(f"Required, but does not work: {', '.join(missing)}.")
    if not works:
        ctx.exit(1)


def diagnose(folder: Path, progress: "Progress") -> list[Finding]:
    """Check everything for runs in `folder`. This takes as long as importing torchvision: seconds."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [*ESSENTIAL]
    if _has_driver():
        parts += GPU_PROVIDERS
    if importlib.util.find_spec("tensorrt"):
        parts.append("tensorrt")
    if any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))):
        parts.append("rtx")
    with progress.task("Doctor", len(parts)) as advance, ThreadPoolExecutor(len(parts)) as pool:

        def test(part: str) -> list[Finding]:
            with progress.task(_TITLES[part], 1) as end:
                findings = run_probe(part)
                end()
            advance()
            return findings

        findings = dict(zip(parts, pool.map(test, parts), strict=True))
    tensorrt, rtx = findings.pop("tensorrt", []), findings.pop("rtx", [])
    by_name = {row.name: row for rows in findings.values() for row in rows}  # of a provider: tested overrides listed
    driver = by_name.get("NVIDIA driver")
    return [
        Finding("Python", "ok", platform.python_version(), "all commands", essential=True),
        *by_name.values(),
        _with_remedy(tensorrt, driver.found if driver and driver.state == "ok" else None),
        *(rtx or [replace(RTX, state="absent", found="not installed")]),
        *guarded("memory", memory),
        *guarded("disk here", partial(disk, folder)),
        *guarded(_TEMPORARY, disk),
    ]


def run_probe(part: str, limit: float = _LIMIT) -> list[Finding]:
    """Test a part in a separate process, which is killed after `limit` seconds.

    If the process fails, the findings that are missing have the reason.
    """
    command, reason = [sys.executable, "-m", "cli.probe", part], None
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
        output = done.stdout
        if done.returncode:
            reason = probe_reason(done.returncode, done.stderr.decode(errors="replace"))
    except subprocess.TimeoutExpired as late:
        output, reason = late.stdout or b"", f"no answer within {limit:g} s"
    lines = output.decode(errors="replace").split("\n")[:-1]  # the last is empty, or was cut off
    findings = [Finding(**json.loads(line)) for line in lines]
    return findings if reason is None else [*findings, *missing_findings(part, findings, reason)]


def probe_reason(code: int, log: str) -> str:
    """Return why a probe failed, in one line: the first error that ONNX Runtime logged, else the last line."""
    if code < 0:
        return f"crashes with signal {-code}"
    lines = [line for line in _COLOURS.sub("", log).splitlines() if line.strip()]
    logged = next((line for line in lines if ":onnxruntime:" in line), lines[-1] if lines else "no reason given")
    return " ".join(logged.rpartition("] ")[2].rpartition(" with error: ")[2].split())


def missing_findings(part: str, findings: list[Finding], reason: str) -> list[Finding]:
    """Return the expected findings that a part did not report, with the reason; for an essential part at least one."""
    names = {finding.name for finding in findings}
    missing = [row for row in _EXPECTED[part] if row.name not in names]
    if not missing and part in ESSENTIAL:
        missing = [Finding(_TITLES[part], "broken", "", "its remaining checks")]
    return [replace(row, found=reason) for row in missing]


def _with_remedy(tensorrt: list[Finding], driver: str | None) -> Finding:
    """Return the finding of TensorRT; if it does not work, with the command that installs one for this driver."""
    if not tensorrt:
        return replace(TENSORRT, state="absent", found="not installed", remedy=tensorrt_remedy(driver, again=False))
    (finding,) = tensorrt
    complete = finding.state == "ok" or finding.remedy
    return finding if complete else replace(finding, remedy=tensorrt_remedy(driver, again=True))


def healthy(findings: list[Finding]) -> bool:
    """Return whether the tool can run here, at least on the CPU."""
    return all(finding.state in {"ok", "low"} for finding in findings if finding.essential)


def unmet(findings: list[Finding], required: tuple[str, ...]) -> list[str]:
    """Return the required parts, by their names in `REQUIRABLE`, that no finding says to work."""
    working = [f"{finding.name} " for finding in findings if finding.state == "ok"]
    return [part for part in required if not any(name.startswith(f"{REQUIRABLE[part]} ") for name in working)]


def _has_driver() -> bool:
    """Return whether any part of an NVIDIA driver is installed, so that testing GPU providers makes sense."""
    if shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def memory() -> Iterator[Finding]:
    """Check the free memory."""
    import psutil

    state, limit = psutil.virtual_memory(), memory_limit()
    total = state.total if limit is None else min(state.total, limit)
    free = min(state.available, total)
    amount = f"{gib(free)} of {gib(total)} free" + (" (the container's limit)" if total < state.total else "")
    low = free < _ENOUGH_MEMORY
    remedy = "end other programs, or raise the container's limit (-m)" if low else None
    purpose = "2 GB for digits, 6 to 12 GB for an ImageNet model"
    yield Finding("memory", "low" if low else "ok", amount, purpose, remedy)


def memory_limit(files: tuple[str, ...] = _CGROUP_LIMITS) -> int | None:
    """Return the container's memory limit in bytes, None without one."""
    for file in files:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None  # "max" means no limit
    return None


def disk(folder: Path | None = None) -> Iterator[Finding]:
    """Check the disk of a folder, or of temporary files, by writing a file."""
    if folder is None:
        name, purpose, remedy = _TEMPORARY, "graphs during verification", "export TMPDIR=ANOTHER_FOLDER"
    else:
        name, purpose, remedy = "disk here", "about 1 GB for a run of an ImageNet model", "give --out another folder"
    row = Finding(name, "broken", "", purpose, remedy, essential=folder is None)
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    except OSError as error:
        yield replace(row, found=f"{folder or 'TMPDIR'} cannot be written: {error.strerror or error}")
        return
    low = free < _ENOUGH_DISK
    yield replace(row, state="low" if low else "ok", found=f"{gib(free)} free", remedy=remedy if low else None)
