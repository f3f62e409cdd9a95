"""Build a variant's TensorRT engine: its graph goes in, an engine and its sidecar come out."""

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import EngineError, ExportError
from clusterq_deploy.files import read_graph
from clusterq_deploy.lowering import fp16_baseline, to_tensorrt_rtx
from clusterq_deploy.results.report import Artifact
from clusterq_deploy.results.stages import BuildResult
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.stages import export

logger = logging.getLogger(__name__)

NAME, RESULT = "build", BuildResult
ENGINE, RTX_ENGINE = ".engine", ".rtx.engine"


def needs(_: Run, stage: AnyStage) -> Needs:
    """Require the graph."""
    return Needs(required=(f"export/{stage.variant}",))


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the machine and the build settings, except the timing cache, which does not affect the result."""
    settings = _build_config(run)
    machine = engine.this_machine().binding(settings)
    return {"settings": settings.recorded("timing_cache", "rtx"), "machine": machine}


def work(run: Run, stage: AnyStage) -> tuple[BuildResult, list[str]]:
    """Build a variant's engine; for the float baseline one in FP32 and one in FP16."""
    settings = _build_config(run)
    engines = [build_graph(run, graph, settings, ENGINE)[0] for graph in graphs_of_engines(run, stage.variant)]
    return BuildResult(artifacts=engines), engine_files(engines)


def graphs_of_engines(run: Run, variant: str) -> list[Artifact]:
    """Return the graphs of an exported variant that engines are built from."""
    graphs = run.require_finished(Stage(export, variant)).result.artifacts
    return [graph for graph in graphs if variant == FP32 or graph.target == "tensorrt"]


def build_graph(
    run: Run, graph: Artifact, config: engine.BuildConfig, suffix: str
) -> tuple[Artifact, engine.EngineInfo]:
    """Build the engine of a run's graph next to it; return it with its sidecar."""
    # w8a8/model.engine for w8a8/model.trt.onnx, fp32/model.fp16.engine for fp32/model.fp16.onnx
    name = graph.path.removesuffix(".onnx").removesuffix(".trt") + suffix
    path, target_path = run.directory.path / graph.path, run.directory.path / name
    spelled = _spelled_for(config, graph, path)
    if spelled is None:
        info = engine.build_engine(path, target_path, config, run.progress)
    else:
        with TemporaryDirectory() as folder:
            onnx.save(spelled, Path(folder) / path.name)
            info = engine.build_engine(Path(folder) / path.name, target_path, config, run.progress, spelling_of=path)
    size, target = info.size_bytes, config.library
    return Artifact(kind="engine", target=target, path=name, size_bytes=size, fp16=graph.fp16), info


def _spelled_for(config: engine.BuildConfig, graph: Artifact, path: Path) -> onnx.ModelProto | None:
    """Return a quantized graph as TensorRT-RTX computes it best; None for any other, or if FP16 cannot hold it."""
    if not config.rtx or graph.target != "tensorrt" or graph.fp16:
        return None
    try:
        return to_tensorrt_rtx(read_graph(path))
    except ExportError as error:
        logger.warning("%s is built as it is, with convolutions that write FP32: %s", graph.path, error)
        return None


def engine_files(engines: Iterable[Artifact]) -> list[str]:
    """Return the files of engines, with their sidecars."""
    return [file for built in engines for file in (built.path, f"{built.path}.json")]


def describe(_: Run, __: AnyStage) -> str:
    """Name the result."""
    return "a TensorRT engine"


def profile_batches(config: RunConfig) -> tuple[int, int, int]:
    """Return the smallest, optimal and largest batch of an engine, with those to be timed between them."""
    low, best, high = config.build.batch
    timed = config.benchmark.batches
    return min(low, *timed), best, max(high, *timed)


def _build_config(run: Run) -> engine.BuildConfig:
    """Return TensorRT's build settings with `profile_batches`."""
    return run.config.build.model_copy(update={"batch": profile_batches(run.config), "rtx": ()})


def build_file(path: Path, config: engine.BuildConfig, progress: Progress = SILENT) -> dict[Path, engine.EngineInfo]:
    """Build the engines of an ONNX file, of any exporter, and of its FP16 baseline, all next to it.

    They are TensorRT's if it and a GPU are there, and TensorRT-RTX's if the settings name GPUs for it.

    Raises:
        TensorRTMissing: there is nothing to build engines with.
        EngineError: the library cannot build the graph.
    """
    engines: dict[Path, engine.EngineInfo] = {}
    if not config.rtx or not engine.unavailable_reason():
        engines = _build_file(path, config.model_copy(update={"rtx": ()}), ENGINE, progress)
    return engines | (_build_file(path, config.for_rtx(), RTX_ENGINE, progress) if config.rtx else {})


def _build_file(
    path: Path, config: engine.BuildConfig, suffix: str, progress: Progress
) -> dict[Path, engine.EngineInfo]:
    """Build the engine of an ONNX file, and of its FP16 baseline.

    A graph that computes in FP16 needs no baseline; if none can be built, a warning says why.

    Raises:
        EngineError: TensorRT cannot build the graph.
    """
    engine_path, baseline_path = path.with_suffix(suffix), path.with_suffix(f".fp16{suffix}")
    engines = {engine_path: engine.build_engine(path, engine_path, config, progress)}
    try:
        if baseline := fp16_baseline(read_graph(path)):
            info = engine.read_sidecar(baseline_path) if baseline_path.exists() else None
            if info and not (info.derived and info.source == path.name):
                raise EngineError(f"{baseline_path} was built from {info.source} and is kept; move it away")
            with TemporaryDirectory() as folder:
                graph = Path(folder) / baseline_path.with_suffix(".onnx").name
                onnx.save(baseline, graph)
                engines[baseline_path] = engine.build_engine(graph, baseline_path, config, progress, derived_from=path)
    except (EngineError, ExportError, ValueError) as error:  # ValueError: larger than a protobuf may be
        logger.warning("%s has no FP16 baseline: %s", path, error)
    return engines
