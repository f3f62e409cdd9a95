"""What is deployed of a run, or of a single file, and what executes it: graphs and engines, on the CPU and the GPU."""

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
from clusterq_deploy.results.stages import ExportResult
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner
from clusterq_deploy.stages import build

logger = logging.getLogger(__name__)

CPU = "onnxruntime-cpu"
GPU_RUNTIMES = {"onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "tensorrt"}
"""ONNX Runtime's GPU providers (CUDA runs integers in float, TensorRT builds an engine), and the format of the graph
that each is given; of the float baseline it is the one in FP32."""

COSTLY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "FusedConv"}
"""The operators that take a network's time; a provider that leaves one to another is not what is measured."""

R_co = TypeVar("R_co", bound=Runner, covariant=True)


@dataclass(frozen=True)
class Deployable(Generic[R_co]):
    """A model that can be measured.

    Attributes:
        variant: of the run; empty for a single file.
        path: of its file, as results name it; None for the torch model.
        runtime: what executes it.
        open: loads it; raises an `ExportError` or an `EngineError` if it cannot run here.
    """

    variant: str
    path: str | None
    runtime: str
    open: Callable[[], R_co]


def opened(deployables: Iterable[Deployable[R_co]]) -> Iterator[tuple[Deployable[R_co], R_co] | Skipped]:
    """Open one deployable after the other, for the caller to close.

    A GPU provider that cannot load, or cannot run a graph, is left out from there on. That is one `Skipped` in place
    of a runner; another one, before a runner, says that the provider leaves costly operators to others.
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


def in_turn(deployables: Iterable[Deployable[R_co]], *, tell: bool = False) -> Iterator[tuple[Deployable[R_co], R_co]]:
    """Open one deployable after the other, and close each before the next; `tell` logs what `opened` skips."""
    for item in opened(deployables):
        if not isinstance(item, Skipped):
            with item[1]:
                yield item
        elif tell:
            warn_of(item)


def open_provider(graph: Path, runtime: str, batches: tuple[int, int, int]) -> OnnxRunner:
    """Open a graph in a GPU provider, and show that it runs there.

    Args:
        graph: the file.
        runtime: a key of `GPU_RUNTIMES`.
        batches: smallest, tuned-for and largest batch; the smallest is run once, or the one that the graph fixes.

    Raises:
        ExportError: the provider cannot load, cannot run the graph, or runs no node of it.
    """
    optimized = GPU_RUNTIMES[runtime] != "tensorrt"  # TensorRT fuses Q/DQ itself, and needs to find them
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
    """Say which costly operators of a graph of that name a GPU provider leaves to others; None if it leaves none."""
    place = runner.placement() if runner.runtime in GPU_RUNTIMES else None
    if place is None or not (operators := COSTLY.intersection(place.left)):
        return None
    taken = f"it takes {place.taken} of the {place.nodes} nodes of {graph}"
    return f"{taken}, and leaves {', '.join(sorted(operators))} to others"


def engine_stages(*variants: str) -> tuple[str, ...]:
    """Return the build stages of variants, if engines run here."""
    return () if engine.unavailable_reason() else tuple(f"build/{variant}" for variant in variants)


def run_engines(run: Run, variant: str) -> list[Deployable[engine.TensorRTRunner]]:
    """Return the engines of a variant of a run, if they run here."""
    built = None if engine.unavailable_reason() else run.finished(Stage(build, variant))
    paths = [artifact.path for artifact in built.result.artifacts] if built else []
    return [Deployable(variant, p, "tensorrt", partial(engine.TensorRTRunner, run.directory.path / p)) for p in paths]


def run_graphs_on_gpu(run: Run, exports: Mapping[str, ExportResult]) -> list[Deployable[OnnxRunner]]:
    """Return the graphs of exported variants in each GPU provider, if the run's device is a GPU."""
    _, best, high = build.profile_batches(run.config)
    batches = (1, best, max(high, EVALUATION_BATCH))  # it refuses what is outside, and an evaluation ends in a part
    return [
        Deployable(variant, path, runtime, partial(open_provider, run.directory.path / path, runtime, batches))
        for runtime, graph_format in (GPU_RUNTIMES if run.device.type == "cuda" else {}).items()
        for variant, exported in exports.items()
        for path in [exported.graph("onnxruntime" if variant == FP32 else graph_format)]
    ]


def file_graphs(path: Path, batches: tuple[int, int, int], threads: int | None = None) -> list[Deployable[OnnxRunner]]:
    """Return an ONNX file in every runtime that is here; see `open_provider`."""
    runtimes = GPU_RUNTIMES if torch.cuda.is_available() else ()
    on_gpu = [Deployable("", str(path), name, partial(open_provider, path, name, batches)) for name in runtimes]
    return [Deployable("", str(path), CPU, partial(OnnxRunner, path, threads=threads)), *on_gpu]


def file_engines(path: Path, *, baselines: bool = True) -> Iterator[Deployable[engine.TensorRTRunner]]:
    """Yield an engine itself; for a graph the engines next to it that were built from it as it is, if they run here.

    Args:
        path: an engine or a graph.
        baselines: whether FP16 baselines are among them.
    """
    if path.suffix == build.ENGINE:
        yield Deployable("", str(path), "tensorrt", partial(engine.TensorRTRunner, path))
    elif not engine.unavailable_reason():
        digest = sha256_file(path)
        for built in sorted(path.parent.glob(f"*{build.ENGINE}")):
            try:
                info = engine.read_sidecar(built)
            except EngineError as error:  # of another tool, for one
                logger.warning("%s is left out: %s", built, error)
                continue
            if info.source != path.name or (info.derived and not baselines):
                continue
            if info.source_sha256 == digest:
                yield Deployable("", str(built), "tensorrt", partial(engine.TensorRTRunner, built))
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
        logger.warning("%s is left out: %s", deployable.path, error)


def warn_of(skipped: Skipped) -> None:
    """Log what is left out of the measurement of a single file."""
    verb = " is left out" if skipped.stage in GPU_RUNTIMES else ""
    logger.warning("%s%s: %s", skipped.stage, verb, skipped.reason)
