"""Numbers as the report writes them."""

import math
from collections.abc import Callable, Sequence

from clusterq_deploy.results.report import Latency

ABSENT = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float | None, decimals: int = 2) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None:
        return ABSENT
    text = f"{value:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0:.{decimals}f}"


def with_error(value: float | None, error: float | None) -> str:
    """`69.42 ± 0.65`; the error is left out where there is none."""
    return number(value) if value is None or error is None else f"{number(value)} ± {number(error)}"


def milliseconds(value: float) -> str:
    """Four digits: 0.123, 1.234, 12.34, 123.4."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def file_name(path: str | None) -> str:
    """The file at the end of a path in a run directory: model.ort.onnx."""
    return path.rpartition("/")[2] if path else ABSENT


def purpose(target: str) -> str:
    """What a file is for: a runtime, or, of two weights a byte, to be stored and shipped."""
    return "storage" if target == "int4" else target


def size(size_bytes: int | None) -> str:
    """A file size in decimal units: 46.8 MB."""
    if size_bytes is None:
        return ABSENT
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:.1f} kB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def speedup(value: float | None) -> str:
    """3.28 with a multiplication sign behind it."""
    return ABSENT if value is None else f"{value:.2f}{TIMES}"


def interval(ends: tuple[float, float] | None) -> str:
    """The ends of a speed-up's interval: `1.28 to 1.34` with a multiplication sign behind it."""
    return ABSENT if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}{TIMES}"


def speedup_with_interval(value: float | None, latency: Latency) -> str:
    """A speed-up with the interval that was measured of it: `1.31 (1.28-1.34)`, with a sign in front of the bracket."""
    if value is None or latency.speedup_low is None or latency.speedup_high is None:
        return speedup(value)
    return f"{speedup(value)} ({latency.speedup_low:.2f}\N{EN DASH}{latency.speedup_high:.2f})"


def percent(share: float | None) -> str:
    """A share as a percentage: 0.254 is `25.4 %`."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def scientific(value: float) -> str:
    """Two digits and an exponent, whatever the size: 3.5e-05; 0 is 0, a dash what is not finite."""
    return ABSENT if not math.isfinite(value) else f"{value:.1e}" if value else "0"


def alike(values: Sequence[float]) -> Callable[[float], str]:
    """How numbers that stand together are written: all with an exponent where even the largest is small, or none."""
    largest = max(map(abs, values), default=0.0)
    return scientific if largest and not 1e-4 <= largest < 1e5 else _three_digits


def _three_digits(value: float) -> str:
    """19.7, 0.917, 0.00071: five decimals at most; a dash for what is not finite."""
    if not math.isfinite(value):
        return ABSENT
    return number(value, min(max(2 - math.floor(math.log10(abs(value))), 0), 5)) if value else "0"
