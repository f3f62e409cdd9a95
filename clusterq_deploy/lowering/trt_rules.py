"""TensorRT's rules for explicitly quantized graphs, read off an ONNX file: no TensorRT is needed to know of a break.

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

from clusterq_deploy.errors import ExportError, VerificationError
from clusterq_deploy.lowering.qdq import (
    Dequantized,
    constant,
    dequantized,
    integer_type,
    is_constant,
    name_of,
    producer,
    quantized_convolution,
    scales_behind,
    type_name,
)

Severity = Literal["error", "warning"]

_LEAST_OPSET = 13
_MOST_OPSET, _MOST_IR = 21, 10
"""What the project itself writes, as runtimes in the field read it: TensorRT 10.3 and ONNX Runtime 1.31."""


@dataclass(frozen=True)
class Rule:
    """A rule, what happens where it is broken (an error: no engine; a warning: a slower one), and its reason."""

    name: str
    severity: Severity
    reason: str


@dataclass(frozen=True)
class Break:
    """A rule that a graph breaks.

    Attributes:
        rule: its name, a key of `RULES`.
        severity: `error`: TensorRT refuses the graph; `warning`: it computes more slowly, or in float.
        node: the node's name, or that of its first output; empty where the rule is the whole file's.
        message: what was found, and what to do.
    """

    rule: str
    severity: Severity
    node: str
    message: str


_LIST = (
    Rule("opset", "error", "before opset 13 quantizers have no scale a channel, which weights need"),
    Rule("version", "warning", "opsets up to 21 and IR up to 10 are read by every TensorRT from 10.3 on"),
    Rule("domain", "warning", "operators that are not ONNX's own need a plugin in TensorRT"),
    Rule("operator", "error", "integer operators are not read: quantizers stand around float ones"),
    Rule("scale", "error", "scales are constants, positive and finite"),
    Rule("zero-point", "error", "quantizers are symmetric: every zero-point is 0"),
    Rule("activation-type", "error", "activations are INT8 or FP8; there is no UINT8"),
    Rule("weight-type", "error", "convolutions have INT8 or FP8 weights; INT4 is for the weights of Gemm and MatMul"),
    Rule("activation-axis", "error", "an activation has one scale, of a tensor"),
    Rule("weight-axis", "error", "a weight has one scale, or one for each output channel"),
    Rule("bias", "error", "biases stay in float: INT32 is not a quantized type"),
    Rule("inputs", "warning", "a layer runs in INT8 where all its inputs are quantized"),
    Rule("residual", "warning", "an addition fuses with the convolution in front where the other branch is quantized"),
    Rule("concat", "warning", "branches of a concatenation that share a scale with its output need no requantization"),
    Rule("pool", "warning", "a max-pool runs in INT8 where what it reads and what it makes share a scale"),
    Rule("fp16", "warning", "what is not quantized has one type: casts between layers break their fusion"),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _LIST}

_ACTIVATIONS = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN}
_WEIGHTS = _ACTIVATIONS | {ir.DataType.INT4}
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_INTEGER_OPERATORS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
_COMPUTING = _LAYERS | {"Add", "Mul", "Relu", "Clip", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat"}


def check_tensorrt(model: onnx.ModelProto) -> list[Break]:
    """Every break of TensorRT's rules in a graph, in its order.

    Args:
        model: any exporter's; a graph without quantizers breaks none of the rules on them. Of one whose opset is too
            old nothing else is said.

    Raises:
        ExportError: it is no valid ONNX.
    """
    opset = next((own.version for own in model.opset_import if own.domain in {"", "ai.onnx"}), 0)
    if 0 < opset < _LEAST_OPSET:
        message = f"opset {opset}; expected {_LEAST_OPSET} or later: convert the file"
        return [Break("opset", RULES["opset"].severity, "", message)]
    try:
        onnx.checker.check_model(model)
        read = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ir.serde.SerdeError) as error:
        raise ExportError(f"the graph is no valid ONNX: {str(error).strip().splitlines()[0]}") from error
    return list(_Checker(read).breaks())


def require_tensorrt(model: onnx.ModelProto, *, name: str) -> list[Break]:
    """The warnings of `check_tensorrt`.

    Args:
        model: the graph.
        name: what messages call it.

    Raises:
        VerificationError: TensorRT would refuse the graph.
    """
    found = check_tensorrt(model)
    errors = [b for b in found if b.severity == "error"]
    if errors:
        first, more = errors[0], f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise VerificationError(
            f"{name} breaks TensorRT's rule {first.rule} at {first.node or 'the file'}: {first.message}{more}; the "
            "file is not written"
        )
    return found


class _Checker:
    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def breaks(self) -> Iterator[Break]:
        yield from self._version()
        checks: dict[str, Callable[[ir.Node], Iterator[Break]]] = {
            "QuantizeLinear": self._quantizer,
            "DequantizeLinear": self._quantizer,
            "Add": self._addition,
            "Concat": self._concatenation,
            "MaxPool": self._pool,
        }
        for node in self._nodes():
            if node.op_type in _INTEGER_OPERATORS and not node.domain:
                message = (
                    f"{node.op_type} computes on integers; export QuantizeLinear and DequantizeLinear (QDQ) instead"
                )
                yield self._break("operator", node, message)
            if node.op_type in checks and not node.domain:
                yield from checks[node.op_type](node)
            if node.op_type in _LAYERS and not node.domain:
                yield from self._layer(node)
        yield from self._one_float_type()

    def _nodes(self) -> Iterator[ir.Node]:
        """All nodes, those of subgraphs and of the file's own functions too."""
        yield from ir.traversal.RecursiveGraphIterator(self._model.graph)
        for function in self._model.functions.values():
            yield from ir.traversal.RecursiveGraphIterator(function.graph)

    @staticmethod
    def _break(rule: str, node: ir.Node | None, message: str) -> Break:
        return Break(rule, RULES[rule].severity, name_of(node) if node else "", message)

    def _version(self) -> Iterator[Break]:
        opset, ir_version = self._model.opset_imports.get("", 0), self._model.ir_version
        if opset > _MOST_OPSET or ir_version > _MOST_IR:
            found, most = f"opset {opset}, IR {ir_version}", f"opset {_MOST_OPSET}, IR {_MOST_IR}"
            yield self._break("version", None, f"{found}; older parsers expect at most {most}")
        for domain in dict.fromkeys(n.domain for n in self._nodes() if n.domain):
            yield self._break("domain", None, f"operators of {domain!r}; load the library that has their plugins")

    def _quantizer(self, node: ir.Node) -> Iterator[Break]:
        scale = constant(node, 1)
        if scale is None:
            yield self._break("scale", node, "the scale is computed at run time; store it as a constant")
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            worst = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
            yield self._break("scale", node, f"a scale is {worst:g}; a dead channel's needs a floor above 0")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            zero = constant(node, 2)
            if zero is None or zero.any():
                found = "computed at run time" if zero is None else f"{zero[zero != 0].flat[0]:g}"
                yield self._break("zero-point", node, f"the zero-point is {found}; quantize symmetrically, around 0")
        if node.op_type == "QuantizeLinear" or producer(node.inputs[0], "QuantizeLinear") is None:
            yield from self._integers(node, is_constant(node.inputs[0]), scale)

    def _integers(self, node: ir.Node, stored: bool, scale: npt.NDArray[np.float64] | None) -> Iterator[Break]:
        kind = integer_type(node)
        if not stored:
            yield from self._activation(node, kind, scale)
        elif kind not in _WEIGHTS and not self._is_bias(node):
            yield self._break("weight-type", node, f"the weight is {type_name(kind)}; expected INT8")

    def _activation(
        self, node: ir.Node, kind: ir.DataType | None, scale: npt.NDArray[np.float64] | None
    ) -> Iterator[Break]:
        if kind not in _ACTIVATIONS:
            hint = " (the default of a QuantizeLinear without zero-point)" if len(node.inputs) < 3 else ""
            yield self._break("activation-type", node, f"the activation is {type_name(kind)}{hint}; expected INT8")
        if scale is not None and scale.size > 1:
            yield self._break("activation-axis", node, f"the activation has {scale.size} scales; expected one")

    @staticmethod
    def _is_bias(node: ir.Node) -> bool:
        """Whether a DequantizeLinear's output is read as a bias alone."""
        uses = list(node.outputs[0].uses())
        return bool(uses) and all(use.node.op_type in _LAYERS and use.idx == 2 for use in uses)

    def _layer(self, node: ir.Node) -> Iterator[Break]:
        data, weight = (dequantized(v) for v in node.inputs[:2])
        integer_weight = weight is not None and weight.kind is ir.DataType.INT4
        if data is None and weight is not None and not integer_weight:
            yield self._break("inputs", node, "the weight is quantized and what it multiplies is not")
        if data is not None and weight is None:
            yield self._break("inputs", node, "what it reads is quantized and its weight is not")
        if weight is not None and weight.constant:
            yield from self._weight(node, weight)
        if len(node.inputs) > 2 and node.inputs[2] is not None and dequantized(node.inputs[2]) is not None:
            yield self._break("bias", node, "the bias is quantized; store it as float")

    def _weight(self, node: ir.Node, weight: Dequantized) -> Iterator[Break]:
        if weight.kind is ir.DataType.INT4 and node.op_type in {"Conv", "ConvTranspose"}:
            yield self._break("weight-type", node, "a convolution with INT4 weights; store them as INT8")
        shape = weight.source.shape
        if weight.scale is None or weight.scale.size == 1 or shape is None or weight.kind is ir.DataType.INT4:
            return  # INT4 weights may have a scale for each block
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        wanted = 0 if node.op_type == "Conv" or transposed else (1 if node.op_type != "MatMul" else len(shape) - 1)
        axis = weight.axis % len(shape)
        if axis != wanted:
            yield self._break("weight-axis", node, f"scales go along axis {axis} of the weight; expected {wanted}")
        elif shape[wanted] != weight.scale.size:
            channels = shape[wanted]
            yield self._break("weight-axis", node, f"{weight.scale.size} scales for {channels} output channels")

    def _addition(self, node: ir.Node) -> Iterator[Break]:
        direct = [quantized_convolution(value) for value in node.inputs]
        quantized = [dequantized(value) for value in node.inputs]
        if not any(direct) and not any(q and not q.constant and quantized_convolution(q.source) for q in quantized):
            return  # no convolution that it could be fused with
        if all(q is not None and not q.constant for q in quantized):
            yield self._break("residual", node, "both branches are quantized; leave that of the last convolution")
        elif any(direct) and not any(q is not None for q in quantized):
            yield self._break("residual", node, "no branch is quantized; quantize the one that skips the convolution")

    def _concatenation(self, node: ir.Node) -> Iterator[Break]:
        branches, behind = [dequantized(value) for value in node.inputs], scales_behind(node)
        if behind and not all(branches):
            yield self._break("concat", node, "its output is quantized and some of its branches are not")
        elif all(branches):
            scales = {b.scale.item() for b in branches if b and b.scale is not None and b.scale.size == 1}
            if len(scales | set(behind)) > 1:
                found = len(scales | set(behind))
                yield self._break("concat", node, f"its branches and its output have {found} scales; give them one")

    def _pool(self, node: ir.Node) -> Iterator[Break]:
        before = dequantized(node.inputs[0])
        if before is None or before.scale is None:
            return
        if before.scale.size == 1 and any(scale != before.scale.item() for scale in scales_behind(node)):
            yield self._break("pool", node, "it reads one scale and another stands behind it; give both the first one")

    def _one_float_type(self) -> Iterator[Break]:
        nodes = [n for n in self._model.graph if n.op_type in _COMPUTING and not n.domain]
        half = [n for n in nodes if n.outputs[0].dtype in _HALF]
        single = [n for n in nodes if n.outputs[0].dtype is ir.DataType.FLOAT]
        if half and single:
            fewer, kind = (half, "16 bits") if len(half) < len(single) else (single, "32 bits")
            rest = f" and {len(fewer) - 1} more" if len(fewer) > 1 else ""
            yield self._break("fp16", fewer[0], f"it computes in {kind}{rest}, the other {len(nodes) - len(fewer)} not")
