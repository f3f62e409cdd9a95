"""Write report.json, report.md and report.html from what the stages measured."""

import datetime
from functools import partial
from operator import attrgetter
from typing import Any

from calib.calibration_set import CalibrationSet, previewed_classes
from clusterq_deploy.report import to_html, to_markdown
from clusterq_deploy.results import Record
from clusterq_deploy.results import report as records
from clusterq_deploy.results.report import Report, Skipped
from clusterq_deploy.results.stages import BenchmarkResult, ExportResult, FeaturesResult, StageResult, UnreadableImages
from clusterq_deploy.run.run import FP32, IMAGES, PREVIEW, Run
from clusterq_deploy.run.stage import Finished, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.stages import benchmark, build, evaluate, export, features, quantize, rtx, sensitivity, synthesize
from clusterq_deploy.version import __version__

_CURVE_POINTS = 200


def write_report(run: Run) -> Report:
    """Write report.json, report.md and report.html from what the stages measured."""
    report = assemble(run)
    preview = (run.directory.path / PREVIEW).read_bytes() if report.calibration.images else None
    with run.progress.task("Report", 3) as advance:
        for name, render in (
            ("report.json", Report.to_json),
            ("report.md", to_markdown),
            ("report.html", partial(to_html, preview_png=preview)),
        ):
            run.directory.write(name, render(report))
            advance()
    return report


def assemble(run: Run) -> Report:
    """Return the report of the finished stages."""
    model, commands = run.model, run.directory.commands or [run.command]
    synthesis = run.finished(Stage(synthesize))
    timing, compared = run.finished(Stage(benchmark)), run.finished(Stage(features))
    if compared and compared.result.inputs != run.data_inputs:
        compared = None  # the real images are others by now
    exports = {variant: run.finished(Stage(export, variant)) for variant in _variants(run)}
    return Report(
        schema=1,
        command=commands[-1],
        seed=run.config.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        clusterq_deploy=__version__,
        environment=timing.result.environment if timing else run.environment,
        model=records.ModelInfo(
            name=model.name,
            parameters=model.parameters,
            input_size=model.input.size,
            classes=model.classes,
            weights=model.weights,
            probabilities=synthesis.result.probabilities if synthesis else None,
        ),
        calibration=_calibration(run, compared),
        evaluation=_evaluation(run),
        variants=[_variant(run, name, exported, timing) for name, exported in exports.items() if exported],
        skipped=_skipped(run, exports[FP32], timing, compared),
        features=compared.result.features if compared else None,
        config=run.config.model_dump(mode="json"),
        commands=commands,
    )


def _variants(run: Run) -> list[str]:
    return [FP32, *run.config.bits]


def _calibration(run: Run, compared: Finished[FeaturesResult] | None) -> records.CalibrationInfo:
    synthesis = run.finished(Stage(synthesize))
    if synthesis is None:
        return records.CalibrationInfo(images=0, seconds=0, teacher_top1=0, recipe=run.config.synthesis.recipe)
    previewed = previewed_classes(CalibrationSet.read_labels(run.directory.path / IMAGES))
    features = compared.result.features if compared else None
    return records.CalibrationInfo(
        **_shared(synthesis.result, records.CalibrationInfo),
        seconds=synthesis.seconds,
        silhouette=features.synthetic.silhouette if features else None,
        preview_classes=[run.model.class_label(label) for label in previewed.tolist()],
    )


def _evaluation(run: Run) -> records.EvaluationInfo:
    """Describe the images, with the unreadable ones that a stage found in a set of the same size."""
    data = run.evaluation
    stages = [run.finished(Stage(evaluate, variant)) for variant in _variants(run)]
    summaries = [stage.result.unreadable for stage in stages if stage]
    fitting = [summary for summary in summaries if summary and summary.total == len(data)]
    unreadable = max(fitting, key=attrgetter("count"), default=UnreadableImages(count=0, total=len(data), files=[]))
    return records.EvaluationInfo(
        dataset=data.name,
        images=len(data) - unreadable.count,
        labelled=data.labelled,
        unreadable=unreadable.count,
        unreadable_files=unreadable.files,
        notes=list(data.notes),
        label_check=baseline.result.label_check if (baseline := run.finished(Stage(evaluate, FP32))) else None,
    )


def _variant(
    run: Run, name: str, exported: Finished[ExportResult], timing: Finished[BenchmarkResult] | None
) -> records.Variant:
    tuned, built = run.finished(Stage(quantize, name)), run.finished(Stage(build, name))
    ahead = run.finished(Stage(rtx, name))
    costs, measured = run.finished(Stage(sensitivity, name)), run.finished(Stage(evaluate, name))
    tuning = _shared(tuned.result, records.Variant) if tuned else {}
    if tuning and not tuning["losses"].get("held_out_kl"):
        tuning["kept_step"] = None
    return records.Variant(
        name=name,
        seconds=sum(stage.seconds for stage in (tuned, exported, built, ahead) if stage),
        accuracy=measured.result.accuracy if measured else [],
        artifacts=[
            artifact.model_copy(update={"sha256": stage.files[artifact.path]})
            for stage in (exported, built, ahead)
            if stage
            for artifact in stage.result.artifacts
        ],
        latency=timing.result.latency.get(name, []) if timing else [],
        plans=ahead.result.plans if ahead else [],
        inspections=timing.result.inspections.get(name, []) if timing else [],
        sensitivities=[
            records.LayerSensitivity(layer=layer.layer, bits=layer.bits, **layer.cost.model_dump())
            for layer in (costs.result.layers if costs else ())
        ],
        **tuning,
    )


def _shared(result: StageResult, record: type[Record]) -> dict[str, Any]:
    """Return the fields of a result that a record of the report has too, with thinned curves."""
    values = {name: getattr(result, name) for name in type(result).model_fields.keys() & record.model_fields.keys()}
    return {**values, "losses": {name: thin(curve) for name, curve in values["losses"].items()}}


def thin(values: list[float]) -> list[float]:
    """Return at most 200 points of a curve, evenly spaced, including the last one."""
    stride = -(-len(values) // _CURVE_POINTS) or 1
    return values[::-stride][::-1]


def _skipped(
    run: Run,
    baseline: Finished[ExportResult] | None,
    timing: Finished[BenchmarkResult] | None,
    compared: Finished[FeaturesResult] | None,
) -> list[Skipped]:
    skipped, reason = [], engine.unavailable_reason()
    if reason or not any(run.finished(Stage(build, variant)) for variant in _variants(run)):
        skipped.append(Skipped(stage="build", reason=reason or "not requested"))
    ahead = [stage for variant in _variants(run) if (stage := run.finished(Stage(rtx, variant)))]
    skipped += [entry for stage in ahead for entry in stage.result.skipped]
    if ahead and (reason := engine.unavailable_reason("tensorrt_rtx")):
        skipped.append(Skipped(stage="rtx", reason=f"built, not run: {reason}"))
    if timing:
        skipped += timing.result.skipped
    if baseline and baseline.result.no_fp16:
        skipped.append(Skipped(stage="fp16 baseline", reason=baseline.result.no_fp16))
    if compared and compared.result.skipped is not None:
        skipped.append(Skipped(stage="features", reason=compared.result.skipped))
    if not any(run.finished(Stage(sensitivity, variant)) for variant in _variants(run)):
        reason = "not requested; --max-drop measures the cost of each layer, and so does clusterq sensitivity RUN"
        skipped.append(Skipped(stage="sensitivity", reason=reason))
    return skipped
