"""Options that commands share, and how they become a configuration."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from clusterq_deploy.config.run_config import RunConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Command(click.Command):
    """A command with stdout to itself: what a model's own code prints while it runs goes to stderr."""

    STDOUT = "cli.stdout"
    """The key of stdout in the context's `meta`, where `cli.render` finds it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        ctx.meta[self.STDOUT] = sys.stdout
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


class Parsed(click.ParamType[Any]):
    """Text of the form `name`, which a function parses, or raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any], example: str) -> None:
        self.name, self._parse, self._example = name, parse, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError:
            return self.fail(f"{value!r} is not of the form {self.name}, such as {self._example}", param, ctx)


class Word(click.Choice[str]):
    """One of a few words; the error of a misspelled one suggests the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word."""
        near = get_close_matches(str(value).lower(), self.choices, n=1)
        if value not in self.choices and near:
            choices = ", ".join(map(repr, self.choices))
            return self.fail(f"{value!r} is not one of {choices}; did you mean {near[0]!r}?", param, ctx)
        return super().convert(value, param, ctx)


def _batch(text: str) -> tuple[int, ...]:
    smallest, best, largest = map(int, text.split(":"))
    return smallest, best, largest


def _layer_bits(text: str) -> tuple[str, int]:
    layer, bits = text.rsplit("=", 1)
    return layer, int(bits)


def _rtx_targets(text: str) -> tuple[str, ...]:
    targets = tuple(text.lower().split(","))
    if not all(target.startswith("sm") for target in targets):
        raise ValueError("not families of GPUs")
    return targets


_INTEGERS = Parsed("n,n,...", lambda text: tuple(map(int, text.split(","))), "3,224,224")
_NUMBERS = Parsed("n,n,...", lambda text: tuple(map(float, text.split(","))), "0.5,0.5,0.5")
_BATCH = Parsed("min:opt:max", _batch, "1:8:32")
_TARGETS = Parsed("sm,sm,...", _rtx_targets, "sm86,sm89")
_LAYER_BITS = Parsed("layer=bits", _layer_bits, "layer1.0.conv1=8")
PATH = click.Path(path_type=Path)


def config_of(ctx: click.Context, file: Path | None = None, **more: Any) -> "RunConfig":
    """Return the configuration of a file, if any, overridden by `more` and the options of the command line.

    Raises:
        ConfigError: a setting is wrong, or there is no model.
    """
    from clusterq_deploy.config.run_config import make_config
    from clusterq_deploy.config.toml import PLACES, put, read_settings
    from clusterq_deploy.errors import ConfigError

    settings = read_settings(file) if file else {}
    if file:  # report errors in the file before options override it
        make_config({"model": "", **settings}, origin=str(file))
    settings |= more
    for name, value in ctx.params.items():
        if name in PLACES and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            put(settings, PLACES[name], value)
    if "model" not in settings:
        raise ConfigError("no model was given; name one (clusterq models lists them), or a --config that does")
    return make_config(settings)


def _all(*decorators: Decorator) -> Decorator:
    """Return several options as one decorator."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


model_options = _all(
    click.option(
        "--weights",
        metavar="FILE[:KEY]|none",
        help="Weights to load; KEY is one of several states in FILE; `none` for random ones.  [default: the model's]",
    ),
    click.option("--input-size", type=_INTEGERS, metavar="C,H,W", help="Input size, if the model does not say."),
    click.option("--mean", type=_NUMBERS, metavar="M,...", help="Mean of pixels in [0, 1], one per channel."),
    click.option("--std", type=_NUMBERS, metavar="S,...", help="Standard deviation, one per channel."),
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
widths_options = _all(
    bits_option,
    click.option(
        "--cpu",
        type=Word(["any", "vnni"]),
        help="CPUs that ONNX Runtime's graph is for: any, or only those with VNNI, where weights may have all 8 bits; "
        "without VNNI such a graph saturates.  [default: any]",
    ),
    click.option("--first-last", is_flag=True, help="Quantize the first and last layers to these bits too, not to 8."),
    click.option(
        "--keep",
        type=_LAYER_BITS,
        multiple=True,
        callback=lambda _ctx, _param, pairs: dict(pairs),
        metavar="LAYER=BITS",
        help="Quantize one layer to other bits, such as 8; may be repeated.",
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
    "--fp16", is_flag=True, help="Use FP16 in TensorRT's graph for layers that are not quantized."
)
build_options = _all(
    click.option(
        "--batch",
        type=_BATCH,
        metavar="MIN:OPT:MAX",
        help="Smallest, optimal and largest batch of an engine; a run includes those of --batches.  [default: 1:8:32]",
    ),
    click.option(
        "--workspace",
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
        help="File with timings of earlier builds; `none` for no file. Level 0 uses none.  "
        "[default: a file for each GPU and release of TensorRT in the user's cache directory]",
    ),
    click.option("--version-compatible", is_flag=True, help="Let later TensorRT releases run the engine, more slowly."),
    click.option(
        "--hardware-compatible", is_flag=True, help="Let all GPUs from Ampere on run the engine, more slowly."
    ),
    click.option(
        "--same-capability",
        is_flag=True,
        help="Let all GPUs of the same compute capability run the engine, more slowly (TensorRT 10.9 and later).",
    ),
    click.option(
        "--build-route",
        metavar="'-NAME=VALUE ...'",
        help="Settings of TensorRT's compiler, for experts (TensorRT 11.4 and later).  [default: TensorRT's own]",
    ),
    click.option(
        "--rtx",
        type=_TARGETS,
        is_flag=False,
        flag_value="sm80,sm86,sm89,sm120",
        metavar="[SM,...]",
        help="Also build engines of TensorRT-RTX, ahead of time, for these families of GPUs; no GPU is needed. Without "
        "a value: sm80,sm86,sm89,sm120, all from Ampere on.  [default: build none]",
    ),
)
data_options = _all(
    click.option(
        "--data",
        type=PATH,
        help="Evaluation data: class folders, a folder with labels.csv, or an .npz.  "
        "[default: the model's own, else held-out synthetic images]",
    ),
    click.option("--limit", type=click.IntRange(1), help="Evaluate at most this number of images.  [default: all]"),
)
benchmark_options = _all(
    click.option("--batches", type=_INTEGERS, metavar="N,...", help="Batch sizes to time.  [default: 1,32]"),
    click.option("--threads", type=click.IntRange(1), help="Threads of CPU runtimes.  [default: one per core]"),
)
run_options = _all(
    click.option("--device", type=Word(["auto", "cpu", "cuda"]), help="Where to compute.  [default: auto]"),
    click.option("--seed", type=click.IntRange(0), help="Source of all randomness.  [default: 0]"),
)
config_option = click.option("--config", "config_file", type=PATH, help="Settings in TOML, such as a run.toml.")
out_option = click.option(
    "--out", type=PATH, help="Run directory.  [default: the unfinished one, else runs/MODEL-TIME]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model_argument = click.argument("model", required=False)
run_argument = click.argument("run", type=PATH, metavar="RUN")


def target_argument(metavar: str) -> Decorator:
    """Return the argument of a command that accepts a run or a file."""
    return click.argument("target", type=PATH, metavar=metavar)


def command(*decorators: Decorator) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command with these arguments and options, and --json; it is called with its context.

    Rows that it returns are printed, as a table or as JSON.
    """

    def make(function: Callable[..., list[dict[str, Any]] | None]) -> click.Command:
        @wraps(function)
        def call(ctx: click.Context, /, **values: Any) -> None:
            if (rows := function(ctx, **values)) is not None:
                from cli import render

                render.show(rows, values["as_json"])

        return click.command(cls=Command)(_all(*decorators, json_option)(click.pass_context(call)))

    return make
