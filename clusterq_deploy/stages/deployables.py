"""What is deployed of a run, and what executes it: graphs and engines, ONNX Runtime's providers for the GPU.

Of these CUDA runs integers in float, and TensorRT builds an engine.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import ExportError
from clusterq_deploy.results.report import Skipped
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner

GPU_RUNTIMES = {"onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "tensorrt"}
"""The format of the graph that each of them takes; of the float baseline it is the one in FP32."""

COSTLY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "FusedConv"}
"""The operators that take a network's time; a provider that leaves one to another is not what is measured."""


@dataclass(frozen=True)
class ProviderRunner:
    """A variant's graph, opened in a provider, and shown to run there."""

    variant: str
    graph: str
    runner: OnnxRunner


def open_provider(
    graph: Path, runtime: str, size: tuple[int, int, int], batch: tuple[int, int, int]
) -> tuple[OnnxRunner, str | None]:
    """A graph in a GPU provider, shown to run there; and, where it left convolutions or products to others, what.

    Args:
        graph: the file.
        runtime: a key of `GPU_RUNTIMES`.
        size: (channels, height, width) of an image.
        batch: smallest, tuned-for and largest batch; the smallest is run once.

    Raises:
        ExportError: the provider cannot load, cannot run the graph, or takes no node of it.
    """
    optimized = GPU_RUNTIMES[runtime] != "tensorrt"  # TensorRT fuses Q/DQ itself, and wants to find them
    with ExitStack() as opened:
        runner = opened.enter_context(OnnxRunner(graph, runtime=runtime, optimized=optimized, batch=batch))
        runner.infer(np.zeros((batch[0], *size), np.float32))
        place = runner.placement()
        if place is not None and not place.taken:
            raise ExportError(f"{runtime} takes none of the {place.nodes} nodes of {graph.name}")
        opened.pop_all()
    if place is None or not COSTLY.intersection(place.left):
        return runner, None
    operators = ", ".join(sorted(COSTLY.intersection(place.left)))
    return (
        runner,
        f"it takes {place.taken} of the {place.nodes} nodes of {graph.name}, and leaves {operators} to others",
    )


def provider_runners(run: Run, exports: Mapping[str, StageRecord], skipped: list[Skipped]) -> Iterator[ProviderRunner]:
    """Open each variant's graph in each GPU provider, where the run's device is a GPU.

    A provider that cannot load, or cannot run a graph, is left out from there on.

    Args:
        exports: the finished export stages, by variant.
        skipped: takes one entry for each provider that was left out, and for each graph that it left in part to others.
    """
    if run.device.type != "cuda":
        return
    _, best, high = tuned_batches(run.config)
    batch = (1, best, max(high, EVALUATION_BATCH))  # it refuses what is outside, and an evaluation ends in a part
    for runtime, graph_format in GPU_RUNTIMES.items():
        for variant, record in exports.items():
            graph = str(graph_for(record, "onnxruntime" if variant == FP32 else graph_format))
            try:
                runner, shared = open_provider(run.directory.path / graph, runtime, run.model.input.size, batch)
            except ExportError as error:
                skipped.append(Skipped(stage=runtime, reason=str(error)))
                break
            if shared:
                skipped.append(Skipped(stage=f"{runtime} {variant}", reason=shared))
            yield ProviderRunner(variant, graph, runner)


def tuned_batches(config: RunConfig) -> tuple[int, int, int]:
    """The smallest, the tuned-for and the largest batch of what TensorRT builds; the batches to be timed are in it."""
    low, best, high = config.build.batch
    timed = config.benchmark.batches
    return min(low, *timed), best, max(high, *timed)


def built_engine(run: Run, variant: str) -> StageRecord | None:
    """The finished build stage of a variant, where its engine can run."""
    return None if engine.unavailable_reason() else run.directory.finished(f"build/{variant}")


def engine_stages(*variants: str) -> tuple[str, ...]:
    """Return the build stages of variants, where engines run here."""
    return () if engine.unavailable_reason() else tuple(f"build/{variant}" for variant in variants)


def graph_for(record: StageRecord, target: str) -> str | None:
    """The path of a finished export's graph for a target."""
    return next((str(a["path"]) for a in record.result["artifacts"] if a["target"] == target), None)


def executed_graphs(variant: str, source: StageRecord) -> list[Result]:
    """The exported graphs that are measured as graphs.

    Not the FP16 baseline's: ONNX Runtime has few FP16 kernels on a CPU and casts most of it to float, slowly; its
    engine is measured where there is one.
    """
    return [a for a in source.result["artifacts"] if variant != FP32 or a["target"] == "onnxruntime"]


def runner_of(run: Run, artifact: Result) -> Runner:
    """Executes an artifact as its target does."""
    path = run.directory.path / artifact["path"]
    if artifact["kind"] == "engine":
        return engine.TensorRTRunner(path)
    return OnnxRunner(path, optimized=artifact["target"] != "tensorrt")
