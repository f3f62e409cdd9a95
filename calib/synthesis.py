"""Data-free synthesis: train a generator, sample it evenly over the classes, refine its images."""

import copy
import math
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from calib.bn_statistics import DistanceMeter, tap_batchnorm, within_class_diversity
from calib.calibration_set import CalibrationSet
from calib.generator import ClassSampler
from calib.refine import RefineConfig, refine, survives_flip
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress
from calib.training import GeneratorConfig, GeneratorTrainer, History

# recipe `paper`: the published settings that are not the defaults
_PAPER = {"icv_noise": "class", "distance": "absolute", "lambda_mean": 0.5, "lambda_std": 1.0, "largest": 0}
_PAPER_EPOCHS, _PAPER_WARMUP_EPOCHS = 400, 50  # of as many images as the set has


class SynthesisConfig(StageConfig):
    """How the calibration set is generated.

    Attributes:
        recipe: `default`, or `paper`: only the generator, by the equations with their published weights and schedule
            of 400 epochs, 50 of them warm-up, each of as many images as the set has.
        images: size of the set.
    """

    recipe: Literal["default", "paper"] = "default"
    images: int = Field(1024, ge=2)
    generator: GeneratorConfig = GeneratorConfig()
    refine: RefineConfig = RefineConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, values: Any) -> Any:
        """Fill in the recipe's values for settings that are not set."""
        if not isinstance(values, dict) or values.get("recipe") != "paper":
            return values
        generator, refine = values.get("generator", {}), values.get("refine", {})
        if isinstance(generator, dict):
            sizes = values.get("images", 1024), generator.get("batch_size", GeneratorConfig().batch_size)
            schedule = {}
            if "steps" not in generator and all(isinstance(size, int) and size > 0 for size in sizes):
                epoch = math.ceil(sizes[0] / sizes[1])
                schedule = {"steps": _PAPER_EPOCHS * epoch, "warmup_steps": _PAPER_WARMUP_EPOCHS * epoch}
            generator = {**_PAPER, **schedule, **generator}
        if isinstance(refine, dict):
            refine = {"steps": 0, **refine}
        return {**values, "generator": generator, "refine": refine}

    def with_smaller_batches(self, divisor: int) -> "SynthesisConfig":
        """Return the same settings with batch sizes divided by `divisor`, of at least two images."""
        parts: dict[str, GeneratorConfig | RefineConfig] = {"generator": self.generator, "refine": self.refine}
        sizes = {name: {"batch_size": max(2, part.batch_size // divisor)} for name, part in parts.items()}
        return self.model_copy(update={name: part.model_copy(update=sizes[name]) for name, part in parts.items()})


@dataclass(frozen=True)
class Synthesis:
    """The result of synthesis.

    Attributes:
        calibration: the images, on the CPU.
        teacher_top1: share (percent) of images that the teacher classifies as their label.
        within_class_diversity: share of the variance of the teacher's last BatchNorm inputs that is within classes;
            None if no class has two images.
        flip: whether mirrored images have the same class.
        losses: each term by step.
        statistics_distance: how far the images' BatchNorm statistics are from the running ones in the median layer;
            see `DistanceMeter`.
    """

    calibration: CalibrationSet
    teacher_top1: float
    within_class_diversity: float | None
    flip: bool
    losses: History
    statistics_distance: float


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
    """Generate a calibration set for a teacher, without data.

    Args:
        teacher: a classifier with BatchNorm, in eval mode, on `device`; images (N, C, H, W) to logits (N, classes).
        size: (channels, height, width) of an image.
        mean, std: the teacher's normalization of pixels in [0, 1], one value per channel.
        checkpoint: on a CPU, an interruption does not change the images; on a GPU the order of some sums varies.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
        SynthesisError: training or refinement diverges.
    """
    teacher = _channels_last(teacher, torch.zeros(2, *size, device=device))
    trainer = GeneratorTrainer(
        teacher, classes=classes, size=size, mean=mean, std=std, config=config.generator, device=device, rng=rng
    )
    losses = {f"generator.{name}": values for name, values in trainer.train(progress, checkpoint).items()}
    labels = ClassSampler(classes, rng).draw(config.images).to(device)
    images = trainer.sample(labels)
    flip = survives_flip(teacher, images, labels, config.generator.batch_size)
    if config.refine.steps:
        offset, scale = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (mean, std))
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
        # the generator's images may be too poor to decide
        flip = flip or survives_flip(teacher, images, labels, config.generator.batch_size)
    images = images.half().float()  # the precision in which they are stored
    if not bool(images.isfinite().all()):
        raise SynthesisError("synthesis diverged: the images have values that are not finite; lower the learning rates")
    top1, diversity, distance = _judge(teacher, images, labels, config.generator.batch_size)
    calibration = CalibrationSet(images.cpu(), labels.cpu())
    return Synthesis(calibration, top1, diversity, flip, losses, distance)


@torch.no_grad()
def _channels_last(teacher: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of the teacher in the layout channels last, which takes down to half the time.

    A teacher that fails in this layout, because it applies `view` to a map, is returned unchanged.
    """
    changed = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    try:
        changed(images)
    except RuntimeError:
        return teacher
    return changed


@torch.no_grad()
def _judge(teacher: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float | None, float]:
    """Return the teacher's top-1 (percent), and of BatchNorm inputs the diversity within classes and the distance.

    The diversity is that of the last layer, the distance to the running statistics that of the median layer.
    """
    correct, features, meter = 0, [], DistanceMeter()
    with tap_batchnorm(teacher) as tap:
        for batch, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((teacher(batch).argmax(1) == targets).sum())
            features.append(tap.moments[-1].mean)
            meter.add(tap)
    diversity = within_class_diversity(torch.cat(features), labels) if len(labels.unique()) < len(labels) else None
    return 100 * correct / len(labels), diversity, median(meter.distances())
