"""What people see: progress on stderr, tables on stdout."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from cli.options import Command

if TYPE_CHECKING:
    from calib.support.progress import Advance
    from cli.probe import Finding
    from clusterq_deploy.models import ModelEntry
    from clusterq_deploy.plan import Plan
    from clusterq_deploy.report import Report
    from clusterq_deploy.report.compare import Comparison
    from clusterq_deploy.report.tables import Table as ReportTable


class LiveProgress:
    """Shows the library's tasks as bars on stderr; silent if stderr is no terminal.

    A task that is opened while another one runs is indented below it until it ends; tasks of several threads are
    at the same depth. Tasks may be opened, advanced and closed in any thread.

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
        """Open a task; the losses that it reports are behind its bar."""
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
        """Keep the bars on the screen while any task runs; yield them and the depth of a new task."""
        thread = threading.get_ident()
        with self._lock:
            nested = self._open[thread]
            depth = nested + (self._open.total() > nested)
            self._open[thread] += 1
            if self._bars is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                figures = TextColumn("{task.fields[figures]}", style="dim")
                self._bars = RichProgress(*columns, TimeRemainingColumn(), figures, console=self._console)
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


def _stdout() -> TextIO:
    """Return the stdout of the command that runs, while `sys.stdout` is for a model's own code."""
    ctx = click.get_current_context(silent=True)
    stream: TextIO = (ctx.meta.get(Command.STDOUT) if ctx else None) or sys.stdout
    return stream


def print_text(text: str) -> None:
    """Print text byte for byte."""
    _stdout().write(text)


def print_json(text: str) -> None:
    """Print machine output, which ends in one line break."""
    print_text(text.removesuffix("\n") + "\n")


def print_line(text: str) -> None:
    """Print a line as it is, however long."""
    Console(file=_stdout(), soft_wrap=True, highlight=False, markup=False).print(text)


def print_table(table: Table) -> None:
    """Print a table, in 160 columns if stdout is no terminal."""
    file = _stdout()
    Console(file=file, width=None if Console(file=file).is_terminal else 160).print(table)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print records as JSON or as a table."""
    if as_json:
        print_json(json.dumps(rows, indent=2))
    else:
        print_table(rows_table(rows))


def report_table(report: "Report") -> Table:
    """Return the closing table of a run: a row for each variant in each runtime."""
    from clusterq_deploy.report.tables import closing_table

    return _rich(closing_table(report))


def comparison_tables(comparison: "Comparison") -> list[Table]:
    """Return several runs side by side, a table for each thing that matters."""
    return [_rich(table) for table in comparison.tables()]


def _rich(table: "ReportTable") -> Table:
    columns = (Column(name, justify="left" if at < table.left else "right") for at, name in enumerate(table.columns))
    shown = Table(*columns, title=table.title, title_justify="left")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def conclusions(report: "Report") -> list[str]:
    """Return what to deploy in each runtime, what makes that uncertain, and the images that could not be read."""
    from clusterq_deploy.report import text
    from clusterq_deploy.report.analysis import verdicts

    sentences = [text.sentence(verdict, report.evaluation.labelled) for verdict in verdicts(report)]
    return [*sentences, *text.caveats(report), *filter(None, [text.unreadable_note(report)])]


def plan_table(plan: "Plan") -> Table:
    """Return the stages of a run that was not done."""
    from clusterq_deploy.report import formats

    title = f"{plan.model} on {plan.device}: nothing was done or written"
    table = Table("stage", "state", "work", Column("about", justify="right"), title=title, title_justify="left")
    for stage in plan.stages:
        seconds = formats.duration(stage.seconds) if stage.seconds is not None else "not estimated"
        table.add_row(stage.stage, stage.state, Text(stage.work), seconds if stage.state == "to do" else formats.ABSENT)
    return table


def plan_lines(plan: "Plan") -> Iterator[str]:
    """Yield what is below the table of a plan."""
    from clusterq_deploy.plan import UNCERTAIN
    from clusterq_deploy.report import formats

    for name, asked in plan.scaled.items():
        yield f"{name} is {plan.settings[name]:,}, not {asked:,}: less for a large model on a CPU"
    if plan.memory_bytes is None:
        yield "Everything is finished: a run would write the report again."
        return
    yield (
        f"Roughly {formats.duration(plan.seconds)}, and {plan.memory_bytes / 1e9:.1f} GB of memory at a time. "
        f"This may be off by a factor of {UNCERTAIN:g}: one layer was timed here and the model's operations counted; "
        "exports and engines are left out, and fine-tuning may end early."
    )


def models_table(entries: list["ModelEntry"]) -> Table:
    """Return the known models; those without BatchNorm are marked."""
    numbers = (Column(name, justify="right") for name in ("parameters", "top-1 %"))
    caption = "Also: timm:NAME and path/to/module.py:factory"
    table = Table("model", "source", "input", *numbers, "BatchNorm", caption=caption, caption_justify="left")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.source,
            "x".join(map(str, entry.input_size)),
            f"{entry.parameters:,}" if entry.parameters else "",
            f"{entry.top1:.2f}" if entry.top1 else "",
            "yes" if entry.has_batchnorm else "no: cannot be used",
        )
    return table


_STATE_STYLES = {"ok": "green", "low": "yellow", "absent": "dim", "broken": "bold red"}


def findings_table(findings: list["Finding"]) -> Table:
    """Return what `clusterq doctor` found, a row per thing."""
    table = Table("what", "state", "found", "for")
    for finding in findings:
        state = Text(finding.state, style=_STATE_STYLES[finding.state])
        table.add_row(finding.name, state, Text(finding.found), Text(finding.purpose))
    return table


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Return plain records as a table, a column for each key that the first one has."""
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in rows[0]))
    return table


def _cell(value: Any) -> str:
    """Return a number with three decimals, a small one with two digits; nothing for None."""
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
    return "" if value is None else str(value)
