"""Training of the generator against the teacher: ClusterQ (arXiv 2205.00179), equations (4) to (10)."""

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from calib.bn_statistics import (
    Centroids,
    Moments,
    Tap,
    class_averaging_matrix,
    count_executed,
    running_statistics,
    tap_batchnorm,
)
from calib.generator import Generator
from calib.labels import ClassSampler
from calib.losses import bns_loss, icv_loss, sfda_loss
from calib.recovery import Recovery
from calib.support.amp import mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress

_DEVIATION_BATCHES = 4
_GOOD_EVERY = 25  # steps, between the states that a loss which is not finite goes back to

History = dict[str, list[float]]
"""A value a step for each loss term."""


class GeneratorConfig(StageConfig):
    """How the generator is trained. A weight of 0 switches its term off.

    Attributes:
        steps, warmup_steps: optimizer steps in all, and how many of them use L_CE + a1 L_BNS alone.  # (7)
        batch_size: images a step: `samples_per_class` of each of `batch_size / samples_per_class` classes.
        ce_weight, bns_weight, sfda_weight, icv_weight: 1, a1, a2, a3 of (10).
        ema_beta: beta of (5); 0 keeps the centroids as the warmed-up generator set them.
        lambda_mean, lambda_std: of (6), relative to the channel's deviation in the BatchNorm buffers.
        icv_noise: what carries the noise of (6). `class`: class statistics aim at one fresh draw, as the equation
            is written; its gradient is, on average, that of (4). `latent`: each sample aims at a draw of its own,
            made from its latent, so that a sample can tell where it should go; the draw mixes the deviations of the
            warmed-up generator's images, so that it lies where images can go.
        distance: of the statistics in (4), (6) and (9): `absolute`, as the equations are written, or `relative` to
            each channel's deviation in the BatchNorm buffers, so that a model's wide channels do not drown the others.
        width: channels of the generator's largest map.
        largest: the largest side that the generator draws at, 0 for any: larger images are enlarged from it bilinearly,
            as drawing at 224 pixels costs more than the teacher does, and refinement works at the full size.
        semantic_start: the first semantic layer, as a share of the BatchNorm layers.
    """

    steps: int = Field(100, ge=1)
    warmup_steps: int = Field(25, ge=1)
    batch_size: int = Field(64, ge=2)
    samples_per_class: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    ce_weight: float = Field(1.0, ge=0)
    bns_weight: float = Field(0.1, ge=0)
    sfda_weight: float = Field(0.9, ge=0)
    icv_weight: float = Field(0.6, ge=0)
    ema_beta: float = Field(0.2, ge=0, le=1)
    lambda_mean: float = Field(1.0, ge=0)
    lambda_std: float = Field(0.5, ge=0)
    icv_noise: Literal["class", "latent"] = "latent"
    distance: Literal["absolute", "relative"] = "relative"
    semantic_start: float = Field(0.5, ge=0, lt=1)
    latent: int = Field(128, ge=1)
    width: int = Field(32, ge=1)
    largest: int = Field(64, ge=0)

    @model_validator(mode="after")
    def _leaves_steps_for_the_method(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected less than the {self.steps} steps")
        return self


def seeded(rng: torch.Generator) -> int:
    """A seed drawn from `rng`, for what can be seeded only globally."""
    return int(torch.randint(2**62, (), generator=rng, device=rng.device))


class GeneratorTrainer:
    """The generator, its optimizer and the class centroids, moved on a step at a time.

    Args:
        teacher: frozen, in eval mode, on `device`.
        classes: number of classes.
        size: (channels, height, width) of an image.
        mean, std: the teacher's normalization.
        config: how to train.
        device: where to train.
        rng: source of all randomness.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        classes: int,
        size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        config: GeneratorConfig,
        device: torch.device,
        rng: torch.Generator,
    ) -> None:
        self.teacher, self.config, self.device, self._rng = teacher, config, device, rng
        blank = torch.zeros(1, *size, device=device)
        self.first_semantic = int(config.semantic_start * count_executed(teacher, blank))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeded(rng))  # that of the CPU alone
            shape = (config.latent, config.width, config.largest)
            self.generator = Generator(classes, size, mean, std, *shape).to(device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), fused=True
        )
        self.centroids = Centroids(classes, device)
        self._sampler = ClassSampler(classes, rng)
        self._mixing = torch.empty(0, device=device)  # (latent, n): how a latent mixes n deviations
        self._deviations: list[tuple[Tensor, Tensor]] = []  # a layer: (n, C) of means and of deviations
        self._steps = 0  # that were taken, not taken back
        self._recovery = Recovery(
            self.generator,
            self.optimizer,
            "the generator's training",
            error=SynthesisError,
            advice="try another --seed, or a smaller synthesis.generator.learning_rate in --config",
        )

    def state_dict(self) -> State:
        """All that training goes on from."""
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "recovery": self._recovery.state_dict(),
            "centroids": vars(self.centroids),
            "labels": self._sampler.waiting,
            "mixing": self._mixing,
            "deviations": self._deviations,
            "steps": self._steps,
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave, on any device."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._recovery.load_state_dict(state["recovery"])
        own = state["centroids"]
        self.centroids.seen = own["seen"].to(self.device)
        self.centroids.mean, self.centroids.std = ([v.to(self.device) for v in own[k]] for k in ("mean", "std"))
        self._sampler.waiting = state["labels"].to(self._rng.device)
        self._mixing = state["mixing"].to(self.device)
        self._deviations = [(mean.to(self.device), std.to(self.device)) for mean, std in state["deviations"]]
        self._steps = state["steps"]
        self._rng.set_state(state["rng"])

    def latents(self, count: int) -> Tensor:
        """Standard normal z, (count, latent) float32."""
        shape = (count, self.config.latent)
        return torch.randn(shape, generator=self._rng, device=self._rng.device).to(self.device)

    def batch_labels(self) -> Tensor:
        """Labels of one batch, (batch_size,) int64: whole groups of one class, classes in even turns."""
        per_class = min(self.config.samples_per_class, self.config.batch_size)
        groups = math.ceil(self.config.batch_size / per_class)
        labels = self._sampler.draw(groups).repeat_interleave(per_class)
        return labels[: self.config.batch_size].to(self.device)

    def step(self, *, warmup: bool) -> dict[str, float]:
        """One optimizer step; gives the value of each loss term that took part.

        Raises:
            SynthesisError: the loss is not finite, and stays so from the last good state and at smaller learning rates.
        """
        config, labels = self.config, self.batch_labels()
        z = self.latents(len(labels))
        with tap_batchnorm(self.teacher) as tap, mixed_precision(self.device):
            logits = self.teacher(self.generator(z, labels))
        logits = logits.float()
        losses = {
            "ce": (config.ce_weight, F.cross_entropy(logits, labels)),  # (8)
            "bns": (config.bns_weight, bns_loss(tap, relative=config.distance == "relative")),
        }
        keep = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        if not warmup and bool(keep.any()):
            moments = tap.moments[self.first_semantic :]
            present, shares = class_averaging_matrix(labels, keep)
            self.centroids.update(moments, present, shares, config.ema_beta)  # (5)
            spreads = [running_statistics(layer)[1] for layer in tap.layers[self.first_semantic :]]
            units = spreads if config.distance == "relative" else None
            losses["sfda"] = (config.sfda_weight, sfda_loss(moments, self.centroids, present, shares, units))
            if config.icv_weight and (config.icv_noise == "class" or self._deviations):
                losses["icv"] = (config.icv_weight, self._icv(tap, spreads, z, labels, keep, present, shares))
        total = torch.stack([weight * value for weight, value in losses.values()]).sum()  # (10)
        *values, loss = torch.stack([*(value.detach() for _, value in losses.values()), total.detach()]).tolist()
        if not self._recovery.went_back(loss):
            if self._steps % _GOOD_EVERY == 0:
                self._recovery.save()
            self._steps += 1
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.optimizer.step()
        return dict(zip(losses, values, strict=True))

    def _icv(
        self,
        tap: Tap,
        spreads: list[Tensor],
        z: Tensor,
        labels: Tensor,
        keep: Tensor,
        present: Tensor,
        shares: Tensor,
    ) -> Tensor:
        config, moments = self.config, tap.moments[self.first_semantic :]
        if config.icv_noise == "class":
            statistics = [own.pooled(shares) for own in moments]
            noise = [(self._normal(mean), self._normal(mean)) for mean, _ in statistics]
            owners = present
        else:
            statistics = [(own.mean[keep], own.sample_std()[keep]) for own in moments]
            mixture = z[keep] @ self._mixing
            noise = [(mixture @ mean, mixture @ std) for mean, std in self._deviations]
            owners = labels[keep]
        relative = config.distance == "relative"
        weights = (config.lambda_mean, config.lambda_std)
        return icv_loss(statistics, self.centroids, owners, spreads, noise, *weights, relative=relative)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._rng, device=self._rng.device).to(like.device)

    @torch.no_grad()
    def initialize_centroids(self) -> None:
        """Let every class have its first centroid, from batches of the warmed-up generator.

        It takes no more batches than training has steps: where these are too few (a thousand classes on a CPU), the
        classes that are left have theirs from the step that first makes a right image of them. The deviations of the
        images from their class, which the noise of (6) mixes, are taken here too.
        """
        whole = math.ceil(len(self.centroids.seen) * self.config.samples_per_class / self.config.batch_size)
        rounds = min(whole, self.config.steps)
        rows: list[list[tuple[Tensor, Tensor]]] = []
        for _ in range(max(rounds, _DEVIATION_BATCHES)):
            labels = self.batch_labels()
            with tap_batchnorm(self.teacher) as tap, mixed_precision(self.device):
                logits = self.teacher(self.generator(self.latents(len(labels)), labels))
            keep = (logits.argmax(1) == labels) & logits.isfinite().all(1)
            if not bool(keep.any()):
                continue
            moments = tap.moments[self.first_semantic :]
            present, shares = class_averaging_matrix(labels, keep)
            self.centroids.update(moments, present, shares, self.config.ema_beta)
            if len(rows) < _DEVIATION_BATCHES:
                own = torch.searchsorted(present, labels[keep])
                rows.append([_deviations(m, shares, own, keep) for m in moments])
        if rows:
            self._set_deviations(rows, tap)

    def _set_deviations(self, rows: list[list[tuple[Tensor, Tensor]]], tap: Tap) -> None:
        """Scale the deviations to one channel deviation on average, and draw how latents mix them."""
        self._deviations = []
        for index, layer in enumerate(tap.layers[self.first_semantic :]):
            spread = running_statistics(layer)[1]
            means, stds = (torch.cat([row[index][part] for row in rows]) / spread for part in (0, 1))
            self._deviations.append((_unit(means), _unit(stds)))
        count = len(self._deviations[0][0])
        mixing = self._normal(self._mixing.new_empty(self.config.latent, count))
        self._mixing = mixing / math.sqrt(self.config.latent * count)

    def train(self, progress: Progress = SILENT, checkpoint: Checkpoint = NOWHERE) -> History:
        """Run all steps that a checkpoint has not; gives each loss term by step, from the first that has it."""
        config = self.config
        history: History = {"ce": [], "bns": [], "sfda": [], "icv": []}
        if (kept := checkpoint.load("generator")) is not None:
            history = kept["history"]
            self.load_state_dict(kept)
            del kept
        done = len(history["ce"])
        with progress.task("Generator", config.steps) as advance:
            if done:
                advance(done)
            for index in range(done, config.steps):
                if index == config.warmup_steps:
                    self.initialize_centroids()
                losses = self.step(warmup=index < config.warmup_steps)
                for name, values in history.items():
                    if name in losses:
                        values.append(losses[name])
                    elif values:
                        values.append(values[-1])  # of a batch without an image of its class
                advance(1, **losses)
                checkpoint.save("generator", lambda: {**self.state_dict(), "history": history})
        return history

    @torch.no_grad()
    def sample(self, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) float32, normalized, of labels (N,) int64, in batches of `batch_size`."""
        self.generator.eval()
        images = [
            self.generator(self.latents(len(part)), part.to(self.device))
            for part in labels.split(self.config.batch_size)
        ]
        self.generator.train()
        return torch.cat(images)


def _unit(deviations: Tensor) -> Tensor:
    """Deviations scaled to a mean square of one."""
    return deviations / deviations.square().mean().sqrt().clamp_min(1e-6)


def _deviations(own: Moments, shares: Tensor, owners: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """How far the kept samples' means and deviations (n, C) lie from their class's average of them."""
    std = own.sample_std()
    return own.mean[keep] - (shares @ own.mean)[owners], std[keep] - (shares @ std)[owners]
