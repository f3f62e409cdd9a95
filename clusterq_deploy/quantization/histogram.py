"""Histograms, for the report, of the values that a student rounds, in steps of their grids."""

import math

import torch
from torch import Tensor

from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization.fake_quant import QuantizedLayer, Quantizer, group_count, random_places
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.reference import ChannelAffine, FloatTwin
from clusterq_deploy.quantization.student import Student
from clusterq_deploy.results.report import Histogram, LayerHistograms

_IMAGES = 64
_ACTIVATIONS = 1 << 16  # sampled values of a layer's input
_WEIGHTS = 1 << 18  # sampled values of its weight; most layers have fewer
_BINS = 64
_BEYOND = 0.5  # of the grid's width: how far the bins follow the values past each of its ends


@torch.no_grad()
def histograms(
    student: Student, reference: FloatTwin, images: Tensor, *, batch_size: int, rng: torch.Generator
) -> list[LayerHistograms]:
    """Return histograms of the teacher's weights and activations, in the student's channels and steps of its grids.

    The values are the teacher's: the student's own are on the grid already if its weights were reconstructed. The grids
    are ONNX Runtime's: an activation of 8 bits that cannot be negative has every second value in TensorRT.

    Args:
        student: as it will be exported.
        reference: what it was made from.
        images: (N, C, H, W) float32, normalized; 64 random ones are used.
        batch_size: images per forward pass, fewer if memory runs out.
        rng: chooses images and values, 65,536 of an activation and 262,144 of a weight at most.

    Returns:
        One entry per quantized layer, in order of execution.
    """
    quantizers, layers, twins = student.quantizers(), student.layers(), reference.graph.layers()
    sites = {site.layer: site.input_site for site in student.placement.weights}
    by_site = {affine.site: affine for affine in reference.maps.values()}
    sample = images[torch.randperm(len(images), generator=rng, device=rng.device)[:_IMAGES].cpu()]
    state = rng.get_state()

    def read_inputs(divisor: int) -> dict[str, Tensor]:
        rng.set_state(state)
        batches = sample.split(max(1, batch_size // divisor))

        def select(name: str, x: Tensor) -> Tensor:
            places = random_places(x, max(1, _ACTIVATIONS // len(batches)), rng)
            values, affine = x[places], by_site.get(sites[name])
            if affine is not None:
                channel = places[1] // (x.shape[1] // len(affine.scale))
                values = values * affine.scale[channel] - affine.shift[channel]
            return values.cpu()

        return reference.graph.collect_inputs(twins, batches, select)

    inputs, _ = retry_on_oom(read_inputs, "histograms")
    result = []
    for name, layer in layers.items():
        quantizer, site = layer.weight_quantizer, quantizers[sites[name]]
        weights = _weights(twins[name], quantizer.scale, reference.maps.get(name), by_site.get(sites[name]), rng).cpu()
        activations = inputs[name] / float(site.scale)
        if not site.grid.signed:
            activations.clamp_min_(0)  # below it is what the student's rectifier cuts off behind a shift
        weight, activation = _histogram(weights, quantizer), _histogram(activations, site)
        result.append(LayerHistograms(layer=name, weight=weight, activation=activation))
    return result


def histogram(values: Tensor, grid: Grid, steps: tuple[float, float]) -> Histogram:
    """Return the histogram of values (n,) float32 in steps of a grid: at most 64 bins, a power of two wide."""
    levels = grid.high - grid.low + 1
    first, last = grid.low - 0.5, grid.high + 0.5  # what is between is rounded to the grid, not clipped
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
    return Histogram(
        low=grid.low, high=grid.high, steps=steps, start=start, width=width, counts=counts, clipped=float(clipped)
    )


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
    """Return some of a teacher's weight in steps of the student's scale (O,).

    `written` and `read` map the channels of the layer's outputs and inputs; None for the teacher's own.
    """
    weight, groups = layer.weight, group_count(layer)
    places = random_places(weight, _WEIGHTS, rng)
    values = weight[places] / scale[places[0]]
    if written is not None:
        values *= written.scale[places[0]]
    if read is not None:
        group = places[0] // (len(weight) // groups)
        columns = groups * weight.shape[1]
        values /= read.scale[(group * weight.shape[1] + places[1]) // (columns // len(read.scale))]
    return values
