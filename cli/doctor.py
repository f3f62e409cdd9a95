"""`clusterq doctor`: each thing that a run may need, tried out, not only looked up.

Whatever is slow to load or may crash is tried in processes of their own, all at the same time; see `cli.probe`.
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
from cli.probe import ESSENTIAL, GPU_PROVIDERS, TENSORRT, Finding, State, gib, guarded, tensorrt_remedy

if TYPE_CHECKING:
    from calib.support.progress import Progress

_LIMIT = 60.0
"""Seconds that a part may take: on a cold disk torch alone takes half of them."""

_OWED = {**ESSENTIAL, **{name: (row,) for name, row in GPU_PROVIDERS.items()}, "tensorrt": (TENSORRT,)}
"""The findings of each part, as they are reported if the part does not answer."""

_TITLES = {part: rows[0].name for part, rows in _OWED.items()} | {
    "library": "torch and clusterq-deploy",
    "runtime": "ONNX Runtime",
}

REQUIRABLE = {
    "gpu": "GPU",
    "tensorrt": "TensorRT",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime, Tensorrt",
    "timm": "timm",
}
"""What a run can do without and a user may require, and the first words of its findings' names."""

_TEMPORARY = "disk for temporary files"
_ENOUGH_MEMORY, _ENOUGH_DISK = 2e9, 2e9  # bytes; the bundled model's run takes 1.7 GB of memory
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@options.command(
    click.option(
        "--require",
        multiple=True,
        type=click.Choice(list(REQUIRABLE)),
        help="End with 1 if this does not work either; may be repeated.  [default: none]",
    )
)
def doctor(ctx: click.Context, /, require: tuple[str, ...], as_json: bool) -> None:
    """Try out what a run needs on this machine, and say what fixes what is missing.

    Slow parts are tried at the same time, each in a process of its own, which is ended after 60 seconds.

    Ends with 0 if runs work, at least on the CPU, and with 1 if something is broken that they cannot do without, or
    that --require names: it can be a container's health check.
    """
    from cli import render

    findings = diagnose(Path.cwd(), render.LiveProgress(ctx.obj["quiet"]))
    lacking = unmet(findings, require)
    works = healthy(findings) and not lacking
    if as_json:
        rows = [asdict(finding) for finding in findings]
        answer = {"healthy": works, "required": list(require), "unmet": lacking, "findings": rows}
        render.print_json(json.dumps(answer, indent=2))
    else:
        render.print_table(render.findings_table(findings))
        for finding in findings:
            if finding.remedy and finding.state != "ok":
                render.print_line(f"{finding.name}: {finding.remedy}")
        render.print_line("Runs work here." if healthy(findings) else "Runs do not work here: fix what is broken.")
        if lacking:
            render.print_line(f"Required, and does not work: {', '.join(lacking)}.")
    if not works:
        ctx.exit(1)


def diagnose(folder: Path, progress: "Progress") -> list[Finding]:
    """Look at everything, on behalf of runs in `folder`. Takes as long as the import of torchvision: seconds."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [*ESSENTIAL]
    if _has_driver():
        parts += GPU_PROVIDERS
    if importlib.util.find_spec("tensorrt"):
        parts.append("tensorrt")
    with progress.task("Doctor", len(parts)) as advance, ThreadPoolExecutor(len(parts)) as pool:

        def try_out(part: str) -> list[Finding]:
            with progress.task(_TITLES[part], 1) as end:
                answer = ask(part)
                end()
            advance()
            return answer

        answers = dict(zip(parts, pool.map(try_out, parts), strict=True))
    tensorrt = answers.pop("tensorrt", [])
    by_name = {finding.name: finding for answer in answers.values() for finding in answer}  # what was tried counts
    driver = by_name.get("NVIDIA driver")
    return [
        Finding("Python", "ok", platform.python_version(), "everything", essential=True),
        *by_name.values(),
        _with_remedy(tensorrt, driver.found if driver and driver.state == "ok" else None),
        *guarded("memory", memory),
        *guarded("disk here", partial(disk, folder)),
        *guarded(_TEMPORARY, disk),
    ]


def ask(part: str, limit: float = _LIMIT) -> list[Finding]:
    """Try a part in a process of its own, which is killed if it takes longer than `limit` seconds.

    If it does not come to its end, the findings that it owes say why.
    """
    command, reason = [sys.executable, "-m", "cli.probe", part], None
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
        output = done.stdout
        if done.returncode:
            reason = probe_reason(done.returncode, done.stderr.decode(errors="replace"))
    except subprocess.TimeoutExpired as late:
        output, reason = late.stdout or b"", f"gives no answer in {limit:g} s"
    lines = output.decode(errors="replace").split("\n")[:-1]  # the last is empty, or was cut off
    findings = [Finding(**json.loads(line)) for line in lines]
    return findings if reason is None else [*findings, *_owed(part, findings, reason)]


def probe_reason(code: int, log: str) -> str:
    """Return why a probe failed, in one line: the first error that ONNX Runtime logged, else the last line."""
    if code < 0:
        return f"crashes with signal {-code}"
    lines = [line for line in _COLOURS.sub("", log).splitlines() if line.strip()]
    logged = next((line for line in lines if ":onnxruntime:" in line), lines[-1] if lines else "no reason given")
    return " ".join(logged.rpartition("] ")[2].rpartition(" with error: ")[2].split())


def _owed(part: str, findings: list[Finding], reason: str) -> list[Finding]:
    """Return the findings that a part did not come to, with the reason; always one of an essential part."""
    names = {finding.name for finding in findings}
    owed = [row for row in _OWED[part] if row.name not in names]
    if not owed and part in ESSENTIAL:
        owed = [Finding(_TITLES[part], "broken", "", "what it would have said next")]
    return [replace(row, found=reason) for row in owed]


def _with_remedy(tensorrt: list[Finding], driver: str | None) -> Finding:
    """Return the finding of TensorRT, with what installs one that fits the driver if it does not work."""
    if not tensorrt:
        return replace(TENSORRT, state="absent", found="not installed", remedy=tensorrt_remedy(driver, again=False))
    (finding,) = tensorrt
    if finding.state == "ok" or finding.remedy:
        return finding
    return replace(finding, remedy=tensorrt_remedy(driver, again=True))


def healthy(findings: list[Finding]) -> bool:
    """Return whether the tool can run here, at least on the CPU."""
    return all(finding.state in {"ok", "low"} for finding in findings if finding.essential)


def unmet(findings: list[Finding], required: tuple[str, ...]) -> list[str]:
    """Return those of the required things, by their names in `REQUIRABLE`, that work by no finding."""
    working = [f"{finding.name} " for finding in findings if finding.state == "ok"]
    return [name for name in required if not any(own.startswith(f"{REQUIRABLE[name]} ") for own in working)]


def _has_driver() -> bool:
    """Return whether there is anything of an NVIDIA driver, so that GPU providers are worth a try."""
    if shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def memory() -> Iterator[Finding]:
    """Look at the memory that is free."""
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
    """Return the bytes of memory that the container may use, None without a limit."""
    for file in files:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None  # "max" means no limit
    return None


def disk(folder: Path | None = None) -> Iterator[Finding]:
    """Look at the disk of a folder, or of temporary files, by writing a file."""
    name, purpose, remedy = (
        "disk here",
        "run directories: about 1 GB for an ImageNet model",
        "give --out another folder",
    )
    if folder is None:
        name, purpose, remedy = _TEMPORARY, "graphs while they are verified", "export TMPDIR=ANOTHER_FOLDER"
    row = Finding(name, "broken", "", purpose, remedy, essential=folder is None)
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    except OSError as error:
        yield replace(row, found=f"{folder or 'TMPDIR'} cannot be written: {error.strerror or error}")
        return
    enough = free >= _ENOUGH_DISK
    state: State = "ok" if enough else "low"
    yield replace(row, state=state, found=f"{gib(free)} free", remedy=None if enough else remedy)
