"""Refinement of the generator's pixels by the teacher's BatchNorm statistics."""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from calib.bn_statistics import tap_batchnorm
from calib.kernels import total_variation
from calib.losses import bns_loss, image_variance_loss
from calib.support.amp import FiniteSteps, mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress
from calib.training import History

_TERMS = ("bns", "ce", "spread", "variation")
_SHARED_NOISE = 0.8  # of the noise's variance
_UNSETTLED = 1.5
"""L_BNS of a first batch from which steps are too few. CIFAR ResNets are at 0.2 to 0.4 after 60 steps, a ResNet-18 at
1.1 after 40. A MobileNetV1 was at 2.3 after 60, and 256 images of 150 steps served W4A8 better than 1,024 of 60 (KL
0.33 and 0.41 before fine-tuning)."""


class RefineConfig(StageConfig):
    """How images are refined; `steps = 0` skips it.

    Attributes:
        steps: optimizer steps per batch, by Adam with cosine decay from `learning_rate`.
        longer: how many times as many steps every batch takes if the first one shows that they are needed: if L_BNS is
            still above `_UNSETTLED` at its end.
        batch_size: images that share one set of batch statistics.
        noise: share of `natural_noise` blended into the generator's images, so that each has its own layout.
        bns_weight: weight of L_BNS (9), in channel deviations; the weights of its layers are `shallow_weight` to
            `deep_weight`, linearly by depth: early statistics constrain an image only loosely.
        ce_weight: weight of L_CE (8), for images with a probability of their class below `confident`.
        variation_weight: weight of the total variation.
        spread_weight: weight of `image_variance_loss`.
        spread_mean, spread_std: its required variances.
        shift: the largest shift of images in a step, in pixels: against overfitting of single pixels.
    """

    steps: int = Field(60, ge=0)
    longer: float = Field(2.5, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(0.1, gt=0)
    noise: float = Field(0.5, ge=0, le=1)
    bns_weight: float = Field(10.0, ge=0)
    shallow_weight: float = Field(0.2, ge=0)
    deep_weight: float = Field(1.1, ge=0)
    ce_weight: float = Field(0.3, ge=0)
    confident: float = Field(0.9, gt=0, le=1)
    variation_weight: float = Field(0.05, ge=0)
    spread_weight: float = Field(0.1, ge=0)
    spread_mean: float = Field(0.08, gt=0)
    spread_std: float = Field(0.027, gt=0)
    shift: int = Field(2, ge=0)


def shift_images(images: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """Move images (N, C, H, W) by whole pixels, with the border replicated, and mirror them left to right if `flip`."""
    reach = max(abs(down), abs(right))
    if reach:
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        height, width = images.shape[-2:]
        images = padded[..., reach - down : reach - down + height, reach - right : reach - right + width]
    return images.flip(-1) if flip else images


def move_apart(images: Tensor, reach: int, flip: bool, rng: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) in about as many parts as there are shifts by at most `reach`, each moved by another.

    One shift for all would let the images fit the pixels that layers with strides see at even shifts, and miss the
    statistics at odd ones. If `flip`, parts are mirrored at random.
    """
    moves = [(down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
    parts = images.chunk(len(moves))
    order = torch.randperm(len(moves), generator=rng, device=rng.device).tolist()
    mirrored = torch.randint(2, (len(parts),), generator=rng, device=rng.device).bool().tolist()
    return torch.cat(
        [
            shift_images(part, down, right, flip and mirror)
            for part, (down, right), mirror in zip(parts, (moves[i] for i in order), mirrored, strict=False)
        ]  # a small batch has fewer parts than there are shifts
    )


def natural_noise(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Draw Gaussian noise (N, C, H, W) float32 of unit variance whose amplitude falls as 1/f, as in photographs.

    Field, Relations between the statistics of natural images and the response properties of cortical cells, JOSA A
    1987. Channels share most of it, as in photographs.
    """
    count, channels, height, width = shape
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = torch.hypot(rows[:, None], columns[None]).clamp_min(0.5 / max(height, width)).to(rng.device)
    white = torch.randn(count, channels + 1, height, width, generator=rng, device=rng.device)
    noise: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    noise = noise / noise.std((0, 2, 3), keepdim=True)
    shared = _SHARED_NOISE if channels > 1 else 0.0
    return math.sqrt(shared) * noise[:, :1] + math.sqrt(1 - shared) * noise[:, 1:]


@torch.no_grad()
def survives_flip(teacher: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> bool:
    """Return whether mirrored images have the same class: true for photographs, false for digits and letters.

    This is decided by the teacher, on the images (N, C, H, W) that it classifies as their labels (N,). Of these, at
    least half have to have the same class when mirrored, and twice as many as upside down; or at least four fifths.
    """
    recognized = mirrored = upside_down = 0
    for batch, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        correct = teacher(batch).argmax(1) == targets
        recognized += int(correct.sum())
        mirrored += int((correct & (teacher(batch.flip(-1)).argmax(1) == targets)).sum())
        upside_down += int((correct & (teacher(batch.flip(-2)).argmax(1) == targets)).sum())
    return recognized > 0 and (mirrored >= 0.8 * recognized or mirrored >= max(0.5 * recognized, 2 * upside_down))


def refine(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    config: RefineConfig,
    limits: tuple[Tensor, Tensor],
    flip: bool,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> tuple[Tensor, History]:
    """Optimize the pixels of images, batch by batch.

    Args:
        teacher: frozen, in eval mode, on the images' device.
        images: (N, C, H, W) float32, normalized.
        labels: (N,) int64.
        limits: the normalized values of black and of white, each (1, C, 1, 1).
        flip: mirror images at random between steps.

    Returns:
        The refined images, rounded to half precision, and each loss term by step, averaged over batches.

    Raises:
        SynthesisError: the loss of a batch or its gradient is not finite three times in a row.
    """
    batches = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
    state = checkpoint.load("refine")
    longest = math.ceil(config.steps * config.longer) if config.bns_weight else config.steps

    def attempt(settings: RefineConfig) -> tuple[list[Tensor], History] | None:
        """Refine all batches; return None if the first one shows that it takes more steps."""
        nonlocal state
        refined, history = list[Tensor](), {name: [0.0] * settings.steps for name in _TERMS}
        if state is not None:
            refined, history = state["refined"], state["history"]

        def save(batch: _Batch) -> None:
            saved = {"steps": settings.steps, "refined": refined, "history": history}
            checkpoint.save("refine", lambda: {**saved, "batch": batch.state_dict()})

        with progress.task("Refinement", len(batches) * settings.steps) as advance:
            advance(len(refined) * settings.steps)
            for start, targets in batches[len(refined) :]:
                batch = _Batch(start, targets, settings, limits, rng)
                if state is not None:
                    batch.load_state_dict(state["batch"])
                    state = None
                    advance(len(batch.losses))
                while len(batch.losses) < settings.steps:
                    if batch.step(teacher, flip):
                        advance(1, **batch.losses[-1])
                    save(batch)
                if not refined and settings.steps < longest and batch.losses[-1]["bns"] > _UNSETTLED:
                    return None
                refined.append(batch.pixels.detach().half().cpu())
                for step, terms in enumerate(batch.losses):
                    for name, value in terms.items():
                        history[name][step] += value / len(batches)
        return refined, history

    done = attempt(config) if state is None or state["steps"] == config.steps else None
    if done is None:
        done = attempt(config.model_copy(update={"steps": longest}))
    assert done is not None  # the longest attempt has no reason to end
    refined, history = done
    return torch.cat(refined).to(images.device).float(), history


class _Batch:
    """Images that share one set of batch statistics: `pixels` (N, C, H, W), and the terms of each step in `losses`."""

    def __init__(
        self, images: Tensor, labels: Tensor, config: RefineConfig, limits: tuple[Tensor, Tensor], rng: torch.Generator
    ) -> None:
        noise = natural_noise(images.shape, rng).to(images.device)
        self.pixels = nn.Parameter(torch.lerp(images, noise, config.noise).clamp(*limits))
        self.losses: list[dict[str, float]] = []
        self._labels, self._config, self._limits, self._rng = labels, config, limits, rng
        self._optimizer = torch.optim.Adam([self.pixels], lr=config.learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, max(1, config.steps))
        self._steps = FiniteSteps(
            "refinement",
            error=SynthesisError,
            advice="try another --seed, or a smaller synthesis.refine.learning_rate in --config",
        )

    def step(self, teacher: nn.Module, flip: bool) -> bool:
        """Take an optimizer step. Return False if it was skipped because its loss or gradient is not finite."""
        config, pixels, rng = self._config, self.pixels, self._rng
        views = move_apart(pixels, config.shift, flip, rng)
        with tap_batchnorm(teacher) as tap, mixed_precision(pixels.device):
            logits = teacher(views).float()
        bns = bns_loss(tap, config.shallow_weight, config.deep_weight, relative=True)
        unsure = logits.softmax(1).gather(1, self._labels[:, None]).squeeze(1) < config.confident
        ce = (F.cross_entropy(logits, self._labels, reduction="none") * unsure).mean()
        variation = total_variation(pixels)
        spread = image_variance_loss(tap, config.spread_mean, config.spread_std)
        loss = config.bns_weight * bns + config.ce_weight * ce
        loss = loss + config.variation_weight * variation + config.spread_weight * spread
        if not self._steps.step(self._optimizer, loss):
            return False
        self._schedule.step()
        with torch.no_grad():
            pixels.clamp_(*self._limits)
        self.losses.append(dict(zip(_TERMS, torch.stack([bns, ce, spread, variation]).tolist(), strict=True)))
        return True

    def state_dict(self) -> State:
        """Return the state of the refinement of this batch."""
        return {
            "losses": self.losses,
            "pixels": self.pixels.detach(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self.losses = state["losses"]
        self.pixels.data.copy_(state["pixels"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._rng.set_state(state["rng"])
