"""Cross-layer equalization: the channels of a tensor get one range, which leaves the model (nearly) as it is.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721: across a
positively homogeneous function f, W2 f(W1 x + b) = (W2 / s) f(s W1 x + s b) for any positive scale s, one per channel
(5), and what a channel never falls below can be moved from the first layer's bias into the second's (section 4.1.3).

The purpose differs from the paper's, whose weights share one step per tensor. Here each output channel of a weight has
its own step, so that scaling a layer's rows costs and gains nothing. Activations share one step per tensor and have no
zero-point: a channel that is narrow next to the widest has few of the grid's values, and one that moves between 5 and 6
(a MobileNet's stem has such) has one or two. Scaled and shifted, each channel has the whole grid, as if it had its own
step and zero-point. The cost: scaled up, the columns of the weight that reads a channel shrink next to the others of
their row. A depthwise layer has one column per row and pays nothing; for others the balance is searched, as
SmoothQuant's alpha (arXiv 2211.10438, equation (4)) is. A shift changes what zero padding means to the reader: it is
made only if the reader's outputs come nearer to the exact ones by it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.fake_quant import (
    QuantizedLayer,
    Quantizer,
    group_count,
    padded,
    per_row,
    pooled_dims,
    random_places,
)
from clusterq_deploy.quantization.graph.ops import (
    Homogeneity,
    data_inputs,
    homogeneity,
    is_addition,
    is_rectifier,
    moves_values,
    shape_of,
)
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.ptq.calibrate import activation_scale, weight_scales
from clusterq_deploy.quantization.reference import ChannelAffine
from clusterq_deploy.quantization.student import Student

_CLIP = 6.0
_MARGIN = 1.1  # a channel in front of a ReLU6 stays this factor below the clip: other images reach further
_CLIPPED = 0.02  # a channel is shifted only if at most this share of its values is at the clip, which moves too
_LOW = 0.5  # the quantile, over images, of their first percentiles that becomes zero
_MOST = 64.0  # no channel is scaled by more: other images may use a range that these hardly do
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEARCHED_IMAGES = 32
_MEASURED_IMAGES = 128
_VALUES_PER_CHANNEL = 1 << 10
_SEARCHED_VALUES = 1 << 16
_BORDER = 0.02
"""What an error at the border of a map counts, one inside being 1. On MobileNetV1 0.25, padding that means another
value at one of the first blocks cost KL 0.004 to 0.012, errors of the same size everywhere 0.2 to 0.3."""
_UNEVEN = 4.0  # the widest channel's range over the median's from which it is tried to scale a trunk
_WORTHWHILE = 0.5  # a trunk is scaled if its readers' error falls below this share: healthy ones gain less, or nothing
_LEAST_VARIANCE = 1e-3  # of the mean variance: outputs that hardly vary carry no information


@dataclass(frozen=True)
class Equalized:
    """A pair of layers, by the teacher's names, whose common tensor was equalized."""

    producer: str
    consumer: str
    exponent: float  # 0 leaves the channels' ranges as they were, 1 gives each channel the whole grid
    shifted: int  # channels that were shifted
    range_ratio_before: float  # the widest channel's range over the median's
    range_ratio_after: float
    error_before: float  # relative squared error of the consumer's outputs, with the grids of the student
    error_after: float


@dataclass(frozen=True)
class LayerPair:
    """Two layers with only homogeneous operations between them."""

    producer: QuantizedLayer
    consumer: QuantizedLayer
    names: tuple[str, str]  # the teacher's
    input: fx.Node  # what the consumer reads
    clip: fx.Node | None  # a ReLU6 between them
    relu_output: fx.Node | None  # the rectified tensor in front of pads and pools, in which a shift shows
    site: str  # of the quantizer that the consumer reads
    grid: Grid  # of that quantizer


def equalize(
    student: Student, images: Tensor, *, rng: torch.Generator, shifts: bool = True, progress: Progress = SILENT
) -> tuple[list[Equalized], dict[str, ChannelAffine]]:
    """Scale and shift the channels between each pair of layers that only homogeneous operations connect, in place.

    To be called before `calibrate`. In float the student computes what it did before, except for rounding, and for
    what a shift does: it cuts off what is below it (the first percentile of the median image), moves the borders of
    padded maps and the clip of a ReLU6. Behind one, a channel is scaled only as far as all of `images` stay below the
    clip.

    Args:
        student: its weights and biases are changed; its scales do not matter.
        images: (N, C, H, W) float32, normalized; the first 128 are used.
        rng: samples values.
        shifts: whether channels may be shifted.

    Returns:
        What was done at each pair, in order of execution (a tensor with other readers is in no pair), and for each
        layer whose outputs have changed, the map from the teacher's to the student's.
    """
    pairs = _find_pairs(student)
    if not pairs:
        return [], {}
    results: list[Equalized] = []
    maps: list[tuple[LayerPair, ChannelAffine]] = []
    by_input = {pair.input: pair for pair in pairs}
    watched = {node for p in pairs for node in (p.input, p.clip, p.relu_output) if node is not None}
    extremes: dict[fx.Node, list[Tensor]] = {node: [] for node in watched}

    def measure(node: fx.Node, value: Tensor) -> None:
        if node in extremes:
            extremes[node].append(_extremes(value))

    def search(node: fx.Node, value: Tensor) -> None:
        pair = by_input.get(node)
        if pair is not None and (value.dim() == 2 or not isinstance(pair.consumer, nn.Linear)):  # no tokens
            read, at_clip, rectified = (torch.cat(extremes[n or node]) for n in (node, pair.clip, pair.relu_output))
            shiftable = rectified if shifts and pair.relu_output else None
            result, affine = _choose(pair, value, read, at_clip, shiftable, rng)
            results.append(result)
            maps.append((pair, affine))

    _watch(student, images, measure, search, progress, "Equalisation")
    with torch.no_grad():
        for pair, affine in maps:
            _apply(pair, affine)
    return results, {pair.names[0]: affine for pair, affine in maps if not affine.is_identity}


@dataclass(frozen=True)
class Trunk:
    """Tensors that additions tie together, such as a residual trunk, and how much their channels were scaled.

    Attributes:
        producers, consumers: the layers that write them and those that read them, by the teacher's names.
        scale: (C,) float32, at least 1.
        error_before, error_after: relative squared error of the consumers' outputs, a mean over them.
    """

    producers: list[str]
    consumers: list[str]
    scale: Tensor
    error_before: float
    error_after: float

    def summary(self) -> dict[str, str | int | float]:
        """Return the first and the last layer, the largest scale and the errors, for a record."""
        return {
            "first": self.producers[0],
            "last": self.consumers[-1],
            "largest_scale": float(self.scale.max()),
            "error_before": self.error_before,
            "error_after": self.error_after,
        }

    def apply(self, student: Student) -> None:
        """Scale the channels in a student that was made of the same teacher, in place; it computes the same."""
        layers = student.layers()
        with torch.no_grad():
            for name in self.producers:
                layer = layers[name]
                layer.weight.mul_(per_row(self.scale.to(student.device), layer.weight))
                if layer.bias is not None:
                    layer.bias.mul_(self.scale.to(student.device))
            for name in self.consumers:
                layers[name].weight.copy_(_scale_columns(layers[name], 1 / self.scale.to(student.device)))


def equalize_trunks(student: Student, images: Tensor, *, progress: Progress = SILENT) -> list[Trunk]:
    """Scale the channels of tensors that several layers write or read, and nothing but what passes scales on, in place.

    One loud channel leaves the others of a residual trunk few values of its grid; no other tensor can have a step for
    it. To be called on a fresh student, before its twin is made of it: it computes what it did, but for rounding.

    Args:
        student: its weights and biases are changed.
        images: (N, C, H, W) float32, normalized; the first 128 are used.

    Returns:
        The trunks whose readers have less than half of their error by it.
    """
    if not (trunks := _find_trunks(student)):
        return []
    rng = torch.Generator().manual_seed(0)
    readers = {node: trunk for trunk in trunks for node in trunk.reads}
    reach = {trunk: torch.zeros(()) for trunk in trunks}
    errors = {trunk: [0.0] * len(_EXPONENTS) for trunk in trunks}

    def measure(node: fx.Node, value: Tensor) -> None:
        if (trunk := readers.get(node)) is not None:
            largest = value.abs().amax([d for d in range(value.dim()) if d != 1])
            reach[trunk] = torch.maximum(reach[trunk].to(largest), largest / largest.max().clamp_min(1e-12))

    def search(node: fx.Node, value: Tensor) -> None:
        if (trunk := readers.get(node)) is None or _range_ratio(reach[trunk]) < _UNEVEN:
            return
        for pair in trunk.reads[node]:
            exact = pair.consumer.compute(value, pair.consumer.weight, None)
            for place, exponent in enumerate(_EXPONENTS):
                scale = _scales(reach[trunk], None, exponent)
                error = _errors(pair, value, exact, scale, torch.zeros_like(scale), rng)
                errors[trunk][place] += float(error.mean()) / len(trunk.consumers)

    _watch(student, images, measure, search, progress, "Trunks")
    results = []
    for trunk in trunks:
        plain, best = errors[trunk][0], min(errors[trunk])
        if best < plain * _WORTHWHILE:
            scale = _scales(reach[trunk], None, _EXPONENTS[errors[trunk].index(best)])
            results.append(Trunk(trunk.producers, trunk.consumers, scale, plain, best))
            results[-1].apply(student)
    return results


@dataclass(frozen=True, eq=False)
class _TrunkLayers:
    """A trunk's writers and readers, by name, and the nodes that are read, each with its readers."""

    producers: list[str]
    consumers: list[str]
    reads: dict[fx.Node, list[LayerPair]]


def _find_trunks(student: Student) -> list[_TrunkLayers]:
    """Return the sets of tensors with one scale per channel that only layers write and read, in order of execution."""
    net, layers, quantizers = student.net, student.layers(), student.quantizers()
    root: dict[fx.Node, fx.Node] = {}  # of a union of nodes

    def find(node: fx.Node) -> fx.Node:
        while root.setdefault(node, node) is not node:
            node = root[node]
        return node

    unfit: list[fx.Node] = []
    for node in net.graph.nodes:
        if str(node.target) in layers and node.op == "call_module":
            continue
        quantizes = node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), Quantizer)
        tensors = [*data_inputs(node), node]
        if quantizes or _passes_channels(node):
            for tensor in tensors:
                root[find(tensor)] = find(node)
        else:
            unfit += tensors
    excluded = {find(node) for node in unfit}
    sites = {site.layer: site for site in student.placement.weights}
    found: dict[fx.Node, _TrunkLayers] = {}
    for node in net.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or name not in layers:
            continue
        if (union := find(node)) not in excluded:
            found.setdefault(union, _TrunkLayers([], [], {})).producers.append(name)
        read = node.all_input_nodes[0]
        if (union := find(read)) not in excluded:
            grid, site = quantizers[sites[name].input_site].grid, sites[name].input_site
            pair = LayerPair(layers[name], layers[name], (name, name), read, None, None, site, grid)
            trunk = found.setdefault(union, _TrunkLayers([], [], {}))
            trunk.consumers.append(name)
            trunk.reads.setdefault(read, []).append(pair)
    return [t for t in found.values() if t.producers and t.consumers and len(t.producers) + len(t.consumers) > 2]


def _passes_channels(node: fx.Node) -> bool:
    """Return whether a node's output has the channels of all its inputs, scaled as they are, along dimension 1."""
    shapes = [shape_of(tensor) for tensor in (node, *data_inputs(node))]
    if not all(len(shape) in {2, 4} and shape[1] == shapes[0][1] for shape in shapes):
        return False
    kinds = {Homogeneity.ELEMENTWISE, Homogeneity.SPATIAL, Homogeneity.FLATTENING}
    return is_addition(node) or homogeneity(node) in kinds


def _find_pairs(student: Student) -> list[LayerPair]:
    """Return every layer whose input comes from one other layer, through homogeneous operations, to no other reader."""
    quantizers, net, layers = student.quantizers(), student.net, student.layers()
    calls = {node.target: node for node in net.graph.nodes if node.op == "call_module"}
    pairs = []
    for site in student.placement.weights:
        source = _source(net, calls[site.layer])
        if source is not None and (producer := layers.get(str(source[0].target))) is not None:
            node, clip, relu_output = source
            names, grid = (str(node.target), site.layer), quantizers[site.input_site].grid
            consumer, read = layers[site.layer], calls[site.layer].all_input_nodes[0]
            pairs.append(LayerPair(producer, consumer, names, read, clip, relu_output, site.input_site, grid))
    return pairs


def _source(net: fx.GraphModule, consumer: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None] | None:
    """Return the layer that makes a layer's input, the ReLU6 between them, and the tensor that a shift would show in.

    None if the two are no pair.
    """
    linear = isinstance(net.get_submodule(str(consumer.target)), nn.Linear)
    clip, relu_output, flat, spatial, shiftable = None, None, False, False, True
    node = consumer.all_input_nodes[0]
    while len(node.users) == 1:
        module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantizedLayer):
            fits = linear and not flat and not spatial if isinstance(module, nn.Linear) else linear == flat
            return (node, clip, relu_output if shiftable else None) if fits else None
        quantizes = isinstance(module, Quantizer)
        kind = Homogeneity.ELEMENTWISE if quantizes else homogeneity(node)
        if kind is None or (kind is Homogeneity.CLIPPED and clip is not None):
            return None
        flat, spatial = flat or kind is Homogeneity.FLATTENING, spatial or kind is Homogeneity.SPATIAL
        clip = node if kind is Homogeneity.CLIPPED else clip
        if is_rectifier(node):
            relu_output = relu_output or node
        elif kind is Homogeneity.ELEMENTWISE and not quantizes and not moves_values(node):
            shiftable = False  # a slope or a sign would be another one after a shift
        node = node.all_input_nodes[0]
    return None


_Show = Callable[[fx.Node, Tensor], None]


@torch.no_grad()
def _watch(student: Student, images: Tensor, measure: _Show, search: _Show, progress: Progress, title: str) -> None:
    """Show `measure` the float tensors of the first 128 images, and then `search` those of the first 32."""
    batches = images[:_MEASURED_IMAGES].to(student.device).split(_SEARCHED_IMAGES)
    with student.in_float(), progress.task(title, len(batches) + 1) as advance:
        for show, batch in [*((measure, batch) for batch in batches), (search, batches[0])]:
            _Watcher(student.net, show).run(batch)
            advance(1)


class _Watcher(fx.Interpreter):
    """Runs a graph and passes every tensor that it computes to a function."""

    def __init__(self, net: fx.GraphModule, show: _Show) -> None:
        super().__init__(net)
        self._show = show

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._show(n, value)
        return value


def _extremes(value: Tensor) -> Tensor:
    """Return the low end, the largest magnitude and the share at a ReLU6's clip per image and channel, (N, 3, C)."""
    flat = value.flatten(2) if value.dim() > 2 else value[..., None]
    return torch.stack([_first_percentile(flat), flat.abs().amax(2), (flat >= _CLIP).float().mean(2)], 1)


def _first_percentile(flat: Tensor) -> Tensor:
    """Return the first percentile of each image's channel, (N, C), from a sample of its values (N, C, n)."""
    step = max(1, flat.shape[2] // _VALUES_PER_CHANNEL)
    while math.gcd(step, math.isqrt(flat.shape[2])) > 1:  # so that all columns of a square map are seen alike
        step += 1
    sample = flat[..., ::step]
    return sample.kthvalue(1 + sample.shape[2] // 100, dim=2).values


def _choose(
    pair: LayerPair, x: Tensor, extremes: Tensor, at_clip: Tensor, rectified: Tensor | None, rng: torch.Generator
) -> tuple[Equalized, ChannelAffine]:
    """Return the map of the channels that costs the consumer least, and what it achieves.

    Args:
        x: what the consumer reads, (N, C, ...) float32.
        extremes: of what the consumer reads on many images, from `_extremes`.
        at_clip: of the ReLU6's output, if there is one.
        rectified: of the tensor that a shift would clip; None for no shift.
        rng: samples values.
    """
    channels = len(pair.producer.weight)
    exact = pair.consumer.compute(x, pair.consumer.weight, None)
    reach = _channel_maxima(extremes, channels)
    zero = torch.zeros_like(reach)
    low = zero if rectified is None else _low(pair, rectified)
    clipped = None if pair.clip is None else _channel_maxima(at_clip, channels)
    candidates: list[tuple[float, float, Tensor, Tensor]] = []

    def errors(exponent: float, shift: Tensor) -> Tensor:
        scale = _scales(reach - shift, None if clipped is None else clipped - shift, exponent)
        result = _errors(pair, x, exact, scale, shift, rng)
        candidates.append((float(result.mean()), exponent, scale, shift))
        return result

    plain = [errors(exponent, zero) for exponent in _EXPONENTS]
    if bool((low > 0).any()):
        if pair.consumer.weight.shape[1] == 1 and len(plain[0]) == channels:
            # a depthwise reader's channels are independent: each is shifted if it gains by it
            low = torch.where(errors(1.0, low) < plain[-1], low, zero)
        for exponent in _EXPONENTS:
            errors(exponent, low)
    error, exponent, scale, shift = min(candidates, key=lambda candidate: candidate[0])
    ratios = _range_ratio(reach), _range_ratio((reach - shift) * scale)
    result = Equalized(*pair.names, exponent, int((shift > 0).sum()), *ratios, candidates[0][0], error)
    return result, ChannelAffine(scale, scale * shift, pair.site)


def _channel_maxima(extremes: Tensor, channels: int) -> Tensor:
    """Return each channel's largest magnitude (channels,); a flattened map has several features per channel."""
    return extremes[:, 1].amax(0).view(channels, -1).amax(1)


def _low(pair: LayerPair, rectified: Tensor) -> Tensor:
    """Return by how much each channel may be shifted, (C,), which it hardly falls below; 0 if it may not."""
    channels = len(pair.producer.weight)
    low = torch.quantile(rectified[:, 0], _LOW, dim=0).clamp_min(0).view(channels, -1).amin(1)
    if pair.clip is not None:
        low = torch.where(rectified[:, 2].mean(0).view(channels, -1).mean(1) <= _CLIPPED, low, 0.0)
    possible = not pair.grid.signed and None not in (pair.producer.bias, pair.consumer.bias)
    possible &= not isinstance(pair.consumer, nn.ConvTranspose2d)  # places read different parts of its kernel
    return low if possible else torch.zeros_like(low)


def _scales(reach: Tensor, clipped: Tensor | None, exponent: float) -> Tensor:
    """Return scales (C,) of at least 1 for channels that reach (C,) far, and `clipped` (C,) far behind a ReLU6."""
    scale = (reach.max() / reach.clamp_min(1e-12)).clamp(1.0, _MOST).pow(exponent)
    scale = torch.where(reach > 0, scale, 1.0)
    if clipped is not None:
        scale = torch.minimum(scale, (_CLIP / (_MARGIN * clipped.clamp_min(1e-12))).clamp_min(1.0))
    return scale


def _range_ratio(reach: Tensor) -> float:
    """Return the widest channel's range over the median's."""
    return float(reach.max() / reach.median().clamp_min(1e-12))


def _errors(pair: LayerPair, x: Tensor, exact: Tensor, scale: Tensor, shift: Tensor, rng: torch.Generator) -> Tensor:
    """Return the squared error of the consumer's outputs with rounded input and weight over their variance, (O,).

    A constant error does not count, as the bias removes it, and one at the border of a map counts little.
    """
    layer, k = pair.consumer, x.shape[1] // len(scale)
    shape = (1, -1, *[1] * (x.dim() - 2))
    factor, offset = scale.repeat_interleave(k), shift.repeat_interleave(k)
    mapped = (x - offset.view(shape)) * factor.view(shape)
    if not pair.grid.signed:
        mapped = mapped.clamp_min(0)
    round_input = Quantizer("input", pair.grid, limit=_CLIP if pair.clip is not None else math.inf).to(x.device)
    round_input.set_scale(activation_scale(mapped[random_places(mapped, _SEARCHED_VALUES, rng)], pair.grid))
    weight, grid, limit = (
        _scale_columns(layer, 1 / factor),
        layer.weight_quantizer.grid,
        layer.weight_quantizer.pair_limit,
    )
    round_weight = Quantizer("weight", grid, len(weight), pair_limit=limit).to(x.device)
    round_weight.set_scale(weight_scales(weight, grid, pair_limit=limit))
    difference = layer.compute(round_input(mapped), round_weight(weight), None) - exact
    dims = pooled_dims(layer, exact)
    weights = _position_weights(layer, x).expand_as(difference)
    total = weights.sum(dims, keepdim=True)
    centred = difference - (difference * weights).sum(dims, keepdim=True) / total
    variance = exact.var(dims)
    floor = (_LEAST_VARIANCE * variance.mean()).clamp_min(1e-12)
    return (centred.square() * weights).sum(dims) / total.flatten() / torch.maximum(variance, floor)


def _position_weights(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Return how much an error counts at each position of a layer's outputs, (1, 1, H, W) or (): little at padding."""
    if not isinstance(layer, nn.Conv2d):
        return x.new_ones(())
    real = (x != 0).any(0).any(0).to(x)  # rows and columns of zeros are padding as well
    window = x.new_ones(1, 1, *layer.kernel_size)
    read = F.conv2d(padded(layer, real[None, None]), window, None, layer.stride, 0, layer.dilation)
    return torch.where(read > window.numel() - 0.5, 1.0, _BORDER)


def _scale_columns(layer: QuantizedLayer, factor: Tensor) -> Tensor:
    """Return the layer's weight with each input channel's column multiplied by factor (C,)."""
    weight, groups = layer.weight.detach(), group_count(layer)
    grouped = weight.view(groups, len(weight) // groups, weight.shape[1], -1)
    return (grouped * factor.view(groups, 1, -1, 1)).view_as(weight)


def _apply(pair: LayerPair, affine: ChannelAffine) -> None:
    """Scale and shift the channels between two layers, in place."""
    producer, consumer = pair.producer, pair.consumer
    k = group_count(consumer) * consumer.weight.shape[1] // len(affine.scale)
    if consumer.bias is not None:
        shift = (affine.shift / affine.scale).repeat_interleave(k)
        consumer.bias.add_(_scale_columns(consumer, shift).flatten(1).sum(1))
    consumer.weight.copy_(_scale_columns(consumer, 1 / affine.scale.repeat_interleave(k)))
    producer.weight.mul_(per_row(affine.scale, producer.weight))
    if producer.bias is not None:
        producer.bias.mul_(affine.scale).sub_(affine.shift)
