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
from clusterq_deploy.config import RunConfig
from clusterq_deploy.errors import ConfigError
from clusterq_deploy.quantize import BitWidths

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


def test_colours_are_switched_off_and_on_by_the_environment() -> None:
    coloured = re.compile(r"\x1b\[[\d;]*3\dm")
    assert coloured.search(process("doctor", FORCE_COLOR="1").stdout)
    assert not coloured.search(process("doctor", FORCE_COLOR="1", NO_COLOR="1").stdout)


def test_verbose_logs_to_stderr_alone(tmp_path: Path) -> None:
    settings = tmp_path / "small.toml"
    settings.write_text(tomli_w.dumps(SMALL))
    done = process("--verbose", "synthesize", "digits", "--config", settings, "--out", tmp_path / "out", "--json")
    assert "INFO clusterq_deploy.run: stage synthesize" in done.stderr
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
        if default is None or param.name not in options._PLACES:
            continue
        value = config
        for part in options._PLACES[param.name]:
            value = value[part]
        if value is not None:
            shown = default[1].split(", ") if param.multiple else param.type.convert(default[1], param, None)
            assert (list(shown) if isinstance(value, list) else shown) == value, param.name
            seen += 1
    assert seen >= 7
