"""How the values that a student rounds lie on their grids: histograms for the report."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization.fake_quant import QuantizedLayer, Quantizer
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.reference import ChannelAffine, FloatTwin
from clusterq_deploy.quantization.student import Student

_IMAGES = 64
_ACTIVATIONS = 1 << 16  # values of a layer's input that are looked at
_WEIGHTS = 1 << 18  # and of its weight: most layers have fewer
_BINS = 64
_BEYOND = 0.5  # of the grid's width: how far the bins follow the values past each of its ends


@dataclass(frozen=True)
class Histogram:
    """Values in steps of their grid, so that the grid's are the integers from `low` to `high`.

    Attributes:
        low, high: the ends of the grid.
        steps: the smallest and the largest step of an output channel; equal where the tensor has one step.
        start, width: bin i of `counts` begins at start + i * width, in steps. A bin lies in one step or covers whole
            ones; none holds clipped values beside others. The outermost two hold what lies beyond.
        counts: the number of values in each bin.
        clipped: share of the values, in [0, 1], that are rounded to an integer past an end, and cut off there.
    """

    low: int
    high: int
    steps: tuple[float, float]
    start: float
    width: float
    counts: list[int]
    clipped: float


@dataclass(frozen=True)
class LayerHistograms:
    """A layer by the teacher's name for it: its weight, and the activation that it reads."""

    layer: str
    weight: Histogram
    activation: Histogram


@torch.no_grad()
def histograms(
    student: Student, reference: FloatTwin, images: Tensor, *, batch_size: int, rng: torch.Generator
) -> list[LayerHistograms]:
    """What the teacher has at each quantized layer, in the student's channels and in steps of the student's grids.

    The teacher's values, for the student's own are on the grid already where its weights were reconstructed. The grids
    are ONNX Runtime's: an activation of 8 bits that cannot be negative has every second value in TensorRT.

    Args:
        student: as it will be exported.
        reference: what it was made from.
        images: (N, C, H, W) float32, normalized; 64 at random are looked at.
        batch_size: images a forward pass, fewer where memory asks for it.
        rng: chooses images and values, 65,536 of an activation and 262,144 of a weight at most.

    Returns:
        One entry a quantized layer, in order of execution.
    """
    quantizers, layers, exact = student.quantizers(), student.layers(), reference.graph.layers()
    read = {site.layer: site.input_site for site in student.placement.weights}
    by_site = {own.site: own for own in reference.maps.values()}
    some = images[torch.randperm(len(images), generator=rng, device=rng.device)[:_IMAGES].cpu()]
    maps, state = {name: by_site.get(site) for name, site in read.items()}, rng.get_state()

    def read_by(divisor: int) -> dict[str, Tensor]:
        rng.set_state(state)
        return _inputs(reference.graph, some, max(1, batch_size // divisor), maps, rng)

    inputs, _ = retry_on_oom(read_by, "histograms")
    found = []
    for name, layer in layers.items():
        quantizer, site = layer.weight_quantizer, quantizers[read[name]]
        written, columns = reference.maps.get(name), by_site.get(read[name])
        values = _weights(exact[name], quantizer.scale, written, columns, rng).cpu()
        activation = inputs[name] / float(site.scale)
        if not site.grid.signed:
            activation.clamp_min_(0)  # below it is what the student's rectifier cuts off behind a shift
        found.append(LayerHistograms(name, _histogram(values, quantizer), _histogram(activation, site)))
    return found


def histogram(values: Tensor, grid: Grid, steps: tuple[float, float]) -> Histogram:
    """The histogram of values (n,) float32, in steps of a grid: at most 64 bins, whose width is a power of two."""
    levels = grid.high - grid.low + 1
    first, last = grid.low - 0.5, grid.high + 0.5  # what lies between is rounded to the grid, not clipped
    below = min(max(first - float(values.min()), 0.0), _BEYOND * levels)
    above = min(max(float(values.max()) - last, 0.0), _BEYOND * levels)
    width = 2.0 ** math.ceil(math.log2((levels + below + above) / _BINS))
    while (bins := math.ceil(below / width) + math.ceil(levels / width) + math.ceil(above / width)) > _BINS:
        width *= 2
    start = first - math.ceil(below / width) * width
    places = ((values - start) / width).floor_().clamp_(0, bins - 1).long()
    rounded = values.round()
    clipped = ((rounded < grid.low) | (rounded > grid.high)).float().mean()
    counts = torch.bincount(places, minlength=bins).tolist()
    return Histogram(grid.low, grid.high, steps, start, width, counts, float(clipped))


def _histogram(values: Tensor, quantizer: Quantizer) -> Histogram:
    scale = quantizer.scale
    return histogram(values, quantizer.grid, (float(scale.min()), float(scale.max())))


def _weights(
    layer: QuantizedLayer,
    scale: Tensor,
    written: ChannelAffine | None,
    read: ChannelAffine | None,
    rng: torch.Generator,
) -> Tensor:
    """Some of a teacher's weight in steps of the student's scale (O,), whose channels `written` and `read` tell of."""
    weight = layer.weight
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    at = _places(weight, _WEIGHTS, rng)
    values = weight[at] / scale[at[0]]
    if written is not None:
        values *= written.scale[at[0]]
    if read is not None:
        group = at[0] // (len(weight) // groups)
        columns = groups * weight.shape[1]
        values /= read.scale[(group * weight.shape[1] + at[1]) // (columns // len(read.scale))]
    return values


def _inputs(
    net: Student, images: Tensor, batch_size: int, maps: dict[str, ChannelAffine | None], rng: torch.Generator
) -> dict[str, Tensor]:
    """Some of the float values that each layer of a teacher reads, (n,) float32 on the CPU, in the student's channels.

    Args:
        net: the teacher.
        images: (N, C, H, W) float32, normalized.
        batch_size: images a forward pass.
        maps: of the channels that a layer reads, by layer.
        rng: chooses the values.
    """
    batches = images.split(batch_size)
    seen: dict[str, list[Tensor]] = {name: [] for name in maps}

    def hook(name: str, own: ChannelAffine | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            at = _places(x, max(1, _ACTIVATIONS // len(batches)), rng)
            values = x[at]
            if own is not None:
                channel = at[1] // (x.shape[1] // len(own.scale))
                values = values * own.scale[channel] - own.shift[channel]
            seen[name].append(values.cpu())

        return record

    with ExitStack() as hooks, net.in_float():
        for name, layer in net.layers().items():
            hooks.enter_context(layer.register_forward_pre_hook(hook(name, maps[name])))
        for batch in batches:
            net(batch.to(next(net.parameters()).device))
    return {name: torch.cat(values) for name, values in seen.items()}


def _places(x: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, ...]:
    """Indices of all values of a tensor, or of so many at random where it has more; one tensor a dimension.

    Of the dimensions and not of the flat tensor, which in another memory layout would be a copy.
    """
    if x.numel() <= count:
        flat = torch.arange(x.numel(), device=x.device)
    else:
        flat = torch.randint(x.numel(), (count,), generator=rng, device=rng.device).to(x.device)
    return tuple(torch.unravel_index(flat, x.shape))
