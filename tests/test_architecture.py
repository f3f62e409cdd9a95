"""Imports flow one way, and the command line starts without heavy libraries."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from support import ROOT, run_python

from clusterq_deploy import RunConfig
from clusterq_deploy.pipeline import stages
from clusterq_deploy.runtimes.tensorrt import BuildConfig

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
"""The modules and packages of `clusterq_deploy`, from the ground up."""
FOREIGN = {
    "calib": {"click", "rich", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "tensorrt"},
    "clusterq_deploy": {"click", "rich"},
}


def imports(file: Path) -> set[str]:
    """Return the dotted names of what a file imports, anywhere in it: modules, and names from modules."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        packages = {name.partition(".")[0] for name in imports(file)}
        assert not (packages & set(ALLOWED)) - ALLOWED[package], file
        assert not packages & FOREIGN.get(package, set()), file


def test_modules_import_from_their_floor_and_those_below() -> None:
    library = ROOT / "clusterq_deploy"
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    modules = {path.stem for path in library.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules - {"__init__"} == set(floor)
    climbing = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted(library.rglob("*.py"))
        if file != library / "__init__.py"
        for package, _, name in (imported.partition(".") for imported in imports(file))
        if package == "clusterq_deploy"
        and floor.get(name.partition(".")[0], 0) > floor[file.relative_to(library).parts[0].removesuffix(".py")]
    ]
    assert not climbing


def test_architecture_page_names_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    documented = {int(number): tuple(re.findall(r"`(\w+)`", names)) for number, names in rows}
    assert documented == dict(enumerate(FLOORS, start=1))


def test_stages_are_all_in_the_table_and_on_the_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    modules = [importlib.import_module(f"clusterq_deploy.stages.{file.stem}") for file in STAGES.glob("[a-z]*.py")]
    kinds = {module.NAME: module for module in modules if hasattr(module, "NAME")}
    table = stages(RunConfig(model="digits", bits=("w4a4",), build=BuildConfig(rtx=("sm86",))))
    assert {stage.kind.NAME for stage in table} == kinds.keys() - {"sensitivity"}  # quantize runs it if it needs it
    assert all(stage.kind is kinds[stage.kind.NAME] for stage in table)
    for stage in table:
        assert re.search(rf"\b{stage.name.replace('w4a4', 'V')}\b|\b{stage.kind.NAME}/V\b", page), stage.name


def test_library_does_not_print() -> None:
    for package in ("calib", "clusterq_deploy"):
        for file in (ROOT / package).rglob("*.py"):
            names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
            assert "print" not in names, file


def test_help_imports_only_click() -> None:
    """What makes it answer at once: of what is installed, the command line imports only click."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(sorted(loaded), file=sys.stderr)"
    )
    done = run_python("-c", script)
    assert "Usage: " in done.stdout
    assert done.stderr.strip() == "['cli', 'click']"
