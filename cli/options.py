"""Options that commands share, and how they become a configuration."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Numbers(click.ParamType[Any]):
    """Numbers separated by commas."""

    name = "n,n,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            return self.fail(f"{value!r} is no list of numbers such as 3,224,224", param, ctx)


class Word(click.Choice[str]):
    """One of a few words; one that is near to another word says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        near = get_close_matches(str(value).lower(), self.choices, n=1)
        if value not in self.choices and near:
            known = ", ".join(repr(word) for word in self.choices)
            return self.fail(f"{value!r} is not one of {known}; did you mean {near[0]!r}?", param, ctx)
        return super().convert(value, param, ctx)


class Width(click.ParamType[Any]):
    """A layer and its bits."""

    name = "layer=bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        layer, _, bits = str(value).rpartition("=")
        if not layer or not bits.isdecimal():
            return self.fail(f"{value!r} is no layer and its bits such as layer1.0.conv1=8", param, ctx)
        return layer, int(bits)


class Profile(click.ParamType[Any]):
    """Smallest, tuned-for and largest batch size."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            return self.fail(f"{value!r} is no smallest, tuned-for and largest batch such as 1:8:32", param, ctx)
        sizes = tuple(int(part) for part in parts)
        if list(sizes) != sorted(sizes) or sizes[0] < 1:
            return self.fail(f"{value!r} does not ascend from 1 or more, as 1:8:32 does", param, ctx)
        return sizes


class MemorySize(click.ParamType[Any]):
    """A number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from clusterq_deploy.runtimes.tensorrt.sidecar import memory_size

        try:
            return memory_size(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)


def overlay(settings: dict[str, Any], ctx: click.Context) -> dict[str, Any]:
    """Settings of a file with the options that were given on the command line on top."""
    from clusterq_deploy.config.toml import PLACES

    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for name, value in ctx.params.items():
        if name not in PLACES or value is None or ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        *tables, key = PLACES[name]
        place = merged
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = list(value) if isinstance(value, tuple) else value
    return merged


def config_of(ctx: click.Context, file: Path | None = None, **more: Any) -> "RunConfig":
    """The configuration of a file, if any, and the command line."""
    from clusterq_deploy.config.run_config import make_config, without_presets
    from clusterq_deploy.config.toml import read_settings
    from clusterq_deploy.errors import ConfigError

    settings = read_settings(file) if file else {}
    if file:  # what is wrong by itself is found before options lie on top
        make_config({"model": "", **settings}, origin=str(file))
    if any(ctx.params.get(name) for name in ("recipe", "effort")):
        settings = without_presets(settings)
    settings = overlay({**settings, **more}, ctx)
    if "model" not in settings:
        raise ConfigError("no model was given; name one (clusterq models lists them), or a --config that does")
    return make_config(settings)


def _all(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_PATH = click.Path(path_type=Path)

model_options = _all(
    click.option(
        "--weights",
        metavar="FILE|none",
        help="Weights to load; `none` for random ones.  [default: the model's]",
    ),
    click.option("--input-size", type=Numbers(int), metavar="C,H,W", help="Input size, where the model does not say."),
    click.option("--mean", type=Numbers(float), metavar="M,...", help="Mean of pixels in [0, 1], one a channel."),
    click.option("--std", type=Numbers(float), metavar="S,...", help="Standard deviation, one a channel."),
)
synthesis_options = _all(
    click.option("--recipe", type=Word(["default", "paper"]), help="How images are made.  [default: default]"),
    click.option(
        "--effort",
        type=Word(["fast", "standard", "thorough"]),
        help="fast: calibration only, a minute or two; thorough: for a GPU.  [default: standard]",
    ),
    click.option("--images", type=click.IntRange(2), help="Size of the calibration set.  [default: 1024]"),
)
bits_option = click.option(
    "--bits",
    multiple=True,
    metavar="wXaY",
    help="Bits of weights and activations, 2 to 8; may be repeated.  [default: w8a8, w4a4]",
)
cpu_option = click.option(
    "--cpu",
    type=Word(["any", "vnni"]),
    help="CPUs that ONNX Runtime's graph is for: any, or those with VNNI, which lets weights have all 8 bits; "
    "without VNNI such a graph saturates.  [default: any]",
)
widths_options = _all(
    bits_option,
    cpu_option,
    click.option("--first-last", is_flag=True, help="Give the first and last layers those bits too, not 8."),
    click.option(
        "--keep",
        type=Width(),
        multiple=True,
        callback=lambda _ctx, _param, pairs: dict(pairs),
        metavar="LAYER=BITS",
        help="Give a layer bits of its own, such as 8; may be repeated.",
    ),
)
quantize_options = _all(
    widths_options,
    click.option(
        "--max-drop",
        type=click.FloatRange(0, 100, min_open=True),
        help="Raise the most sensitive layers to 8 bits until the drop expected before fine-tuning is at most this.  "
        "[default: raise none]",
    ),
)
fp16_option = click.option(
    "--fp16", is_flag=True, help="Let TensorRT compute in FP16 what is not quantized, by the types in its graph."
)
build_options = _all(
    click.option(
        "--batch",
        type=Profile(),
        metavar="MIN:OPT:MAX",
        help="Smallest, tuned-for and largest batch of an engine; a run adds those that it times.  [default: 1:8:32]",
    ),
    click.option(
        "--workspace",
        type=MemorySize(),
        metavar="SIZE",
        help="Scratch memory on the GPU for a layer: 4GiB, 512MiB, or a number of MiB.  [default: 4GiB]",
    ),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        help="How long TensorRT searches for the fastest engine: 0 not at all, 5 longest.  [default: 3]",
    ),
    click.option(
        "--timing-cache",
        metavar="FILE|none",
        help="What TensorRT measured in earlier builds; `none` for no file; level 0 uses none.  "
        "[default: a file for each GPU and release of TensorRT in the user's cache directory]",
    ),
    click.option(
        "--version-compatible", is_flag=True, help="Let later releases of TensorRT run the engine, at a cost in speed."
    ),
    click.option(
        "--hardware-compatible", is_flag=True, help="Let every GPU from Ampere on run the engine, at a cost in speed."
    ),
)
data_options = _all(
    click.option(
        "--data",
        type=_PATH,
        help="Evaluation data: class folders, a folder with labels.csv, or an .npz.  "
        "[default: the model's own, else held-out synthetic images]",
    ),
    click.option("--limit", type=click.IntRange(1), help="Evaluate at most so many images.  [default: all]"),
)
benchmark_options = _all(
    click.option("--batches", type=Numbers(int), metavar="N,...", help="Batch sizes to time.  [default: 1,32]"),
    click.option("--threads", type=click.IntRange(1), help="Threads of CPU runtimes.  [default: one a core]"),
)
run_options = _all(
    click.option("--device", type=Word(["auto", "cpu", "cuda"]), help="Where to compute.  [default: auto]"),
    click.option("--seed", type=click.IntRange(0), help="Source of all randomness.  [default: 0]"),
)
config_option = click.option("--config", "config_file", type=_PATH, help="Settings in TOML, such as a run.toml.")
out_option = click.option(
    "--out",
    type=_PATH,
    help="Run directory.  [default: that of the same run, where it did not end; else runs/MODEL-TIME]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
run_argument = click.argument("run", type=_PATH, metavar="RUN")
