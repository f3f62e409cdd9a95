"""Write report.json, report.md and report.html from what the stages measured."""

import datetime
from dataclasses import dataclass
from operator import attrgetter

from calib.calibration_set import CalibrationSet, previewed_classes
from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.results.report import (
    CalibrationInfo,
    EvaluationInfo,
    LayerSensitivity,
    ModelInfo,
    Report,
    Skipped,
    Variant,
)
from clusterq_deploy.results.stages import (
    BenchmarkResult,
    BuildResult,
    EvaluationResult,
    ExportResult,
    FeaturesResult,
    QuantizeResult,
    SensitivityResult,
    SynthesisResult,
)
from clusterq_deploy.run.run import FP32, IMAGES, PREVIEW, Run
from clusterq_deploy.run.stage import Finished, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.stages import benchmark, build, evaluate, export, features, quantize, sensitivity, synthesize
from clusterq_deploy.version import __version__

_CURVE_POINTS = 200


@dataclass(frozen=True)
class _Variant:
    """The finished stages of a variant."""

    name: str
    sensitivity: Finished[SensitivityResult] | None
    quantize: Finished[QuantizeResult] | None
    export: Finished[ExportResult] | None
    build: Finished[BuildResult] | None
    evaluate: Finished[EvaluationResult] | None


def write_report(run: Run) -> Report:
    """Write report.json, report.md and report.html from what the stages measured."""
    report = assemble(run)
    run.directory.write("report.json", report.to_json())
    run.directory.write("report.md", to_markdown(report))
    picture = (run.directory.path / PREVIEW).read_bytes() if report.calibration.images else None  # whole, by its digest
    run.directory.write("report.html", to_html(report, picture, run.progress))
    return report


def assemble(run: Run) -> Report:
    """Return the report of what has been done so far."""
    model, commands = run.model, run.directory.commands or [run.command]
    synthesis, timing = run.finished(Stage(synthesize)), run.finished(Stage(benchmark))
    compared = run.finished(Stage(features))
    if compared and compared.result.inputs != run.data_inputs:
        compared = None  # it shows other images than those that this report is on
    variants = [
        _Variant(
            name,
            run.finished(Stage(sensitivity, name)),
            run.finished(Stage(quantize, name)),
            run.finished(Stage(export, name)),
            run.finished(Stage(build, name)),
            run.finished(Stage(evaluate, name)),
        )
        for name in (FP32, *run.config.bits)
    ]
    return Report(
        schema=1,
        command=commands[-1],
        seed=run.config.seed,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        clusterq_deploy=__version__,
        environment=timing.result.environment if timing else run.environment,
        model=ModelInfo(
            name=model.name,
            parameters=model.parameters,
            input_size=model.input.size,
            classes=model.classes,
            weights=model.weights,
        ),
        calibration=_calibration(run, synthesis, compared),
        evaluation=_evaluation(run, variants),
        variants=[_variant(stages, stages.export, timing) for stages in variants if stages.export],
        skipped=_skipped(variants, timing, compared),
        features=compared.result.features if compared else None,
        config=run.config.model_dump(mode="json"),
        commands=commands,
    )


def _calibration(
    run: Run, synthesis: Finished[SynthesisResult] | None, compared: Finished[FeaturesResult] | None
) -> CalibrationInfo:
    if synthesis is None:
        return CalibrationInfo(images=0, seconds=0, teacher_top1=0, recipe=run.config.synthesis.recipe)
    result, features = synthesis.result, compared.result.features if compared else None
    previewed = previewed_classes(CalibrationSet.read_labels(run.directory.path / IMAGES))
    return CalibrationInfo(
        images=result.images,
        seconds=synthesis.seconds,
        teacher_top1=result.teacher_top1,
        recipe=result.recipe,
        within_class_diversity=result.within_class_diversity,
        silhouette=features.synthetic.silhouette if features else None,
        losses=_thinned(result.losses),
        batch_divisor=result.batch_divisor,
        preview_classes=[run.model.class_label(label) for label in previewed.tolist()],
    )


def _evaluation(run: Run, variants: list[_Variant]) -> EvaluationInfo:
    """Describe the images less those that could not be read, as any stage says that read as many images."""
    data = run.evaluation
    summaries = [stages.evaluate.result.unreadable for stages in variants if stages.evaluate]
    fitting = [summary for summary in summaries if summary and summary.total == len(data)]
    unreadable = max(fitting, key=attrgetter("count"), default=None)
    count = unreadable.count if unreadable else 0
    return EvaluationInfo(
        dataset=data.name,
        images=len(data) - count,
        labelled=data.labelled,
        unreadable=count,
        unreadable_files=unreadable.files if unreadable else [],
    )


def _variant(stages: _Variant, exported: Finished[ExportResult], timing: Finished[BenchmarkResult] | None) -> Variant:
    tuned = stages.quantize.result if stages.quantize else QuantizeResult(format=0)  # the float baseline has nothing
    made = [stage for stage in (stages.quantize, exported, stages.build) if stage]
    return Variant(
        name=stages.name,
        seconds=sum(stage.seconds for stage in made),
        accuracy=stages.evaluate.result.accuracy if stages.evaluate else [],
        artifacts=[
            artifact.model_copy(update={"sha256": stage.files[artifact.path]})
            for stage in (exported, stages.build)
            if stage
            for artifact in stage.result.artifacts
        ],
        latency=timing.result.latency.get(stages.name, []) if timing else [],
        inspections=timing.result.inspections.get(stages.name, []) if timing else [],
        quantized_layers=tuned.quantized_layers,
        skipped_layers=tuned.skipped_layers,
        keep=tuned.keep,
        expected_drop=tuned.expected_drop,
        max_drop=tuned.max_drop,
        sensitivities=[
            LayerSensitivity(layer=layer.layer, bits=layer.bits, **layer.cost.model_dump())
            for layer in (stages.sensitivity.result.layers if stages.sensitivity else ())
        ],
        histograms=tuned.histograms,
        losses=_thinned(tuned.losses),
        batch_divisor=tuned.batch_divisor,
        cpu=tuned.cpu,
        kept_step=tuned.kept_step if tuned.losses.get("held_out_kl") else None,
    )


def _thinned(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return at most 200 of each curve's points, evenly spaced, the last one among them."""
    strides = {name: -(-len(values) // _CURVE_POINTS) or 1 for name, values in losses.items()}
    return {name: values[:: -strides[name]][::-1] for name, values in losses.items()}


def _skipped(
    variants: list[_Variant], timing: Finished[BenchmarkResult] | None, compared: Finished[FeaturesResult] | None
) -> list[Skipped]:
    skipped, reason = [], engine.unavailable_reason()
    if reason or not any(stages.build for stages in variants):
        skipped.append(Skipped(stage="build", reason=reason or "not asked for"))
    if timing:
        skipped += timing.result.skipped
    if (exported := variants[0].export) and exported.result.no_fp16:
        skipped.append(Skipped(stage="fp16 baseline", reason=exported.result.no_fp16))
    if compared and compared.result.skipped is not None:
        skipped.append(Skipped(stage="features", reason=compared.result.skipped))
    if not any(stages.sensitivity for stages in variants):
        reason = "not asked for; --max-drop measures what each layer costs, and so does clusterq sensitivity RUN"
        skipped.append(Skipped(stage="sensitivity", reason=reason))
    return skipped
