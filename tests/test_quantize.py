"""Grids, quantizers, where they go, and how their scales are found."""

import math
import re
from pathlib import Path

import pytest
import torch
from nets import NETS, calibrated, captured, images, make_net, require_same, synthesis
from support import seeded
from torch import nn

from clusterq_deploy.errors import ConfigError, GraphError, WeightsError
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    Grid,
    calibrate,
    finetune,
    load_student,
    make_student,
    post_training_quantize,
)
from clusterq_deploy.quantization.fake_quant import Quantizer
from clusterq_deploy.quantization.graph.fold import folded_teacher
from clusterq_deploy.quantization.graph.ops import value_ranges
from clusterq_deploy.quantization.graph.placement import TARGETS
from clusterq_deploy.quantization.ptq.calibrate import activation_scale, weight_scales
from clusterq_deploy.quantization.qat.losses import feature_loss, tap_features
from clusterq_deploy.quantization.student import FORMAT


@pytest.mark.parametrize(
    ("bits", "signed", "low", "high"),
    [
        (8, True, -128, 127),
        (4, True, -8, 7),
        (2, True, -2, 1),
        (4, False, 0, 15),
        (7, False, 0, 127),
        (8, False, 0, 255),
    ],
)
def test_grid_ends_and_reduced_grid(bits: int, signed: bool, low: int, high: int) -> None:
    grid = Grid(bits, signed)
    assert (grid.low, grid.high) == (low, high)
    assert grid.reduced == (None if high <= 127 else Grid(7, signed=False))


def test_reduce_range_keeps_every_second_value() -> None:
    quantizer = Quantizer("q", Grid(8, signed=False), limit=6.0)
    quantizer.set_scale(torch.tensor(1.0))
    assert float(quantizer.scale.detach()) * 255 == pytest.approx(6.0, rel=1e-5)
    assert float(quantizer.scale.detach()) * 255 <= 6.0
    x = torch.linspace(0, 7, 1000)
    fine, step = quantizer(x).detach(), float(quantizer.scale.detach())
    quantizer.reduce_range = True
    assert float(quantizer.scale.detach()) == 2 * step
    coarse = quantizer(x).detach()
    assert len(fine.unique()) == 256
    assert len(coarse.unique()) == 128
    assert bool(torch.isin(coarse, fine).all())
    quantizer.set_scale(torch.tensor(0.02))
    assert float(quantizer.scale.detach()) == pytest.approx(0.02)


def test_bit_widths_parse_reads_two_to_eight_bits() -> None:
    assert BitWidths.parse(" W4A8 ") == BitWidths(4, 8)
    assert str(BitWidths(2, 3)) == "w2a3"
    for wrong in ("w9a4", "w4a1", "w4a16"):
        with pytest.raises(ConfigError, match="from 2 to 8"):
            BitWidths.parse(wrong)


OFFERS = {"int4": "w4a4", "int8": "w8a8", "W8-A8": "w8a8", "a8w4": "w4a8", "w4": "w4a4", "4/8": "w4a8", "4a4": "w4a4"}


@pytest.mark.parametrize("text", [*OFFERS, "", "fp32", "wXaY", "w4a4a4", "int16"])
def test_bit_widths_parse_offers_what_was_perhaps_meant(text: str) -> None:
    with pytest.raises(ConfigError, match="name it like w8a8") as caught:
        BitWidths.parse(text)
    assert re.findall(r"did you mean (\w+)\?", str(caught.value)) == ([OFFERS[text]] if text in OFFERS else [])


def test_quantizer_rounds_half_to_even_and_clamps() -> None:
    quantizer = Quantizer("x", Grid(4, signed=True))
    quantizer.set_scale(torch.tensor(0.5))
    x = torch.tensor([0.25, 0.75, -0.25, -0.75, 0.3, 100.0, -100.0])
    expected = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.5, 3.5, -4.0])
    torch.testing.assert_close(quantizer(x), expected)
    assert quantizer.integers(x).tolist() == [0, 2, 0, -2, 1, 7, -8]


def test_quantizer_gradients_by_hand() -> None:
    quantizer = Quantizer("x", Grid(4, signed=False))
    quantizer.set_scale(torch.tensor(1.0))
    x = torch.tensor([0.3, 2.6, -1.0, 99.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    # round(v) - v inside, the bound outside; times the scale, for its logarithm is learned
    assert float(quantizer.log_scale.grad) == pytest.approx((0 - 0.3) + (3 - 2.6) + 0 + 15, rel=1e-5)


@pytest.mark.parametrize("channels", [None, 6])
def test_quantizer_gradients_match_straight_through_autograd(channels: int | None) -> None:
    generator = seeded(0)
    quantizer = Quantizer("x", Grid(4, signed=True), channels)
    quantizer.set_scale(torch.full(() if channels is None else (channels,), 0.2))
    x = torch.randn(6, 5, 3, 3, generator=generator).requires_grad_()
    weights = torch.randn(6, 5, 3, 3, generator=generator)
    scale = quantizer.scale.detach().requires_grad_()
    steps = x / (scale if channels is None else scale.view(-1, 1, 1, 1))
    inside = steps.clamp(-8, 7)
    rounded = (inside + (inside.round() - inside).detach()) * (scale if channels is None else scale.view(-1, 1, 1, 1))
    expected = torch.autograd.grad((weights * rounded).sum(), (x, scale))
    result = quantizer(x)
    torch.testing.assert_close(result, rounded.detach())
    found = torch.autograd.grad((weights * result).sum(), (x, quantizer.log_scale))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1] / 0.2, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quantizer_gradients_in_bfloat16_and_any_layout(layout: torch.memory_format, sliced: bool) -> None:
    generator = seeded(0)
    x = torch.randn(8, 32, 8, 8, generator=generator).bfloat16().to(memory_format=layout)
    x = (x[:, ::2] if sliced else x).requires_grad_()
    weights = torch.randn(x.shape, generator=generator).bfloat16()
    quantizer = Quantizer("x", Grid(4, signed=False))
    quantizer.set_scale(torch.tensor(0.25))  # exact in half precision, so that nothing is rounded but by the grid
    found = torch.autograd.grad((weights * quantizer(x)).sum(), (x, quantizer.log_scale))
    exact = x.detach().float().contiguous().requires_grad_()
    expected = torch.autograd.grad((weights.float() * quantizer(exact)).sum(), (exact, quantizer.log_scale))
    torch.testing.assert_close(found[0].float(), expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_quantizer_rounds_each_row_by_its_scale() -> None:
    quantizer = Quantizer("w", Grid(8, signed=True), channels=2)
    quantizer.set_scale(torch.tensor([1.0, 0.25]))
    weight = torch.tensor([[1.2, -3.4], [1.2, -3.4]])[:, :, None, None]
    expected = torch.tensor([[1.0, -3.0], [1.25, -3.5]])[:, :, None, None]
    torch.testing.assert_close(quantizer(weight), expected)


def test_set_scale_respects_limit_and_floor() -> None:
    quantizer = Quantizer("x", Grid(4, signed=False), limit=6.0)
    quantizer.set_scale(torch.tensor(100.0))
    assert 5.99 < float(quantizer.scale.detach()) * 15 <= 6.0
    quantizer.set_scale(torch.tensor(0.0))
    assert float(quantizer.scale.detach()) == pytest.approx(1e-8)


@pytest.mark.parametrize("name", NETS)
def test_fold_batchnorm_keeps_outputs(name: str) -> None:
    net = make_net(name)
    student = make_student(captured(net), BitWidths(8, 8))
    require_same(student, net, images())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())  # the teacher is left alone


def test_fold_batchnorm_leaves_pre_activation() -> None:
    folded = folded_teacher(captured("branches"))
    assert [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm"]
    reason = calibrated("branches").placement.skipped["norm"]
    assert reason == "BatchNorm2d: cat_1 in front of it, relu_3 behind it"


def test_place_residual_block() -> None:
    placement = calibrated("residual").placement
    sites = {site.name: site for site in placement.activations}
    both = {name for name, site in sites.items() if site.targets == ("onnxruntime", "tensorrt")}
    # the image, every ReLU that feeds a layer, the downsample branch, the pooled vector; max-pool has none of its own
    wide = {"x", "relu", "relu_1", "relu_2", "relu_3", "relu_4", "relu_5", "down_0", "adaptive_avg_pool2d"}
    # what an addition reads beside layers has 8 bits, and the layers a narrow quantizer behind it
    assert both == {*wide, "relu_4.narrow"}
    assert sites["relu"].grid == sites["relu_4"].grid == Grid(8, signed=False)
    assert sites["relu_4.narrow"].grid == Grid(4, signed=False)
    readers = {site.layer: site.input_site for site in placement.weights}
    assert readers["a1.0"] == "relu"  # what the first layer writes has its 8 bits
    assert readers["c1.0"] == "relu_4.narrow"
    # the branch that ends in a convolution is quantized for ONNX Runtime alone
    assert set(sites) - both == {"a2_0", "b2_0", "c2_0"}
    assert sites["relu_1"].grid == Grid(4, signed=False)
    assert sites["down_0"].grid == Grid(8, signed=True)
    assert sites["x"].grid == Grid(8, signed=True)
    assert sites["adaptive_avg_pool2d"].grid == Grid(8, signed=False)  # the last layer's input
    widths = {site.layer: site.grid.bits for site in placement.weights}
    assert widths["stem.0"] == widths["fc"] == 8
    assert widths["a1.0"] == 4


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Hardswish(), nn.Identity()])
def test_place_output_of_first_layer_has_its_bits(activation: nn.Module) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 100, 4)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), activation, *body).eval()
    for first_last, expected in ((False, {8}), (True, {4})):
        placement = make_student(captured(net), BitWidths(4, 4), quantize_first_last=first_last).placement
        bits = {site.name: site.grid.bits for site in placement.activations}
        inputs = {site.layer: site.input_site for site in placement.weights}
        assert {bits[inputs["2"]]} == expected
        assert bits[inputs["4"]] == 4


class Viewing(nn.Module):
    """Flattens a map by `view`, which one in channels last does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).relu()
        y: torch.Tensor = self.fc(x.view(x.size(0), -1))
        return y


def test_net_with_view_is_synthesized_for_and_tuned() -> None:
    torch.manual_seed(0)
    net = Viewing().eval().requires_grad_(False)
    settings = {"images": 32, "generator": {"steps": 2, "warmup_steps": 1}, "refine": {"steps": 1}}
    made, rng = synthesis(settings, net=net), seeded()
    student = make_student(captured(net), BitWidths(4, 4))
    started = post_training_quantize(student, made.calibration.images, batch_size=16, rng=rng)
    config = FinetuneConfig(steps=4, batch_size=8, checkpoints=1)
    finetune(student, started.reference, made.calibration, config=config, flip=False, rng=rng)
    assert bool(student(made.calibration.images).isfinite().all())


def test_quantize_first_last_gives_all_layers_the_same_bits() -> None:
    placement = calibrated("residual", "w3a3", quantize_first_last=True).placement
    assert {site.grid.bits for site in placement.weights} == {3}
    sites = {site.name: site.grid.bits for site in placement.activations}
    assert sites["x"] == 8
    assert sites["adaptive_avg_pool2d"] == sites["pool.narrow"] == sites["relu_1"] == 3


def test_place_concatenation_shares_one_scale() -> None:
    sites = {site.name: site for site in calibrated("branches").placement.activations}
    # left and right pass through shuffle and split into `second` and, with its output, into a BatchNorm
    assert sites["relu"].producers == ("relu", "relu_1")


def test_place_relu6_limits_and_unsigned_gates() -> None:
    student = calibrated("mobile")
    sites = {site.name: site for site in student.placement.activations}
    assert sites["stem_1"].limit == 6.0
    assert sites["mul"].limit == 6.0
    assert math.isinf(sites["add"].limit)
    assert not sites["mul"].grid.signed  # ReLU6 times hard-sigmoid
    assert sites["add"].grid.signed  # a linear bottleneck
    for name, site in sites.items():
        quantizer = student.quantizers()[name]
        assert float(quantizer.scale.detach()) * site.grid.high <= site.limit


def test_value_ranges_of_sums_and_differences() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = nn.functional.relu6(self.norm(self.conv(x)))
            return self.last(torch.add(a + a, a, alpha=-1) - 1) + self.last(x[:, :1].expand(-1, 4, -1, -1))

    class Doubled(Sums):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = nn.functional.relu6(self.norm(self.conv(x)))
            return self.last(a + a)

    ranges = {node.name: r for node, r in value_ranges(captured(Doubled().eval())).items()}
    assert ranges["relu6"] == (0, 6)
    assert ranges["add"] == (0, 12)
    ranges = {node.name: r for node, r in value_ranges(captured(Sums().eval())).items()}
    assert ranges["add_1"] == (-math.inf, math.inf)


def test_place_subclasses_with_torch_forward() -> None:
    class MyConv(nn.Conv2d):
        pass

    class MyNorm(nn.BatchNorm2d):
        pass

    net = nn.Sequential(MyConv(3, 4, 3), MyNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2)).eval()
    placement = make_student(captured(net), BitWidths(4, 4)).placement
    assert [site.layer for site in placement.weights] == ["0", "4"]
    assert not placement.skipped


def test_weight_scales_represent_a_lone_largest_weight() -> None:
    for bits in (2, 4, 8):
        weight = torch.zeros(1, 9)
        weight[0, 3] = 0.7
        scale = weight_scales(weight, Grid(bits, signed=True))
        quantizer = Quantizer("w", Grid(bits, signed=True), channels=1)
        quantizer.set_scale(scale)
        torch.testing.assert_close(quantizer(weight), weight, rtol=1e-4, atol=1e-6)


def test_searched_scales_beat_full_range() -> None:
    weight = torch.randn(8, 16, 3, 3, generator=seeded(0))
    grid = Grid(4, signed=True)

    def error(scale: torch.Tensor) -> torch.Tensor:
        step = scale.view(-1, 1, 1, 1)
        return ((weight / step).round().clamp(grid.low, grid.high) * step - weight).square().sum((1, 2, 3))

    searched = weight_scales(weight, grid)
    naive = weight.abs().amax((1, 2, 3)) / grid.high
    assert bool((error(searched) <= error(naive)).all())
    assert float(error(searched).sum() / error(naive).sum()) < 0.85
    values = torch.randn(10_000).relu()
    assert float(activation_scale(values, Grid(4, signed=False))) < float(values.max() / 15)


def test_calibrate_refuses_infinite_values() -> None:
    student = make_student(captured("residual"), BitWidths(4, 4))
    with pytest.raises(GraphError, match="not finite at 'relu_1'"):
        calibrate(student, images() * 7e37, batch_size=16, rng=seeded(0))


def test_round_biases_to_accumulator() -> None:
    student = calibrated("residual")
    quantizers = student.quantizers()
    for site in student.placement.weights:
        layer = student.layers()[site.layer]
        steps = layer.bias / (quantizers[site.input_site].scale * layer.weight_quantizer.scale)
        torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=1e-6)


def test_for_target_tensorrt_skips_residual_quantizer() -> None:
    student = calibrated("residual")
    with torch.no_grad():
        own = student(images())
        with student.for_target("tensorrt"):
            other = student(images())
        assert not torch.equal(own, other)
        assert torch.equal(student(images()), own)


def test_finetune_config_scaled_to_widths() -> None:
    config = FinetuneConfig()
    for bits in (BitWidths(4, 4), BitWidths(8, 4), BitWidths(4, 8), BitWidths(2, 4)):
        assert config.scaled_to(bits) == config
    eight = config.scaled_to(BitWidths(8, 8))
    assert eight.steps < config.steps
    assert eight.scale_learning_rate < config.scale_learning_rate


@pytest.mark.parametrize("net", ["mobile", "branches"])
def test_load_student_restores_student(net: str, tmp_path: Path) -> None:
    student, path = calibrated(net, "w5a6", quantize_first_last=True), tmp_path / "quantized.safetensors"
    path.write_bytes(student.to_bytes({"seed": 3}))
    again, provenance = load_student(path, captured(net))
    assert (again.bits, again.quantize_first_last, provenance) == (BitWidths(5, 6), True, {"seed": 3})
    with torch.no_grad():
        assert torch.equal(again(images()), student(images()))


@pytest.mark.parametrize(
    ("name", "student_format", "message"),
    [
        ("residual", 1, r"^\S+student\.safetensors is of another version"),
        ("mobile", FORMAT, "made from another model"),
        (None, FORMAT, "no quantized model"),
    ],
)
def test_load_student_refuses_files_that_do_not_fit(
    name: str | None, student_format: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("clusterq_deploy.quantization.student.FORMAT", student_format)
        path.write_bytes(b"nothing" if name is None else calibrated(name).to_bytes({}))
    with pytest.raises(WeightsError, match=message):
        load_student(path, captured("residual"))


def test_feature_loss_in_float_and_by_its_formula() -> None:
    student = calibrated("residual", "w3a3")
    with tap_features(student) as found:
        with torch.no_grad():
            student(images(8))
            rounded = list(found)
            with student.in_float():
                student(images(8))
        exact = list(found)
    common = [site for site in student.placement.activations if site.targets == TARGETS]
    assert len(exact) == len([site for site in common if not site.readers]) < len(common)
    variances = [feature.var() for feature in exact]
    assert float(feature_loss(exact, exact, variances)) == 0
    expected = [(a - b).square().mean() / b.var() for a, b in zip(rounded, exact, strict=True)]
    assert float(feature_loss(rounded, exact, variances)) == pytest.approx(float(torch.stack(expected).mean()))
    assert all(not q._forward_pre_hooks for q in student.quantizers().values())
