"""What is measured of what was made, and the report on it."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from calib.calibration_set import CalibrationSet, previewed_classes
from clusterq_deploy.errors import EngineError, FeatureError, OutOfMemoryError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.features import compare_features
from clusterq_deploy.evaluation.measure import benchmark, score
from clusterq_deploy.oom import in_memory, is_of_memory
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.report.assemble import assemble
from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.results.features import FeatureInfo
from clusterq_deploy.results.report import Accuracy, Latency, Report, Skipped
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, IMAGES, PREVIEW, Run
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages.deployment import built_engine, engine_stage, executed_graphs, graph_for, runner_of
from clusterq_deploy.stages.engines import inspect_engine, time_engine
from clusterq_deploy.stages.providers import provider_runners


def measure_accuracy(run: Run, variant: str) -> StageRecord:
    """Measure a variant's accuracy in torch and as each runtime executes its graphs."""
    source = run.done(f"export/{variant}")
    built, data, stage = built_engine(run, variant), run.evaluation, f"evaluate/{variant}"
    upstream = [f"export/{variant}", *([] if run.has_own_data else ["synthesize"])]
    upstream += engine_stage(variant, built)

    def work() -> tuple[Result, list[str]]:
        inputs = {**run.data_inputs, "environment": run.environment}  # another runtime may answer otherwise
        teacher = run.teacher_predictions(run.checkpoint(stage, inputs, 1, upstream))
        # an image that can be read by now makes all that is kept another set's
        inputs["teacher"] = [hashlib.sha256(teacher.tobytes()).hexdigest(), data.kept.tolist()]
        checkpoint = run.checkpoint(stage, inputs, 1, upstream)

        def accuracy(runner: Runner, graph: str | None) -> Accuracy:
            own = run.predictions(runner, checkpoint, "-".join([runner.runtime, *Path(graph or "").parts]))
            return score(runner.runtime, own, teacher, data, graph)

        found: list[Accuracy] = []
        if variant == FP32:
            found.append(score("torch", teacher, teacher, data))
        else:
            with TorchRunner(run.student(BitWidths.parse(variant))) as student:
                found.append(accuracy(student, None))
        for artifact in [*executed_graphs(variant, source), *(built.result["artifacts"] if built else [])]:
            with runner_of(run, artifact) as runner:
                found.append(accuracy(runner, artifact["path"]))
        for own in provider_runners(run, {variant: source}, []):  # the benchmark says which are left out
            with own.runner as provided:
                found.append(accuracy(provided, own.graph))
        return {"accuracy": [a.model_dump(mode="json") for a in found], "unreadable": data.unreadable.summary()}, []

    return run.perform(stage, run.data_inputs, work, upstream=upstream)


def measure_features(run: Run) -> StageRecord:
    """Lay the teacher's features of the synthetic images beside those of real ones; the report alone reads it."""
    run.done("synthesize")
    inputs = run.data_inputs

    def work() -> tuple[Result, list[str]]:
        made = run.calibration
        synthetic = EvaluationSet.from_images("synthetic images", made.images.numpy(), made.labels.numpy())

        def compared(divisor: int) -> FeatureInfo:
            return compare_features(
                run.model.module,
                synthetic,
                run.evaluation if run.has_own_data else None,
                classes=run.model.classes,
                seed=run.config.seed,
                batch_size=max(1, EVALUATION_BATCH // divisor),
                progress=run.progress,
            )

        try:
            found, _ = in_memory(compared, "features")
        except (FeatureError, OutOfMemoryError) as error:
            skipped = {"skipped": str(error), "provisional": isinstance(error, OutOfMemoryError)}
            return {"inputs": inputs, **skipped}, []
        return {"inputs": inputs, "features": found.model_dump(mode="json")}, []

    return run.perform("features", inputs, work, upstream=["synthesize"])


def measure_latency(run: Run) -> StageRecord:
    """Time FP32 and every exported variant in turn, each as its target executes it."""
    run.done(f"export/{FP32}")
    variants = [v for v in (FP32, *run.config.bits) if run.directory.finished(f"export/{v}")]
    sources = {v: run.done(f"export/{v}") for v in variants}
    built = {v: built_engine(run, v) for v in variants}
    environment = run.environment
    settings, size = run.config.benchmark, run.model.input.size

    def work() -> tuple[Result, list[str]]:
        skipped: list[Skipped] = []
        latency: dict[str, list[Result]] = {v: [] for v in variants}
        with ExitStack() as opened:  # closed before TensorRT loads engines: sessions hold its logger and the memory
            timed = {own.key: own for own in _timed(run, sources, skipped)}
            for own in timed.values():
                opened.enter_context(own.runner)
            runners, unfit = {key: own.runner for key, own in timed.items()}, list[str]()
            single = {own.runner.runtime: key for key, own in timed.items() if own.variant == FP32}
            baselines = {
                key: single[own.runner.runtime]
                for key, own in timed.items()
                if own.variant != FP32 and own.runner.runtime in single
            }
            found = benchmark(runners, size, settings, run.progress, unfit, baselines)
            skipped += [Skipped(stage="benchmark", reason=reason) for reason in unfit]
        for key, records in found.items():
            own = timed[key]
            latency[own.variant] += [_result(r, graph=own.graph, threads=own.threads) for r in records]
        inspections: dict[str, list[Result]] = {v: [] for v in variants}
        files: list[str] = []
        for variant, record in built.items():
            for artifact in record.result["artifacts"] if record else ():
                name, path = artifact["path"], run.directory.path / artifact["path"]
                try:
                    with engine.TensorRTRunner(path) as runner:
                        latency[variant] += [_result(r) for r in time_engine(runner, name, settings)]
                        inspected, text = inspect_engine(runner, name, path, settings.batches[0])
                except EngineError as error:  # loaded, it takes the memory of its largest batch
                    if not is_of_memory(error):
                        raise
                    skipped.append(Skipped(stage="benchmark", reason=f"{name}: {' '.join(str(error).split())}"))
                    continue
                inspections[variant].append(inspected.model_dump(mode="json"))
                if text:
                    files.append(run.directory.write(f"{name}.layers.json", text))
        more: Result = {"inspections": inspections, "skipped": [s.model_dump(mode="json") for s in skipped]}
        more["provisional"] = any(own.stage == "benchmark" for own in skipped)  # of what did not fit the memory
        return {"latency": latency, "environment": environment, **more}, files

    upstream = [stage for v in variants for stage in (f"export/{v}", *engine_stage(v, built[v]))]
    inputs = {"settings": settings.model_dump(mode="json"), "environment": environment}
    return run.perform("benchmark", inputs, work, upstream=upstream)


@dataclass(frozen=True)
class _Timed:
    """What is timed from host to host; `graph` and `threads` are None for the torch model, threads on a GPU too."""

    variant: str
    runner: Runner
    graph: str | None = None
    threads: int | None = None

    @property
    def key(self) -> str:
        return f"{self.runner.runtime} {self.graph}"


def _timed(run: Run, exports: Mapping[str, StageRecord], skipped: list[Skipped]) -> Iterator[_Timed]:
    """Every graph in ONNX Runtime on the CPU, and, where the run has a GPU, in its GPU providers and in torch."""
    threads = run.config.benchmark.cpu_threads
    for variant, record in exports.items():
        graph = str(graph_for(record, "onnxruntime"))
        yield _Timed(variant, OnnxRunner(run.directory.path / graph, threads=threads), graph, threads)
    for own in provider_runners(run, exports, skipped):
        yield _Timed(own.variant, own.runner, own.graph)
    if run.device.type == "cuda":
        yield _Timed(FP32, TorchRunner(run.model.module))


def _result(record: Latency, **more: object) -> Result:
    """A record as the manifest keeps it: without what was not measured."""
    return {**record.model_dump(mode="json", exclude_none=True), **more}


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
    run.directory.write("report.html", to_html(report, picture, run.progress))
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
