"""FP16 for what is not quantized, written into the graph: TensorRT uses the types that a graph has."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir import convenience
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from clusterq_deploy.errors import ExportError
from clusterq_deploy.lowering.qdq import constant, dequantized, name_of, operand, store

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).tiny)  # smaller numbers lose digits
_ROUNDED = 2.0**-8
"""Most that FP16 may move a scale, relatively: less than a step in the largest integer of an 8-bit grid."""
_FLOAT32_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}
"""Inputs that are float32 whatever the operator computes in."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float graph, or one lowered for TensorRT, with float16 in place of float32 except at its ends.

    Scales are rounded to eleven significant bits, and those of dead channels raised to 2^-14: integers may differ from
    the float32 graph's if a value is near a rounding boundary. `model` is not changed.

    Raises:
        ExportError: FP16 cannot hold a number: it is larger than 65,504, or a scale that is too small.
    """
    converted = ir.from_proto(model)
    graph = converted.graph
    for node in list(graph):
        _convert_attributes(node)
    float32_inputs, dead_channels = _float32_inputs(graph), _dead_channels(graph)
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.const_value.dtype is not ir.DataType.FLOAT or value in float32_inputs:
            continue
        numbers = value.const_value.numpy()
        rounded = _round(numbers, name)
        if name in dead_channels:
            rounded = _require_scale(rounded, numbers, name, dead=dead_channels[name])
        value.const_value = ir.tensor(rounded, name=name)
        value.dtype = ir.DataType.FLOAT16
    for value in graph.inputs:
        if value.dtype is ir.DataType.FLOAT:
            _cast_input(graph, value)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype is ir.DataType.FLOAT:
            _cast_output(graph, index, value)
    proto = ir.to_proto(converted)
    proto.graph.ClearField("value_info")  # the types in between are inferred again
    return onnx.shape_inference.infer_shapes(proto)


def to_tensorrt_rtx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph lowered for TensorRT, spelled so that TensorRT-RTX's INT8 convolutions write FP16.

    They write FP32, for another kernel to read, wherever a weight has a step per output channel. Here it has one step;
    a factor per channel and the bias follow the convolution, in FP16, where they are one kernel with the activation
    and the next quantizer. It is the same function up to FP16's rounding. `model` is not changed.

    Raises:
        ExportError: as for `to_fp16`.
    """
    spelled, kind = ir.from_proto(model), np.float16 if computes_in_fp16(model) else np.float32
    for node in list(spelled.graph):
        if node.op_type == "Conv":
            factor_steps(spelled.graph, node, kind)
    RemoveUnusedNodesPass()(spelled)
    proto = ir.to_proto(spelled)
    return proto if kind == np.float16 else to_fp16(proto)


def factor_steps(graph: ir.Graph, layer: ir.Node, kind: type[np.float16 | np.float32]) -> None:
    """Give a convolution's weight one step, and put factors per output channel and the bias behind it."""
    weight, read = dequantized(operand(layer, 1)), dequantized(operand(layer, 0))
    if weight is None or weight.scale is None or weight.scale.ndim != 1 or weight.axis != 0:
        return
    if read is None or read.scale is None or read.scale.size != 1:
        return
    integers = convenience.get_const_tensor(weight.source)
    bias = None if operand(layer, 2) is None else constant(layer, 2)
    if integers is None or integers.dtype is not ir.DataType.INT8 or (operand(layer, 2) is None) != (bias is None):
        return
    rows = np.abs(integers.numpy().astype(np.float64)).reshape(len(weight.scale), -1).sum(1)
    most = 128 * float(read.scale.item()) * rows.max(initial=0)  # that it can write at a step of 1
    step = min(float(weight.scale.max()), _LARGEST / most) if most else float(weight.scale.max())
    name, shape = str(layer.outputs[0].name), (1, -1, *[1] * (len(integers.shape) - 2))
    stored = [
        weight.source,
        store(graph, f"{name}.step", np.array(step, kind)),
        store(graph, f"{name}.step_zero", np.array(0, np.int8)),
    ]
    whole = ir.node("DequantizeLinear", stored, name=f"{name}.weight")
    graph.insert_before(layer, whole)
    layer.replace_input_with(1, whole.outputs[0])
    output, behind = layer.outputs[0], [("Mul", "factors", weight.scale / step)]
    if bias is not None:
        layer.resize_inputs(2)
        behind.append(("Add", "bias", bias))
    last, readers = layer, [*output.uses()]
    for operator, what, values in behind:
        factors = store(graph, f"{name}.{what}", values.astype(kind).reshape(shape))
        node = ir.node(operator, [last.outputs[0], factors], name=f"{name}.{what}.applied")
        graph.insert_after(last, node)
        last = node
    for use in readers:
        use.node.replace_input_with(use.idx, last.outputs[0])
    # its readers, and the graph, know the result by the name that the convolution had
    last.outputs[0].name, output.name = name, f"{name}.unscaled"
    if output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = last.outputs[0]


def fp16_baseline(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the same network entirely in FP16, as a baseline for an INT8 engine's time, not for its accuracy.

    Quantizers are removed, and stored integers become the numbers that they stand for. `model` is not changed. Return
    None if it computes in FP16 already and has no quantizers.

    Raises:
        ExportError: operators other than DequantizeLinear read integers, or FP16 cannot hold a number.
    """
    baseline = ir.from_proto(model)
    graph = baseline.graph
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(baseline)
    quantizers = [node for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    in_fp16 = _stores_fp16(graph)
    if in_fp16 and not quantizers:
        return None
    for node in quantizers:
        if node.op_type == "DequantizeLinear":
            _remove_dequantizer(graph, node)
    RemoveUnusedNodesPass()(baseline)
    for node in graph:
        if node.op_type == "QuantizeLinear":
            raise ExportError(f"the integers of {name_of(node)} go on into other operators than DequantizeLinear")
    if not len(graph):
        raise ExportError("nothing but quantizers is in the graph")
    proto = ir.to_proto(baseline)
    proto = proto if in_fp16 else to_fp16(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportError(f"its types do not fit together in FP16: {reason}") from error
    return proto


def computes_in_fp16(model: onnx.ModelProto) -> bool:
    """Return whether a graph stores numbers in FP16, and in float32 only those that operators require so."""
    return _stores_fp16(ir.from_proto(model).graph)


def _stores_fp16(graph: ir.Graph) -> bool:
    exempt = _float32_inputs(graph)
    kinds = {value.dtype for value in graph.initializers.values() if value not in exempt}
    return ir.DataType.FLOAT16 in kinds and ir.DataType.FLOAT not in kinds


def _float32_inputs(graph: ir.Graph) -> set[ir.Value | None]:
    return {operand(node, index) for node in graph for index in _FLOAT32_INPUTS.get(node.op_type, ())}


def _remove_dequantizer(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a DequantizeLinear with the tensor that was quantized, or the numbers that its integers stand for."""
    output, origin = node.outputs[0], dequantized(node.outputs[0])
    if origin is None:
        raise ExportError(f"{name_of(node)} has no input")
    replacement = origin.source
    if replacement is node.inputs[0]:
        if not origin.constant:
            raise ExportError(f"{name_of(node)} reads integers that no QuantizeLinear makes")
        replacement = store(graph, f"{output.name}.float", _evaluate(graph, node))
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _evaluate(graph: ir.Graph, node: ir.Node) -> npt.NDArray[np.float32 | np.float16]:
    """Return the output of a node whose inputs are stored."""
    initializers = []
    for value in node.inputs:
        if value is None:
            continue
        tensor = convenience.get_const_tensor(value)
        if tensor is None:
            raise ExportError(f"{name_of(node)} reads {value.name}, which is not stored in the graph")
        initializers.append(ir.to_proto(tensor))
        initializers[-1].name = str(value.name)
    output = onnx.helper.make_empty_tensor_value_info(str(node.outputs[0].name))
    stored = onnx.helper.make_graph([ir.to_proto(node)], "stored", [], [output], initializer=initializers)
    opset = onnx.helper.make_opsetid("", graph.opset_imports.get("", 1))
    (numbers,) = list(ReferenceEvaluator(onnx.helper.make_model(stored, opset_imports=[opset])).run(None, {}))
    return np.asarray(numbers)


def _dead_channels(graph: ir.Graph) -> dict[str, npt.NDArray[np.bool_] | None]:
    """Return by the name of each scale which of its channels have no integer but 0; None unless it is a weight's."""
    channels: dict[str, npt.NDArray[np.bool_] | None] = {}
    for node in graph:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or node.inputs[1] is None:
            continue
        integers, scale = constant(node, 0), constant(node, 1)
        dead: npt.NDArray[np.bool_] | None = None
        if integers is not None and scale is not None and scale.ndim == 1:
            axis = node.attributes.get_int("axis", 1)
            dead = np.logical_not(np.moveaxis(integers, axis, 0).reshape(len(scale), -1).any(axis=1))
        channels[str(node.inputs[1].name)] = dead
    return channels


def _round(numbers: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    finite = np.abs(numbers[np.isfinite(numbers)])
    if finite.max(initial=0) > _LARGEST:
        raise ExportError(f"{name} holds {finite.max():.3g}, more than FP16 can")
    return numbers.astype(np.float16)


def _require_scale(
    rounded: npt.NDArray[np.float16], scale: npt.NDArray[np.float32], name: str, *, dead: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.float16]:
    """Return a rounded scale, with any value for dead channels; raise ExportError if FP16 is too coarse for it."""
    dead = np.zeros_like(scale, dtype=np.bool_) if dead is None else dead
    rounded = np.where(dead, np.maximum(rounded, np.float16(_SMALLEST)), rounded).astype(np.float16)
    moved = (np.abs(rounded.astype(np.float64) - scale) > _ROUNDED * scale) & ~dead
    if moved.any():
        raise ExportError(f"the scale {name} is {scale[moved].flat[0]:.2g}, too small for FP16")
    return rounded


def _convert_attributes(node: ir.Node) -> None:
    """Cast to float16 what a node casts to float32, and its constants in attributes."""
    for name, attribute in list(node.attributes.items()):
        if name == "to" and attribute.value == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
        elif attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is ir.DataType.FLOAT:
            rounded = _round(attribute.as_tensor().numpy(), name_of(node))
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(rounded))


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
