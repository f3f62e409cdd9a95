"""Progress on stderr; tables, text and JSON on stdout."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    from clusterq_deploy.report.tables import Table as ReportTable
    from clusterq_deploy.results.engines import Compilation


class LiveProgress:
    """Shows the library's tasks as bars on stderr; `shown` is False if `quiet` or if stderr is not a terminal.

    A task that is opened while another one runs is indented below it until it ends; tasks of several threads are
    at the same depth. Tasks may be opened, advanced and closed in any thread.
    """

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self.shown = not quiet and self._console.is_terminal
        self._lock = threading.Lock()
        self._bars: RichProgress | None = None
        self._open = Counter[int]()  # tasks by the thread that opened them

    @contextmanager
    def task(self, description: str, total: int) -> Iterator["Advance"]:
        """Open a task; the losses that it reports are shown after its bar."""
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
        """Show the bars while any task runs; yield them and the depth of a new task."""
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


def print_json(value: Any) -> None:
    """Print JSON, with a line break at the end."""
    print_text(json.dumps(value, indent=2) + "\n")


def print_line(text: str) -> None:
    """Print a line without wrapping it."""
    Console(file=_stdout(), soft_wrap=True, highlight=False, markup=False).print(text)


def print_table(table: Table) -> None:
    """Print a table, in 160 columns if stdout is no terminal."""
    file = _stdout()
    Console(file=file, width=None if Console(file=file).is_terminal else 160).print(table)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print records as JSON, or as a table with a column for each key of the first one."""
    if as_json:
        print_json(rows)
        return
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in rows[0]))
    print_table(table)


def _cell(value: Any) -> str:
    """Return a number with three decimals, a small one with two digits; an empty string for None."""
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
    return "" if value is None else str(value)


def rich_table(table: "ReportTable") -> Table:
    """Return a table of the library as one that rich can print."""
    columns = (Column(name, justify="left" if at < table.left else "right") for at, name in enumerate(table.columns))
    shown = Table(*columns, title=table.title, title_justify="left")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def print_report(report: "Report", out: Path) -> None:
    """Print the closing table of the run in `out`, and what follows from it."""
    from clusterq_deploy.report.tables import closing_table
    from clusterq_deploy.report.text import summary

    print_table(rich_table(closing_table(report)))
    skipped = (f"Skipped {entry.stage}: {entry.reason}" for entry in report.skipped)
    for line in (summary(report), *conclusions(report), *skipped, f"Report: {out / 'report.html'}"):
        print_line(line)


def conclusions(report: "Report") -> list[str]:
    """Return what to deploy in each runtime, what makes that uncertain, and the images that could not be read."""
    from clusterq_deploy.report import plans, text
    from clusterq_deploy.report.analysis import verdicts

    sentences = [text.sentence(verdict, report.evaluation.labelled) for verdict in verdicts(report)]
    return [
        *sentences,
        *plans.plan_sentences(report),
        *text.caveats(report),
        *filter(None, [text.unreadable_note(report)]),
    ]


def compiled(compilation: "Compilation") -> str:
    """Return what TensorRT-RTX made of a graph, in one line."""
    plan = compilation.plan
    if plan is None:
        return "TensorRT-RTX refuses it"
    if not plan.kernels:
        return f"TensorRT-RTX {plan.release} builds it; {' '.join(plan.notes)}"
    writing = f", writing {', '.join(plan.convolutions_write)}" if plan.convolutions else ""
    return (
        f"TensorRT-RTX {plan.release} builds it for {', '.join(plan.targets)}: {plan.kernels} kernels, "
        f"{plan.convolutions_int8} of {plan.convolutions} convolutions in INT8{writing}; {plan.requantizations} "
        f"requantizations; {plan.bytes_moved:,} bytes of activations read and written per image"
    )


def print_plan(plan: "Plan") -> None:
    """Print the stages of a run that was only planned, and what it would take."""
    from clusterq_deploy.plan import UNCERTAIN
    from clusterq_deploy.report import formats

    title = f"{plan.model} on {plan.device}: nothing was done or written"
    table = Table("stage", "state", "work", Column("about", justify="right"), title=title, title_justify="left")
    for stage in plan.stages:
        seconds = formats.duration(stage.seconds) if stage.seconds is not None else "not estimated"
        table.add_row(stage.stage, stage.state, Text(stage.work), seconds if stage.state == "to do" else formats.ABSENT)
    print_table(table)
    for name, requested in plan.scaled.items():
        print_line(f"{name} is {plan.settings[name]:,}, not {requested:,}: reduced for a large model on a CPU")
    if plan.memory_bytes is None:
        print_line("Everything is finished: a run would only write the report again.")
    else:
        print_line(
            f"Roughly {formats.duration(plan.seconds)}, and {plan.memory_bytes / 1e9:.1f} GB of memory at a time. This "
            f"may be off by a factor of {UNCERTAIN:g}: it is the time of one layer here and the model's operation "
            "count; exports and engines are not included, and fine-tuning may end early."
        )


def models_table(entries: list["ModelEntry"]) -> Table:
    """Return the known models; those without BatchNorm are marked."""
    numbers = (Column(name, justify="right") for name in ("parameters", "top-1 %"))
    caption = "Also: timm:NAME, path/to/module.py:factory and path/to/program.pt2"
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
    """Return the findings of `clusterq doctor`, a row each."""
    table = Table("what", "state", "found", "for")
    for finding in findings:
        state = Text(finding.state, style=_STATE_STYLES[finding.state])
        table.add_row(finding.name, state, Text(finding.found), Text(finding.purpose))
    return table
