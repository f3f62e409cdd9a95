"""Images of no class: dead leaves, shapes that lie over each other as the things in a photograph do.

Matheron's model (1968), whose statistics are close to those of photographs where the sizes of the shapes follow a
power law (Lee, Mumford, Huang, IJCV 2001); networks learn from such images (Baradad et al., NeurIPS 2021, arXiv
2106.05963). Each shape has a colour, and a texture of `natural_noise`.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from calib.refine import natural_noise
from calib.training import seeded

_LEAST_SIDE = 64  # smaller images are drawn at four times the side, and averaged
_SHAPES = (10, 300)  # in an image
_SMALLEST = 0.018  # radius, as a share of the side; the largest one is drawn for each image:
_LARGEST = (0.15, 0.5)
_AT_ONCE = 32


def dead_leaves(shape: tuple[int, int, int, int], rng: torch.Generator) -> Tensor:
    """Dead leaves, float32 in [0, 1] on the CPU.

    Args:
        shape: (N, C, H, W).
        rng: source of all randomness.
    """
    count, channels, height, width = shape
    if min(height, width) < _LEAST_SIDE:
        large = dead_leaves((count, channels, 4 * height, 4 * width), rng)
        return torch.nn.functional.avg_pool2d(large, 4)
    draws = np.random.default_rng(seeded(rng))
    images = torch.empty(shape)
    for part in images.split(_AT_ONCE):
        textures = natural_noise(part.shape, rng).cpu().numpy()
        for index, place in enumerate(part):
            place.copy_(torch.from_numpy(_drawn(textures[index], textures[index - 1], draws)))
    return images


def leaves_beside(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """So many dead leaves (M, C, H, W) float32 that they are a share of the whole with some images (N, C, H, W).

    The extremes of each channel of the images are taken for black and white. M is 0 where the share is too small.
    """
    count = round(len(images) * share / (1 - share))
    if not count:
        return images[:0]
    black, white = (edge.view(1, -1, 1, 1) for edge in (images.amin((0, 2, 3)), images.amax((0, 2, 3))))
    _, channels, height, width = images.shape
    return dead_leaves((count, channels, height, width), rng).mul_(white - black).add_(black)


def with_leaves(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Images (N, C, H, W) and `leaves_beside` them, in random order."""
    leaves = leaves_beside(images, share, rng)
    if not len(leaves):
        return images
    order = torch.randperm(len(images) + len(leaves), generator=rng, device=rng.device).cpu()
    return torch.cat([images, leaves])[order]


def _drawn(texture: NDArray[np.float32], other: NDArray[np.float32], draws: np.random.Generator) -> NDArray[np.float32]:
    """One image (C, H, W) of shapes with either texture (C, H, W)."""
    channels, height, width = texture.shape
    shapes = int(draws.integers(*_SHAPES))
    owner = _shapes(shapes, height, width, draws)
    # grey for the most part, as the colours of things are
    colours = draws.random((shapes + 1, 1)) + draws.beta(1, 3) * draws.normal(0, 0.5, (shapes + 1, channels))
    depths, which = draws.beta(1, 4, shapes + 1) / 2, draws.random(shapes + 1) < 0.5
    image = colours.clip(0, 1)[owner].transpose(2, 0, 1) + depths[owner] * np.where(which[owner], texture, other)
    return image.clip(0, 1).astype(np.float32)


def _shapes(count: int, height: int, width: int, draws: np.random.Generator) -> NDArray[np.int32]:
    """For each pixel (H, W) the number of the shape on top, from 1; 0 where there is none."""
    side = max(height, width)
    least, most = _SMALLEST * side, side * draws.uniform(*_LARGEST)
    share = draws.random(count)
    radii = (share * most**-2 + (1 - share) * least**-2) ** -0.5  # a density of radius^-3: no scale is special
    if draws.random() < 0.5:
        radii[::-1].sort()  # small things lie in front
    canvas = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    for number, radius in enumerate(radii.tolist(), 1):
        x, y = draws.uniform(-0.1, 1.1, 2) * (width, height)
        if draws.integers(3) == 0:
            other = radius * draws.uniform(0.4, 1)
            draw.ellipse([x - radius, y - other, x + radius, y + other], fill=number)
        else:
            corners = int(draws.integers(3, 9))
            angles, reach = np.sort(draws.uniform(0, 2 * math.pi, corners)), radius * draws.uniform(0.5, 1, corners)
            draw.polygon(
                list(zip((x + reach * np.cos(angles)).tolist(), (y + reach * np.sin(angles)).tolist(), strict=True)),
                fill=number,
            )
    return np.asarray(canvas)
