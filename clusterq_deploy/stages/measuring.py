"""What is measured of what was made, and the report on it."""

from clusterq_deploy import engine
from clusterq_deploy.data import EvaluationSet
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import FeatureError
from clusterq_deploy.features import compare_features
from clusterq_deploy.measure import benchmark, predictions, score, summarize
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.report.assemble import assemble
from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.report.schema import Accuracy, Report, Skipped
from clusterq_deploy.run import EVALUATION_BATCH, FP32, PREVIEW, Run
from clusterq_deploy.rundir import Result, StageRecord
from clusterq_deploy.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages.deployment import built_engine, engine_stage, executed_graphs, graph_for, runner_of


def measure_accuracy(run: Run, variant: str) -> StageRecord:
    """Measure a variant's accuracy in torch and as each runtime executes its graphs."""
    source = run.done(f"export/{variant}")
    built, data = built_engine(run, variant), run.evaluation

    def work() -> tuple[Result, list[str]]:
        teacher = run.teacher_predictions
        found: list[Accuracy] = []
        if variant == FP32:
            found.append(score("torch", teacher, teacher, data))
        else:
            with TorchRunner(run.student(BitWidths.parse(variant))) as runner:
                found.append(_accuracy(run, runner, None))
        for artifact in [*executed_graphs(variant, source), *(built.result["artifacts"] if built else [])]:
            with runner_of(run, artifact) as runner:
                found.append(_accuracy(run, runner, artifact["path"]))
        return {"accuracy": [a.model_dump(mode="json") for a in found]}, []

    upstream = [f"export/{variant}", *([] if run.has_own_data else ["synthesize"])]
    upstream += engine_stage(variant, built)
    return run.perform(f"evaluate/{variant}", run.data_inputs, work, upstream=upstream)


def measure_features(run: Run) -> StageRecord:
    """Lay the teacher's features of the synthetic images beside those of real ones; the report alone reads it."""
    run.done("synthesize")
    inputs = run.data_inputs

    def work() -> tuple[Result, list[str]]:
        made = run.calibration
        synthetic = EvaluationSet.from_images("synthetic images", made.images.numpy(), made.labels.numpy())
        try:
            found = compare_features(
                run.model.module,
                synthetic,
                run.evaluation if run.has_own_data else None,
                classes=run.model.classes,
                seed=run.config.seed,
                progress=run.progress,
            )
        except FeatureError as error:
            return {"inputs": inputs, "skipped": str(error)}, []
        return {"inputs": inputs, "features": found.model_dump(mode="json")}, []

    return run.perform("features", inputs, work, upstream=["synthesize"])


def measure_latency(run: Run) -> StageRecord:
    """Time FP32 and every exported variant in turn, each as its target executes it."""
    run.done(f"export/{FP32}")
    variants = [v for v in (FP32, *run.config.bits) if run.directory.finished(f"export/{v}")]
    sources = {v: run.done(f"export/{v}") for v in variants}
    built = {v: built_engine(run, v) for v in variants}
    environment = collect_environment(run.device).model_dump(mode="json")
    settings, size = run.config.benchmark, run.model.input.size

    def work() -> tuple[Result, list[str]]:
        runners: dict[str, Runner] = {}
        owners: dict[str, str] = {}
        for variant, source in sources.items():
            name = str(graph_for(source, "onnxruntime"))
            path = run.directory.path / name
            runners[name], owners[name] = OnnxRunner(path, threads=settings.cpu_threads), variant
        if run.device.type == "cuda":
            runners["torch"], owners["torch"] = TorchRunner(run.model.module), FP32
        latency: dict[str, list[Result]] = {v: [] for v in variants}
        for name, records in benchmark(runners, size, settings, run.progress).items():
            is_graph = name != "torch"
            more = {"graph": name if is_graph else None, "threads": settings.cpu_threads if is_graph else None}
            latency[owners[name]] += [{**r.model_dump(mode="json"), **more} for r in records]
        for variant, record in built.items():
            for artifact in record.result["artifacts"] if record else []:
                latency[variant] += _time_engine(run, artifact["path"])
        return {"latency": latency, "environment": environment}, []

    upstream = [stage for v in variants for stage in (f"export/{v}", *engine_stage(v, built[v]))]
    inputs = {"settings": settings.model_dump(mode="json"), "environment": environment}
    return run.perform("benchmark", inputs, work, upstream=upstream)


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
        command=run.command,
        skipped=_skipped(records),
    )
    preview = run.directory.path / PREVIEW
    run.directory.write("report.json", report.to_json())
    run.directory.write("report.md", to_markdown(report))
    run.directory.write("report.html", to_html(report, preview.read_bytes() if preview.is_file() else None))
    return report


def _accuracy(run: Run, runner: Runner, graph: str | None) -> Accuracy:
    own = predictions(runner, run.evaluation, EVALUATION_BATCH, run.progress)
    return score(runner.runtime, own, run.teacher_predictions, run.evaluation, graph)


def _time_engine(run: Run, name: str) -> list[Result]:
    settings = run.config.benchmark
    found = []
    with engine.TensorRTRunner(run.directory.path / name) as runner:
        for batch in settings.batches:
            times = runner.measure(
                batch,
                warmup_ms=settings.warmup_ms,
                min_runs=settings.min_runs,
                min_seconds=settings.min_seconds,
                cuda_graph=True,
            )
            found.append({**summarize(runner.runtime, batch, times).model_dump(mode="json"), "graph": name})
    return found


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
    if reason := records["export/fp32"].result.get("no_fp16") if "export/fp32" in records else None:
        skipped.append(Skipped(stage="fp16 baseline", reason=reason))
    if "features" in records and "skipped" in records["features"].result:
        skipped.append(Skipped(stage="features", reason=records["features"].result["skipped"]))
    return skipped
