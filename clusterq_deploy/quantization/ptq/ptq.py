"""The best student that needs no gradient: where fine-tuning starts, and all that `--effort fast` does."""

import copy
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.ptq.calibrate import calibrate
from clusterq_deploy.quantization.ptq.equalize import Equalized, Trunk, equalize, equalize_trunks
from clusterq_deploy.quantization.ptq.reconstruct import correct_bias, reconstruct
from clusterq_deploy.quantization.reference import ChannelAffine, FloatTwin
from clusterq_deploy.quantization.student import Student


@dataclass(frozen=True)
class PTQResult:
    """What was done to a student."""

    reference: FloatTwin
    trunks: list[Trunk]
    equalized: list[Equalized]
    errors: dict[str, tuple[float, float]]  # of `reconstruct`; empty if weights have 8 bits
    shifts: dict[str, float]  # of `correct_bias`; empty if weights were reconstructed, which corrects biases too

    def state_dict(self, student: Student) -> State:
        """Return all that `from_state` needs to restore this and the quantized student."""
        return {
            "student": student.state_dict(),
            "maps": {name: vars(affine) for name, affine in self.reference.maps.items()},
            "trunks": [vars(trunk) for trunk in self.trunks],
            "equalized": [asdict(pair) for pair in self.equalized],
            "errors": self.errors,
            "shifts": self.shifts,
        }

    @classmethod
    def from_state(cls, student: Student, state: State) -> "PTQResult":
        """Restore a result, and in place its student, which must be fresh from `make_student`."""
        trunks = [Trunk(**trunk) for trunk in state["trunks"]]
        for trunk in trunks:
            trunk.apply(student)
        teacher = _teacher(student)
        student.load_state_dict(state["student"])
        maps = {
            name: ChannelAffine(affine["scale"].to(student.device), affine["shift"].to(student.device), affine["site"])
            for name, affine in state["maps"].items()
        }
        equalized = [Equalized(**pair) for pair in state["equalized"]]
        return cls(FloatTwin(teacher, maps), trunks, equalized, state["errors"], state["shifts"])


def _teacher(student: Student) -> Student:
    """Return what a fresh student is compared with."""
    return copy.deepcopy(student).requires_grad_(False)


def post_training_quantize(
    student: Student,
    images: Tensor,
    *,
    batch_size: int,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PTQResult:
    """Equalize, set all scales, and fix what rounding does to weights and biases, in place, for INT8's grids.

    The student is fresh from `make_student`, images are (N, C, H, W) float32, normalized.
    """
    start = equalize_and_calibrate(
        student, images, batch_size=batch_size, rng=rng, progress=progress, checkpoint=checkpoint
    )
    return reconstruct_or_correct_bias(student, images, start, rng=rng, progress=progress, checkpoint=checkpoint)


def equalize_and_calibrate(
    student: Student,
    images: Tensor,
    *,
    batch_size: int,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PTQResult:
    """Set all scales; weights and biases stay the teacher's, but for scales of channels."""
    if (saved := checkpoint.load("calibrated")) is not None:
        rng.set_state(saved["rng"])
        return PTQResult.from_state(student, saved["state"])
    with student.on_int8_grids():
        trunks = equalize_trunks(student, images, progress=progress)
        teacher = _teacher(student)
        equalized, maps = equalize(student, images, rng=rng, progress=progress)
        calibrate(student, images, batch_size=batch_size, rng=rng, progress=progress)
    result = PTQResult(FloatTwin(teacher, maps), trunks, equalized, {}, {})
    checkpoint.save("calibrated", lambda: {"state": result.state_dict(student), "rng": rng.get_state()}, at_once=True)
    return result


def reconstruct_or_correct_bias(
    student: Student,
    images: Tensor,
    start: PTQResult,
    *,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PTQResult:
    """Fix what rounding does to the weights and biases of a student that `equalize_and_calibrate` returned `start` for.

    Weights of fewer than eight bits are reconstructed; of others only the biases are corrected.
    """
    with student.on_int8_grids():
        if student.bits.weights < 8:
            errors = reconstruct(student, start.reference, images, rng=rng, progress=progress, checkpoint=checkpoint)
            return replace(start, errors=errors)
        return replace(start, shifts=correct_bias(student, start.reference, images, progress=progress))
