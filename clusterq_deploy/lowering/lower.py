"""Lower a student's grid to the operators that each target runs as integers.

One grid, three formats. TensorRT requires signed INT8 with zero-point 0; a narrower grid is a float Clip in front of
the quantizer. ONNX Runtime's integer kernels are fast for unsigned activations, so a signed grid is stored with
zero-point 128, and a narrower grid is an integer Clip behind the quantizer, which leaves Conv -> QuantizeLinear next
to each other to be fused. The INT4 graph is ONNX Runtime's with weights of at most four bits stored two to a byte.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from clusterq_deploy.errors import ExportError
from clusterq_deploy.lowering.qdq import constant, operand, store
from clusterq_deploy.quantization.fake_quant import MARKER, MARKER_DOMAIN, QuantizedConvTranspose2d, Quantizer
from clusterq_deploy.quantization.graph.placement import Target
from clusterq_deploy.quantization.grid import ZERO_POINT, Grid
from clusterq_deploy.quantization.student import Student

GraphFormat = Literal["onnxruntime", "tensorrt", "int4"]
_INT32_MAX = 2**31 - 1

# ONNX operators that only move values: a quantized tensor stays on its grid through them
MOVING = {
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "ReduceMax", "Reshape", "Resize",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_LOWEST = -1e30  # a padding below it is for a MaxPool, which never takes it


@dataclass(frozen=True)
class _QParams:
    """Scale and zero-point of a tensor that is on an activation grid."""

    scale: ir.Value
    zero_point: ir.Value


def target_of(graph_format: GraphFormat) -> Target:
    """Return the runtime whose quantizers a format has."""
    return "tensorrt" if graph_format == "tensorrt" else "onnxruntime"


def label_of(site: str, call: int) -> str:
    """Return the prefix of a quantizer's tensor names, different for each call: concatenated branches share one."""
    return site if call == 1 else f"{site}.{call}"


def quantized_name(label: str) -> str:
    """Return the name of the tensor of integers that a quantizer makes."""
    return f"{label}.quantized"


def bounded_name(label: str) -> str:
    """Return the name of these integers once they are bounded to a grid narrower than their type."""
    return f"{label}.bounded"


def offset_of(grid: Grid, graph_format: GraphFormat) -> int:
    """Return the zero-point of an activation's integers, which is added to the grid's when they are stored."""
    return ZERO_POINT if grid.signed and graph_format != "tensorrt" else 0


def lower(marked: onnx.ModelProto, student: Student, graph_format: GraphFormat) -> onnx.ModelProto:
    """Return the graph for a target, made from a student's marked graph of `export_graph`, which is not changed.

    Raises:
        ExportError: a marker has no quantizer, or a bias does not fit INT32.
    """
    model = ir.from_proto(marked)
    with student.for_target(target_of(graph_format)):
        _Lowering(model.graph, student, graph_format).run()
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    return ir.to_proto(model)


class _Lowering:
    """Rewrites one graph in place: operators replace the markers."""

    def __init__(self, graph: ir.Graph, student: Student, graph_format: GraphFormat) -> None:
        self.graph, self.graph_format = graph, graph_format
        self.target = target_of(graph_format)
        self.quantizers = student.quantizers()
        self.layers = {f"{name}.weight": layer for name, layer in student.layers().items()}
        self.absent = {s.name for s in student.placement.activations if self.target not in s.targets}
        self.qparams: dict[ir.Value, _QParams] = {}  # of every tensor that is on an activation grid
        self.weight_scales: dict[ir.Value, npt.NDArray[np.float32]] = {}
        self.calls: Counter[str] = Counter()

    def run(self) -> None:
        for node in list(self.graph):
            if node.domain == MARKER_DOMAIN and node.op_type == MARKER:
                self._lower_marker(node)
            elif node.op_type == "ReduceMean" and self.target == "onnxruntime":
                self._pool_globally(node)
            elif node.op_type in MOVING:
                self._keep_grid(node)
        if self.target == "onnxruntime":
            for node in list(self.graph):
                if node.op_type in {"Conv", "Gemm"} and operand(node, 2) is not None:
                    self._lower_bias(node)

    def _lower_marker(self, marker: ir.Node) -> None:
        site, output = marker.attributes["site"].as_string(), self._input(marker, 0)
        if site not in self.quantizers:
            raise ExportError(f"the graph has a quantizer {site!r}, but the model has not")
        replaced = marker
        if site in self.layers:
            if isinstance(self.layers[site], QuantizedConvTranspose2d):  # stored as its only reader turns it
                (replaced,) = marker.outputs[0].consumers()
            output = self._lower_weight(marker, site)
        elif site not in self.absent:
            output = self._lower_activation(marker, self.quantizers[site])
        convenience.replace_all_uses_with(replaced.outputs[0], output)
        for node in dict.fromkeys((replaced, marker)):
            self.graph.remove(node, safe=True)

    def _keep_grid(self, node: ir.Node) -> None:
        """Mark the outputs of a node that only moves values as on its input's grid, so that integers are moved."""
        moved = [value for value in node.inputs if value is not None and value in self.qparams]
        tensors = len(node.inputs) if node.op_type == "Concat" else 1
        if len(moved) < tensors or len({self.qparams[value] for value in moved}) > 1:
            return
        qparams = self.qparams[moved[0]]
        if node.op_type == "Resize" and node.attributes["mode"].as_string() != "nearest":
            return
        if node.op_type == "Pad" and operand(node, 2) is not None:
            padding = constant(node, 2)
            if padding is not None and float(padding) <= _LOWEST:
                self.qparams[node.outputs[0]] = qparams  # what is pooled from it is on the grid
                return
            if padding is None or float(padding) != 0:
                return
        for output in node.outputs:
            uses = list(output.uses())
            if not uses:
                continue
            quantized = ir.node("QuantizeLinear", [output, qparams.scale, qparams.zero_point])
            restored = ir.node("DequantizeLinear", [quantized.outputs[0], qparams.scale, qparams.zero_point])
            quantized.outputs[0].name, restored.outputs[0].name = f"{output.name}.quantized", f"{output.name}.restored"
            self.graph.insert_after(node, [quantized, restored])
            for use in uses:
                use.node.replace_input_with(use.idx, restored.outputs[0])
            self.qparams[restored.outputs[0]] = qparams

    def _lower_weight(self, marker: ir.Node, site: str) -> ir.Value:
        layer = self.layers[site]
        quantizer = layer.weight_quantizer
        integers = quantizer.integers(layer.weight.detach()).cpu().numpy()
        kind: type = ml_dtypes.int4 if self.graph_format == "int4" and quantizer.grid.bits <= 4 else np.int8
        axis = 1 if isinstance(layer, QuantizedConvTranspose2d) else 0  # of the output channels
        output = self._stored(marker, site, integers.astype(kind).swapaxes(0, axis), self._scale(quantizer), axis)
        self.weight_scales[output] = self._scale(quantizer)
        bias = quantizer.bias(layer.bias)
        if bias is not None and bias is not layer.bias:
            shifted = bias.detach().cpu().numpy().astype(np.float32)
            value = self._constant(f"full_range.{site.removesuffix('.weight')}.bias", shifted)
            for use in marker.outputs[0].uses():
                use.node.replace_input_with(2, value)
        return output

    def _lower_activation(self, marker: ir.Node, quantizer: Quantizer) -> ir.Value:
        site, grid, scale = quantizer.site, quantizer.grid, self._scale(quantizer)
        self.calls[site] += 1
        label = label_of(site, self.calls[site])
        clip = self._clip_for_tensorrt if self.target == "tensorrt" else self._rectify_for_onnxruntime
        source, kind = clip(marker, quantizer, label), np.int8 if self.target == "tensorrt" else np.uint8
        zero = self._constant(f"{site}.zero_point", np.array(offset_of(grid, self.graph_format), kind))
        qparams = _QParams(self._constant(f"{site}.scale", scale), zero)
        inputs = [source, qparams.scale, zero]
        integers = self._insert(marker, "QuantizeLinear", inputs, quantized_name(label))
        if self.target == "onnxruntime":
            integers = self._bound(marker, integers, grid, label)
        output = self._insert(marker, "DequantizeLinear", [integers, *inputs[1:]], f"{label}.dequantized")
        self.qparams[output] = qparams
        return output

    def _pool_globally(self, node: ir.Node) -> None:
        """Write a mean over height and width as GlobalAveragePool, for which ONNX Runtime has an integer kernel."""
        x, axes, shape = self._input(node, 0), constant(node, 1), node.outputs[0].shape
        if x not in self.qparams or axes is None or shape is None or len(shape) != 4:
            return
        if node.attributes.get_int("keepdims", 1) == 1 and sorted(int(axis) % 4 for axis in axes) == [2, 3]:
            pooled = self._insert(node, "GlobalAveragePool", [x], f"{node.outputs[0].name}.pooled")
            convenience.replace_all_uses_with(node.outputs[0], pooled)
            self.graph.remove(node, safe=True)

    def _bound(self, marker: ir.Node, integers: ir.Value, grid: Grid, label: str) -> ir.Value:
        """Bound UINT8 integers to the grid if it is narrower than the type."""
        offset = offset_of(grid, self.graph_format)
        low, high = grid.low + offset, grid.high + offset
        if (low, high) == (0, 255):
            return integers
        ends = {"low": low, "high": high}
        bounds = [self._constant(f"{label}.{end}", np.array(value, np.uint8)) for end, value in ends.items()]
        return self._insert(marker, "Clip", [integers, *bounds], bounded_name(label))  # Min takes half as long again

    def _clip_for_tensorrt(self, marker: ir.Node, quantizer: Quantizer, label: str) -> ir.Value:
        """Bound values to a grid narrower than INT8; the clip replaces a ReLU or ReLU6 in front."""
        grid, scale, source = quantizer.grid, self._scale(quantizer), self._input(marker, 0)
        if (grid.low, grid.high) in {(-128, 127), (0, 127)}:
            return source
        ends = {"min": grid.low, "max": grid.high}
        bounds = [self._constant(f"{label}.{end}", value * scale) for end, value in ends.items()]
        rectifier = self._redundant_rectifier(marker, quantizer)
        source = source if rectifier is None else self._input(rectifier, 0)
        return self._insert(marker, "Clip", [source, *bounds], f"{label}.clipped")

    def _rectify_for_onnxruntime(self, marker: ir.Node, quantizer: Quantizer, label: str) -> ir.Value:
        """Put a ReLU in place of a ReLU6: the grid ends below 6, and a narrower Clip would prevent the fusion."""
        rectifier = self._redundant_rectifier(marker, quantizer)
        if rectifier is None or rectifier.op_type != "Clip":
            return self._input(marker, 0)
        return self._insert(marker, "Relu", [self._input(rectifier, 0)], f"{label}.rectified")

    def _redundant_rectifier(self, marker: ir.Node, quantizer: Quantizer) -> ir.Node | None:
        """Return the ReLU or ReLU6 that only a marker reads, if the grid cuts off no higher than it does."""
        source, grid = self._input(marker, 0), quantizer.grid
        node = source.producer()
        if node is None or grid.signed or source.is_graph_output() or any(u.node is not marker for u in source.uses()):
            return None
        return node if self._ceiling(node) >= grid.high * float(self._scale(quantizer)) else None

    @staticmethod
    def _ceiling(node: ir.Node) -> float:
        """Return where a node that cuts off at zero cuts off above; minus infinity for any other node."""
        if node.op_type == "Relu":
            return math.inf
        low = constant(node, 1) if node.op_type == "Clip" else None
        if low is None or float(low) != 0:
            return -math.inf
        if operand(node, 2) is None:
            return math.inf
        high = constant(node, 2)
        return -math.inf if high is None else float(high)

    def _lower_bias(self, layer: ir.Node) -> None:
        """Store the bias as INT32 with the accumulator's scale, as ONNX Runtime would round it itself."""
        x, weight, bias = (self._input(layer, i) for i in range(3))
        if x not in self.qparams or weight not in self.weight_scales:
            return
        tensor = convenience.get_const_tensor(bias)
        input_scale = convenience.get_const_tensor(self.qparams[x].scale)
        if tensor is None or input_scale is None:
            return
        scale = input_scale.numpy() * self.weight_scales[weight]
        rounded = np.rint(tensor.numpy().astype(np.float64) / scale)
        if np.abs(rounded).max() > _INT32_MAX:
            channel = int(np.abs(rounded).argmax())
            raise ExportError(f"the bias {bias.name}[{channel}] does not fit INT32 at scale {scale[channel]:.2g}")
        layer.replace_input_with(2, self._stored(layer, bias.name or "bias", rounded.astype(np.int32), scale))

    def _stored(
        self,
        reader: ir.Node,
        name: str,
        integers: npt.NDArray[np.generic],
        scale: npt.NDArray[np.float32],
        axis: int = 0,
    ) -> ir.Value:
        """Store integers with a scale for each index of an axis, dequantized in front of their reader."""
        inputs = [
            self._constant(f"{name}.integers", integers),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero_point", np.zeros(len(scale), integers.dtype)),
        ]
        return self._insert(reader, "DequantizeLinear", inputs, f"{name}.dequantized", axis=axis)

    @staticmethod
    def _scale(quantizer: Quantizer) -> npt.NDArray[np.float32]:
        return quantizer.scale.detach().cpu().numpy().astype(np.float32)

    @staticmethod
    def _input(node: ir.Node, index: int) -> ir.Value:
        value = node.inputs[index]
        if value is None:
            raise ExportError(f"{node.op_type} {node.name} lacks its input {index}")
        return value

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return self.graph.initializers.get(name) or store(self.graph, name, array)

    def _insert(self, before: ir.Node, operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        """Insert a node in front of another and return its output; both have the given name."""
        node = ir.node(operator, inputs, attributes=attributes or None, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]
