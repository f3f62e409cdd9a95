"""The calibration set: synthetic images with their labels and where they came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from calib.support.errors import SynthesisError

PREVIEWED = 10


def previewed_classes(labels: Tensor, columns: int = PREVIEWED) -> Tensor:
    """The classes (K,) int64 of a preview's columns, ascending: at most `columns`, evenly spread over all."""
    present: Tensor = labels.unique()
    return present[torch.linspace(0, len(present) - 1, min(columns, len(present))).round().long()]


@dataclass(frozen=True)
class CalibrationSet:
    """Synthetic images for calibration and fine-tuning.

    Attributes:
        images: (N, C, H, W) float32, normalized as the teacher wants them; on disk as float16, whose step is far
            below that of an 8-bit pixel.
        labels: (N,) int64, the class that each image was made for.
        provenance: how the images were made (recipe, seed, versions, teacher), JSON values only.
    """

    images: Tensor
    labels: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or len(self.images) != len(self.labels):
            raise SynthesisError(
                f"a calibration set wants images (N, C, H, W) and labels (N,), got {tuple(self.images.shape)} "
                f"and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self) -> bytes:
        """The set as a safetensors file: `images` float16, `labels` int64, provenance in the metadata."""
        tensors = {"images": self.images.cpu().half().contiguous(), "labels": self.labels.cpu().contiguous()}
        return save(tensors, metadata={"provenance": json.dumps(dict(self.provenance), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `to_bytes` wrote.

        Raises:
            SynthesisError: the file cannot be read, or is no calibration set.
        """
        try:
            with safe_open(path, framework="pt") as file:
                images, labels = file.get_tensor("images").float(), file.get_tensor("labels")
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise SynthesisError(f"{path} is no calibration set: {error}") from error
        return cls(images, labels, provenance)

    @staticmethod
    def read_labels(path: Path) -> Tensor:
        """The labels (N,) int64 alone of what `to_bytes` wrote; its images may be gigabytes.

        Raises:
            SynthesisError: the file cannot be read, or is no calibration set.
        """
        try:
            with safe_open(path, framework="pt") as file:
                labels: Tensor = file.get_tensor("labels")
        except (OSError, SafetensorError) as error:
            raise SynthesisError(f"{path} is no calibration set: {error}") from error
        return labels

    def split(self, held_out: float) -> tuple["CalibrationSet", "CalibrationSet"]:
        """A part to tune on and a part to select by; `held_out` is the latter's share, at least one image each.

        Images come in even turns of the classes, so every eighth (say) covers the classes as evenly.
        """
        every = max(2, round(1 / held_out))
        index = torch.arange(len(self))
        chosen = index % every == every - 1
        if not bool(chosen.any()):
            chosen = index == len(self) - 1
        return (
            CalibrationSet(self.images[~chosen], self.labels[~chosen], self.provenance),
            CalibrationSet(self.images[chosen], self.labels[chosen], self.provenance),
        )

    def preview(
        self, mean: tuple[float, ...], std: tuple[float, ...], columns: int = PREVIEWED, rows: int = 8
    ) -> Image.Image:
        """A grid of images, one class a column, as a person would look at them.

        Args:
            mean, std: the normalization to undo.
            columns: at most so many classes, those of `previewed_classes`.
            rows: at most so many images of each.
        """
        picked = previewed_classes(self.labels, columns)
        shape = (1, -1, 1, 1)
        scale, offset = torch.tensor(std).view(shape), torch.tensor(mean).view(shape)
        height, width = self.images.shape[-2:]
        side = max(1, round(64 / max(height, width)))
        tile_height, tile_width, gap = height * side, width * side, 2
        deepest = int(torch.stack([(self.labels == c).sum() for c in picked]).max())
        grid = np.full(
            (min(rows, deepest) * (tile_height + gap) - gap, len(picked) * (tile_width + gap) - gap, 3),
            255,
            np.uint8,
        )
        for column, label in enumerate(picked):
            own = self.images[self.labels == label][:rows].cpu()
            pixels = ((own * scale + offset).clamp(0, 1) * 255).round().byte()
            pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
            pixels = pixels.repeat_interleave(side, 2).repeat_interleave(side, 3)
            for row, tile in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
                top, left = row * (tile_height + gap), column * (tile_width + gap)
                grid[top : top + tile_height, left : left + tile_width] = tile
        return Image.fromarray(grid)
