"""The models that have a name: the bundled one and torchvision's classifiers.

torchvision is imported only when it is needed: it loads torch's compiler, which takes longer than torch itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clusterq_deploy.models import digits

BUNDLED = "digits"
IMAGENET_CLASSES = 1000

_WITHOUT_BATCHNORM = frozenset({
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "squeezenet1_0",
    "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg13", "vgg16", "vgg19", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
})  # fmt: skip
"""torchvision's classifiers without BatchNorm; finding out by building all 80 takes seconds and gigabytes."""


@dataclass(frozen=True)
class ModelEntry:
    """What is known about a model of the `source` "bundled" or "torchvision" without loading it.

    Attributes:
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
    """Return the names of torchvision's classifiers, sorted."""
    from torchvision import models as tv

    return list(tv.list_models(module=tv))


def torchvision_cfg(name: str) -> dict[str, Any]:
    """Return the input and the class names of torchvision's default weights, as a `pretrained_cfg`."""
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
    """Return every model that has a name, the bundled one first; needs no network.

    `timm:NAME` and `path/to/module.py:factory` load as well, but cannot be listed.
    """
    from torchvision import models as tv

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in digits.DigitsNet().parameters())
    size = digits.PRETRAINED_CFG["input_size"]
    entries = [ModelEntry(BUNDLED, "bundled", size, parameters, digits.TOP1, has_batchnorm=True)]
    for name in torchvision_names():
        meta = tv.get_model_weights(name).DEFAULT.meta
        size, parameters = torchvision_cfg(name)["input_size"], meta.get("num_params")
        top1 = meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
        has_batchnorm = name not in _WITHOUT_BATCHNORM
        entries.append(ModelEntry(name, "torchvision", size, parameters, top1, has_batchnorm=has_batchnorm))
    return entries


def imagenet_names() -> Sequence[str]:
    """Return the English names of ImageNet's 1000 classes in their order; two names occur twice."""
    from torchvision.models import ResNet18_Weights

    names: Sequence[str] = ResNet18_Weights.DEFAULT.meta["categories"]
    return names


def imagenet_synsets() -> list[str]:
    """Return the WordNet ids of ImageNet's 1000 classes in their order, the sorted one: n01440764 is class 0."""
    return (digits.ASSETS / "imagenet_synsets.txt").read_text(encoding="ascii").split()
