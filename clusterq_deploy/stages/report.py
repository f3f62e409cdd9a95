"""Write report.json, report.md and report.html from what the stages measured."""

from calib.calibration_set import CalibrationSet, previewed_classes
from clusterq_deploy.report.assemble import assemble
from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.results.report import Report, Skipped
from clusterq_deploy.run.manifest import StageRecord
from clusterq_deploy.run.run import FP32, IMAGES, PREVIEW, Run
from clusterq_deploy.runtimes import tensorrt as engine


def write_report(run: Run) -> Report:
    """Write report.json, report.md and report.html from what the stages measured."""
    records = {name: r for name in _stage_names(run) if (r := run.directory.finished(name)) is not None}
    compared = records.get("features")
    if compared and compared.result["inputs"] != run.data_inputs:
        del records["features"]  # it shows other images than those that this report is on
    report = assemble(
        records,
        config=run.config,
        model=run.model,
        data=run.evaluation,
        device=run.device,
        commands=run.directory.commands or [run.command],
        skipped=_skipped(records),
        preview_classes=_preview_classes(run) if "synthesize" in records else [],
    )
    run.directory.write("report.json", report.to_json())
    run.directory.write("report.md", to_markdown(report))
    picture = (run.directory.path / PREVIEW).read_bytes() if "synthesize" in records else None  # whole, by its digest
    run.directory.write("report.html", to_html(report, picture))
    return report


def _preview_classes(run: Run) -> list[str]:
    labels = previewed_classes(CalibrationSet.read_labels(run.directory.path / IMAGES))
    return [run.model.class_label(label) for label in labels.tolist()]


def _stage_names(run: Run) -> list[str]:
    variants = [FP32, *run.config.bits]
    return ["synthesize", "features", "benchmark"] + [
        f"{stage}/{v}" for v in variants for stage in ("sensitivity", "quantize", "export", "build", "evaluate")
    ]


def _skipped(records: dict[str, StageRecord]) -> list[Skipped]:
    skipped = []
    reason = engine.unavailable_reason()
    if reason or not any(name.startswith("build/") for name in records):
        reason = reason or "not asked for"
        skipped.append(Skipped(stage="build", reason=reason))
    if "benchmark" in records:
        skipped += [Skipped.model_validate(own) for own in records["benchmark"].result.get("skipped", [])]
    if reason := records["export/fp32"].result.get("no_fp16") if "export/fp32" in records else None:
        skipped.append(Skipped(stage="fp16 baseline", reason=reason))
    if "features" in records and "skipped" in records["features"].result:
        skipped.append(Skipped(stage="features", reason=records["features"].result["skipped"]))
    if not any(name.startswith("sensitivity/") for name in records):
        reason = "not asked for; --max-drop measures what each layer costs, and so does clusterq sensitivity RUN"
        skipped.append(Skipped(stage="sensitivity", reason=reason))
    return skipped
