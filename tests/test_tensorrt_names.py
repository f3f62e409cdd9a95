"""Every name that the code asks of TensorRT is there in every release that the project supports.

`data/tensorrt_api.json` has, by release, all public members (`dir()` without underscores) of the classes that
the code uses. The code annotates each TensorRT object with its class; the tests read annotations and names
from the syntax tree. So a name that a release lacks is found with neither TensorRT nor a GPU.
"""

import ast
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from tensorrt_double import API, LATER, RTX_ONLY

import clusterq_deploy.runtimes.tensorrt
from clusterq_deploy.runtimes.tensorrt.library import Library, library_problem, trt, using

PACKAGE = Path(clusterq_deploy.runtimes.tensorrt.__file__).parent
TEXTS = {source: source.read_text() for source in sorted(PACKAGE.glob("*.py"))}
RTX_NAMES = RTX_ONLY | {"ComputeCapability"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_engine_package_uses_only_names_of_every_release() -> None:
    problems = [f"{source.name}:{problem}" for source, text in TEXTS.items() for problem in name_problems(text)]
    assert problems == []


def test_only_the_engine_package_uses_names_of_tensorrt() -> None:
    """It imports it in one place, and calls it `trt` everywhere; others import it for what its import does."""
    root = PACKAGE.parents[2]
    importing = set()
    for source in [path for package in ("calib", "cli", "clusterq_deploy") for path in (root / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "tensorrt", source
            elif isinstance(node, ast.Import) and "tensorrt" in [alias.name.partition(".")[0] for alias in node.names]:
                assert {alias.asname for alias in node.names} == {None}, source
                importing.add(source)
            elif isinstance(node, ast.Name):
                assert node.id != "trt" or source in TEXTS, source
    assert importing & set(TEXTS) == {PACKAGE / "library.py"}


def test_asked_names_finds_every_kind_of_name() -> None:
    asked = {name for text in TEXTS.values() for _, name in asked_names(ast.parse(text))}
    assert {
        "BuilderFlag.VERSION_COMPATIBLE",
        "Builder.build_serialized_network",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.progress_monitor",
        "ICudaEngine.create_engine_inspector",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "IProgressMonitor",
        "ITimingCache.combine",
        "OnnxParser.parse_from_file",
        "ProfilingVerbosity.DETAILED",
        "Runtime.engine_host_code_allowed",
    } <= asked
    assert len(asked) > 75


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("flag = trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("trt.IInt8MinMaxCalibrator", "IInt8MinMaxCalibrator"),
        ("trt.float16x", "float16x"),
        ("def f(builder: trt.Builder): builder.platform_has_fast_int8", "Builder.platform_has_fast_int8"),
        ("def f(engine: 'trt.ICudaEngine | None'): engine.device_memory_size", "ICudaEngine.device_memory_size"),
        ("config: trt.IBuilderConfig = make()\nconfig.int8_calibrator = 1", "IBuilderConfig.int8_calibrator"),
        (
            "class R:\n  def __init__(self):\n    self._engine: trt.ICudaEngine = make()\n"
            "  def g(self):\n    self._engine.num_bindings",
            "ICudaEngine.num_bindings",
        ),
        ("def f(parser: trt.OnnxParser):\n  def g():\n    parser.supports_model", "OnnxParser.supports_model"),
    ],
)
def test_name_problems_names_a_removed_name(code: str, name: str) -> None:
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
def test_name_problems_requires_annotations_of_results(code: str) -> None:
    assert any("annotation" in problem for problem in name_problems(code))


@pytest.mark.parametrize("library", [pytest.param("tensorrt", marks=pytest.mark.tensorrt), "tensorrt_rtx"])
def test_installed_release_has_every_name(library: Library) -> None:
    if problem := library_problem(library):
        pytest.skip(problem)
    names = {name for text in TEXTS.values() for _, name in asked_names(ast.parse(text))}
    with using(library):
        for name in names if library == "tensorrt_rtx" else names - RTX_NAMES - LATER:
            attrgetter(name)(trt)


def test_later_names_are_in_the_newest_release_and_not_in_the_oldest() -> None:
    releases = list(API.values())
    for name in LATER:
        owner, _, member = name.partition(".")
        assert member not in releases[0][owner]
        assert member in releases[-1][owner]


def name_problems(code: str) -> list[str]:
    """Return `line: what is wrong` for each use of TensorRT in `code` that not every release can serve."""
    tree = ast.parse(code)
    problems = [f"{line}: {call} needs an annotation" for line, call in unannotated(tree)]
    for line, name in asked_names(tree):
        owner, _, member = name.partition(".")
        for release, classes in () if name in RTX_NAMES | LATER else API.items():
            if owner not in classes or (member and member not in classes[owner]):
                problems.append(f"{line}: trt.{name} is not in every release: {release}")
                break
    return problems


def asked_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and `Class` or `Class.member` of everything that the code asks of TensorRT."""
    for node, classes in walk(tree):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            owner = trt_name(node.value) or classes.get(ast.unparse(node.value))
            if name := f"{owner}.{node.attr}" if owner else trt_name(node):
                yield node.lineno, name


def unannotated(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of calls to TensorRT whose result is used without an annotation that says its class."""
    for node, classes in walk(tree):
        call = node.value if isinstance(node, ast.Assign | ast.Attribute) else None
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and (trt_name(call.func) or ast.unparse(call.func.value) in classes)
        ):
            yield call.lineno, ast.unparse(call)


def walk(tree: ast.Module) -> Iterator[tuple[ast.AST, dict[str, str]]]:
    """Yield each node, with the TensorRT class of each annotated variable (`x`, `self._x`) that it can see."""

    def visit(node: ast.AST, classes: dict[str, str]) -> Iterator[tuple[ast.AST, dict[str, str]]]:
        if isinstance(node, FUNCTIONS):
            classes = classes | annotated(node)
        yield node, classes
        for child in ast.iter_child_nodes(node):
            yield from visit(child, classes)

    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    of_self = {ast.unparse(n.target): annotated_class(n) for n in attributes if isinstance(n.target, ast.Attribute)}
    yield from visit(tree, {name: owner for name, owner in of_self.items() if owner} | annotated(tree))


def annotated(scope: ast.AST) -> dict[str, str]:
    """Return the TensorRT class of each parameter and annotated variable of a function, or of a module."""
    classes = {}
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.AnnAssign | ast.arg) and (owner := annotated_class(node)):
            classes[node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)] = owner
        if not isinstance(node, FUNCTIONS):
            pending.extend(ast.iter_child_nodes(node))
    return classes


def annotated_class(node: ast.AnnAssign | ast.arg) -> str | None:
    """Return `Builder` for an annotation `trt.Builder`, `trt.Builder | None`, or either of them in quotes."""
    annotation = node.annotation
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return trt_name(annotation.left) or trt_name(annotation.right)
    return trt_name(annotation)


def trt_name(node: ast.AST | None) -> str | None:
    """Return `Builder` for the node of `trt.Builder`; None for any other."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
        return None if node.attr.startswith("__") else node.attr
    return None
