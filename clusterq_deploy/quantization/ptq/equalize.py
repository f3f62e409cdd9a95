"""Cross-layer equalisation: the channels of a tensor are given one range, which leaves the model (nearly) as it is.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721: across a
positively homogeneous function f, W2 f(W1 x + b) = (W2 / s) f(s W1 x + s b) for any positive scale s a channel,  # (5)
and what a channel never falls below can be moved from the first layer's bias into the second's.  # section 4.1.3

What this is for differs from the paper, whose weights share one step a tensor. Here each output channel of a weight
has a step of its own, so that scaling a layer's rows costs and gains nothing. Activations share one step a tensor and
have no zero-point: a channel that is narrow beside the widest has few of the grid's values, and one that moves between
5 and 6 (a MobileNet's stem has such) has one or two. Scaled and shifted, each channel has the whole grid, as if it had
a step and a zero-point of its own. What it costs: scaled up, the columns of the weight that reads a channel shrink
beside the others of their row. A depthwise layer has one column a row and pays nothing; for others the balance is
searched, as SmoothQuant's alpha (arXiv 2211.10438, equation (4)) is. A shift moves what zero padding means to the
reader: it is made only where the reader's outputs come nearer to the exact ones for it.
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
    padded,
    pooled_dims,
)
from clusterq_deploy.quantization.ptq.calibrate import activation_scale, weight_scales
from clusterq_deploy.quantization.ptq.pairs import LayerPair, find_pairs
from clusterq_deploy.quantization.reference import ChannelAffine
from clusterq_deploy.quantization.student import Student

_CLIP = 6.0
_MARGIN = 1.1  # a channel in front of a ReLU6 stays this factor below the clip: other images reach further
_CLIPPED = 0.02  # of a channel's values at most lie at the clip, if it is to be shifted: the clip moves along
_LOW = 0.5  # the quantile, over images, of their first percentiles that becomes zero
_MOST = 64.0  # no channel is scaled by more: what the images hardly move, other images may
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SEARCHED_IMAGES = 32
_MEASURED_IMAGES = 128
_VALUES_A_CHANNEL = 1 << 10
_SEARCHED_VALUES = 1 << 16
_BORDER = 0.02
"""What an error at the border of a map counts beside one inside. On MobileNetV1 0.25, padding that means another value
at one of the first blocks cost KL 0.004 to 0.012, errors of the same size everywhere 0.2 to 0.3."""
_LEAST_VARIANCE = 1e-3  # of the mean one: what hardly varies says nothing


@dataclass(frozen=True)
class Equalized:
    """A pair of layers whose common tensor was equalized.

    Attributes:
        producer, consumer: the teacher's names of the layers.
        exponent: 0 leaves the channels' ranges as they were, 1 gives each channel the whole grid.
        shifted: how many channels were shifted.
        spread_before, spread_after: the widest channel's range over the median's.
        error_before, error_after: relative squared error of the consumer's outputs, with the grids of the student.
    """

    producer: str
    consumer: str
    exponent: float
    shifted: int
    spread_before: float
    spread_after: float
    error_before: float
    error_after: float


def equalize(
    student: Student, images: Tensor, *, rng: torch.Generator, shifts: bool = True, progress: Progress = SILENT
) -> tuple[list[Equalized], dict[str, ChannelAffine]]:
    """Scale and shift the channels between each pair of layers that only homogeneous operations connect, in place.

    To be called before `calibrate`. In float the student computes what it did before, but for rounding, and for what
    a shift does: it cuts off what lies below it (the first percentile of the median image), moves the borders of
    padded maps and the clip of a ReLU6. Behind one, a channel is scaled only as far as all of `images` stay below the
    clip.

    Args:
        student: its weights and biases are changed; its scales are not looked at.
        images: (N, C, H, W) float32, normalized; 128 are looked at.
        rng: chooses the values that are looked at.
        shifts: whether channels may be shifted.

    Returns:
        What was done at each pair, in order of execution (a tensor with other readers is in no pair), and for each
        layer whose outputs are others now, the map from the teacher's to the student's.
    """
    pairs = find_pairs(student)
    if not pairs:
        return [], {}
    device = next(student.parameters()).device
    done: list[Equalized] = []
    maps: list[tuple[LayerPair, ChannelAffine]] = []
    by_input = {p.node.all_input_nodes[0]: p for p in pairs}
    watched = {node for p in pairs for node in (p.node.all_input_nodes[0], p.clip, p.made) if node is not None}
    seen: dict[fx.Node, list[Tensor]] = {node: [] for node in watched}

    def measure(node: fx.Node, value: Tensor) -> None:
        if node in seen:
            seen[node].append(_extremes(value))

    def search(node: fx.Node, value: Tensor) -> None:
        pair = by_input.get(node)
        if pair is not None and (value.dim() == 2 or isinstance(pair.consumer, nn.Conv2d)):  # no tokens
            read, clipped, made = (torch.cat(seen[n]) for n in (node, pair.clip or node, pair.made or node))
            result, found = _choose(pair, value, read, clipped, made if shifts and pair.made else None, rng)
            done.append(result)
            maps.append((pair, found))

    batches = images[:_MEASURED_IMAGES].to(device).split(_SEARCHED_IMAGES)
    with torch.no_grad(), student.in_float(), progress.task("Equalisation", len(batches) + 1) as advance:
        for batch in batches:
            _Watcher(student.net, measure).run(batch)
            advance(1)
        _Watcher(student.net, search).run(batches[0])
        advance(1)
        for pair, found in maps:
            _apply(pair, found)
    return done, {pair.names[0]: found for pair, found in maps if not found.is_identity}


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


def _extremes(value: Tensor) -> Tensor:
    """Of each image and channel the low end, the largest magnitude and the share at a ReLU6's clip, (N, 3, C)."""
    flat = value.flatten(2) if value.dim() > 2 else value[..., None]
    return torch.stack([_lowest(flat), flat.abs().amax(2), (flat >= _CLIP).float().mean(2)], 1)


def _lowest(flat: Tensor) -> Tensor:
    """What a channel of an image hardly falls below, (N, C), of values (N, C, n): their first percentile."""
    step = max(1, flat.shape[2] // _VALUES_A_CHANNEL)
    while math.gcd(step, math.isqrt(flat.shape[2])) > 1:  # so that all columns of a square map are seen alike
        step += 1
    some = flat[..., ::step]
    return some.kthvalue(1 + some.shape[2] // 100, dim=2).values


def _choose(
    pair: LayerPair, x: Tensor, extremes: Tensor, at_clip: Tensor, rectified: Tensor | None, rng: torch.Generator
) -> tuple[Equalized, ChannelAffine]:
    """The map of the channels that costs the consumer least, and what it brings.

    Args:
        pair: the layers.
        x: what the consumer reads, (N, C, ...) float32.
        extremes: of what the consumer reads on many images, from `_extremes`.
        at_clip: the same of what leaves the ReLU6, if there is one.
        rectified: the same of the tensor in which a shift shows; None where there shall be no shift.
        rng: chooses the values that are looked at.
    """
    channels = len(pair.producer.weight)
    exact = _outputs(pair.consumer, x, pair.consumer.weight)
    reach = _by_channel(extremes[:, 1].amax(0), channels)
    still = torch.zeros_like(reach)
    low = still if rectified is None else _low(pair, rectified)
    clipped = None if pair.clip is None else _by_channel(at_clip[:, 1].amax(0), channels)
    found: list[tuple[float, float, Tensor, Tensor]] = []

    def errors(exponent: float, shift: Tensor) -> Tensor:
        scale = _scales(reach - shift, None if clipped is None else clipped - shift, exponent)
        result = _errors(pair, x, exact, scale, shift, rng)
        found.append((float(result.mean()), exponent, scale, shift))
        return result

    plain = [errors(exponent, still) for exponent in _EXPONENTS]
    if bool((low > 0).any()):
        if pair.consumer.weight.shape[1] == 1 and len(plain[0]) == channels:
            # a depthwise reader's channels have nothing to do with each other: each is shifted if it gains by it
            low = torch.where(errors(1.0, low) < plain[-1], low, still)
        for exponent in _EXPONENTS:
            errors(exponent, low)
    error, exponent, scale, shift = min(found, key=lambda f: f[0])
    result = Equalized(
        *pair.names,
        exponent,
        int((shift > 0).sum()),
        _spread(reach),
        _spread((reach - shift) * scale),
        error_before=found[0][0],
        error_after=error,
    )
    return result, ChannelAffine(scale, scale * shift, pair.site)


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """The largest of each channel's values, from (channels * k,), where a flattened map has k values a channel."""
    return values.view(channels, -1).amax(1)


def _low(pair: LayerPair, rectified: Tensor) -> Tensor:
    """What each channel (C,) hardly falls below and may be shifted by; 0 where a shift is not possible."""
    channels = len(pair.producer.weight)
    low = torch.quantile(rectified[:, 0], _LOW, dim=0).clamp_min(0).view(channels, -1).amin(1)
    if pair.clip is not None:
        low = torch.where(rectified[:, 2].mean(0).view(channels, -1).mean(1) <= _CLIPPED, low, 0.0)
    possible = not pair.grid.signed and None not in (pair.producer.bias, pair.consumer.bias)
    return low if possible else torch.zeros_like(low)


def _scales(reach: Tensor, clipped: Tensor | None, exponent: float) -> Tensor:
    """Scales (C,) of at least 1 for channels that reach (C,) far, and `clipped` (C,) far behind a ReLU6."""
    widest = reach.max()
    scale = (widest / reach.clamp_min(1e-12)).clamp(1.0, _MOST).pow(exponent)
    scale = torch.where(reach > 0, scale, 1.0)
    if clipped is not None:
        scale = torch.minimum(scale, (_CLIP / (_MARGIN * clipped.clamp_min(1e-12))).clamp_min(1.0))
    return scale


def _spread(reach: Tensor) -> float:
    return float(reach.max() / reach.median().clamp_min(1e-12))


def _errors(pair: LayerPair, x: Tensor, exact: Tensor, scale: Tensor, shift: Tensor, rng: torch.Generator) -> Tensor:
    """Squared error of the consumer's outputs with quantized input and weight, relative to their variance, (O,).

    A constant error does not count, for the bias removes it, and one at the border of a map counts little.
    """
    layer, k = pair.consumer, x.shape[1] // len(scale)
    shape = (1, -1, *[1] * (x.dim() - 2))
    factor, offset = scale.repeat_interleave(k), shift.repeat_interleave(k)
    mapped = (x - offset.view(shape)) * factor.view(shape)
    if not pair.grid.signed:
        mapped = mapped.clamp_min(0)
    sample = mapped.flatten()
    if len(sample) > _SEARCHED_VALUES:
        picked = torch.randint(len(sample), (_SEARCHED_VALUES,), generator=rng, device=rng.device)
        sample = sample[picked.to(sample.device)]
    rounded = Quantizer("input", pair.grid, limit=_CLIP if pair.clip is not None else math.inf).to(x.device)
    rounded.set_scale(activation_scale(sample, pair.grid))
    weight = _columns_scaled(layer, 1 / factor)
    own = layer.weight_quantizer
    weights = Quantizer("weight", own.grid, len(weight), pair_limit=own.pair_limit).to(x.device)
    weights.set_scale(weight_scales(weight, own.grid, pair_limit=own.pair_limit))
    difference = _outputs(layer, rounded(mapped), weights(weight)) - exact
    dims = pooled_dims(layer, exact)
    counts = _counts(layer, x).expand_as(difference)
    total = counts.sum(dims, keepdim=True)
    centred = difference - (difference * counts).sum(dims, keepdim=True) / total
    variance = exact.var(dims)
    floor = (_LEAST_VARIANCE * variance.mean()).clamp_min(1e-12)
    return (centred.square() * counts).sum(dims) / total.flatten() / torch.maximum(variance, floor)


def _counts(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What each position of a layer's outputs counts, (1, 1, H, W) of a convolution: little where it reads padding."""
    if not isinstance(layer, nn.Conv2d):
        return x.new_ones(())
    real = (x != 0).any(0).any(0).to(x)  # rows and columns of zeros are padding as well
    window = x.new_ones(1, 1, *layer.kernel_size)
    read = F.conv2d(padded(layer, real[None, None]), window, None, layer.stride, 0, layer.dilation)
    return torch.where(read > window.numel() - 0.5, 1.0, _BORDER)


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


def _apply(pair: LayerPair, found: ChannelAffine) -> None:
    producer, consumer = pair.producer, pair.consumer
    columns = consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features
    k = columns // len(found.scale)
    shift = found.shift / found.scale
    if consumer.bias is not None:
        consumer.bias.add_(_columns_scaled(consumer, shift.repeat_interleave(k)).flatten(1).sum(1))
    consumer.weight.copy_(_columns_scaled(consumer, 1 / found.scale.repeat_interleave(k)))
    producer.weight.mul_(found.scale.view(-1, *[1] * (producer.weight.dim() - 1)))
    if producer.bias is not None:
        producer.bias.mul_(found.scale).sub_(found.shift)
