"""Inspect an engine: read the layers from TensorRT's JSON, and summarize types, times and missed INT8."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clusterq_deploy.errors import EngineError
from clusterq_deploy.results.engines import EngineInspection, EngineLayer, MissedLayer

_SLOWEST = 10
_TYPE = re.compile(r"\b(u?int\d+|fp\d+|bf16|bfloat16|half|float|bool)\b", re.IGNORECASE)
_SHORT = {"HALF": "FP16", "FLOAT": "FP32", "BFLOAT16": "BF16"}
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^|\]\x1e\x1f]+)")
_FUSION = re.compile(r" \+ | \|\| |[\x1e\x1f]")
_COPY = "Reformatting CopyNode"
IDLE = {"constant", "noop", "signal", "wait"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine, often made of several nodes of the graph.

    Attributes:
        name: the name that the profiler uses too.
        kind: TensorRT's type of layer, such as `CaskConvolution`, `Reformat` or `kgen`; None if unknown.
        precision: the type of its input, such as `INT8`, `FP16` or `FP32`; None if unknown.
        nodes: names of the ONNX nodes that are fused in it.
        origin: the reason for a reformat: `QDQ` for a quantizer; None if unknown.
    """

    name: str
    kind: str | None = None
    precision: str | None = None
    nodes: frozenset[str] = frozenset()
    origin: str | None = None

    @property
    def is_quantizer(self) -> bool:
        """Whether it only quantizes or dequantizes."""
        return self._copies and self.origin == "QDQ"

    @property
    def is_reformat(self) -> bool:
        """Whether it changes a layout or a type, and is not a quantizer of the graph."""
        return self._copies and self.origin != "QDQ"

    @property
    def computes(self) -> bool:
        """Whether it does more than store, copy or wait for something."""
        return not self._copies and (self.kind or "").lower() not in IDLE

    @property
    def _copies(self) -> bool:
        return (self.kind or "").lower() == "reformat" or self.name.startswith(_COPY)


def parse_layers(text: str) -> tuple[Layer, ...]:
    """Return the layers in the JSON of `EngineInspector.get_engine_information`, in order.

    An engine that is built with detailed profiling verbosity has an object per layer, any other a name, or nothing.
    Types are in a text (`Row major Int8 format`, TensorRT 8 and later), a word (`Half`, layers that TensorRT 10 and
    later compile), or a separate field (TensorRT 11). `Metadata` names the ONNX nodes since TensorRT 8.6; before that
    only the layer's own name does.

    Raises:
        EngineError: it is not JSON, or lists no layers.
    """
    if not text.strip():
        return ()
    try:
        content = json.loads(text, strict=False)  # metadata is separated by control characters
    except ValueError as error:
        raise EngineError(f"the engine inspector returned invalid JSON: {error}") from error
    entries = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise EngineError(
            f'the engine inspector returned {text.strip()[:60]!r}; expected an object with a list "Layers"'
        )
    return tuple(_layer(entry) for entry in entries)


def type_in(description: str) -> str | None:
    """Return `INT8` for `Thirty-two wide channel vectorized row major Int8 format`; None if no type is named."""
    match = _TYPE.search(description)
    return _SHORT.get(match[1].upper(), match[1].upper()) if match else None


def _layer(entry: Any) -> Layer:
    """Return the layer of the inspector's entry: an object, or a name.

    Its nodes are in its metadata, which the parser shortens, and in its name, unless TensorRT compiles it: both count.
    """
    if not isinstance(entry, dict):
        entry = {"Name": entry}
    name = str(entry.get("Name", ""))
    nodes = [*_FUSION.split(name), *ONNX_NODE.findall(str(entry.get("Metadata", "")))]
    return Layer(
        name=name,
        kind=entry.get("LayerType"),
        precision=_precision(entry),
        nodes=frozenset(node.strip() for node in nodes) - {""},
        origin=entry.get("Origin"),
    )


def _precision(entry: dict[str, Any]) -> str | None:
    """Return the type of a layer's first input, else of its weights or output: dynamic shapes have no type."""
    tensors = [*entry.get("Inputs", [])[:1], entry.get("Weights"), *entry.get("Outputs", [])[:1]]
    keys = "DataType", "Datatype", "Format/Datatype", "Type"
    descriptions = (str(tensor.get(key, "")) for tensor in tensors if isinstance(tensor, dict) for key in keys)
    return next(filter(None, map(type_in, descriptions)), None)


def summarize_layers(
    layers: Sequence[Layer], times_ms: Mapping[str, float], quantized: Mapping[str, str], *, engine: str, batch: int
) -> EngineInspection:
    """Count an engine's layers by type, find the slowest, and name what is quantized and does not run in INT8.

    Args:
        times_ms: mean milliseconds of each layer in a call, by name.
        quantized: the graph's quantized nodes, with the names of their weights; each should run in INT8.
        engine, batch: the engine's path and the profiled images per call, for the record.
    """
    detailed = any(layer.kind is not None for layer in layers)
    by_name = {layer.name: layer for layer in layers}
    computing = [layer for layer in layers if layer.computes]
    total_ms = sum(times_ms.values())
    slowest = []
    for name, ms in sorted(times_ms.items(), key=lambda item: -item[1])[:_SLOWEST]:
        layer = by_name.get(name, Layer(name))
        share = ms / total_ms if total_ms else 0.0
        slowest.append(EngineLayer(name=name, kind=layer.kind, precision=layer.precision, mean_ms=ms, share=share))
    missed, unknown = [], []
    for node, weight in quantized.items() if detailed else ():
        executing = [layer for layer in computing if node in layer.nodes]
        precisions = {layer.precision for layer in executing}
        if not executing:
            missed.append(MissedLayer(layer=node, weight=weight, reason="is named by no layer of the engine"))
        elif precisions == {None}:
            unknown.append(node)
        elif not precisions & {"INT8", None}:
            reason = f"reads {executing[0].precision} in {executing[0].name} ({executing[0].kind})"
            missed.append(MissedLayer(layer=node, weight=weight, reason=reason))
    notes = [f"The engine does not report the type of these layers: {', '.join(unknown)}."] if unknown else []
    if not detailed:
        content = "only the names of its layers" if layers else "no information about its layers"
        missing = "which of them run in INT8" if quantized else "in which types they run"
        notes = [f"The engine has {content}: build it with detailed profiling verbosity to see {missing}."]
    return EngineInspection(
        engine=engine,
        batch=batch,
        detailed=detailed,
        layers=len(layers),
        reformats=sum(layer.is_reformat for layer in layers),
        quantizers=sum(layer.is_quantizer for layer in layers),
        precisions=dict(Counter(layer.precision or "unknown" for layer in computing if detailed).most_common()),
        total_ms=total_ms,
        reformat_ms=sum(ms for name, ms in times_ms.items() if name in by_name and by_name[name].is_reformat),
        slowest=slowest,
        quantized_layers=len(quantized),
        missed=missed,
        notes=notes,
    )
