"""Tables as Markdown."""

import re
from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A table padded for a fixed-width font; columns from `left` on are numbers and stand to the right."""
    left = len(headings) if left is None else left
    lines = [headings, *rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(headings))]
    pads = [str.ljust if column < left else str.rjust for column in range(len(headings))]
    ruler = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    cells = [[pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], ruler, *cells[1:]])


def escaped(text: str) -> str:
    """Text as one line in which Markdown finds no markup, HTML or table cell."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))
