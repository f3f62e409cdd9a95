"""Imports flow one way, and the command line starts without heavy libraries."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clusterq_deploy import RunConfig
from clusterq_deploy.pipeline import stages

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "clusterq_deploy/stages"
ALLOWED = {
    "calib": {"calib"},
    "clusterq_deploy": {"calib", "clusterq_deploy"},
    "cli": {"calib", "clusterq_deploy", "cli"},
}
FLOORS = (
    ("results", "errors", "environment", "files", "oom", "version"),
    ("models", "quantization", "runtimes"),
    ("lowering", "evaluation"),
    ("config", "run"),
    ("stages", "report"),
    ("pipeline", "plan", "api"),
)
"""Of `clusterq_deploy`, from the ground up: modules and packages import from their own floor and those below it."""
FOREIGN = {
    "calib": {"click", "rich", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorrt"},
    "clusterq_deploy": {"click", "rich"},
}


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_flow_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        own = imported(file)
        assert not (own & set(ALLOWED)) - ALLOWED[package], file
        assert not own & FOREIGN.get(package, set()), file


def of_the_library(file: Path) -> set[str]:
    """The modules and packages right under `clusterq_deploy` that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            package, *below = str(node.module).split(".")
            if package == "clusterq_deploy":
                found |= {below[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("clusterq_deploy.")}
    return found


def test_no_import_climbs() -> None:
    library = ROOT / "clusterq_deploy"
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    places = {path.stem for path in library.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert places - {"__init__"} == set(floor)
    climbing = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted(library.rglob("*.py"))
        if file.parent != library or file.stem != "__init__"
        for name in of_the_library(file) & set(floor)
        if floor[name] > floor[file.relative_to(library).parts[0].removesuffix(".py")]
    ]
    assert not climbing


def test_the_page_has_the_floors_of_the_code() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    told = {int(number): tuple(re.findall(r"`(\w+)`", names)) for number, names in rows}
    assert told == dict(enumerate(FLOORS, start=1))


def test_every_stage_is_in_the_table_and_on_the_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    modules = [importlib.import_module(f"clusterq_deploy.stages.{file.stem}") for file in STAGES.glob("[a-z]*.py")]
    kinds = {module.NAME: module for module in modules if hasattr(module, "NAME")}
    table = stages(RunConfig(model="digits", bits=("w4a4",)))
    assert {stage.kind.NAME for stage in table} == set(kinds) - {
        "sensitivity"
    }  # which quantize asks for if it needs it
    assert all(stage.kind is kinds[stage.kind.NAME] for stage in table)
    for stage in table:
        assert re.search(rf"\b{stage.name.replace('w4a4', 'V')}\b|\b{stage.kind.NAME}/V\b", page), stage.name


def test_the_library_does_not_print() -> None:
    for package in ("calib", "clusterq_deploy"):
        for file in (ROOT / package).rglob("*.py"):
            calls = [n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], file


def test_help_loads_click_and_nothing_else() -> None:
    """What makes it answer at once: of what is installed, the command line loads click alone."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(sorted(loaded), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Usage: " in done.stdout
    assert done.stderr.strip() == "['cli', 'click']"
