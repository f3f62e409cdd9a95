"""Building and measuring from a single file that this project exported, away from its run directory."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

from calib.progress import SILENT, Progress
from clusterq_deploy import engine
from clusterq_deploy.config import RunConfig
from clusterq_deploy.data import load_evaluation
from clusterq_deploy.errors import DataError, EngineError, ExportError
from clusterq_deploy.export import half_baseline, read_graph
from clusterq_deploy.files import sha256_file
from clusterq_deploy.measure import benchmark, predictions, score
from clusterq_deploy.models import InputSpec
from clusterq_deploy.run import EVALUATION_BATCH
from clusterq_deploy.runners import OnnxRunner, Runner
from clusterq_deploy.stages.deployment import tuned_batches
from clusterq_deploy.stages.engines import time_engine
from clusterq_deploy.stages.providers import GPU_RUNTIMES, open_provider

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
    built = [(own := path.with_suffix(ENGINE), engine.build_engine(path, own, config, progress))]
    try:
        if baseline := half_baseline(read_graph(path)):
            with TemporaryDirectory() as folder:
                graph, own = Path(folder) / f"{path.stem}.fp16.onnx", path.with_suffix(f".fp16{ENGINE}")
                onnx.save(baseline, graph)
                built.append((own, engine.build_engine(graph, own, config, progress, derived_from=path)))
    except (EngineError, ExportError) as error:
        logger.warning("%s has no FP16 baseline: %s", path, error)
    return [{"engine": str(own), "size_bytes": info.size_bytes, "seconds": info.seconds} for own, info in built]


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
    with OnnxRunner(source) as runner:
        graph = describe(runner, source)
    if data is None and graph.source != "bundled":
        raise DataError(f"{path} was exported from {graph.name}; give the images to evaluate it on with --data")
    images = load_evaluation(data, graph, limit)

    def measured(runner: Runner, name: Path) -> dict[str, Any]:
        own = predictions(runner, images, EVALUATION_BATCH, progress)
        found = score(runner.runtime, own, own, images, str(name))
        counts = {"images": len(images.kept), "unreadable": len(images.unreadable)}
        return found.model_dump(mode="json", exclude={"agreement"}) | counts

    rows = []
    if source == path:
        for opened in _sessions(path, graph.input.size, (1, EVALUATION_BATCH, EVALUATION_BATCH)):
            with opened:
                rows.append(measured(opened, path))
    for own in [path] if path.suffix == ENGINE else _engines_of(path, baselines=False):
        with engine.TensorRTRunner(own) as running:
            rows.append(measured(running, own))
    return rows


def benchmark_file(path: Path, config: RunConfig, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Latency records: of an ONNX file in every runtime that is here, with the engines beside it, or of an engine.

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
            first = opened.enter_context(OnnxRunner(path))
            size = describe(first, path).input.size
            sessions = _sessions(path, size, tuned_batches(config), threads=settings.cpu_threads)
            runners = {own.runtime: opened.enter_context(own) for own in sessions}
            timed = benchmark(runners, size, settings, progress)
        for runtime, records in timed.items():
            threads = settings.cpu_threads if runtime == "onnxruntime-cpu" else None
            rows += [{**own.model_dump(mode="json", exclude_none=True), "threads": threads} for own in records]
        for row in rows:
            row["graph"] = str(path)
    for own in [path] if path.suffix == ENGINE else _engines_of(path):
        with engine.TensorRTRunner(own) as running:
            found = time_engine(running, str(own), settings)
        rows += [record.model_dump(mode="json", exclude_none=True) for record in found]
    return rows


def _sessions(
    path: Path, size: tuple[int, int, int], batch: tuple[int, int, int], threads: int | None = None
) -> Iterator[OnnxRunner]:
    """The graph in ONNX Runtime on the CPU, and, where there is a GPU, in its providers that load."""
    yield OnnxRunner(path, threads=threads)
    for runtime in GPU_RUNTIMES if torch.cuda.is_available() else ():
        try:
            runner, shared = open_provider(path, runtime, size, batch)
        except ExportError as error:
            logger.warning("%s is left out: %s", runtime, error)
            continue
        if shared:
            logger.warning("%s: %s", runtime, shared)
        yield runner


def _engines_of(path: Path, *, baselines: bool = True) -> Iterator[Path]:
    """The engines beside a graph that were built from it as it is, where engines run here."""
    if engine.unavailable_reason():
        return
    digest = sha256_file(path)
    for own in sorted(path.parent.glob(f"*{ENGINE}")):
        info = engine.read_sidecar(own)
        if info.source != path.name or (info.derived and not baselines):
            continue
        if info.source_sha256 != digest:
            logger.warning("%s was built from an earlier %s; build it again", own, path.name)
            continue
        yield own


def _source_of(path: Path) -> Path:
    """The graph beside an engine that it was built from: it says how images are prepared.

    Raises:
        EngineError: there is none, or another.
    """
    info = engine.read_sidecar(path)
    source = path.with_name(info.source)
    if not source.is_file() or sha256_file(source) != info.source_sha256:
        raise EngineError(
            f"{path} was built from a {source.name} that is not beside it; it says how images are prepared"
        )
    return source
