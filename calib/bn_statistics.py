"""Statistics of the inputs of BatchNorm layers: of a batch, of its classes, and the classes' moving centroids."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from calib.support.errors import NoBatchNormError

_CACHED = 1 << 18  # values that a processor's cache holds in float32
_VARIANCE_FLOOR = 1e-8  # keeps the gradient of sqrt finite where a channel is constant


def _spatial_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) float32 of x (N, C, ...), float of any precision."""
    mean, var = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    space = tuple(range(2, x.dim()))
    at_once = max(1, _CACHED * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
    for part, first, second in zip(x.split(at_once), mean.split(at_once), var.split(at_once), strict=True):
        exact = part.float()
        first.copy_(exact.mean(space))
        # two plain means cost half of var_mean; what cancels is far below a BatchNorm's eps
        second.copy_(exact.square().mean(space) - first.square()).clamp_min_(0)
    return mean, var


def _slopes(x: Tensor, mean: Tensor, grads: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of x (N, C, ...) from those of its mean and variance (N, C), in one pass over x."""
    count = x[0, 0].numel()
    slope = 2 / count * grads[1]
    offset = grads[0] / count - slope * mean
    shape = (*mean.shape, *[1] * (x.dim() - 2))
    return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))


class _SpatialMoments(torch.autograd.Function):
    """Mean and biased variance (N, C) float32 of x (N, C, ...), with a gradient that passes over x only once.

    Left to autograd, the two means and the square take five passes backwards, and maps are bound by memory: a
    backward pass takes 15 instead of 150 ms for (64, 8, 112, 112) on one core.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _spatial_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return _slopes(x, mean, (grads[0], grads[1]))


class _TappedNorm(torch.autograd.Function):
    """What a frozen BatchNorm makes of x (N, C, ...), and the moments of x, with one gradient for all of it.

    A gradient each, and their sum, take nine passes over maps where this one takes four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _spatial_moments(x)
        y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
        ctx.save_for_backward(x, mean)
        ctx.layer = layer
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        layer: _BatchNorm = ctx.layer
        scale = 1 / running_statistics(layer)[1]
        if layer.affine:
            scale = scale * layer.weight.detach()
        grad = _slopes(x, mean, (grads[1], grads[2]))
        return grad.addcmul_(grads[0], scale.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)), None


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each sample's channels over space.

    Attributes:
        mean: (N, C) float32.
        var: (N, C) float32, biased; zero where the layer has no spatial extent.
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Moments of x, (N, C, ...) float of any precision."""
        if x.dim() == 2:
            return cls(x.float(), torch.zeros_like(x, dtype=torch.float32))
        mean, var = _SpatialMoments.apply(x)
        return cls(mean, var)

    def pooled(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (K, C) of K groups of samples.

        Args:
            weights: (K, N) float, each row the samples' shares in a group, summing to one.
        """
        mean = weights @ self.mean
        square = weights @ (self.var + self.mean.square())
        return mean, (square - mean.square()).clamp_min(_VARIANCE_FLOOR).sqrt()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the whole batch."""
        var = self.var.mean(0) + variance_between(self.mean)
        return self.mean.mean(0), var.clamp_min(_VARIANCE_FLOOR).sqrt()

    def sample_std(self) -> Tensor:
        """Standard deviation (N, C) of each sample over space."""
        return self.var.clamp_min(_VARIANCE_FLOOR).sqrt()


def variance_between(values: Tensor) -> Tensor:
    """Biased variance (C,) of values (N, C) between samples; `Tensor.var` takes twice as long over columns."""
    return (values - values.mean(0)).square().mean(0)


def batchnorm_layers(teacher: nn.Module) -> list[_BatchNorm]:
    """The teacher's BatchNorm layers that hold running statistics, in order of registration.

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


@dataclass
class Tap:
    """What a forward pass of the teacher left behind at its BatchNorm layers, in order of execution."""

    layers: list[_BatchNorm] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.layers.clear()
        self.moments.clear()


@contextmanager
def tap_batchnorm(teacher: nn.Module) -> Iterator[Tap]:
    """Record `Moments` of every BatchNorm input while the context is open.

    Each forward pass starts the record anew. The moments carry gradients to the images; parameters get none from layers
    whose forward is torch's.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
    """
    tap = Tap()

    def note(layer: _BatchNorm, moments: Moments) -> None:
        tap.layers.append(layer)
        tap.moments.append(moments)

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(layer, _BatchNorm):
            note(layer, Moments.of(args[0]))

    def normalize(layer: _BatchNorm, x: Tensor) -> Tensor:
        if x.dim() == 2:
            record(layer, (x,))
            return type(layer).forward(layer, x)
        y, mean, var = _TappedNorm.apply(x, layer)
        note(layer, Moments(mean, var))
        result: Tensor = y
        return result

    with ExitStack() as undo:
        undo.enter_context(teacher.register_forward_pre_hook(lambda *_: tap.clear()))
        for layer in batchnorm_layers(teacher):
            if type(layer).forward is _BatchNorm.forward and not layer.training:
                vars(layer)["forward"] = partial(normalize, layer)  # of this instance alone
                undo.callback(delattr, layer, "forward")
            else:
                undo.enter_context(layer.register_forward_pre_hook(record))
        yield tap


@torch.no_grad()
def count_executed(teacher: nn.Module, images: Tensor) -> int:
    """How many BatchNorm inputs a forward pass of images (N, C, H, W) meets; a layer that is called twice has two.

    Raises:
        NoBatchNormError: the teacher has no BatchNorm statistics.
    """
    with tap_batchnorm(teacher) as tap:
        teacher(images[:1])
    return len(tap.layers)


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) that the layer saw in training."""
    if layer.running_mean is None or layer.running_var is None:
        raise NoBatchNormError(f"{layer} holds no running statistics")
    return layer.running_mean, (layer.running_var + layer.eps).sqrt()


def class_averaging_matrix(labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the kept samples in their classes.

    Args:
        labels: (N,) int64.
        keep: (N,) bool, False for samples that count nowhere.

    Returns:
        The classes that have a kept sample, (K,) int64 ascending, and the shares, (K, N) float32, rows summing
        to one, for `Moments.pooled`.
    """
    present = labels[keep].unique()
    member = (labels.unsqueeze(0) == present.unsqueeze(1)) & keep.unsqueeze(0)
    shares = member.float()
    return present, shares / shares.sum(1, keepdim=True)


class Centroids:
    """Exponential moving averages of the classes' statistics at the semantic layers.

    Attributes:
        mean, std: one tensor a semantic layer, (classes, C) float32.
        seen: (classes,) bool, True once a class has had a correctly classified sample.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []
        self.seen = torch.zeros(classes, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, moments: list[Moments], present: Tensor, shares: Tensor, beta: float) -> None:
        """Move the centroids of the classes `present` towards this batch's statistics, by beta.  # (5)

        A class that is seen for the first time takes the statistics as they are. `present` and `shares` come
        from `class_averaging_matrix`.
        """
        if not self.mean:
            rows = len(self.seen)
            self.mean = [m.mean.new_zeros(rows, m.mean.shape[1]) for m in moments]
            self.std = [m.mean.new_zeros(rows, m.mean.shape[1]) for m in moments]
        step = torch.where(self.seen[present], beta, 1.0).unsqueeze(1)
        for layer, own in enumerate(moments):
            mean, std = own.pooled(shares)
            self.mean[layer][present] = torch.lerp(self.mean[layer][present], mean, step)
            self.std[layer][present] = torch.lerp(self.std[layer][present], std, step)
        self.seen[present] = True


def within_class_diversity(features: Tensor, labels: Tensor) -> float:
    """Share of the features' variance that lies within classes, in [0, 1]; 0 is a full collapse of every class.

    Args:
        features: (N, F) float.
        labels: (N,) int64.
    """
    total = features.var(0, correction=0).sum()
    present, shares = class_averaging_matrix(labels, torch.ones_like(labels, dtype=torch.bool))
    centre = shares @ features
    own = centre[torch.searchsorted(present, labels)]
    within = (features - own).square().mean(0).sum()
    return float(within / total.clamp_min(_VARIANCE_FLOOR))
