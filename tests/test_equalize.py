"""Cross-layer equalisation and bias correction: what they must not change, and what they must fix."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, calibrated, captured, distance, images, make_net, require_same, twin
from support import seeded
from torch import Tensor, nn

from clusterq_deploy.quantization import (
    BitWidths,
    FloatTwin,
    Student,
    calibrate,
    correct_bias,
    equalize,
    make_student,
    reconstruct,
)
from clusterq_deploy.quantization.ptq.equalize import Equalized, equalize_trunks
from clusterq_deploy.quantization.ptq.ptq import PTQResult, equalize_and_calibrate
from clusterq_deploy.quantization.qat.losses import feature_sites, matched_features
from clusterq_deploy.quantization.reference import ChannelAffine


def uneven(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the net with channels of very different ranges, as those of depthwise nets are."""
    generator = seeded(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                factor = torch.rand(len(module.weight), generator=generator).mul(6).sub(4).exp2()
                module.weight.mul_(factor.view(-1, *[1] * (module.weight.dim() - 1)))
                if module.bias is not None:
                    module.bias.copy_(0.5 * factor * torch.randn(len(factor), generator=generator))
    return net.eval().requires_grad_(False)


def equalized(net: nn.Module, bits: str = "w4a4") -> tuple[Student, set[tuple[str, str]]]:
    student = make_student(captured(net), BitWidths.parse(bits))
    found, _ = equalize(student, images(), rng=seeded(), shifts=False)
    return student, {(pair.producer, pair.consumer) for pair in found}


def chain(*between: nn.Module, last: nn.Module | None = None) -> nn.Module:
    return uneven(nn.Sequential(nn.Conv2d(3, 8, 3), *between, last or nn.Conv2d(8, 6, 3), nn.Flatten()))


@pytest.mark.parametrize(
    "net",
    [
        chain,
        lambda: chain(nn.ReLU(), nn.Dropout()),
        lambda: chain(nn.LeakyReLU(0.2), nn.ZeroPad2d(1)),
        lambda: chain(nn.PReLU(8), nn.MaxPool2d(2)),
        lambda: chain(nn.ReLU(), last=nn.Conv2d(8, 8, 3, groups=8)),
        lambda: chain(nn.ReLU(), last=nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1)),
        lambda: chain(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), last=nn.Linear(32, 5)),
        lambda: uneven(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4))),
    ],
)
def test_equalize_chain_keeps_outputs(net: Callable[[], nn.Module]) -> None:
    teacher = net()
    student, pairs = equalized(teacher)
    assert len(pairs) == 1
    require_same(student, teacher, images(64, seed=7), atol=1e-5)


def test_equalize_depthwise_reader_evens_ranges() -> None:
    student = make_student(captured(chain(nn.ReLU(), last=nn.Conv2d(8, 8, 3, groups=8))), BitWidths(4, 4))
    (pair,), _ = equalize(student, images(), rng=seeded(), shifts=False)
    assert pair.exponent == 1.0  # nothing speaks against it: every row of the reader has one column
    assert pair.range_ratio_after == pytest.approx(1.0)
    assert pair.range_ratio_before > 2
    assert pair.error_after < 0.5 * pair.error_before


def test_equalize_leaves_clipped_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([20.0, 0.1, 1, 0.2, 20, 0.3, 0.5, 1]).view(-1, 1, 1, 1))
    teacher = net.eval().requires_grad_(False)
    student, pairs = equalized(teacher)
    assert len(pairs) == 1
    before, after = teacher[0].weight, student.net.get_submodule("0").weight
    assert torch.equal(before[[0, 4]], after[[0, 4]])  # the clip binds there
    assert float(after[1].detach().norm() / before[1].norm()) > 4
    require_same(student, teacher, images())


def narrow(last: nn.Module, between: nn.Module) -> nn.Module:
    """Return a layer whose channels move around 3, by 0.2 and more, and one that reads them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), between, last, nn.Flatten())
    with torch.no_grad():
        net[0].weight.mul_(torch.linspace(0.1, 0.6, 8).view(-1, 1, 1, 1))
        net[0].bias.fill_(3.0)
    return net.eval().requires_grad_(False)


def shifted(
    teacher: nn.Module, data: Tensor | None = None, bits: str = "w4a4"
) -> tuple[Student, Equalized, dict[str, ChannelAffine]]:
    """Return a student, its only pair that was equalized, and the maps of its channels."""
    student = make_student(captured(teacher), BitWidths.parse(bits), quantize_first_last=True)
    (pair,), maps = equalize(student, images() if data is None else data, rng=seeded())
    return student, pair, maps


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("last", [nn.Conv2d(8, 6, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3)])
def test_equalize_shifts_channels_far_from_zero(last: nn.Module, between: nn.Module) -> None:
    teacher = narrow(last, between)
    student, pair, maps = shifted(teacher)
    assert pair.shifted == 8
    assert pair.error_after < 0.5 * pair.error_before
    fresh = images(64, seed=7)
    with torch.no_grad(), student.in_float():
        assert distance(student, teacher, fresh) < 0.01  # what is under the shift is cut
        torch.testing.assert_close(student.layers()["0"](fresh), maps["0"](teacher[0](fresh)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equalize_shifts_large_map_before_pad(seed: int) -> None:
    torch.manual_seed(seed)  # of the layer: by another draw a channel may gain nothing by it
    last = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, stride=2, groups=8))
    _, pair, _ = shifted(narrow(last, nn.ReLU6()), torch.randn(32, 3, 96, 96, generator=seeded()))
    assert pair.shifted == 8
    assert pair.error_after < 0.7 * pair.error_before


def test_equalize_does_not_shift_mostly_padded_map() -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(8, 8, 15, padding=7, groups=8)  # most of what it reads is padding
    _, pair, maps = shifted(narrow(last, nn.ReLU()), bits="w4a8")
    assert pair.shifted == 0
    assert bool((maps["0"].shift == 0).all())


@pytest.mark.parametrize(
    ("side", "count", "between"),
    [
        (16, 0, (nn.Flatten(), nn.ReLU())),  # one value an image and feature: what it hardly falls below is not seen
        (8, 8, (nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten())),
    ],
)
def test_equalize_flattened_map_per_channel(side: int, count: int, between: tuple[nn.Module, ...]) -> None:
    teacher = narrow(nn.Linear(8 * side * side, 5), nn.Sequential(*between))
    student, pair, maps = shifted(teacher)
    assert pair.shifted == count
    assert len(maps["0"].shift) == 8
    with student.in_float():
        assert distance(student, teacher, images(64, seed=7)) < 0.05


def test_channel_affine_is_exact_in_bfloat16() -> None:
    x = torch.linspace(2.9, 3.1, 64).bfloat16().view(1, 1, 8, 8)
    own = ChannelAffine(torch.tensor([13.2]), torch.tensor([38.28]), "x")
    expected = x.double() * 13.2 - 38.28
    assert float((own(x).double() - expected).abs().mean()) < 0.01


def test_equalize_does_not_shift_signed_tensors() -> None:
    assert shifted(narrow(nn.Conv2d(8, 6, 1), nn.LeakyReLU(0.1)))[1].shifted == 0


def test_reconstruct_and_correct_bias_with_maps() -> None:
    teacher, data = narrow(nn.Conv2d(8, 6, 1), nn.ReLU()), images(64)
    for fix in (reconstruct, correct_bias):
        student = make_student(captured(teacher), BitWidths(6, 6), quantize_first_last=True)
        reference = FloatTwin(copy.deepcopy(student), equalize(student, data, rng=seeded())[1])
        calibrate(student, data, batch_size=32, rng=seeded())
        extra = {"rng": seeded()} if fix is reconstruct else {}
        with torch.no_grad():
            fix(student, reference, data, **extra)
        assert distance(student, teacher, data) < 0.02


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_matched_features_with_maps(name: str) -> None:
    net = uneven(make_net(name))
    student = make_student(captured(net), BitWidths(4, 4))
    teacher = copy.deepcopy(student)
    found, maps = equalize(student, images(), rng=seeded(), shifts=False)
    assert any(pair.exponent > 0 for pair in found)
    reference = FloatTwin(teacher, maps)
    assert {own.site for own in maps.values()} <= set(feature_sites(student))
    assert len({own.site for own in maps.values()}) == len(maps) > 0
    with student.in_float(), matched_features(student, reference, images()) as loss, torch.no_grad():
        with teacher.in_float():
            teacher(images())
        student(images())
        assert float(loss()) < 1e-8


class Unfit(nn.Module):
    """Tensors that are no pair's: read twice, moved between channels, padded around channels, not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(i, 4, 1) for i in (3, 4, 4, 4, 6))
        self.f, self.g = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.hardswish(self.b(x)) + x
        x = torch.sigmoid(self.c(x))
        x = F.pad(F.relu(self.d(x)), (0, 0, 0, 0, 1, 1))
        x = self.e(x)
        x = self.f(F.adaptive_avg_pool2d(x, 8)).flatten(1)  # a linear layer on the last dimension
        return self.g(F.adaptive_avg_pool2d(x[:, None], (1, 4)).flatten(1))


def test_equalize_skips_unfit_tensors() -> None:
    teacher = uneven(Unfit())
    student, pairs = equalized(teacher)
    assert pairs == set()
    require_same(student, teacher, images(), atol=1e-5)


def test_equalize_nets_keeps_outputs() -> None:
    expected = {
        "residual": {("a1.0", "a2.0"), ("b1.0", "b2.0"), ("c1.0", "c2.0")},
        "mobile": {("expand.0.0", "depth.0.0"), ("squeeze", "excite")},
        "branches": {("conv", "fc")},
        "enlarging": {("stem.0", "up.0"), ("up.0", "down.0")},
    }
    for name, known in expected.items():
        net = make_net(name)
        student, pairs = equalized(net)
        assert pairs == known
        require_same(student, net, images())


def loud_trunk() -> nn.Module:
    """Return the net with residuals, one channel of its first trunk 60 times as large: the same function."""
    net = make_net("residual")
    with torch.no_grad():
        for norm in (net.stem[1], net.a2[1]):
            norm.weight[3] *= 60
            norm.bias[3] *= 60
        for reader in (net.a1[0], net.b1[0], net.down[0]):
            reader.weight[:, 3] /= 60
    return net


def test_equalize_trunks_gives_all_channels_of_a_residual_trunk_the_grid() -> None:
    plain, loud = calibrated("residual", "w8a8"), calibrated(loud_trunk(), "w8a8")
    teacher, fresh = make_net("residual"), images(64, seed=9)
    evened = make_student(captured(loud_trunk()), BitWidths(8, 8))
    start = equalize_and_calibrate(evened, images(), batch_size=16, rng=seeded())
    (trunk,) = start.trunks
    assert (trunk.producers, trunk.consumers) == (["stem.0", "a2.0"], ["a1.0", "b1.0", "down.0"])
    assert trunk.error_after < 0.05 * trunk.error_before
    require_same(evened, teacher, fresh, atol=1e-3)  # biases are rounded
    require_same(start.reference.graph, teacher, fresh)
    errors = [distance(student, teacher, fresh) for student in (plain, loud, evened)]
    assert errors[1] > 20 * errors[0]
    assert errors[2] < 2 * errors[0]


def test_equalized_trunks_are_restored_with_their_twin() -> None:
    student, again = (make_student(captured(loud_trunk()), BitWidths(8, 8)) for _ in range(2))
    start = equalize_and_calibrate(student, images(), batch_size=16, rng=seeded())
    restored = PTQResult.from_state(again, start.state_dict(student))
    torch.testing.assert_close(restored.trunks[0].scale, start.trunks[0].scale)
    for name, layer in start.reference.graph.layers().items():
        torch.testing.assert_close(restored.reference.graph.layers()[name].weight, layer.weight)


@pytest.mark.parametrize("name", NETS)
def test_equalize_trunks_leaves_even_trunks(name: str) -> None:
    student = make_student(captured(name), BitWidths(4, 4))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert equalize_trunks(student, images()) == []
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("dead", [[2], range(8)], ids=["one", "all"])
def test_equalize_dead_channels_stay_finite(dead: Sequence[int]) -> None:
    net = chain(nn.ReLU())
    with torch.no_grad():
        net[0].weight[list(dead)] = 0
        net[0].bias[list(dead)] = -1
    student, _ = equalized(net)
    assert all(bool(p.isfinite().all()) for p in student.parameters())


@pytest.mark.parametrize("name", NETS)
def test_correct_bias_removes_mean_shift(name: str) -> None:
    net, data = make_net(name), images(64)
    student = calibrated(net, "w3a8")
    with torch.no_grad():
        exact, before = net(data), student(data)
        shifts = correct_bias(student, twin(student), data)
        after = student(data)
    assert set(shifts) == set(student.layers())
    assert max(shifts.values()) > 0.01
    worst = float((before - exact).mean(0).abs().max())
    assert float((after - exact).mean(0).abs().max()) < 0.05 * worst + 1e-3
    with torch.no_grad(), student.in_float():
        assert not torch.equal(student(data), exact)  # the correction stands in the biases


def test_correct_bias_of_one_layer_by_its_formula() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5, bias=False)).eval()
    student, data = make_student(captured(net.requires_grad_(False)), BitWidths(2, 8)), images(16)
    calibrate(student, data, batch_size=16, rng=seeded())
    layer = student.layers()["0"]
    with torch.no_grad():
        rounded = student.quantizers()["input_1" if "input_1" in student.quantizers() else "input"](data)
        shift = (layer(rounded) - F.conv2d(data, layer.weight, layer.bias)).mean((0, 2, 3))
        step = student.accumulator_steps()["0"]
        expected = layer.bias - (shift / step).round() * step
        found = correct_bias(student, twin(student), data)
    assert set(found) == {"0"}  # a layer without a bias stays as it is
    torch.testing.assert_close(layer.bias, expected, rtol=1e-3, atol=1e-4)
