"""`report.html`: the report as one page that needs no network, no script and no other file."""

import base64
import io
import json
import shlex

import jinja2
from PIL import Image

from clusterq_deploy.report import engines, tables, text
from clusterq_deploy.report.analysis import BASELINE, accuracy_rows, latency_rows, verdicts
from clusterq_deploy.results.report import Report

_PREVIEW_WIDTH = 1200  # pixels; the page shows it 920 wide


def to_html(report: Report, preview_png: bytes | None = None) -> str:
    """Return the text of `report.html`.

    Args:
        report: what it shows.
        preview_png: a contact sheet of the synthetic images, as a PNG file.
    """
    from clusterq_deploy.report import charts  # matplotlib takes half a second to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clusterq_deploy.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    suggestions = verdicts(report)
    chosen = {
        (verdict.runtime, verdict.choice.accuracy.graph)
        for verdict in suggestions
        if verdict.choice and verdict.outcome in ("deploy", "unsure")
    }
    scores, timings = accuracy_rows(report), latency_rows(report)
    files = [artifact for variant in report.variants for artifact in variant.artifacts]
    largest = max((artifact.size_bytes for artifact in files), default=0) or 1
    page = environment.get_template("template.html.j2").render(
        report=report,
        text=text,
        engines=engines,
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
        command="\n".join(map(shlex.join, report.commands or [report.command])),
        config=json.dumps(report.config, indent=2, ensure_ascii=False, default=str) if report.config else "",
        preview=_data_uri(preview_png) if preview_png else None,
    )
    return page + "\n"


def _data_uri(png: bytes) -> str:
    """Return a picture as the page holds it: one that is wider than it is shown is made smaller, as WebP."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.width <= _PREVIEW_WIDTH:
            return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        smaller, content = picture.convert("RGB"), io.BytesIO()
        smaller.thumbnail((_PREVIEW_WIDTH, picture.height), Image.Resampling.LANCZOS)
    smaller.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
