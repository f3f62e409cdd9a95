"""The class-conditional generator, and the sampler of its classes."""

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SEED_SIZE = 8  # the smallest feature map's side is at most this
_MAX_WIDTH = 256


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm with a scale and shift per class; x (N, C, H, W), labels (N,) int64."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Embedding(classes, 2 * channels)
        with torch.no_grad():
            self.affine.weight[:, :channels].fill_(1)
            self.affine.weight[:, channels:].zero_()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = self.affine(labels)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), scale)


class Generator(nn.Module):
    """G(z | y): latents and classes to images.

    A seed map of at most 8x8 is doubled up to the image's size or `largest`, from which larger images are upsampled
    bilinearly. Each convolution has a class-conditional BatchNorm. Pixels are in [0, 1] before the teacher's
    normalization, as in a photograph.

    Args:
        size: (channels, height, width) of an image.
        mean, std: the teacher's normalization, one value per channel.
        latent: length of z.
        width: channels of the largest map; each smaller one has twice as many, up to 256.
        largest: the largest side of a map; 0 is any.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: int,
        size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        latent: int,
        width: int,
        largest: int,
    ) -> None:
        super().__init__()
        channels, *self.size = size
        halvings = max(0, math.ceil(math.log2(max(self.size) / largest))) if largest else 0
        rows, columns = (math.ceil(side / 2**halvings) for side in self.size)
        doublings = max(0, math.ceil(math.log2(max(rows, columns) / _SEED_SIZE)))
        sides = [(math.ceil(rows / 2**k), math.ceil(columns / 2**k)) for k in range(doublings, -1, -1)]
        widths = [min(_MAX_WIDTH, width * 2**k) for k in range(doublings, -1, -1)]
        self.latent, self.sides, self.widths = latent, sides, widths
        self.seed = nn.Linear(latent, widths[0] * sides[0][0] * sides[0][1])
        self.label = nn.Embedding(classes, latent)
        self.first = ConditionalBatchNorm2d(widths[0], classes)
        pairs = list(pairwise(widths)) or [(widths[0], widths[0])]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(ConditionalBatchNorm2d(b, classes) for _, b in pairs)
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.register_buffer("mean", torch.tensor(mean).view(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, channels, 1, 1))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return images (N, channels, height, width) float32, normalized, of z (N, latent) and labels (N,) int64."""
        x = self.seed(z + self.label(labels)).view(len(z), self.widths[0], *self.sides[0])
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.first(x, labels), 0.2)
        sides = self.sides[1:] or self.sides
        for conv, norm, side in zip(self.convs, self.norms, sides, strict=True):
            x = F.leaky_relu(norm(upsample_and_convolve(x, cast(nn.Conv2d, conv), side), labels), 0.2)
        x = self.last(x)
        if list(x.shape[-2:]) != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        return (torch.sigmoid(2 * x.contiguous()) - self.mean) / self.std  # not channels last, as teachers expect


def upsample_and_convolve(x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """Apply a 3x3 convolution to x (N, C, H, W), upsampled to `size` by its nearest pixels.

    Twice the size is one transposed convolution: the weights of equal neighbours are summed, so that there are 16
    products per pixel of x instead of 36.
    """
    if list(size) == [2 * side for side in x.shape[-2:]]:
        weight = conv.weight.transpose(0, 1).flip(2, 3)
        summed = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (C, O, 4, 4)
        return F.conv_transpose2d(x, summed, stride=2, padding=1)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="nearest")
    y: Tensor = conv(x)
    return y


class ClassSampler:
    """Draws labels evenly, in shuffled rounds through the classes; `queue` is the rest of a round, (n,) int64."""

    def __init__(self, classes: int, rng: torch.Generator) -> None:
        self._classes, self._rng = classes, rng
        self.queue = torch.empty(0, dtype=torch.int64, device=rng.device)

    def draw(self, count: int) -> Tensor:
        """Return the next labels, (count,) int64."""
        while len(self.queue) < count:
            order = torch.randperm(self._classes, generator=self._rng, device=self._rng.device)
            self.queue = torch.cat([self.queue, order])
        labels, self.queue = self.queue[:count], self.queue[count:]
        return labels
