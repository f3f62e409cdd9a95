"""Synthesis against the bundled model: every term does its work, and the same seed gives the same images."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import images, make_net
from torch import nn

from calib import CalibrationSet, GeneratorConfig, RefineConfig, SynthesisConfig, SynthesisError, synthesize
from calib.bn_statistics import tap_batchnorm, within_class_diversity
from calib.calibration_set import previewed_classes
from calib.generator import Generator, enlarged
from calib.labels import ClassSampler
from calib.refine import natural_noise, refine, shifted, survives_flip
from calib.training import GeneratorTrainer
from clusterq_deploy.models import LoadedModel, load_model

CPU = torch.device("cpu")


@cache
def teacher() -> LoadedModel:
    return load_model("digits", device=CPU)


def trainer(seed: int = 0, **settings: object) -> GeneratorTrainer:
    model = teacher()
    return GeneratorTrainer(
        model.module,
        classes=model.classes,
        size=model.input.size,
        mean=model.input.mean,
        std=model.input.std,
        config=GeneratorConfig.model_validate({"batch_size": 40, "samples_per_class": 4, "width": 16, **settings}),
        device=CPU,
        rng=torch.Generator().manual_seed(seed),
    )


def small(**generator: object) -> SynthesisConfig:
    settings = {"steps": 6, "warmup_steps": 3, "batch_size": 20, "samples_per_class": 2, "width": 8, **generator}
    return SynthesisConfig(
        images=30, generator=GeneratorConfig.model_validate(settings), refine=RefineConfig(steps=3, batch_size=15)
    )


def made(config: SynthesisConfig, seed: int = 0) -> CalibrationSet:
    model = teacher()
    return synthesize(
        model.module,
        classes=model.classes,
        size=model.input.size,
        mean=model.input.mean,
        std=model.input.std,
        config=config,
        device=CPU,
        rng=torch.Generator().manual_seed(seed),
    ).calibration


TERMS = ("ce_weight", "bns_weight", "sfda_weight", "icv_weight")


@cache
def warmed_up() -> dict[str, torch.Tensor]:
    """A generator that the teacher can tell the classes of."""
    source = trainer()
    for _ in range(40):
        source.step(warmup=True)
    return {k: v.clone() for k, v in source.generator.state_dict().items()}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("noise", ["latent", "class"])
def test_each_term_alone_moves_the_generator(term: str, noise: str) -> None:
    own = trainer(icv_noise=noise, **{name: float(name == term) for name in TERMS})
    own.generator.load_state_dict(warmed_up())
    own.initialize_centroids()
    own.step(warmup=False)
    norm = sum(float(p.grad.norm()) for p in own.generator.parameters() if p.grad is not None)
    assert norm > 1e-4


def test_a_term_of_weight_zero_is_off() -> None:
    """Without a term the gradient is that of the others: what is left out is the term's own gradient, whole."""

    def gradient(**weights: float) -> torch.Tensor:
        own = trainer(**weights)
        own.generator.load_state_dict(warmed_up())
        own.initialize_centroids()
        own.step(warmup=False)
        return torch.cat([p.grad.flatten() for p in own.generator.parameters() if p.grad is not None])

    whole = gradient()
    for term in TERMS:
        others = {name: 0.0 for name in TERMS if name != term}
        left_out, alone = whole - gradient(**{term: 0.0}), gradient(**others)
        apart = float((left_out - alone).norm())  # bfloat16 has eight significant bits
        assert apart <= 0.1 * float(alone.norm()) + 5e-3 * float(whole.norm()) < float(alone.norm()), term


def test_warmup_uses_no_class_terms() -> None:
    own = trainer()
    assert set(own.step(warmup=True)) == {"ce", "bns"}  # (7)


def test_centroids_differ_between_classes_and_move_with_the_generator() -> None:
    own = trainer()
    own.generator.load_state_dict(warmed_up())
    own.initialize_centroids()
    assert bool(own.centroids.seen.all())
    for means in own.centroids.mean:
        distances = torch.cdist(means, means) + torch.eye(len(means)) * 1e9
        assert float(distances.min()) > 0.05
    before = [m.clone() for m in own.centroids.mean]
    own.step(warmup=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, own.centroids.mean, strict=True))


def test_without_ema_centroids_stay() -> None:
    own = trainer(ema_beta=0.0)
    own.generator.load_state_dict(warmed_up())
    own.initialize_centroids()
    before = [m.clone() for m in own.centroids.mean]
    own.step(warmup=False)
    assert all(torch.equal(a, b) for a, b in zip(before, own.centroids.mean, strict=True))


class Contrarian(nn.Module):
    """Says of every image that it is of class 0, from the features of the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = teacher().module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x).clone()
        logits[:, 0] += 1000
        return logits


def test_misclassified_images_count_nowhere() -> None:
    own = trainer()
    own.teacher = Contrarian()
    own.initialize_centroids()
    assert own.centroids.seen.tolist() == [True] + [False] * 9
    own.step(warmup=False)
    assert own.centroids.seen.tolist() == [True] + [False] * 9


@pytest.mark.slow
def test_diversity_falls_when_its_term_is_off() -> None:
    def diversity(weight: float) -> float:
        own = trainer(steps=160, warmup_steps=60, icv_weight=weight)
        own.train()
        labels = torch.arange(10).repeat_interleave(24)
        with torch.no_grad(), tap_batchnorm(own.teacher) as tap:
            own.teacher(own.sample(labels))
        return within_class_diversity(tap.moments[-1].mean, labels)

    assert diversity(0.6) > 1.15 * diversity(0.0)


def test_classes_are_covered_evenly() -> None:
    sampler = ClassSampler(7, torch.Generator().manual_seed(0))
    drawn = torch.cat([sampler.draw(3) for _ in range(14)])
    assert torch.bincount(drawn).tolist() == [6] * 7
    labels = made(small()).labels
    assert torch.bincount(labels).tolist() == [3] * 10


@pytest.mark.parametrize("size", [(10, 6), (9, 6), (5, 3)])
def test_an_enlarged_map_is_convolved_as_if_its_pixels_were_repeated(size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    conv, x = nn.Conv2d(4, 3, 3, padding=1, bias=False), torch.randn(2, 4, 5, 3, generator=rng, requires_grad=True)
    conv.weight.data = torch.randn(3, 4, 3, 3, generator=rng)
    expected, found = conv(F.interpolate(x, size=size, mode="nearest")), enlarged(x, conv, size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights, leaves = torch.randn(expected.shape, generator=rng), (x, conv.weight)
    gradients = [torch.autograd.grad((weights * y).sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_images() -> None:
    first, again, other = made(small()), made(small()), made(small(), seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_images_are_ones_that_a_camera_could_have_written() -> None:
    model, calibration = teacher(), made(small())
    assert calibration.images.shape == (30, *model.input.size)
    pixels = calibration.images * model.input.std[0] + model.input.mean[0]
    assert float(pixels.min()) > -2e-3
    assert float(pixels.max()) < 1 + 2e-3


def test_refinement_brings_statistics_nearer() -> None:
    model = teacher()
    options = {
        "classes": model.classes,
        "size": model.input.size,
        "mean": model.input.mean,
        "std": model.input.std,
        "device": CPU,
    }
    config = small(steps=40).model_copy(update={"refine": RefineConfig(steps=25, batch_size=30)})
    found = synthesize(model.module, config=config, rng=torch.Generator().manual_seed(0), **options)  # type: ignore[arg-type]
    assert found.losses["refine.bns"][-1] < 0.5 * found.losses["refine.bns"][0]
    assert found.teacher_top1 > 50


def test_the_paper_recipe_is_the_generator_alone() -> None:
    paper = SynthesisConfig(recipe="paper")
    weights = paper.generator
    assert (weights.bns_weight, weights.sfda_weight, weights.icv_weight, weights.ema_beta) == (0.1, 0.9, 0.6, 0.2)
    assert (weights.lambda_mean, weights.lambda_std, weights.icv_noise) == (0.5, 1.0, "class")
    assert paper.refine.steps == 0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    class Broken(Contrarian):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float("nan")

    model = teacher()
    with pytest.raises(SynthesisError, match="not finite"):
        synthesize(
            Broken(),
            classes=10,
            size=model.input.size,
            mean=model.input.mean,
            std=model.input.std,
            config=small(),
            device=CPU,
            rng=torch.Generator().manual_seed(0),
        )


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 50, 37), (3, 6, 6), (3, 96, 96)])
def test_the_generator_makes_any_size(size: tuple[int, int, int]) -> None:
    channels = size[0]
    net = Generator(5, size, (0.5,) * channels, (0.25,) * channels, latent=16, width=8)
    batch = net(torch.randn(4, 16), torch.tensor([0, 1, 2, 3]))
    assert batch.shape == (4, *size)
    assert float(batch.detach().abs().max()) <= 2.0


@pytest.mark.parametrize(("largest", "drawn"), [(0, (96, 60)), (64, (48, 30)), (96, (96, 60)), (20, (12, 8))])
def test_large_images_are_drawn_small_and_enlarged(largest: int, drawn: tuple[int, int]) -> None:
    net = Generator(5, (3, 96, 60), (0.5,) * 3, (0.25,) * 3, latent=16, width=8, largest=largest)
    assert net.sides[-1] == drawn
    batch = net(torch.randn(2, 16), torch.tensor([0, 1]))
    assert batch.shape == (2, 3, 96, 60)
    assert float(batch.detach().std()) > 0


def test_natural_noise_is_of_low_frequency_and_shared_between_channels() -> None:
    noise = natural_noise(torch.Size((256, 3, 16, 16)), torch.Generator().manual_seed(0))
    assert noise.shape == (256, 3, 16, 16)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16, rel=0.3)  # a quarter of the frequency
    channels = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert float(channels[0, 1]) == pytest.approx(0.8, abs=0.1)
    grey = natural_noise(torch.Size((64, 1, 9, 7)), torch.Generator().manual_seed(0))
    assert float(grey.std()) == pytest.approx(1, abs=0.1)


def test_refined_images_are_held_apart() -> None:
    model = teacher()
    labels = torch.arange(10).repeat(6)
    start = torch.zeros(60, *model.input.size)

    def spread(weight: float) -> float:
        rng = torch.Generator().manual_seed(0)
        config = RefineConfig(steps=20, batch_size=60, spread_weight=weight)
        limits = (torch.full((1, 1, 1, 1), -2.0), torch.full((1, 1, 1, 1), 2.0))
        _, losses = refine(model.module, start, labels, config=config, limits=limits, flip=False, rng=rng)
        return losses["spread"][-1]

    assert spread(1.0) < 0.8 * spread(0.0)


def test_shifts_move_whole_pixels() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(shifted(x, 1, 0, False)[..., 1:, :], x[..., :-1, :])
    assert torch.equal(shifted(x, 0, -2, False)[..., :-2], x[..., 2:])
    assert torch.equal(shifted(x, 0, 0, True), x.flip(-1))


def test_whether_a_flip_keeps_the_class_is_asked_of_the_teacher() -> None:
    class LeftRight(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = x.shape[-1] // 2
            return torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1)

    class Brightness(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    data = images(40)
    for net, expected in ((LeftRight(), False), (Brightness(), True)):
        assert survives_flip(net, data, net(data).argmax(1), 16) is expected


def test_a_flip_survives_by_half_where_upside_down_hardly_any_does() -> None:
    class Recorded(nn.Module):
        """Gives class 0 to the images, and to so many of their mirror images."""

        def __init__(self, mirrored: int, upset: int) -> None:
            super().__init__()
            self.kept = {-1: mirrored, -2: upset}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = next((n for dim, n in self.kept.items() if torch.equal(x, data.flip(dim))), len(x))
            return F.one_hot((torch.arange(len(x)) >= kept).long(), 2).float()

    data, labels = images(20), torch.zeros(20, dtype=torch.int64)
    for mirrored, upset, expected in ((13, 5, True), (13, 8, False), (9, 0, False), (17, 17, True)):
        assert survives_flip(Recorded(mirrored, upset), data, labels, 20) is expected


def test_calibration_sets_survive_their_file(tmp_path: Path) -> None:
    data = images(12).half().float()
    calibration = CalibrationSet(data, torch.arange(12) % 4, {"seed": 1})
    (tmp_path / "images.safetensors").write_bytes(calibration.to_bytes())
    again = CalibrationSet.load(tmp_path / "images.safetensors")
    assert torch.equal(again.images, data)
    assert torch.equal(again.labels, calibration.labels)
    assert again.provenance == {"seed": 1}
    (tmp_path / "images.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SynthesisError, match="no calibration set"):
        CalibrationSet.load(tmp_path / "images.safetensors")


def test_the_held_out_part_is_disjoint_and_covers_the_classes() -> None:
    calibration = CalibrationSet(images(64), torch.arange(64) % 4)
    tune, held_out = calibration.split(0.25)
    assert (len(tune), len(held_out)) == (48, 16)
    together = torch.cat([tune.images, held_out.images]).flatten(1)
    assert len(together.unique(dim=0)) == 64


def test_the_preview_shows_a_class_a_column() -> None:
    data = torch.zeros(20, 1, 32, 32)
    labels = torch.arange(20) % 5
    data[labels == 2] = 1.0
    grid = np.asarray(CalibrationSet(data, labels).preview((0.0,), (1.0,), columns=5, rows=3))
    assert previewed_classes(labels, 5).tolist() == [0, 1, 2, 3, 4]
    assert previewed_classes(labels, 3).tolist() == [0, 2, 4]
    assert grid.shape == (3 * 66 - 2, 5 * 66 - 2, 3)
    assert grid[10, 2 * 66 + 10].tolist() == [255] * 3
    assert grid[10, 10].tolist() == [0] * 3


def test_a_batchnorm_that_is_called_twice_is_met_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.unused, self.fc = nn.BatchNorm2d(4), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.b(self.norm(self.a(x)).relu())).relu()
            return self.fc(x.mean((2, 3)))

    found = synthesize(
        Shared().eval().requires_grad_(False),
        classes=10,
        size=(3, 16, 16),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        config=small(),
        device=CPU,
        rng=torch.Generator().manual_seed(0),
    )
    assert len(found.calibration) == 30


def test_settings_that_leave_no_step_for_the_method_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 5, expected less than the 5 steps"):
        GeneratorConfig(steps=5, warmup_steps=5)


def test_a_net_with_other_batchnorm_shapes_is_synthesized_too() -> None:
    net = make_net("mobile")
    found = synthesize(
        net,
        classes=10,
        size=(3, 16, 16),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        config=small(),
        device=CPU,
        rng=torch.Generator().manual_seed(0),
    )
    assert len(found.calibration) == 30
    assert set(found.losses) >= {"generator.ce", "generator.bns", "generator.sfda", "generator.icv", "refine.bns"}
