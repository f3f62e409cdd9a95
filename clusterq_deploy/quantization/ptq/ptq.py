"""The best student that needs no gradient: where fine-tuning starts, and all that `--effort fast` does."""

import copy
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.ptq.bias import correct_bias
from clusterq_deploy.quantization.ptq.calibrate import calibrate
from clusterq_deploy.quantization.ptq.equalize import Equalized, equalize
from clusterq_deploy.quantization.ptq.reconstruct import reconstruct
from clusterq_deploy.quantization.reference import ChannelAffine, FloatTwin
from clusterq_deploy.quantization.student import Student


@dataclass(frozen=True)
class PTQResult:
    """What was done to a student.

    Attributes:
        reference: the teacher with the student's graph, and how the student's channels differ from its.
        equalized: pairs of layers whose common tensor was equalized.
        errors: for each layer the squared error of its outputs relative to their variance, by plain rounding and
            after reconstruction; empty where weights have 8 bits.
        shifts: for each layer the mean shift that was corrected, relative to its outputs' deviation; empty where
            weights were reconstructed, which corrects biases too.
    """

    reference: FloatTwin
    equalized: list[Equalized]
    errors: dict[str, tuple[float, float]]
    shifts: dict[str, float]

    def state_dict(self, student: Student) -> State:
        """All that `from_state` needs to give this again, with the student that it was done to."""
        return {
            "student": student.state_dict(),
            "maps": {name: vars(own) for name, own in self.reference.maps.items()},
            "equalized": [asdict(pair) for pair in self.equalized],
            "errors": self.errors,
            "shifts": self.shifts,
        }

    @classmethod
    def from_state(cls, student: Student, state: State) -> "PTQResult":
        """What was done to a student, done to another one that is fresh from `make_student`, in place."""
        teacher, device = _teacher(student), next(student.parameters()).device
        student.load_state_dict(state["student"])
        maps = {
            name: ChannelAffine(own["scale"].to(device), own["shift"].to(device), own["site"])
            for name, own in state["maps"].items()
        }
        equalized = [Equalized(**pair) for pair in state["equalized"]]
        return cls(FloatTwin(teacher, maps), equalized, state["errors"], state["shifts"])


def _teacher(student: Student) -> Student:
    """What a fresh student is held against."""
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
    """Equalize, set all scales, and mend what rounding does to weights and biases, in place, for INT8's grids.

    Args:
        student: fresh from `make_student`.
        images: (N, C, H, W) float32, normalized.
        batch_size: images a forward pass.
        rng: source of all randomness.
        progress: shows how far it is.
        checkpoint: keeps what is reached.
    """
    begun = equalize_and_calibrate(
        student, images, batch_size=batch_size, rng=rng, progress=progress, checkpoint=checkpoint
    )
    return reconstruct_or_correct_bias(student, images, begun, rng=rng, progress=progress, checkpoint=checkpoint)


def equalize_and_calibrate(
    student: Student,
    images: Tensor,
    *,
    batch_size: int,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PTQResult:
    """Set all scales; weights and biases are the teacher's, in the student's channels."""
    if (kept := checkpoint.load("calibration")) is not None:
        rng.set_state(kept["rng"])
        return PTQResult.from_state(student, kept["state"])
    teacher = _teacher(student)
    with student.on_int8_grids():
        equalized, maps = equalize(student, images, rng=rng, progress=progress)
        calibrate(student, images, batch_size=batch_size, rng=rng, progress=progress)
    begun = PTQResult(FloatTwin(teacher, maps), equalized, {}, {})
    checkpoint.save("calibration", lambda: {"state": begun.state_dict(student), "rng": rng.get_state()}, at_once=True)
    return begun


def reconstruct_or_correct_bias(
    student: Student,
    images: Tensor,
    begun: PTQResult,
    *,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PTQResult:
    """The second half: what rounding does to weights and biases."""
    reference = begun.reference
    with student.on_int8_grids():
        if student.bits.weights < 8:
            errors = reconstruct(
                student, images, rng=rng, reference=reference, progress=progress, checkpoint=checkpoint
            )
            return replace(begun, errors=errors)
        return replace(begun, shifts=correct_bias(student, images, reference=reference, progress=progress))
