"""What the nodes of a captured graph do to values: which ones only move them, which ones bound or scale them."""

import math
import operator
from enum import Enum, auto
from typing import Any

from torch import fx

from clusterq_deploy.models.rebuild import Shape, aten

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)
_LOWEST = -1e30

_RELU = {aten.relu}
_BOUNDED = {aten.relu6, aten.hardtanh, aten.clamp, aten.clamp_min}
_GATES = {aten.sigmoid, aten.hardsigmoid}
_SOFTMAX = {aten.softmax, aten._softmax}
_MAX_POOLS = {aten.max_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d_with_indices}
_AVERAGE_POOLS = {aten.avg_pool2d, aten.adaptive_avg_pool2d}
_PADS = {aten.pad, aten.constant_pad_nd}
_SHUFFLES = {aten.pixel_shuffle, aten.channel_shuffle}
_SPLITS = {
    operator.getitem, aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.slice, aten.select,
    aten.index_select,
}  # fmt: skip
_RESHAPES = {aten.reshape, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.flatten, aten.expand}
_TRANSPOSES = {aten.permute, aten.transpose, aten.t, aten.roll, aten.flip}
_MAXIMA = {aten.max, aten.amax}
_RESIZES = {aten.upsample_nearest2d}
_MOVES = _MAX_POOLS | _SHUFFLES | _SPLITS | _RESHAPES | _TRANSPOSES | _MAXIMA | _RESIZES | {aten.cat}
_SLOPES = {aten.leaky_relu, aten.prelu}


class Homogeneity(Enum):
    """How a function f passes a positive scale on: f(s x) = s f(x), with a scale s for each channel.

    ELEMENTWISE functions do for any tensor, SPATIAL ones for (N, C, H, W), each channel by itself; FLATTENING ones
    turn each channel of that into a run of features; CLIPPED ones do as long as no value reaches the clip.
    """

    ELEMENTWISE = auto()
    SPATIAL = auto()
    FLATTENING = auto()
    CLIPPED = auto()


def operation(node: fx.Node) -> Any:
    """Return the ATen operation that a node calls, without its overload, or the function; None if it calls a module."""
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node reads and that depend on the image: no constants, no sizes."""
    sizes = {aten.sym_size, operator.mul, operator.add, operator.sub, operator.floordiv}
    return [n for n in node.all_input_nodes if n.op != "get_attr" and operation(n) not in sizes]


def shape_of(node: fx.Node) -> Shape:
    """Return the sizes of a node's output, None for one that depends on the batch; () if they are not known."""
    shape: Shape = node.meta.get("shape", ())
    return shape


def moves_values(node: fx.Node) -> bool:
    """Return whether a node's output holds only values of its inputs (and zeros), so that a grid passes through it."""
    called = operation(node)
    if called in _PADS:
        return _mode(node) != "constant" or _padding(node) == 0 or _pads_lowest(node)
    if called in _MAXIMA:
        return len(data_inputs(node)) == 1
    return called in _MOVES


def _padding(node: fx.Node) -> float:
    """Return the value that a padding with a constant puts around a tensor."""
    return float(argument(node, 3 if operation(node) is aten.pad else 2, "value") or 0)


def _pads_lowest(node: fx.Node) -> bool:
    """Return whether a padding has the lowest value, which no maximum behind it ever takes: it needs no grid."""
    return _padding(node) <= _LOWEST and all(operation(user) in _MAX_POOLS for user in node.users)


def _mode(node: fx.Node) -> str:
    """Return the mode of a padding."""
    return str(argument(node, 2, "mode", "constant")) if operation(node) is aten.pad else "constant"


def moved_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose values a node of `moves_values` moves, without the sizes that it may read too."""
    return data_inputs(node) if operation(node) is aten.cat else data_inputs(node)[:1]


def is_addition(node: fx.Node) -> bool:
    """Return whether a node adds two tensors that depend on the image."""
    plain = operation(node) is aten.add and "alpha" not in node.kwargs
    return plain and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args[:2])


def is_product(node: fx.Node) -> bool:
    """Return whether a node multiplies two tensors that depend on the image."""
    return operation(node) is aten.mul and len(data_inputs(node)) == 2


def is_gate(node: fx.Node) -> bool:
    """Return whether a node is a sigmoid or a hard sigmoid."""
    return operation(node) in _GATES


def is_rectifier(node: fx.Node) -> bool:
    """Return whether a node is a ReLU or ReLU6, which a runtime fuses into the convolution in front of it."""
    return operation(node) in _RELU or _bounds(node) == (0, 6)


def _bounds(node: fx.Node) -> Range | None:
    """Return between which numbers a node clips its input; None if it does not, or to a tensor's values."""
    called = operation(node)
    if called in _RELU:
        return 0, math.inf
    if called is aten.relu6:
        return 0, 6
    if called is aten.hardtanh:
        return float(argument(node, 1, "min_val", -1)), float(argument(node, 2, "max_val", 1))
    if called in {aten.clamp, aten.clamp_min}:
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if not isinstance(low, fx.Node) and not isinstance(high, fx.Node):
            return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return None


def activated(node: fx.Node) -> fx.Node | None:
    """Return what a node is a function of, if that is one tensor: its only input, or x if it is x * gate(x)."""
    inputs = data_inputs(node)
    if is_product(node):
        for x, gate in (inputs, reversed(inputs)):
            if is_gate(gate) and gate.all_input_nodes == [x]:
                return x
    return inputs[0] if len(inputs) == 1 else None


def homogeneity(node: fx.Node) -> Homogeneity | None:
    """Return how a node with one tensor input passes scales of channels on; None if it does not, or is not known to."""
    called = operation(node)
    if called in _RELU | _SLOPES:
        return Homogeneity.ELEMENTWISE
    if called in _MAX_POOLS | _AVERAGE_POOLS or (called in _PADS and _pads_space(node)):
        return Homogeneity.SPATIAL
    if _averages_space(node):
        return Homogeneity.SPATIAL if len(shape_of(node)) == 4 else Homogeneity.FLATTENING
    if is_rectifier(node):
        return Homogeneity.CLIPPED
    return Homogeneity.FLATTENING if _flattens(node) else None


def _averages_space(node: fx.Node) -> bool:
    """Return whether a node is the mean over height and width, which it keeps as dimensions or not."""
    if operation(node) is not aten.mean or len(shape_of(data_inputs(node)[0])) != 4:
        return False
    return {d % 4 for d in argument(node, 1, "dim") or ()} == {2, 3}


def _pads_space(node: fx.Node) -> bool:
    """Return whether a padding puts zeros around height and width, and none around the channels."""
    return len(argument(node, 1, "pad", ())) <= 4 and moves_values(node) and _mode(node) == "constant"


def _flattens(node: fx.Node) -> bool:
    """Return whether a node makes (N, C * H * W) of (N, C, H, W)."""
    if operation(node) not in {aten.reshape, aten.flatten}:
        return False
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    if len(before) != 4 or len(after) != 2 or None in before[1:]:
        return False
    return after[0] is None and after[1] == math.prod(d or 0 for d in before[1:])


def value_ranges(graph: fx.GraphModule) -> dict[fx.Node, Range]:
    """Return the interval that each node's values must be in, by what the operations are; infinite if unknown."""
    ranges: dict[fx.Node, Range] = {}
    for node in graph.graph.nodes:
        if moves_values(node):
            sources = moved_inputs(node)
        elif is_addition(node) or operation(node) is aten.mul:
            sources = [a for a in node.args[:2] if isinstance(a, fx.Node)]  # the same tensor may be there twice
        else:
            sources = data_inputs(node)
        ranges[node] = _range(node, [ranges.get(source, _ANY) for source in sources])
    return ranges


def _range(node: fx.Node, inputs: list[Range]) -> Range:
    """Return the interval of a node's values, from those of its inputs."""
    if not inputs:
        return _ANY
    called = operation(node)
    lows, highs = zip(*inputs, strict=True)
    if called in _GATES | _SOFTMAX:
        return 0, 1
    if (bounds := _bounds(node)) is not None:
        low, high = bounds
        return max(low, min(lows[0], high)), min(high, max(highs[0], low))
    if moves_values(node):
        zero = (0,) if called in _PADS and _mode(node) == "constant" and _padding(node) == 0 else ()
        return min(lows + zero), max(highs + zero)
    if called in _AVERAGE_POOLS or called is aten.mean:
        return inputs[0]
    if is_addition(node):
        return sum(lows), sum(highs)
    if called is aten.mul and len(inputs) == 2 and min(lows) >= 0:
        high = highs[0] * highs[1]
        return 0, high if math.isfinite(high) else math.inf
    return _ANY
