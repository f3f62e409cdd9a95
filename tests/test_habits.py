"""What people expect of any command: near matches, quiet pipes, colours on demand, logs, defaults in the help."""

import json
import pickle
import re
from pathlib import Path

import click
import pytest
import tomli_w
from support import call, error_line, run_python

from cli import options
from cli.main import main
from clusterq_deploy.config.run_config import RunConfig, make_config
from clusterq_deploy.config.toml import PLACES, put, read_settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of settings that is not written yet."""
    return tmp_path / "some.toml"


def config_of(*arguments: object) -> RunConfig:
    """Return the configuration that `clusterq run` makes of its arguments."""
    with main.commands["run"].make_context("run", [str(argument) for argument in arguments]) as context:
        return options.config_of(context, context.params["config_file"])


def test_commands_offer_near_matches_of_misspelled_names(file: Path) -> None:
    file.write_text("[finetune]\nstep = 3\n")
    assert "Did you mean 'benchmark'?" in error_line("bench")
    assert "id you mean" not in error_line("zzzzzz")
    assert re.search("id you mean .*'--bits'", error_line("run", "digits", "--bitts", "w4a4"))
    assert "did you mean resnet18" in error_line("run", "resnet-18")
    assert "did you mean w8a8?" in error_line("run", "digits", "--bits", "int8", "--out", file.parent / "out")
    assert "did you mean 'steps'?" in error_line("run", "digits", "--config", file)
    assert "'standard'" in error_line("run", "digits", "--effort", "standart")


def test_main_refuses_unknown_options_in_one_line() -> None:
    assert error_line("--bogus").startswith("Error: No such option '--bogus'")
    assert "'--verbose'" in error_line("--verbos", "models")
    assert error_line("-x", "models").startswith("Error: No such option '-x'")


def test_run_says_where_options_of_the_tool_go() -> None:
    for name in ("--quiet", "-q", "--verbose", "--version"):
        said = f"No such option '{name}' of run: it comes before the command, clusterq {name} run "
        assert said in error_line("run", "digits", name)
    assert "before the command" not in error_line("run", "digits", "--quite")


@pytest.mark.parametrize("forms", [("--csv", "--markdown"), ("--json", "--csv"), ("--markdown", "--json")])
@pytest.mark.parametrize("more", [(), ("--compare",)])
def test_report_refuses_two_forms(forms: tuple[str, str], more: tuple[str, ...]) -> None:
    line = error_line("report", "run", *more, *forms)
    assert "exclude each other" in line
    assert all(form in line for form in forms)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (MemoryError("Unable to allocate 9.31 GiB"), "Unable to allocate 9.31 GiB"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("CUDA error: out of memory\nand more"), "CUDA error: out of memory and more"),
        (RuntimeError("shapes do not fit"), None),
    ],
)
def test_main_reports_lack_of_memory_in_one_line_and_raises_unknown_errors(
    failure: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise failure

    monkeypatch.setattr("clusterq_deploy.models.available_models", fail)
    if said is None:
        assert call("models").exception is failure
    else:
        line = error_line("models")
        assert line.startswith("Error: not enough memory; ")
        assert line.endswith(f"({said})")


def test_run_refuses_a_plain_pickle_in_one_line(tmp_path: Path) -> None:
    weights = tmp_path / "evil.pth"
    weights.write_bytes(pickle.dumps({"x": Path()}, protocol=4))
    done = run_python("-m", "cli", "run", "digits", "--weights", weights, "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: refused to load ")


PRINTING = """
import torch
from torch import nn

print("at import")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        print("in the forward pass")
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))

def make():
    print("in the factory")
    return Net()

if __name__ == "__main__":
    torch.save({"state_dict": {f"model.{key}": value for key, value in Net().state_dict().items()}}, "net.pth")
"""


def test_stdout_is_the_commands_own_and_stderr_says_which_weights_were_taken(tmp_path: Path) -> None:
    folder = tmp_path / "my models, all: 2"
    folder.mkdir()
    (folder / "net.py").write_text(PRINTING)
    run_python("net.py", cwd=folder)
    named = ("--input-size", "3,8,8", "--mean", "0.5,0.5,0.5", "--std", "1,1,1", "--weights", "net.pth:state_dict")
    arguments = ("-m", "cli", "run", "net.py:make", *named, "--out", "a run, and: more", "--dry-run")
    done = run_python(*arguments, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "a run, and: more"
    for said in ("at import", "in the factory", "in the forward pass"):
        assert said in done.stderr
    assert "Weights in net.pth: took state_dict; stripped model." in done.stderr.splitlines()
    table = run_python(*arguments, cwd=folder)
    assert "nothing was done or written" in table.stdout
    assert "in the factory" not in table.stdout


@pytest.mark.slow
def test_output_in_a_pipe_is_only_json_and_plain_tables(settings: Path, tmp_path: Path) -> None:
    arguments = ("synthesize", "digits", "--config", settings, "--out", tmp_path / "out", "--json")
    done = run_python("-m", "cli", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["images"] == 80
    logged = run_python("-m", "cli", "--verbose", *arguments)
    assert "INFO clusterq_deploy.run.run: stage synthesize" in logged.stderr
    json.loads(logged.stdout)
    listing = run_python("-m", "cli", "models", COLUMNS="40")
    assert "\x1b" not in listing.stdout
    assert "no: cannot be used" in listing.stdout  # not cut or folded to a terminal's width


@pytest.mark.slow
def test_doctor_colours_follow_force_color_and_no_color() -> None:
    coloured = re.compile(r"\x1b\[[\d;]*3\dm")
    assert coloured.search(run_python("-m", "cli", "doctor", FORCE_COLOR="1").stdout)
    assert not coloured.search(run_python("-m", "cli", "doctor", FORCE_COLOR="1", NO_COLOR="1").stdout)


def test_help_has_the_default_of_every_option_with_a_value() -> None:
    """A file's settings stand under the options, so that click knows of none: the help text says them."""
    without = {"config_file", "keep", "input_size", "mean", "std"}
    for command in main.commands.values():
        for param in command.params:
            if isinstance(param, click.Option) and not param.is_flag and param.name not in without:
                assert "[default: " in str(param.help), (command.name, param.name)


def test_help_has_the_defaults_of_run_config() -> None:
    settings: dict[str, object] = {"model": "digits"}
    for param in main.commands["run"].params:
        default = re.search(r"\[default: (\S+|w8a8, w4a4)\]", getattr(param, "help", None) or "")
        if default and param.name in PLACES and default[1] != "all":
            value = default[1].split(", ") if param.multiple else param.type.convert(default[1], param, None)
            put(settings, PLACES[param.name], value)
    assert len(settings) >= 7
    assert make_config(settings) == RunConfig(model="digits")


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
    "same_capability": ([], True),
    "build_route": (["-fuse=off"], "-fuse=off"),
    "rtx": (["sm86,sm89"], ["sm86", "sm89"]),
    "batches": (["1,8"], [1, 8]),
    "threads": (["2"], 2),
}


@pytest.mark.parametrize("name", GIVEN)
def test_read_settings_accepts_the_names_of_options(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, written = GIVEN[name]
    asked, file = config_of("digits", f"--{name.replace('_', '-')}", *words), Path("some.toml")
    assert asked != RunConfig(model="digits")
    for spelled in (name, name.replace("_", "-")):
        setting = {spelled: written}
        for content in (setting, {PLACES[name][0]: setting}) if len(PLACES[name]) > 1 else (setting,):
            file.write_text(tomli_w.dumps({"model": "digits", **content}))
            assert make_config(read_settings(file)) == asked


def test_given_has_every_option_that_is_a_setting() -> None:
    params = {param.name for command in main.commands.values() for param in command.params}
    assert {"model", *GIVEN} == set(PLACES) <= params


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("workspace = '1GiB'\n[build]\nworkspace_bytes = 4096", "workspace and build.workspace_bytes in {}"),
        ("first-last = true\nfirst_last = true", "first-last and first_last in {}"),
        ("build = 3\nbatch = [1, 2, 3]", "build in {}: expected a table, got 3"),
        ("batchs = 3", "did you mean 'benchmark.batches'?"),
        ("first_lst = true", "did you mean 'first_last'?"),
        ("imges = 3", "did you mean 'synthesis.images'?"),
        ("[build]\nimages = 3", "did you mean 'synthesis.images'?"),
        ("[benchmark]\nmin-seconds = 2", "did you mean 'min_seconds'?"),
        ("threads = true", "benchmark.threads in {}: expected a number, got True"),
        ("batches = [true, 2]", "benchmark.batches in {}: expected a number, got [True, 2]"),
        ("limit = true", "limit in {}: expected a number, got True"),
        ("seed = '7'", "seed in {}: expected a number, not a text, got '7'"),
        ("first-last = 'yes'", "first_last in {}: expected true or false, not a text, got 'yes'"),
        ("fp16 = 1", "fp16 in {}: expected true or false, got 1"),
        ("bits = 'w8a8'", "bits in {}: expected a list, such as [1, 2], got 'w8a8'"),
        ("keep = ['conv1=8']", "keep in {}: expected a table, got ['conv1=8']"),
        ("effort = 'fast'\nrecipe = 'paper'", "{}: the recipe paper has the published schedule: it accepts no effort"),
    ],
)
def test_run_refuses_wrong_settings_of_a_file_in_words_of_toml(text: str, said: str, file: Path) -> None:
    file.write_text(f"model = 'digits'\n{text}\n")
    assert said.format(file) in error_line("run", "--config", file)


def test_run_blames_a_wrong_option_and_not_the_file(file: Path) -> None:
    file.write_text("model = 'digits'\nbatches = [1]\n")
    said = error_line("run", "--config", file, "--batches", "1,2000000000")
    assert said.startswith("Error: --batches: Input should be less than or equal to 65536")
    assert "some.toml" not in said
    file.write_text("model = 'digits'\nrecipe = 'paper'\n")
    assert "the recipe paper has the published schedule" in error_line("run", "--config", file, "--effort", "fast")


@pytest.mark.parametrize(
    ("text", "effort", "recipe", "images", "steps"),
    [
        ("recipe = 'paper'", "standard", "paper", 1024, 1200),
        ("images = 1024\n[finetune]\nsteps = 1200", "fast", "default", 1024, 1200),
        ("images = 64", "fast", "default", 64, 0),
    ],
)
def test_effort_fills_in_only_what_a_file_does_not_set(
    text: str, effort: str, recipe: str, images: int, steps: int, file: Path
) -> None:
    file.write_text(f"model = 'digits'\n{text}\n")
    config = config_of("--config", file, "--effort", effort)
    assert (config.synthesis.recipe, config.synthesis.images, config.finetune.steps) == (recipe, images, steps)


def test_effort_option_replaces_the_effort_of_run_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = make_config({"model": "digits", "effort": "fast", "seed": 0}).to_toml()
    assert text == 'model = "digits"\nseed = 0\neffort = "fast"\n'
    file.write_text(f"{text}\n[finetune]\nprocedural = 0.0\n")  # of earlier versions: ignored
    assert config_of("--config", file, "--effort", "standard") == RunConfig(model="digits")
