"""The graphs and engines of a run, or of a single file, and the runtimes that execute them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from clusterq_deploy.errors import EngineError, ExportError
from clusterq_deploy.files import sha256_file
from clusterq_deploy.results.report import Skipped
from clusterq_deploy.results.stages import BuildResult, ExportResult
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import Kind, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner
from clusterq_deploy.stages import build, rtx

logger = logging.getLogger(__name__)

CPU = "onnxruntime-cpu"
GPU_RUNTIMES = {"onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "tensorrt"}
"""ONNX Runtime's GPU providers (CUDA runs integers in float, TensorRT builds an engine), and the format of their graphs
of variants; of the float baseline they run the graph in FP32."""

COSTLY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "FusedConv"}
"""Operators that dominate the latency; if a provider leaves one to another, the measurement is not of the provider."""

R_co = TypeVar("R_co", bound=Runner, covariant=True)


@dataclass(frozen=True)
class Deployable(Generic[R_co]):
    """A model that can be measured.

    Attributes:
        variant: of the run; empty for a single file.
        path: of its file, as in results; None for the torch model.
        runtime: the name of the runtime.
        open: loads it; raises an `ExportError` or an `EngineError` if it cannot run here.
    """

    variant: str
    path: str | None
    runtime: str
    open: Callable[[], R_co]


def opened(deployables: Iterable[Deployable[R_co]]) -> Iterator[tuple[Deployable[R_co], R_co] | Skipped]:
    """Open one deployable after the other; the caller closes them.

    A GPU provider that fails to load or to run a graph is skipped from then on, with one `Skipped` for its runner. A
    `Skipped` before a runner says that the provider leaves costly operators to others.
    """
    broken: set[str] = set()
    for deployable in deployables:
        if deployable.runtime in broken:
            continue
        try:
            runner = deployable.open()
        except ExportError as error:
            if deployable.runtime not in GPU_RUNTIMES:
                raise
            broken.add(deployable.runtime)
            yield Skipped(stage=deployable.runtime, reason=str(error))
            continue
        if isinstance(runner, OnnxRunner) and (reason := left_to_others(runner, Path(str(deployable.path)).name)):
            yield Skipped(stage=f"{deployable.runtime} {deployable.variant or deployable.path}", reason=reason)
        yield deployable, runner


def in_turn(deployables: Iterable[Deployable[R_co]], *, warn: bool = False) -> Iterator[tuple[Deployable[R_co], R_co]]:
    """Open one deployable after the other, and close each before the next; `warn` logs what `opened` skips."""
    for item in opened(deployables):
        if not isinstance(item, Skipped):
            with item[1]:
                yield item
        elif warn:
            warn_of(item)


def open_provider(graph: Path, runtime: str, batches: tuple[int, int, int]) -> OnnxRunner:
    """Open a graph in a GPU provider of `GPU_RUNTIMES`, and run it once, at the smallest or the fixed batch.

    `batches` are the smallest, optimal and largest batch.

    Raises:
        ExportError: the provider cannot load, cannot run the graph, or runs no node of it.
    """
    optimized = GPU_RUNTIMES[runtime] != "tensorrt"  # TensorRT fuses Q/DQ itself, and requires them in the graph
    with ExitStack() as stack:
        runner = stack.enter_context(OnnxRunner(graph, runtime=runtime, optimized=optimized, batch=batches))
        fixed, *size = runner.input_shape
        runner.infer(np.zeros((fixed or batches[0], *size), np.float32))
        place = runner.placement()
        if place is not None and not place.taken:
            raise ExportError(f"{runtime} takes none of the {place.nodes} nodes of {graph.name}")
        stack.pop_all()
    return runner


def left_to_others(runner: OnnxRunner, graph: str) -> str | None:
    """Return a note if a GPU provider leaves costly operators of a graph to others, else None."""
    place = runner.placement() if runner.runtime in GPU_RUNTIMES else None
    if place is None or not (operators := COSTLY.intersection(place.left)):
        return None
    left = ", ".join(sorted(operators))
    return f"it takes {place.taken} of the {place.nodes} nodes of {graph}, and leaves {left} to others"


def engine_stages(*variants: str) -> tuple[str, ...]:
    """Return the build stages of variants, if engines run here."""
    return tuple(f"{kind.NAME}/{variant}" for kind in _runnable().values() for variant in variants)


def run_engines(run: Run, variant: str) -> list[Deployable[engine.TensorRTRunner]]:
    """Return the engines of a variant of a run, if they run here."""
    finished = [run.finished(Stage(kind, variant)) for kind in _runnable().values()]
    return [
        Deployable(variant, built.path, built.target, partial(engine.TensorRTRunner, run.directory.path / built.path))
        for stage in finished
        if stage
        for built in stage.result.artifacts
    ]


def _runnable() -> dict[engine.Library, Kind[BuildResult]]:
    """Return the libraries whose engines run here, with the kind of stage that builds them."""
    kinds: dict[engine.Library, Kind[BuildResult]] = {"tensorrt": build, "tensorrt_rtx": rtx}
    return {library: kind for library, kind in kinds.items() if not engine.unavailable_reason(library)}


def run_graphs_on_gpu(run: Run, exports: Mapping[str, ExportResult]) -> list[Deployable[OnnxRunner]]:
    """Return the graphs of exported variants in each GPU provider, if the run's device is a GPU."""
    _, best, high = build.profile_batches(run.config)
    batches = (1, best, max(high, EVALUATION_BATCH))  # others are errors; an evaluation ends in a partial batch
    return [
        Deployable(variant, path, runtime, partial(open_provider, run.directory.path / path, runtime, batches))
        for runtime, graph_format in (GPU_RUNTIMES if run.device.type == "cuda" else {}).items()
        for variant, exported in exports.items()
        for path in [exported.graph("onnxruntime" if variant == FP32 else graph_format)]
    ]


def file_graphs(path: Path, batches: tuple[int, int, int], threads: int | None = None) -> list[Deployable[OnnxRunner]]:
    """Return an ONNX file in every available runtime; see `open_provider`."""
    runtimes = GPU_RUNTIMES if torch.cuda.is_available() else ()
    on_gpu = [Deployable("", str(path), name, partial(open_provider, path, name, batches)) for name in runtimes]
    return [Deployable("", str(path), CPU, partial(OnnxRunner, path, threads=threads)), *on_gpu]


def file_engines(path: Path, *, baselines: bool = True) -> Iterator[Deployable[engine.TensorRTRunner]]:
    """Yield the engine `path`; for a graph the engines next to it that were built from its content, if they run here.

    FP16 baselines are included if `baselines`.
    """
    if path.suffix == build.ENGINE:
        yield Deployable("", str(path), "tensorrt", partial(engine.TensorRTRunner, path))
    elif libraries := _runnable():
        digest = sha256_file(path)
        for built in sorted(path.parent.glob(f"*{build.ENGINE}")):
            try:
                info = engine.read_sidecar(built)
            except EngineError as error:  # for example of another tool
                logger.warning("%s is skipped: %s", built, error)
                continue
            library = info.options.library
            if info.source != path.name or (info.derived and not baselines) or library not in libraries:
                continue
            if info.source_sha256 == digest:
                yield Deployable("", str(built), library, partial(engine.TensorRTRunner, built))
            else:
                logger.warning("%s was built from an earlier %s; build it again", built, path.name)


@contextmanager
def file_engine(deployable: Deployable[R_co], target: Path) -> Iterator[R_co]:
    """Open an engine; if it cannot be opened or measured, log a warning, or raise if it is the target itself."""
    try:
        with deployable.open() as runner:
            yield runner
    except EngineError as error:
        if deployable.path == str(target):
            raise
        logger.warning("%s is skipped: %s", deployable.path, error)


def warn_of(skipped: Skipped) -> None:
    """Log what is skipped in the measurement of a single file."""
    verb = " is skipped" if skipped.stage in GPU_RUNTIMES else ""
    logger.warning("%s%s: %s", skipped.stage, verb, skipped.reason)
