"""Interrupted work resumes from its checkpoint, with the result of uninterrupted work."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from nets import captured, digits, images, make_net, synthesis
from support import seeded
from torch import Tensor

from calib.calibration_set import CalibrationSet
from calib.refine import RefineConfig, refine
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.synthesis import Synthesis
from calib.training import History
from clusterq_deploy.errors import UnreadableImageError
from clusterq_deploy.evaluation.accuracy import predictions
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.images import Images, Unreadable
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    PrecisionPlan,
    PTQResult,
    finetune,
    make_student,
    plan_precision,
    post_training_quantize,
    sensitivities,
)
from clusterq_deploy.results.stages import Sensitivity
from clusterq_deploy.run import checkpoint as files
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.runtimes.runners import TorchRunner

T = TypeVar("T")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every state be kept."""
    monkeypatch.setattr(files, "_EVERY", 0.0)
    monkeypatch.setattr(files, "_LARGEST_SHARE", math.inf)


class Interrupted(BaseException):
    """What ends the work in the middle."""


class Interrupting(FileCheckpoint):
    """Ends the work when it has kept some states."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, "work")
        self._remaining = after

    def save(self, phase: str, state: Callable[[], State], **options: Any) -> None:
        """Keep the state, and end the work if it is the last."""
        super().save(phase, state, **options)
        self._remaining -= 1
        if self._remaining == 0:
            raise Interrupted


class Counting(FileCheckpoint):
    """Keeps no state, and counts how often it could have."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "work")
        self.count = 0

    def save(self, phase: str, state: Callable[[], State], **options: Any) -> None:
        """Count a state."""
        self.count += 1


def resume(work: Callable[[Checkpoint], T], folder: Path, after: list[int]) -> T:
    """Start work again and again, each time until it has kept `after` states, and return its result at last."""
    for count in after:
        with pytest.raises(Interrupted):
            work(Interrupting(folder, count))
    return work(FileCheckpoint(folder, "work"))


def plain(state: Any) -> Any:
    """Return a state whose tensors are lists, which can be compared."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.mark.usefixtures("always")
def test_synthesize_goes_on_to_the_same_images(tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "images": 40,
        "generator": {"steps": 9, "warmup_steps": 4, "batch_size": 16},
        "refine": {"steps": 5, "batch_size": 16, "longer": 1},
    }

    def work(checkpoint: Checkpoint) -> Synthesis:
        return synthesis(settings, checkpoint)

    whole = work(NOWHERE)
    # in the warm-up, after it, in the first, the second and the third batch of the refinement
    resumed = resume(work, tmp_path, [3, 4, 6, 5, 5])
    assert torch.equal(resumed.calibration.images, whole.calibration.images)
    assert torch.equal(resumed.calibration.labels, whole.calibration.labels)
    for name in ("losses", "teacher_top1", "within_class_diversity", "flip"):
        assert getattr(resumed, name) == getattr(whole, name), name


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("after", [[1], [1, 3], [9]])  # in the first attempt, and in either batch of the second
def test_refine_goes_on_in_the_attempt_that_it_was_in(tmp_path: Path, after: list[int]) -> None:
    start, labels = torch.zeros(40, *digits().input.size), torch.arange(40) % 10
    config, limits = RefineConfig(steps=2, batch_size=20, longer=2.5), (torch.tensor(-2.0), torch.tensor(2.0))

    def work(checkpoint: Checkpoint) -> tuple[Tensor, History]:
        options: dict[str, Any] = {"config": config, "limits": limits, "flip": False, "checkpoint": checkpoint}
        return refine(digits().module, start, labels, rng=seeded(), **options)

    whole, losses = work(NOWHERE)
    found, resumed = resume(work, tmp_path, after)
    assert torch.equal(found, whole)
    assert resumed == losses
    assert len(losses["bns"]) == 5


@pytest.mark.parametrize(("bits", "after"), [("w4a4", [1, 1, 3, 2]), ("w8a8", [1])])
@pytest.mark.usefixtures("always")
def test_post_training_quantize_goes_on_to_the_same_student(tmp_path: Path, bits: str, after: list[int]) -> None:
    net, data = make_net("mobile"), images(48, seed=3)
    untouched = make_student(captured(net), BitWidths.parse(bits))

    def work(checkpoint: Checkpoint) -> Any:
        student, rng = copy.deepcopy(untouched), seeded()
        result = post_training_quantize(student, data, batch_size=16, rng=rng, checkpoint=checkpoint)
        return plain(result.state_dict(student)), rng.get_state().tolist()

    # before the first layer, and then after others of them
    assert resume(work, tmp_path, after) == work(NOWHERE)


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_sensitivities_and_plan_precision_go_on_and_do_nothing_twice(tmp_path: Path) -> None:
    net, data = make_net("residual"), images(32, seed=3)
    widths: dict[str, Any] = {"quantize_first_last": True, "layer_bits": {}}

    def work(checkpoint: Checkpoint) -> tuple[list[Sensitivity], PrecisionPlan]:
        bits = BitWidths(2, 3)
        options: dict[str, Any] = {"judged": images(32, seed=4), "batch_size": 16, "checkpoint": checkpoint}
        costs = sensitivities(make_student(captured(net), bits, **widths), data, rng=seeded(), **options)
        plan = plan_precision(
            captured(net), bits, costs=costs, max_drop=1.5, images=data, rng=seeded(1), **widths, **options
        )
        return costs, plan

    counting = Counting(tmp_path)
    whole = work(counting)
    assert 0 < len(whole[1].layer_bits) < len(whole[0]) - 1  # a count that was neither the first nor the last
    remaining, after = counting.count, list[int]()
    while remaining:
        after.append(min(remaining, len(after) + 1))
        remaining -= after[-1]
    assert resume(work, tmp_path, after) == whole
    again = Counting(tmp_path)
    assert work(again) == whole
    assert again.count == 0


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.usefixtures("always")
def test_finetune_goes_on_to_the_same_student(tmp_path: Path, bits: str) -> None:
    net, data = make_net("residual"), images(64, seed=3)
    calibration = CalibrationSet(data, net(data).argmax(1))
    config = FinetuneConfig(steps=150, batch_size=16, checkpoints=4)  # it starts near: a tenth of them
    untouched = make_student(captured(net), BitWidths.parse(bits))
    whole, rng = copy.deepcopy(untouched), seeded()
    start = post_training_quantize(whole, data, batch_size=16, rng=rng)
    start_state, rng_state = copy.deepcopy(start.state_dict(whole)), rng.get_state()

    def work(checkpoint: Checkpoint) -> tuple[State, object]:
        student, rng = copy.deepcopy(untouched), torch.Generator()
        rng.set_state(rng_state)
        again = PTQResult.from_state(student, start_state)
        assert (again.equalized, again.errors, again.shifts) == (start.equalized, start.errors, start.shifts)
        tuning = finetune(
            student, again.reference, calibration, config=config, flip=True, rng=rng, checkpoint=checkpoint
        )
        return student.state_dict(), tuning

    tuning = finetune(whole, start.reference, calibration, config=config, flip=True, rng=rng)
    state, resumed = resume(work, tmp_path, [1, 6])
    assert resumed == tuning
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("always")
def test_predictions_go_on_to_the_same_answers_and_read_no_image_twice(tmp_path: Path) -> None:
    pixels, damaged, rows = images(40, seed=5).numpy(), {1, 12, 13, 14, 15, 39}, list[int]()

    def read(row: int) -> Images:
        rows.append(row)
        if row in damaged:
            raise UnreadableImageError(f"{row}.png", "truncated")
        return pixels[row]

    sets: list[EvaluationSet] = []

    def work(checkpoint: Checkpoint) -> list[Any]:
        data = EvaluationSet.of("some", len(pixels), np.arange(40), read)
        sets.append(replace(data, unreadable=Unreadable("some", 1000)))
        runner = TorchRunner(make_net("residual"))
        return list(predictions(runner, sets[-1], 4, checkpoint=checkpoint, phase="torch").tolist())

    whole = work(NOWHERE)
    assert len(whole) == 34
    rows.clear()
    assert resume(work, tmp_path, [1, 1, 1, 1, 3]) == whole  # the fourth batch has no image that can be read
    assert sorted(rows) == list(range(40))
    assert sets[-1].unreadable.summary() == sets[0].unreadable.summary()
    assert sets[-1].readable.tolist() == sets[0].readable.tolist()
    rows.clear()
    assert work(FileCheckpoint(tmp_path, "work")) == whole
    assert not rows


@pytest.mark.usefixtures("always")
def test_load_ignores_states_of_other_work_and_altered_ones(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path, "work")
    assert checkpoint.load("phase") is None
    checkpoint.save("phase", lambda: {"value": torch.ones(3)})
    assert torch.equal(FileCheckpoint(tmp_path, "work").load("phase")["value"], torch.ones(3))  # type: ignore[index]
    assert FileCheckpoint(tmp_path, "other work").load("phase") is None
    content = bytearray((tmp_path / "phase").read_bytes())
    for broken in (content[:-1], content[:10], b"", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        (tmp_path / "phase").write_bytes(broken)
        assert checkpoint.load("phase") is None


@pytest.mark.usefixtures("always")
def test_save_to_an_unwritable_place_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    FileCheckpoint(tmp_path / "file", "work").save("phase", dict)
    assert [r.message.partition(": ")[0] for r in caplog.records] == ["no checkpoint was written"]


def test_save_keeps_a_state_after_a_while_and_less_often_if_writing_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    checkpoint, times = FileCheckpoint(tmp_path, "work"), list[float]()

    def state() -> State:
        times.append(clock[0])
        clock[0] += 5  # what writing takes
        return {}

    while clock[0] < 140:
        checkpoint.save("phase", state)
        clock[0] += 1
    assert times == [30, 85]


@pytest.mark.usefixtures("always")
def test_perform_removes_checkpoints_and_empty_folders(tmp_path: Path) -> None:
    out = RunDirectory(tmp_path, {"name": "net", "weights_sha256": "0"})
    out.write_config("")
    for bits in ("w4a4", "w8a8"):
        out.checkpoint(f"quantize/{bits}", "1-1", {}).save("tuning", dict)
    out.perform("quantize/w4a4", {}, lambda: ({}, []))
    assert sorted(p.name for p in (tmp_path / ".checkpoints" / "quantize").iterdir()) == ["w8a8"]
    out.perform("quantize/w8a8", {}, lambda: ({}, []))
    assert not (tmp_path / ".checkpoints").exists()
