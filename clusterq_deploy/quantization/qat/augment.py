"""More images from few: random views of the synthetic images, each with new answers of the teacher.

Distillation needs no label, so a view may show anything. Views add the variance that synthetic images lack: of
position and size, of brightness and contrast, of layout.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from calib.support.config import StageConfig


class AugmentConfig(StageConfig):
    """How far a view may go from its image, either way; a 0 switches that change off.

    `jitter` is the share by which contrast changes, drawn per image; brightness changes by half of it times the range
    of pixels, drawn per image, and by a third of it, drawn per channel.
    """

    zoom: float = Field(0.25, ge=0, le=1)  # by a factor of up to exp(zoom)
    rotation: float = Field(0.3, ge=0, le=math.pi)  # in radians
    translation: float = Field(0.12, ge=0, le=1)  # in halves of the image's side
    jitter: float = Field(0.3, ge=0, lt=1)
    cutmix: float = Field(0.5, ge=0, le=1)  # probability of another image's rectangle in a batch (arXiv 1905.04899)


class Augmenter:
    """Draws views of images.

    Args:
        config: how far they go.
        images: (N, C, H, W) float32, normalized: their extremes per channel are taken for black and white.
        flip: mirror views at random.
    """

    def __init__(self, config: AugmentConfig, images: Tensor, *, flip: bool, rng: torch.Generator) -> None:
        self.config, self.flip, self._rng = config, flip, rng
        self._black, self._white = images.amin((0, 2, 3)).view(1, -1, 1, 1), images.amax((0, 2, 3)).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return a view of each image, (N, C, H, W) float32, on the images' device."""
        config = self.config
        if config.zoom or config.rotation or config.translation or self.flip:
            images = self._move(images)
        if config.jitter:
            images = self._light(images)
        if config.cutmix and float(self._uniform(1)) < config.cutmix:
            images = self._mix(images)
        return images

    def _uniform(self, *shape: int) -> Tensor:
        """Draw from [0, 1)."""
        return torch.rand(shape, generator=self._rng, device=self._rng.device)

    def _either_way(self, *shape: int) -> Tensor:
        """Draw from [-1, 1)."""
        return 2 * self._uniform(*shape) - 1

    def _move(self, images: Tensor) -> Tensor:
        count, config = len(images), self.config
        size, angle = torch.exp(config.zoom * self._either_way(count)), config.rotation * self._either_way(count)
        mirror = torch.where(self._uniform(count) < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(size)
        cosine, sine = size * angle.cos(), size * angle.sin()
        turn = torch.stack([mirror * cosine, -sine, mirror * sine, cosine], 1).view(count, 2, 2)
        shift = config.translation * self._either_way(count, 2, 1)
        grid = F.affine_grid(torch.cat([turn, shift], 2).to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def _light(self, images: Tensor) -> Tensor:
        count, channels, share = len(images), images.shape[1], self.config.jitter
        black, white = self._black.to(images), self._white.to(images)
        contrast = (1 + share * self._either_way(count, 1, 1, 1)).to(images)
        brightness = 0.5 * self._either_way(count, 1, 1, 1) + self._either_way(count, channels, 1, 1) / 3
        centre = images.mean((1, 2, 3), keepdim=True)
        lit = (images - centre) * contrast + centre + share * brightness.to(images) * (white - black)
        return torch.clamp(lit, black, white)

    def _mix(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        side = math.sqrt(1 - float(self._uniform(1)))
        rows, columns = int(height * side), int(width * side)
        top, left = (int(float(self._uniform(1)) * (room + 1)) for room in (height - rows, width - columns))
        others = torch.randperm(len(images), generator=self._rng, device=self._rng.device).to(images.device)
        mixed, window = images.clone(), (..., slice(top, top + rows), slice(left, left + columns))
        mixed[window] = images[others][window]
        return mixed
