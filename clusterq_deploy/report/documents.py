"""The documents that people read: `report.md`, and `report.html`, a page without scripts that needs no other file."""

import base64
import io
import json
import shlex
import textwrap
from collections.abc import Iterable

import jinja2
from PIL import Image

from clusterq_deploy.report import engines, plans, tables, text
from clusterq_deploy.report.analysis import BASELINE, accuracy_rows, latency_rows, verdicts
from clusterq_deploy.report.tables import Table, escaped
from clusterq_deploy.results.report import Report

_PREVIEW_WIDTH = 1200  # pixels; the page shows it 920 wide


def to_markdown(report: Report) -> str:
    """Return the text of `report.md`."""
    labelled, features = report.evaluation.labelled, report.features
    sections = [
        f"# {escaped(text.model_name(report))}: quantization report",
        escaped(text.summary(report)),
        _bullets([*(text.sentence(verdict, labelled) for verdict in verdicts(report)), *plans.plan_sentences(report)]),
        " ".join(f"**{escaped(caveat)}**" for caveat in text.caveats(report)),
        _section(tables.accuracy_table(accuracy_rows(report), labelled), "Not measured."),
        _section(tables.latency_table(latency_rows(report)), "Not measured."),
        *_engines(report),
        *_plans(report),
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
        textwrap.indent(_commands(report), "    "),
        f"Seed {report.seed}; clusterq-deploy {escaped(report.clusterq_deploy)}; {escaped(report.created)}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _commands(report: Report) -> str:
    return "\n".join(map(shlex.join, report.commands or [report.command]))


def _engines(report: Report) -> list[str]:
    shown = [*engines.engine_tables(report), *engines.slowest_tables(report)]
    parts = [_section(table, level=3) for table in shown]
    if commands := engines.trtexec_commands(report):
        parts += [
            "### Commands for trtexec, in the run directory",
            textwrap.indent("\n".join(commands), "    "),
        ]
    return ["## TensorRT engines", *parts, _bullets(engines.engine_notes(report))] if parts else []


def _plans(report: Report) -> list[str]:
    parts = [_section(table, level=3) for table in plans.plan_tables(report)]
    notes = _bullets(plans.plan_notes(report))
    return ["## TensorRT-RTX, ahead of time", *parts, notes] if notes else []


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
    return f"{'#' * level} {escaped(table.title)}\n\n{tables.to_markdown(table) if table.rows else without_rows}"


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)


def to_html(report: Report, preview_png: bytes | None = None) -> str:
    """Return the text of `report.html`; `preview_png` is a contact sheet of the synthetic images, as a PNG file."""
    from clusterq_deploy.report import charts  # matplotlib takes half a second to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clusterq_deploy.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    suggestions = verdicts(report)
    suggested = [(v.runtime, v.choice) for v in suggestions if v.choice and v.outcome in ("deploy", "unsure")]
    chosen = {(runtime, point.accuracy.graph) for runtime, point in suggested}
    scores, timings = accuracy_rows(report), latency_rows(report)
    files = [artifact for variant in report.variants for artifact in variant.artifacts]
    largest = max((artifact.size_bytes for artifact in files), default=0) or 1
    page = environment.get_template("template.html.j2").render(
        report=report,
        text=text,
        engines=engines,
        plans=plans,
        charts=charts,
        baseline=BASELINE,
        verdicts=suggestions,
        accuracy=tables.accuracy_table(scores, report.evaluation.labelled),
        chosen_accuracy=[(row.runtime, row.graph) in chosen for row in scores],
        latency=tables.latency_table(timings),
        chosen_latency=[(row.runtime, row.graph) in chosen for row in timings],
        files=tables.file_table(report),
        chosen_files=[artifact.path in {graph for _, graph in chosen} for artifact in files],
        file_shares=[artifact.size_bytes / largest for artifact in files],
        slowest=list(zip(engines.slowest_tables(report), charts.slowest_bars(report), strict=True)),
        sensitivities=list(zip(tables.sensitivity_tables(report), charts.sensitivity_bars(report), strict=True)),
        command=_commands(report),
        config=json.dumps(report.config, indent=2, ensure_ascii=False, default=str) if report.config else "",
        preview=_data_uri(preview_png) if preview_png else None,
    )
    return page + "\n"


def _data_uri(png: bytes) -> str:
    """Return a picture as a data URI; one that is wider than `_PREVIEW_WIDTH` is reduced and stored as WebP."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.width <= _PREVIEW_WIDTH:
            return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        smaller, content = picture.convert("RGB"), io.BytesIO()
        smaller.thumbnail((_PREVIEW_WIDTH, picture.height), Image.Resampling.LANCZOS)
    smaller.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
