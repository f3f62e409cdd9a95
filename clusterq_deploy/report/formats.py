"""The formats of numbers in the report; a dash for None."""

import math
from collections.abc import Callable, Sequence

from clusterq_deploy.results.report import Latency

ABSENT = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float | None, decimals: int = 2) -> str:
    """Return a number with a true minus sign."""
    if value is None:
        return ABSENT
    text = f"{value:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0:.{decimals}f}"


def with_error(value: float | None, error: float | None) -> str:
    """Return `69.42 ± 0.65`, or only the number if there is no error."""
    return number(value) if value is None or error is None else f"{number(value)} ± {number(error)}"


def milliseconds(value: float) -> str:
    """Return four digits: 0.123, 1.234, 12.34, 123.4."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def file_name(path: str | None) -> str:
    """Return the last part of a path in a run directory: model.ort.onnx."""
    return path.rpartition("/")[2] if path else ABSENT


def size(size_bytes: int | None) -> str:
    """Return a file size in decimal units: 46.8 MB."""
    if size_bytes is None:
        return ABSENT
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:.1f} kB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return `42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def speedup(value: float | None, latency: Latency | None = None) -> str:
    """Return a speed-up, followed by its interval in brackets if `latency` has one."""
    if value is None:
        return ABSENT
    interval = ""
    if latency and latency.speedup_low is not None and latency.speedup_high is not None:
        interval = f" ({latency.speedup_low:.2f}{ABSENT}{latency.speedup_high:.2f})"
    return f"{value:.2f}{TIMES}{interval}"


def percent(share: float | None) -> str:
    """Return a share as a percentage: `25.4 %` for 0.254."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def scientific(value: float) -> str:
    """Return two digits and an exponent: 3.5e-05; `0` for 0, a dash if the value is not finite."""
    return ABSENT if not math.isfinite(value) else f"{value:.1e}" if value else "0"


def uniform(values: Sequence[float]) -> Callable[[float], str]:
    """Return one format for several numbers: with an exponent if the largest is very small or large, else without."""
    largest = max(map(abs, values), default=0.0)
    return scientific if largest and not 1e-4 <= largest < 1e5 else _three_digits


def shortened(name: str, most: int = 48) -> str:
    """Return a name without its middle if it is longer than `most` characters."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def _three_digits(value: float) -> str:
    """Return 19.7, 0.917 or 0.00071: five decimals at most; a dash if the value is not finite."""
    if not math.isfinite(value):
        return ABSENT
    return number(value, min(max(2 - math.floor(math.log10(abs(value))), 0), 5)) if value else "0"
