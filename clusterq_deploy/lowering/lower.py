"""GraphFormat a student's grid in the operators that each target runs as integers.

One grid, three spellings. TensorRT wants signed INT8 with zero-point 0; a narrower grid is a float Clip in front of
the quantizer. ONNX Runtime's integer kernels are fast for unsigned activations, so that a signed grid is stored with
zero-point 128, and a narrower grid is an integer Clip behind the quantizer, which leaves Conv -> QuantizeLinear side
by side to be fused. The INT4 graph is ONNX Runtime's with weights of at most four bits stored two a byte.
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

from clusterq_deploy.errors import ExportError
from clusterq_deploy.quantization.fake_quant import MARKER, MARKER_DOMAIN, Quantizer
from clusterq_deploy.quantization.graph.placement import Target
from clusterq_deploy.quantization.grid import ZERO_POINT, Grid
from clusterq_deploy.quantization.student import Student

GraphFormat = Literal["onnxruntime", "tensorrt", "int4"]
_INT32_MAX = 2**31 - 1

# ONNX operators that only move values: a quantized tensor stays on its grid through them
MOVING = {
    "Concat", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class _Steps:
    """Scale and zero-point of a tensor that lies on an activation grid."""

    scale: ir.Value
    zero_point: ir.Value


def target_of(graph_format: GraphFormat) -> Target:
    """The runtime whose quantizers a format has."""
    return "tensorrt" if graph_format == "tensorrt" else "onnxruntime"


def quantized_name(label: str) -> str:
    """The tensor of integers that a quantizer makes."""
    return f"{label}.quantized"


def bounded_name(label: str) -> str:
    """The same, bounded to a grid that is narrower than its type."""
    return f"{label}.bounded"


def offset_of(grid: Grid, graph_format: GraphFormat) -> int:
    """What an activation's integers are stored with on top of the grid's: their zero-point."""
    return ZERO_POINT if grid.signed and graph_format != "tensorrt" else 0


def lower(marked: onnx.ModelProto, student: Student, graph_format: GraphFormat) -> onnx.ModelProto:
    """The graph for a target, from the marked graph of `export_graph`.

    Args:
        marked: the student's graph; it is not changed.
        student: gives scales and integers.
        graph_format: `onnxruntime`, `tensorrt` or `int4`.

    Raises:
        ExportError: a marker has no quantizer, or a bias does not fit INT32.
    """
    model = ir.from_proto(marked)
    with student.for_target(target_of(graph_format)):
        _Lowering(model.graph, student, graph_format).run()
    _remove_unread(model)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    return ir.to_proto(model)


def _remove_unread(model: ir.Model) -> None:
    """Remove what nothing reads any more."""
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        model.graph.initializers.pop(name)


class _Lowering:
    """Rewrites one graph in place; markers go, operators come."""

    def __init__(self, graph: ir.Graph, student: Student, graph_format: GraphFormat) -> None:
        self.graph, self.graph_format = graph, graph_format
        self.target = target_of(graph_format)
        self.quantizers = student.quantizers()
        self.layers = {f"{name}.weight": layer for name, layer in student.layers().items()}
        self.absent = {s.name for s in student.placement.activations if self.target not in s.targets}
        self.steps: dict[ir.Value, _Steps] = {}  # of every tensor that lies on an activation grid
        self.weight_scales: dict[ir.Value, npt.NDArray[np.float32]] = {}
        self._spelled: Counter[str] = Counter()

    def run(self) -> None:
        for node in list(self.graph):
            if node.domain == MARKER_DOMAIN and node.op_type == MARKER:
                self._marker(node)
            elif node.op_type in MOVING:
                self._keep_grid(node)
        if self.target == "onnxruntime":
            for node in list(self.graph):
                if node.op_type in {"Conv", "Gemm"} and len(node.inputs) > 2 and node.inputs[2] is not None:
                    self._integer_bias(node)

    def _marker(self, node: ir.Node) -> None:
        site = node.attributes["site"].as_string()
        source, output = self._input(node, 0), node.outputs[0]
        if site not in self.quantizers:
            raise ExportError(f"the graph has a quantizer {site!r} that the model has not")
        if site in self.absent:
            convenience.replace_all_uses_with(output, source)
        elif site in self.layers:
            convenience.replace_all_uses_with(output, self._weight(node, site))
        else:
            convenience.replace_all_uses_with(output, self._activation(node, source, self.quantizers[site]))
        self.graph.remove(node, safe=True)

    def _keep_grid(self, node: ir.Node) -> None:
        """Say that what only moves a grid's values leaves them on the grid: the runtime then moves integers."""
        moved = [value for value in node.inputs if value is not None and value in self.steps]
        tensors = len(node.inputs) if node.op_type == "Concat" else 1
        if len(moved) < tensors or len({self.steps[value] for value in moved}) > 1:
            return
        if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
            filling = convenience.get_const_tensor(self._input(node, 2))
            if filling is None or float(filling.numpy()) != 0:
                return
        steps = self.steps[moved[0]]
        for output in node.outputs:
            uses = list(output.uses())
            if not uses:
                continue
            quantized = ir.node("QuantizeLinear", [output, steps.scale, steps.zero_point])
            restored = ir.node("DequantizeLinear", [quantized.outputs[0], steps.scale, steps.zero_point])
            quantized.outputs[0].name, restored.outputs[0].name = (
                f"{output.name}.quantized",
                f"{output.name}.restored",
            )
            self.graph.insert_after(node, [quantized, restored])
            for use in uses:
                use.node.replace_input_with(use.idx, restored.outputs[0])
            self.steps[restored.outputs[0]] = steps

    def _weight(self, marker: ir.Node, site: str) -> ir.Value:
        layer = self.layers[site]
        quantizer = layer.weight_quantizer
        integers = quantizer.integers(layer.weight.detach()).cpu().numpy()
        scale = self._scale(quantizer)
        kind: type = np.int8
        if self.graph_format == "int4" and quantizer.grid.bits <= 4:
            kind = ml_dtypes.int4
        stored = self._constant(f"{site}.integers", integers.astype(kind))
        inputs = [stored, self._constant(f"{site}.scale", scale)]
        inputs.append(self._constant(f"{site}.zero_point", np.zeros(len(scale), kind)))
        output = self._insert(marker, "DequantizeLinear", inputs, f"{site}.dequantized", axis=0)
        self.weight_scales[output] = scale
        bias = quantizer.bias(layer.bias)
        if bias is not None and bias is not layer.bias:
            own = self._constant(
                f"full_range.{site.removesuffix('.weight')}.bias", bias.detach().cpu().numpy().astype(np.float32)
            )
            for use in marker.outputs[0].uses():
                use.node.replace_input_with(2, own)
        return output

    def _activation(self, marker: ir.Node, source: ir.Value, quantizer: Quantizer) -> ir.Value:
        site, grid, scale = quantizer.site, quantizer.grid, self._scale(quantizer)
        self._spelled[site] += 1  # branches of a concatenation share a quantizer, but not their tensors' names
        label = site if self._spelled[site] == 1 else f"{site}.{self._spelled[site]}"
        if self.target == "tensorrt":
            source = self._float_clip(marker, source, grid, scale, label)
            zero = self._constant(f"{site}.zero_point", np.array(0, np.int8))
        else:
            source = self._without_upper_clip(marker, source, quantizer, label)
            zero = self._constant(f"{site}.zero_point", np.array(offset_of(grid, self.graph_format), np.uint8))
        step = self._constant(f"{site}.scale", scale)
        integers = self._insert(marker, "QuantizeLinear", [source, step, zero], quantized_name(label))
        if self.target == "onnxruntime":
            integers = self._integer_clip(marker, integers, grid, label)
        output = self._insert(marker, "DequantizeLinear", [integers, step, zero], f"{label}.dequantized")
        self.steps[output] = _Steps(step, zero)
        return output

    def _integer_clip(self, marker: ir.Node, integers: ir.Value, grid: Grid, label: str) -> ir.Value:
        """Bound UINT8 integers to the grid where it is narrower than the type."""
        offset = offset_of(grid, self.graph_format)
        low, high = grid.low + offset, grid.high + offset
        if (low, high) == (0, 255):
            return integers
        bounds = [self._constant(f"{label}.low", np.array(low, np.uint8))]
        bounds.append(self._constant(f"{label}.high", np.array(high, np.uint8)))
        return self._insert(marker, "Clip", [integers, *bounds], bounded_name(label))  # Min takes half as long again

    def _float_clip(
        self, marker: ir.Node, source: ir.Value, grid: Grid, scale: npt.NDArray[np.float32], label: str
    ) -> ir.Value:
        """Bound values to a grid narrower than INT8; the clip takes the place of a ReLU or ReLU6 in front."""
        if (grid.low, grid.high) in {(-128, 127), (0, 127)}:
            return source
        bounds = [
            self._constant(f"{label}.min", grid.low * scale),
            self._constant(f"{label}.max", grid.high * scale),
        ]
        producer = source.producer()
        redundant = producer is not None and self._ceiling(producer) >= grid.high * float(scale)
        if producer is not None and redundant and not grid.signed and self._only(source, marker):
            source = self._input(producer, 0)
        return self._insert(marker, "Clip", [source, *bounds], f"{label}.clipped")

    def _without_upper_clip(self, marker: ir.Node, source: ir.Value, quantizer: Quantizer, label: str) -> ir.Value:
        """A ReLU in place of a ReLU6: the grid ends below 6, and a narrower Clip would stop the fusion."""
        producer = source.producer()
        if producer is None or producer.op_type != "Clip" or quantizer.grid.signed or not self._only(source, marker):
            return source
        if self._ceiling(producer) < quantizer.grid.high * float(self._scale(quantizer)):
            return source
        return self._insert(marker, "Relu", [self._input(producer, 0)], f"{label}.rectified")

    @staticmethod
    def _ceiling(node: ir.Node) -> float:
        """Where a node that cuts off at zero cuts off above; minus infinity for any other node."""
        if node.op_type == "Relu":
            return math.inf
        if node.op_type != "Clip" or len(node.inputs) < 2 or node.inputs[1] is None:
            return -math.inf
        low = convenience.get_const_tensor(node.inputs[1])
        if low is None or float(low.numpy()) != 0:
            return -math.inf
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return math.inf
        high = convenience.get_const_tensor(node.inputs[2])
        return -math.inf if high is None else float(high.numpy())

    @staticmethod
    def _only(value: ir.Value, reader: ir.Node) -> bool:
        return all(use.node is reader for use in value.uses()) and not value.is_graph_output()

    def _integer_bias(self, node: ir.Node) -> None:
        """Store the bias as INT32 with the accumulator's scale, as ONNX Runtime would round it itself."""
        x, weight, bias = (self._input(node, i) for i in range(3))
        if x not in self.steps or weight not in self.weight_scales:
            return
        tensor, step = convenience.get_const_tensor(bias), convenience.get_const_tensor(self.steps[x].scale)
        if tensor is None or step is None:
            return
        scale = step.numpy() * self.weight_scales[weight]
        rounded = np.rint(tensor.numpy().astype(np.float64) / scale)
        if np.abs(rounded).max() > _INT32_MAX:
            channel = int(np.abs(rounded).argmax())
            raise ExportError(f"the bias {bias.name}[{channel}] does not fit INT32 at scale {scale[channel]:.2g}")
        name = bias.name or "bias"
        inputs = [
            self._constant(f"{name}.integers", rounded.astype(np.int32)),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero_point", np.zeros(len(scale), np.int32)),
        ]
        node.replace_input_with(2, self._insert(node, "DequantizeLinear", inputs, f"{name}.dequantized", axis=0))

    def _scale(self, quantizer: Quantizer) -> npt.NDArray[np.float32]:
        return quantizer.scale.detach().cpu().numpy().astype(np.float32)

    @staticmethod
    def _input(node: ir.Node, index: int) -> ir.Value:
        value = node.inputs[index]
        if value is None:
            raise ExportError(f"{node.op_type} {node.name} lacks its input {index}")
        return value

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def _insert(self, before: ir.Node, operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        """Add a node in front of another; gives its output, of the name."""
        node = ir.node(operator, inputs, attributes=attributes or None, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]
