"""Synthesis whose loss is no longer a number."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from nets import synthesis
from torch import Tensor

from calib.support.errors import SynthesisError
from calib.synthesis import Synthesis
from calib.training import GeneratorTrainer

CONFIG: dict[str, object] = {
    "images": 32,
    "generator": {"steps": 40, "warmup_steps": 10, "batch_size": 16},
    "refine": {"steps": 40, "batch_size": 32},
}


def made_with_bad_steps(monkeypatch: pytest.MonkeyPatch, module: str, bad: Callable[[int], bool]) -> Synthesis:
    """Images, where the BNS loss that a module asks for is not a number in some calls; the first is 1."""
    own = importlib.import_module(module)
    real, calls = own.bns_loss, 0

    def loss(*arguments: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        value: Tensor = real(*arguments, **options)
        return value * (math.nan if bad(calls) else 1)

    monkeypatch.setattr(own, "bns_loss", loss)
    return synthesis(CONFIG)


@pytest.mark.parametrize(
    ("module", "what", "losses"),
    [("calib.training", "the generator's training", "generator.bns"), ("calib.refine", "refinement", "refine.bns")],
)
def test_a_bad_step_of_synthesis_is_taken_back(
    module: str, what: str, losses: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = made_with_bad_steps(monkeypatch, module, lambda call: call in {3, 7})
    assert bool(made.calibration.images.isfinite().all())
    bad = 2 if module == "calib.training" else 0  # refinement does such steps once more
    assert [math.isfinite(value) for value in made.losses[losses]].count(False) == bad
    assert [r.message for r in caplog.records] == [
        f"{what}: the loss is not finite; it goes back, with half the learning rates"
    ] * 2
    first, last = made.losses[losses][0], made.losses[losses][-1]
    assert last < first


def test_a_generator_that_breaks_after_the_warm_up_is_mended_with_its_centroids(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that are no numbers are, to an argmax, of class 0."""
    step, calls = GeneratorTrainer.step, 0

    def breaking(self: GeneratorTrainer, *, warmup: bool) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls in {10, 20}:  # before the centroids have their first values, and among them
            with torch.no_grad():
                next(self.generator.parameters()).fill_(math.nan)
        return step(self, warmup=warmup)

    monkeypatch.setattr(GeneratorTrainer, "step", breaking)
    made = made_with_bad_steps(monkeypatch, "calib.training", lambda call: False)
    assert len(caplog.records) == 2
    assert math.isfinite(made.losses["generator.sfda"][-1])
    assert bool(made.calibration.images.isfinite().all())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("calib.training", "the generator's training diverges: .* a smaller synthesis.generator.learning_rate"),
        ("calib.refine", "refinement diverges: .* a smaller synthesis.refine.learning_rate"),
    ],
)
def test_synthesis_that_stays_without_a_finite_loss_is_given_up(
    module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SynthesisError, match=message):
        made_with_bad_steps(monkeypatch, module, lambda call: call > 5)
