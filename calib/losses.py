"""The generator's loss terms, by the equations of ClusterQ (arXiv 2205.00179).

Every squared norm is a mean over channels: a weight then means the same for a layer of 16 channels and for one of
2,048. For the same reason sums over classes and samples are means.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.bn_statistics import Centroids, Moments, Tap, running_statistics, variance_between

_CACHED = 1 << 15  # pixels whose total variation is taken together on a CPU: what they need stays in its cache


def _distance(own: Tensor, target: Tensor, spread: Tensor | None) -> Tensor:
    """Mean squared distance of statistics (..., C), in channel deviations `spread` (C,) where they are given."""
    difference = own - target
    return (difference if spread is None else difference / spread).square().mean()


def bns_loss(tap: Tap, weights: Sequence[float] | None = None, *, relative: bool = False) -> Tensor:
    """Distance of the batch's statistics from the BatchNorm buffers.  # (9)

    Args:
        tap: the teacher's last forward pass.
        weights: one a BatchNorm layer in order of execution; all 1 when None.
        relative: measure each channel in its own deviation. The deviations of a model's channels differ by factors
            of ten and more, depthwise layers' above all, and absolute distances see the widest ones alone.
    """
    total = torch.zeros((), device=tap.moments[0].mean.device)
    for index, (layer, own) in enumerate(zip(tap.layers, tap.moments, strict=True)):
        mean, std = own.batch()
        target_mean, target_std = running_statistics(layer)
        spread = target_std if relative else None
        distance = _distance(mean, target_mean, spread) + _distance(std, target_std, spread)
        total = total + distance * (1.0 if weights is None else weights[index])
    return total


def sfda_loss(
    moments: Sequence[Moments],
    centroids: Centroids,
    present: Tensor,
    shares: Tensor,
    spreads: Sequence[Tensor] | None = None,
) -> Tensor:
    """Semantic feature distribution alignment: distance of class statistics from class centroids.  # (4)

    Args:
        moments: of the semantic layers.
        centroids: of the same layers.
        present, shares: from `calib.bn_statistics.class_averaging_matrix`, of correctly classified samples.
        spreads: the channels' deviations (C,), one a semantic layer, to measure distances in; absolute without.
    """
    total = torch.zeros((), device=present.device)
    for layer, own in enumerate(moments):
        mean, std = own.pooled(shares)
        spread = None if spreads is None else spreads[layer]
        total = total + _distance(mean, centroids.mean[layer][present], spread)
        total = total + _distance(std, centroids.std[layer][present], spread)
    return total


def icv_loss(
    statistics: Sequence[tuple[Tensor, Tensor]],
    centroids: Centroids,
    owners: Tensor,
    spreads: Sequence[Tensor],
    noise: Sequence[tuple[Tensor, Tensor]],
    lambda_mean: float,
    lambda_std: float,
    *,
    relative: bool = False,
) -> Tensor:
    """Intra-class variance: distance of statistics from a noisy centroid of their class.  # (6)

    The targets are draws from N(mu_C, lambda_mean) and N(sigma_C, lambda_std), where the noise is relative to each
    channel's deviation, so that it fits every layer's scale. The deviation is the teacher's: a centroid's own grows
    with the noise that it scales, and takes the statistics away from the BatchNorm buffers.

    Args:
        statistics: a pair a semantic layer of means and deviations (R, C), of R classes or R samples.
        centroids: of the same layers.
        owners: (R,) int64, the class that each row belongs to.
        spreads: the channels' deviations (C,), one a semantic layer.
        noise: a pair a semantic layer of standard normal draws (R, C), for means and deviations.
        lambda_mean: noise of the means, in channel deviations.
        lambda_std: noise of the deviations, in channel deviations.
        relative: measure distances in channel deviations too.
    """
    total = torch.zeros((), device=owners.device)
    for layer, (own_mean, own_std) in enumerate(statistics):
        mean, std = centroids.mean[layer][owners], centroids.std[layer][owners]
        noise_mean, noise_std = noise[layer]
        spread = spreads[layer] if relative else None
        total = total + _distance(own_mean, mean + lambda_mean * spreads[layer] * noise_mean, spread)
        target_std = (std + lambda_std * spreads[layer] * noise_std).clamp_min(0)
        total = total + _distance(own_std, target_std, spread)
    return total


def image_variance_loss(tap: Tap, least_mean: float, least_std: float) -> Tensor:
    """How far images are too much alike: a hinge on the variance between them, at every BatchNorm layer.

    BatchNorm statistics bind a batch, not its images: (9) is met as well by images that all have the batch's mean
    and deviation, while each photograph has its own. This is the purpose of (6) in arXiv 2205.00179 at every depth.

    Args:
        tap: the teacher's last forward pass.
        least_mean, least_std: the variance between images of a channel's mean and of its deviation over space that
            costs nothing, relative to the variance in the BatchNorm buffers.

    Returns:
        The mean shortfall in shares of what is asked for, summed over both statistics and all layers, ().
    """
    total = torch.zeros((), device=tap.moments[0].mean.device)
    for layer, own in zip(tap.layers, tap.moments, strict=True):
        variance = running_statistics(layer)[1].square()
        total = total + F.relu(1 - variance_between(own.mean) / (least_mean * variance)).mean()
        # constant, without a gradient, where a layer has no spatial extent
        total = total + F.relu(1 - variance_between(own.sample_std()) / (least_std * variance)).mean()
    return total


class _TotalVariation(torch.autograd.Function):
    """As `total_variation`, with the gradient made beside the value, some images at a time.

    Left to autograd, slices and signs of whole batches took a fifth of a step of refinement on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        gradient, total = torch.zeros_like(images), images.new_zeros(())
        at_once = max(1, _CACHED // images[0].numel()) if images.device.type == "cpu" else len(images)
        for part, slope in zip(images.split(at_once), gradient.split(at_once), strict=True):
            for dim in (2, 3):
                steps = part.diff(dim=dim)
                count = max(1, steps.numel() // len(part) * len(images))
                total += steps.abs().sum() / count
                signs = steps.sign_().div_(count)
                slope.narrow(dim, 1, signs.shape[dim]).add_(signs)
                slope.narrow(dim, 0, signs.shape[dim]).sub_(signs)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return cast(Tensor, gradient * grads[0])


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of images (N, C, H, W), both directions summed, ()."""
    total: Tensor = _TotalVariation.apply(images)
    return total
