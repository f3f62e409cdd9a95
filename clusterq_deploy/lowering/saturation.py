"""Whether a graph's integer products fit 16 bits in pairs: on x86 CPUs without VNNI they are added there.

Before VNNI, x86 multiplies eight bits by `vpmaddubsw`: UINT8 times INT8, two neighbouring products of a row added in 16
bits, with saturation. ONNX Runtime's kernels for convolutions, grouped ones too, and for matrix products do so with
INT8 weights; INT8 activations they turn into UINT8 first, by adding 128. UINT8 weights, and depthwise convolutions, are
multiplied in 16 and added in 32 bits. So measured with ONNX Runtime 1.31.1, with AVX2 and with AVX-512.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from clusterq_deploy.errors import ExportError, VerificationError
from clusterq_deploy.lowering.lower import MOVING
from clusterq_deploy.lowering.qdq import constant, integer_type, name_of, producer, stored_integers
from clusterq_deploy.lowering.trt_rules import Break

INT16_MAX = 2**15 - 1
_OFFSET = 128  # of INT8 activations, in the kernels
_TYPES = {ir.DataType.UINT8: (0, 255), ir.DataType.INT8: (-128, 127)}

_INTEGER = {
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
}
"""Operators on integers, with the places of their data and weight."""

Range = tuple[int, int]
_ANY: Range = (-(2**31), 2**31)
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairSum:
    """The largest sum of two products of a layer, of one output channel.

    Attributes:
        node: name of the layer's node.
        weight: name of its weight; of what it reads second, where it has none.
        channel: the output channel of the largest sum.
        largest: the sum of largest magnitude that two products of this channel can have.
        depthwise: whether each output channel reads one input channel of its own, which ONNX Runtime adds in 32 bits.
    """

    node: str
    weight: str
    channel: int
    largest: int
    depthwise: bool

    @property
    def fits(self) -> bool:
        """Whether 16 bits hold the sum."""
        return -INT16_MAX - 1 <= self.largest <= INT16_MAX


def pair_sums(model: onnx.ModelProto) -> list[PairSum]:
    """Return the largest sum of two products of each layer that multiplies UINT8 or INT8 with INT8, in graph order.

    From the integers alone: the weights, and the range that activations can have by their type and the bounds behind
    their quantizers. Whichever products of a row a kernel adds in pairs, no sum is larger.

    Args:
        model: any exporter's, with QuantizeLinear and DequantizeLinear around float layers, or with integer operators.

    Raises:
        ExportError: it is no valid ONNX.
    """
    try:
        graph = ir.from_proto(model)
    except (ir.serde.SerdeError, ValueError, TypeError) as error:
        raise ExportError(f"the graph is no valid ONNX: {str(error).strip().splitlines()[0]}") from error
    nodes = [*ir.traversal.RecursiveGraphIterator(graph.graph)]
    for function in graph.functions.values():
        nodes += ir.traversal.RecursiveGraphIterator(function)
    return [found for node in nodes if (found := _pair_sum(node)) is not None]


def check_saturation(model: onnx.ModelProto) -> list[Break]:
    """Return a warning for each layer that saturates on x86 CPUs without VNNI in ONNX Runtime.

    Args, Raises: as for `pair_sums`.
    """
    return [
        Break("saturation", "warning", own.node, _message(own))
        for own in pair_sums(model)
        if not own.fits and not own.depthwise
    ]


def require_no_saturation(model: onnx.ModelProto, *, name: str) -> int:
    """Return the largest magnitude of a sum of two products in a graph, 0 where it has none.

    Depthwise layers count too: another runtime's kernel may add them in pairs.

    Args:
        model: the graph.
        name: what messages call it.

    Raises:
        VerificationError: 16 bits do not hold a sum.
    """
    found = pair_sums(model)
    worst = next((own for own in found if not own.fits), None)
    if worst is not None:
        raise VerificationError(f"{name} saturates at {worst.node}: {_message(worst)}; the file is not written")
    return max((abs(own.largest) for own in found), default=0)


def _message(own: PairSum) -> str:
    return (
        f"two products of output channel {own.channel} of {own.weight} add up to {own.largest:,}, and 16 bits hold "
        f"-32,768 to 32,767: x86 CPUs without VNNI saturate; give the weight 7 bits (reduce_range)"
    )


def _pair_sum(node: ir.Node) -> PairSum | None:
    """The largest sum of a node, None if it is no layer of such integers."""
    operands = _operands(node)
    if operands is None:
        return None
    (low, high), weight, name = operands
    rows, depthwise = _rows(node, weight)
    if rows.size == 0:
        return None
    products = np.sort(np.stack([rows * low, rows * high]), axis=0)  # the smallest and the largest of each weight
    pair = min(2, rows.shape[1])
    least = np.partition(products[0], pair - 1, axis=1)[:, :pair]
    most = -np.partition(-products[1], pair - 1, axis=1)[:, :pair]
    # a row of an odd length is filled up with a product of zero
    bottom, top = np.minimum(least.sum(1), least.min(1)), np.maximum(most.sum(1), most.max(1))
    magnitude = np.maximum(-bottom, top)
    channel = int(magnitude.argmax())
    largest = int(top[channel] if top[channel] >= -bottom[channel] else bottom[channel])
    return PairSum(name_of(node), name, channel, largest, depthwise)


def _operands(node: ir.Node) -> tuple[Range, Integers, str] | None:
    """What a node multiplies: the range of its data as UINT8, and the integers of its weight, with the weight's name.

    None where it is no layer on integers, or one with UINT8 weights, which are multiplied in 16 bits.
    """
    if node.op_type in {"Conv", "Gemm", "MatMul"} and not node.domain:
        makers = [producer(value, "DequantizeLinear") for value in node.inputs[:2]]
        if makers[0] is None or makers[1] is None:
            return None
        data, second = makers[0].inputs[0], makers[1].inputs[0]
        kinds = [integer_type(maker) for maker in makers if maker is not None]
        stored = stored_integers(makers[1])
    elif node.op_type in _INTEGER and node.domain in {"", "com.microsoft"}:
        data, second = (node.inputs[place] for place in _INTEGER[node.op_type])
        kinds = [None if value is None else value.dtype for value in (data, second)]
        stored = constant(node, _INTEGER[node.op_type][1])
    else:
        return None
    if data is None or second is None or kinds[1] is not ir.DataType.INT8:
        return None
    low, high = _range(data, kinds[0])
    offset = _OFFSET if kinds[0] is ir.DataType.INT8 else 0
    if stored is None:  # computed while the graph runs: two of its smallest and two of its largest integers
        ends = _range(second, kinds[1])
        stored = np.repeat(np.array(ends), 2).reshape(1, -1) if "Conv" in node.op_type else np.repeat(ends, 2)[:, None]
    return (low + offset, high + offset), stored.astype(np.int64), str(second.name).removesuffix(".integers")


def _rows(node: ir.Node, weight: Integers) -> tuple[Integers, bool]:
    """A weight's values by output channel, (O, K), and whether its layer is depthwise."""
    if "Conv" in node.op_type:
        groups = node.attributes.get_int("group", 1)
        return weight.reshape(len(weight), -1), groups > 1 and groups == len(weight) and weight.shape[1] == 1
    if weight.ndim < 2:
        return weight.reshape(1, -1), False
    by_row = node.op_type in {"Gemm", "QGemm"} and node.attributes.get_int("transB", 0) == 1
    rows = weight if by_row else np.moveaxis(weight, -2, -1)
    return rows.reshape(-1, rows.shape[-1]), False


def _range(value: ir.Value | None, kind: ir.DataType | None) -> Range:
    """The integers that a tensor can have, by its type and by what bounds it."""
    low, high = _TYPES.get(kind or ir.DataType.UNDEFINED, _TYPES[ir.DataType.UINT8])
    node = value.producer() if value is not None else None
    if node is None:
        return low, high
    bounds = (low, high)
    if node.op_type == "QuantizeLinear":
        scale, zero = constant(node, 1), constant(node, 2) if len(node.inputs) > 2 else np.zeros(1)
        if scale is not None and zero is not None and scale.size == zero.size == 1:
            bounds = _range_of_numbers(node.inputs[0], (float(scale.item()), int(zero.item())))
    elif node.op_type == "Clip":
        bounds = _intersection(_ends(node, (1.0, 0)), _range(node.inputs[0], kind))
    elif node.op_type in MOVING - {"Pad"}:
        bounds = _hull([_range(source, kind) for source in _moved(node)])
    return _intersection((low, high), bounds)


def _range_of_numbers(value: ir.Value | None, steps: tuple[float, int]) -> Range:
    """The same of a tensor of floats, in integers of a grid: its scale and zero-point."""
    node = value.producer() if value is not None else None
    if node is None:
        return _ANY
    if node.op_type == "Relu":
        return steps[1], _ANY[1]
    if node.op_type == "Clip":
        return _ends(node, steps)
    if node.op_type == "DequantizeLinear":
        grid = [constant(node, 1), constant(node, 2) if len(node.inputs) > 2 else np.zeros(1)]
        same = all(own is not None and own.size == 1 and own.item() == n for own, n in zip(grid, steps, strict=True))
        return _range(node.inputs[0], integer_type(node)) if same else _ANY
    if node.op_type in MOVING:
        padding = [(steps[1], steps[1])] if node.op_type == "Pad" else []  # constants other than 0 are not on a grid
        return _hull([*(_range_of_numbers(source, steps) for source in _moved(node)), *padding])
    return _ANY


def _moved(node: ir.Node) -> list[ir.Value | None]:
    """The tensors whose values a node moves."""
    return list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])


def _ends(clip: ir.Node, steps: tuple[float, int]) -> Range:
    """The ends of a Clip on a grid of that scale and zero-point."""
    low, high = (constant(clip, index) if len(clip.inputs) > index else None for index in (1, 2))
    scale, zero = steps
    return (
        _ANY[0] if low is None else round(float(low.item()) / scale) + zero,
        _ANY[1] if high is None else round(float(high.item()) / scale) + zero,
    )


def _intersection(first: Range, second: Range) -> Range:
    return max(first[0], second[0]), min(first[1], second[1])


def _hull(ranges: list[Range]) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)
