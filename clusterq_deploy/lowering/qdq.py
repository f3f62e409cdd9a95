"""Where the tensors of a quantized ONNX graph come from, whoever exported it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir import convenience

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Dequantized:
    """Where a tensor comes from that a DequantizeLinear makes.

    Attributes:
        node: that node.
        source: what the QuantizeLinear in front of it reads, or the stored integers.
        constant: whether it is a weight: stored, as integers or as floats in front of a QuantizeLinear.
        kind: type of the integers.
        scale: the scale's values; None where they are no constant.
        axis: dimension that the scales go along.
    """

    node: ir.Node
    source: ir.Value
    constant: bool
    kind: ir.DataType | None
    scale: npt.NDArray[np.float64] | None
    axis: int


def quantized_layers(model: onnx.ModelProto) -> dict[str, str]:
    """The convolutions and matrix products that multiply two quantized tensors, in the graph's order.

    Gives the name of each node, and that of its weight, which tells people more: `layer1.0.conv1.weight`.
    """
    found = {}
    for node in ir.from_proto(model).graph:
        if node.op_type in _LAYERS and not node.domain:
            data, weight = (dequantized(value) for value in node.inputs[:2])
            if data is not None and weight is not None:
                found[name_of(node)] = str(weight.source.name).removesuffix(".integers")
    return found


def name_of(node: ir.Node) -> str:
    """A node's name, or that of its first output."""
    return node.name or str(node.outputs[0].name)


def type_name(kind: ir.DataType | None) -> str:
    """An element type in words."""
    return kind.name if kind is not None else "of an unknown type"


def producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that a tensor comes from, where it has that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a tensor is stored in the graph, as an initializer or by a Constant."""
    return value is not None and convenience.get_const_tensor(value) is not None


def constant(node: ir.Node, index: int) -> npt.NDArray[np.float64] | None:
    """The values of a node\'s input, float64 of its shape; None where they are no constant."""
    value = node.inputs[index]
    tensor = convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy().astype(np.float64)


def integer_type(node: ir.Node) -> ir.DataType | None:
    """The type of a quantizer's integers."""
    if node.op_type == "DequantizeLinear":
        return node.inputs[0].dtype if node.inputs[0] is not None else None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2].dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def dequantized(value: ir.Value | None) -> Dequantized | None:
    """What is behind a tensor that comes from a DequantizeLinear; None for any other."""
    node = producer(value, "DequantizeLinear")
    if node is None or node.inputs[0] is None:
        return None
    quantizer = producer(node.inputs[0], "QuantizeLinear")
    source = quantizer.inputs[0] if quantizer is not None else node.inputs[0]
    if source is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    return Dequantized(node, source, is_constant(source), integer_type(node), constant(node, 1), axis)


def stored_integers(node: ir.Node) -> npt.NDArray[np.float64] | None:
    """The integers that a DequantizeLinear reads, stored so or as floats in front of a QuantizeLinear.

    None where they are computed while the graph runs.
    """
    if (integers := constant(node, 0)) is not None:
        return integers
    quantizer = producer(node.inputs[0], "QuantizeLinear")
    numbers, scale = (constant(quantizer, place) for place in (0, 1)) if quantizer is not None else (None, None)
    if quantizer is None or numbers is None or scale is None or scale.ndim > 1:
        return None
    shape = [1] * numbers.ndim
    if scale.size > 1:
        shape[quantizer.attributes.get_int("axis", 1)] = -1
    zero = constant(quantizer, 2) if len(quantizer.inputs) > 2 else None
    offset = np.zeros(1) if zero is None else zero
    low, high = (-128, 127) if integer_type(quantizer) is ir.DataType.INT8 else (0, 255)
    if scale.size == 1:
        return np.clip(np.rint(numbers / scale) + offset, low, high)
    return np.clip(
        np.rint(numbers / scale.reshape(shape)) + np.broadcast_to(offset, scale.shape).reshape(shape), low, high
    )


def quantized_convolution(value: ir.Value | None) -> ir.Node | None:
    """The quantized convolution whose output a tensor is, where nothing else reads it."""
    node = producer(value, "Conv")
    if node is None or value is None or len(list(value.uses())) > 1 or dequantized(node.inputs[1]) is None:
        return None
    return node


def scales_behind(node: ir.Node) -> list[float]:
    """The scales of the quantizers that read a node's output."""
    readers = [use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]
    scales = [constant(reader, 1) for reader in readers]
    return [float(s.item()) for s in scales if s is not None and s.size == 1]
