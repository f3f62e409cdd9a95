"""Histograms of weights and activations on their grids."""

from itertools import zip_longest

import pytest
import torch
from nets import captured, images
from support import seeded
from torch import Tensor, nn

from clusterq_deploy.quantization import (
    BitWidths,
    FloatTwin,
    Grid,
    PTQResult,
    Student,
    histograms,
    make_student,
)
from clusterq_deploy.quantization.histogram import histogram
from clusterq_deploy.quantization.ptq.ptq import equalize_and_calibrate, reconstruct_or_correct_bias
from clusterq_deploy.results.report import LayerHistograms

IMAGES = 16  # few enough that every value is looked at


def lifted() -> nn.Module:
    """Layers whose channels never come near zero, so that they are shifted; one reads groups, one a flattened map."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(1728, 4)
        )
    with torch.no_grad():
        for index in (0, 2):
            net[index].weight.mul_(torch.linspace(0.02, 0.3, len(net[index].weight)).view(-1, 1, 1, 1))
            net[index].bias.fill_(3.0)
    return net.eval().requires_grad_(False)


def initialized(name: str, bits: str) -> tuple[Student, FloatTwin]:
    student = make_student(captured(lifted() if name == "lifted" else name), BitWidths.parse(bits))
    rng = seeded(0)
    return student, equalize_and_calibrate(student, images(), batch_size=16, rng=rng).reference


def found(student: Student, reference: FloatTwin, batch_size: int = IMAGES) -> list[LayerHistograms]:
    rng = seeded(1)
    return histograms(student, reference, images(IMAGES), batch_size=batch_size, rng=rng)


def difference(counts: list[int], others: list[int]) -> float:
    """Return the share of the values that are in other bins."""
    return sum(abs(a - b) for a, b in zip_longest(counts, others, fillvalue=0)) / 2 / sum(counts)


@pytest.mark.parametrize("spread", [0.05, 0.4, 1.0, 30.0])
@pytest.mark.parametrize("grid", [Grid(2, True), Grid(4, True), Grid(4, False), Grid(8, True), Grid(8, False)])
def test_histogram_counts_every_value_apart_from_clipped(grid: Grid, spread: float) -> None:
    values = torch.randn(5000, generator=seeded(0)) * spread * grid.high
    if not grid.signed:
        values = values.relu()
    result = histogram(values, grid, (0.1, 0.2))
    edges = [result.start + i * result.width for i in range(len(result.counts) + 1)]
    assert (result.low, result.high, result.steps) == (grid.low, grid.high, (0.1, 0.2))
    assert sum(result.counts) == len(values)
    assert len(result.counts) <= 64
    assert {grid.low - 0.5, grid.high + 0.5} <= set(edges)
    direct = float(((values < grid.low - 0.5) | (values > grid.high + 0.5)).float().mean())
    assert result.clipped == pytest.approx(direct, abs=1e-7)
    outside = sum(
        count for count, left in zip(result.counts, edges, strict=False) if not grid.low - 0.5 <= left < grid.high + 0.5
    )
    assert outside == round(direct * len(values))
    for place in range(1, len(result.counts) - 1):
        inside = (values >= edges[place]) & (values < edges[place + 1])
        assert result.counts[place] == int(inside.sum())


def test_histogram_outlier_keeps_grid_resolution() -> None:
    values = torch.cat([torch.linspace(-8, 7, 99), torch.tensor([1e6])])
    result = histogram(values, Grid(4, True), (1.0, 1.0))
    assert result.clipped == pytest.approx(0.01)
    assert result.counts[-1] == 1
    assert result.start + len(result.counts) * result.width == 15.5  # half the grid's width past its end


def test_histogram_of_zeros_has_one_bin() -> None:
    result = histogram(torch.zeros(7), Grid(4, False), (1.0, 1.0))
    assert [count for count in result.counts if count] == [7]
    assert result.clipped == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "mobile", "branches", "lifted"])
def test_histograms_match_untuned_student(name: str) -> None:
    """Before anything is tuned the student's own values in float are the teacher's in the student's channels."""
    student, reference = initialized(name, "w8a8")
    result = found(student, reference)
    layers, quantizers = student.layers(), student.quantizers()
    assert [own.layer for own in result] == list(layers)
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
        for key, layer in layers.items()
    ]
    with student.in_float():
        student(images(IMAGES))
    for hook in hooks:
        hook.remove()
    for own, site in zip(result, student.placement.weights, strict=True):
        quantizer, read = layers[own.layer].weight_quantizer, quantizers[site.input_site]
        weight = layers[own.layer].weight / quantizer.scale.view(-1, *[1] * (layers[own.layer].weight.dim() - 1))
        direct = histogram(weight.flatten(), quantizer.grid, own.weight.steps)
        assert difference(own.weight.counts, direct.counts) < 1e-3
        assert own.weight.clipped == pytest.approx(direct.clipped, abs=1e-3)
        assert own.weight.steps == (float(quantizer.scale.min()), float(quantizer.scale.max()))
        assert (own.activation.low, own.activation.high) == (read.grid.low, read.grid.high)
        assert own.activation.steps == (float(read.scale), float(read.scale))
        direct = histogram((inputs[own.layer] / read.scale).flatten(), read.grid, own.activation.steps)
        assert own.activation.start == direct.start
        assert difference(own.activation.counts, direct.counts) < 0.01
        assert own.activation.clipped == pytest.approx(direct.clipped, abs=0.001)


def test_histogram_nets_have_mapped_channels() -> None:
    for name in ("residual", "mobile", "lifted"):
        _, reference = initialized(name, "w8a8")
        assert any(bool((own.scale > 1.5).any()) for own in reference.maps.values()), name
    assert all(bool((own.shift > 1).any()) for own in reference.maps.values())
    assert set(reference.maps) == {"0", "2"}


def test_histograms_show_weight_before_reconstruction() -> None:
    student, reference = initialized("residual", "w4a4")
    reconstruct_or_correct_bias(student, images(), PTQResult(reference, [], [], {}, {}), rng=seeded(0))
    layer = student.layers()["b2.0"]
    with torch.no_grad():  # on its grid
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
    weight = next(own.weight for own in found(student, reference) if own.layer == "b2.0")
    assert sum(weight.counts) == layer.weight.numel()
    assert sum(count > 0 for count in weight.counts) > 20  # the grid has sixteen values


def test_histograms_independent_of_batch_size_remove_hooks() -> None:
    student, reference = initialized("residual", "w8a8")
    assert found(student, reference, 16) == found(student, reference, 5)
    assert all(not layer._forward_pre_hooks for layer in reference.graph.layers().values())
    assert all(quantizer.enabled for quantizer in reference.graph.quantizers().values())


def test_histograms_retry_in_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    student, reference = initialized("residual", "w8a8")
    whole = found(student, reference)

    def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    next(iter(reference.graph.layers().values())).register_forward_pre_hook(narrow)
    assert found(student, reference) == whole
    assert [record.args[1] for record in caplog.records if record.args] == [2, 4]
