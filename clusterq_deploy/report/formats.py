"""Numbers as the report writes them."""

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


def percent(share: float | None) -> str:
    """A share as a percentage: 0.254 is `25.4 %`."""
    return ABSENT if share is None else f"{100 * share:.1f} %"
