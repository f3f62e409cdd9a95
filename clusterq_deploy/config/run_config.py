"""The resolved configuration of a run, and its file."""

import math
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from calib.support.config import StageConfig
from calib.synthesis import SynthesisConfig
from clusterq_deploy.config.presets import Effort, Settings, merged, preset, without
from clusterq_deploy.config.toml import PLACES, with_paths
from clusterq_deploy.errors import ConfigError
from clusterq_deploy.evaluation.latency import BenchmarkConfig
from clusterq_deploy.files import is_utf8
from clusterq_deploy.quantization.grid import MAX_BITS, MIN_BITS, BitWidths, Cpu
from clusterq_deploy.quantization.qat.finetune import FinetuneConfig
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig

_Part = TypeVar("_Part", bound=StageConfig)

_PRESET = ("synthesis", "finetune")
"""The tables in which recipe and effort fill in settings."""

_WRITTEN = {"bits", "first_last", "keep", "fp16", "seed", "device", "effort", *_PRESET, "build", "benchmark"}
"""What stands in every `run.toml`, and hardly all in a file that somebody wrote."""

_STANDARD_COST = 2e8
_LEAST_SHARE = 0.25
_LEAST_GENERATOR_SHARE = {"standard": 0.75}
"""By effort, where it is another one: the standard generator has no more steps than a small model needs already."""
OPTIONS = "the options"
"""Where settings come from that stand in no file, for messages."""

_REASONS = {
    "tuple_type": "expected a list, such as [1, 2]",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
}
"""What pydantic says of types that TOML does not call so."""

_SHOWN = 300
"""Characters of a wrong value that a message quotes."""


class RunConfig(StageConfig):
    """What `clusterq run` does, whole: the model, the data, and each stage's own settings.

    Attributes:
        model: `digits`, a torchvision classifier, `timm:NAME` or `path/to/module.py:factory`.
        weights: None for the model's own, `none` for random ones, else a file.
        input_size, mean, std: how an input is made, where the model does not say.
        bits: the variants, such as w8a8.
        first_last: whether the first and last layers take the variant's widths too, not 8 bits.
        keep: widths of single layers, by name: of their weights, and of what they read.
        max_drop: raise the most sensitive layers to 8 bits until the drop in top-1 that is expected before
            fine-tuning, in points, is at most this; None raises none.
        cpu: the CPUs that ONNX Runtime's graph is made for: `any`, or `vnni` for those that add products of integers
            in 32 bits, which lets its weights have their full range.
        fp16: whether what is not quantized is FP16 in the graph for TensorRT, which takes the types that stand there.
        data: evaluation data; None evaluates on the model's own or on held-out synthetic images.
        limit: at most so many evaluation images.
        seed: source of all randomness.
        device: where to compute.
        effort: how much work goes into synthesis and fine-tuning; fills in their settings that were not given.
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe_and_effort(cls, values: Any) -> Any:
        """Settings that were not given take the values of the recipe and of the effort."""
        if not isinstance(values, dict):
            return values
        synthesis = values.get("synthesis", {})
        if not isinstance(synthesis, dict) or not isinstance(values.get("finetune", {}), dict):
            return values
        filling = preset(str(synthesis.get("recipe", "default")), str(values.get("effort", "standard")))
        return merged(filling, values)

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
        """These settings for a model whose forward pass costs so much (`calib.support.flops.pass_cost`) on a CPU.

        The standard work is meant for models of up to 200 million multiply-adds. Larger ones get proportionally
        fewer images and steps, but no less than a quarter, and the standard generator no less than three quarters. What
        was given otherwise than the defaults stays, and so does the recipe `paper`: its schedule is the published one.
        """
        if self.synthesis.recipe == "paper":
            return self
        share = min(1.0, _STANDARD_COST / cost)
        usual = _usual(self.synthesis.recipe, self.effort)

        def scaled(part: _Part, standard: _Part, *names: str, least: float = _LEAST_SHARE) -> _Part:
            own = {n: getattr(part, n) for n in names if getattr(part, n) == getattr(standard, n)}
            return part.model_copy(update={name: math.ceil(max(share, least) * value) for name, value in own.items()})

        synthesis, known = self.synthesis, usual.synthesis
        least = _LEAST_GENERATOR_SHARE.get(self.effort, _LEAST_SHARE)
        generator = scaled(synthesis.generator, known.generator, "steps", "warmup_steps", least=least)
        synthesis = scaled(synthesis, known, "images").model_copy(update={"generator": generator})
        finetune = scaled(self.finetune, usual.finetune, "steps")
        return self.model_copy(update={"synthesis": synthesis, "finetune": finetune})

    def to_toml(self) -> str:
        """The text of `run.toml`; what is None is left out, and paths are absolute: it holds from any folder.

        Raises:
            ConfigError: a path is not UTF-8, as TOML is.
        """
        settings = self.model_dump(mode="json", exclude_none=True)
        return tomli_w.dumps(with_paths(settings, _absolute))


def _absolute(name: str, path: Path) -> Path:
    """The absolute path, if a file of UTF-8 can hold it."""
    path = path.absolute()
    if not is_utf8(path):
        raise ConfigError(f"{name}: the path {str(path)!r} is not UTF-8, so that run.toml cannot hold it; rename it")
    return path


def _usual(recipe: str, effort: str) -> RunConfig:
    """What a recipe and an effort stand for, with nothing else given."""
    return RunConfig.model_validate({"model": "", "effort": effort, "synthesis": {"recipe": recipe}})


def without_presets(settings: Settings) -> Settings:
    """A file's settings without those that its recipe and effort made, so that others can be chosen instead.

    These stand in a `run.toml`, which has every setting; what stands in a file that somebody wrote was chosen.

    Args:
        settings: nested, as in a file.
    """
    recipe = settings.get("synthesis", {}).get("recipe", "default")
    known = _usual(recipe, settings.get("effort", "standard")).model_dump(mode="json")
    if not settings.keys() >= _WRITTEN:
        return settings
    parts: Settings = {name: without(settings[name], known[name]) for name in _PRESET}
    return {**settings, **parts, "synthesis": {**parts["synthesis"], "recipe": recipe}}


def make_config(values: dict[str, Any], *, origin: str = OPTIONS) -> RunConfig:
    """Check a nested dictionary of settings.

    Args:
        values: names as in `RunConfig`.
        origin: where they come from, for messages.

    Raises:
        ConfigError: a name is unknown (with near matches), or a value is wrong.
    """
    try:
        for where, number in _integers(values):
            if not -(2**63) <= number < 2**63:
                bits = number.bit_length()
                raise ConfigError(
                    f"{where} in {origin}: got an integer of {bits} bits, expected at most 63, as TOML has them"
                )
        return RunConfig.model_validate(values)
    except RecursionError as error:
        raise ConfigError(f"the tables in {origin} are nested too deeply") from error
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            near = _near(path)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"unknown setting {'.'.join(path)!r} in {origin}{hint}") from error
        reason = _REASONS.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
        if not path:  # of settings that do not go together
            raise ConfigError(f"{origin}: {reason}") from error
        got = shorten(repr(first["input"]), _SHOWN, placeholder=" ...")
        setting = (_option(path) if origin == OPTIONS else None) or f"{'.'.join(path)} in {origin}"
        raise ConfigError(f"{setting}: {reason}, got {got}") from error


def _option(path: list[str]) -> str | None:
    """The option of the command line that a setting is."""
    return next((f"--{name.replace('_', '-')}" for name, own in PLACES.items() if list(own) == path[: len(own)]), None)


def _integers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in nested dictionaries and lists, with the way to it."""
    if isinstance(value, int):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, own in items:
        yield from _integers(own, f"{path}.{key}" if path else str(key))


def _names(path: Iterable[str]) -> list[str]:
    """The settings that a table of the file may hold."""
    kind: Any = RunConfig
    for part in path:
        kind = kind.model_fields[part].annotation
    return list(kind.model_fields)


def _near(path: list[str]) -> str | None:
    """A setting that was perhaps meant: an option's, by its name, else one of the same table, else of another."""
    *table, name = path
    name = name.replace("-", "_")
    if name in PLACES:
        return ".".join(PLACES[name])
    options = {} if table else PLACES
    if matches := get_close_matches(name, [*_names(table), *options], n=1):
        return ".".join(options.get(matches[0], matches))
    return next(iter(_places(name)), None)


def _places(name: str, table: type[StageConfig] = RunConfig) -> list[str]:
    """Where a setting of such a name is, or of a near one, in the tables of the file: the options are not nested."""
    found, deeper = [], []
    for key, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, StageConfig):
            found += [f"{key}.{near}" for near in get_close_matches(name, list(kind.model_fields))]
            deeper += [f"{key}.{place}" for place in _places(name, kind)]
    return found + deeper
