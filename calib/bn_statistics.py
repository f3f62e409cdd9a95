"""Statistics of the inputs of BatchNorm layers, of batches and classes, and the moving centroids of the classes."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from calib.kernels import TappedNorm
from calib.support.errors import NoBatchNormError

_VARIANCE_FLOOR = 1e-8  # for a finite gradient of sqrt if a channel is constant


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each sample's channels over space.

    Attributes:
        mean: (N, C) float32.
        var: (N, C) float32, biased; zero if the layer has no spatial extent.
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor, samples: int | None = None) -> "Moments":
        """Compute the moments of x, (N, C, ...) float of any precision.

        Of more rows than `samples`, (N * L, C, ...), a sample has L in a row: tokens, or parts of its map.
        """
        if samples is not None and len(x) != samples:
            x = x.unflatten(0, (samples, -1)).transpose(1, 2).flatten(2)
        if x.dim() == 2:
            return cls(x.float(), torch.zeros_like(x, dtype=torch.float32))
        _, mean, var = TappedNorm.apply(x, None)
        return cls(mean, var)

    def pool(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (K, C) of K groups, by the samples' `shares` in each, (K, N) float."""
        mean = shares @ self.mean
        square = shares @ (self.var + self.mean.square())
        return mean, (square - mean.square()).clamp_min(_VARIANCE_FLOOR).sqrt()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (C,) of the whole batch."""
        var = self.var.mean(0) + variance_between(self.mean)
        return self.mean.mean(0), var.clamp_min(_VARIANCE_FLOOR).sqrt()

    def sample_std(self) -> Tensor:
        """Return the standard deviation (N, C) of each sample over space."""
        return self.var.clamp_min(_VARIANCE_FLOOR).sqrt()


def variance_between(values: Tensor) -> Tensor:
    """Return the biased variance (C,) of values (N, C) between samples; `Tensor.var` takes twice as long on columns."""
    return (values - values.mean(0)).square().mean(0)


def batchnorm_layers(teacher: nn.Module) -> list[_BatchNorm]:
    """Return the teacher's BatchNorm layers that hold running statistics, in order of registration.

    Raises:
        NoBatchNormError: there is none.
    """
    layers = [m for m in teacher.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        raise NoBatchNormError(
            f"{type(teacher).__name__} has no BatchNorm layer with running statistics; "
            "ClusterQ aligns synthetic images to them, so a model with BatchNorm is needed"
        )
    return layers


def never_trained(teacher: nn.Module) -> bool:
    """Return whether all BatchNorm statistics are those of new layers, mean 0 and variance 1."""
    return all(
        bool((cast(Tensor, layer.running_mean) == 0).all() and (cast(Tensor, layer.running_var) == 1).all())
        for layer in batchnorm_layers(teacher)
    )


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of training in a layer of `batchnorm_layers`."""
    return cast(Tensor, layer.running_mean), (cast(Tensor, layer.running_var) + layer.eps).sqrt()


@dataclass
class Tap:
    """Statistics of the teacher's BatchNorm inputs in one forward pass, one entry per call of a layer, in order."""

    layers: list[_BatchNorm] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)
    samples: int = 0

    @property
    def stds(self) -> list[Tensor]:
        """The layers' standard deviations (C,) of training."""
        return [running_statistics(layer)[1] for layer in self.layers]

    def from_depth(self, share: float) -> "Tap":
        """Return the tap without the first `share` of its layers, in [0, 1)."""
        first = int(share * len(self.layers))
        return Tap(self.layers[first:], self.moments[first:])

    def add(self, layer: _BatchNorm, moments: Moments) -> None:
        """Record one call of a layer."""
        self.layers.append(layer)
        self.moments.append(moments)

    def start(self, samples: int) -> None:
        """Remove the record of the last forward pass; the next one is of `samples` images."""
        self.layers.clear()
        self.moments.clear()
        self.samples = samples


class DistanceMeter:
    """How far the statistics of a set of images are from the running ones, to see whether these are the net's own.

    A channel's distance is sqrt(z^2 + r^2): z is the difference of the means over the running standard deviation, r the
    logarithm of the quotient of the standard deviations. A layer's is the median of its channels.
    """

    def __init__(self) -> None:
        self._layers: list[_BatchNorm] = []
        self._sums: list[Tensor] = []  # per layer, of values and of squares, each averaged over space, (2, C) float64
        self._samples = 0

    def add(self, tap: Tap) -> None:
        """Add a batch of images, by the record of its forward pass."""
        batch = [torch.stack([m.mean.sum(0), (m.var + m.mean.square()).sum(0)]).double() for m in tap.moments]
        self._sums = [a + b for a, b in zip(self._sums, batch, strict=True)] if self._sums else batch
        self._layers, self._samples = list(tap.layers), self._samples + tap.samples

    def distances(self) -> list[float]:
        """Return the distance of each layer, in order of execution; infinite if it is not finite."""
        distances = []
        for layer, sums in zip(self._layers, self._sums, strict=True):
            expected, std = running_statistics(layer)
            mean, square = sums / self._samples
            own_std = ((square - mean.square()).clamp_min(0) + layer.eps).sqrt()
            distance = torch.hypot((mean - expected) / std, (own_std / std).log()).median()
            distances.append(float(distance.nan_to_num(math.inf)))
        return distances


@contextmanager
def tap_batchnorm(teacher: nn.Module) -> Iterator[Tap]:
    """Record `Moments` of every BatchNorm input while the context is open.

    Each forward pass starts a new record. The moments have gradients to the images; the parameters of torch's own
    layers have none.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
    """
    tap = Tap()

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        tap.add(cast(_BatchNorm, layer), Moments.of(args[0], tap.samples))

    def normalize(layer: _BatchNorm, x: Tensor) -> Tensor:
        if x.dim() == 2 or len(x) != tap.samples:
            tap.add(layer, Moments.of(x, tap.samples))
            return type(layer).forward(layer, x)
        y, mean, var = TappedNorm.apply(x, layer)
        tap.add(layer, Moments(mean, var))
        return cast(Tensor, y)

    with ExitStack() as undo:
        undo.enter_context(teacher.register_forward_pre_hook(lambda _, args: tap.start(len(args[0]))))
        for layer in batchnorm_layers(teacher):
            if type(layer).forward is _BatchNorm.forward and not layer.training:
                vars(layer)["forward"] = partial(normalize, layer)  # only of this instance
                undo.callback(delattr, layer, "forward")
            else:
                undo.enter_context(layer.register_forward_pre_hook(record))
        yield tap


def class_averaging_matrix(labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes of the counted samples, and the samples' shares in them, for `Moments.pool`.

    Args:
        labels: (N,) int64.
        counted: (N,) bool.

    Returns:
        The classes that have a sample, (K,) int64 ascending, and shares (K, N) float32, whose rows sum to one.
    """
    present = labels[counted].unique()
    shares = ((labels.unsqueeze(0) == present.unsqueeze(1)) & counted.unsqueeze(0)).float()
    return present, shares / shares.sum(1, keepdim=True)


class Centroids:
    """Exponential moving averages of the classes' statistics at the semantic layers.

    Attributes:
        mean, std: one tensor per semantic layer, (classes, C) float32.
        seen: (classes,) bool, whether a class has had a correctly classified sample.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []
        self.seen = torch.zeros(classes, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, moments: list[Moments], present: Tensor, shares: Tensor, beta: float) -> None:
        """Move the centroids of the classes `present` towards this batch's statistics by beta, equation (5).

        The first statistics of a class are its centroid. `present` and `shares` are from `class_averaging_matrix`.
        """
        if not self.mean:
            self.mean = [moment.mean.new_zeros(len(self.seen), moment.mean.shape[1]) for moment in moments]
            self.std = [torch.zeros_like(mean) for mean in self.mean]
        step = torch.where(self.seen[present], beta, 1.0).unsqueeze(1)
        for layer, moment in enumerate(moments):
            mean, std = moment.pool(shares)
            self.mean[layer][present] = torch.lerp(self.mean[layer][present], mean, step)
            self.std[layer][present] = torch.lerp(self.std[layer][present], std, step)
        self.seen[present] = True


def within_class_diversity(features: Tensor, labels: Tensor) -> float:
    """Return the share of the variance of features (N, F) within classes, labels (N,) int64; 0 is a full collapse."""
    total = features.var(0, correction=0).sum()
    present, shares = class_averaging_matrix(labels, torch.ones_like(labels, dtype=torch.bool))
    centre = shares @ features
    within = (features - centre[torch.searchsorted(present, labels)]).square().mean(0).sum()
    return float(within / total.clamp_min(_VARIANCE_FLOOR))
