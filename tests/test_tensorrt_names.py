"""Every name that the code asks of TensorRT is there in every release that the project supports.

`data/tensorrt_api.json` has, by release, all public members (`dir()` without underscores) of the classes that
the code uses. The code annotates each TensorRT object with its class; the tests read annotations and names
from the syntax tree. So a name that a release lacks is found with neither TensorRT nor a GPU.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import clusterq_deploy.runtimes.tensorrt

API: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
SOURCES = sorted(Path(clusterq_deploy.runtimes.tensorrt.__file__).parent.glob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_engine_package_uses_only_names_of_every_release() -> None:
    problems = [f"{source.name}:{problem}" for source in SOURCES for problem in name_problems(source.read_text())]
    assert problems == []


def test_tensorrt_is_asked_for_names_by_the_engine_package_alone() -> None:
    """Elsewhere it is imported for what its import does; as `trt` everywhere, which is what the check looks for."""
    root = SOURCES[0].parents[2]
    for source in [path for package in ("calib", "cli", "clusterq_deploy") for path in (root / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "tensorrt", source
            elif isinstance(node, ast.Import):
                names = [own.asname for own in node.names if own.name.partition(".")[0] == "tensorrt"]
                assert set(names) <= ({None, "trt"} if source in SOURCES else {None}), source
            elif isinstance(node, ast.Name):
                assert node.id != "trt" or source in SOURCES, source


def test_the_check_sees_the_names_that_it_is_for() -> None:
    text = "\n".join(source.read_text() for source in SOURCES)
    asked = {name for tree in [ast.parse(text)] for _, name in asked_names(tree)}
    assert {
        "BuilderFlag.VERSION_COMPATIBLE",
        "Builder.build_serialized_network",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.progress_monitor",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "IProgressMonitor",
        "ITimingCache.combine",
        "OnnxParser.parse_from_file",
        "ProfilingVerbosity.DETAILED",
        "Runtime.engine_host_code_allowed",
    } <= asked
    assert len(asked) > 40


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("flag = trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("trt.IInt8MinMaxCalibrator", "IInt8MinMaxCalibrator"),
        ("trt.float16x", "float16x"),
        ("def f(builder: trt.Builder): builder.platform_has_fast_int8", "Builder.platform_has_fast_int8"),
        (
            "def f(engine: 'trt.ICudaEngine | None'): engine.device_memory_size",
            "ICudaEngine.device_memory_size",
        ),
        ("config: trt.IBuilderConfig = make()\nconfig.int8_calibrator = 1", "IBuilderConfig.int8_calibrator"),
        (
            "class R:\n  def __init__(self):\n    self._engine: trt.ICudaEngine = make()\n"
            "  def g(self):\n    self._engine.num_bindings",
            "ICudaEngine.num_bindings",
        ),
        (
            "def f(parser: trt.OnnxParser):\n  def g():\n    parser.supports_model",
            "OnnxParser.supports_model",
        ),
    ],
)
def test_a_removed_name_is_found(code: str, name: str) -> None:
    problems = name_problems(code)
    assert len(problems) == 1
    assert name in problems[0]


@pytest.mark.parametrize(
    "code",
    [
        "builder = trt.Builder(log)",
        "def f(engine: trt.ICudaEngine): shape = engine.get_tensor_shape('x')",
        "def f(builder: trt.Builder): builder.create_network(0).add_input",
    ],
)
def test_what_tensorrt_returns_needs_an_annotation(code: str) -> None:
    assert any("annotation" in problem for problem in name_problems(code))


@pytest.mark.tensorrt
def test_the_installed_release_has_every_name() -> None:
    trt = pytest.importorskip("tensorrt", reason="tensorrt is not installed", exc_type=ImportError)
    text = "\n".join(source.read_text() for source in SOURCES)
    for _, name in asked_names(ast.parse(text)):
        value = trt
        for part in name.split("."):
            value = getattr(value, part)


def name_problems(code: str) -> list[str]:
    """`line: what is wrong` for each use of TensorRT in `code` that not every release can serve."""
    tree = ast.parse(code)
    problems = []
    for line, name in asked_names(tree):
        owner, _, member = name.partition(".")
        lacking = [
            release
            for release, classes in API.items()
            if owner not in classes or (member and member not in classes[owner])
        ]
        if lacking:
            problems.append(f"{line}: trt.{name} is not in {', '.join(lacking)}")
    return problems + [f"{line}: {what} needs an annotation" for line, what in unannotated(tree)]


def asked_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and `Class` or `Class.member` of everything that the code asks of TensorRT."""
    for node, classes in walk(tree):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            owner = trt_name(node.value) or classes.get(ast.unparse(node.value))
            if owner:
                yield node.lineno, f"{owner}.{node.attr}"
            elif own := trt_name(node):
                yield node.lineno, own


def unannotated(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of calls to TensorRT whose result is used without an annotation that says its class."""
    for node, classes in walk(tree):
        if not isinstance(node, ast.Assign | ast.Attribute):
            continue
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            made = trt_name(call.func) is not None
            if made or ast.unparse(call.func.value) in classes:
                yield node.lineno, ast.unparse(call)


def walk(tree: ast.Module) -> Iterator[tuple[ast.AST, dict[str, str]]]:
    """Each node, with the TensorRT class of each annotated variable (`x`, `self._x`) that it can see."""
    attributes = {
        ast.unparse(node.target): owner
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)
        for owner in annotated_class(node.annotation)
    }

    def visit(node: ast.AST, classes: dict[str, str]) -> Iterator[tuple[ast.AST, dict[str, str]]]:
        if isinstance(node, FUNCTIONS):
            classes = classes | local_classes(node)
        yield node, classes
        for child in ast.iter_child_nodes(node):
            yield from visit(child, classes)

    yield from visit(tree, attributes | local_classes(tree))


def local_classes(scope: ast.AST) -> dict[str, str]:
    """TensorRT class of each parameter and annotated variable of a function, or of a module."""
    found = {}
    if isinstance(scope, FUNCTIONS):
        arguments = scope.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation is not None:
                for owner in annotated_class(argument.annotation):
                    found[argument.arg] = owner
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            for owner in annotated_class(node.annotation):
                found[node.target.id] = owner
        if not isinstance(node, FUNCTIONS):
            pending.extend(ast.iter_child_nodes(node))
    return found


def annotated_class(annotation: ast.expr) -> Iterator[str]:
    """`Builder` for `trt.Builder`, `trt.Builder | None`, and either of them in quotes."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    options = [annotation]
    if isinstance(annotation, ast.BinOp):
        options = [annotation.left, annotation.right]
    for option in options:
        if name := trt_name(option):
            yield name


def trt_name(node: ast.AST) -> str | None:
    """`Builder` for the node of `trt.Builder`; None for any other."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
        return None if node.attr.startswith("__") else node.attr
    return None
