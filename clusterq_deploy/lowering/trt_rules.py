"""TensorRT's rules for explicitly quantized graphs, checked on an ONNX file without TensorRT.

The rules are those of NVIDIA's documentation, "Working with Quantized Types" (explicit quantization: symmetric
quantizers, weights per channel, where to place Q/DQ and why) and of the ONNX parser's support matrix. They hold for
any exporter's files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering import qdq

Severity = Literal["error", "warning"]

_PER_CHANNEL_OPSET = 13
_LEAST_OPSET, _MOST_OPSET, _MOST_IR = 9, 21, 10
"""What runtimes in the field read: TensorRT 10.3 and ONNX Runtime 1.31."""


@dataclass(frozen=True)
class Rule:
    """A rule, what happens if it is broken (an error: no engine; a warning: a slower one), and its reason."""

    name: str
    severity: Severity
    reason: str


@dataclass(frozen=True)
class Break:
    """A rule that a graph breaks.

    Attributes:
        rule: its name, a key of `RULES`.
        severity: `error`: TensorRT refuses the graph; `warning`: it computes more slowly, or in float.
        node: the node's name, or that of its first output; empty if the rule is about the whole file.
        message: what is wrong, and what to do.
    """

    rule: str
    severity: Severity
    node: str
    message: str


_RULES = (
    Rule("opset", "error", "before opset 13 quantizers have no scale per channel, which weights need"),
    Rule("version", "warning", "opsets 9 to 21 and IR up to 10 are read by every TensorRT from 10.3 on"),
    Rule("domain", "warning", "operators that are not ONNX's own need a plugin in TensorRT"),
    Rule("operator", "error", "integer operators are not read: quantizers enclose float ones"),
    Rule("scale", "error", "scales are float constants, positive and finite, one or as many as their axis is long"),
    Rule("zero-point", "error", "quantizers are symmetric: every zero-point is 0"),
    Rule("activation-type", "error", "activations are INT8 or FP8; there is no UINT8"),
    Rule("weight-type", "error", "convolutions have INT8 or FP8 weights; INT4 is for the weights of Gemm and MatMul"),
    Rule("activation-axis", "error", "an activation has one scale, per tensor"),
    Rule("weight-axis", "warning", "a layer runs in INT8 if its weight has one scale, or one for each output channel"),
    Rule("bias", "error", "biases stay in float: INT32 is not a quantized type"),
    Rule("inputs", "warning", "a layer runs in INT8 if all its inputs are quantized"),
    Rule("residual", "warning", "an addition fuses with the convolution in front if the other branch is quantized"),
    Rule(
        "concat",
        "warning",
        "the branches of a concatenation need no requantization if they share a scale with its output",
    ),
    Rule("pool", "warning", "a max-pool runs in INT8 if its input and its output share a scale"),
    Rule("fp16", "warning", "what is not quantized has one type: casts between layers break their fusion"),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _RULES}

_ACTIVATIONS = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN}
_DOMAINS = {"", "com.microsoft"}  # TensorRT's parser goes by an operator's name, whatever its domain
_WEIGHTS = _ACTIVATIONS | {ir.DataType.INT4}
_FLOAT16 = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_FLOATS = _FLOAT16 | {ir.DataType.FLOAT, ir.DataType.DOUBLE}
_INTEGER_OPERATORS = ("QLinear", "QGemm", "QAttention", "QOrdered", "ConvInteger", "MatMulInteger", "DynamicQuantize")
"""What the names of operators on integers start with, in ONNX and in ONNX Runtime's domain."""
_COMPUTING = qdq.LAYERS | {"Add", "Mul", "Relu", "Clip", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat"}

_Findings = Iterator[tuple[str, ir.Node | None, str]]
"""Name of a broken rule, its node, None for the whole file, and a message."""


def check_tensorrt(model: onnx.ModelProto) -> list[Break]:
    """Return every break of TensorRT's rules in a graph of any exporter, in its order.

    If its opset is too old for its quantizers, nothing else is checked.

    Raises:
        ExportError: it is no valid ONNX.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0)
    if 0 < opset < _PER_CHANNEL_OPSET and any(map(_has_axis, model.graph.node)):
        message = f"opset {opset}; expected {_PER_CHANNEL_OPSET} or later: convert the file"
        return [Break("opset", RULES["opset"].severity, "", message)]
    return [
        Break(rule, RULES[rule].severity, qdq.name_of(node) if node is not None else "", message)
        for rule, node, message in _breaks(qdq.parse(model), opset, model.ir_version)
    ]


def require_tensorrt(model: onnx.ModelProto, *, name: str) -> list[Break]:
    """Return the warnings of `check_tensorrt` for a graph, which messages call `name`.

    Raises:
        VerificationError: TensorRT would refuse the graph.
    """
    breaks = check_tensorrt(model)
    errors = [b for b in breaks if b.severity == "error"]
    if errors:
        first, more = errors[0], f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise VerificationError(
            f"{name} breaks TensorRT's rule {first.rule} at {first.node or 'the file'}: {first.message}{more}; the "
            "file is not written"
        )
    return breaks


def _has_axis(node: onnx.NodeProto) -> bool:
    """Return whether a node is a quantizer of the kind that can have a scale per channel."""
    is_quantizer = node.op_type in {"QuantizeLinear", "DequantizeLinear"} and node.domain in {"", "ai.onnx"}
    return is_quantizer and any(attribute.name == "axis" for attribute in node.attribute)


def _breaks(model: ir.Model, opset: int, ir_version: int) -> _Findings:
    nodes = qdq.all_nodes(model)
    if opset > _MOST_OPSET or ir_version > _MOST_IR:
        most = f"opset {_MOST_OPSET}, IR {_MOST_IR}"
        yield "version", None, f"opset {opset}, IR {ir_version}; older parsers expect at most {most}"
    elif 0 < opset < _LEAST_OPSET:
        yield "version", None, f"opset {opset}; TensorRT documents {_LEAST_OPSET} and later: convert the file"
    for domain in dict.fromkeys(node.domain for node in nodes if node.domain):
        yield "domain", None, f"operators of {domain!r}; load the library that has their plugins"
    for node in nodes:
        if node.domain not in _DOMAINS:
            continue
        if node.op_type in _CHECKS:
            yield from _CHECKS[node.op_type](node)
        elif node.op_type.startswith(_INTEGER_OPERATORS):
            message = f"{node.op_type} computes on integers; export QuantizeLinear and DequantizeLinear (QDQ) instead"
            yield "operator", node, message
    yield from _check_float_types(model.graph)


def _check_quantizer(node: ir.Node) -> _Findings:
    quantizer = qdq.producer(qdq.operand(node, 0), "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    if quantizer is not None and quantizer.inputs[1:] == node.inputs[1:]:
        return  # the QuantizeLinear is checked
    scale, zero = qdq.constant(node, 1), qdq.zero_point(node)
    yield from _check_scale(node, scale)
    if zero is None or zero.any():
        value = "computed at run time" if zero is None else f"{zero[zero != 0].flat[0]:g}"
        yield "zero-point", node, f"the zero-point is {value}; quantize symmetrically, around 0"
    if quantizer is not None:
        return
    kind, uses = qdq.integer_type(node), node.outputs[0].uses()
    type_name = _name(kind)
    if qdq.is_constant(node.inputs[0]):
        is_bias = bool(uses) and all(use.node.op_type in qdq.LAYERS and use.idx == 2 for use in uses)
        if kind not in _WEIGHTS and not is_bias:
            yield "weight-type", node, f"the weight is {type_name}; expected INT8"
        return
    if kind not in _ACTIVATIONS:
        hint = " (the default of a QuantizeLinear without zero-point)" if len(node.inputs) < 3 else ""
        yield "activation-type", node, f"the activation is {type_name}{hint}; expected INT8"
    if scale is not None and scale.size > 1:
        yield "activation-axis", node, f"the activation has {scale.size} scales; expected one"


def _check_scale(node: ir.Node, scale: npt.NDArray[np.float64] | None) -> _Findings:
    value, source = qdq.operand(node, 1), qdq.operand(node, 0)
    if scale is None:
        yield "scale", node, "the scale is computed at run time; store it as a constant"
    elif value is not None and value.dtype not in _FLOATS | {None}:
        yield "scale", node, f"the scale is {value.dtype}; store it as float"
    elif scale.size == 0:
        yield "scale", node, "the scale has no value; store one above 0"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        worst = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
        yield "scale", node, f"a scale is {worst:g}; expected finite and above 0, a dead channel's too"
    elif scale.ndim == 1 and scale.size > 1 and source is not None and (shape := source.shape) is not None:
        axis = node.attributes.get_int("axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield "scale", node, f"{scale.size} scales go along axis {axis} of {len(shape)} dimensions"
        elif isinstance(length := shape[axis], int) and length != scale.size:
            yield "scale", node, f"{scale.size} scales go along axis {axis}, which has {length} channels"


def _check_layer(node: ir.Node) -> _Findings:
    data, weight, bias = (qdq.dequantized(qdq.operand(node, index)) for index in range(3))
    transpose = qdq.producer(qdq.operand(node, 1), "Transpose")
    if transpose is not None and qdq.dequantized(qdq.operand(transpose, 0)) is not None:
        return  # TensorRT moves the transposition in front of the quantizers
    if data is None and weight is not None and weight.kind is not ir.DataType.INT4:
        yield "inputs", node, "the weight is quantized and what it multiplies is not"
    if data is not None and weight is None:
        yield "inputs", node, "what it reads is quantized and its weight is not"
    if weight is not None and weight.constant:
        yield from _check_weight(node, weight)
    if bias is not None and bias.kind not in _ACTIVATIONS:
        yield "bias", node, f"the bias is {_name(bias.kind)}; store it as float"


def _check_weight(node: ir.Node, weight: qdq.Dequantized) -> _Findings:
    if weight.kind is ir.DataType.INT4 and node.op_type in {"Conv", "ConvTranspose"}:
        yield "weight-type", node, "a convolution with INT4 weights; store them as INT8"
    shape = weight.source.shape
    if weight.scale is None or weight.scale.ndim != 1 or weight.scale.size == 1 or not shape:
        return  # per tensor, or for each block
    by_row = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    # NVIDIA names axis 0 for transposed convolutions (NVIDIA/TensorRT#2380), other exporters output channels, axis 1
    expected = {"Conv": [0], "ConvTranspose": [0, 1], "Gemm": [0 if by_row else 1], "MatMul": [len(shape) - 1]}
    axis = weight.axis + len(shape) * (weight.axis < 0)
    if 0 <= axis < len(shape) and axis not in expected[node.op_type]:
        wanted = " or ".join(map(str, expected[node.op_type]))
        yield "weight-axis", node, f"scales go along axis {axis} of the weight; expected {wanted}"


def _check_addition(node: ir.Node) -> _Findings:
    direct = any(_is_quantized_convolution(value) for value in node.inputs)
    branches = [qdq.dequantized(value) for value in node.inputs]
    if not direct and not any(b and not b.constant and _is_quantized_convolution(b.source) for b in branches):
        return  # no convolution that it could be fused with
    if all(b is not None and not b.constant for b in branches):
        yield "residual", node, "both branches are quantized; leave that of the last convolution"
    elif direct and not any(branches):
        yield "residual", node, "no branch is quantized; quantize the one that skips the convolution"


def _check_concatenation(node: ir.Node) -> _Findings:
    branches, scales = [qdq.dequantized(value) for value in node.inputs], _scales_behind(node)
    if scales and not all(branches):
        yield "concat", node, "its output is quantized and some of its branches are not"
    elif all(branches):
        scales |= {b.scale.item() for b in branches if b and b.scale is not None and b.scale.size == 1}
        if len(scales) > 1:
            yield "concat", node, f"its branches and its output have {len(scales)} scales; give them one"


def _check_pool(node: ir.Node) -> _Findings:
    source = qdq.dequantized(node.inputs[0])
    scale = source.scale if source is not None else None
    if scale is not None and scale.size == 1 and _scales_behind(node) - {scale.item()}:
        yield "pool", node, "the scale that it reads differs from the one behind it; use the first for both"


def _check_float_types(graph: ir.Graph) -> _Findings:
    nodes = [node for node in graph if node.op_type in _COMPUTING and not node.domain]
    half = [node for node in nodes if node.outputs[0].dtype in _FLOAT16]
    single = [node for node in nodes if node.outputs[0].dtype is ir.DataType.FLOAT]
    if half and single:
        fewer, kind = (half, "16 bits") if len(half) < len(single) else (single, "32 bits")
        rest = f" and {len(fewer) - 1} more" if len(fewer) > 1 else ""
        yield "fp16", fewer[0], f"it computes in {kind}{rest}, the other {len(nodes) - len(fewer)} not"


def _name(kind: ir.DataType | None) -> str:
    return "of an unknown type" if kind is None else kind.name


def _is_quantized_convolution(value: ir.Value | None) -> bool:
    """Return whether a tensor is a quantized convolution's output that nothing else reads."""
    node = qdq.producer(value, "Conv")
    return node is not None and len(node.outputs[0].uses()) <= 1 and qdq.dequantized(node.inputs[1]) is not None


def _scales_behind(node: ir.Node) -> set[float]:
    """Return the scales of the quantizers that read a node's output."""
    readers = [use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]
    scales = [qdq.constant(reader, 1) for reader in readers]
    return {float(s.item()) for s in scales if s is not None and s.size == 1}


_CHECKS: dict[str, Callable[[ir.Node], _Findings]] = {
    "QuantizeLinear": _check_quantizer,
    "DequantizeLinear": _check_quantizer,
    "Add": _check_addition,
    "Concat": _check_concatenation,
    "MaxPool": _check_pool,
    **dict.fromkeys(qdq.LAYERS, _check_layer),
}
