"""Layer-wise reconstruction: rounding that makes up for itself, weights fitted to quantized inputs."""

import sys

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, calibrated, captured, distance, images, make_net, twin
from support import seeded
from torch import nn

from clusterq_deploy.quantization import BitWidths, Grid, correct_bias, make_student, reconstruct
from clusterq_deploy.quantization.fake_quant import per_row
from clusterq_deploy.quantization.ptq.calibrate import weight_scales
from clusterq_deploy.quantization.ptq.reconstruct import _round_compensated, _sample_patches


def test_round_compensated_is_nearest_for_uncorrelated_inputs() -> None:
    weight = torch.randn(2, 5, 7, generator=seeded())
    hessian = torch.diag_embed(torch.rand(2, 7, generator=seeded()) + 0.5)
    scale = torch.full((2, 5), 0.3)
    expected = (weight / 0.3).round().clamp(-8, 7)
    found = _round_compensated(weight, hessian, scale, -8, 7)
    torch.testing.assert_close((found / 0.3).round(), expected)
    kept = expected + (weight / 0.3 - expected).clamp(-0.49, 0.49)  # how near it was to its other neighbour
    torch.testing.assert_close(found, kept.clamp(-8, 7) * 0.3)


@pytest.mark.parametrize("columns", [9, 200])
def test_round_compensated_beats_nearest_for_correlated_inputs(columns: int) -> None:
    common = torch.randn(1, 1, 4096, generator=seeded())
    x = common + 0.5 * torch.randn(3, columns, 4096, generator=seeded())
    weight = torch.randn(3, 4, columns, generator=seeded())
    hessian = x @ x.mT / 4096
    scale = torch.full((3, 4), 0.5)
    found = _round_compensated(weight, hessian, scale, -8, 7)
    assert float(found.abs().max()) <= 4
    rounded, plain = ((w / 0.5).round().clamp(-8, 7) * 0.5 for w in (found, weight))
    error, plain_error = (float(((w - weight) @ x).square().mean()) for w in (rounded, plain))
    assert error < 0.6 * plain_error


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.Conv2d(8, 12, (1, 3), padding=(0, 1), dilation=(1, 2), groups=4, bias=False),
        nn.ConvTranspose2d(8, 12, 2, 2, bias=False),
        nn.ConvTranspose2d(8, 12, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(1, 2)),
        nn.ConvTranspose2d(8, 12, 3, padding=3),  # narrower than what it reads
    ],
)
def test_sample_patches_reproduce_layer_outputs(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    student = make_student(captured(nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.Flatten()).eval()), BitWidths(4, 8))
    quantized = student.layers()["1"]
    x = torch.randn(4, 8, 9, 9, generator=seeded())
    with torch.no_grad():
        outputs = layer(x)
        weight = quantized.weight.view(layer.groups, 12 // layer.groups if layer.groups < 8 else 1, -1)
        for patches, wanted in _sample_patches(quantized, x, outputs, seeded()):
            torch.testing.assert_close(weight @ patches, wanted, rtol=1e-4, atol=1e-5)


def test_weight_scales_follow_importance() -> None:
    weight = torch.tensor([[1.0, 0.11, 0.12, 0.09]])
    importance = torch.tensor([[1e-6, 1.0, 1.0, 1.0]])
    plain, weighed = (weight_scales(weight, Grid(3, signed=True), i) for i in (None, importance))
    assert float(weighed) < 0.5 * float(plain)


@pytest.mark.parametrize("name", NETS)
def test_reconstruct_brings_student_nearer_to_teacher(name: str) -> None:
    net, data, fresh = make_net(name), images(256), images(256, seed=9)
    student, other = calibrated(net, "w3a8"), calibrated(net, "w3a8")
    before = distance(student, net, fresh)
    errors = reconstruct(student, twin(student), data, rng=seeded())
    correct_bias(other, twin(other), data)
    assert set(errors) == set(student.layers())
    assert all(after <= before * 1.05 + 1e-4 for before, after in errors.values())
    assert distance(student, net, fresh) < 0.5 * before
    assert distance(student, net, fresh) < 1.1 * distance(other, net, fresh)
    for layer in student.layers().values():  # no weight is on the boundary to another integer
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        assert bool((quantizer.scale > 0).all())
        with torch.no_grad():
            apart = (weight - quantizer(weight)).abs() / per_row(quantizer.scale, weight)
        assert 0.1 < float(apart.max()) <= 0.4901
    settled = {k: v.clone() for k, v in student.state_dict().items()}
    student.round_biases_to_accumulator()
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value, settled[key])


def test_reconstruct_dead_channels_stay_finite() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1)
        net[2].weight.mul_(0.3)[3] = 0  # so small that the bias's grid, which has the weight's step, is finer than 1e-3
    student = calibrated(net.requires_grad_(False), "w4a4")
    reconstruct(student, twin(student), images(), rng=seeded())
    assert all(bool(p.isfinite().all()) for p in student.parameters())
    with torch.no_grad():
        torch.testing.assert_close(student(images()), net(images()), rtol=1e-3, atol=1e-3)
        assert bool(F.relu(student(images())).isfinite().all())


def test_reconstruct_fits_inputs_that_hardly_vary_next_to_their_mean() -> None:
    net, x = make_net("residual"), images(64)
    with torch.no_grad():
        net.c2[1].bias += 3000
    student = calibrated(net, "w4a4")
    errors = reconstruct(student, twin(student), x, rng=seeded())
    assert all(torch.tensor(pair).isfinite().all() for pair in errors.values())
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_reconstruct_skips_very_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["clusterq_deploy.quantization.ptq.reconstruct"]
    monkeypatch.setattr(module, "_WIDEST", 1)
    student = calibrated(make_net("residual"), "w4a4")
    before = {name: layer.weight.clone() for name, layer in student.layers().items()}
    reconstruct(student, twin(student), images(), rng=seeded())
    assert all(torch.equal(layer.weight, before[name]) for name, layer in student.layers().items())
