"""Synthesis whose loss is no longer a number."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from nets import make_net
from torch import Tensor

from calib.errors import SynthesisError
from calib.synthesis import Synthesis, SynthesisConfig, synthesize

CONFIG = {
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
    return synthesize(
        make_net("residual"),
        classes=10,
        size=(3, 16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        config=SynthesisConfig.model_validate(CONFIG),
        device=torch.device("cpu"),
        rng=torch.Generator().manual_seed(3),
    )


@pytest.mark.parametrize(
    ("module", "what", "losses"),
    [("calib.training", "the generator's training", "generator.bns"), ("calib.refine", "refinement", "refine.bns")],
)
def test_a_bad_step_of_synthesis_is_taken_back(
    module: str, what: str, losses: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = made_with_bad_steps(monkeypatch, module, lambda call: call in {3, 7})
    assert bool(made.calibration.images.isfinite().all())
    assert [math.isfinite(value) for value in made.losses[losses]].count(False) == 2
    assert [r.message for r in caplog.records] == [
        f"{what}: the loss is not finite; it goes back, with half the learning rates"
    ] * 2
    first, last = made.losses[losses][0], made.losses[losses][-1]
    assert last < first


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
