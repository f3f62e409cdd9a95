"""`report.md`: the report as tables that read well in a terminal and on a code host."""

import shlex
import textwrap
from collections.abc import Iterable

from clusterq_deploy.report import engine_wording, feature_wording, formats, verdict_wording, wording
from clusterq_deploy.report.findings import AccuracyRow, accuracy_rows, file_rows, half_was_timed, latency_rows
from clusterq_deploy.report.tables import escaped as _text
from clusterq_deploy.report.tables import markdown_table as _table
from clusterq_deploy.report.verdicts import verdicts
from clusterq_deploy.results.report import Report


def to_markdown(report: Report) -> str:
    """The text of `report.md`."""
    labelled = report.evaluation.labelled
    sections = [
        f"# {_text(wording.model_name(report))}: quantization report",
        _text(wording.summary(report)),
        _bullets(_text(verdict_wording.sentence(verdict, labelled)) for verdict in verdicts(report)),
        " ".join(f"**{_text(own)}**" for own in verdict_wording.caveats(report)),
        "## Accuracy",
        _accuracy_table(report),
        "## Latency",
        _latency_table(report),
        _engines(report),
        "## Files",
        _file_table(report),
        "## How to read these numbers",
        _bullets(_text(note) for note in [*wording.notes(report), *engine_wording.provider_notes(report)]),
        "## What was skipped",
        _bullets(_skipped(report)) or "Nothing.",
        _sensitivities(report),
        "## Calibration set",
        _table(("", ""), [tuple(map(_text, fact)) for fact in wording.calibration_facts(report)]),
        _features(report),
        "## Environment",
        _table(("", ""), [tuple(map(_text, fact)) for fact in wording.environment_facts(report.environment)]),
        "## Command",
        textwrap.indent("\n".join(map(shlex.join, report.commands or [report.command])), "    "),
        f"Seed {report.seed}; clusterq-deploy {_text(report.clusterq_deploy)}; {_text(report.created)}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _accuracy_table(report: Report) -> str:
    rows = [
        (
            _text(row.variant),
            _text(row.accuracy.runtime),
            _text(formats.file_name(row.accuracy.graph)),
            formats.size(row.size_bytes),
            *(_scores(row) if report.evaluation.labelled else ()),
            formats.with_error(row.accuracy.agreement, row.agreement_error),
        )
        for row in accuracy_rows(report)
    ]
    scored = ("top-1 %", "drop", "top-5 %") if report.evaluation.labelled else ()
    headings = ("variant", "runtime", "file", "size", *scored, "agreement %")
    return _table(headings, rows, left=3) if rows else "Not measured."


def _scores(row: AccuracyRow) -> tuple[str, str, str]:
    """What labelled images say: top-1, drop, top-5."""
    return (
        formats.with_error(row.accuracy.top1, row.top1_error),
        formats.with_error(row.drop, row.drop_error),
        formats.number(row.accuracy.top5),
    )


def _latency_table(report: Report) -> str:
    over_half = half_was_timed(report)
    rows = [
        (
            _text(row.variant),
            _text(row.latency.runtime),
            str(row.latency.batch),
            str(row.latency.threads or formats.ABSENT),
            ("~" if row.unsteady else "") + formats.milliseconds(row.latency.median_ms),
            formats.milliseconds(row.latency.p90_ms),
            formats.milliseconds(row.latency.p99_ms),
            f"{row.latency.images_per_second:,.0f}",
            formats.speedup_with_interval(row.speedup, row.latency),
            *([formats.speedup(row.over_half)] if over_half else []),
        )
        for row in latency_rows(report)
    ]
    headings = (
        "variant",
        "runtime",
        "batch",
        "threads",
        "median ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "speed-up",
        *(["over fp16"] if over_half else []),
    )
    return _table(headings, rows, left=2) if rows else "Not measured."


def _engines(report: Report) -> str:
    """The section on TensorRT engines; empty without any."""
    titled = [(own.title, own) for own in engine_wording.engine_tables(report)]
    titled += [(f"Slowest layers of {own.title}", own) for own in engine_wording.slowest_tables(report)]
    parts = [
        f"### {_text(title)}\n\n" + _table(own.headings, [tuple(map(_text, row)) for row in own.rows], left=own.left)
        for title, own in titled
    ]
    if commands := engine_wording.trtexec_commands(report):
        parts.append(
            "### The same with trtexec, in the run directory\n\n" + textwrap.indent("\n".join(commands), "    ")
        )
    if not parts:
        return ""
    return "\n\n".join(["## TensorRT engines", *parts, _bullets(map(_text, engine_wording.engine_notes(report)))])


def _file_table(report: Report) -> str:
    rows = [
        (
            _text(row.artifact.path),
            _text(formats.purpose(row.artifact.target)),
            formats.size(row.artifact.size_bytes),
            formats.percent(row.share),
            _text("; ".join(row.artifact.notes)),
        )
        for row in file_rows(report)
    ]
    return _table(("file", "for", "size", "of fp32", "notes"), rows, left=2) if rows else "None was written."


def _sensitivities(report: Report) -> str:
    rows = [
        (
            _text(variant.name),
            _text(own.layer),
            own.bits,
            formats.scientific(own.kl),
            formats.number(own.expected_drop, 4),
        )
        for variant in report.variants
        for own in sorted(variant.sensitivities, key=lambda own: -own.kl)
    ]
    if not rows:
        return ""
    table = _table(("variant", "layer", "bits", "KL", "expected drop"), rows, left=3)
    return "\n\n".join(["## Sensitivity of layers", table, _bullets(wording.sensitivity_notes())])


def _features(report: Report) -> str:
    missing = report.features.notes if report.features else []
    return _text(" ".join([feature_wording.sentence(report) or "", *missing]))


def _skipped(report: Report) -> list[str]:
    stages = [f"{_text(skipped.stage)}: {_text(skipped.reason)}" for skipped in report.skipped]
    layers = [
        f"{_text(variant.name)}, layer {_text(note.layer)} left in float: {_text(note.reason)}"
        for variant in report.variants
        for note in variant.skipped_layers
    ]
    return stages + layers


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
