"""Build a variant's engines of TensorRT-RTX, ahead of time: its graphs go in, engines and their plans come out."""

from clusterq_deploy.results.engines import EnginePlan
from clusterq_deploy.results.report import Artifact, Skipped
from clusterq_deploy.results.stages import RtxResult
from clusterq_deploy.run.run import Run
from clusterq_deploy.run.stage import AnyStage, Json
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.stages import build

NAME, RESULT = "rtx", RtxResult

needs = build.needs


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the settings and the release."""
    run.check_rtx()
    return {"settings": _settings(run).recorded(), "release": engine.library_version("tensorrt_rtx")}


def work(run: Run, stage: AnyStage) -> tuple[RtxResult, list[str]]:
    """Build a variant's engine; for the float baseline one in FP32 and one in FP16."""
    engines: list[Artifact] = []
    plans: list[EnginePlan] = []
    skipped: list[Skipped] = []
    for graph in build.graphs_of_engines(run, stage.variant):
        config = _settings(run)
        if engine.TURING in config.rtx and not graph.fp16:
            config = config.model_copy(update={"rtx": tuple(t for t in config.rtx if t != engine.TURING)})
            reason = f"{graph.path} has no engine for {engine.TURING}, which multiplies no float32 matrices"
            skipped.append(Skipped(stage=NAME, reason=reason))
        if config.rtx:
            artifact, info = build.build_graph(run, graph, config, build.RTX_ENGINE)
            engines.append(artifact)
            plans += [info.plan.model_copy(update={"engine": artifact.path})] if info.plan else []
    return RtxResult(artifacts=engines, plans=plans, skipped=skipped), build.engine_files(engines)


def describe(run: Run, _: AnyStage) -> str:
    """Name the result."""
    return f"TensorRT-RTX engines for {', '.join(run.config.build.rtx)}"


def _settings(run: Run) -> engine.BuildConfig:
    """Return the build settings, with the batches to be timed."""
    return run.config.build.model_copy(update={"batch": build.profile_batches(run.config)}).for_rtx()
