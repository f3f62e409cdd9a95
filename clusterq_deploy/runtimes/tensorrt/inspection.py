"""What TensorRT made of a graph: which layers run in which type, how long they take, and what missed INT8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clusterq_deploy.results.engines import EngineInspection, EngineLayer, MissedLayer
from clusterq_deploy.runtimes.tensorrt.layers import EngineLayers, Layer

if TYPE_CHECKING:
    import tensorrt as trt

_SLOWEST = 10
UNKNOWN = "unknown"
"""The type of a layer that the engine does not tell of."""


def layer_information(engine: trt.ICudaEngine, context: trt.IExecutionContext) -> str:
    """The engine inspector's JSON on all layers; with the context's shapes set, formats are known too."""
    import tensorrt as trt

    inspector: trt.EngineInspector = engine.create_engine_inspector()
    inspector.execution_context = context
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def layer_profiler(times_ms: dict[str, float]) -> trt.IProfiler:
    """A profiler that adds each layer's milliseconds to those in `times_ms`."""
    import tensorrt as trt

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # the binding asks for this call rather than super()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times_ms[layer_name] = times_ms.get(layer_name, 0.0) + ms

    return Profiler()


def summarize_layers(
    found: EngineLayers, times_ms: Mapping[str, float], quantized: Mapping[str, str], *, engine: str, batch: int
) -> EngineInspection:
    """Count an engine's layers by type, find the slowest, and name what is quantized and does not run in INT8.

    Args:
        found: the engine's layers.
        times_ms: mean milliseconds of each layer in a call, by name.
        quantized: the graph's nodes that are quantized, with the names of their weights; each is to run in INT8.
        engine: the engine's path, for the record.
        batch: images a call, when it was profiled.
    """
    by_name = {layer.name: layer for layer in found.layers}
    total = sum(times_ms.values())
    slowest = sorted(times_ms.items(), key=lambda item: -item[1])[:_SLOWEST]
    return EngineInspection(
        engine=engine,
        batch=batch,
        detailed=found.detailed,
        layers=len(found.layers),
        reformats=sum(layer.is_reformat for layer in found.layers),
        quantizers=sum(layer.is_quantizer for layer in found.layers),
        precisions=_precisions(found),
        total_ms=total,
        reformat_ms=sum(ms for name, ms in times_ms.items() if name in by_name and by_name[name].is_reformat),
        slowest=[_timed(by_name.get(name, Layer(name)), ms, total) for name, ms in slowest],
        quantized_layers=len(quantized),
        missed=[
            MissedLayer(layer=node, weight=weight, reason=reason)
            for node, weight in quantized.items()
            if (reason := _missed(node, found)) is not None
        ],
        notes=_notes(found, quantized),
    )


def _precisions(found: EngineLayers) -> dict[str, int]:
    """How many of the layers that compute have each type, the most frequent first; nothing with names alone."""
    if not found.detailed:
        return {}
    return dict(Counter(layer.precision or UNKNOWN for layer in found.layers if layer.computes).most_common())


def _timed(layer: Layer, ms: float, total_ms: float) -> EngineLayer:
    share = ms / total_ms if total_ms else 0.0
    return EngineLayer(name=layer.name, kind=layer.kind, precision=layer.precision, mean_ms=ms, share=share)


def _missed(node: str, found: EngineLayers) -> str | None:
    """Why a quantized node does not run in INT8; None where it does, or where the engine does not tell."""
    if not found.detailed:
        return None
    own = [layer for layer in found.layers if layer.computes and node in layer.nodes]
    if not own:
        return "is named by no layer of the engine"
    if any(layer.precision in ("INT8", None) for layer in own):
        return None
    return f"reads {own[0].precision} in {own[0].name} ({own[0].kind})"


def _is_silent(node: str, found: EngineLayers) -> bool:
    """Whether the engine has a node, and tells of no layer of it in which type it computes."""
    own = [layer for layer in found.layers if layer.computes and node in layer.nodes]
    return bool(own) and all(layer.precision is None for layer in own)


def _notes(found: EngineLayers, quantized: Mapping[str, str]) -> list[str]:
    if found.detailed:
        silent = [node for node in quantized if _is_silent(node, found)]
        return [f"Of which type these layers are the engine does not tell: {', '.join(silent)}."] if silent else []
    what = "only the names of its layers" if found.layers else "nothing of its layers"
    unknown = "which of them run in INT8" if quantized else "in which types they run"
    return [f"The engine tells {what}: build it with detailed profiling verbosity to see {unknown}."]
