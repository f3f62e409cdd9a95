"""`report.html`: the report as one page that needs no network, no script and no other file."""

import base64
import io
import json
import shlex
from dataclasses import dataclass, field

import jinja2
from PIL import Image

from calib.support.progress import SILENT, Advance, Progress
from clusterq_deploy.report import engine_wording, feature_wording, formats, histogram_wording, verdict_wording, wording
from clusterq_deploy.report.engine_wording import TextTable
from clusterq_deploy.report.findings import (
    BASELINE,
    LatencyRow,
    accuracy_rows,
    file_rows,
    half_was_timed,
    latency_rows,
)
from clusterq_deploy.report.verdicts import Verdict, points, verdicts
from clusterq_deploy.results.report import LayerSensitivity, Report

_PREVIEW_WIDTH = 1200  # pixels; the page shows it 920 wide


@dataclass(frozen=True, slots=True)
class _Curves:
    """The training curves of one stage, each an `<svg>` element."""

    stage: str
    charts: list[str]


@dataclass(frozen=True, slots=True)
class _Panel:
    """A titled chart, an `<svg>` element, and what it shows in a table, where there is one."""

    title: str
    chart: str
    rows: list[LayerSensitivity] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A quantized layer: its widths and clipped shares in a line, and a panel of its weight and of what it reads."""

    name: str
    line: str
    panels: list[_Panel]


def to_html(report: Report, preview_png: bytes | None = None, progress: Progress = SILENT) -> str:
    """The text of `report.html`.

    Args:
        report: what it shows.
        preview_png: a contact sheet of the synthetic images, as a PNG file.
        progress: shows how far it is; of a large model there are hundreds of charts.
    """
    charts = 2 * sum(len(variant.histograms) for variant in report.variants)
    with progress.task("Report", charts + 1) as advance:
        text = _rendered(report, preview_png, advance)
        advance()
    return text


def _rendered(report: Report, preview_png: bytes | None, advance: Advance) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clusterq_deploy.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": formats.duration,
        "file_name": formats.file_name,
        "ms": formats.milliseconds,
        "number": formats.number,
        "percent": formats.percent,
        "purpose": formats.purpose,
        "scientific": formats.scientific,
        "size": formats.size,
        "speedup": formats.speedup,
        "speedup_with_interval": formats.speedup_with_interval,
        "with_error": formats.with_error,
    }
    found = verdicts(report)
    chosen = [(v.runtime, v.choice) for v in found if v.outcome in ("deploy", "unsure") and v.choice]
    labelled = report.evaluation.labelled
    files = file_rows(report)
    return (
        environment.get_template("template.html.j2").render(
            report=report,
            baseline=BASELINE,
            name=wording.model_name(report),
            summary=wording.summary(report),
            cards=[(own, verdict_wording.headline(own), verdict_wording.sentence(own, labelled)) for own in found],
            caveats=verdict_wording.caveats(report),
            chosen={(choice.variant, runtime) for runtime, choice in chosen},
            chosen_files={choice.accuracy.graph for _, choice in chosen},
            accuracy=accuracy_rows(report),
            latency=latency_rows(report),
            over_half=half_was_timed(report),
            files=files,
            largest_file=max((row.artifact.size_bytes for row in files), default=0),
            tradeoffs=_tradeoffs(report, found),
            distributions=_distributions(report),
            curves=_curves(report),
            engine_tables=engine_wording.engine_tables(report),
            slowest=_slowest(report),
            trtexec=engine_wording.trtexec_commands(report),
            engine_notes=engine_wording.engine_notes(report),
            notes=[*wording.notes(report), *engine_wording.provider_notes(report)],
            calibration=wording.calibration_facts(report),
            preview_caption=wording.preview_caption(report),
            features=feature_wording.sentence(report),
            feature_notes=feature_wording.notes(report),
            panels=_panels(report),
            sensitivities=_sensitivities(report),
            sensitivity_notes=wording.sensitivity_notes(),
            histograms=_histograms(report, advance),
            histogram_notes=histogram_wording.notes(),
            environment=wording.environment_facts(report.environment),
            command="\n".join(map(shlex.join, report.commands or [report.command])),
            curve_notes=wording.curve_notes(report),
            config=json.dumps(report.config, indent=2, ensure_ascii=False, default=str) if report.config else "",
            preview=_data_uri(preview_png) if preview_png else None,
        )
        + "\n"
    )


def _data_uri(png: bytes) -> str:
    """A picture as the page holds it: one that is wider than it is shown is made smaller, as WebP."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.width <= _PREVIEW_WIDTH:
            return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        smaller, content = picture.convert("RGB"), io.BytesIO()
        smaller.thumbnail((_PREVIEW_WIDTH, picture.height), Image.Resampling.LANCZOS)
    smaller.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _tradeoffs(report: Report, found: list[Verdict]) -> list[tuple[str, str]]:
    """Runtime and chart, for each runtime in which something was scored and timed."""
    from clusterq_deploy.report.charts import tradeoff_chart  # matplotlib takes half a second to import

    charts = []
    for index, verdict in enumerate(found):
        measured = points(report, verdict.runtime)
        if measured:
            chart = tradeoff_chart(measured, report.evaluation.labelled, f"tradeoff{index}")
            charts.append((verdict.runtime, chart))
    return charts


def _distributions(report: Report) -> list[tuple[str, str]]:
    """Caption and chart, for each runtime and batch size whose calls are told of one by one."""
    from clusterq_deploy.report.charts import distribution_chart

    groups: dict[tuple[str, int], list[LatencyRow]] = {}
    for row in latency_rows(report):
        if row.latency.quantiles_ms:
            groups.setdefault((row.latency.runtime, row.latency.batch), []).append(row)
    return [
        (f"{runtime}, calls of batch {batch}", distribution_chart(rows, f"distribution{index}"))
        for index, ((runtime, batch), rows) in enumerate(groups.items())
    ]


def _panels(report: Report) -> list[_Panel]:
    from clusterq_deploy.report.charts import projection_charts

    found = report.features
    if found is None or found.projection is None:
        return []
    sets = [("Synthetic images", found.synthetic.points)]
    if found.real is not None:
        sets.append((f"Real images: {found.real.dataset}", found.real.points))
    charts = projection_charts(sets, found.projection.method, "features")
    return [_Panel(title, chart) for (title, _), chart in zip(sets, charts, strict=True)]


def _sensitivities(report: Report) -> list[_Panel]:
    from clusterq_deploy.report.charts import sensitivity_chart

    return [
        _Panel(
            variant.name,
            sensitivity_chart(variant.sensitivities, variant.keep, f"sensitivity{index}"),
            sorted(variant.sensitivities, key=lambda own: -own.kl),
        )
        for index, variant in enumerate(report.variants)
        if variant.sensitivities
    ]


def _histograms(report: Report, advance: Advance) -> list[tuple[str, list[_Layer]]]:
    """Variant and layers, for each variant whose layers have histograms."""
    from clusterq_deploy.report.charts import histogram_charts

    found = []
    for number, variant in enumerate(report.variants):
        titled = [
            (f"{name} of {own.layer}", values)
            for own in variant.histograms
            for name, values in (("Weight", own.weight), ("Input", own.activation))
        ]
        charts = histogram_charts(titled, f"histograms{number}", advance) if titled else []
        layers = []
        for own, weight, activation in zip(variant.histograms, charts[::2], charts[1::2], strict=True):
            panels = [
                _Panel(f"Weight: {histogram_wording.caption(own.weight)}", weight),
                _Panel(f"Input: {histogram_wording.caption(own.activation)}", activation),
            ]
            layers.append(_Layer(own.layer, histogram_wording.layer_line(own), panels))
        if layers:
            found.append((variant.name, layers))
    return found


def _slowest(report: Report) -> list[tuple[TextTable, str]]:
    """The slowest layers of each engine, as a table and as a chart."""
    from clusterq_deploy.report.charts import layer_chart

    inspected = [own for variant in report.variants for own in variant.inspections if own.slowest]
    charts = [layer_chart(own.slowest, f"layers{index}") for index, own in enumerate(inspected)]
    return list(zip(engine_wording.slowest_tables(report), charts, strict=True))


def _curves(report: Report) -> list[_Curves]:
    from clusterq_deploy.report.charts import curve_chart

    stages = [("Synthesis", report.calibration.losses)]
    stages += [(variant.name, variant.losses) for variant in report.variants]
    return [
        _Curves(
            stage,
            [
                curve_chart(values, name, f"curve{number}-{index}")
                for index, (name, values) in enumerate(losses.items())
                if values
            ],
        )
        for number, (stage, losses) in enumerate(stages)
        if any(losses.values())
    ]
