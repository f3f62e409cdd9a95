"""Building and measuring from a single file, away from a run directory."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import DataError, EngineError, ExportError
from clusterq_deploy.evaluation.accuracy import predictions, score
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.evaluation.latency import BenchmarkConfig, benchmark
from clusterq_deploy.files import read_graph, sha256_file
from clusterq_deploy.lowering import fp16_baseline
from clusterq_deploy.models import InputSpec
from clusterq_deploy.run.run import EVALUATION_BATCH
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner
from clusterq_deploy.stages.benchmark import time_engine
from clusterq_deploy.stages.deployables import GPU_RUNTIMES, open_provider, tuned_batches

logger = logging.getLogger(__name__)

ENGINE = ".engine"


@dataclass(frozen=True)
class Graph:
    """What an exported file says of itself, as evaluation data wants to know it."""

    name: str
    source: str
    input: InputSpec
    classes: int


def describe(runner: OnnxRunner, path: Path) -> Graph:
    """Read the model, the input and the number of classes from a graph's metadata.

    Raises:
        ExportError: the file is of another exporter.
    """
    metadata = runner.metadata()
    try:
        return Graph(
            metadata["clusterq.model"],
            metadata["clusterq.source"],
            InputSpec.model_validate_json(metadata["clusterq.input"]),
            runner.classes,
        )
    except (KeyError, ValueError) as error:
        raise ExportError(f"{path} does not say how its input is made; only graphs of clusterq export do") from error


def build_file(path: Path, config: engine.BuildConfig, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Build the engine of an ONNX file, of any exporter, and that of the same network in FP16, both beside it.

    Without the FP16 baseline nobody knows what INT8 gains. A graph that computes in FP16 needs none; where none can be
    made, a warning says why.

    Raises:
        EngineError: TensorRT cannot build the graph.
    """
    engine_path, baseline_path = path.with_suffix(ENGINE), path.with_suffix(f".fp16{ENGINE}")
    built = {engine_path: engine.build_engine(path, engine_path, config, progress)}
    try:
        if baseline := fp16_baseline(read_graph(path)):
            _require_own(baseline_path, path)
            with TemporaryDirectory() as folder:
                graph = Path(folder) / baseline_path.with_suffix(".onnx").name
                onnx.save(baseline, graph)
                built[baseline_path] = engine.build_engine(graph, baseline_path, config, progress, derived_from=path)
    except (EngineError, ExportError, ValueError) as error:  # the last where it is larger than a protobuf may be
        logger.warning("%s has no FP16 baseline: %s", path, error)
    return [{"engine": str(own), "size_bytes": info.size_bytes, "seconds": info.seconds} for own, info in built.items()]


def _require_own(engine_path: Path, source: Path) -> None:
    """Return if there is no engine yet, or one that was derived from that graph.

    Raises:
        EngineError: another one lies there.
    """
    if engine_path.exists():
        info = engine.read_sidecar(engine_path)
        if not (info.derived and info.source == source.name):
            raise EngineError(f"{engine_path} was built from {info.source}, and stays; move it away")


def evaluate_file(
    path: Path, data: Path | None, limit: int | None, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Top-1 and top-5 (percent) on evaluation data: of an ONNX file in every runtime that is here, or of an engine.

    Of an ONNX file the engines beside it are measured too, but for FP16 baselines: their time is what they are for.

    Raises:
        DataError: there is no data, or it does not fit.
        ExportError: the file cannot be run.
        EngineError: likewise, of an engine; or the graph that it was built from is not beside it.
    """
    source = _source_of(path) if path.suffix == ENGINE else path
    rows = []
    with OnnxRunner(source) as on_cpu:
        graph, shape = describe(on_cpu, source), on_cpu.input_shape
        if data is None and graph.source != "bundled":
            raise DataError(f"{path} was exported from {graph.name}; give the images to evaluate it on with --data")
        images = load_evaluation(data, graph, limit)

        def measured(runner: Runner, name: Path) -> dict[str, Any]:
            own = predictions(runner, images, EVALUATION_BATCH, progress)
            found = score(runner.runtime, own, own, images, str(name))
            counts = {"images": len(images.kept), "unreadable": len(images.unreadable)}
            return found.model_dump(mode="json", exclude={"agreement"}) | counts

        if source == path:
            rows.append(measured(on_cpu, path))
    if source == path:
        for provided in _provider_sessions(path, shape, (1, EVALUATION_BATCH, EVALUATION_BATCH)):
            with provided:
                rows.append(measured(provided, path))
    for engine_path in _engines_of(path, baselines=False):
        with _told_of(engine_path, path), engine.TensorRTRunner(engine_path) as running:
            rows.append(measured(running, engine_path))
    return rows


def benchmark_file(path: Path, config: RunConfig, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Latency records: of an ONNX file, of any exporter, in every runtime that is here, with the engines beside it; or
    of an engine.

    Args:
        path: the file.
        config: its settings of builds and benchmarks count.
        progress: shows the runs.

    Raises:
        ExportError: the file cannot be run.
        EngineError: an engine cannot.
    """
    settings, rows = config.benchmark, []
    if path.suffix != ENGINE:
        with ExitStack() as opened:  # closed before TensorRT loads engines: sessions hold its logger and the memory
            on_cpu = opened.enter_context(OnnxRunner(path, threads=settings.cpu_threads))
            fixed, channels, height, width = shape = on_cpu.input_shape
            settings, runners = _with_batch(settings, fixed, path), {on_cpu.runtime: on_cpu}
            for provided in _provider_sessions(path, shape, tuned_batches(config)):
                runners[provided.runtime] = opened.enter_context(provided)
            timings = benchmark(runners, (channels, height, width), settings, progress)
        for reason in timings.skipped:
            logger.warning("%s", reason)
        for runtime, records in timings.latencies.items():
            threads = settings.cpu_threads if runtime == "onnxruntime-cpu" else None
            rows += [{**own.model_dump(mode="json", exclude_none=True), "threads": threads} for own in records]
        for row in rows:
            row["graph"] = str(path)
    for engine_path in _engines_of(path):
        with _told_of(engine_path, path), engine.TensorRTRunner(engine_path) as running:
            found = time_engine(running, str(engine_path), settings)
            rows += [record.model_dump(mode="json", exclude_none=True) for record in found]
    return rows


def _with_batch(settings: BenchmarkConfig, fixed: int | None, path: Path) -> BenchmarkConfig:
    """The settings for a graph that may fix its batch."""
    if fixed is None or settings.batches == (fixed,):
        return settings
    logger.warning("%s fixes the batch at %d, which alone is timed", path, fixed)
    return settings.model_copy(update={"batches": (fixed,)})


@contextmanager
def _told_of(engine_path: Path, target: Path) -> Iterator[None]:
    """An engine that cannot be measured is a warning, unless it is the target itself."""
    try:
        yield
    except EngineError as error:
        if engine_path == target:
            raise
        logger.warning("%s is left out: %s", engine_path, error)


def _provider_sessions(
    path: Path, shape: tuple[int | None, int, int, int], batch: tuple[int, int, int]
) -> Iterator[OnnxRunner]:
    """The graph, whose input has that shape, in the providers of ONNX Runtime that load, where there is a GPU."""
    fixed, channels, height, width = shape
    batch = batch if fixed is None else (fixed, fixed, fixed)
    for runtime in GPU_RUNTIMES if torch.cuda.is_available() else ():
        try:
            runner, shared = open_provider(path, runtime, (channels, height, width), batch)
        except ExportError as error:
            logger.warning("%s is left out: %s", runtime, error)
            continue
        if shared:
            logger.warning("%s: %s", runtime, shared)
        yield runner


def _engines_of(path: Path, *, baselines: bool = True) -> Iterator[Path]:
    """An engine itself; the engines beside a graph that were built from it as it is, where engines run here."""
    if path.suffix == ENGINE:
        yield path
        return
    if engine.unavailable_reason():
        return
    digest = sha256_file(path)
    for own in sorted(path.parent.glob(f"*{ENGINE}")):
        try:
            info = engine.read_sidecar(own)
        except EngineError as error:  # of another tool, for one
            logger.warning("%s is left out: %s", own, error)
            continue
        if info.source != path.name or (info.derived and not baselines):
            continue
        if info.source_sha256 != digest:
            logger.warning("%s was built from an earlier %s; build it again", own, path.name)
            continue
        yield own


def _source_of(path: Path) -> Path:
    """The graph beside an engine that it was built from: it says how images are prepared.

    Raises:
        EngineError: there is none, or another; or the engine is a baseline, which is no model to evaluate.
    """
    info = engine.read_sidecar(path)
    if info.derived:
        raise EngineError(f"{path} is the FP16 baseline of {info.source}, to compare times with; evaluate that")
    source = path.with_name(info.source)
    if not source.is_file() or sha256_file(source) != info.source_sha256:
        raise EngineError(
            f"{path} was built from a {source.name} that is not beside it; it says how images are prepared"
        )
    return source
