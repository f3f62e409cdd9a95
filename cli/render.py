"""What people see: progress on stderr, tables on stdout."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from calib.support.progress import Advance
    from cli.probe import Finding
    from clusterq_deploy.models import ModelEntry
    from clusterq_deploy.plan import Plan
    from clusterq_deploy.report import Report
    from clusterq_deploy.report.compare import Comparison


class LiveProgress:
    """Shows the library's tasks as bars on stderr; silent where stderr is no terminal.

    A task that is opened while another one runs stands indented below it until it ends; tasks of several threads stand
    beside each other. Tasks may be opened, advanced and closed in any thread.

    Attributes:
        shown: whether there is anything to see.
    """

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self.shown = not quiet and self._console.is_terminal
        self._lock = threading.Lock()
        self._bars: RichProgress | None = None
        self._open = Counter[int]()  # tasks by the thread that opened them

    @contextmanager
    def task(self, description: str, total: int) -> Iterator["Advance"]:
        """Open a task; what it tells of losses stands behind its bar."""
        if not self.shown:
            yield lambda n=1, **figures: None
            return
        with self._display() as (bars, depth):
            task = bars.add_task(f"{'  ' * depth + description:<28}", total=total, figures="")

            def advance(n: int = 1, **figures: float) -> None:
                text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
                bars.update(task, advance=n, figures=text)

            try:
                yield advance
            finally:
                if depth:
                    bars.remove_task(task)

    @contextmanager
    def _display(self) -> Iterator[tuple[RichProgress, int]]:
        """The bars on the screen, there while any task runs, and how deep a new task stands below those that run."""
        thread = threading.get_ident()
        with self._lock:
            own = self._open[thread]
            depth = own + (self._open.total() > own)
            self._open[thread] += 1
            if self._bars is None:
                self._bars = RichProgress(*_columns(), console=self._console)
                self._bars.start()
            bars = self._bars
        try:
            yield bars, depth
        finally:
            with self._lock:
                self._open[thread] -= 1
                if self._open.total() == 0:
                    bars.stop()
                    self._bars = None


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", style="dim"),
    )


def print_json(text: str) -> None:
    """Machine output, alone on stdout."""
    print_text(text if text.endswith("\n") else text + "\n")


def print_text(text: str) -> None:
    """Text on stdout, byte for byte."""
    sys.stdout.write(text)


def print_table(table: Table) -> None:
    """A table on stdout; as wide as it must be where stdout is no terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Records on stdout, as JSON or as a table."""
    if as_json:
        print_json(json.dumps(rows, indent=2))
    else:
        print_table(rows_table(rows))


def print_line(text: str) -> None:
    """A line on stdout, as it is."""
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def report_table(report: "Report") -> Table:
    """The closing table of a run: a row for each variant in each runtime."""
    from clusterq_deploy.report import formats, wording
    from clusterq_deploy.report.findings import accuracy_rows, half_was_timed, latency_rows

    title = f"{wording.model_name(report)} on {report.evaluation.dataset} ({report.evaluation.images} images)"
    table = Table(title=title, title_justify="left")
    for name in ("variant", "runtime", "graph"):
        table.add_column(name)
    over_half, labelled = half_was_timed(report), report.evaluation.labelled
    numbers = [
        "size",
        *(["top-1 %", "drop"] if labelled else []),
        "agreement %",
        "batch 1, ms",
        "speed-up",
        *(["over fp16"] if over_half else []),
    ]
    for name in numbers:
        table.add_column(name, justify="right")
    timed = {
        (row.variant, row.latency.runtime, row.latency.graph): row
        for row in latency_rows(report)
        if row.latency.batch == 1
    }
    previous = None
    for row in accuracy_rows(report):
        key = (row.variant, row.accuracy.runtime, row.accuracy.graph)
        own = timed.get(key) if row.accuracy.graph else None
        table.add_row(
            row.variant if row.variant != previous else "",
            row.accuracy.runtime,
            formats.file_name(row.accuracy.graph),
            formats.size(row.size_bytes),
            *([formats.number(row.accuracy.top1), formats.number(row.drop)] if labelled else []),
            formats.number(row.accuracy.agreement),
            f"{'~' if own.unsteady else ''}{formats.milliseconds(own.latency.median_ms)}" if own else formats.ABSENT,
            _times(own.speedup if own else None, *((own.latency.speedup_low, own.latency.speedup_high) if own else ())),
            *([_times(own.over_half if own else None)] if over_half else []),
            end_section=False,
        )
        previous = row.variant
    return table


def _times(ratio: float | None, low: float | None = None, high: float | None = None) -> str:
    """`1.66x`, or a dash; with its interval where there is one: `1.66x 1.60-1.71`."""
    if ratio is None:
        return "\N{EN DASH}"
    return f"{ratio:.2f}x" if low is None or high is None else f"{ratio:.2f}x {low:.2f}-{high:.2f}"


def comparison_tables(comparison: "Comparison") -> Iterator[Table]:
    """Several runs side by side, a table for each thing that matters."""
    from clusterq_deploy.report.compare import formatted, headings, text_columns

    for title, rows in comparison.tables().items():
        table = Table(title=title, title_justify="left")
        left = text_columns(rows)
        for index, name in enumerate(headings(rows)):
            table.add_column(name, justify="left" if index < left else "right")
        for row in rows:
            table.add_row(*map(Text, formatted(row)))
        yield table


def conclusions(report: "Report") -> list[str]:
    """What to deploy in each runtime, what keeps that from being certain, and the images that could not be read."""
    from clusterq_deploy.report.verdict_wording import caveats, sentence
    from clusterq_deploy.report.verdicts import verdicts
    from clusterq_deploy.report.wording import unreadable_note

    lost = unreadable_note(report)
    found = [sentence(verdict, report.evaluation.labelled) for verdict in verdicts(report)]
    return [*found, *caveats(report), *([lost] if lost else [])]


def plan_table(plan: "Plan") -> Table:
    """The stages of a run that was not done."""
    from clusterq_deploy.report import formats

    table = Table(title=f"{plan.model} on {plan.device}: nothing was done or written", title_justify="left")
    for name in ("stage", "state", "work"):
        table.add_column(name)
    table.add_column("about", justify="right")
    for own in plan.stages:
        seconds = formats.duration(own.seconds) if own.seconds is not None else "not estimated"
        table.add_row(own.stage, own.state, Text(own.work), seconds if own.state == "to do" else formats.ABSENT)
    return table


def plan_lines(plan: "Plan") -> Iterator[str]:
    """What stands below the table of a plan."""
    from clusterq_deploy.report import formats
    from clusterq_deploy.plan import UNCERTAIN

    for name, asked in plan.scaled.items():
        yield f"{name} is {plan.settings[name]:,}, not {asked:,}: less for a large model on a CPU"
    if plan.memory_bytes is None:
        yield "Everything is finished: a run would write the report anew."
        return
    yield (
        f"Roughly {formats.duration(plan.seconds)}, and {plan.memory_bytes / 1e9:.1f} GB of memory at a time. "
        f"This may be off by a factor of {UNCERTAIN:g}: one layer was timed here and the model's operations counted; "
        "exports and engines are left out, and fine-tuning may end early."
    )


def models_table(entries: list["ModelEntry"]) -> Table:
    """Known models; those without BatchNorm are marked."""
    table = Table(caption="Also: timm:NAME and path/to/module.py:factory", caption_justify="left")
    for name, justify in (
        ("model", "left"),
        ("source", "left"),
        ("input", "left"),
        ("parameters", "right"),
        ("top-1 %", "right"),
        ("BatchNorm", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for entry in entries:
        table.add_row(
            entry.name,
            entry.source,
            "x".join(str(side) for side in entry.input_size),
            f"{entry.parameters:,}" if entry.parameters else "",
            f"{entry.top1:.2f}" if entry.top1 else "",
            "yes" if entry.has_batchnorm else "no: cannot be used",
        )
    return table


_STATE_STYLES = {"ok": "green", "low": "yellow", "absent": "dim", "broken": "bold red"}


def findings_table(findings: list["Finding"]) -> Table:
    """What `clusterq doctor` found, a row a thing."""
    table = Table()
    for name in ("what", "state", "found", "for"):
        table.add_column(name)
    for finding in findings:
        state = Text(finding.state, style=_STATE_STYLES[finding.state])
        table.add_row(finding.name, state, Text(finding.found), Text(finding.purpose))
    return table


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Plain records as a table, a column for each key that the first one has."""
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in rows[0]))
    return table


def _cell(value: Any) -> str:
    """A number with three decimals, a small one with two digits; nothing for None."""
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
    return "" if value is None else str(value)
