"""What the nodes of a traced graph do to values: which ones only move them, which ones bound or scale them."""

import math
import operator
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from clusterq_deploy.quantization.graph.trace import module_of

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)

# what nodes call: types of modules, functions, and names of methods
_RELU = {nn.ReLU, F.relu, torch.relu, "relu"}
_RELU6 = {nn.ReLU6, F.relu6}
_GATES = {nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", nn.Hardsigmoid, F.hardsigmoid}
_SOFTMAX = {nn.Softmax, F.softmax}
_MAX_POOLS = {nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d}
_AVERAGE_POOLS = {nn.AvgPool2d, F.avg_pool2d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d}
_MEANS = {torch.mean, "mean"}
_IDENTITIES = {nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous"}
_PADS = {F.pad, nn.ZeroPad2d, nn.ConstantPad2d}
_SHUFFLES = {nn.PixelShuffle, F.pixel_shuffle, nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle}
_SPLITS = {operator.getitem, torch.chunk, "chunk", torch.split, "split"}
_RESHAPES = {nn.Unflatten, torch.reshape, "reshape", "view", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"}
_FLATTENS = {nn.Flatten, torch.flatten, "flatten"}
_TRANSPOSES = {torch.permute, "permute", torch.transpose, "transpose"}
_MOVES = _MAX_POOLS | _IDENTITIES | _SHUFFLES | _SPLITS | _RESHAPES | _FLATTENS | _TRANSPOSES
_CONCATENATIONS = {torch.cat, torch.concat}
_ADDITIONS = {operator.add, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, torch.mul}
_SLOPES = {nn.LeakyReLU, F.leaky_relu, nn.PReLU}

_BOUNDS: dict[Any, Range] = {
    **dict.fromkeys(_RELU, (0, math.inf)),
    **dict.fromkeys(_RELU6, (0, 6)),
    **dict.fromkeys(_GATES | _SOFTMAX, (0, 1)),
}


class Homogeneity(Enum):
    """How a function f passes a positive scale on: f(s x) = s f(x), with a scale s for each channel.

    ELEMENTWISE functions do for any tensor, SPATIAL ones for (N, C, H, W), each channel by itself; FLATTENING ones
    turn each channel of that into a run of features; CLIPPED ones do as long as no value reaches the clip.
    """

    ELEMENTWISE = auto()
    SPATIAL = auto()
    FLATTENING = auto()
    CLIPPED = auto()


def _callee(traced: fx.GraphModule, node: fx.Node) -> Any:
    """Return what a node calls: a function, a method's name, or a module's type; None if it calls nothing."""
    module = module_of(traced, node)
    if module is not None:
        return type(module)
    return node.target if node.op in {"call_function", "call_method"} else None


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """Return an argument of a call by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def moves_values(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node's output holds only values of its inputs (and zeros), so that a grid passes through it."""
    module, callee = module_of(traced, node), _callee(traced, node)
    if isinstance(module, nn.ConstantPad2d):
        return bool(module.value == 0)
    if isinstance(module, nn.Upsample):
        return module.mode == "nearest"
    if callee is F.pad:
        return bool(node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value"))
    if callee is F.interpolate:
        return bool(node.kwargs.get("mode", "nearest") == "nearest")
    return callee in _MOVES or callee in _CONCATENATIONS


def moved_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose values a node of `moves_values` moves, without the sizes that it may read too."""
    if node.op == "call_function" and node.target in _CONCATENATIONS:
        return node.all_input_nodes
    return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else node.all_input_nodes[:1]


def is_addition(node: fx.Node) -> bool:
    """Return whether a node adds two tensors."""
    calls = node.op in {"call_function", "call_method"} and node.target in _ADDITIONS
    scaled = node.kwargs.get("alpha", 1) != 1
    return calls and not scaled and len(node.args) >= 2 and all(isinstance(a, fx.Node) for a in node.args[:2])


def is_product(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node multiplies two tensors."""
    return _callee(traced, node) in _PRODUCTS and len(node.all_input_nodes) == 2


def is_gate(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is a sigmoid or a hard sigmoid."""
    return _callee(traced, node) in _GATES


def is_rectifier(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is a ReLU or ReLU6, which a runtime fuses into the convolution in front of it."""
    return _callee(traced, node) in _RELU | _RELU6


def activated(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return what a node is a function of, if that is one tensor: its only input, or x if it is x * gate(x)."""
    inputs = node.all_input_nodes
    if is_product(traced, node):
        for x, gate in (inputs, reversed(inputs)):
            if is_gate(traced, gate) and gate.all_input_nodes == [x]:
                return x
    return inputs[0] if len(inputs) == 1 else None


def homogeneity(traced: fx.GraphModule, node: fx.Node) -> Homogeneity | None:
    """Return how a node with one tensor input passes scales of channels on; None if it does not, or is not known to."""
    callee = _callee(traced, node)
    if callee in _RELU | _SLOPES | _IDENTITIES:
        return Homogeneity.ELEMENTWISE
    if callee in _MAX_POOLS | _AVERAGE_POOLS or (callee in _PADS and _pads_space(traced, node)):
        return Homogeneity.SPATIAL
    if callee in _RELU6:
        return Homogeneity.CLIPPED
    return Homogeneity.FLATTENING if callee in _FLATTENS and _flattens(traced, node) else None


def _pads_space(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a padding puts zeros around height and width, and none around the channels."""
    widths = _argument(node, 1, "pad", ())
    two = node.op == "call_module" or (isinstance(widths, list | tuple) and len(widths) <= 4)
    return two and moves_values(traced, node)


def _flattens(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node, a call of flatten, makes (N, C * H * W) of (N, C, H, W)."""
    module = module_of(traced, node)
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    return bool(_argument(node, 1, "start_dim", 0) == 1 and _argument(node, 2, "end_dim", -1) == -1)


def value_ranges(traced: fx.GraphModule) -> dict[fx.Node, Range]:
    """Return the interval that each node's values must be in, by what the operations are; infinite if unknown."""
    ranges: dict[fx.Node, Range] = {}
    for node in traced.graph.nodes:
        if moves_values(traced, node):
            sources = moved_inputs(node)
        elif is_addition(node) or _callee(traced, node) in _PRODUCTS:
            sources = [a for a in node.args[:2] if isinstance(a, fx.Node)]  # the same tensor may be there twice
        else:
            sources = node.all_input_nodes
        ranges[node] = _range(traced, node, [ranges[source] for source in sources])
    return ranges


def _range(traced: fx.GraphModule, node: fx.Node, inputs: list[Range]) -> Range:
    """Return the interval of a node's values, from those of its inputs."""
    if not inputs:
        return _ANY
    callee, module = _callee(traced, node), module_of(traced, node)
    lows, highs = zip(*inputs, strict=True)
    if callee in _BOUNDS:
        low, high = _BOUNDS[callee]
        return low, min(high, max(highs[0], low))
    if isinstance(module, nn.Hardtanh) and callee is nn.Hardtanh:
        return float(module.min_val), float(module.max_val)
    if moves_values(traced, node):
        zero = (0,) if callee in _PADS else ()
        return min(lows + zero), max(highs + zero)
    if callee in _AVERAGE_POOLS | _MEANS:
        return inputs[0]
    if is_addition(node):
        return sum(lows), sum(highs)
    if callee in _PRODUCTS and len(inputs) == 2 and min(lows) >= 0:
        high = highs[0] * highs[1]
        return 0, high if math.isfinite(high) else math.inf
    return _ANY
