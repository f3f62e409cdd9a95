"""Which library the package works with: TensorRT, or TensorRT-RTX, whose names are the same."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, get_args

Library = Literal["tensorrt", "tensorrt_rtx"]
RtxTarget = Literal["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]
"""A family of GPUs that TensorRT-RTX builds for, by its compute capability: sm86 is 8.6."""

RTX_TARGETS: tuple[RtxTarget, ...] = get_args(RtxTarget)
RTX_DEFAULT: tuple[RtxTarget, ...] = ("sm80", "sm86", "sm89", "sm120")
TURING: RtxTarget = "sm75"
TITLES: dict[Library, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRAS: dict[Library, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
_LEAST = (10, 3)  # of TensorRT; every TensorRT-RTX has the same names

_RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"  # ONNX Runtime's plugin, which contains the libraries
_RTX_LIBRARIES = "libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"

_in_use: ContextVar[Library] = ContextVar("library", default="tensorrt")


class _Module:
    """The module of the library in use, imported when one of its names is first needed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_import(in_use()), name)


trt: Any = _Module()
"""The library; the rest of the package imports this name."""


def in_use() -> Library:
    """Return the library that `trt` is in this thread: TensorRT, or that of the surrounding `using`."""
    return _in_use.get()


@contextmanager
def using(library: Library) -> Iterator[None]:
    """Make `trt` a library in the block, for this thread."""
    token = _in_use.set(library)
    try:
        yield
    finally:
        _in_use.reset(token)


def library_version(library: Library) -> str:
    """Return the release of an installed library."""
    return str(_import(library).__version__)


def library_problem(library: Library = "tensorrt") -> str | None:
    """Return one line with the reason why a library cannot be imported; None if it can."""
    install = f"pip install 'clusterq-deploy[{_EXTRAS[library]}]'"
    try:
        version = library_version(library)
    except (ImportError, OSError, RuntimeError) as error:  # a shared library is missing, or is for another CUDA
        if isinstance(error, ModuleNotFoundError) and error.name in (library, "tensorrt_rtx_bindings"):
            return f"{library} is not installed: {install}"
        remedy = f"; {install}" if library == "tensorrt_rtx" else ""  # that of TensorRT depends on the driver
        return f"{library} is installed but cannot be imported: {' '.join(str(error).split())}{remedy}"
    if library == "tensorrt" and tuple(map(int, version.split(".")[:2])) < _LEAST:
        return f"tensorrt {version} is too old: install {'.'.join(map(str, _LEAST))} or later"
    return None


def _import(library: Library) -> Any:
    """Return the module of a library.

    TensorRT-RTX is the package `tensorrt_rtx` of NVIDIA's index, or its bindings with the libraries in ONNX Runtime's
    plugin package.
    """
    if library == "tensorrt":
        import tensorrt

        return tensorrt
    if importlib.util.find_spec("tensorrt_rtx"):
        import tensorrt_rtx

        return tensorrt_rtx
    releases = set() if "tensorrt_rtx_bindings" in sys.modules else _load_rtx_libraries()
    import tensorrt_rtx_bindings

    if other := [release for release in releases if not tensorrt_rtx_bindings.__version__.startswith(release)]:
        raise ImportError(f"its bindings are {tensorrt_rtx_bindings.__version__}, its libraries {', '.join(other)}")
    return tensorrt_rtx_bindings


def _load_rtx_libraries() -> set[str]:
    """Load the libraries in ONNX Runtime's plugin package, and return their releases.

    The bindings, which are linked to them, then find them by the names that they carry (DT_SONAME).
    """
    plugin = importlib.util.find_spec(_RTX_PACKAGE)
    folders = (plugin and plugin.submodule_search_locations) or ()
    files = [file for folder in folders for pattern in _RTX_LIBRARIES for file in Path(folder).glob(pattern)]
    for file in files:
        ctypes.CDLL(str(file))
    return {file.name.partition(".so.")[2] for file in files}
