"""Check that sums of two integer products fit 16 bits, in which x86 CPUs without VNNI add them.

Before VNNI, x86 multiplies eight bits by `vpmaddubsw`: UINT8 times INT8, two neighbouring products of a row added in 16
bits, with saturation. ONNX Runtime's kernels for convolutions, grouped ones too, and for matrix products do so with
INT8 weights; INT8 activations are turned into UINT8 first, by adding 128. UINT8 weights, and depthwise convolutions,
are multiplied in 16 and added in 32 bits. This was measured with ONNX Runtime 1.31.1, with AVX2 and with AVX-512.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering import qdq
from clusterq_deploy.lowering.lower import MOVING
from clusterq_deploy.lowering.trt_rules import Break
from clusterq_deploy.quantization.grid import INT16_MAX

_OFFSET = 128  # of INT8 activations, in the kernels

_WEIGHT_INDEX = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "ConvInteger": 1, "MatMulInteger": 1}
"""Operators on integers, with the input that is their weight; the first is their data."""

Range = tuple[int, int]
_ANY: Range = (-(2**31), 2**31)
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairSum:
    """The largest sum of two products of a layer, by magnitude, and the output channel that has it.

    `node` and `weight` are names; a layer without a weight has its second input's. In a `depthwise` layer each output
    channel reads one input channel of its own, and ONNX Runtime adds in 32 bits. A layer that is not `fused`, a
    convolution without a quantizer behind it, or behind a Relu that its zero-point does not stand for, is computed in
    float by ONNX Runtime.
    """

    node: str
    weight: str
    channel: int
    largest: int
    depthwise: bool
    fused: bool

    @property
    def fits(self) -> bool:
        """Whether 16 bits hold the sum."""
        return -INT16_MAX - 1 <= self.largest <= INT16_MAX

    @property
    def message(self) -> str:
        """What is wrong with a sum that does not fit, and what to do."""
        return (
            f"two products of output channel {self.channel} of {self.weight} add up to {self.largest:,}, and 16 bits "
            f"hold -32,768 to 32,767: x86 CPUs without VNNI saturate; give the weight 7 bits (reduce_range)"
        )


def pair_sums(model: onnx.ModelProto) -> list[PairSum]:
    """Return the largest sum of two products of each layer that multiplies UINT8 or INT8 with INT8, in graph order.

    It is computed from the integers only: the weights, and the range that activations can have by their type and the
    bounds behind their quantizers. Whichever products of a row a kernel adds in pairs, no sum is larger.

    Args:
        model: any exporter's, with QuantizeLinear and DequantizeLinear around float layers, or with integer operators.

    Raises:
        ExportError: it is no valid ONNX.
    """
    nodes = qdq.all_nodes(qdq.parse(model, checked=False))
    return [pair for node in nodes if (pair := _pair_sum(node)) is not None]


def check_saturation(model: onnx.ModelProto) -> list[Break]:
    """Return a warning for each layer of `pair_sums` that saturates on x86 CPUs without VNNI in ONNX Runtime."""
    saturating = (pair for pair in pair_sums(model) if pair.fused and not pair.fits and not pair.depthwise)
    return [Break("saturation", "warning", pair.node, pair.message) for pair in saturating]


def require_no_saturation(model: onnx.ModelProto, *, name: str) -> int:
    """Return the largest magnitude of a sum of two products in a graph, which messages call `name`; 0 without any.

    Depthwise layers count too: another runtime's kernel may add them in pairs.

    Raises:
        VerificationError: 16 bits do not hold a sum.
    """
    pairs = pair_sums(model)
    worst = next((pair for pair in pairs if not pair.fits), None)
    if worst is not None:
        raise VerificationError(f"{name} saturates at {worst.node}: {worst.message}; the file is not written")
    return max((abs(pair.largest) for pair in pairs), default=0)


def _pair_sum(node: ir.Node) -> PairSum | None:
    """Return the largest sum of a node, None if it is no layer of such integers."""
    operands = _operands(node)
    if operands is None:
        return None
    (low, high), weight, name = operands
    if weight.size == 0 or weight.ndim == 0:
        return None
    rows, depthwise = _rows(node, weight)
    products = np.sort(np.stack([rows * low, rows * high]), axis=0)  # the smallest and the largest of each weight
    pair = min(2, rows.shape[1])
    least = np.partition(products[0], pair - 1, axis=1)[:, :pair]
    most = -np.partition(-products[1], pair - 1, axis=1)[:, :pair]
    # a row of an odd length is filled up with a product of zero
    bottom, top = np.minimum(least.sum(1), least.min(1)), np.maximum(most.sum(1), most.max(1))
    channel = int(np.maximum(-bottom, top).argmax())
    largest = int(top[channel] if top[channel] >= -bottom[channel] else bottom[channel])
    fused = node.op_type != "Conv" or _is_quantized(node.outputs[0])
    return PairSum(qdq.name_of(node), name, channel, largest, depthwise, fused)


def _is_quantized(value: ir.Value) -> bool:
    """Return whether a quantizer reads a tensor, directly or behind a Relu or Clip that its range makes needless."""
    readers = [use.node for use in value.uses()]
    behind = [(n.outputs[0], use.node) for n in readers if n.op_type in {"Relu", "Clip"} for use in n.outputs[0].uses()]
    return any(node.op_type == "QuantizeLinear" for node in readers) or any(
        node.op_type == "QuantizeLinear" and _keeps_all_integers(bounded, node) for bounded, node in behind
    )


def _keeps_all_integers(bounded: ir.Value, quantizer: ir.Node) -> bool:
    """Return whether the bounds of a tensor leave out no integer of the quantizer that reads it."""
    grid = _grid(quantizer)
    if grid is None:
        return False
    (low, high), (least, most) = _range_of_numbers(bounded, grid), _range(None, qdq.integer_type(quantizer))
    return low <= least and most <= high


def _operands(node: ir.Node) -> tuple[Range, Integers, str] | None:
    """Return what a node multiplies: the range of its data as UINT8, its weight's integers, and the weight's name.

    None if it is no layer on integers, or one with UINT8 weights, which are multiplied in 16 bits.
    """
    if node.op_type in {"Conv", "Gemm", "MatMul"} and not node.domain:
        quantized = [qdq.producer(qdq.operand(node, index), "DequantizeLinear") for index in range(2)]
        data, second = (qdq.operand(maker, 0) if maker is not None else None for maker in quantized)
        source = qdq.dequantized(qdq.operand(node, 1))
        weight = qdq.stored_integers(quantized[1]) if quantized[1] is not None else None
        kind = qdq.integer_type(quantized[0]) if quantized[0] is not None else None
    elif node.op_type in _WEIGHT_INDEX and node.domain in {"", "com.microsoft"}:
        index = _WEIGHT_INDEX[node.op_type]
        data, second, weight = qdq.operand(node, 0), qdq.operand(node, index), qdq.constant(node, index)
        source, zero = None, qdq.operand(node, 2)
        kind = data.dtype if data is not None and data.dtype is not None else zero.dtype if zero is not None else None
    else:
        return None
    if data is None or second is None or second.dtype is not ir.DataType.INT8:
        return None
    kinds = [kind] if kind is not None else [ir.DataType.INT8, ir.DataType.UINT8]  # behind an unknown operator
    bounds = [end + (_OFFSET if kind is ir.DataType.INT8 else 0) for kind in kinds for end in _range(data, kind)]
    if weight is None:  # computed while the graph runs: two of its smallest and two of its largest integers
        ends = np.repeat(_range(second, second.dtype), 2)
        weight = ends[None] if "Conv" in node.op_type else ends[:, None]
    name = str((source.source if source is not None and source.constant else second).name)
    return (min(bounds), max(bounds)), weight.astype(np.int64), name.removesuffix(".integers")


def _rows(node: ir.Node, weight: Integers) -> tuple[Integers, bool]:
    """Return a weight's values by output channel, (O, K), and whether its layer is depthwise."""
    if "Conv" in node.op_type:
        groups = node.attributes.get_int("group", 1)
        return weight.reshape(len(weight), -1), groups > 1 and groups == len(weight) and weight.shape[1:2] == (1,)
    if weight.ndim < 2:
        return weight.reshape(1, -1), False
    by_row = node.op_type in {"Gemm", "QGemm"} and node.attributes.get_int("transB", 0) == 1
    rows = weight if by_row else np.moveaxis(weight, -2, -1)
    return rows.reshape(-1, rows.shape[-1]), False


def _range(value: ir.Value | None, kind: ir.DataType | None) -> Range:
    """Return the integers that a tensor can have, by its type and by what bounds it."""
    ranges = [(-128, 127) if kind is ir.DataType.INT8 else (0, 255)]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "QuantizeLinear" and (grid := _grid(node)) is not None:
        ranges.append(_range_of_numbers(node.inputs[0], grid))
    elif node is not None and node.op_type == "Clip":
        ranges += _clip_ends(node, (1.0, 0)), _range(node.inputs[0], kind)
    elif node is not None and node.op_type != "Pad" and _is_bounded_by_inputs(node):
        ranges.append(_hull([_range(source, kind) for source in _moved(node)]))
    least, most = ranges[0]
    return min(max(low for low, _ in ranges), most), max(min(high for _, high in ranges), least)


def _range_of_numbers(value: ir.Value | None, grid: tuple[float, int]) -> Range:
    """Return the range of a tensor of floats, in integers of a grid: its scale and zero-point."""
    node = value.producer() if value is not None else None
    if node is None:
        return _ANY
    if node.op_type == "Relu":
        return grid[1], _ANY[1]
    if node.op_type == "Clip":
        return _clip_ends(node, grid)
    if node.op_type == "DequantizeLinear" and _grid(node) == grid:
        return _range(node.inputs[0], qdq.integer_type(node))
    if _is_bounded_by_inputs(node):
        padding = [(grid[1], grid[1])] if node.op_type == "Pad" else []  # constants other than 0 are not on a grid
        return _hull([*(_range_of_numbers(source, grid) for source in _moved(node)), *padding])
    return _ANY


def _grid(quantizer: ir.Node) -> tuple[float, int] | None:
    """Return a quantizer's scale and zero-point; None if they are not constants of one number."""
    scale, zero = qdq.constant(quantizer, 1), qdq.zero_point(quantizer)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if not (0 < scale.item() < math.inf and math.isfinite(zero.item())):
        return None
    return float(scale.item()), int(zero.item())


def _is_bounded_by_inputs(node: ir.Node) -> bool:
    """Return whether a node's values are values of its inputs (or zeros), or between them: not those of a cubic."""
    cubic = node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "cubic"
    return node.op_type in MOVING and not cubic


def _moved(node: ir.Node) -> list[ir.Value | None]:
    """Return the tensors whose values a node moves."""
    return list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])


def _clip_ends(clip: ir.Node, grid: tuple[float, int]) -> Range:
    """Return the ends of a Clip in integers of a grid: its scale and zero-point."""
    low, high = (_clip_end(qdq.constant(clip, index), grid) for index in (1, 2))
    return _ANY[0] if low is None else low, _ANY[1] if high is None else high


def _clip_end(end: npt.NDArray[np.float64] | None, grid: tuple[float, int]) -> int | None:
    """Return a bound of one number in integers of a grid, None if it is none."""
    if end is None or end.size != 1 or not math.isfinite(steps := float(end.item()) / grid[0]):
        return None
    return round(steps) + grid[1]


def _hull(ranges: list[Range]) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)
