"""Imports flow one way, and the command line starts without heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
