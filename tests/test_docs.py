"""The documents say what the program does."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands_page import PAGE, documented, refreshed
from support import ROOT

import clusterq_deploy
from cli.main import main
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.config.toml import read_settings

README = ROOT / "README.md"
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def test_commands_page_has_the_help_text_of_every_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert documented(text) == ["clusterq", *(f"clusterq {name}" for name in main.commands)]
    assert text == refreshed(text), "docs/commands.md is out of date: python tests/commands_page.py --write"


@pytest.mark.parametrize("page", [PAGE, README], ids=lambda page: page.name)
def test_pages_name_options_that_exist(page: Path) -> None:
    text = re.sub(r"<!-- help: .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.S)
    for command, rest in re.findall(r"clusterq (\w+)([^`\n]*)", text):
        if command in main.commands:
            known = {option for param in main.commands[command].params for option in param.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known | {"--help"}, (command, rest)


def test_readme_names_every_command_and_links_their_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"clusterq (\w+)", text)) == set(main.commands)
    assert "(docs/commands.md)" in text
    assert text.index("make demo") < text.index("make test")


def test_readme_names_python_names_that_exist() -> None:
    calls, block = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    named = {node.attr for node in ast.walk(ast.parse(calls)) if isinstance(node, ast.Attribute)}
    assert named == {"InputSpec", "synthesize", "quantize", "export"}
    assert named <= set(clusterq_deploy.__all__)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "clusterq_deploy":
            assert {alias.name for alias in node.names} <= set(clusterq_deploy.__all__)
    names: dict[str, object] = {}
    exec(block[: block.index("report =")], names)
    assert names["config"] == clusterq_deploy.RunConfig(model="digits")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_works_as_documented(shell: str) -> None:
    assert f"_CLUSTERQ_COMPLETE={shell}_source clusterq" in PAGE.read_text(encoding="utf-8")
    script = CliRunner().invoke(main, [], prog_name="clusterq", env={"_CLUSTERQ_COMPLETE": f"{shell}_source"})
    assert script.exit_code == 0
    assert f"{shell}_complete" in script.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_pinned_unprivileged_and_watched(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    by_name = dict(steps)
    assert re.fullmatch(r"\S+:[\w.-]*\d[\w.-]*", by_name["FROM"]), "the base's tag is pinned"
    assert by_name["USER"] not in {"root", "0"}
    names = [name for name, _ in steps]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in {"RUN", "COPY"})
    required = ', "--require", "tensorrt"' if path.suffix == ".tensorrt" else ""
    assert f'["clusterq", "doctor", "--json"{required}]' in by_name["HEALTHCHECK"]
    assert by_name["STOPSIGNAL"] == "SIGINT"
    assert "PIP_NO_CACHE_DIR=1" in by_name["ENV"]
    assert "XDG_CACHE_HOME=/data/cache " in by_name["ENV"]
    for name, rest in steps:
        if name == "RUN" and "apt-get install" in rest:
            assert "rm -rf /var/lib/apt/lists/*" in rest
    assert ("RUN", "--mount=type=bind,target=/src pip install /src") in [tuple(step) for step in steps]


def test_dockerfiles_are_two_and_build_from_the_files_of_the_wheel() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.tensorrt"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert sent == {*packages, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}


def test_commands_page_has_settings_that_are_read(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "some.toml").write_text(block)
        make_config(read_settings(tmp_path / "some.toml"))
