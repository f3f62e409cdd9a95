"""Work that was interrupted goes on from its checkpoint, and ends as it would have ended."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import images, make_net, synthesis
from torch import Tensor

from calib.calibration_set import CalibrationSet
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.synthesis import Synthesis
from clusterq_deploy.errors import UnreadableImageError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.images import Images, Unreadable
from clusterq_deploy.evaluation.measure import Predictions, predictions
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    PrecisionPlan,
    PTQResult,
    Sensitivity,
    finetune,
    make_student,
    plan_precision,
    post_training_quantize,
    sensitivities,
)
from clusterq_deploy.run import checkpoint as files
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.runtimes.runners import TorchRunner

ROOT = Path(__file__).parents[1]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is always time to keep a state."""
    monkeypatch.setattr(files, "_EVERY", 0.0)
    monkeypatch.setattr(files, "_LARGEST_SHARE", math.inf)


class Interrupted(BaseException):
    """What ends the work in the middle."""


class Interrupting(FileCheckpoint):
    """Keeps every state, and ends the work when it has kept some."""

    def __init__(self, folder: Path, left: int) -> None:
        super().__init__(folder, "work")
        self._remaining = left

    def save(self, phase: str, state: Callable[[], State], **options: Any) -> None:
        """As in the base class."""
        super().save(phase, state, **options)
        self._remaining -= 1
        if self._remaining == 0:
            raise Interrupted


def interrupted(work: Callable[[Checkpoint], object], folder: Path, after: list[int]) -> None:
    """Begin some work again and again, each time until it has kept that many states."""
    for left in after:
        with pytest.raises(Interrupted):
            work(Interrupting(folder, left))


class Counting(FileCheckpoint):
    """Keeps no state, and counts how often it could have."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "work")
        self.count = 0

    def save(self, phase: str, state: Callable[[], State], **options: Any) -> None:
        """As in the base class."""
        self.count += 1


def flat(state: Any) -> Any:
    """A state whose tensors are lists, which can be compared."""
    if isinstance(state, dict):
        return {name: flat(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.mark.usefixtures("always")
def test_synthesis_goes_on_to_the_same_images(tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "images": 40,
        "generator": {"steps": 9, "warmup_steps": 4, "batch_size": 16},
        "refine": {"steps": 5, "batch_size": 16},
    }

    def work(checkpoint: Checkpoint) -> Synthesis:
        return synthesis(settings, checkpoint)

    whole = work(FileCheckpoint(tmp_path / "none", "work"))
    # in the warm-up, after it, in the first, the second and the third batch of the refinement
    interrupted(work, tmp_path / "kept", [3, 4, 6, 5, 5])
    last = work(FileCheckpoint(tmp_path / "kept", "work"))
    assert torch.equal(last.calibration.images, whole.calibration.images)
    assert torch.equal(last.calibration.labels, whole.calibration.labels)
    assert last.losses == whole.losses
    assert (last.teacher_top1, last.within_class_diversity, last.flip) == (
        whole.teacher_top1,
        whole.within_class_diversity,
        whole.flip,
    )


@pytest.mark.parametrize(("bits", "after"), [("w4a4", [1, 1, 3, 2]), ("w8a8", [1])])
@pytest.mark.usefixtures("always")
def test_initialization_goes_on_to_the_same_student(tmp_path: Path, bits: str, after: list[int]) -> None:
    net, data = make_net("mobile"), images(48, seed=3)
    fresh = make_student(net, BitWidths.parse(bits))

    def work(checkpoint: Checkpoint) -> tuple[State, Tensor]:
        student, rng = copy.deepcopy(fresh), torch.Generator().manual_seed(0)
        started = post_training_quantize(student, data, batch_size=16, rng=rng, checkpoint=checkpoint)
        return started.state_dict(student), rng.get_state()

    whole, drawn = work(NOWHERE)
    interrupted(work, tmp_path, after)  # before the first layer, and then behind others of them
    state, rng = work(FileCheckpoint(tmp_path, "work"))
    assert flat(state) == flat(whole)
    assert torch.equal(rng, drawn)


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_sensitivities_and_a_plan_go_on_to_the_same_widths_and_nothing_is_done_twice(tmp_path: Path) -> None:
    net, data = make_net("residual"), images(32, seed=3)
    widths: dict[str, Any] = {"quantize_first_last": True, "layer_bits": {}}
    options: dict[str, Any] = {"judged": images(32, seed=4), "batch_size": 16}

    def work(checkpoint: Checkpoint) -> tuple[list[Sensitivity], PrecisionPlan]:
        bits, rng = BitWidths(2, 3), torch.Generator().manual_seed(0)
        student = make_student(net, bits, **widths)
        costs = sensitivities(student, data, rng=rng, checkpoint=checkpoint, **options)
        rng = torch.Generator().manual_seed(1)
        plan = plan_precision(
            net, bits, costs=costs, max_drop=1.5, images=data, rng=rng, checkpoint=checkpoint, **widths, **options
        )
        return costs, plan

    counting = Counting(tmp_path)
    whole = work(counting)
    assert 0 < len(whole[1].layer_bits) < len(whole[0]) - 1  # a count that was neither the first nor the last
    left, after = counting.count, list[int]()
    while left:
        after.append(min(left, len(after) + 1))
        left -= after[-1]
    interrupted(work, tmp_path, after)
    rest = Counting(tmp_path)
    assert work(rest) == whole
    assert rest.count == 0


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.usefixtures("always")
def test_fine_tuning_goes_on_to_the_same_student(tmp_path: Path, bits: str) -> None:
    net, data = make_net("residual"), images(64, seed=3)
    calibration = CalibrationSet(data, net(data).argmax(1))
    config = FinetuneConfig(steps=150, batch_size=16, checkpoints=4)  # it starts near: a tenth of them
    fresh = make_student(net, BitWidths.parse(bits))
    start = copy.deepcopy(fresh)
    rng = torch.Generator().manual_seed(0)
    started = post_training_quantize(start, data, batch_size=16, rng=rng)
    kept, after = copy.deepcopy(started.state_dict(start)), rng.get_state()

    def work(checkpoint: Checkpoint) -> tuple[State, object]:
        student, rng = copy.deepcopy(fresh), torch.Generator()
        rng.set_state(after)
        again = PTQResult.from_state(student, kept)
        assert (again.equalized, again.errors, again.shifts) == (started.equalized, started.errors, started.shifts)
        tuning = finetune(
            student, again.reference, calibration, config=config, flip=True, rng=rng, checkpoint=checkpoint
        )
        return student.state_dict(), tuning

    tuning = finetune(start, started.reference, calibration, config=config, flip=True, rng=rng)
    interrupted(work, tmp_path / "kept", [1, 6])
    state, other = work(FileCheckpoint(tmp_path / "kept", "work"))
    assert other == tuning
    for name, value in start.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("always")
def test_an_evaluation_goes_on_to_the_same_answers_and_no_image_is_read_twice(tmp_path: Path) -> None:
    data, damaged, read = images(40, seed=5).numpy(), {1, 12, 13, 14, 15, 39}, list[int]()

    def some() -> EvaluationSet:
        def one(row: int) -> Images:
            read.append(row)
            if row in damaged:
                raise UnreadableImageError(f"{row}.png", "truncated")
            return data[row]

        return replace(EvaluationSet.of("some", len(data), np.arange(40), one), unreadable=Unreadable("some", 1000))

    sets: list[EvaluationSet] = []

    def work(checkpoint: Checkpoint) -> Predictions:
        sets.append(some())
        return predictions(TorchRunner(make_net("residual")), sets[-1], 4, checkpoint=checkpoint, phase="torch")

    whole = work(NOWHERE)
    assert len(whole) == 34
    read.clear()
    interrupted(work, tmp_path, [1, 1, 1, 1, 3])  # the fourth batch has no image that can be read
    assert work(FileCheckpoint(tmp_path, "work")).tolist() == whole.tolist()
    assert sorted(read) == list(range(40))
    assert [own.unreadable.summary() for own in sets[1:]][-1] == sets[0].unreadable.summary()
    assert sets[-1].kept.tolist() == sets[0].kept.tolist()
    read.clear()
    assert work(FileCheckpoint(tmp_path, "work")).tolist() == whole.tolist()
    assert not read


@pytest.mark.usefixtures("always")
def test_states_of_other_work_and_altered_ones_count_as_none(tmp_path: Path) -> None:
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
def test_a_disk_that_takes_no_checkpoint_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    FileCheckpoint(tmp_path / "file", "work").save("phase", dict)
    assert [r.message.partition(": ")[0] for r in caplog.records] == ["no checkpoint was kept"]


def test_it_is_time_again_after_a_while_and_less_often_where_writing_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    checkpoint, kept = FileCheckpoint(tmp_path, "work"), []

    def state() -> State:
        kept.append(clock[0])
        clock[0] += 5  # what writing takes
        return {}

    while clock[0] < 140:
        checkpoint.save("phase", state)
        clock[0] += 1
    assert kept == [30, 85]


@pytest.mark.usefixtures("always")
def test_checkpoints_are_removed_with_the_folders_that_held_nothing_else(tmp_path: Path) -> None:
    out = RunDirectory(tmp_path, {"name": "net", "weights_sha256": "0"})
    out.begin("")
    for bits in ("w4a4", "w8a8"):
        out.checkpoint(f"quantize/{bits}", "1-1", {}).save("tuning", dict)
    out.perform("quantize/w4a4", {}, lambda: ({}, []))
    assert sorted(p.name for p in (tmp_path / ".checkpoints" / "quantize").iterdir()) == ["w8a8"]
    out.perform("quantize/w8a8", {}, lambda: ({}, []))
    assert not (tmp_path / ".checkpoints").exists()
