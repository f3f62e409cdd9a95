"""What was measured, for people: the report of one run, or several runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import options, stages

if TYPE_CHECKING:
    from clusterq_deploy.report.compare import Comparison


@click.command(cls=options.Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--compare", is_flag=True, help="Lay the reports of several runs side by side; write nothing.")
@options.json_option
@click.option("--markdown", is_flag=True, help="Print Markdown tables, to paste.")
@click.option("--csv", is_flag=True, help="Print CSV: a row per variant and file, every number with it.")
@click.pass_context
def report(
    ctx: click.Context, /, runs: tuple[Path, ...], compare: bool, as_json: bool, markdown: bool, csv: bool
) -> None:
    """Write report.json, report.md and report.html of RUN from what has been measured so far.

    With --compare the reports of several runs, written before, are laid side by side instead.
    """
    from cli import render
    from clusterq_deploy.report.compare import compare as compare_reports
    from clusterq_deploy.report.compare import read_reports

    forms = [name for name, asked in (("json", as_json), ("markdown", markdown), ("csv", csv)) if asked]
    if len(forms) > 1:
        raise click.UsageError(f"{' and '.join(f'--{name}' for name in forms)} exclude each other: give one", ctx)
    form = forms[0] if forms else None
    if compare:
        _show(compare_reports(read_reports(list(runs))), form)
        return
    if len(runs) > 1:
        raise click.UsageError(f"got {len(runs)} runs, expected one: add --compare to lay them side by side", ctx)
    pipeline = stages.resume(ctx, runs[0])
    written = pipeline.report()
    if form == "json":
        render.print_text(written.to_json())
    elif form:
        _show(compare_reports({runs[0].resolve().name: written}), form)
    else:
        render.print_table(render.report_table(written))
        for line in (*render.conclusions(written), f"Report: {pipeline.directory.path / 'report.html'}"):
            render.print_line(line)


def _show(comparison: "Comparison", form: str | None) -> None:
    """Print a comparison: as JSON, Markdown or CSV, else as tables for a terminal."""
    from cli import render

    if form is None:
        for table in render.comparison_tables(comparison):
            render.print_table(table)
        for note in comparison.notes:
            render.print_line(note)
    else:
        print_as = {"json": comparison.to_json, "csv": comparison.to_csv, "markdown": comparison.to_markdown}
        render.print_text(print_as[form]())
