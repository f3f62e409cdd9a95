"""The models that have a name: the bundled one and torchvision's classifiers.

torchvision is imported where it is asked: it loads torch's compiler, which takes longer than torch itself.
"""

from dataclasses import dataclass
from typing import Any

import torch

from clusterq_deploy.models import digits

BUNDLED = "digits"

_WITHOUT_BATCHNORM = frozenset({
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "squeezenet1_0",
    "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg13", "vgg16", "vgg19", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
})  # fmt: skip
"""torchvision's classifiers without BatchNorm; to find out by building all 80 takes seconds and gigabytes."""


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a model without loading it.

    Attributes:
        source: "bundled" or "torchvision".
        input_size: (channels, height, width).
        top1: published accuracy in percent: on ImageNet, for `digits` on its held-out images.
        has_batchnorm: whether ClusterQ has statistics to align to.
    """

    name: str
    source: str
    input_size: tuple[int, int, int]
    parameters: int | None
    top1: float | None
    has_batchnorm: bool


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers, sorted."""
    from torchvision import models as tv

    return list(tv.list_models(module=tv))


def torchvision_cfg(name: str) -> dict[str, Any]:
    """How torchvision's default weights want their input and what their classes are called, as a `pretrained_cfg`."""
    from torchvision import models as tv

    weights = tv.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "resize": resize,
        "crop_pct": crop / resize,
        "interpolation": preset.interpolation.value,
        "label_names": weights.meta.get("categories"),
    }


def available_models() -> list[ModelEntry]:
    """Every model that has a name, the bundled one first; needs no network.

    `timm:NAME` and `path/to/module.py:factory` load as well, but cannot be listed.
    """
    return [_digits_entry(), *(_torchvision_entry(name) for name in torchvision_names())]


def _digits_entry() -> ModelEntry:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in digits.DigitsNet().parameters())
    return ModelEntry(
        BUNDLED, "bundled", digits.PRETRAINED_CFG["input_size"], parameters, digits.TOP1, has_batchnorm=True
    )


def _torchvision_entry(name: str) -> ModelEntry:
    from torchvision import models as tv

    meta = tv.get_model_weights(name).DEFAULT.meta
    return ModelEntry(
        name,
        "torchvision",
        torchvision_cfg(name)["input_size"],
        meta.get("num_params"),
        meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1"),
        has_batchnorm=name not in _WITHOUT_BATCHNORM,
    )
