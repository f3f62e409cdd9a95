"""Quantizers in an ONNX graph of any exporter: their constants, their types, and what is behind a DequantizeLinear."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir import convenience

from clusterq_deploy.errors import ExportError

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

_NOT_REAL = {ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}
_INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ir.serde.SerdeError)


@dataclass(frozen=True)
class Dequantized:
    """Where a tensor that a DequantizeLinear makes comes from.

    Attributes:
        source: what the QuantizeLinear in front of it reads, or the stored integers.
        constant: whether it is a weight: stored, as integers or as floats in front of a QuantizeLinear.
        kind: type of the integers.
        scale: the scale's values; None if they are no constant.
        axis: dimension that the scales go along.
    """

    source: ir.Value
    constant: bool
    kind: ir.DataType | None
    scale: npt.NDArray[np.float64] | None
    axis: int


def parse(model: onnx.ModelProto, *, checked: bool = True) -> ir.Model:
    """Return a graph of any exporter, its local functions inlined, its types and shapes inferred.

    Args:
        model: the graph. As in runtimes, outputs need no shape, and the IR version may be later than onnx knows.
        checked: whether `onnx.checker` has to find it valid.

    Raises:
        ExportError: it is no valid ONNX.
    """
    try:
        if model.ir_version > onnx.IR_VERSION:
            known = onnx.ModelProto()
            known.CopyFrom(model)
            known.ir_version = onnx.IR_VERSION
            model = known
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        model = onnx.shape_inference.infer_shapes(model)
        if checked:
            onnx.checker.check_model(model)
        return ir.from_proto(model)
    except (*_INVALID, ValueError, TypeError, RuntimeError) as error:
        raise ExportError(f"the graph is no valid ONNX: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def all_nodes(model: ir.Model) -> list[ir.Node]:
    """Return all nodes in the graph's order, with those of subgraphs and of the file's functions."""
    nodes = [*ir.traversal.RecursiveGraphIterator(model.graph)]
    for function in model.functions.values():
        nodes += ir.traversal.RecursiveGraphIterator(function)
    return nodes


def quantized_layers(model: onnx.ModelProto) -> dict[str, str]:
    """Return the convolutions and matrix products that multiply two quantized tensors, in the graph's order.

    Keys are names of nodes, values those of their weights, which are more readable: `layer1.0.conv1.weight`.
    """
    weights = {}
    for node in ir.from_proto(model).graph:
        if node.op_type in LAYERS and not node.domain:
            data, weight = (dequantized(value) for value in node.inputs[:2])
            if data is not None and weight is not None:
                weights[name_of(node)] = str(weight.source.name).removesuffix(".integers")
    return weights


def name_of(node: ir.Node) -> str:
    """Return a node's name, or that of its first output."""
    return node.name or (str(node.outputs[0].name) if node.outputs else "")


def producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node that a tensor comes from, if it has that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return a node's input, None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a tensor is stored in the graph, as an initializer or by a Constant."""
    return _stored(value) is not None


def constant(node: ir.Node, index: int) -> npt.NDArray[np.float64] | None:
    """Return the values of a node's input, float64 of its shape; None if it is left out or no constant of real numbers.

    Raises:
        ExportError: what is stored does not fit the tensor's shape and type.
    """
    tensor = _stored(operand(node, index))
    if tensor is None or tensor.dtype in _NOT_REAL:
        return None
    try:
        with np.errstate(invalid="ignore"):  # of NaN in types of eight bits
            return tensor.numpy().astype(np.float64)
    except (ValueError, TypeError, AssertionError) as error:
        raise ExportError(f"the graph is no valid ONNX: tensor {tensor.name}: {_first_line(error)}") from error


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant that a tensor is, also by the name that an Identity gives it."""
    while (identity := producer(value, "Identity")) is not None:
        value = operand(identity, 0)
    return convenience.get_const_tensor(value) if value is not None else None


def store(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Store an array in a graph as an initializer, and return its tensor."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def zero_point(quantizer: ir.Node) -> npt.NDArray[np.float64] | None:
    """Return the zero-point of a QuantizeLinear or DequantizeLinear, 0 by default; None if it is no constant."""
    return np.zeros(1) if operand(quantizer, 2) is None else constant(quantizer, 2)


def integer_type(quantizer: ir.Node) -> ir.DataType | None:
    """Return the type of a quantizer's integers, None if neither they nor the zero-point have one."""
    integers, zero = operand(quantizer, 0), operand(quantizer, 2)
    if quantizer.op_type == "DequantizeLinear":
        return next((value.dtype for value in (integers, zero) if value is not None and value.dtype is not None), None)
    if zero is not None:
        return zero.dtype
    number = quantizer.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8
    return next((kind for kind in ir.DataType if kind == number), None)


def dequantized(value: ir.Value | None) -> Dequantized | None:
    """Return what is behind a tensor that comes from a DequantizeLinear; None for any other."""
    node = producer(value, "DequantizeLinear")
    quantizer = producer(operand(node, 0), "QuantizeLinear") if node is not None else None
    source = operand(quantizer or node, 0) if node is not None else None
    if node is None or source is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    return Dequantized(source, is_constant(source), integer_type(node), constant(node, 1), axis)


def stored_integers(node: ir.Node) -> npt.NDArray[np.float64] | None:
    """Return the integers that a DequantizeLinear reads, stored so or as floats in front of a QuantizeLinear.

    None if they are computed while the graph runs, or if numbers, scales and zero-points make no integers.
    """
    quantizer = producer(operand(node, 0), "QuantizeLinear")
    if quantizer is None:
        return constant(node, 0)
    numbers, scale, zero = constant(quantizer, 0), constant(quantizer, 1), zero_point(quantizer)
    if numbers is None or scale is None or zero is None or scale.ndim > 1 or zero.size not in {1, scale.size}:
        return None
    if not ((scale > 0) & np.isfinite(scale)).all():
        return None
    shape = [1] * numbers.ndim
    if scale.size != 1:
        axis = quantizer.attributes.get_int("axis", 1)
        if not -numbers.ndim <= axis < numbers.ndim or scale.size != numbers.shape[axis]:
            return None
        shape[axis] = -1
    scale, zero = scale.reshape(shape), np.broadcast_to(zero.ravel(), scale.size).reshape(shape)
    low, high = (-128, 127) if integer_type(quantizer) is ir.DataType.INT8 else (0, 255)
    integers = np.clip(np.rint(numbers / scale) + zero, low, high)
    return integers if np.isfinite(integers).all() else None
