"""Data-free synthesis, whole: train a generator, sample it evenly over the classes, refine what it made."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from calib.bn_statistics import tap_batchnorm, within_class_diversity
from calib.calibration_set import CalibrationSet
from calib.labels import balanced_labels
from calib.refine import RefineConfig, refine, survives_flip
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress
from calib.training import GeneratorConfig, GeneratorTrainer, History

# the weights of the equations are the defaults; what differs is (6), here as it is written, and the refinement
_PAPER: dict[str, dict[str, Any]] = {
    "generator": {
        "icv_noise": "class",
        "distance": "absolute",
        "lambda_mean": 0.5,
        "lambda_std": 1.0,
        "largest": 0,
    },
    "refine": {"steps": 0},
}
_PAPER_EPOCHS, _PAPER_WARMUP_EPOCHS = 400, 50  # without data an epoch is a pass as long as the set that is made


class SynthesisConfig(StageConfig):
    """How the calibration set is made.

    Attributes:
        recipe: `default`, or `paper`: the generator alone, by the equations with their published weights and
            schedule: 400 epochs, 50 of them warm-up, each as long as the set that is made.
        images: size of the set.
        generator, refine: the two parts.
    """

    recipe: Literal["default", "paper"] = "default"
    images: int = Field(1024, ge=2)
    generator: GeneratorConfig = GeneratorConfig()
    refine: RefineConfig = RefineConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_recipe(cls, values: Any) -> Any:
        """Settings that were not given take the recipe's values."""
        if not isinstance(values, dict) or values.get("recipe") != "paper":
            return values
        filled = dict(values)
        for part, settings in _PAPER.items():
            given = filled.get(part, {})
            filled[part] = {**settings, **given} if isinstance(given, dict) else given
        generator, images = filled["generator"], filled.get("images", cls.model_fields["images"].default)
        if isinstance(generator, dict) and "steps" not in generator and isinstance(images, int):
            epoch = math.ceil(images / int(generator.get("batch_size", GeneratorConfig().batch_size)))
            schedule = {"steps": _PAPER_EPOCHS * epoch, "warmup_steps": _PAPER_WARMUP_EPOCHS * epoch}
            filled["generator"] = {**schedule, **generator}
        return filled

    def with_smaller_batches(self, divisor: int) -> "SynthesisConfig":
        """The same work in batches of a divisor-th of the size, at least two images."""

        def smaller(batch_size: int) -> dict[str, int]:
            return {"batch_size": max(2, batch_size // divisor)}

        return self.model_copy(
            update={
                "generator": self.generator.model_copy(update=smaller(self.generator.batch_size)),
                "refine": self.refine.model_copy(update=smaller(self.refine.batch_size)),
            }
        )


@dataclass(frozen=True)
class Synthesis:
    """What synthesis gives.

    Attributes:
        calibration: the images, on the CPU.
        teacher_top1: share (percent) of images that the teacher gives their label.
        within_class_diversity: share of the variance of the teacher's last BatchNorm inputs that lies within classes;
            None where no class has two images.
        flip: whether images keep their class when mirrored.
        losses: each term by step.
    """

    calibration: CalibrationSet
    teacher_top1: float
    within_class_diversity: float | None
    flip: bool
    losses: History


def synthesize(
    teacher: nn.Module,
    *,
    classes: int,
    size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    config: SynthesisConfig,
    device: torch.device,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> Synthesis:
    """Make a calibration set for a teacher, without data.

    Args:
        teacher: a classifier with BatchNorm, in eval mode, on `device`; images (N, C, H, W) to logits (N, classes).
        classes: number of classes.
        size: (channels, height, width) of an image.
        mean, std: the teacher's normalization of pixels in [0, 1], a value a channel.
        config: how to make it.
        device: where to compute.
        rng: source of all randomness.
        progress: shows how far it is.
        checkpoint: keeps what is reached. On a CPU, work that goes on from it ends with the images that it would have
            ended with; on a GPU some gradients are summed in any order.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
        SynthesisError: it diverges, also from its last good state and at smaller learning rates.
    """
    teacher = _channels_last(teacher, torch.zeros(2, *size, device=device))
    trainer = GeneratorTrainer(
        teacher,
        classes=classes,
        size=size,
        mean=mean,
        std=std,
        config=config.generator,
        device=device,
        rng=rng,
    )
    if (drawn := checkpoint.load("drawn")) is None:
        history = trainer.train(progress, checkpoint)
        labels = balanced_labels(config.images, classes, rng).to(device)
        images = trainer.sample(labels)
        flip = survives_flip(teacher, images, labels, config.generator.batch_size)
        state = {"history": history, "labels": labels, "images": images, "flip": flip, "rng": rng.get_state()}
        checkpoint.save("drawn", lambda: state, at_once=True)
    else:
        history, flip = drawn["history"], drawn["flip"]
        labels, images = drawn["labels"].to(device), drawn["images"].to(device)
        rng.set_state(drawn["rng"])
    losses = {f"generator.{name}": values for name, values in history.items()}
    if config.refine.steps:
        shape = (1, size[0], 1, 1)
        offset, scale = (
            torch.tensor(mean, device=device).view(shape),
            torch.tensor(std, device=device).view(shape),
        )
        images, history = refine(
            teacher,
            images,
            labels,
            config=config.refine,
            limits=(-offset / scale, (1 - offset) / scale),
            flip=flip,
            rng=rng,
            progress=progress,
            checkpoint=checkpoint,
        )
        losses |= {f"refine.{name}": values for name, values in history.items()}
        # a generator's images may be too poor to tell; refined without flips, photographs survive one all the same
        flip = flip or survives_flip(teacher, images, labels, config.generator.batch_size)
    images = images.half().float()  # as it will be read back
    if not bool(images.isfinite().all()):
        raise SynthesisError("synthesis diverged: the images hold values that are not finite; lower the learning rates")
    top1, diversity = _judge(teacher, images, labels, config.generator.batch_size)
    calibration = CalibrationSet(images.cpu(), labels.cpu())
    return Synthesis(calibration, top1, diversity, flip, losses)


@torch.no_grad()
def _channels_last(teacher: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the teacher whose convolutions run channels last: on CPUs and GPUs a pass takes down to half the time.

    The teacher itself where it takes a `view` of a map that has none in that layout.
    """
    changed = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    try:
        changed(images)
    except RuntimeError:
        return teacher
    return changed


@torch.no_grad()
def _judge(teacher: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float | None]:
    """The teacher's top-1 (percent), and the diversity of its last BatchNorm layer's inputs within classes."""
    right, features = 0, []
    with tap_batchnorm(teacher) as tap:
        for part, own in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += int((teacher(part).argmax(1) == own).sum())
            features.append(tap.moments[-1].mean)
    diversity = within_class_diversity(torch.cat(features), labels) if len(labels.unique()) < len(labels) else None
    return 100 * right / len(labels), diversity
