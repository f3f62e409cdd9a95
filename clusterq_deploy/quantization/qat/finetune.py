"""Fine-tuning: the student learns from the teacher's answers to synthetic images."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from calib.calibration_set import CalibrationSet
from calib.support.amp import FiniteSteps, mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import TuningError
from clusterq_deploy.quantization.grid import BitWidths
from clusterq_deploy.quantization.qat.augment import AugmentConfig, Augmenter
from clusterq_deploy.quantization.qat.losses import distillation_loss, matched_features
from clusterq_deploy.quantization.qat.parametrize import NormalizedParameters, normalized
from clusterq_deploy.quantization.reference import FloatTwin
from clusterq_deploy.quantization.student import Student

_SETTLED = 0.75
"""Only checkpoints after this share of the schedule may be the best: before, learning rates are large and a small
held-out divergence is luck (on a CIFAR-10 ResNet-20 one of step 75 of 600 cost 0.7 points more than later ones)."""

_JUDGED_VIEWS = 2
"""Views of each held-out image: on the images themselves both models are too sure for a divergence to say much. On a
CIFAR-10 ResNet-20 it rose while that on photographs fell; on views, at the temperature of training, both fell."""

_MEASURED_ON = 128  # images on which the statistics of layers' inputs and outputs are measured

_FAR = 0.02
_LEAST_STEPS = 0.1
"""A student whose first divergence from the teacher is less than `_FAR` has little to fix: it takes proportionally
fewer steps, at least this share of them."""


class FinetuneConfig(StageConfig):
    """How a student is tuned. `steps = 0` leaves the calibrated scales and the teacher's weights.

    A share of the synthetic images is not tuned on, but selects among the last checkpoints, in views drawn once.
    """

    steps: int = Field(600, ge=0)  # of Adam with cosine decay, at most; fewer if the start is near the teacher
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.001, gt=0)  # of weights, in steps of their grid
    bias_learning_rate: float = Field(1e-3, gt=0)  # in standard deviations of the channel's outputs
    scale_learning_rate: float = Field(3e-3, gt=0)  # of the logarithms of the scales
    ce_weight: float = Field(0.0, ge=0)  # 1 in (11) of arXiv 2205.00179
    kl_weight: float = Field(1.0, ge=0)  # gamma in (11)
    temperature: float = Field(2.0, gt=0)  # of the KL term; 1 is the paper's
    feature_weight: float = Field(1.0, ge=0)
    augment: AugmentConfig = AugmentConfig()
    held_out: float = Field(0.125, gt=0, le=0.5)  # the share
    checkpoints: int = Field(8, ge=1)  # how often a student is judged by it

    @model_validator(mode="before")
    @classmethod
    def _without_procedural(cls, values: Any) -> Any:
        """Ignore a setting of earlier versions, if it has its default, as it has in their `run.toml`."""
        if isinstance(values, dict) and values.get("procedural") == 0:
            return {name: value for name, value in values.items() if name != "procedural"}
        return values

    def scaled_to(self, bits: BitWidths) -> "FinetuneConfig":
        """Return the settings for a variant: above four bits there is less to fix, so steps are fewer and smaller.

        The weights' steps are smaller by themselves, being in units of a finer grid.
        """
        spare = max(0, min(bits.weights, bits.activations) - 4)
        return self.model_copy(
            update={
                "steps": math.ceil(self.steps / (1 + spare)),
                "bias_learning_rate": self.bias_learning_rate / 2**spare,
                "scale_learning_rate": self.scale_learning_rate / 2**spare,
            }
        )


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning did: the loss by step, the held-out KL by checkpoint, and the step whose student was best."""

    losses: dict[str, list[float]]
    best_step: int


class TuningLoop:
    """The state of fine-tuning: optimizer, losses, steps that are done, and the best student so far.

    Learning rates fall to zero on a cosine within `steps`. `start` is the divergence on held-out images before them.
    """

    def __init__(
        self,
        student: Student,
        parameters: NormalizedParameters,
        config: FinetuneConfig,
        steps: int,
        rng: torch.Generator,
        start: float,
    ) -> None:
        self._student, self._rng = student, rng
        self._optimizer = torch.optim.Adam(
            [
                {"params": parameters.rows, "lr": config.learning_rate},
                {"params": parameters.biases, "lr": config.bias_learning_rate},
                {"params": parameters.log_scales, "lr": config.scale_learning_rate},
            ],
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        advice = "try other images (--seed), or --effort fast, which does without"
        self._steps = FiniteSteps(f"fine-tuning {student.bits}", error=TuningError, advice=advice)
        self._parts: tuple[Any, ...] = (student, self._optimizer, self._schedule)
        self.done = 0
        self.losses: dict[str, list[float]] = {"distillation": [], "features": [], "held_out_kl": [start]}
        self._best, self.best_step, self.best_state = start, 0, copy.deepcopy(student.state_dict())

    def step(self, loss: Tensor) -> bool:
        """Take an optimizer step down a loss (); return False if it was skipped, as loss or gradient is not finite.

        Raises:
            TuningError: as for `finetune`.
        """
        self.done += 1
        if not self._steps.step(self._optimizer, loss):
            return False
        self._schedule.step()
        self._student.project()
        return True

    def judge(self, divergence: float, *, may_be_best: bool) -> None:
        """Record the student's divergence on held-out images."""
        self.losses["held_out_kl"].append(divergence)
        if divergence < self._best and may_be_best:
            self._best, self.best_step = divergence, self.done
            self.best_state = copy.deepcopy(self._student.state_dict())

    def state_dict(self) -> State:
        """Return all that the next step depends on."""
        parts, best = [part.state_dict() for part in self._parts], (self._best, self.best_step, self.best_state)
        return {"done": self.done, "parts": parts, "best": best, "losses": self.losses, "rng": self._rng.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` returned."""
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.done, self.losses = state["done"], state["losses"]
        self._best, self.best_step, self.best_state = state["best"]
        self._rng.set_state(state["rng"])


def finetune(
    student: Student,
    reference: FloatTwin,
    calibration: CalibrationSet,
    *,
    config: FinetuneConfig,
    flip: bool,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> Tuning:
    """Tune weights, biases and scales of a calibrated student, in place, in `normalized` parameters, on INT8's grids.

    The result is the best of the untuned student and the checkpoints of the last quarter: the one that diverges least
    from the teacher on views of held-out synthetic images.

    Args:
        student: calibrated, on the device to tune on.
        reference: the teacher, frozen, on the same device.
        flip: mirror images at random.
        checkpoint: a resumed call needs the same student as the first one.

    Raises:
        TuningError: the loss or its gradient is not finite, three steps in a row.
    """
    if not config.steps:
        return Tuning({"distillation": [], "features": [], "held_out_kl": []}, 0)
    device = student.device
    tune, held_out = calibration.split(config.held_out)
    augment = Augmenter(config.augment, tune.images, flip=flip, rng=rng)
    judged = torch.cat([augment(held_out.images) for _ in range(_JUDGED_VIEWS)])
    measured = tune.images[:_MEASURED_ON].to(device)
    teacher = reference.graph.to(memory_format=torch.channels_last)
    student.to(memory_format=torch.channels_last)
    with teacher.in_float(), student.on_int8_grids():
        targets = log_probabilities(teacher, judged, config)
        start = divergence(log_probabilities(student, judged, config), targets)
    steps = math.ceil(config.steps * min(1.0, max(_LEAST_STEPS, start / _FAR)))
    every = max(1, steps // config.checkpoints)
    # bfloat16 has eight significant bits: they resolve the steps of a coarse grid, not those of an 8-bit one
    narrow = max(student.bits.weights, student.bits.activations) < 8
    precision = mixed_precision(device) if narrow else nullcontext()
    weights = {"ce_weight": config.ce_weight, "kl_weight": config.kl_weight, "temperature": config.temperature}
    with (
        student.on_int8_grids(),
        normalized(student, measured) as parameters,
        progress.task(f"Fine-tuning {student.bits}", steps) as advance,
        teacher.in_float(),
        matched_features(student, reference, judged[:_MEASURED_ON].to(device)) as compare_features,
    ):
        loop = TuningLoop(student, parameters, config, steps, rng, start)
        if (saved := checkpoint.load("tuned")) is not None:
            loop.load_state_dict(saved)
            del saved
        advance(loop.done)
        for step in range(loop.done + 1, steps + 1):
            images, labels = (part.to(device) for part in _draw(tune, config.batch_size, rng))
            images = augment(images).contiguous(memory_format=torch.channels_last)
            with precision:
                with torch.no_grad():
                    target = teacher(images).float()
                with parametrize.cached():
                    logits = student(images).float()
            loss = distillation_loss(logits, target, labels, **weights)
            loop.losses["distillation"].append(loss.item())
            if config.feature_weight:
                feature_loss = compare_features()
                loop.losses["features"].append(feature_loss.item())
                loss = loss + config.feature_weight * feature_loss
            advance(1, loss=loss.item())
            if loop.step(loss) and (step % every == 0 or step == steps):
                held_out_kl = divergence(log_probabilities(student, judged, config), targets)
                loop.judge(held_out_kl, may_be_best=step >= _SETTLED * steps)
            checkpoint.save("tuned", loop.state_dict)
        student.load_state_dict(loop.best_state)
    student.to(memory_format=torch.contiguous_format).round_biases_to_accumulator()
    return Tuning(loop.losses, loop.best_step)


@torch.no_grad()
def log_probabilities(net: nn.Module, images: Tensor, config: FinetuneConfig) -> list[Tensor]:
    """Return the logarithms of a net's probabilities (n, classes) at the temperature, per batch of images."""
    with parametrize.cached():  # weights are rounded once for all batches
        device = next(net.parameters()).device
        batches = images.split(config.batch_size)
        return [(net(batch.to(device)) / config.temperature).log_softmax(1) for batch in batches]


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """Return the mean KL(teacher || student), in nats, of `log_probabilities` for the same images."""
    terms = [F.kl_div(x, y, reduction="sum", log_target=True) for x, y in zip(student, teacher, strict=True)]
    return float(torch.stack(terms).sum()) / sum(map(len, teacher))


def _draw(images: CalibrationSet, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images of a set, and their labels, with repetition."""
    picked = torch.randint(len(images), (count,), generator=rng, device=rng.device).cpu()
    return images.images[picked], images.labels[picked]
