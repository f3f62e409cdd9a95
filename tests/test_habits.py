"""What people expect of any command: near matches, quiet pipes, colours on demand, logs, defaults in the help."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tomli_w
from click.testing import CliRunner
from test_pipeline import SMALL

from cli import options
from cli.main import main
from clusterq_deploy.config.run_config import RunConfig, make_config
from clusterq_deploy.config.toml import PLACES, read_settings
from clusterq_deploy.errors import ConfigError
from clusterq_deploy.quantization import BitWidths

ROOT = Path(__file__).parents[1]


def process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it, with its streams in pipes."""
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
    )


def error(*args: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_misspelled_name_is_answered_with_a_near_one(tmp_path: Path) -> None:
    assert "did you mean 'benchmark'?" in error("bench")
    assert "did you mean" not in error("zzzzzz")
    assert re.search("id you mean .*'--bits'", error("run", "digits", "--bitts", "w4a4"))
    assert "did you mean resnet18" in error("run", "resnet-18")
    assert "did you mean w8a8?" in error("run", "digits", "--bits", "int8", "--out", tmp_path / "out")
    (tmp_path / "wrong.toml").write_text("[finetune]\nstep = 3\n")
    assert "did you mean 'steps'?" in error("run", "digits", "--config", tmp_path / "wrong.toml")
    assert "'standard'" in error("run", "digits", "--effort", "standart")


def test_a_wrong_option_of_the_tool_itself_is_one_line() -> None:
    assert error("--bogus").startswith("Error: No such option '--bogus'")
    assert "'--verbose'" in error("--verbos", "models")
    assert error("-x", "models").startswith("Error: No such option '-x'")


def test_an_option_of_the_tool_behind_the_command_is_told_where_it_goes() -> None:
    for name in ("--quiet", "-q", "--verbose", "--version"):
        said = f"No such option '{name}' of run: it stands before the command, clusterq {name} run "
        assert said in error("run", "digits", name)
    assert "before the command" not in error("run", "digits", "--quite")


@pytest.mark.parametrize("forms", [("--csv", "--markdown"), ("--json", "--csv"), ("--markdown", "--json")])
@pytest.mark.parametrize("more", [(), ("--compare",)])
def test_two_forms_of_a_report_exclude_each_other(forms: tuple[str, str], more: tuple[str, ...]) -> None:
    line = error("report", "run", *more, *forms)
    assert "exclude each other" in line
    assert all(form in line for form in forms)


@pytest.mark.parametrize(
    "failure",
    [MemoryError("Unable to allocate 9.31 GiB"), MemoryError(), RuntimeError("CUDA error: out of memory\nand more")],
)
def test_memory_that_does_not_suffice_is_one_line(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise failure

    monkeypatch.setattr("clusterq_deploy.models.available_models", fail)
    line = error("models")
    assert line.startswith("Error: the memory does not suffice; ")
    assert (str(failure).split("\n")[0] or "MemoryError") in line


def test_an_unknown_failure_is_no_matter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("clusterq_deploy.models.available_models", fail)
    result = CliRunner().invoke(main, ["models"])
    assert repr(result.exception) == "RuntimeError('shapes do not fit')"


def test_a_plain_pickle_as_weights_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Path()}, protocol=4))
    done = process("run", "digits", "--weights", tmp_path / "evil.pth", "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: refused to load ")


@pytest.mark.parametrize(
    ("text", "meant"), [("int4", "w4a4"), ("W8-A8", "w8a8"), ("a8w4", "w4a8"), ("w4", "w4a4"), ("4/8", "w4a8")]
)
def test_bits_that_were_perhaps_meant(text: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?"):
        BitWidths.parse(text)


@pytest.mark.parametrize("text", ["fp32", "wXaY", "w4a4a4", "int16"])
def test_bits_that_are_like_no_setting_get_no_guess(text: str) -> None:
    with pytest.raises(ConfigError, match="name it like") as raised:
        BitWidths.parse(text)
    assert "did you mean" not in str(raised.value)


@pytest.mark.slow
def test_a_pipe_gets_a_plain_table_and_nothing_else(tmp_path: Path) -> None:
    settings = tmp_path / "small.toml"
    settings.write_text(tomli_w.dumps(SMALL))
    done = process("synthesize", "digits", "--config", settings, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["images"] == 80
    listing = process("models", COLUMNS="40")
    assert "\x1b" not in listing.stdout
    assert "no: cannot be used" in listing.stdout  # not cut or folded to a terminal's width


@pytest.mark.slow
def test_colours_are_switched_off_and_on_by_the_environment() -> None:
    coloured = re.compile(r"\x1b\[[\d;]*3\dm")
    assert coloured.search(process("doctor", FORCE_COLOR="1").stdout)
    assert not coloured.search(process("doctor", FORCE_COLOR="1", NO_COLOR="1").stdout)


@pytest.mark.slow
def test_verbose_logs_to_stderr_alone(tmp_path: Path) -> None:
    settings = tmp_path / "small.toml"
    settings.write_text(tomli_w.dumps(SMALL))
    done = process("--verbose", "synthesize", "digits", "--config", settings, "--out", tmp_path / "out", "--json")
    assert "INFO clusterq_deploy.run.run: stage synthesize" in done.stderr
    json.loads(done.stdout)


def test_every_option_with_a_value_says_its_default() -> None:
    """A file's settings stand under the options, so that click knows of none: the help text says them."""
    without = {"config_file", "keep", "input_size", "mean", "std"}
    for command in main.commands.values():
        for param in command.params:
            if isinstance(param, click.Option) and not param.is_flag and param.name not in without:
                assert "[default: " in str(param.help), (command.name, param.name)


def test_defaults_in_the_help_are_those_of_the_configuration() -> None:
    config = RunConfig(model="digits").model_dump(mode="json")
    seen = 0
    for param in main.commands["run"].params:
        default = re.search(r"\[default: (.*)\]", getattr(param, "help", None) or "")
        if default is None or param.name not in PLACES:
            continue
        value = config
        for part in PLACES[param.name]:
            value = value[part]
        if value is not None:
            shown = default[1].split(", ") if param.multiple else param.type.convert(default[1], param, None)
            assert (list(shown) if isinstance(value, list) else shown) == value, param.name
            seen += 1
    assert seen >= 7


# an option as it is given, and what stands for it in a file
GIVEN: dict[str, tuple[list[str], object]] = {
    "weights": (["none"], "none"),
    "input_size": (["3,64,64"], [3, 64, 64]),
    "mean": (["0.5,0.5,0.5"], [0.5, 0.5, 0.5]),
    "std": (["0.25,0.5,1"], [0.25, 0.5, 1]),
    "bits": (["w4a8"], ["w4a8"]),
    "first_last": ([], True),
    "keep": (["conv1=8"], {"conv1": 8}),
    "max_drop": (["0.5"], 0.5),
    "cpu": (["vnni"], "vnni"),
    "fp16": ([], True),
    "data": (["images"], "images"),
    "limit": (["10"], 10),
    "seed": (["3"], 3),
    "device": (["cpu"], "cpu"),
    "effort": (["fast"], "fast"),
    "recipe": (["paper"], "paper"),
    "images": (["512"], 512),
    "batch": (["1:4:16"], [1, 4, 16]),
    "workspace": (["2GiB"], "2GiB"),
    "optimization_level": (["4"], 4),
    "timing_cache": (["none"], "none"),
    "version_compatible": ([], True),
    "hardware_compatible": ([], True),
    "batches": (["1,8"], [1, 8]),
    "threads": (["2"], 2),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_config_has_the_names_of_the_options(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values, written = GIVEN[name]
    option = f"--{name.replace('_', '-')}"
    run = main.commands["run"]
    with run.make_context("run", ["digits", option, *values]) as context:
        asked = options.config_of(context, model="digits")
    file = Path("some.toml")
    for spelled in (name, name.replace("_", "-")):
        own = {spelled: written}
        for content in (own, {PLACES[name][0]: own}) if len(PLACES[name]) > 1 else (own,):
            file.write_text(tomli_w.dumps({"model": "digits", **content}))
            assert make_config(read_settings(file)) == asked != RunConfig(model="digits")


def test_every_setting_that_is_an_option_is_tried() -> None:
    params = {param.name for command in main.commands.values() for param in command.params}
    assert {"model", *GIVEN} == set(PLACES) <= params


def test_one_setting_under_two_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("model = 'digits'\nworkspace = '1GiB'\n[build]\nworkspace_bytes = 4096\n")
    assert "workspace and build.workspace_bytes in" in error("run", "--config", file)
    file.write_text("model = 'digits'\nfirst-last = true\nfirst_last = true\n")
    assert "first-last and first_last in" in error("run", "--config", file)
    file.write_text("model = 'digits'\nbuild = 3\nbatch = [1, 2, 3]\n")
    assert "expected a table, got 3" in error("run", "--config", file)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("batchs = 3", "benchmark.batches"), ("first_lst = true", "first_last"), ("imges = 3", "synthesis.images")],
)
def test_an_option_misspelled_in_a_config(text: str, meant: str, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text(f"model = 'digits'\n{text}\n")
    assert f"did you mean {meant!r}?" in error("run", "--config", file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threads = true", "benchmark.threads in {}: expected a number, got True"),
        ("batches = [true, 2]", "benchmark.batches in {}: expected a number, got [True, 2]"),
        ("limit = true", "limit in {}: expected a number, got True"),
        ("seed = '7'", "seed in {}: expected a number, not a text, got '7'"),
        ("first-last = 'yes'", "first_last in {}: expected true or false, not a text, got 'yes'"),
        ("fp16 = 1", "fp16 in {}: expected true or false, got 1"),
        ("bits = 'w8a8'", "bits in {}: expected a list, such as [1, 2], got 'w8a8'"),
        ("keep = ['conv1=8']", "keep in {}: expected a table, got ['conv1=8']"),
        ("effort = 'fast'\nrecipe = 'paper'", "{}: the recipe paper has the published schedule: it takes no effort"),
        ("[benchmark]\nmin-seconds = 2", "did you mean 'min_seconds'?"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_the_words_of_toml(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text(f"model = 'digits'\n{text}\n")
    assert said.format(file) in error("run", "--config", file)


def test_a_wrong_option_on_top_of_a_file_is_not_the_files(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("model = 'digits'\nbatches = [1]\n")
    said = error("run", "--config", file, "--batches", "1,2000000000")
    assert said.startswith("Error: --batches: Input should be less than or equal to 65536")
    assert "some.toml" not in said


@pytest.mark.parametrize(
    ("text", "given", "recipe", "images", "steps"),
    [
        ("recipe = 'paper'", ["--effort", "standard"], "paper", 1024, 1200),
        ("images = 1024\n[finetune]\nsteps = 1200", ["--effort", "fast"], "default", 1024, 1200),
        ("images = 64", ["--effort", "fast"], "default", 64, 0),
    ],
)
def test_what_stands_in_a_file_was_chosen(
    text: str, given: list[str], recipe: str, images: int, steps: int, tmp_path: Path
) -> None:
    file = tmp_path / "some.toml"
    file.write_text(f"model = 'digits'\n{text}\n")
    with main.commands["run"].make_context("run", ["--config", str(file), *given]) as context:
        asked = options.config_of(context, file)
    assert (asked.synthesis.recipe, asked.synthesis.images, asked.finetune.steps) == (recipe, images, steps)


def test_an_effort_that_a_recipe_excludes_is_refused_wherever_the_recipe_stands(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("model = 'digits'\nrecipe = 'paper'\n")
    assert "the recipe paper has the published schedule" in error("run", "--config", file, "--effort", "fast")


def test_another_effort_replaces_what_the_earlier_one_filled_into_run_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = make_config({"model": "digits", "effort": "fast"}).to_toml()
    file.write_text(text.replace("[finetune]\n", "[finetune]\nprocedural = 0.0\n"))  # of earlier versions: ignored
    assert "procedural" in file.read_text()
    with main.commands["run"].make_context("run", ["--config", str(file), "--effort", "standard"]) as context:
        asked = options.config_of(context, file)
    assert asked == RunConfig(model="digits")
