"""What `--recipe` and `--effort` stand for: settings that fill in what was not given."""

from collections.abc import Mapping
from typing import Any, Literal

from clusterq_deploy.errors import ConfigError

Effort = Literal["fast", "standard", "thorough"]
Settings = dict[str, Any]

EFFORTS: Mapping[str, Settings] = {
    # equalization, scales, reconstruction and bias correction on few images: nothing is learned by gradients
    "fast": {
        "synthesis": {"images": 256, "generator": {"steps": 60, "warmup_steps": 15}, "refine": {"steps": 40}},
        "finetune": {"steps": 0},
    },
    "standard": {},
    # for a GPU: a generator trained to the end, more images, refined longer, and ten times the fine-tuning
    "thorough": {
        "synthesis": {
            "images": 5120,
            "generator": {"steps": 3000, "warmup_steps": 500},
            "refine": {"steps": 500},
        },
        "finetune": {"steps": 12_000},
    },
}

# (11) with gamma = 1 and no temperature, as it is written, on the images as they are: its labels fit no mixed ones.
# What synthesis does otherwise is in calib.synthesis.
_PAPER: Settings = {
    "finetune": {
        "ce_weight": 1.0,
        "kl_weight": 1.0,
        "temperature": 1.0,
        "feature_weight": 0.0,
        "augment": {"zoom": 0.0, "rotation": 0.0, "translation": 0.0, "jitter": 0.0, "cutmix": 0.0},
    }
}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Settings:
    """Two nested tables as one; where both have a value, that of `over`."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        inner = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merged(dict(below or {}), value) if inner else value
    return result


def without(settings: Mapping[str, Any], known: Mapping[str, Any]) -> Settings:
    """Nested settings without those that have the same value in `known`."""
    left: Settings = {}
    for key, value in settings.items():
        other = known.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            left[key] = without(value, other)
        elif key not in known or value != other:
            left[key] = value
    return left


def preset(recipe: str, effort: str) -> Settings:
    """The settings that a recipe and an effort stand for, to be laid under what was given.

    Raises:
        ConfigError: the two exclude each other.
    """
    if recipe != "paper":
        return dict(EFFORTS.get(effort, {}))
    if effort != "standard":
        raise ConfigError(f"the recipe paper has the published schedule: it takes no effort, got {effort!r}")
    return _PAPER
