"""Read the plan of an engine from TensorRT-RTX's log: its kernels, and what each reads and writes.

The builder logs a table of its kernels if it is to keep detailed information: what the inspector of an engine would
say, without the GPU that the inspector needs. The format is not documented.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from clusterq_deploy.errors import EngineError
from clusterq_deploy.results.engines import EnginePlan, PlannedKernel
from clusterq_deploy.runtimes.tensorrt.inspect import IDLE, ONNX_NODE, type_in

_END = "\nI/O Tensors:"
_KERNEL = re.compile(
    r"Name: .*, LayerType: (?P<kind>\w+), Inputs: \[(?P<reads>.*)\], Constants: \[(?P<stored>.*)\], "
    r"Outputs: \[(?P<writes>.*)\], TacticName: .*, Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\],.*? Datatype: (?P<type>\w+)")
_BITS = {"FP32": 32, "FP16": 16, "BF16": 16, "FP8": 8, "INT8": 8, "UINT8": 8, "BOOL": 8, "INT4": 4, "FP4": 4}
_BITS |= {"INT32": 32, "INT64": 64}
_NO_KERNELS = IDLE | {"shape_call"}
_CONVOLUTION = "correlation"  # the compiler's name: deep learning's convolution does not flip its weight
_PRODUCTS = {_CONVOLUTION, "gemm"}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"}

Channels = Mapping[str, tuple[int, int]]
"""Channels that the convolutions of a graph read and write, by the node's name."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An activation: its channels (0 if it has no such axis), its type, and its bytes per image."""

    name: str
    channels: int
    type: str
    size_bytes: int


def plan_of(table: str, channels: Channels, *, engine: str, batch: int = 1) -> EnginePlan:
    """Return the plan in the table of the builder's log.

    Args:
        table: the message of the log.
        channels: of the graph's convolutions; those that are missing count as not padded.
        engine: the engine's path, for the record.
        batch: the batch of an engine that accepts only one.

    Raises:
        EngineError: the log has no table, or one of another form.
    """
    rows = [line for line in table.partition(_END)[0].splitlines() if line.startswith("Name: ")]
    matches = [match for row in rows if (match := _KERNEL.fullmatch(row))]
    if not matches or len(matches) < len(rows):
        raise EngineError("the plan is unknown: the compiler's table of kernels has another form than that of 1.7")
    layers, integers, requantizations = [], set[str](), 0  # `integers`: what products of INT8 wrote in another type
    for match in matches:
        kind, reads, writes = match["kind"], _tensors(match["reads"], batch), _tensors(match["writes"], batch)
        if kind in _NO_KERNELS:
            continue
        nodes, stored = ONNX_NODE.findall(match["metadata"]), _tensors(match["stored"], batch=1)
        is_product = kind in _PRODUCTS
        if is_product and reads and reads[0].type == "INT8":
            integers |= {tensor.name for tensor in writes if tensor.type != "INT8"}
        elif not is_product and any(tensor.type == "INT8" for tensor in writes):
            requantizations += any(tensor.name in integers for tensor in reads)
        layers.append(
            PlannedKernel(
                kind=kind,
                nodes=nodes,
                reads=[tensor.type for tensor in reads],
                writes=[tensor.type for tensor in writes],
                bytes_in=sum(tensor.size_bytes for tensor in reads),
                bytes_out=sum(tensor.size_bytes for tensor in writes),
                bytes_stored=sum(tensor.size_bytes for tensor in stored),
                padded_channels=_padding(nodes, reads, writes, channels) if kind == _CONVOLUTION else 0,
            )
        )
    convolutions = [layer for layer in layers if layer.kind == _CONVOLUTION]
    return EnginePlan(
        engine=engine,
        kernels=len(layers),
        convolutions=len(convolutions),
        convolutions_int8=sum("INT8" in layer.reads[:1] for layer in convolutions),
        convolutions_write=dict(Counter(layer.writes[0] for layer in convolutions if layer.writes).most_common()),
        requantizations=requantizations,
        padded_channels=sum(layer.padded_channels for layer in layers),
        bytes_in=sum(layer.bytes_in for layer in layers),
        bytes_out=sum(layer.bytes_out for layer in layers),
        bytes_stored=sum(layer.bytes_stored for layer in layers),
        layers=layers,
    )


def _tensors(text: str, batch: int) -> list[_Tensor]:
    """Return the tensors of a list in the table.

    Raises:
        EngineError: one has another form, or an unknown type.
    """
    tensors = []
    for match in _TENSOR.finditer(text):
        kind, shape = type_in(match["type"]), [int(length) for length in match["shape"].split(",") if length]
        if kind not in _BITS or any(length < 0 for length in shape[1:]):
            raise EngineError(f"the plan is unknown: a tensor of type {match['type']} and shape {shape}")
        size_bytes = abs(math.prod(shape)) * _BITS[kind] // 8 // batch  # a dynamic batch is -1
        tensors.append(_Tensor(match["name"], shape[1] if len(shape) > 2 else 0, kind, size_bytes))
    if len(tensors) < text.count("{ Name: "):
        raise EngineError("the plan is unknown: the compiler's table of kernels has tensors of another form")
    return tensors


def _padding(nodes: Sequence[str], reads: Sequence[_Tensor], writes: Sequence[_Tensor], channels: Channels) -> int:
    """Return the channels of a convolution's input and output in excess of those in the graph, 0 if unknown."""
    known = next((channels[node] for node in nodes if node in channels), None)
    if known is None:
        return 0
    return sum(max(0, ends[0].channels - count) for ends, count in zip((reads, writes), known, strict=True) if ends)


def convolution_channels(graph: onnx.ModelProto) -> Channels:
    """Return the channels of a graph's convolutions, by the shapes of their weights, quantized ones too."""
    shapes = {tensor.name: tensor.dims for tensor in graph.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type in _QUANTIZERS and node.input}
    channels = {}
    for node in graph.graph.node:
        if node.op_type not in {"Conv", "ConvTranspose"} or len(node.input) < 2:
            continue
        weight = node.input[1]
        while weight not in shapes and weight in sources:
            weight = sources[weight]
        if len(shape := shapes.get(weight, ())) > 2:
            group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            first, second = shape[0], shape[1] * group
            channels[node.name] = (first, second) if node.op_type == "ConvTranspose" else (second, first)
    return channels
