"""Refinement of the generator's images, pixel by pixel, against the teacher's BatchNorm statistics."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from calib.bn_statistics import count_executed, tap_batchnorm
from calib.losses import bns_loss, image_variance_loss, total_variation
from calib.recovery import Recovery
from calib.support.amp import mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress
from calib.training import History

_TERMS = ("bns", "ce", "spread", "variation")
_SHARED_NOISE = 0.8  # of the noise's variance
_GOOD_EVERY = 10  # steps, between the states that a loss which is not finite goes back to


class RefineConfig(StageConfig):
    """How images are refined. `steps = 0` leaves them as the generator made them.

    Attributes:
        steps: optimizer steps a batch, Adam with cosine decay from `learning_rate`.
        batch_size: images that share one set of batch statistics.
        noise: share of noise blended into the generator's images at the start. Its power falls with frequency as
            that of photographs does, so that images start with layouts of their own.
        bns_weight: weight of L_BNS (9), in channel deviations; its layers weigh `shallow_weight` to `deep_weight`,
            linearly by depth: early statistics only loosely bind an image, late ones do.
        ce_weight: weight of L_CE (8), for images whose class the teacher gives less than `confident`.
        variation_weight: weight of the total variation.
        spread_weight: weight of the spread between images, `calib.losses.image_variance_loss`.
        spread_mean, spread_std: the least variance between images of a channel's mean and of its deviation, relative
            to the variance in the BatchNorm buffers.
        shift: images are shifted by up to this many pixels between steps, so that no pixel is fitted alone.
    """

    steps: int = Field(60, ge=0)
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


def shifted(images: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """Images (N, C, H, W) moved by whole pixels, the border replicated, and mirrored left to right if `flip`."""
    reach = max(abs(down), abs(right))
    if reach:
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        height, width = images.shape[-2:]
        images = padded[..., reach - down : reach - down + height, reach - right : reach - right + width]
    return images.flip(-1) if flip else images


def natural_noise(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Gaussian noise (N, C, H, W) float32 of unit variance whose amplitude falls as 1/f, as that of photographs.

    Field, Relations between the statistics of natural images and the response properties of cortical cells, JOSA A
    1987. Channels share most of it, as those of a photograph do.
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
    """Whether mirrored images keep their class: true for photographs, false for digits and letters.

    Asked of the teacher, on those of the images (N, C, H, W) that it gives their labels (N,). Synthetic images are
    less robust than photographs: half of them must keep their class and twice as many as upside down, or four fifths.
    """
    right = mirrored = upset = 0
    for part, own in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        correct = teacher(part).argmax(1) == own
        right += int(correct.sum())
        mirrored += int((correct & (teacher(part.flip(-1)).argmax(1) == own)).sum())
        upset += int((correct & (teacher(part.flip(-2)).argmax(1) == own)).sum())
    return right > 0 and (mirrored >= 0.8 * right or mirrored >= max(0.5 * right, 2 * upset))


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
    """Optimize images directly, a batch at a time.

    Args:
        teacher: frozen, in eval mode, on the images' device.
        images: (N, C, H, W) float32, normalized.
        labels: (N,) int64.
        config: how to refine.
        limits: the normalized values of black and of white, each (1, C, 1, 1).
        flip: mirror images at random between steps.
        rng: source of all randomness.
        progress: shows how far it is.
        checkpoint: keeps what is reached.

    Returns:
        The refined images, of half precision's values, and each loss term by step, averaged over batches.

    Raises:
        SynthesisError: the loss of a batch is not finite, and stays so from its last good state and at smaller
            learning rates.
    """
    count = count_executed(teacher, images)
    span = config.deep_weight - config.shallow_weight
    weights = [config.shallow_weight + span * i / max(1, count - 1) for i in range(count)]
    history: History = {name: [0.0] * config.steps for name in _TERMS}
    parts = list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))
    refined: list[Tensor] = []
    kept = checkpoint.load("refine")
    if kept is not None:
        refined, history = kept["refined"], kept["history"]
    with progress.task("Refinement", len(parts) * config.steps) as advance:
        if refined:
            advance(len(refined) * config.steps)
        for part, own in parts[len(refined) :]:
            batch = _Batch(part, config, limits, rng)
            if kept is not None:
                batch.load_state_dict(kept["batch"])
                rng.set_state(kept["rng"])
                kept = None
                advance(batch.done)
            while (step := batch.done) < config.steps:
                figures = batch.step(teacher, own, weights, flip)
                advance(batch.done - step, **figures)
                checkpoint.save("refine", partial(_reached, refined, history, batch, rng))
            refined.append(batch.pixels.detach().half().cpu())
            for step, figures in enumerate(batch.losses):
                for name, value in figures.items():
                    history[name][step] += value / len(parts)
    return torch.cat(refined).to(images.device).float(), history


def _reached(refined: list[Tensor], history: History, batch: "_Batch", rng: torch.Generator) -> State:
    return {"refined": refined, "history": history, "batch": batch.state_dict(), "rng": rng.get_state()}


class _Batch:
    """Images that are refined together: they share one set of batch statistics.

    Attributes:
        pixels: (N, C, H, W) float32, normalized.
        losses: the value of each loss term by step.
    """

    def __init__(
        self, images: Tensor, config: RefineConfig, limits: tuple[Tensor, Tensor], rng: torch.Generator
    ) -> None:
        noise = natural_noise(images.shape, rng).to(images.device)
        self.pixels = nn.Parameter(torch.lerp(images, noise, config.noise).clamp(*limits))
        self._module = nn.ParameterList([self.pixels])
        self._config, self._limits, self._rng = config, limits, rng
        self._optimizer = torch.optim.Adam(self._module.parameters(), lr=config.learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, max(1, config.steps))
        self._recovery = Recovery(
            self._module,
            self._optimizer,
            "refinement",
            error=SynthesisError,
            advice="try another --seed, or a smaller synthesis.refine.learning_rate in --config",
        )
        self.losses: list[dict[str, float]] = []
        self._good = self.done, self._schedule.state_dict()

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def step(self, teacher: nn.Module, labels: Tensor, weights: list[float], flip: bool) -> dict[str, float]:
        """One optimizer step; gives the value of each loss term.

        Where the loss is not finite, the steps since the last good state are taken back, to be done with smaller ones.
        """
        config, pixels = self._config, self.pixels
        down, right, mirror = _draw_move(config.shift, self._rng)
        with tap_batchnorm(teacher) as tap, mixed_precision(pixels.device):
            logits = teacher(shifted(pixels, down, right, flip and mirror)).float()
        bns = bns_loss(tap, weights, relative=True)
        unsure = logits.softmax(1).gather(1, labels[:, None]).squeeze(1) < config.confident
        ce = (F.cross_entropy(logits, labels, reduction="none") * unsure).mean()
        loss = config.bns_weight * bns + config.ce_weight * ce
        variation = total_variation(pixels)
        loss = loss + config.variation_weight * variation
        spread = image_variance_loss(tap, config.spread_mean, config.spread_std)
        loss = loss + config.spread_weight * spread
        value, *figures = torch.stack([loss, bns, ce, spread, variation]).tolist()
        terms = dict(zip(_TERMS, figures, strict=True))
        if self._recovery.went_back(value):
            done, schedule = self._good
            del self.losses[done:]
            self._schedule.load_state_dict(schedule)
        else:
            if self.done % _GOOD_EVERY == 0:
                self._recovery.save()
                self._good = self.done, self._schedule.state_dict()
            self.losses.append(terms)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            with torch.no_grad():
                pixels.clamp_(*self._limits)
        return terms

    def state_dict(self) -> State:
        """All that its steps go on from."""
        return {
            "losses": self.losses,
            "pixels": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "recovery": self._recovery.state_dict(),
            "good": self._good,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave."""
        self.losses = state["losses"]
        self._module.load_state_dict(state["pixels"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._recovery.load_state_dict(state["recovery"])
        self._good = state["good"]


def _draw_move(shift: int, rng: torch.Generator) -> tuple[int, int, bool]:
    draws = torch.randint(-shift, shift + 1, (2,), generator=rng, device=rng.device).tolist()
    mirror = bool(torch.randint(2, (), generator=rng, device=rng.device))
    return int(draws[0]), int(draws[1]), mirror
