"""ONNX Runtime's providers for the GPU: CUDA, which runs integers in float, and TensorRT, which builds an engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from clusterq_deploy.errors import ExportError
from clusterq_deploy.report.schema import Skipped
from clusterq_deploy.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.rundir import StageRecord
from clusterq_deploy.runners import OnnxRunner
from clusterq_deploy.stages.deployment import graph_for, tuned_batches

GPU_RUNTIMES = {"onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "tensorrt"}
"""The spelling of the graph that each of them takes; of the float baseline it is the one in FP32."""


@dataclass(frozen=True)
class ProviderRunner:
    """A variant's graph, opened in a provider, and shown to run there."""

    variant: str
    graph: str
    runner: OnnxRunner


def provider_runners(run: Run, exports: Mapping[str, StageRecord], skipped: list[Skipped]) -> Iterator[ProviderRunner]:
    """Open each variant's graph in each GPU provider, where the run's device is a GPU.

    A provider that cannot load, or cannot run a graph, is left out from there on.

    Args:
        exports: the finished export stages, by variant.
        skipped: takes one entry for each provider that was left out.
    """
    if run.device.type != "cuda":
        return
    _, best, high = tuned_batches(run)
    batch = (1, best, max(high, EVALUATION_BATCH))  # it refuses what is outside, and an evaluation ends in a part
    for runtime, spelling in GPU_RUNTIMES.items():
        for variant, record in exports.items():
            graph = str(graph_for(record, "onnxruntime" if variant == FP32 else spelling))
            try:
                runner = OnnxRunner(
                    run.directory.path / graph,
                    runtime=runtime,
                    optimized=spelling != "tensorrt",  # TensorRT fuses Q/DQ itself, and wants to find them
                    batch=batch,
                )
                runner.infer(np.zeros((1, *run.model.input.size), np.float32))
            except ExportError as error:
                skipped.append(Skipped(stage=runtime, reason=str(error)))
                break
            yield ProviderRunner(variant, graph, runner)
