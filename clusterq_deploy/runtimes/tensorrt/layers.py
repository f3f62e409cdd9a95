"""The layers of an engine, read off the JSON of TensorRT's engine inspector."""

import json
import re
from dataclasses import dataclass
from typing import Any

from clusterq_deploy.errors import EngineError

_TYPES = {
    "int8": "INT8",
    "half": "FP16",
    "fp16": "FP16",
    "float": "FP32",
    "fp32": "FP32",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "fp8": "FP8",
    "fp4": "FP4",
    "int4": "INT4",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^|\]\x1e\x1f]+)")
_FUSION = re.compile(r" \+ | \|\| |[\x1e\x1f]")
_COPY = "Reformatting CopyNode"
_HOLDING = {"constant", "noop", "signal", "wait"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine, often made of several nodes of the graph.

    Attributes:
        name: as the profiler calls it too.
        kind: TensorRT's type of layer, such as `CaskConvolution`, `Reformat` or `kgen`; None with names alone.
        precision: the type of what it reads, such as `INT8`, `FP16` or `FP32`; None where the engine does not tell.
        nodes: names of the ONNX nodes that it is made of.
        origin: why a reformat is there: `QDQ` for a quantizer; None where the engine does not tell.
    """

    name: str
    kind: str | None = None
    precision: str | None = None
    nodes: frozenset[str] = frozenset()
    origin: str | None = None

    @property
    def is_quantizer(self) -> bool:
        """Whether it quantizes or dequantizes alone."""
        return self._copies and self.origin == "QDQ"

    @property
    def is_reformat(self) -> bool:
        """Whether it changes a layout or a type, and is no quantizer of the graph."""
        return self._copies and self.origin != "QDQ"

    @property
    def computes(self) -> bool:
        """Whether it does more than to hold, copy or wait for something."""
        return not self._copies and (self.kind or "").lower() not in _HOLDING

    @property
    def _copies(self) -> bool:
        return (self.kind or "").lower() == "reformat" or self.name.startswith(_COPY)


@dataclass(frozen=True, slots=True)
class EngineLayers:
    """All layers in order; `detailed` says whether the engine tells more than their names."""

    layers: tuple[Layer, ...]
    detailed: bool


def parse_layers(text: str) -> EngineLayers:
    """Read what `EngineInspector.get_engine_information` gives in JSON.

    An engine that is built with detailed profiling verbosity has an object for each layer, any other a name, or nothing
    at all. Types stand in words (`Row major Int8 format`, TensorRT 8 and later), alone (`Half`, layers that TensorRT 10
    and later compile themselves), or in a field of their own (TensorRT 11). `Metadata` names the ONNX nodes from
    TensorRT 8.6 on; before that only the layer's own name does.

    Args:
        text: the JSON.

    Raises:
        EngineError: it is no JSON, or lists no layers.
    """
    if not text.strip():
        return EngineLayers((), detailed=False)
    try:
        content = json.loads(text, strict=False)  # metadata is separated by control characters
    except ValueError as error:
        raise EngineError(f"the engine inspector gave no JSON: {error}") from error
    entries = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise EngineError(f'the engine inspector gave {text.strip()[:60]!r}; expected an object with a list "Layers"')
    layers = tuple(_layer(entry) for entry in entries)
    return EngineLayers(layers, detailed=any(isinstance(entry, dict) for entry in entries))


def type_in(description: str) -> str | None:
    """`INT8` for `Thirty-two wide channel vectorized row major Int8 format`; None where no type is named."""
    found = _TYPE.search(description)
    return _TYPES[found[1].lower()] if found else None


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):
        return Layer(str(entry), nodes=_nodes(str(entry), ""))
    name = str(entry.get("Name", ""))
    return Layer(
        name=name,
        kind=entry.get("LayerType"),
        precision=_precision(entry),
        nodes=_nodes(name, str(entry.get("Metadata", ""))),
        origin=entry.get("Origin"),
    )


def _nodes(name: str, metadata: str) -> frozenset[str]:
    """The ONNX nodes in a layer's metadata and in its name, which joins those that were fused.

    The parser shortens long metadata, and layers that TensorRT compiles itself have names of their own: both count.
    """
    named = (part.strip() for part in _FUSION.split(name))
    return frozenset({*named, *(node.strip() for node in _ONNX_NODE.findall(metadata))} - {""})


def _precision(entry: dict[str, Any]) -> str | None:
    """The type of a layer's first input; else of its weights, which the format of dynamic shapes leaves out."""
    weights = entry.get("Weights")
    descriptions = [_format(tensor) for tensor in entry.get("Inputs", [])[:1]]
    descriptions += [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    descriptions += [_format(tensor) for tensor in entry.get("Outputs", [])[:1]]
    return next((found for text in descriptions if (found := type_in(text)) is not None), None)


def _format(tensor: Any) -> str:
    """What the inspector says of a tensor's type: with its format in TensorRT 10, alone where 11 tells both apart."""
    if not isinstance(tensor, dict):
        return ""
    return str(next((tensor[key] for key in ("DataType", "Datatype", "Format/Datatype") if key in tensor), ""))
