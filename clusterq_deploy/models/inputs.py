"""How an image becomes a model's input."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import PositiveInt, ValidationError, model_validator

from calib.support.config import StageConfig
from clusterq_deploy.errors import ModelError

_SMALL = 64
"""Models for images smaller than this see the whole image, with nothing cropped off."""
_CROP_FRACTION = 0.875
_WIDE_FORMATS = {"PNG", "PPM"}
"""Formats in which Pillow's 32-bit mode holds 16 bits."""
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_EXPECTED = {
    "size": "(channels, height, width)",
    "mean": "one number per channel",
    "std": "one number per channel",
    "resize": "a positive number of pixels",
    "interpolation": "bilinear or bicubic",
}
_OPTIONS = {"input_size": "--input-size", "mean": "--mean", "std": "--std"}


class InputSpec(StageConfig):
    """The input that a model was trained on.

    Attributes:
        size: (channels, height, width); 1 channel is grey, 3 are RGB.
        mean, std: one per channel, of pixels in [0, 1].
        resize: an image's shorter side before its centre is cropped; None resizes directly to height x width.
        interpolation: the filter that resizes; both are antialiased, as Pillow's always are.

    Raises:
        pydantic.ValidationError: the values do not fit together.
    """

    size: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: PositiveInt | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        channels, height, width = self.size
        if channels not in (1, 3):
            raise ValueError(f"size has {channels} channels; expected 1 (grey) or 3 (RGB)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values for {channels} channels")
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean is {self.mean}; expected values of pixels in [0, 1]")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std is {self.std}; expected positive numbers")
        if self.resize is not None and self.resize < min(height, width):
            raise ValueError(f"resize is {self.resize}, less than the crop of {height}x{width}")
        return self

    def preprocess(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Turn one image of any size and mode into (channels, height, width) float32, normalized.

        An image whose shorter side is already between the crop and `resize` is only cropped: enlarging it would blur
        it needlessly. Any other is first resized, to the same pixels as by torchvision's transforms. 16 bits become 8;
        transparency is dropped.

        Raises:
            ValueError: the range of its pixels is unknown, as of floats, or it is so long and narrow that it would
                have more pixels than Pillow opens once it is resized.
        """
        channels, height, width = self.size
        image = _convert(image, "L" if channels == 1 else "RGB")
        size = self._size_before_crop(*image.size)
        if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels would be resized to {size[0]}x{size[1]}")
        image = image.resize(size, _RESAMPLING[self.interpolation])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
        normalized = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalized.transpose(2, 0, 1))

    def _size_before_crop(self, image_width: int, image_height: int) -> tuple[int, int]:
        """Return the (width, height) that an image of this size is resized to before the crop."""
        _, height, width = self.size
        if self.resize is None:
            return width, height
        shorter = min(image_width, image_height)
        if image_width >= width and image_height >= height and shorter <= self.resize:
            return image_width, image_height
        # the crop must fit even if it is longer one way than the image is
        side = max(self.resize, math.ceil(width * shorter / image_width), math.ceil(height * shorter / image_height))
        return max(int(side * image_width / shorter), width), max(int(side * image_height / shorter), height)


def input_spec(
    name: str,
    cfg: object,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InputSpec:
    """Read a model's `pretrained_cfg`, overridden by what the user set.

    Args:
        name: the model's name, for messages.
        cfg: a mapping or an object with timm's names: input_size, mean, std, and optionally crop_pct and
            interpolation; `resize` (pixels) overrides crop_pct. None if the model has none.
        input_size: (channels, height, width).
        mean, std: one per channel, of pixels in [0, 1].

    Raises:
        ModelError: something is missing or wrong.
    """
    overrides = {"input_size": input_size, "mean": mean, "std": std}
    values = {key: entry(cfg, key) if value is None else value for key, value in overrides.items()}
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise ModelError(
            f"model {name!r} does not say how its input is made ({', '.join(missing)} missing): "
            f"give {' '.join(_OPTIONS[key] for key in missing)}, or set pretrained_cfg on the model"
        )
    settings: dict[str, Any] = {"size": values.pop("input_size"), **values}
    settings["interpolation"] = entry(cfg, "interpolation") or "bilinear"
    try:
        settings["resize"] = _shorter_side(InputSpec(**settings), cfg, other_size=input_size is not None)
        return InputSpec(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            field = str(first["loc"][0])
            reason = f"{field} is {settings[field]!r}; expected {_EXPECTED[field]}"
    except (TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error)
    raise ModelError(
        f"the input of model {name!r} cannot be made: {reason}; "
        f"give {' '.join(_OPTIONS.values())}, or correct its pretrained_cfg"
    )


def label_names(cfg: object, classes: int) -> tuple[str, ...]:
    """Return what a model's `pretrained_cfg` calls its classes, by timm's `label_names`: one each, or none at all."""
    names = entry(cfg, "label_names")
    if not isinstance(names, list | tuple) or len(names) != classes:
        return ()
    return tuple(" ".join(str(name).split()) for name in names)


def _shorter_side(spec: InputSpec, cfg: object, *, other_size: bool) -> int:
    """Return the shorter side to resize to; `other_size` is true if the size is not the one of `cfg`."""
    shorter = min(spec.size[1:])
    resize, crop_pct = entry(cfg, "resize"), entry(cfg, "crop_pct")
    if resize is not None and not other_size:
        return int(resize)
    if crop_pct is not None:
        return math.floor(shorter / float(crop_pct))  # timm rounds down
    return shorter if shorter < _SMALL else round(shorter / _CROP_FRACTION)


def entry(cfg: object, key: str) -> Any:
    """Return an entry of a `pretrained_cfg`, a mapping or an object; None if it has none."""
    return cfg.get(key) if isinstance(cfg, Mapping) else getattr(cfg, key, None)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDE_FORMATS):
        pixels = np.asarray(image).astype(np.float32) / 257  # Pillow itself would clip them at 255
        image = Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32 bits wide (mode {image.mode}), of no known range; save it with 8 or 16")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if such a palette is converted directly
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no other way to grey
    return image if image.mode == mode else image.convert(mode)
