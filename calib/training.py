"""Training of the generator against the teacher: ClusterQ (arXiv 2205.00179), equations (4) to (10)."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from calib.bn_statistics import Centroids, Tap, class_averaging_matrix, tap_batchnorm
from calib.generator import ClassSampler, Generator
from calib.losses import bns_loss, icv_loss, sfda_loss
from calib.support.amp import FiniteSteps, mixed_precision
from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.errors import SynthesisError
from calib.support.progress import SILENT, Progress

_DEVIATION_BATCHES = 4

History = dict[str, list[float]]
"""One value per step, for each loss term."""


class GeneratorConfig(StageConfig):
    """How the generator is trained. A weight of 0 switches its term off.

    Attributes:
        steps, warmup_steps: optimizer steps, and how many of them use only L_CE + a1 L_BNS (7).
        batch_size: images per step: `samples_per_class` of each of `batch_size / samples_per_class` classes.
        ce_weight, bns_weight, sfda_weight, icv_weight: 1, a1, a2, a3 of (10).
        ema_beta: beta of (5); with 0 the centroids are those of the warmed-up generator.
        lambda_mean, lambda_std: of (6), relative to the channel's deviation in the BatchNorm buffers.
        icv_noise: source of the noise of (6). `class`: one draw for the statistics of a class, as published; on average
            its gradient is that of (4). `latent`: one draw per sample, from its latent, so that the generator can learn
            it, as a mixture of deviations of the warmed-up generator's images, so that images can reach it.
        distance: of the statistics in (4), (6) and (9): `absolute`, as published, or `relative` to each channel's
            deviation in the BatchNorm buffers, so that large ones do not dominate.
        width: channels of the generator's largest map.
        largest: the largest side of the generator's maps, 0 for any; larger images are upsampled, as a generator at 224
            pixels would cost more than the teacher, and refinement is at the full size.
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
    def _require_steps_after_warmup(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected less than the {self.steps} steps")
        return self


@dataclass(frozen=True)
class _Batch:
    """A batch after the generator and the teacher."""

    labels: Tensor  # (N,) int64
    z: Tensor  # (N, latent) float32
    logits: Tensor  # of the teacher, (N, classes) float32
    correct: Tensor  # (N,) bool, whether the teacher predicts the label, with finite logits
    tap: Tap
    semantic: Tap  # of the semantic layers only


class GeneratorTrainer:
    """The generator, its optimizer and the class centroids; arguments are those of `calib.synthesis.synthesize`."""

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
        with torch.random.fork_rng(devices=[]):  # layers draw from the CPU's global generator
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
            shape = (config.latent, config.width, config.largest)
            self.generator = Generator(classes, size, mean, std, *shape).to(device)
        parameters = self.generator.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.5, 0.999), fused=True)
        self.centroids = Centroids(classes, device)
        self._sampler = ClassSampler(classes, rng)
        self._mixing = torch.empty(0, device=device)  # (latent, n): how a latent mixes n deviations
        self._deviations: list[tuple[Tensor, Tensor]] = []  # per layer (n, C): of means and of standard deviations
        self._steps = FiniteSteps(
            "the generator's training",
            error=SynthesisError,
            advice="try another --seed, or a smaller synthesis.generator.learning_rate in --config",
        )

    def state_dict(self) -> State:
        """Return the state of the training."""
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centroids": vars(self.centroids),
            "labels": self._sampler.queue,
            "mixing": self._mixing,
            "deviations": self._deviations,
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned, on any device."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        centroids = state["centroids"]
        self.centroids.seen = centroids["seen"].to(self.device)
        self.centroids.mean, self.centroids.std = ([v.to(self.device) for v in centroids[k]] for k in ("mean", "std"))
        self._sampler.queue = state["labels"].to(self._rng.device)
        self._mixing = state["mixing"].to(self.device)
        self._deviations = [(mean.to(self.device), std.to(self.device)) for mean, std in state["deviations"]]
        self._rng.set_state(state["rng"])

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._rng, device=self._rng.device).to(self.device)

    def latents(self, count: int) -> Tensor:
        """Draw standard normal z, (count, latent) float32."""
        return self._normal(count, self.config.latent)

    def batch_labels(self) -> Tensor:
        """Draw labels of one batch, (batch_size,) int64: a group for each class, classes in turn."""
        per_class = min(self.config.samples_per_class, self.config.batch_size)
        groups = math.ceil(self.config.batch_size / per_class)
        labels = self._sampler.draw(groups).repeat_interleave(per_class)
        return labels[: self.config.batch_size].to(self.device)

    def _forward(self) -> _Batch:
        labels = self.batch_labels()
        z = self.latents(len(labels))
        with tap_batchnorm(self.teacher) as tap, mixed_precision(self.device):
            logits = self.teacher(self.generator(z, labels))
        logits = logits.float()
        correct = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        return _Batch(labels, z, logits, correct, tap, tap.from_depth(self.config.semantic_start))

    def step(self, *, warmup: bool) -> dict[str, float]:
        """Take one optimizer step. Return the value of each loss term in use.

        Raises:
            NoBatchNormError: the teacher has no BatchNorm statistics.
            SynthesisError: the loss or its gradient is not finite three times in a row.
        """
        config, batch = self.config, self._forward()
        relative = config.distance == "relative"
        losses = {
            "ce": (config.ce_weight, F.cross_entropy(batch.logits, batch.labels)),  # (8)
            "bns": (config.bns_weight, bns_loss(batch.tap, relative=relative)),
        }
        if not warmup and bool(batch.correct.any()):
            present, shares = class_averaging_matrix(batch.labels, batch.correct)
            self.centroids.update(batch.semantic.moments, present, shares, config.ema_beta)
            sfda = sfda_loss(batch.semantic, self.centroids, present, shares, relative=relative)
            losses["sfda"] = (config.sfda_weight, sfda)
            if config.icv_weight and (config.icv_noise == "class" or self._deviations):
                losses["icv"] = (config.icv_weight, self._icv(batch, present, shares))
        total = torch.stack([weight * value for weight, value in losses.values()]).sum()  # (10)
        self._steps.step(self.optimizer, total)
        values = torch.stack([value.detach() for _, value in losses.values()]).tolist()
        return dict(zip(losses, values, strict=True))

    def _icv(self, batch: _Batch, present: Tensor, shares: Tensor) -> Tensor:
        config, correct = self.config, batch.correct
        if config.icv_noise == "class":
            statistics = [layer.pool(shares) for layer in batch.semantic.moments]
            noise = [(self._normal(*mean.shape), self._normal(*mean.shape)) for mean, _ in statistics]
            classes = present
        else:
            statistics = [(layer.mean[correct], layer.sample_std()[correct]) for layer in batch.semantic.moments]
            mixture = batch.z[correct] @ self._mixing
            noise = [(mixture @ mean, mixture @ std) for mean, std in self._deviations]
            classes = batch.labels[correct]
        relative = config.distance == "relative"
        weights = (config.lambda_mean, config.lambda_std)
        return icv_loss(statistics, self.centroids, classes, batch.semantic.stds, noise, *weights, relative=relative)

    @torch.no_grad()
    def initialize_centroids(self) -> None:
        """Set the first centroids of classes and the deviations of their images, from the warmed-up generator.

        There are at most as many batches as training has steps. If that is too few (a thousand classes on a CPU), the
        other centroids are set at the first correctly classified image. Deviations are those that the noise of (6)
        mixes.
        """
        batches = math.ceil(len(self.centroids.seen) * self.config.samples_per_class / self.config.batch_size)
        rows: list[list[list[Tensor]]] = []  # by batch, layer and statistic (n, C)
        for _ in range(max(min(batches, self.config.steps), _DEVIATION_BATCHES)):
            batch = self._forward()
            if not bool(batch.correct.any()):
                continue
            present, shares = class_averaging_matrix(batch.labels, batch.correct)
            self.centroids.update(batch.semantic.moments, present, shares, self.config.ema_beta)
            if len(rows) < _DEVIATION_BATCHES:
                index = torch.searchsorted(present, batch.labels[batch.correct])
                statistics = [(layer.mean, layer.sample_std()) for layer in batch.semantic.moments]
                rows.append([[v[batch.correct] - (shares @ v)[index] for v in values] for values in statistics])
        if not rows:
            return
        self._deviations = []
        for layer, layer_std in enumerate(batch.semantic.stds):
            mean, std = (torch.cat([row[layer][part] for row in rows]) / layer_std for part in (0, 1))
            self._deviations.append((_normalize(mean), _normalize(std)))
        latent, count = self.config.latent, len(self._deviations[0][0])
        self._mixing = self._normal(latent, count) / math.sqrt(latent * count)

    def train(self, progress: Progress = SILENT, checkpoint: Checkpoint = NOWHERE) -> History:
        """Run the steps after those of the checkpoint. Return each loss term by step, from the first step with it."""
        config = self.config
        history: History = {"ce": [], "bns": [], "sfda": [], "icv": []}
        if (state := checkpoint.load("generator")) is not None:
            history = state["history"]
            self.load_state_dict(state)
            del state  # its memory
        done = len(history["ce"])
        with progress.task("Generator", config.steps) as advance:
            advance(done)
            for index in range(done, config.steps):
                if index == config.warmup_steps:
                    self.initialize_centroids()
                losses = self.step(warmup=index < config.warmup_steps)
                for name, values in history.items():
                    if name in losses:
                        values.append(losses[name])
                    elif values:
                        values.append(values[-1])  # the batch has no correctly classified image
                advance(1, **losses)
                last = index == config.steps - 1
                checkpoint.save("generator", lambda: {**self.state_dict(), "history": history}, at_once=last)
        return history

    @torch.no_grad()
    def sample(self, labels: Tensor) -> Tensor:
        """Draw images (N, C, H, W) float32, normalized, of labels (N,) int64, in batches of `batch_size`."""
        self.generator.eval()
        batches = labels.to(self.device).split(self.config.batch_size)
        images = [self.generator(self.latents(len(batch)), batch) for batch in batches]
        self.generator.train()
        return torch.cat(images)


def _normalize(deviations: Tensor) -> Tensor:
    """Scale deviations to a mean square of one."""
    return deviations / deviations.square().mean().sqrt().clamp_min(1e-6)
