"""`report.md`: the report as tables that read well in a terminal and on a code host."""

import shlex
import textwrap
from collections.abc import Iterable

from clusterq_deploy.report import engines, tables, text
from clusterq_deploy.report.analysis import accuracy_rows, latency_rows, verdicts
from clusterq_deploy.report.tables import Table, escaped
from clusterq_deploy.report.tables import to_markdown as table_text
from clusterq_deploy.results.report import Report


def to_markdown(report: Report) -> str:
    """Return the text of `report.md`."""
    labelled, features = report.evaluation.labelled, report.features
    sections = [
        f"# {escaped(text.model_name(report))}: quantization report",
        escaped(text.summary(report)),
        _bullets(text.sentence(verdict, labelled) for verdict in verdicts(report)),
        " ".join(f"**{escaped(caveat)}**" for caveat in text.caveats(report)),
        _section(tables.accuracy_table(accuracy_rows(report), labelled), "Not measured."),
        _section(tables.latency_table(latency_rows(report)), "Not measured."),
        *_engines(report),
        _section(tables.file_table(report), "None was written."),
        _bullets(f"{path}: {notes}" for path, notes in text.file_notes(report)),
        "## How to read these numbers",
        _bullets(text.notes(report)),
        "## What was skipped",
        _bullets(_skipped(report)) or "Nothing.",
        *_sensitivities(report),
        _section(Table("Calibration set", ("", ""), text.calibration_facts(report), 2)),
        escaped(" ".join([text.feature_sentence(report) or "", *(features.notes if features else ())])),
        _section(Table("Environment", ("", ""), text.environment_facts(report), 2)),
        "## Command",
        textwrap.indent("\n".join(map(shlex.join, report.commands or [report.command])), "    "),
        f"Seed {report.seed}; clusterq-deploy {escaped(report.clusterq_deploy)}; {escaped(report.created)}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _engines(report: Report) -> list[str]:
    parts = [_section(table, level=3) for table in engines.engine_tables(report)]
    parts += [_section(table, level=3) for table in engines.slowest_tables(report)]
    if commands := engines.trtexec_commands(report):
        parts += ["### The same with trtexec, in the run directory", textwrap.indent("\n".join(commands), "    ")]
    return ["## TensorRT engines", *parts, _bullets(engines.engine_notes(report))] if parts else []


def _sensitivities(report: Report) -> list[str]:
    parts = [_section(table, level=3) for table in tables.sensitivity_tables(report)]
    return ["## Sensitivity of layers", *parts, _bullets([text.SENSITIVITY_NOTE])] if parts else []


def _skipped(report: Report) -> list[str]:
    return [f"{skipped.stage}: {skipped.reason}" for skipped in report.skipped] + [
        f"{variant.name}, layer {note.layer} left in float: {note.reason}"
        for variant in report.variants
        for note in variant.skipped_layers
    ]


def _section(table: Table, without_rows: str = "", level: int = 2) -> str:
    return f"{'#' * level} {escaped(table.title)}\n\n{table_text(table) if table.rows else without_rows}"


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)
