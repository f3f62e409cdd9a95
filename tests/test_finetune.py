"""Fine-tuning: what it brings, what it keeps, what it does when it diverges; and the views of images that it makes."""

import importlib
import math

import pytest
import torch
from nets import calibrated, captured, distance, images, make_net, twin
from support import seeded
from torch import Tensor

from calib.calibration_set import CalibrationSet
from clusterq_deploy.errors import TuningError
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    Grid,
    Student,
    finetune,
    make_student,
    post_training_quantize,
)
from clusterq_deploy.quantization.fake_quant import Quantizer
from clusterq_deploy.quantization.qat.augment import AugmentConfig, Augmenter
from clusterq_deploy.quantization.qat.finetune import Tuning
from clusterq_deploy.quantization.qat.losses import distillation_loss


def test_finetune_brings_student_nearer_to_teacher() -> None:
    net, student = make_net("residual"), calibrated("residual", "w3a3")
    data = images(256, seed=3)
    calibration = CalibrationSet(data, net(data).argmax(1))
    fresh = images(128, seed=9)
    before = distance(student, net, fresh)
    config = FinetuneConfig(steps=240, batch_size=32, checkpoints=3)  # it starts near: a quarter of them
    reference = twin(student)
    tuning = finetune(student, reference, calibration, config=config, flip=False, rng=seeded(0))
    assert distance(student, net, fresh) < 0.8 * before
    assert tuning.best_step >= 45  # not one of the early checkpoints, whose learning rate is still large
    assert tuning.losses["held_out_kl"][-1] < tuning.losses["held_out_kl"][0]


def test_finetune_uses_int8_grids_and_restores_finer_ones() -> None:
    student = make_student(captured("residual"), BitWidths(4, 8))
    quantizer = next(q for q in student.quantizers().values() if q.grid == Grid(8, signed=False))
    met: list[Grid] = []

    def note(own: Quantizer, _: object) -> None:
        if own is quantizer and own.enabled:  # not the teacher's copy of it
            met.append(own.grid)

    quantizer.register_forward_pre_hook(note)
    rng = seeded(0)
    reference = post_training_quantize(student, images(64), batch_size=16, rng=rng).reference
    calibration = CalibrationSet(images(64), torch.arange(64) % 10)
    finetune(student, reference, calibration, config=FinetuneConfig(steps=4, batch_size=16), flip=False, rng=rng)
    assert set(met) == {Grid(7, signed=False)}
    with torch.no_grad():
        student(images())
    assert met[-1] == Grid(8, signed=False)


def test_finetune_restores_start_if_nothing_improves() -> None:
    net, student = make_net("residual"), calibrated("residual", "w8a8")
    data = images(64)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    config = FinetuneConfig(steps=4, learning_rate=1.0, scale_learning_rate=1.0, checkpoints=2)
    calibration = CalibrationSet(data, net(data).argmax(1))
    reference = twin(student)
    tuning = finetune(student, reference, calibration, config=config, flip=False, rng=seeded(0))
    assert tuning.best_step == 0
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name])


def tuned_with_bad_steps(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> tuple[Student, Tuning]:
    """Return a student after 40 steps, of which those of the given numbers have no finite loss; the first is 1."""
    calls = 0

    def loss(*args: Tensor, **weights: float) -> Tensor:
        nonlocal calls
        calls += 1
        return distillation_loss(*args, **weights) * (math.nan if calls in bad else 1)

    monkeypatch.setattr(importlib.import_module("clusterq_deploy.quantization.qat.finetune"), "distillation_loss", loss)
    net, student = make_net("residual"), calibrated("residual", "w3a3")
    data = images(128, seed=3)
    calibration = CalibrationSet(data, net(data).argmax(1))
    config = FinetuneConfig(steps=160, batch_size=16, checkpoints=4)
    rng, reference = seeded(0), twin(student)
    return student, finetune(student, reference, calibration, config=config, flip=False, rng=rng)


def test_finetune_skips_steps_without_a_finite_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, tuning = tuned_with_bad_steps(monkeypatch, {1, 15})
    assert [math.isfinite(value) for value in tuning.losses["distillation"]].count(False) == 2
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    assert tuning.best_step > 15
    assert tuning.losses["held_out_kl"][-1] < tuning.losses["held_out_kl"][0]
    assert [r.message for r in caplog.records if "fine-tuning w3a3" in r.message] == [
        "fine-tuning w3a3: the loss or its gradient is not finite; the step is skipped"
    ] * 2


def test_finetune_gives_up_after_three_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TuningError, match="fine-tuning w3a3 diverges: its loss or gradient is not finite, 3 steps in a row; try"
    ):
        tuned_with_bad_steps(monkeypatch, set(range(5, 1000)))


# ---- views ----

NOTHING = {"zoom": 0.0, "rotation": 0.0, "translation": 0.0, "jitter": 0.0, "cutmix": 0.0}


def views(*, flip: bool = False, seed: int = 0, **changes: float) -> tuple[Tensor, Tensor]:
    own = images(16).clamp(-2, 2)
    rng = seeded(seed)
    return own, Augmenter(AugmentConfig(**{**NOTHING, **changes}), own, flip=flip, rng=rng)(own)


def test_augmenter_without_changes_returns_images() -> None:
    own, view = views()
    assert torch.equal(own, view)


@pytest.mark.parametrize("change", ["zoom", "rotation", "translation", "jitter"])
def test_augmenter_changes_each_image_within_pixel_range(change: str) -> None:
    own, view = views(**{change: 0.3})
    assert view.shape == own.shape
    assert float(view.abs().max()) <= 2 + 1e-5
    distance = (view - own).square().mean((1, 2, 3))
    assert len(distance.unique()) == 16
    assert float(distance.min()) > 0


def test_augmenter_mirrors_some_images() -> None:
    own, view = views(flip=True)
    kept = [torch.allclose(a, b, atol=1e-4) for a, b in zip(own, view, strict=True)]
    mirrored = [torch.allclose(a.flip(-1), b, atol=1e-4) for a, b in zip(own, view, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert any(kept)
    assert any(mirrored)


def test_augmenter_cutmix_pastes_from_batch() -> None:
    own, view = views(cutmix=1.0, seed=2)
    changed = (view != own).any(1)
    assert 0 < int(changed.sum()) < changed.numel()
    rows, columns = changed.any(0).any(1).nonzero(), changed.any(0).any(0).nonzero()
    top, bottom, left, right = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
    pool = own[:, :, top:bottom, left:right].flatten(1)
    for patch in view[:, :, top:bottom, left:right].flatten(1):
        assert any(torch.equal(patch, other) for other in pool)


def test_augmenter_repeats_views_by_seed() -> None:
    settings = {"zoom": 0.2, "rotation": 0.2, "translation": 0.1, "jitter": 0.3, "cutmix": 0.5}
    first, again, other = (views(flip=True, seed=seed, **settings)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
