"""Where quantizers go: chosen by the graph, so that every quantized layer is one that the targets can run."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from clusterq_deploy.errors import GraphError
from clusterq_deploy.quantization.graph.ops import (
    activated,
    is_addition,
    is_gate,
    is_product,
    is_rectifier,
    moved_inputs,
    moves_values,
    value_ranges,
)
from clusterq_deploy.quantization.graph.trace import module_of, tensor_inputs
from clusterq_deploy.quantization.grid import BitWidths, Cpu, Grid, pair_limit

Target = Literal["onnxruntime", "tensorrt"]
TARGETS: tuple[Target, ...] = ("onnxruntime", "tensorrt")
_EIGHT = 8
_FUNCTIONAL_LAYERS = {F.conv2d: "conv2d", F.linear: "linear", torch.matmul: "matmul", torch.bmm: "bmm"}


@dataclass(frozen=True)
class ActivationSite:
    """A quantizer behind the outputs of `producers` (several where a concatenation shares one scale).

    `targets` are the runtimes whose graph has it: ONNX Runtime wants one behind every convolution and factor,
    TensorRT wants none between a convolution and the residual add that it fuses. `readers` are the layers that alone
    read it, behind the 8-bit quantizer that all others read; without any, everything reads it.
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
    traced: fx.GraphModule,
    bits: BitWidths,
    *,
    quantize_first_last: bool = False,
    layer_bits: Mapping[str, int] | None = None,
    cpu: Cpu = "any",
) -> Placement:
    """Decide on every quantizer of a folded graph.

    - The input of each Conv2d and Linear is quantized, where its values are made: behind the ReLU in front of a
      max-pool, behind each branch of a concatenation, so that what only moves values keeps their grid.
    - At an addition the identity branch is quantized, the branch that ends in a convolution is not (it is fused).
    - For ONNX Runtime alone, the output of a convolution that nothing else quantizes has an 8-bit quantizer, and so
      has a factor of a product (SiLU, hard-swish, squeeze-excite), which is then computed on integers.
    - What layers read has the width asked for. The image and what additions read have 8 bits: a sum computes in
      INT8 at any width, and the errors of narrow grids would add up along a residual trunk. A tensor that both read
      has an 8-bit quantizer, and behind it, for the layers, a narrow one.

    Args:
        traced: from `folded_teacher`.
        bits: widths of weights and activations.
        quantize_first_last: False keeps the first and last layers at 8 bits: their weights, what they read, and what the first
            one writes through its activation, as in BRECQ (arXiv 2102.05426) and Genie (CVPR 2023). A stem has few
            channels, and what four bits lose of them no later layer can mend.
        layer_bits: widths of single layers, by name: of the weight, and of what the layer reads. Layers that read the same
            tensor share the widest.
        cpu: `any` limits the weights' sums in ONNX Runtime's graph, so that no CPU saturates; see `pair_limit`.

    Raises:
        GraphError: `layer_bits` names no quantized layer.
    """
    layers, skipped = _layers(traced)
    layer_bits = layer_bits or {}
    _require_layers(layer_bits, [str(node.target) for node in layers])
    ranges = value_ranges(traced)
    boundary = {n for n in layers if _reads_image(traced, n)} | {n for n in layers if _is_last(traced, n)}
    groups = _Groups()

    def wide(node: fx.Node) -> bool:
        return node in boundary and not quantize_first_last

    first = {n for n in layers if wide(n) and _reads_image(traced, n)}
    for node in layers:
        producers = _producers(traced, tensor_inputs(node)[0])
        written_first = any(p in first or activated(traced, p) in first for p in producers)
        eight = wide(node) or _reads_image(traced, node) or written_first
        groups.demand(producers, _EIGHT if eight else layer_bits.get(str(node.target), bits.activations))
    added: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if is_addition(node):
            fused, others = _operands(node, layers)
            for producers in (_producers(traced, branch) for branch in others):
                added.update(producers)
                if fused is not None:
                    groups.demand(producers, None)
    activations: list[ActivationSite] = []
    narrow: dict[fx.Node, int] = {}  # producers that additions read too, and the width that layers want of them
    for members, wanted in groups.resolved():
        width = wanted or _EIGHT
        if width < _EIGHT and not added.isdisjoint(members):
            narrow |= dict.fromkeys(members, width)
            width = _EIGHT
        grid, limit = _grid(width, [ranges[m] for m in members])
        activations.append(ActivationSite(members[0].name, tuple(m.name for m in members), grid, limit, TARGETS))
    owner = {name: site.name for site in activations for name in site.producers}
    outputs = [_fused_output(traced, node) for node in layers if not _is_last(traced, node)]
    for node in (*outputs, *_factors(traced, owner)):
        if node.name not in owner:
            grid, limit = _grid(_EIGHT, [ranges[node]])
            activations.append(ActivationSite(node.name, (node.name,), grid, limit, ("onnxruntime",)))
            owner[node.name] = node.name
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in layers:
        readers.setdefault(tensor_inputs(node)[0], []).append(node)
    input_sites: dict[fx.Node, str] = {}
    for source, own in readers.items():
        producer = _producers(traced, source)[0]
        name = owner[producer.name]
        if producer in narrow:
            name, names = f"{source.name}.narrow", tuple(n.name for n in own)
            grid, limit = _grid(narrow[producer], [ranges[source]])
            activations.append(ActivationSite(name, (source.name,), grid, limit, TARGETS, names))
        input_sites |= dict.fromkeys(own, name)
    grids = {site.name: site.grid for site in activations}

    def weight_site(node: fx.Node) -> WeightSite:
        name, read = str(node.target), input_sites[node]
        grid = Grid(layer_bits.get(name, _EIGHT if wide(node) else bits.weights), signed=True)
        return WeightSite(f"{name}.weight", name, grid, read, pair_limit(grid, grids[read]) if cpu == "any" else None)

    return Placement(tuple(activations), tuple(map(weight_site, layers)), skipped)


def _require_layers(names: Iterable[str], layers: list[str]) -> None:
    for name in names:
        if name not in layers:
            near = get_close_matches(name, layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(layers)}"
            raise GraphError(f"the model has no quantized layer {name!r}; {hint}")


def _grid(bits: int, ranges: list[tuple[float, float]]) -> tuple[Grid, float]:
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    return Grid(bits, signed=low < 0), high if low >= 0 and high > 0 else math.inf


def _layers(traced: fx.GraphModule) -> tuple[list[fx.Node], dict[str, str]]:
    """The nodes that call a layer to quantize, in order, and the layers left out with the reason."""
    calls: dict[str, list[fx.Node]] = {}
    skipped: dict[str, str] = {}
    for node in traced.graph.nodes:
        module = module_of(traced, node)
        if isinstance(module, nn.Conv2d | nn.Linear):
            calls.setdefault(str(node.target), []).append(node)
        elif module is not None and any(True for _ in module.parameters(recurse=False)):
            reason = (
                "BatchNorm without a layer to fold it into" if isinstance(module, nn.BatchNorm2d) else "no INT8 form"
            )
            skipped[str(node.target)] = f"{type(module).__name__}: {reason}"
        elif node.op == "call_function" and node.target in _FUNCTIONAL_LAYERS:
            skipped[node.name] = f"{_FUNCTIONAL_LAYERS[node.target]}: a function call, only modules are quantized"
    layers = []
    for name, nodes in calls.items():
        module = traced.get_submodule(name)
        if len(nodes) > 1:
            skipped[name] = f"{type(module).__name__}: called {len(nodes)} times, one set of scales does not fit"
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            skipped[name] = f"Conv2d: padding mode {module.padding_mode!r} has no INT8 form"
        else:
            layers.append(nodes[0])
    return layers, skipped


def _producers(traced: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that make the values of `node`, above everything that only moves them."""
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        at = stack.pop()
        sources = moved_inputs(at) if moves_values(traced, at) else []
        if sources:
            stack.extend(reversed(sources))
        elif at not in found:
            found.append(at)
    return found


def _reads_image(traced: fx.GraphModule, node: fx.Node) -> bool:
    return any(source.op == "placeholder" for source in _producers(traced, tensor_inputs(node)[0]))


def _is_last(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer's output leaves the net, moved at most."""
    return any(user.op == "output" or (moves_values(traced, user) and _is_last(traced, user)) for user in node.users)


def _fused_output(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose output a runtime fuses into the layer: the ReLU behind it, or the layer itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_rectifier(traced, users[0]) else node


def _factors(traced: fx.GraphModule, quantized: Iterable[str]) -> list[fx.Node]:
    """The gates and products that a product reads whose output is quantized or, being such a factor, will be."""
    known, found = set(quantized), []
    for node in reversed(traced.graph.nodes):
        if is_product(traced, node) and node.name in known:
            factors = [n for n in tensor_inputs(node) if is_gate(traced, n) or is_product(traced, n)]
            found += [factor for factor in factors if factor.name not in known]
            known.update(factor.name for factor in factors)
    return found


def _operands(node: fx.Node, layers: list[fx.Node]) -> tuple[fx.Node | None, list[fx.Node]]:
    """The convolution that an addition is fused with, if there is one, and the addition's other operands."""
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    fusable = [a for a in operands if a in layers and len(a.users) == 1]
    fused = max(fusable, key=lambda a: _depth(a, {}), default=None)
    return fused, [a for a in operands if a is not fused]


def _depth(node: fx.Node, known: dict[fx.Node, int]) -> int:
    """Length of the longest path from the graph's inputs to a node."""
    for at in node.graph.nodes:
        known[at] = 1 + max((known[source] for source in tensor_inputs(at)), default=0)
        if at is node:
            break
    return known[node]


class _Groups:
    """Producers that share a quantizer, and the width that their consumers want of it."""

    def __init__(self) -> None:
        self._sets: list[tuple[list[fx.Node], int | None]] = []

    def demand(self, producers: list[fx.Node], bits: int | None) -> None:
        """Want one quantizer for `producers`, of `bits`; None goes along with what others want."""
        merged, widths = [], [bits]
        kept = []
        for members, width in self._sets:
            if any(p in members for p in producers):
                merged += members
                widths.append(width)
            else:
                kept.append((members, width))
        merged += [p for p in producers if p not in merged]
        self._sets = [*kept, (merged, max((w for w in widths if w is not None), default=None))]

    def resolved(self) -> list[tuple[list[fx.Node], int | None]]:
        """The groups in order of the graph."""
        order = {node: i for members, _ in self._sets for i, node in enumerate(members[0].graph.nodes)}
        ordered = [(sorted(members, key=order.__getitem__), bits) for members, bits in self._sets]
        return sorted(ordered, key=lambda group: order[group[0][0]])
