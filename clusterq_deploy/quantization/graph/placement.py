"""Where quantizers go: chosen by the graph, so that every quantized layer is one that the targets can run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from torch import fx, nn

from clusterq_deploy.errors import GraphError
from clusterq_deploy.models.rebuild import Probabilities, aten
from clusterq_deploy.quantization.graph.fold import module_of
from clusterq_deploy.quantization.graph.ops import (
    activated,
    is_addition,
    is_gate,
    is_product,
    is_rectifier,
    moved_inputs,
    moves_values,
    operation,
    value_ranges,
)
from clusterq_deploy.quantization.grid import BitWidths, Cpu, Grid, pair_limit

Target = Literal["onnxruntime", "tensorrt"]
TARGETS: tuple[Target, ...] = ("onnxruntime", "tensorrt")
_EIGHT = 8
_COMPUTED_WEIGHTS = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.scaled_dot_product_attention,
}  # fmt: skip
"""Operations that are a layer only if their weights are constants, which capture then makes a module."""


@dataclass(frozen=True)
class ActivationSite:
    """A quantizer behind the outputs of `producers` (several if a concatenation shares one scale).

    `targets` are the runtimes whose graph has it: ONNX Runtime needs one behind every convolution and factor,
    TensorRT none between a convolution and the residual add that it fuses. `readers` are the only layers that read it,
    behind the 8-bit quantizer that all others read; without any, everything reads it.
    """

    name: str
    producers: tuple[str, ...]
    grid: Grid
    limit: float
    targets: tuple[Target, ...]
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightSite:
    """A quantizer, per output channel, on the weight of `layer`, whose input has the quantizer `input_site`.

    `pair_limit` is the largest sum of two integers of an output channel in ONNX Runtime's graph, None for no limit.
    """

    name: str
    layer: str
    grid: Grid
    input_site: str
    pair_limit: int | None = None


@dataclass(frozen=True)
class Placement:
    """All quantizers of a student, and the layers that stay in float with the reason."""

    activations: tuple[ActivationSite, ...]
    weights: tuple[WeightSite, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def place(
    graph: fx.GraphModule,
    bits: BitWidths,
    *,
    quantize_first_last: bool = False,
    layer_bits: Mapping[str, int] | None = None,
    cpu: Cpu = "any",
) -> Placement:
    """Decide on every quantizer of a folded graph.

    - The input of each Conv2d, ConvTranspose2d and Linear is quantized, where its values are made: behind the ReLU in
      front of a max-pool, behind each branch of a concatenation, so that what only moves values keeps their grid.
    - At an addition the identity branch is quantized, the branch that ends in a convolution is not (it is fused).
    - Only for ONNX Runtime, the output of a convolution that nothing else quantizes has an 8-bit quantizer (not of a
      transposed one, for which it has no integer kernel), and so has a factor of a product (SiLU, hard-swish,
      squeeze-excite), which is then computed on integers.
    - What layers read has the given width. The image and what additions read have 8 bits: a sum computes in INT8 at
      any width, and the errors of narrow grids would add up along a residual trunk. A tensor that both read has an
      8-bit quantizer, and behind it, for the layers, a narrow one.

    Args:
        graph: from `folded_teacher`.
        bits: widths of weights and activations.
        quantize_first_last: False keeps the first and last layers at 8 bits: their weights, what they read, and what
            the first one writes through its activation, as in BRECQ (arXiv 2102.05426) and Genie (CVPR 2023). A stem
            has few channels, and what four bits lose of them no later layer can fix.
        layer_bits: widths of single layers, by name: of the weight, and of what the layer reads. Layers that read the
            same tensor share the widest.
        cpu: `any` limits the weights' sums in ONNX Runtime's graph, so that no CPU saturates; see `pair_limit`.

    Raises:
        GraphError: `layer_bits` names no quantized layer.
    """
    layers, skipped = _layers(graph)
    layer_bits = layer_bits or {}
    _require_layers(layer_bits, [str(node.target) for node in layers])
    ranges = value_ranges(graph)
    first, last = _ends(graph, layers)
    wide = set() if quantize_first_last else first | last
    transposed = {node for node in layers if isinstance(module_of(graph, node), nn.ConvTranspose2d)}

    def activation_site(
        name: str,
        nodes: Sequence[fx.Node],
        width: int,
        targets: tuple[Target, ...] = TARGETS,
        readers: Sequence[str] = (),
    ) -> ActivationSite:
        low, high = min(ranges[node][0] for node in nodes), max(ranges[node][1] for node in nodes)
        limit = high if low >= 0 and high > 0 else math.inf
        grid = Grid(width, signed=low < 0)
        return ActivationSite(name, tuple(node.name for node in nodes), grid, limit, targets, tuple(readers))

    demands: list[tuple[list[fx.Node], int]] = []  # producers that share a quantizer, and its width; 0 for any
    for node in layers:
        producers = _producers(node.all_input_nodes[0])
        eight = node in wide | first or _reads_image_or(wide & first, producers)
        demands.append((producers, _EIGHT if eight else layer_bits.get(str(node.target), bits.activations)))
    depths, added = _depths(graph), set[fx.Node]()
    for node in filter(is_addition, graph.graph.nodes):
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        fusable = [a for a in operands if a in layers and a not in transposed and len(a.users) == 1]
        fused = max(fusable, key=depths.__getitem__, default=None)
        for producers in (_producers(a) for a in operands if a is not fused):
            added.update(producers)
            if fused is not None:
                demands.append((producers, 0))
    activations: list[ActivationSite] = []
    narrow: dict[fx.Node, int] = {}  # producers that additions read too, and the width for the layers
    for nodes, demanded in _groups(graph, demands):
        width = demanded or _EIGHT
        if width < _EIGHT and not added.isdisjoint(nodes):
            narrow |= dict.fromkeys(nodes, width)
            width = _EIGHT
        activations.append(activation_site(nodes[0].name, nodes, width))
    owner = {name: site.name for site in activations for name in site.producers}
    outputs = [_fused_output(node) for node in layers if node not in last | transposed]
    for node in (*outputs, *_factors(graph, owner)):
        if node.name not in owner:
            activations.append(activation_site(node.name, [node], _EIGHT, ("onnxruntime",)))
            owner[node.name] = node.name
    sources = dict.fromkeys(node.all_input_nodes[0] for node in layers)
    input_sites: dict[fx.Node, str] = {}
    for source in sources:
        readers = [node for node in layers if node.all_input_nodes[0] is source]
        producer = _producers(source)[0]
        name = owner[producer.name]
        if producer in narrow:
            name = f"{source.name}.narrow"
            site = activation_site(name, [source], narrow[producer], readers=[node.name for node in readers])
            activations.append(site)
        input_sites |= dict.fromkeys(readers, name)
    grids = {site.name: site.grid for site in activations}

    def weight_site(node: fx.Node) -> WeightSite:
        name, read = str(node.target), input_sites[node]
        grid = Grid(layer_bits.get(name, _EIGHT if node in wide else bits.weights), signed=True)
        # ONNX Runtime runs a transposed one in float
        limit = pair_limit(grid, grids[read]) if cpu == "any" and node not in transposed else None
        return WeightSite(f"{name}.weight", name, grid, read, limit)

    return Placement(tuple(activations), tuple(map(weight_site, layers)), skipped)


def _require_layers(names: Iterable[str], layers: list[str]) -> None:
    """Raise GraphError for a name that is not one of the layers."""
    for name in names:
        if name not in layers:
            near = get_close_matches(name, layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(layers)}"
            raise GraphError(f"the model has no quantized layer {name!r}; {hint}")


def _layers(graph: fx.GraphModule) -> tuple[list[fx.Node], dict[str, str]]:
    """Return the nodes that call a layer to quantize, in order, and the layers left out with the reason."""
    layers: list[fx.Node] = []
    skipped: dict[str, str] = {}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if isinstance(module, nn.Conv2d | nn.Linear) or (isinstance(module, nn.ConvTranspose2d) and module.groups == 1):
            layers.append(node)
        elif isinstance(module, nn.ConvTranspose2d):
            skipped[str(node.target)] = "ConvTranspose2d of several groups: no step per output channel in ONNX"
        elif module is not None and not isinstance(module, Probabilities):
            skipped[str(node.target)] = f"{type(module).__name__}: {node.meta.get('reason', 'no INT8 form')}"
        elif operation(node) in _COMPUTED_WEIGHTS:
            kind = operation(node).__name__
            skipped[_label(node)] = f"{kind}: both operands depend on the image, or it has no INT8 form"
        elif node.op == "call_function" and any(_is_parameter(graph, source) for source in node.all_input_nodes):
            skipped[_label(node)] = f"{node.meta['module'][1] or operation(node).__name__}: no INT8 form"
    return layers, skipped


def _label(node: fx.Node) -> str:
    """Return the name of the module that a node is from if that is of torch, else the node's."""
    path, kind = node.meta["module"]
    return path if path and hasattr(nn, kind) else node.name


def _is_parameter(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node reads a parameter of the model that has more than one value."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    return isinstance(value, nn.Parameter) and value.numel() > 1


def _reads_image_or(first: set[fx.Node], producers: Iterable[fx.Node]) -> bool:
    """Return whether one of the producers is the image, or one of the first layers through its activation."""
    return any(node.op == "placeholder" or not {node, activated(node)}.isdisjoint(first) for node in producers)


def _producers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that make the values of `node`, above everything that only moves them."""
    producers: list[fx.Node] = []
    stack = [node]
    while stack:
        top = stack.pop()
        sources = moved_inputs(top) if moves_values(top) else []
        if sources:
            stack.extend(reversed(sources))
        elif top not in producers:
            producers.append(top)
    return producers


def _ends(graph: fx.GraphModule, layers: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the layers that no other layer's values reach, and those whose values reach no other layer.

    Whatever is computed between the image and the first ones, or between the last ones and the output, is no layer:
    a normalization, a pooling, a softmax.
    """
    order, members = list(graph.graph.nodes), set(layers)
    fed: set[fx.Node] = set()  # a layer's values reach it
    for node in order:
        if any(source in fed or source in members for source in node.all_input_nodes):
            fed.add(node)
    feeding: set[fx.Node] = set()  # its values reach a layer
    for node in reversed(order):
        if any(user in feeding or user in members for user in node.users):
            feeding.add(node)
    return members - fed, members - feeding


def _fused_output(node: fx.Node) -> fx.Node:
    """Return the node whose output a runtime fuses into the layer: the ReLU behind it, or the layer itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_rectifier(users[0]) else node


def _factors(graph: fx.GraphModule, quantized: Iterable[str]) -> list[fx.Node]:
    """Return the gates and products that a product reads whose output is quantized or, being a factor, will be."""
    names, factors = set(quantized), list[fx.Node]()
    for node in reversed(graph.graph.nodes):
        if is_product(node) and node.name in names:
            inputs = [n for n in node.all_input_nodes if is_gate(n) or is_product(n)]
            factors += [factor for factor in inputs if factor.name not in names]
            names.update(factor.name for factor in inputs)
    return factors


def _depths(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """Return the length of the longest path from the graph's inputs to each node."""
    depths: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        depths[node] = 1 + max((depths[source] for source in node.all_input_nodes), default=0)
    return depths


def _groups(graph: fx.GraphModule, demands: Iterable[tuple[list[fx.Node], int]]) -> list[tuple[list[fx.Node], int]]:
    """Join demands that have a producer in common; return their producers and widest width in order of the graph."""
    groups: list[tuple[set[fx.Node], int]] = []
    for producers, width in demands:
        joined = [group for group in groups if not group[0].isdisjoint(producers)]
        members = set(producers).union(*(nodes for nodes, _ in joined))
        apart = [group for group in groups if group[0].isdisjoint(producers)]
        groups = [*apart, (members, max([width, *(bits for _, bits in joined)]))]
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    ordered = [(sorted(nodes, key=order.__getitem__), width) for nodes, width in groups]
    return sorted(ordered, key=lambda group: order[group[0][0]])
