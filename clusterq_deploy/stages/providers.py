"""ONNX Runtime's providers for the GPU: CUDA, which runs integers in float, and TensorRT, which builds an engine."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clusterq_deploy.errors import ExportError
from clusterq_deploy.results.report import Skipped
from clusterq_deploy.run.manifest import StageRecord
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.runtimes.runners import OnnxRunner
from clusterq_deploy.stages.deployment import graph_for, tuned_batches

GPU_RUNTIMES = {"onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "tensorrt"}
"""The spelling of the graph that each of them takes; of the float baseline it is the one in FP32."""

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
    for runtime, spelling in GPU_RUNTIMES.items():
        for variant, record in exports.items():
            graph = str(graph_for(record, "onnxruntime" if variant == FP32 else spelling))
            try:
                runner, shared = open_provider(run.directory.path / graph, runtime, run.model.input.size, batch)
            except ExportError as error:
                skipped.append(Skipped(stage=runtime, reason=str(error)))
                break
            if shared:
                skipped.append(Skipped(stage=f"{runtime} {variant}", reason=shared))
            yield ProviderRunner(variant, graph, runner)
