"""What `clusterq doctor` looks at: each thing that a run may need, tried out, not only looked up.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli import remedies
from cli.machine import Finding, disk, guarded, memory, temporary_disk
from cli.probe import ESSENTIAL, GPU_PROVIDERS

if TYPE_CHECKING:
    from calib.support.progress import Progress

LIMIT = 60.0
"""Seconds that a part may take: on a cold disk torch alone takes half of them."""

_TITLES = {"library": "torch and clusterq-deploy", "runtime": "ONNX Runtime", "tensorrt": "TensorRT"}

REQUIRABLE = {
    "gpu": "GPU",
    "tensorrt": "TensorRT",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime, Tensorrt",
    "timm": "timm",
}
"""What a run can do without and a user may require, and how its findings' names begin."""

_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Answer:
    """What the process of a part said.

    Attributes:
        findings: those that it came to.
        reason: why it did not come to its end, in a line; None where it did.
    """

    findings: list[Finding]
    reason: str | None


def diagnose(folder: Path, progress: "Progress") -> list[Finding]:
    """Look at everything, on behalf of runs in `folder`. Takes as long as the import of torchvision: seconds."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [*ESSENTIAL]
    if _has_driver():
        parts += GPU_PROVIDERS
    if importlib.util.find_spec("tensorrt"):
        parts.append("tensorrt")

    def watched(part: str) -> Answer:
        title = GPU_PROVIDERS[part].name if part in GPU_PROVIDERS else _TITLES.get(part, part)
        with progress.task(title, 1) as advance:
            answer = ask(part)
            advance()
        return answer

    with progress.task("Doctor", len(parts)) as advance, ThreadPoolExecutor(len(parts)) as pool:
        answers = {}
        for part, answer in zip(parts, pool.map(watched, parts), strict=True):
            answers[part] = answer
            advance()
    found = [Finding("Python", "ok", platform.python_version(), "everything", essential=True)]
    for part in ESSENTIAL:
        found += _answered(part, answers[part])
    tried = [finding for name in GPU_PROVIDERS if name in answers for finding in _of_provider(name, answers[name])]
    found = [finding for finding in found if finding.name not in {own.name for own in tried}] + tried
    driver = next((own.found for own in found if own.name == "NVIDIA driver" and own.state == "ok"), None)
    found.append(_tensorrt(answers.get("tensorrt"), driver))
    found += guarded("memory", memory)
    found += guarded("disk here", partial(disk, "disk here", folder))
    found += guarded("disk for temporary files", temporary_disk)
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


def ask(part: str, limit: float = LIMIT) -> Answer:
    """Try a part in a process of its own, which is killed if it takes longer than `limit` seconds."""
    command = [sys.executable, "-m", "cli.probe", part]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        return Answer(_parsed(late.stdout or b""), f"gives no answer in {limit:g} s")
    reason = probe_reason(done.returncode, done.stderr.decode(errors="replace")) if done.returncode else None
    return Answer(_parsed(done.stdout), reason)


def _parsed(answers: bytes) -> list[Finding]:
    lines = answers.decode(errors="replace").split("\n")[:-1]  # the last is empty, or was cut off
    return [Finding(**json.loads(line)) for line in lines]


def probe_reason(code: int, log: str) -> str:
    """Why a probe failed, in a line: the first thing that ONNX Runtime logged as an error, else the last line."""
    if code < 0:
        return f"crashes with signal {-code}"
    lines = [line for line in _COLOURS.sub("", log).splitlines() if line.strip()]
    logged = next((line for line in lines if ":onnxruntime:" in line), lines[-1] if lines else "no reason given")
    return " ".join(logged.rpartition("] ")[2].rpartition(" with error: ")[2].split())


def _answered(part: str, answer: Answer) -> Iterator[Finding]:
    """The findings of a part, and where it did not come to its end those that it owes."""
    yield from answer.findings
    if answer.reason is not None:
        names = {finding.name for finding in answer.findings}
        owed = [row for row in ESSENTIAL[part] if row.name not in names]
        for row in owed or [Finding(_TITLES.get(part, part), "broken", "", "what it would have said next")]:
            yield replace(row, found=answer.reason)


def _of_provider(name: str, answer: Answer) -> list[Finding]:
    return answer.findings or [replace(GPU_PROVIDERS[name], found=str(answer.reason))]


def _tensorrt(answer: Answer | None, driver: str | None) -> Finding:
    if answer is None:
        remedy = remedies.tensorrt(driver, again=False)
        return Finding("TensorRT", "absent", "not installed", "engines", remedy)
    remedy = remedies.tensorrt(driver, again=True)
    return next(iter(answer.findings), Finding("TensorRT", "broken", str(answer.reason), "engines", remedy))


def _has_driver() -> bool:
    """Whether there is anything of an NVIDIA driver, so that GPU providers are worth a try."""
    if shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
