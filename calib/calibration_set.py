"""The calibration set: synthetic images with their labels and provenance."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calib.support.errors import SynthesisError

PREVIEWED = 10
_GAP = 2  # pixels between the images of a preview


def previewed_classes(labels: Tensor, columns: int = PREVIEWED) -> Tensor:
    """Return the classes (K,) int64 of a preview's columns, ascending: at most `columns`, evenly spaced over all."""
    present: Tensor = labels.unique()
    return present[torch.linspace(0, len(present) - 1, min(columns, len(present))).round().long()]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise SynthesisError(f"{path} is not a calibration set: {error}") from error


@dataclass(frozen=True)
class CalibrationSet:
    """Synthetic images for calibration and fine-tuning.

    Attributes:
        images: (N, C, H, W) float32, normalized as the teacher expects; float16 on disk, which is far more precise than
            an 8-bit pixel.
        labels: (N,) int64, the class that each image was generated for.
        provenance: how the images were generated (recipe, seed, versions, teacher), JSON values only.
    """

    images: Tensor
    labels: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or len(self.images) != len(self.labels):
            raise SynthesisError(
                f"a calibration set needs images (N, C, H, W) and labels (N,), got {tuple(self.images.shape)} "
                f"and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self) -> bytes:
        """Return the set as a safetensors file: `images` float16, `labels` int64, provenance in the metadata."""
        tensors = {"images": self.images.cpu().half().contiguous(), "labels": self.labels.cpu().contiguous()}
        return save(tensors, metadata={"provenance": json.dumps(dict(self.provenance), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `to_bytes` wrote.

        Raises:
            SynthesisError: the file cannot be read, or is not a calibration set.
        """
        with _open(path) as file:
            images, labels = file.get_tensor("images").float(), file.get_tensor("labels")
            provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        return cls(images, labels, provenance)

    @staticmethod
    def read_labels(path: Path) -> Tensor:
        """Read only the labels (N,) int64 of what `to_bytes` wrote; its images may be gigabytes.

        Raises:
            SynthesisError: the file cannot be read, or is not a calibration set.
        """
        with _open(path) as file:
            labels: Tensor = file.get_tensor("labels")
        return labels

    def split(self, held_out: float) -> tuple["CalibrationSet", "CalibrationSet"]:
        """Split into images to tune on and a share `held_out` to select by, at least one image each.

        The classes of images are in turn, so that every eighth image, for example, is of each class equally often.
        """
        every = max(2, round(1 / held_out))
        index = torch.arange(len(self))
        selected = index % every == min(every, len(self)) - 1
        tune, select = (replace(self, images=self.images[m], labels=self.labels[m]) for m in (~selected, selected))
        return tune, select

    def preview(
        self, mean: tuple[float, ...], std: tuple[float, ...], columns: int = PREVIEWED, rows: int = 8
    ) -> Image.Image:
        """Return a grid of images, without their normalization: a column for each of `previewed_classes`."""
        from torchvision.utils import make_grid

        classes = previewed_classes(self.labels, columns)
        images = [self.images[self.labels == label][:rows].cpu() for label in classes]
        tiles = pad_sequence(images, padding_value=math.inf).flatten(0, 1)  # white if a class has fewer images
        offset, scale = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        pixels = ((tiles * scale + offset).clamp(0, 1) * 255).round().byte()[:, :3]
        factor = max(1, round(64 / max(pixels.shape[-2:])))
        pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        grid = make_grid(pixels, nrow=len(classes), padding=_GAP, pad_value=255)[:, _GAP:-_GAP, _GAP:-_GAP]
        return Image.fromarray(grid.permute(1, 2, 0).numpy())
