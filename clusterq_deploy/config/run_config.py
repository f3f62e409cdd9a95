"""The configuration of a run, the presets of `--recipe` and `--effort`, and `run.toml`."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from calib.support.config import StageConfig
from calib.synthesis import SynthesisConfig
from clusterq_deploy.config.toml import PLACES, Settings, merged, with_paths
from clusterq_deploy.errors import ConfigError
from clusterq_deploy.evaluation.latency import BenchmarkConfig
from clusterq_deploy.files import is_utf8
from clusterq_deploy.quantization.grid import MAX_BITS, MIN_BITS, BitWidths, Cpu
from clusterq_deploy.quantization.qat.finetune import FinetuneConfig
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig

_Part = TypeVar("_Part", bound=StageConfig)

Effort = Literal["fast", "standard", "thorough"]

_EFFORTS: Mapping[str, Settings] = {
    # equalization, scales, reconstruction and bias correction on few images, without fine-tuning
    "fast": {
        "synthesis": {"images": 256, "generator": {"steps": 60, "warmup_steps": 15}, "refine": {"steps": 40}},
        "finetune": {"steps": 0},
    },
    "standard": {},
    # for a GPU: a longer training of the generator, more images, refined longer, and ten times the fine-tuning
    "thorough": {
        "synthesis": {"images": 5120, "generator": {"steps": 3000, "warmup_steps": 500}, "refine": {"steps": 500}},
        "finetune": {"steps": 12_000},
    },
}

# (11) with gamma = 1 and no temperature, as published, on images without augmentation: its labels fit no mixed ones.
# The settings of synthesis are in calib.synthesis.
_PAPER: Settings = {
    "finetune": {
        "steps": 1200,
        "ce_weight": 1.0,
        "kl_weight": 1.0,
        "temperature": 1.0,
        "feature_weight": 0.0,
        "augment": {"zoom": 0.0, "rotation": 0.0, "translation": 0.0, "jitter": 0.0, "cutmix": 0.0},
    }
}

_STANDARD_COST = 2e8
_MIN_SHARE = 0.25
_MIN_GENERATOR_SHARE = {"standard": 0.75}  # its steps are few already

OPTIONS = "the options"
"""The origin of settings that are not in a file, for messages."""

_REASONS = dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "expected a table") | {
    "tuple_type": "expected a list, such as [1, 2]"
}
"""Reasons for types that pydantic and TOML name differently."""

_SHOWN = 300  # characters of a wrong value that a message quotes


class RunConfig(StageConfig):
    """All that `clusterq run` does: the model, the data, and each stage's own settings.

    Attributes:
        model: `digits`, a torchvision classifier, `timm:NAME`, `path/to/module.py:factory` or `path/to/program.pt2`.
        weights: None for the model's own, `none` for random ones, else a file.
        input_size, mean, std: of the model's input, if the model does not define them.
        bits: the variants, such as w8a8.
        first_last: whether the first and last layers have the variant's bits too, not 8.
        keep: bits of single layers, by name: of their weights, and of the activations that they read.
        max_drop: raise the most sensitive layers to 8 bits until the expected drop in top-1 before fine-tuning, in
            points, is at most this; None raises none.
        cpu: the CPUs that ONNX Runtime's graph is for: `any`, or `vnni` for those that add products of integers in 32
            bits, so that its weights can have their full range.
        fp16: whether the graph for TensorRT has FP16 in place of float32.
        data: evaluation data; None evaluates on the bundled model's data or on held-out synthetic images.
        limit: the largest number of images to evaluate on.
        effort: preset of the settings of synthesis and fine-tuning that were not given.
    """

    model: str
    weights: str | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bits: tuple[str, ...] = ("w8a8", "w4a4")
    first_last: bool = False
    keep: dict[str, Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]] = Field(default_factory=dict)
    max_drop: float | None = Field(None, gt=0, le=100)
    cpu: Cpu = "any"
    fp16: bool = False
    data: Path | None = None
    limit: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    effort: Effort = "standard"
    synthesis: SynthesisConfig = SynthesisConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    build: BuildConfig = BuildConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _apply_presets(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Fill in the presets of the recipe and the effort, below the settings that were given."""
        if not isinstance(values, dict):
            return handler(values)
        synthesis, effort = values.get("synthesis"), str(values.get("effort", "standard"))
        preset = _EFFORTS.get(effort, {})
        if isinstance(synthesis, dict) and synthesis.get("recipe") == "paper":
            if effort != "standard":
                raise ValueError(f"the recipe paper has the published schedule: it accepts no effort, got {effort!r}")
            preset = _PAPER
        config = handler(merged(preset, values))
        _mark_given(config, values)
        return config

    @field_validator("bits")
    @classmethod
    def _canonical(cls, bits: tuple[str, ...]) -> tuple[str, ...]:
        if not bits:
            raise ValueError("give at least one variant, such as w8a8")
        return tuple(dict.fromkeys(str(BitWidths.parse(text)) for text in bits))

    @field_validator("data")
    @classmethod
    def _writable(cls, data: Path | None) -> Path | None:
        if data is not None and not is_utf8(data):
            raise ValueError("the path is not UTF-8, so that run.toml cannot hold it; rename it")
        return data

    @property
    def widths(self) -> list[BitWidths]:
        """The variants."""
        return [BitWidths.parse(text) for text in self.bits]

    def scaled_to(self, cost: float) -> "RunConfig":
        """Return the settings for a CPU and a model whose forward pass has this `calib.support.flops.pass_cost`.

        The presets are for models of up to 200 million multiply-adds. Larger ones get proportionally fewer images and
        steps, but at least a quarter, and of the standard generator's steps three quarters. Settings that differ from
        the presets and the recipe `paper`, which has the published schedule, are unchanged.
        """
        if self.synthesis.recipe == "paper":
            return self
        standard = _standard(self)
        share = max(_MIN_SHARE, min(1.0, _STANDARD_COST / cost))
        generator_share = max(share, _MIN_GENERATOR_SHARE.get(self.effort, 0))
        parts = (self.synthesis.generator, standard.synthesis.generator)
        generator = _scaled(*parts, generator_share, "steps", "warmup_steps")
        synthesis = _scaled(self.synthesis, standard.synthesis, share, "images")
        synthesis = synthesis.model_copy(update={"generator": generator})
        finetune = _scaled(self.finetune, standard.finetune, share, "steps")
        return self.model_copy(update={"synthesis": synthesis, "finetune": finetune})

    def to_toml(self) -> str:
        """Return the text of `run.toml`: the settings that were given, with absolute paths.

        Raises:
            ConfigError: a path is not UTF-8, as TOML is.
        """
        settings = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return tomli_w.dumps(with_paths(settings, _absolute))


def _mark_given(config: StageConfig, values: Mapping[str, Any]) -> None:
    """Remove from the fields that count as set those that presets filled in: they are not in `values`."""
    config.model_fields_set.intersection_update(values)
    for name in config.model_fields_set:
        if isinstance(part := getattr(config, name), StageConfig) and isinstance(values[name], Mapping):
            _mark_given(part, values[name])


def _standard(config: RunConfig) -> RunConfig:
    """Return the presets of a configuration's recipe and effort."""
    synthesis = {"recipe": config.synthesis.recipe}
    return RunConfig.model_validate({"model": "", "effort": config.effort, "synthesis": synthesis})


def _scaled(part: _Part, standard: _Part, share: float, *names: str) -> _Part:
    """Return settings in which those of these names that have their standard value are reduced to a share of it."""
    values = {name: getattr(part, name) for name in names if getattr(part, name) == getattr(standard, name)}
    return part.model_copy(update={name: math.ceil(share * value) for name, value in values.items()})


def _absolute(name: str, path: Path) -> Path:
    """Return the absolute path, if it can be encoded in UTF-8."""
    path = path.absolute()
    if not is_utf8(path):
        raise ConfigError(f"{name}: the path {str(path)!r} is not UTF-8, so that run.toml cannot hold it; rename it")
    return path


def make_config(values: dict[str, Any], *, origin: str = OPTIONS) -> RunConfig:
    """Return the configuration of nested settings, with names as in `RunConfig`; messages name their `origin`.

    Raises:
        ConfigError: a name is unknown (with near matches), or a value is wrong.
    """
    try:
        for place, number in _integers(values):
            if (bits := number.bit_length()) > 63:
                raise ConfigError(
                    f"{place} in {origin}: got an integer of {bits} bits, expected at most 63, as in TOML"
                )
        return RunConfig.model_validate(values)
    except RecursionError as error:
        raise ConfigError(f"the tables in {origin} are nested too deeply") from error
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], origin)) from error


def _integers(value: Any, place: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer in nested dictionaries and lists, with its place."""
    if isinstance(value, int):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from _integers(inner, f"{place}.{key}" if place else str(key))


def _explain(error: ErrorDetails, origin: str) -> str:
    """Return what is wrong with a setting, in one line."""
    path = tuple(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _near(path[:-1], path[-1].replace("-", "_"))
        return f"unknown setting {'.'.join(path)!r} in {origin}" + (f"; did you mean {near!r}?" if near else "")
    reason = _REASONS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if not path:  # settings that exclude each other
        return f"{origin}: {reason}"
    options = [name.replace("_", "-") for name, place in PLACES.items() if place == path[: len(place)]]
    setting = f"--{options[0]}" if options and origin == OPTIONS else f"{'.'.join(path)} in {origin}"
    return f"{setting}: {reason}, got {shorten(repr(error['input']), _SHOWN, placeholder=' ...')}"


def _near(table: tuple[str, ...], name: str) -> str | None:
    """Return the nearest name of a setting: of an option, else of the same table, else of another."""
    options = {option: ".".join(place) for option, place in PLACES.items()}
    places = list(_places(RunConfig))
    siblings = {place[-1]: place[-1] for place in places if place[:-1] == table}
    others = {place[-1]: ".".join(place) for place in places}
    if name in options:
        return options[name]
    for names in (siblings if table else siblings | options, others):
        if matches := get_close_matches(name, names, n=1):
            return names[matches[0]]
    return None


def _places(config: type[StageConfig], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every setting, and of every table."""
    for name, field in config.model_fields.items():
        yield (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, StageConfig):
            yield from _places(field.annotation, (*path, name))
