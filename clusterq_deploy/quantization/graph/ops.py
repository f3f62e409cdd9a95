"""What the nodes of a traced graph do to values: which ones move them only, which ones bound them."""

import math
import operator
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from clusterq_deploy.quantization.graph.trace import module_of, tensor_inputs

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)

_MOVING_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.ZeroPad2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)
_MOVING_FUNCTIONS = {
    F.max_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
    F.channel_shuffle,
    F.pixel_shuffle,
    operator.getitem,
    torch.channel_shuffle,
    torch.chunk,
    torch.flatten,
    torch.max_pool2d,
    torch.permute,
    torch.reshape,
    torch.split,
    torch.squeeze,
    torch.transpose,
    torch.unsqueeze,
}
_MOVING_METHODS = {
    "chunk", "contiguous", "flatten", "permute", "reshape", "split", "squeeze", "transpose", "unsqueeze", "view",
}  # fmt: skip
_CONCATENATIONS = {torch.cat, torch.concat}
_ADDITIONS = {operator.add, torch.add}
_PRODUCTS = {operator.mul, torch.mul}
_AVERAGES = {F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean}

_BOUNDS: dict[Any, Range] = {
    nn.ReLU: (0, math.inf), F.relu: (0, math.inf), torch.relu: (0, math.inf), "relu": (0, math.inf),
    nn.ReLU6: (0, 6), F.relu6: (0, 6),
    nn.Sigmoid: (0, 1), F.sigmoid: (0, 1), torch.sigmoid: (0, 1), "sigmoid": (0, 1),
    nn.Hardsigmoid: (0, 1), F.hardsigmoid: (0, 1),
    nn.Softmax: (0, 1), F.softmax: (0, 1),
}  # fmt: skip
_GATES = {
    nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", nn.Hardsigmoid, F.hardsigmoid,
}  # fmt: skip
_RECTIFIERS = {nn.ReLU, F.relu, torch.relu, "relu", nn.ReLU6, F.relu6}
_ELEMENTWISE = {
    nn.ReLU, F.relu, torch.relu, "relu", nn.LeakyReLU, F.leaky_relu, nn.PReLU,
    nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous",
}  # fmt: skip
_SPATIAL = {
    nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d,
    nn.AvgPool2d, F.avg_pool2d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d,
}  # fmt: skip


class Homogeneity(Enum):
    """How a function f passes a positive scale on: f(s x) = s f(x), with a scale s for each channel.

    ELEMENTWISE functions do for any tensor, SPATIAL ones for (N, C, H, W), each channel by itself; FLATTENING ones
    turn each channel of that into a run of features; CLIPPED ones do as far as no value reaches the clip.
    """

    ELEMENTWISE = auto()
    SPATIAL = auto()
    FLATTENING = auto()
    CLIPPED = auto()


def _identity(traced: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls: a function, a method's name, or a module's type."""
    module = module_of(traced, node)
    return type(module) if module is not None else node.target


def moves_values(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's output holds only values of its inputs (and zeros), so that a grid passes through it."""
    if node.op == "call_module":
        module = module_of(traced, node)
        if isinstance(module, nn.ConstantPad2d):
            return bool(module.value == 0)
        return isinstance(module, _MOVING_MODULES) or (isinstance(module, nn.Upsample) and module.mode == "nearest")
    if node.op == "call_function":
        if node.target is F.pad:
            return bool(node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value"))
        if node.target is F.interpolate:
            return bool(node.kwargs.get("mode", "nearest") == "nearest")
        return node.target in _MOVING_FUNCTIONS or node.target in _CONCATENATIONS
    return node.op == "call_method" and node.target in _MOVING_METHODS


def moved_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values a node of `moves_values` moves; the sizes that it may read too are left out."""
    if node.op == "call_function" and node.target in _CONCATENATIONS:
        return tensor_inputs(node)
    return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else tensor_inputs(node)[:1]


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two tensors."""
    named = node.op == "call_function" and node.target in _ADDITIONS
    named = named or (node.op == "call_method" and node.target in {"add", "add_"})
    scaled = node.kwargs.get("alpha", 1) != 1
    return named and not scaled and len(node.args) >= 2 and all(isinstance(a, fx.Node) for a in node.args[:2])


def is_product(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node multiplies two tensors."""
    return _identity(traced, node) in _PRODUCTS and len(tensor_inputs(node)) == 2


def is_gate(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a sigmoid or a hard sigmoid."""
    return _identity(traced, node) in _GATES


def activated(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a node is a function of, if that is one tensor: its only input, or x where it is x * gate(x)."""
    inputs = tensor_inputs(node)
    if is_product(traced, node):
        for x, gate in (inputs, reversed(inputs)):
            if is_gate(traced, gate) and tensor_inputs(gate) == [x]:
                return x
    return inputs[0] if len(inputs) == 1 else None


def is_rectifier(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a ReLU or ReLU6, which a runtime fuses into the convolution in front of it."""
    return _identity(traced, node) in _RECTIFIERS


def homogeneity(traced: fx.GraphModule, node: fx.Node) -> Homogeneity | None:
    """How a node with one tensor input passes scales of channels on; None where it does not, or is not known to."""
    kind = _identity(traced, node)
    if kind in _ELEMENTWISE:
        return Homogeneity.ELEMENTWISE
    if kind in _SPATIAL or (kind in {F.pad, nn.ZeroPad2d, nn.ConstantPad2d} and _pads_space(traced, node)):
        return Homogeneity.SPATIAL
    if kind in {nn.ReLU6, F.relu6}:
        return Homogeneity.CLIPPED
    return Homogeneity.FLATTENING if _flattens(traced, node) else None


def _pads_space(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a padding puts zeros around height and width, and none around the channels."""
    widths = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    two = node.op == "call_module" or (isinstance(widths, list | tuple) and len(widths) <= 4)
    return two and moves_values(traced, node)


def _flattens(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes (N, C * H * W) of (N, C, H, W)."""
    module = module_of(traced, node)
    if isinstance(module, nn.Flatten):
        return bool(module.start_dim == 1 and module.end_dim == -1)
    if node.target not in {torch.flatten, "flatten"}:
        return False
    dims = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
    return bool(dims.get("start_dim", 0) == 1 and dims.get("end_dim", -1) == -1)


def value_ranges(traced: fx.GraphModule) -> dict[fx.Node, Range]:
    """The interval that each node's values must lie in, by what the operations are; infinite where unknown."""
    ranges: dict[fx.Node, Range] = {}
    for node in traced.graph.nodes:
        if moves_values(traced, node):
            sources = moved_inputs(node)
        elif is_addition(node) or _identity(traced, node) in _PRODUCTS:
            sources = [a for a in node.args[:2] if isinstance(a, fx.Node)]  # the same tensor may stand there twice
        else:
            sources = tensor_inputs(node)
        ranges[node] = _range(traced, node, [ranges[source] for source in sources])
    return ranges


def _range(traced: fx.GraphModule, node: fx.Node, inputs: list[Range]) -> Range:
    if not inputs:
        return _ANY
    kind = _identity(traced, node)
    if kind in _BOUNDS:
        low, high = _BOUNDS[kind]
        return low, min(high, max(inputs[0][1], low))
    if kind is nn.Hardtanh:
        module = module_of(traced, node)
        return (float(module.min_val), float(module.max_val)) if isinstance(module, nn.Hardtanh) else _ANY
    if moves_values(traced, node):
        padded = kind in {F.pad, nn.ZeroPad2d, nn.ConstantPad2d}
        lows, highs = [low for low, _ in inputs], [high for _, high in inputs]
        return min([*lows, 0] if padded else lows), max([*highs, 0] if padded else highs)
    if kind in _AVERAGES or kind in {nn.AvgPool2d, nn.AdaptiveAvgPool2d, "mean"}:
        return inputs[0]
    if is_addition(node):
        return sum(low for low, _ in inputs), sum(high for _, high in inputs)
    if kind in _PRODUCTS and len(inputs) == 2 and min(inputs[0][0], inputs[1][0]) >= 0:
        return 0, inputs[0][1] * inputs[1][1] if math.isfinite(inputs[0][1] * inputs[1][1]) else math.inf
    return _ANY
