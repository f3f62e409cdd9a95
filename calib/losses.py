"""The loss terms, by the equations of ClusterQ (arXiv 2205.00179).

Every squared norm is a mean over channels, so that weights do not depend on a layer's width. For the same reason sums
over classes and samples are means.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.bn_statistics import Centroids, Tap, running_statistics, variance_between


def _distance(values: Tensor, target: Tensor, std: Tensor | None) -> Tensor:
    """Return the mean squared distance of statistics (..., C), in channel deviations `std` (C,) if they are given."""
    difference = values - target
    return (difference if std is None else difference / std).square().mean()


def bns_loss(tap: Tap, first: float = 1.0, last: float = 1.0, *, relative: bool = False) -> Tensor:
    """Return the distance of the batch's statistics from the BatchNorm buffers, equation (9), ().

    Args:
        tap: the teacher's last forward pass.
        first, last: weights of the first and of the last BatchNorm layer, linear by depth in between.
        relative: measure each channel in its own deviation. Deviations of channels differ by factors of ten and more,
            above all in depthwise layers, and dominate absolute distances.
    """
    total = torch.zeros((), device=tap.moments[0].mean.device)
    for index, (layer, moment) in enumerate(zip(tap.layers, tap.moments, strict=True)):
        mean, std = moment.batch()
        target_mean, target_std = running_statistics(layer)
        unit = target_std if relative else None
        distance = _distance(mean, target_mean, unit) + _distance(std, target_std, unit)
        total = total + distance * (first + (last - first) * index / max(1, len(tap.layers) - 1))
    return total


def sfda_loss(tap: Tap, centroids: Centroids, present: Tensor, shares: Tensor, *, relative: bool = False) -> Tensor:
    """Return the semantic feature distribution alignment: class statistics to class centroids, equation (4), ().

    Args:
        tap: the semantic layers of the teacher's last forward pass.
        centroids: of the same layers.
        present, shares: from `class_averaging_matrix`, of correctly classified samples.
        relative: measure distances in channel deviations.
    """
    total = torch.zeros((), device=present.device)
    for index, (moment, layer_std) in enumerate(zip(tap.moments, tap.stds, strict=True)):
        mean, std = moment.pool(shares)
        unit = layer_std if relative else None
        total = total + _distance(mean, centroids.mean[index][present], unit)
        total = total + _distance(std, centroids.std[index][present], unit)
    return total


def icv_loss(
    statistics: Sequence[tuple[Tensor, Tensor]],
    centroids: Centroids,
    classes: Tensor,
    stds: Sequence[Tensor],
    noise: Sequence[tuple[Tensor, Tensor]],
    lambda_mean: float,
    lambda_std: float,
    *,
    relative: bool = False,
) -> Tensor:
    """Return the intra-class variance: statistics to noisy centroids of their class, equation (6), ().

    The targets are draws from N(mu_C, lambda_mean) and N(sigma_C, lambda_std), with noise relative to each channel's
    deviation in the teacher: that of a centroid would grow with the noise.

    Args:
        statistics: means and deviations (R, C) of R classes or R samples, one pair per semantic layer.
        centroids: of the same layers.
        classes: (R,) int64, the class of each row.
        stds: the channels' deviations (C,), one per semantic layer.
        noise: standard normal draws (R, C) for means and deviations, one pair per semantic layer.
        lambda_mean, lambda_std: noise of the means and of the deviations, in channel deviations.
        relative: measure distances in channel deviations too.
    """
    total = torch.zeros((), device=classes.device)
    for layer, ((mean, std), (noise_mean, noise_std)) in enumerate(zip(statistics, noise, strict=True)):
        unit = stds[layer] if relative else None
        target_mean = centroids.mean[layer][classes] + lambda_mean * stds[layer] * noise_mean
        total = total + _distance(mean, target_mean, unit)
        target_std = (centroids.std[layer][classes] + lambda_std * stds[layer] * noise_std).clamp_min(0)
        total = total + _distance(std, target_std, unit)
    return total


def image_variance_loss(tap: Tap, least_mean: float, least_std: float) -> Tensor:
    """Return a penalty on images that are too similar: a hinge on the variance between them, at every layer, ().

    BatchNorm statistics constrain a batch, not its images: (9) allows that all images have the batch's mean and
    deviation, unlike photographs. It has the purpose of (6) in arXiv 2205.00179 at every depth. The relative shortfalls
    are averaged over channels, and summed over both statistics and all layers.

    Args:
        tap: the teacher's last forward pass.
        least_mean, least_std: the required variance between images of a channel's mean and of its deviation over
            space, relative to the variance in the BatchNorm buffers.
    """
    total = torch.zeros((), device=tap.moments[0].mean.device)
    for moment, layer_std in zip(tap.moments, tap.stds, strict=True):
        variance = layer_std.square()
        total = total + F.relu(1 - variance_between(moment.mean) / (least_mean * variance)).mean()
        # constant, without a gradient, in a layer without spatial extent
        total = total + F.relu(1 - variance_between(moment.sample_std()) / (least_std * variance)).mean()
    return total
