"""Fine-tuning: the student learns from the teacher's answers to synthetic images."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from calib.calibration_set import CalibrationSet
from calib.support.amp import mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.config import StageConfig
from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.grid import BitWidths
from clusterq_deploy.quantization.qat.augment import AugmentConfig, Augmenter
from clusterq_deploy.quantization.qat.feature_loss import matched_features
from clusterq_deploy.quantization.qat.parametrize import NormalizedParameters, normalized
from clusterq_deploy.quantization.qat.tuning_loop import TuningLoop
from clusterq_deploy.quantization.reference import FloatTwin
from clusterq_deploy.quantization.student import Student

_SETTLED = 0.75
"""From this share of the schedule on a checkpoint may be kept: before, learning rates are large and a small held-out
divergence is luck (on a CIFAR-10 ResNet-20 one of step 75 of 600 cost 0.7 points more than its siblings' ends)."""

_JUDGED_VIEWS = 2
"""Of each held-out image: on the images themselves both models are too sure for a divergence to say much. On a CIFAR-10
ResNet-20 it rose while that on photographs fell; on views, at the temperature of training, both fell."""

_MEASURED_ON = 128  # images that say what a layer's inputs and outputs are like

_FAR = 0.02
_LEAST_STEPS = 0.1
"""A student that starts nearer to the teacher than this divergence has little to mend: it takes proportionally fewer
steps, at least this share of them."""


class FinetuneConfig(StageConfig):
    """How a student is tuned. `steps = 0` leaves the calibrated scales and the teacher's weights.

    Attributes:
        steps: optimizer steps (Adam, cosine decay), at most; fewer where the start is near the teacher.
        learning_rate: of weights, in steps of their row's grid, where activations have no more bits.
        bias_learning_rate: of biases, in deviations of their channel's outputs.
        scale_learning_rate: of the logarithms of the scales.
        ce_weight, kl_weight: 1 and gamma of (11) in arXiv 2205.00179.
        temperature: of the KL term; 1 is the paper's.
        feature_weight: of `matching.feature_loss`.
        augment: the views of the images that are tuned on.
        held_out: share of the synthetic images that is not tuned on, but selects among the last checkpoints, in views
            that are drawn once.
        checkpoints: how often the held-out images are asked.
    """

    steps: int = Field(1200, ge=0)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    bias_learning_rate: float = Field(1e-3, gt=0)
    scale_learning_rate: float = Field(3e-3, gt=0)
    ce_weight: float = Field(0.0, ge=0)
    kl_weight: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    feature_weight: float = Field(1.0, ge=0)
    augment: AugmentConfig = AugmentConfig()
    held_out: float = Field(0.125, gt=0, le=0.5)
    checkpoints: int = Field(8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _without_procedural(cls, values: Any) -> Any:
        """Ignore a setting of earlier versions, if it has its default, as it has in their `run.toml`."""
        if isinstance(values, dict) and values.get("procedural") == 0:
            return {name: value for name, value in values.items() if name != "procedural"}
        return values

    def scaled_to(self, bits: BitWidths) -> "FinetuneConfig":
        """Return the settings for a variant: above four bits there is less to fix, so steps are fewer and smaller.

        The weights' are smaller by themselves, being in steps of a finer grid. Where activations have more bits than
        weights, weights move by half as much for every two of them: what they are rounded by on their way is no longer
        hidden by the noise of the activations (MobileNetV1 W4A8 went away from its model without it).
        """
        spare = max(0, min(bits.weights, bits.activations) - 4)
        finer = max(0, bits.activations - bits.weights)
        return self.model_copy(
            update={
                "steps": math.ceil(self.steps / (1 + spare)),
                "learning_rate": self.learning_rate / 2 ** (finer / 2),
                "bias_learning_rate": self.bias_learning_rate / 2**spare,
                "scale_learning_rate": self.scale_learning_rate / 2**spare,
            }
        )


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning did: the loss by step, the held-out KL by checkpoint, and the step that was kept."""

    losses: dict[str, list[float]]
    best_step: int


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, config: FinetuneConfig) -> Tensor:
    """CE(Q(x), y) + gamma KL, from logits (N, classes) and labels (N,).  # (11) in arXiv 2205.00179

    The divergence is that of the student from the teacher, KL(teacher || student), as in distillation: it asks the
    student to give weight wherever the teacher does. It is taken at a temperature T and multiplied by T squared,
    which keeps its gradient's size (Hinton et al., arXiv 1503.02531).
    """
    t = config.temperature
    kl = F.kl_div((student / t).log_softmax(1), (teacher / t).log_softmax(1), reduction="batchmean", log_target=True)
    loss = config.kl_weight * t * t * kl
    if not config.ce_weight:
        return loss
    ce = F.cross_entropy(student, labels, reduction="sum")
    return loss + config.ce_weight * ce / len(labels)


class HeldOut:
    """Images that tell how near a student is to its teacher, which is asked once.

    Args:
        teacher: images (N, C, H, W) to logits (N, classes).
        images: (N, C, H, W) float32, normalized, on any device.
        batch_size: images a forward pass.
        temperature: what logits are divided by.
    """

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, images: Tensor, batch_size: int, temperature: float = 1.0) -> None:
        self._batches, self._count, self._temperature = images.split(batch_size), len(images), temperature
        self._targets = [self._asked(teacher, batch) for batch in self._batches]

    def _asked(self, net: nn.Module, batch: Tensor) -> Tensor:
        """The logarithms of the probabilities (n, classes)."""
        logits: Tensor = net(batch.to(next(net.parameters()).device))
        return (logits / self._temperature).log_softmax(1)

    @torch.no_grad()
    def divergence(self, student: nn.Module) -> float:
        """Mean KL(teacher || student) over the images, in nats."""
        pairs = zip(self._batches, self._targets, strict=True)
        with parametrize.cached():  # weights are rounded once for all batches
            terms = [F.kl_div(self._asked(student, own), to, reduction="sum", log_target=True) for own, to in pairs]
        return float(torch.stack(terms).sum()) / self._count


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

    Of the untuned student and the checkpoints of the last quarter, the one with the smallest divergence from the
    teacher on views of held-out synthetic images is kept.

    Args:
        student: calibrated, on the device to tune on.
        reference: the teacher, frozen, on the same device.
        calibration: the synthetic images.
        flip: mirror images at random.
        rng: source of all randomness.
        progress: shows how far it is.
        checkpoint: keeps what is reached, should the process end; the student must come as it came the first time.

    Raises:
        TuningError: the loss is not finite, and stays so from the last good state and at smaller learning rates.
    """
    losses: dict[str, list[float]] = {"distillation": [], "features": [], "held_out_kl": []}
    if not config.steps:
        return Tuning(losses, 0)
    device = next(student.parameters()).device
    tune, held_out = calibration.split(config.held_out)
    view = Augmenter(config.augment, tune.images, flip=flip, rng=rng)
    judged = torch.cat([view(held_out.images) for _ in range(_JUDGED_VIEWS)])
    measured = tune.images[:_MEASURED_ON].to(device)
    teacher = reference.graph.to(memory_format=torch.channels_last)
    student.to(memory_format=torch.channels_last)
    with teacher.in_float(), student.on_int8_grids():
        judge = HeldOut(teacher, judged, config.batch_size, config.temperature)
        best = judge.divergence(student)
    losses["held_out_kl"].append(best)
    steps = math.ceil(config.steps * min(1.0, max(_LEAST_STEPS, best / _FAR)))
    every = max(1, steps // config.checkpoints)
    # bfloat16 has eight significant bits: it tells the steps of a coarse grid apart, not those of an 8-bit one
    widest = max(student.bits.weights, student.bits.activations)
    precision = mixed_precision(device) if widest < 8 else nullcontext()
    with (
        student.on_int8_grids(),
        normalized(student, measured) as parameters,
        progress.task(f"Fine-tuning {student.bits}", steps) as advance,
        teacher.in_float(),
        matched_features(student, reference, judged[:_MEASURED_ON].to(device)) as feature_loss,
    ):
        course = TuningLoop(student, _optimizer(parameters, config), steps, rng, losses, best)
        if (reached := checkpoint.load("tuning")) is not None:
            course.load_state_dict(reached)
            del reached
        if course.done:
            advance(course.done)
        for step in range(course.done + 1, steps + 1):
            images, labels = (part.to(device) for part in _drawn(tune, config.batch_size, rng))
            images = view(images).contiguous(memory_format=torch.channels_last)
            with precision:
                with torch.no_grad():
                    target = teacher(images).float()
                with parametrize.cached():
                    logits = student(images).float()
            loss = distillation_loss(logits, target, labels, config)
            course.losses["distillation"].append(loss.item())
            if config.feature_weight:
                matching = feature_loss()
                course.losses["features"].append(matching.item())
                loss = loss + config.feature_weight * matching
            advance(1, loss=(value := loss.item()))
            if course.follow(loss, value) and (step % every == 0 or step == steps):
                course.judge(judge.divergence(student), may_keep=step >= _SETTLED * steps)
            checkpoint.save("tuning", course.state_dict)
        student.load_state_dict(course.kept)
    student.to(memory_format=torch.contiguous_format).round_biases_to_accumulator()
    return Tuning(course.losses, course.kept_step)


def _drawn(images: CalibrationSet, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many images of a set, and their labels, with repetition."""
    picked = torch.randint(len(images), (count,), generator=rng, device=rng.device).cpu()
    return images.images[picked], images.labels[picked]


def _optimizer(parameters: NormalizedParameters, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Adam with a learning rate for each kind of parameter."""
    return torch.optim.Adam(
        [
            {"params": parameters.rows, "lr": config.learning_rate},
            {"params": parameters.biases, "lr": config.bias_learning_rate},
            {"params": parameters.log_scales, "lr": config.scale_learning_rate},
        ],
        fused=True,
    )
