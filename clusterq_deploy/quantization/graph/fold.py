"""Fold BatchNorm out of a captured graph, wherever that is exact, and write gated activations as products."""

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq_deploy.errors import GraphError
from clusterq_deploy.models.capture import device_of, random_images, relative_difference, require_same
from clusterq_deploy.models.rebuild import aten
from clusterq_deploy.quantization.graph.ops import shape_of

_FOLDED = 1e-3
"""The largest difference that rounded weights explain in most nets, over the logits' standard deviation."""
_EXACT_IN_DOUBLE = 1e-7
_GATES: dict[Any, Any] = {
    aten.silu.default: aten.sigmoid.default,
    aten.hardswish.default: aten.hardsigmoid.default,
}
"""Activations that are x * gate(x), by their gates: runtimes have integer kernels for the product only."""
_Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | _BatchNorm


def folded_teacher(captured: fx.GraphModule, *, merge: bool = False) -> fx.GraphModule:
    """Return a copy of a graph with BatchNorm folded, parameters free to be tuned: what a student starts from.

    A BatchNorm is folded into the layers in front of it, else into the layers behind it. One that is left has the
    reason in `meta["reason"]` of its node.

    Args:
        captured: from `models.capture.capture`; in float32, or in float64 to see that folding is exact.
        merge: whether convolutions that read the same tensor and are added become one; see `_merge_branches`.

    Raises:
        GraphError: the folded graph computes something else.
    """
    graph = copy.deepcopy(captured)
    _rewrite(graph, merge=merge)
    images = random_images(captured.meta["size"], device_of(graph)).to(next(graph.parameters()).dtype)
    try:
        require_same(captured, graph, images, "the folded graph", _FOLDED)
    except GraphError:
        if not _is_exact_in_double(captured, images, merge=merge):
            raise
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    return graph.eval()


def _rewrite(graph: fx.GraphModule, *, merge: bool) -> None:
    """Fold BatchNorm in a graph, write gated activations as products, and merge branches, in place."""
    _separate_calls(graph)
    for node in list(graph.graph.nodes):
        if (gate := _GATES.get(node.target)) is not None:
            _write_product(graph.graph, node, gate)
    for node in list(graph.graph.nodes):
        norm = module_of(graph, node)
        if isinstance(norm, _BatchNorm):
            _fold(graph, node, norm)
    for node in list(graph.graph.nodes):
        if merge and node.target is aten.add.Tensor:
            _merge_branches(graph, node)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


@torch.no_grad()
def _is_exact_in_double(captured: fx.GraphModule, images: Tensor, *, merge: bool) -> bool:
    """Return whether folding changes nothing in float64: what differs in float32 is then amplified rounding.

    Some nets do that on images unlike their training data: their own answers in the two precisions differ as much.
    """
    exact = copy.deepcopy(captured).double()
    folded = copy.deepcopy(exact)
    _rewrite(folded, merge=merge)
    try:
        return relative_difference(folded(images.double()), exact(images.double())) <= _EXACT_IN_DOUBLE
    except RuntimeError:  # it computes in a precision of its own
        return False


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the submodule that a node calls, or None."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _separate_calls(graph: fx.GraphModule) -> None:
    """Give each call of a shared layer parameters of its own: each is folded, scaled and tuned by its own values."""
    seen: set[nn.Parameter] = set()
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(parameter)


def _write_product(graph: fx.Graph, node: fx.Node, gate: Any) -> None:
    with graph.inserting_before(node):
        gated = graph.create_node("call_function", gate, (node.args[0],), name=gate.overloadpacket.__name__)
        product = graph.create_node("call_function", aten.mul.Tensor, (node.args[0], gated), name="mul")
    gated.meta, product.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _fold(graph: fx.GraphModule, node: fx.Node, norm: _BatchNorm) -> None:
    """Fold a BatchNorm into the layer in front of it or into those behind it; else note the reason at its node."""
    scale, shift = affine_of(norm)
    shifted = shift.is_meta or bool((shift != 0).any())
    front = _layers_in_front(graph, node, len(scale))
    for source, part in front:
        _scale_outputs(source, scale[part], shift[part])
    if not front:
        behind = _layers_behind(graph, node, shifted=shifted)
        if isinstance(behind, str):
            node.meta["reason"] = f"{_description(graph, node.args[0])} in front of it, {behind} behind it"
            return
        for layer in behind:
            _scale_inputs(layer, scale, shift)
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.graph.erase_node(node)


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return what a BatchNorm does in eval mode, scale * x + shift: both (C,) float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift


def _layers_in_front(graph: fx.GraphModule, norm: fx.Node, channels: int) -> list[tuple[_Layer, slice]]:
    """Return the layers whose outputs only this BatchNorm reads, through operations that keep channels.

    There are several behind a concatenation: each has the channels of its slice. Empty if it also reads anything else.
    """
    layers: list[tuple[_Layer, slice]] = []
    stack: list[tuple[Any, int, int, int]] = [(norm.args[0], 1, 0, channels)]  # a node, its axis, and its channels
    while stack:
        node, axis, start, end = stack.pop()
        if not isinstance(node, fx.Node) or len(node.users) > 1:
            return []
        layer = module_of(graph, node)
        if isinstance(layer, _Layer):
            if axis != (len(shape_of(node)) - 1 if isinstance(layer, nn.Linear) else 1):
                return []
            layers.append((layer, slice(start, end)))
        elif node.target is aten.cat.default and (len(node.args) > 1 and node.args[1] == axis):
            for source in cast(list[fx.Node], node.args[0]):
                stack.append((source, axis, start, start := start + (shape_of(source)[axis] or 0)))
        elif (before := _axis_before(node, axis)) is not None and shape_of(node.all_input_nodes[0])[
            before
        ] == end - start:
            stack.append((node.args[0], before, start, end))
        else:
            return []
    return layers if len({layer for layer, _ in layers}) == len(layers) else []  # a map may be there twice


def _layers_behind(graph: fx.GraphModule, norm: fx.Node, *, shifted: bool) -> list[nn.Conv2d | nn.Linear] | str:
    """Return all layers that read a BatchNorm, through operations that keep channels; else what prevents it."""
    layers: list[nn.Conv2d | nn.Linear] = []
    stack = [(user, norm, 1) for user in norm.users]
    while stack:
        node, source, axis = stack.pop()
        layer = module_of(graph, node)
        if isinstance(layer, nn.Conv2d) and axis == 1:
            if shifted and any(layer.padding):
                return f"a convolution ({node.target}) that pads with zeros"
            layers.append(layer)
        elif isinstance(layer, nn.Linear) and axis == len(shape_of(source)) - 1:
            layers.append(layer)
        else:
            after = _axis_after(node, source, axis)
            if after is None:
                return _description(graph, node)
            stack += [(user, node, after) for user in node.users]
    return layers or "nothing"


def _merge_branches(graph: fx.GraphModule, addition: fx.Node) -> None:
    """Make one convolution of two that read the same tensor and are added; one may be a BatchNorm that is left.

    That is how RepVGG (arXiv 2101.03697) is deployed: a smaller kernel is the middle of a larger one, and a BatchNorm
    a kernel of one pixel.
    """
    nodes = [node for node in addition.args if isinstance(node, fx.Node) and len(node.users) == 1]
    if len(nodes) < 2 or addition.kwargs or nodes[0].all_input_nodes != nodes[1].all_input_nodes:
        return
    layers = [module_of(graph, node) for node in nodes]
    area = [math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 0 for layer in layers]
    order = sorted((0, 1), key=area.__getitem__)
    small, large = (layers[i] for i in order)
    if not isinstance(large, nn.Conv2d) or not isinstance(small, nn.Conv2d | nn.BatchNorm2d):
        return
    if isinstance(small, nn.BatchNorm2d):
        small = _as_convolution(small, large.groups)
    if (weight := _embedded(small, large)) is None:
        return
    biases = [layer.bias.detach() for layer in (small, large) if layer.bias is not None]
    large.weight = nn.Parameter(large.weight.detach() + weight)
    large.bias = nn.Parameter(torch.stack(biases).sum(0)) if biases else None
    addition.replace_all_uses_with(nodes[order[1]])
    for node in (addition, nodes[order[0]]):
        graph.graph.erase_node(node)


def _as_convolution(norm: nn.BatchNorm2d, groups: int) -> nn.Conv2d:
    """Return a convolution of one pixel that computes what a BatchNorm does in eval mode."""
    scale, shift = affine_of(norm)
    channels = len(scale)
    layer = nn.Conv2d(channels, channels, 1, groups=groups)
    weight = torch.eye(channels // groups, dtype=scale.dtype, device=scale.device).repeat(groups, 1) * scale[:, None]
    layer.weight, layer.bias = (nn.Parameter(v.to(norm.running_mean)) for v in (weight[..., None, None], shift))
    return layer


def _embedded(small: nn.Conv2d, large: nn.Conv2d) -> Tensor | None:
    """Return the weight of a convolution inside the kernel of a larger one; None if their windows do not agree."""
    if (small.stride, small.groups, small.weight.shape[:2]) != (large.stride, large.groups, large.weight.shape[:2]):
        return None
    borders: list[int] = []
    for axis in (1, 0):
        inner, outer, dilation = small.kernel_size[axis], large.kernel_size[axis], large.dilation[axis]
        border, odd = divmod(outer - inner, 2)
        aligned = int(large.padding[axis]) - int(small.padding[axis]) == border * dilation
        if odd or not aligned or (inner > 1 and small.dilation[axis] != dilation):
            return None
        borders += [border, border]
    return F.pad(small.weight.detach(), borders)


def _description(graph: fx.GraphModule, node: Any) -> str:
    """Return what a node is, for a reason."""
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return "the image"
    layer = module_of(graph, node)
    return type(layer).__name__ if layer else {"output": "the output"}.get(node.op, node.name)


def _axis_before(node: fx.Node, axis: int) -> int | None:
    """Return where the channels at `axis` of a node's output are in its input; None if it mixes them."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or [n for n in node.all_input_nodes if n.op != "get_attr"] != [source]:
        return None
    candidates = [a for a in range(len(shape_of(source))) if _axis_after(node, source, a) == axis]
    return candidates[0] if len(candidates) == 1 else None


def _axis_after(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return where the channels at `axis` of a node's input are in its output; None if it mixes them.

    The operations are those that a multiplication and an addition per channel may be moved through.
    """
    before, after, target = shape_of(source), shape_of(node), node.target
    args: Any = node.args
    if axis >= len(before) or before[axis] is None or args[0] is not source:
        return None
    if target is aten.adaptive_avg_pool2d.default:
        return axis if axis == 1 and len(before) == 4 else None
    if target is aten.mean.dim:
        dims = {d % len(before) for d in args[1]}
        if axis in dims:
            return None
        return axis if len(after) == len(before) else axis - sum(d < axis for d in dims)
    if target is aten.transpose.int:
        first, second = (d % len(before) for d in args[1:3])
        return int({first: second, second: first}.get(axis, axis))
    if target is aten.permute.default:
        return int([d % len(before) for d in args[1]].index(axis))
    if target not in {aten.reshape.default, aten.flatten.using_ints}:
        return None
    if axis == len(before) - 1 and after[-1] == before[-1]:
        return len(after) - 1
    values = [math.prod(d or 0 for d in shape[1:]) for shape in (before, after)]  # of a sample; 0 if it is not known
    if axis == 1 and len(after) >= 2 and values[0] == values[1] > 0:
        return 1 if after[1] == before[1] or len(after) == 2 else None  # it may become a run of features
    return None


def _scale_outputs(layer: _Layer, scale: Tensor, shift: Tensor) -> None:
    """Make a layer compute scale * y + shift per channel of its outputs y, in place."""
    if isinstance(layer, _BatchNorm):
        layer.affine, dtype = True, cast(Tensor, layer.running_mean).dtype
        weight = scale if layer.weight is None else layer.weight.detach().double() * scale
    elif isinstance(layer, nn.ConvTranspose2d):
        dtype, inputs = layer.weight.dtype, len(layer.weight) // layer.groups
        columns = scale.view(layer.groups, 1, -1).expand(-1, inputs, -1).flatten(0, 1)
        weight = layer.weight.detach().double() * columns[..., None, None]
    else:
        dtype = layer.weight.dtype
        weight = layer.weight.detach().double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    layer.weight, layer.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))


def _scale_inputs(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Make a layer read scale * x + shift per channel of its inputs x, in place; a channel may be a run of features."""
    weight = layer.weight.detach().double()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    run = groups * weight.shape[1] // len(scale)
    columns, shifts = (v.repeat_interleave(run).view(groups, 1, -1, 1) for v in (scale, shift))
    grouped = weight.view(groups, len(weight) // groups, weight.shape[1], -1)
    bias = (grouped * shifts).sum((2, 3)).flatten()
    layer.weight = nn.Parameter((grouped * columns).view_as(weight).to(layer.weight.dtype))
    layer.bias = nn.Parameter(
        (bias if layer.bias is None else bias + layer.bias.detach().double()).to(layer.weight.dtype)
    )
