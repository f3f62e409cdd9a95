"""Imports flow one way, and the command line starts without heavy libraries."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "calib": {"calib"},
    "clusterq_deploy": {"calib", "clusterq_deploy"},
    "cli": {"calib", "clusterq_deploy", "cli"},
}
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


def test_the_library_does_not_print() -> None:
    for package in ("calib", "clusterq_deploy"):
        for file in (ROOT / package).rglob("*.py"):
            calls = [n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], file


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cli", "--help"], capture_output=True, cwd=ROOT, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3
