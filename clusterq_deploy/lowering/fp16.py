"""FP16 for what is not quantized, written into the graph: TensorRT takes the types that stand there."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir import convenience
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from clusterq_deploy.errors import ExportError
from clusterq_deploy.lowering.qdq import constant, dequantized, name_of

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).tiny)  # below it digits are lost
_ROUNDED = 2.0**-8
"""Most that FP16 may move a scale, relatively: less than a step in the largest integer of an 8-bit grid."""
_FLOAT32_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}
"""Inputs that the operators want in float32, whatever they compute in."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with float16 in the place of float32, but for its inputs and outputs; quantizers' scales included.

    Scales are rounded to eleven significant bits, and those of dead channels raised to 2^-14: integers may differ from
    the float32 graph's where a value lies near a rounding boundary.

    Args:
        model: a float graph, or one lowered for TensorRT; it is not changed.

    Raises:
        ExportError: a number has no half: larger than 65,504, or a scale that is too small for it.
    """
    made = ir.from_proto(model)
    graph = made.graph
    for node in list(graph):
        _halve_attributes(node)
    kept = {
        id(node.inputs[index])
        for node in graph
        for index in _FLOAT32_INPUTS.get(node.op_type, ())
        if index < len(node.inputs)
    }
    scales = _scales(graph)
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.const_value.dtype is not ir.DataType.FLOAT or id(value) in kept:
            continue
        half = _half(value.const_value.numpy(), name)
        if name in scales:
            half = _as_scale(half, value.const_value.numpy(), name, dead=scales[name])
        value.const_value = ir.tensor(half, name=name)
        value.dtype = ir.DataType.FLOAT16
    for value in graph.inputs:
        if value.dtype is ir.DataType.FLOAT:
            _cast_input(graph, value)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype is ir.DataType.FLOAT:
            _cast_output(graph, index, value)
    proto = ir.to_proto(made)
    proto.graph.ClearField("value_info")  # the types in between are inferred anew
    return onnx.shape_inference.infer_shapes(proto)


def fp16_baseline(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The same network in FP16 throughout, which an INT8 engine is compared with: its time, not its accuracy.

    Quantizers are taken out, and stored integers become the numbers that they stand for.

    Args:
        model: a graph with explicit Q/DQ, or a float one; it is not changed.

    Returns:
        The graph; None for one that computes in FP16 and has no quantizers.

    Raises:
        ExportError: integers go on into other operators than DequantizeLinear, or a number has no half.
    """
    made = ir.from_proto(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(made)
    quantizers = [node for node in made.graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    half = computes_in_half(ir.to_proto(made))
    if half and not quantizers:
        return None
    for node in quantizers:
        if node.op_type == "DequantizeLinear":
            _take_out(made.graph, node)
    for node in quantizers:
        if node.op_type == "QuantizeLinear":
            if node.outputs[0].uses() or node.outputs[0].is_graph_output():
                raise ExportError(f"the integers of {name_of(node)} go on into other operators than DequantizeLinear")
            made.graph.remove(node, safe=True)
    for name, value in list(made.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del made.graph.initializers[name]
    if not len(made.graph):
        raise ExportError("nothing but quantizers is in the graph")
    proto = ir.to_proto(made)
    proto = proto if half else to_fp16(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = next(iter(str(error).split("\n")))
        raise ExportError(f"its types do not fit together in FP16: {reason}") from error
    return proto


def _take_out(graph: ir.Graph, node: ir.Node) -> None:
    """Put what a DequantizeLinear's numbers stand for in its place: what was quantized, or the stored numbers."""
    output, found = node.outputs[0], dequantized(node.outputs[0])
    if found is None:
        raise ExportError(f"{name_of(node)} has no input")
    if found.source is not node.inputs[0]:
        instead = found.source
    elif found.constant:
        numbers = _evaluate(graph, node)
        instead = ir.Value(name=f"{output.name}.float", const_value=ir.tensor(numbers), shape=ir.Shape(numbers.shape))
        instead.dtype = ir.DataType.from_numpy(numbers.dtype)
        graph.register_initializer(instead)
    else:
        raise ExportError(f"{name_of(node)} reads integers that no QuantizeLinear makes")
    output.replace_all_uses_with(instead, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _evaluate(graph: ir.Graph, node: ir.Node) -> npt.NDArray[np.float32 | np.float16]:
    """The output of a node whose inputs are stored."""
    inputs = [value for value in node.inputs if value is not None]
    stored = []
    for value in inputs:
        tensor = convenience.get_const_tensor(value)
        if tensor is None:
            raise ExportError(f"{name_of(node)} reads {value.name}, which is not stored in the graph")
        stored.append(ir.to_proto(tensor))
        stored[-1].name = str(value.name)
    output = onnx.helper.make_empty_tensor_value_info(str(node.outputs[0].name))
    alone = onnx.helper.make_graph([ir.to_proto(node)], "stored", [], [output], initializer=stored)
    opset = onnx.helper.make_opsetid("", graph.opset_imports.get("", 1))
    (numbers,) = list(ReferenceEvaluator(onnx.helper.make_model(alone, opset_imports=[opset])).run(None, {}))
    return np.asarray(numbers)


def computes_in_half(model: onnx.ModelProto) -> bool:
    """Whether a graph stores numbers in FP16, and none but what operators want so in float32."""
    wanted = {
        node.input[index]
        for node in model.graph.node
        for index in _FLOAT32_INPUTS.get(node.op_type, ())
        if index < len(node.input)
    }
    kinds = {own.data_type for own in model.graph.initializer if own.name not in wanted}
    return onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.FLOAT not in kinds


def _scales(graph: ir.Graph) -> dict[str, npt.NDArray[np.bool_] | None]:
    """The scales by name, and of a stored weight's which channels have no integer but 0."""
    found: dict[str, npt.NDArray[np.bool_] | None] = {}
    for node in graph:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or node.inputs[1] is None:
            continue
        integers, scale = constant(node, 0), constant(node, 1)
        dead: npt.NDArray[np.bool_] | None = None
        if integers is not None and scale is not None and scale.ndim == 1:
            axis = node.attributes.get_int("axis", 1)
            dead = np.logical_not(np.moveaxis(integers, axis, 0).reshape(len(scale), -1).any(axis=1))
        found[str(node.inputs[1].name)] = dead
    return found


def _half(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    finite = np.abs(values[np.isfinite(values)])
    if finite.max(initial=0) > _LARGEST:
        raise ExportError(f"{name} holds {finite.max():.3g}, more than FP16 can")
    return values.astype(np.float16)


def _as_scale(
    half: npt.NDArray[np.float16],
    values: npt.NDArray[np.float32],
    name: str,
    *,
    dead: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.float16]:
    """A scale that FP16 holds well enough; that of a dead channel may be any."""
    if dead is not None:
        half = np.where(dead, np.maximum(half, np.float16(_SMALLEST)), half).astype(np.float16)
    moved = np.abs(half.astype(np.float64) - values) > _ROUNDED * values
    if dead is not None:
        moved &= ~dead
    if moved.any():
        raise ExportError(f"the scale {name} is {values[moved].flat[0]:.2g}, too small for FP16")
    return half


def _halve_attributes(node: ir.Node) -> None:
    """Casts to float32 become casts to float16, and so do constants that stand in attributes."""
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.value == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
        elif attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is ir.DataType.FLOAT:
            half = _half(attribute.as_tensor().numpy(), name_of(node))
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    readers = list(value.uses())
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)}, name=f"{value.name}.half")
    cast.outputs[0].name = f"{value.name}.half"
    graph.insert_before(graph[0], cast)
    for use in readers:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _cast_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    name = value.name
    value.name = f"{name}.half"
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.float")
    output = cast.outputs[0]
    output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, value.shape
    graph.append(cast)
    graph.outputs[index] = output
