"""Models saved by `torch.export.save`: read without running code from the file.

`torch.export.load` evaluates the file's size expressions, calls whatever function of torch a node names, and falls back
to full pickles; a file is therefore looked through first, and refused if it holds anything but tensors and a graph of
ATen operations.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from clusterq_deploy.errors import ModelError
from clusterq_deploy.models.weights import first_line

_ENTRY = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.data/\w+|extra/[^/]*|models/[^/]+\.json"
    r"|data/(weights|constants)/[^/]+|data/sample_inputs/[^/]+)"
)
_OPERATION = re.compile(r"torch\.ops\.(aten|torchvision)\.\w+\.\w+|_operator\.\w+|torch\.sym_\w+")
_TERMS = {
    "Abs", "Add", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "FloorDiv", "FloorToInt", "Float", "Ge", "Gt", "Identity",
    "Integer", "IntTrueDiv", "Le", "Lt", "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Piecewise", "Pow",
    "PythonMod", "Rational", "Symbol", "TruncToInt", "Where",
}  # fmt: skip
"""What torch writes size expressions with."""
_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Pow, ast.Mod,
)  # fmt: skip


def load_exported(path: Path) -> tuple[fx.GraphModule, tuple[int, int, int]]:
    """Read a program that `torch.export.save` wrote: images (N, C, H, W) to logits.

    Returns:
        A module that runs it, and the size (channels, height, width) of an image. Its `meta["batch"]` is the only
        number of images that it was exported for, None for any number.

    Raises:
        ModelError: the file is missing or damaged, holds more than tensors and ATen operations, or its program does
            not map one tensor to one tensor.
    """
    if not path.is_file():
        raise ModelError(f"model {str(path)!r}: there is no such file; expected one of torch.export.save")
    try:
        _require_inert(path)
        program = torch.export.load(path)
    except ModelError:
        raise
    except Exception as error:  # damage shows wherever the parser meets it
        raise ModelError(
            f"cannot read {str(path)!r} ({first_line(error)}); expected a file of torch.export.save"
        ) from error
    module = program.module(check_guards=False)
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor) or inputs[0].dim() != 4:
        raise ModelError(f"model {str(path)!r} has {len(inputs)} inputs; expected one, images (N, C, H, W)")
    batch, *size = inputs[0].shape
    if any(not isinstance(side, int) for side in size):
        raise ModelError(f"model {str(path)!r} was exported for images of several sizes; export it for one")
    plain = fx.GraphModule(module, module.graph)  # that of torch.export has no eval()
    plain.meta["batch"] = batch if isinstance(batch, int) else None
    channels, height, width = size
    return plain, (channels, height, width)


def _require_inert(path: Path) -> None:
    """Raise ModelError if reading a program could run something that its file says."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not _ENTRY.fullmatch(name):
                raise _refused(path, f"an entry {name!r}")
            if "/data/sample_inputs/" in name:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            elif name.endswith(".json"):
                for key, value in _entries(json.loads(archive.read(name))):
                    if key == "use_pickle" and value:
                        raise _refused(path, "pickled objects")
                    if key == "target" and not _OPERATION.fullmatch(str(value)):
                        raise _refused(path, f"a call of {value}")
                    if key == "expr_str" and not _is_size(str(value)):
                        raise _refused(path, f"a size {value!r}")
                    if key == "as_custom_obj" or (key == "as_graph" and value):
                        raise _refused(path, "objects or nested graphs")


def _refused(path: Path, what: str) -> ModelError:
    return ModelError(f"refused to load {str(path)!r}: it holds {what}, but only tensors and ATen operations are read")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys of nested JSON objects with their values."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _is_size(expression: str) -> bool:
    """Return whether an expression only adds, multiplies, divides and compares numbers and sizes."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except SyntaxError:
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    called = all(isinstance(node.func, ast.Name) for node in nodes if isinstance(node, ast.Call))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    plain = all(re.fullmatch(r"\w+", text) for text in texts)
    return called and plain and names <= _TERMS and all(isinstance(node, _NODES) for node in nodes)
