"""Autograd functions that make synthesis fast: large maps are bound by memory, so these read them less often."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

# parts of this size fit the cache of a CPU
_CACHED_VALUES = 1 << 18  # of maps, float32
_CACHED_PIXELS = 1 << 15  # of images, with the temporary values of their total variation


class TappedNorm(torch.autograd.Function):
    """`apply(x, layer)`: the output of a BatchNorm layer in eval mode and the moments of its input, with one gradient.

    x is (N, C, ...), float of any precision; the moments are its mean and biased variance over space, (N, C) float32.
    The output is None if the layer is. The layer's parameters have no gradient.

    The backward of autograd makes nine passes instead of four; without a layer, it takes 150 instead of 15 ms for
    (64, 8, 112, 112) on one core.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _BatchNorm | None) -> tuple[Tensor | None, Tensor, Tensor]:
        mean, var = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
        space = tuple(range(2, x.dim()))
        at_once = max(1, _CACHED_VALUES * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
        for part, part_mean, part_var in zip(x.split(at_once), mean.split(at_once), var.split(at_once), strict=True):
            exact = part.float()
            part_mean.copy_(exact.mean(space))
            # two plain means cost half of var_mean; the error is far below a BatchNorm's eps
            part_var.copy_(exact.square().mean(space) - part_mean.square()).clamp_min_(0)
        ctx.save_for_backward(x, mean)
        ctx.layer = layer
        if layer is None:
            return None, mean, var
        y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x, mean), layer = ctx.saved_tensors, ctx.layer
        grad_y, grad_mean, grad_var = grads
        count, ones = x[0, 0].numel(), [1] * (x.dim() - 2)
        slope = 2 / count * grad_var
        offset = grad_mean / count - slope * mean
        shape = (*mean.shape, *ones)
        grad = torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))
        if layer is not None:
            scale = 1 / (layer.running_var + layer.eps).sqrt()
            if layer.affine:
                scale = scale * layer.weight.detach()
            grad.addcmul_(grad_y, scale.view(-1, *ones).to(x.dtype))
        return grad, None


class _TotalVariation(torch.autograd.Function):
    """Computes the gradient with the value, in parts: by autograd it took a fifth of a refinement step on a CPU."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        gradient, total = torch.zeros_like(images), images.new_zeros(())
        at_once = max(1, _CACHED_PIXELS // images[0].numel()) if images.device.type == "cpu" else len(images)
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
    """Return the mean absolute difference of neighbouring pixels of images (N, C, H, W), both directions summed, ()."""
    total: Tensor = _TotalVariation.apply(images)
    return total
