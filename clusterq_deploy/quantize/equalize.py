"""Cross-layer equalisation: the channels of a tensor are brought nearer to one range, which leaves the model as it is.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721: across a
positively homogeneous function f, W2 f(W1 x + b) = (W2 / s) f(s W1 x + s b) for any positive scale s a channel.  # (5)

What the scales are for differs from the paper, whose weights share one step a tensor. Here each output channel of a
weight has a step of its own, so that scaling a layer's rows costs and gains nothing. Activations share one step a
tensor: a channel that is narrow beside the widest has few of the grid's values. Scaled up it has more, and the
columns of the weight that reads it shrink beside the others of their row. A depthwise layer has one column a row and
pays nothing; for others the balance is searched, as SmoothQuant's alpha (arXiv 2211.10438, equation (4)) is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calib.progress import SILENT, Progress
from clusterq_deploy.quantize.calibrate import activation_scale, weight_scales
from clusterq_deploy.quantize.grid import Grid
from clusterq_deploy.quantize.ops import Homogeneity, homogeneity
from clusterq_deploy.quantize.quantizer import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Quantizer
from clusterq_deploy.quantize.student import Student

_CLIP = 6.0
_MARGIN = 1.1  # a channel in front of a ReLU6 stays this factor below the clip: other images reach further
_MOST = 64.0  # no channel is scaled by more: what the images hardly move, other images may
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEARCHED_IMAGES = 16
_SEARCHED_VALUES = 1 << 16


@dataclass(frozen=True)
class Equalized:
    """A pair of layers whose common tensor was equalized.

    Attributes:
        producer, consumer: the teacher's names of the layers.
        exponent: 0 leaves the channels as they were, 1 gives all of them one range.
        spread_before, spread_after: the widest channel's range over the median's.
        error_before, error_after: relative squared error of the consumer's outputs, with the grids of the student.
    """

    producer: str
    consumer: str
    exponent: float
    spread_before: float
    spread_after: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Pair:
    producer: QuantizedLayer
    consumer: QuantizedLayer
    names: tuple[str, str]
    node: fx.Node  # the consumer's call
    clip: fx.Node | None  # a ReLU6 between them
    grid: Grid  # of the tensor that the consumer reads


def equalize(
    student: Student, images: Tensor, *, batch_size: int, rng: torch.Generator, progress: Progress = SILENT
) -> list[Equalized]:
    """Scale the channels between each pair of layers that only homogeneous operations connect, in place.

    To be called before `calibrate`. In float the student computes what it did before, but for rounding; behind a
    ReLU6 that holds as long as a channel that was scaled stays below the clip, as all of `images` do by a margin.

    Args:
        student: its weights and biases are changed; its scales are not looked at.
        images: (N, C, H, W) float32, normalized.
        batch_size: images a forward pass.
        rng: chooses the values that are looked at.

    Returns:
        What was done at each pair, in order of execution. A tensor with other readers is in no pair.
    """
    pairs = _pairs(student)
    if not pairs:
        return []
    device = next(student.parameters()).device
    reach: dict[fx.Node, Tensor] = {}
    watched = {n for p in pairs for n in (p.node.all_input_nodes[0], p.clip) if n is not None}

    def measure(node: fx.Node, value: Tensor) -> None:
        if node in watched:
            own = value.abs().amax([d for d in range(value.dim()) if d != 1])
            reach[node] = torch.maximum(reach[node], own) if node in reach else own

    done: list[Equalized] = []
    scales: list[tuple[_Pair, Tensor]] = []
    by_input = {p.node.all_input_nodes[0]: p for p in pairs}

    def search(node: fx.Node, value: Tensor) -> None:
        if (pair := by_input.get(node)) is not None:
            result, scale = _choose(pair, value, reach, rng)
            done.append(result)
            scales.append((pair, scale))

    batches = images.split(batch_size)
    with torch.no_grad(), student.in_float(), progress.task("Equalisation", len(batches)) as advance:
        for batch in batches:
            _Watcher(student.net, measure).run(batch.to(device))
            advance(1)
        _Watcher(student.net, search).run(images[:_SEARCHED_IMAGES].to(device))
        for pair, scale in scales:
            _apply(pair, scale)
    return done


class _Watcher(fx.Interpreter):
    """Runs a graph and shows every tensor that it makes."""

    def __init__(self, net: fx.GraphModule, show: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(net)
        self._show = show

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._show(n, value)
        return value


def _pairs(student: Student) -> list[_Pair]:
    """Every layer whose input comes from one other layer, through homogeneous operations and to no other reader."""
    quantizers, net = student.quantizers(), student.net
    layers = student.layers()
    pairs = []
    for site in student.placement.weights:
        node = next(n for n in net.graph.nodes if n.op == "call_module" and n.target == site.layer)
        if (found := _source(net, node)) is None:
            continue
        source, clip = found
        producer, consumer = layers.get(str(source.target)), layers[site.layer]
        if producer is not None:
            grid = quantizers[site.input_site].grid
            pairs.append(_Pair(producer, consumer, (str(source.target), site.layer), node, clip, grid))
    return pairs


def _source(net: fx.GraphModule, consumer: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """The layer that makes a layer's input, and the ReLU6 between them; None where the two are no pair."""
    linear = isinstance(net.get_submodule(str(consumer.target)), nn.Linear)
    clip, flat, spatial = None, False, False
    at = consumer.all_input_nodes[0]
    while len(at.users) == 1:
        if at.op == "call_module" and isinstance(net.get_submodule(str(at.target)), QuantizedConv2d | QuantizedLinear):
            from_linear = isinstance(net.get_submodule(str(at.target)), nn.Linear)
            fits = linear and not flat and not spatial if from_linear else linear == flat
            return (at, clip) if fits else None
        kind = Homogeneity.ELEMENTWISE if _is_quantizer(net, at) else homogeneity(net, at)
        if kind is None or (kind is Homogeneity.CLIPPED and clip is not None):
            return None
        flat, spatial = flat or kind is Homogeneity.FLATTENING, spatial or kind is Homogeneity.SPATIAL
        clip = at if kind is Homogeneity.CLIPPED else clip
        at = at.all_input_nodes[0]
    return None


def _is_quantizer(net: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), Quantizer)


def _choose(pair: _Pair, x: Tensor, reach: dict[fx.Node, Tensor], rng: torch.Generator) -> tuple[Equalized, Tensor]:
    """The scales (channels,) of the exponent that costs the consumer least, and what they bring.

    Args:
        pair: the layers.
        x: what the consumer reads, (N, C, ...) float32.
        reach: the largest magnitude that each channel of a node's output has on any image.
    """
    channels = len(pair.producer.weight)
    own = _by_channel(reach[pair.node.all_input_nodes[0]], channels)
    clipped = None if pair.clip is None else reach[pair.clip]
    found = []
    for exponent in _EXPONENTS:
        scale = _scales(own, clipped, exponent)
        found.append((_error(pair, x, scale, rng), exponent, scale))
    error, exponent, scale = min(found, key=lambda f: f[0])
    result = Equalized(
        *pair.names, exponent, _spread(own), _spread(own * scale), error_before=found[0][0], error_after=error
    )
    return result, scale


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """The largest of each channel's values, from (channels * k,), where a flattened map has k values a channel."""
    return values.view(channels, -1).amax(1)


def _spread(reach: Tensor) -> float:
    return float(reach.max() / reach.median().clamp_min(1e-12))


def _scales(reach: Tensor, clipped: Tensor | None, exponent: float) -> Tensor:
    """Scales (C,) of at least 1 for channels that reach (C,) far, and `clipped` (C,) far at a ReLU6 in front."""
    widest = reach.max()
    scale = (widest / reach.clamp_min(1e-12)).clamp(1.0, _MOST).pow(exponent)
    scale = torch.where(reach > 0, scale, 1.0)
    if clipped is not None:
        room = (_CLIP / (_MARGIN * clipped.clamp_min(1e-12))).clamp_min(1.0)
        scale = torch.minimum(scale, room)
    return scale


def _error(pair: _Pair, x: Tensor, scale: Tensor, rng: torch.Generator) -> float:
    """Squared error of the consumer's outputs with quantized input and weight, relative to their variance."""
    layer, factor = pair.consumer, scale.repeat_interleave(x.shape[1] // len(scale))
    exact = _outputs(layer, x, layer.weight)
    scaled = x * factor.view(1, -1, *[1] * (x.dim() - 2))
    sample = scaled.flatten()
    if len(sample) > _SEARCHED_VALUES:
        picked = torch.randint(len(sample), (_SEARCHED_VALUES,), generator=rng, device=rng.device)
        sample = sample[picked.to(sample.device)]
    step = activation_scale(sample, pair.grid)
    weight = _columns_scaled(layer, 1 / factor)
    rounded = Quantizer("input", pair.grid).to(x.device)
    rounded.set_scale(step)
    weights = Quantizer("weight", layer.weight_quantizer.grid, len(weight)).to(x.device)
    weights.set_scale(weight_scales(weight, layer.weight_quantizer.grid))
    difference = _outputs(layer, rounded(scaled), weights(weight)) - exact
    dims = [d for d in range(exact.dim()) if d != 1]
    return float((difference.square().mean(dims) / exact.var(dims).clamp_min(1e-12)).mean())


def _outputs(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's outputs without its bias."""
    if isinstance(layer, nn.Conv2d):
        y: Tensor = layer._conv_forward(x, weight, None)
        return y
    return F.linear(x, weight)


def _columns_scaled(layer: QuantizedLayer, factor: Tensor) -> Tensor:
    """The layer's weight with each input channel's column multiplied by factor (C,)."""
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    grouped = weight.view(groups, len(weight) // groups, weight.shape[1], -1)
    return (grouped * factor.view(groups, 1, -1, 1)).view_as(weight)


def _apply(pair: _Pair, scale: Tensor) -> None:
    producer, consumer = pair.producer, pair.consumer
    columns = consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features
    consumer.weight.copy_(_columns_scaled(consumer, 1 / scale.repeat_interleave(columns // len(scale))))
    producer.weight.mul_(scale.view(-1, *[1] * (producer.weight.dim() - 1)))
    if producer.bias is not None:
        producer.bias.mul_(scale)
