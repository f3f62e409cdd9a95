"""The tables of a report, defined once for the terminal, Markdown and HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clusterq_deploy.report.analysis import HALF, AccuracyRow, LatencyRow, accuracy_rows, latency_rows, size_share
from clusterq_deploy.report.formats import (
    ABSENT,
    file_name,
    milliseconds,
    number,
    percent,
    scientific,
    size,
    speedup,
    with_error,
)
from clusterq_deploy.report.text import model_name
from clusterq_deploy.results.report import Report


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. The first `left` columns are aligned to the left, the others, numbers, to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def with_first(self, column: str, cells: Sequence[str]) -> "Table":
        """Return the table with one more column in front, a cell per row."""
        rows = [(cell, *row) for cell, row in zip(cells, self.rows, strict=True)]
        return replace(self, columns=(column, *self.columns), rows=rows, left=self.left + 1)


def to_markdown(table: Table) -> str:
    """Return a table in Markdown, padded for a fixed-width font."""
    columns, *rows = [[escaped(cell) for cell in line] for line in (table.columns, *table.rows)]
    widths = [max(3, *map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    ruler = ["-" * width if at < table.left else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    pads = [str.ljust if at < table.left else str.rjust for at in range(len(widths))]
    lines = [
        [pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)] for line in (columns, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:]))


def escaped(text: str) -> str:
    """Return text as one line, with Markdown markup, HTML and the separators of cells escaped."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


def accuracy_table(rows: Sequence[AccuracyRow], labelled: bool = True) -> Table:
    """Return accuracy and size by variant, runtime and file; without labels only the agreement."""
    cells = []
    for row in rows:
        top1, drop = with_error(row.top1, row.top1_error), with_error(row.drop, row.drop_error)
        scores = (top1, number(row.top5), drop) if labelled else ()
        cells.append((*_place(row), size(row.size_bytes), *scores, with_error(row.agreement, row.agreement_error)))
    scored = ("top-1 %", "top-5 %", "drop") if labelled else ()
    return Table("Accuracy", ("variant", "runtime", "file", "size", *scored, "agreement %"), cells, 3)


def latency_table(rows: Sequence[LatencyRow], files: bool = False) -> Table:
    """Return latency by variant, runtime, file (if `files`), batch and threads; over fp16 too if that was timed."""
    over_half, left = any(row.variant == HALF for row in rows), 3 if files else 2
    cells = [
        (
            *_place(row)[:left],
            str(row.batch),
            str(row.threads or ABSENT),
            _median(row),
            milliseconds(row.p90_ms),
            milliseconds(row.p99_ms),
            f"{row.images_per_second:,.0f}",
            speedup(row.speedup, row),
            *([speedup(row.over_half)] if over_half else []),
        )
        for row in rows
    ]
    times = ("batch", "threads", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up")
    columns = (*("variant", "runtime", "file")[:left], *times, *(["over fp16"] if over_half else []))
    return Table("Latency", columns, cells, left)


def closing_table(report: Report) -> Table:
    """Return a summary of accuracy and latency for a terminal, a row per variant, runtime and file."""
    timings, labelled = latency_rows(report), report.evaluation.labelled
    over_half = any(row.variant == HALF for row in timings)
    timed = {_place(row): row for row in timings if row.batch == 1}
    rows, previous = [], None
    for row in accuracy_rows(report):
        variant, *place = _place(row)
        timing = timed.get(_place(row)) if row.graph else None
        cells = [
            variant if variant != previous else "",
            *place,
            size(row.size_bytes),
            *([number(row.top1), number(row.drop)] if labelled else []),
            number(row.agreement),
            _median(timing) if timing else ABSENT,
            speedup(timing.speedup, timing) if timing else ABSENT,
            *([speedup(timing.over_half) if timing else ABSENT] if over_half else []),
        ]
        rows.append(tuple(cells))
        previous = variant
    scored = ("top-1 %", "drop") if labelled else ()
    columns = ("size", *scored, "agreement %", "batch 1, ms", "speed-up", *(["over fp16"] if over_half else []))
    title = f"{model_name(report)} on {report.evaluation.dataset} ({report.evaluation.images} images)"
    return Table(title, ("variant", "runtime", "graph", *columns), rows, 3)


def file_table(report: Report) -> Table:
    """Return the deployable files with their purpose and size."""
    rows = []
    for artifact in (artifact for variant in report.variants for artifact in variant.artifacts):
        purpose = "storage" if artifact.target == "int4" else artifact.target
        share = percent(size_share(report, artifact.size_bytes))
        rows.append((artifact.path, purpose, size(artifact.size_bytes), share))
    return Table("Files", ("file", "for", "size", "of fp32"), rows, 2)


def sensitivity_tables(report: Report) -> list[Table]:
    """Return the cost of quantizing each layer of each variant, the most expensive first."""
    columns, tables = ("layer", "bits", "KL, nats", "agreement %", "expected drop"), []
    for variant in report.variants:
        rows = [
            (layer.layer, layer.bits, scientific(layer.kl), number(layer.agreement), number(layer.expected_drop, 4))
            for layer in sorted(variant.sensitivities, key=lambda layer: -layer.kl)
        ]
        tables.append(Table(variant.name, columns, rows, 2))
    return [table for table in tables if table.rows]


def _place(row: AccuracyRow | LatencyRow) -> tuple[str, str, str]:
    return row.variant, row.runtime, file_name(row.graph)


def _median(row: LatencyRow) -> str:
    return ("~" if row.unsteady else "") + milliseconds(row.median_ms)
