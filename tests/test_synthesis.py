"""Synthesis: every term does its work, the same seed makes the same images, and divergence ends in an error."""

import importlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import conv_bn, digits, images, make_net, synthesis
from pydantic import ValidationError
from support import seeded
from torch import Tensor, nn

from calib import CalibrationSet, GeneratorConfig, RefineConfig, SynthesisConfig, SynthesisError, synthesize
from calib.bn_statistics import tap_batchnorm, within_class_diversity
from calib.calibration_set import previewed_classes
from calib.generator import ClassSampler, Generator, upsample_and_convolve
from calib.refine import move_apart, natural_noise, refine, shift_images, survives_flip
from calib.support.amp import FiniteSteps
from calib.synthesis import Synthesis
from calib.training import GeneratorTrainer

CPU = torch.device("cpu")
TERMS = ("ce_weight", "bns_weight", "sfda_weight", "icv_weight")


def options() -> dict[str, Any]:
    """Return the options of what makes images from the bundled model."""
    spec = digits().input
    return {"classes": 10, "size": spec.size, "mean": spec.mean, "std": spec.std, "device": CPU}


def trainer(**settings: object) -> GeneratorTrainer:
    config = GeneratorConfig.model_validate({"batch_size": 40, "samples_per_class": 4, "width": 16, **settings})
    return GeneratorTrainer(digits().module, config=config, rng=seeded(), **options())


@cache
def warmed_up() -> dict[str, Tensor]:
    """Return the state of a generator whose classes the teacher can tell apart."""
    source = trainer()
    for _ in range(40):
        source.step(warmup=True)
    return {name: value.clone() for name, value in source.generator.state_dict().items()}


def warmed_trainer(**settings: object) -> GeneratorTrainer:
    warmed = trainer(**settings)
    warmed.generator.load_state_dict(warmed_up())
    warmed.initialize_centroids()
    return warmed


SMALL: dict[str, Any] = {
    "images": 30,
    "generator": {"steps": 6, "warmup_steps": 3, "batch_size": 20, "samples_per_class": 2, "width": 8},
    "refine": {"steps": 3, "batch_size": 15},
}


def synthesize_digits(seed: int = 0, **settings: Any) -> Synthesis:
    config = SynthesisConfig.model_validate({**SMALL, **settings})
    return synthesize(digits().module, config=config, rng=seeded(seed), **options())


@pytest.mark.parametrize("noise", ["latent", "class"])
def test_step_without_a_term_has_the_gradient_of_the_other_terms(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that a weight of zero leaves out is the term's own, whole, and there is one."""
    monkeypatch.setattr("calib.support.amp.has_fast_bfloat16", lambda device: False)

    def gradient(**weights: float) -> Tensor:
        warmed = warmed_trainer(icv_noise=noise, **weights)
        warmed.step(warmup=False)
        return torch.cat([p.grad.flatten() for p in warmed.generator.parameters() if p.grad is not None])

    whole = gradient()
    for term in TERMS:
        only = gradient(**{name: 0.0 for name in TERMS if name != term})
        error = whole - gradient(**{term: 0.0}) - only
        assert float(only.norm()) > 1e-4, term
        assert float(error.norm()) < 1e-3 * float(only.norm()) + 1e-5 * float(whole.norm()), term


def test_warmup_step_uses_no_class_terms() -> None:
    assert set(trainer().step(warmup=True)) == {"ce", "bns"}  # (7)


@pytest.mark.parametrize("beta", [0.2, 0.0])
def test_centroids_differ_between_classes_and_follow_the_generator_by_beta(beta: float) -> None:
    warmed = warmed_trainer(ema_beta=beta)
    assert bool(warmed.centroids.seen.all())
    for means in warmed.centroids.mean:
        distances = torch.cdist(means, means) + torch.eye(len(means)) * 1e9
        assert float(distances.min()) > 0.05
    before = [mean.clone() for mean in warmed.centroids.mean]
    warmed.step(warmup=False)
    moved = [not torch.equal(old, new) for old, new in zip(before, warmed.centroids.mean, strict=True)]
    assert set(moved) == {beta > 0}


@pytest.mark.parametrize(("logit", "first_seen"), [(1000.0, True), (math.nan, False)])
def test_images_without_their_label_or_finite_logits_do_not_count_for_centroids(logit: float, first_seen: bool) -> None:
    class AlwaysFirst(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + logit * F.one_hot(torch.tensor(0), 10)

    confused = trainer()
    confused.teacher = AlwaysFirst(digits().module)
    confused.initialize_centroids()
    confused.step(warmup=False)
    assert confused.centroids.seen.tolist() == [first_seen] + [False] * 9


@pytest.mark.slow
def test_diversity_falls_without_the_intra_class_variance_term() -> None:
    def diversity(weight: float) -> float:
        trained = trainer(steps=160, warmup_steps=60, icv_weight=weight)
        trained.train()
        labels = torch.arange(10).repeat_interleave(24)
        with torch.no_grad(), tap_batchnorm(trained.teacher) as tap:
            trained.teacher(trained.sample(labels))
        return within_class_diversity(tap.moments[-1].mean, labels)

    assert diversity(0.6) > 1.15 * diversity(0.0)


def test_class_sampler_covers_classes_evenly() -> None:
    sampler = ClassSampler(7, seeded())
    assert torch.bincount(torch.cat([sampler.draw(3) for _ in range(14)])).tolist() == [6] * 7


@pytest.mark.parametrize("size", [(10, 6), (9, 6), (5, 3)])
def test_upsample_and_convolve_equals_interpolation_and_convolution(size: tuple[int, int]) -> None:
    rng = seeded()
    conv, x = nn.Conv2d(4, 3, 3, padding=1, bias=False), torch.randn(2, 4, 5, 3, generator=rng, requires_grad=True)
    conv.weight.data = torch.randn(3, 4, 3, 3, generator=rng)
    expected, actual = conv(F.interpolate(x, size=size, mode="nearest")), upsample_and_convolve(x, conv, size)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights, leaves = torch.randn(expected.shape, generator=rng), (x, conv.weight)
    gradients = [torch.autograd.grad((weights * y).sum(), leaves) for y in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_synthesize_depends_on_the_seed_only_and_returns_even_classes_of_valid_pixels() -> None:
    first, again, other = (synthesize_digits(seed).calibration for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.bincount(first.labels).tolist() == [3] * 10
    spec = digits().input
    assert first.images.shape == (30, *spec.size)
    pixels = first.images * spec.std[0] + spec.mean[0]
    assert -2e-3 < float(pixels.min()) < float(pixels.max()) < 1 + 2e-3


def test_refinement_brings_statistics_nearer() -> None:
    result = synthesize_digits(generator={**SMALL["generator"], "steps": 40}, refine={"steps": 25, "batch_size": 30})
    assert result.losses["refine.bns"][-1] < 0.5 * result.losses["refine.bns"][0]
    assert result.teacher_top1 > 50


def test_paper_recipe_fills_in_what_is_not_set() -> None:
    paper = SynthesisConfig.model_validate({"recipe": "paper", "images": 130, "generator": {"lambda_std": 0.7}})
    generator = paper.generator
    weights = (generator.bns_weight, generator.sfda_weight, generator.icv_weight, generator.ema_beta)
    assert weights == (0.1, 0.9, 0.6, 0.2)
    assert (generator.lambda_mean, generator.lambda_std, generator.icv_noise) == (0.5, 0.7, "class")
    assert (generator.steps, generator.warmup_steps, paper.refine.steps) == (1200, 150, 0)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        SynthesisConfig.model_validate({"recipe": "paper", "generator": {"batch_size": 0}})
    with pytest.raises(ValidationError, match="warmup_steps is 5, expected less than the 5 steps"):
        GeneratorConfig(steps=5, warmup_steps=5)


@pytest.mark.parametrize(
    ("size", "largest", "drawn"),
    [((3, 32, 32), 0, (32, 32)), ((1, 28, 28), 0, (28, 28)), ((3, 50, 37), 64, (50, 37)), ((3, 6, 6), 64, (6, 6)),
     ((3, 96, 60), 0, (96, 60)), ((3, 96, 60), 64, (48, 30)), ((3, 96, 60), 20, (12, 8))],
)  # fmt: skip
def test_generator_makes_any_size_and_upsamples_large_images(
    size: tuple[int, int, int], largest: int, drawn: tuple[int, int]
) -> None:
    net = Generator(5, size, (0.5,) * size[0], (0.25,) * size[0], latent=16, width=8, largest=largest)
    assert net.sides[-1] == drawn
    batch = net(torch.randn(4, 16, generator=seeded()), torch.tensor([0, 1, 2, 3])).detach()
    assert batch.shape == (4, *size)
    assert float(batch.abs().max()) <= 2.0
    assert float(batch.std()) > 0


def test_natural_noise_is_of_low_frequency_and_shared_between_channels() -> None:
    noise = natural_noise(torch.Size((256, 3, 16, 16)), seeded())
    assert noise.shape == (256, 3, 16, 16)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16, rel=0.3)  # a quarter of the frequency
    channels = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert float(channels[0, 1]) == pytest.approx(0.8, abs=0.1)
    assert float(natural_noise(torch.Size((64, 1, 9, 7)), seeded()).std()) == pytest.approx(1, abs=0.1)


def test_refine_holds_images_apart_by_spread_weight() -> None:
    start, limits = torch.zeros(60, *digits().input.size), (torch.tensor(-2.0), torch.tensor(2.0))

    def shortfall(weight: float) -> float:
        config = RefineConfig(steps=20, batch_size=60, spread_weight=weight)
        labels = torch.arange(10).repeat(6)
        _, losses = refine(digits().module, start, labels, config=config, limits=limits, flip=False, rng=seeded())
        return losses["spread"][-1]

    assert shortfall(1.0) < 0.8 * shortfall(0.0)


def test_refine_takes_more_steps_if_a_first_batch_is_far_from_the_statistics() -> None:
    start, labels = torch.zeros(40, *digits().input.size), torch.arange(40) % 10
    limits = (torch.tensor(-2.0), torch.tensor(2.0))

    def taken(steps: int, longer: float) -> int:
        config = RefineConfig(steps=steps, batch_size=20, longer=longer)
        _, losses = refine(digits().module, start, labels, config=config, limits=limits, flip=False, rng=seeded())
        return len(losses["bns"])

    assert taken(30, longer=2.5) == 30  # near enough
    assert taken(2, longer=1.0) == 2
    assert taken(2, longer=2.5) == 5


def test_refine_matches_statistics_at_odd_and_even_shifts_of_a_net_with_strides() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = (conv_bn(a, b, stride=2) for a, b in ((3, 16), (16, 24), (24, 24)))
        net = nn.Sequential(*(nn.Sequential(conv, nn.ReLU()) for conv in convs), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    shape = torch.Size((128, 3, 32, 32))
    net(natural_noise(shape, seeded()))
    config, limits = RefineConfig(steps=40), (torch.tensor(-2.0), torch.tensor(2.0))
    _, losses = refine(
        net.eval().requires_grad_(False),
        torch.zeros(shape),
        torch.arange(128) % 24,
        config=config,
        limits=limits,
        flip=False,
        rng=seeded(),
    )
    assert max(losses["bns"][-8:]) < 0.1  # one shift for the whole batch: 0.17, and 0.9 in the middle


@pytest.mark.parametrize("count", [3, 128])
def test_move_apart_moves_parts_by_different_shifts_and_mirrors_some(count: int) -> None:
    places = torch.zeros(count, 1, 9, 9)
    places[:, :, 4, 4] = 1
    moved = move_apart(places, 2, False, seeded())
    found = moved.flatten(1).argmax(1)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(count))
    assert len(found.unique()) == (22 if count == 128 else 3)  # six images are moved together
    assert bool(((found // 9 - 4).abs() <= 2).all() and ((found % 9 - 4).abs() <= 2).all())
    ramp = torch.arange(9.0).expand(count, 1, 9, 9)
    mirrored = move_apart(ramp, 2, True, seeded())[:, 0, 0, 0] > 4
    assert 0 < int(mirrored.sum()) < count


def test_shift_images_moves_whole_pixels() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(shift_images(x, 1, 0, False)[..., 1:, :], x[..., :-1, :])
    assert torch.equal(shift_images(x, 0, -2, False)[..., :-2], x[..., 2:])
    assert torch.equal(shift_images(x, 0, 0, True), x.flip(-1))


@pytest.mark.parametrize(
    ("mirrored", "upset", "expected"), [(13, 5, True), (13, 8, False), (9, 0, False), (17, 17, True)]
)
def test_survives_flip_asks_for_half_and_twice_as_many_as_upside_down(
    mirrored: int, upset: int, expected: bool
) -> None:
    class Recorded(nn.Module):
        """Returns class 0 for the images, and for a number of their mirror images."""

        def forward(self, x: Tensor) -> Tensor:
            counts = {-1: mirrored, -2: upset}
            count = next((n for dim, n in counts.items() if torch.equal(x, data.flip(dim))), len(x))
            return F.one_hot((torch.arange(len(x)) >= count).long(), 2).float()

    data, labels = images(20), torch.zeros(20, dtype=torch.int64)
    assert survives_flip(Recorded(), data, labels, 20) is expected


def test_calibration_set_is_read_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    calibration = CalibrationSet(images(12).half().float(), torch.arange(12) % 4, {"seed": 1})
    path.write_bytes(calibration.to_bytes())
    again = CalibrationSet.load(path)
    assert torch.equal(again.images, calibration.images)
    assert torch.equal(again.labels, calibration.labels)
    assert torch.equal(CalibrationSet.read_labels(path), calibration.labels)
    assert again.provenance == {"seed": 1}
    path.write_bytes(b"x" * 100)
    for read in (CalibrationSet.load, CalibrationSet.read_labels):
        with pytest.raises(SynthesisError, match="not a calibration set"):
            read(path)


@pytest.mark.parametrize(("count", "share", "expected"), [(64, 0.25, 16), (64, 0.5, 32), (3, 0.1, 1)])
def test_split_returns_disjoint_parts_of_all_images(count: int, share: float, expected: int) -> None:
    tune, held_out = CalibrationSet(images(count), torch.arange(count) % 4).split(share)
    assert (len(tune), len(held_out)) == (count - expected, expected)
    assert len(torch.cat([tune.images, held_out.images]).flatten(1).unique(dim=0)) == count


@pytest.mark.parametrize("channels", [1, 3])
def test_preview_shows_one_class_per_column(channels: int) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0])
    data = torch.zeros(12, channels, 32, 32)
    data[labels == 2] = 0.5
    grid = np.asarray(CalibrationSet(data, labels).preview((0.0,) * channels, (1.0,) * channels, columns=5, rows=3))
    assert previewed_classes(labels, 5).tolist() == [0, 1, 2, 3, 4]
    assert previewed_classes(labels, 3).tolist() == [0, 2, 4]
    assert grid.shape == (3 * 66 - 2, 5 * 66 - 2, 3)
    places = [(10, 142), (10, 10), (10, 65), (142, 10), (142, 76)]  # an image, another, a gap, an image, no image
    assert [grid[place][0] for place in places] == [128, 0, 255, 0, 255]


class SharedNorm(nn.Module):
    """Calls a BatchNorm twice, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.unused, self.fc = nn.BatchNorm2d(4), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.b(self.norm(self.a(x)).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("make", [SharedNorm, lambda: make_net("mobile")], ids=["shared", "mobile"])
def test_synthesize_handles_other_uses_of_batchnorm(make: Callable[[], nn.Module]) -> None:
    result = synthesis(SMALL, net=make().eval().requires_grad_(False))
    assert len(result.calibration) == 30
    assert set(result.losses) >= {"generator.ce", "generator.bns", "generator.sfda", "refine.bns"}


def synthesis_with_bad_steps(monkeypatch: pytest.MonkeyPatch, module: str, is_bad: Callable[[int], bool]) -> Synthesis:
    """Make images while the BNS loss that a module computes is no number in some calls; the first is 1."""
    target = importlib.import_module(module)
    bns_loss, calls = target.bns_loss, 0

    def loss(*arguments: Any, **settings: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return bns_loss(*arguments, **settings) * (math.nan if is_bad(calls) else 1)

    monkeypatch.setattr(target, "bns_loss", loss)
    generator = {"steps": 40, "warmup_steps": 10, "batch_size": 16}
    return synthesis({"images": 32, "generator": generator, "refine": {"steps": 40, "batch_size": 32}})


BOTH = pytest.mark.parametrize(
    ("module", "what", "part"),
    [("calib.training", "the generator's training", "generator"), ("calib.refine", "refinement", "refine")],
)


@BOTH
def test_synthesize_skips_steps_without_a_finite_loss(
    module: str, what: str, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    result = synthesis_with_bad_steps(monkeypatch, module, lambda call: call in {3, 4, 7, 12})
    assert bool(result.calibration.images.isfinite().all())
    losses = result.losses[f"{part}.bns"]
    assert len(losses) == 40
    assert [math.isfinite(value) for value in losses].count(False) == (4 if part == "generator" else 0)  # or repeated
    assert losses[-1] < losses[0]
    message = f"{what}: the loss or its gradient is not finite; the step is skipped"
    assert [record.message for record in caplog.records] == [message] * 4


@BOTH
def test_synthesize_gives_up_after_three_skipped_steps_in_a_row(
    module: str, what: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"{what} diverges: .* not finite, 3 steps in a row; .* a smaller synthesis.{part}.learning_rate"
    with pytest.raises(SynthesisError, match=message):
        synthesis_with_bad_steps(monkeypatch, module, lambda call: call > 5)


def test_finite_steps_skips_a_gradient_that_is_not_finite_though_the_loss_is() -> None:
    parameter = nn.Parameter(torch.tensor([4.0, 1.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    steps = FiniteSteps("a test", error=SynthesisError, advice="nothing")
    for shift, finite in ((0.0, True), (1.0, False), (0.0, True), (1.0, False), (1.0, False)):
        before = parameter.detach().clone()
        loss = (parameter - parameter.detach() + shift - 1).abs().sqrt().sum()  # of infinite slope at 0
        assert bool(loss.isfinite())
        assert steps.step(optimizer, loss) is finite
        assert torch.equal(parameter, before) is not finite
    with pytest.raises(SynthesisError, match="a test diverges"):
        steps.step(optimizer, (parameter - parameter.detach()).abs().sqrt().sum())
