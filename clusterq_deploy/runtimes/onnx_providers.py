"""ONNX Runtime's execution providers: their names in the report, their options, and why one does not load."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's name of the provider that a runtime of the report is."""

_WARNING, _FATAL = 2, 4  # of ONNX Runtime's levels of logging; the first is its default

# ONNX Runtime reads it as it is loaded, which is later: a client's machine tells nobody what runs on it
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

RECORD_PLACES = "session.record_ep_graph_assignment_info"
"""Entry of a session's configuration, "1" makes it remember which provider took which node (ONNX Runtime 1.24)."""

Provider = str | tuple[str, dict[str, str]]


def provider_list(runtime: str, graph: Path | bytes, batch: tuple[int, int, int] | None) -> list[Provider]:
    """The providers of a session, as `InferenceSession` takes them.

    TensorRT's is asked for no precision, and so takes the types that stand in the graph, as this project's engines do.
    Its cache of engines is left off: it cannot tell one set of weights from another. What TensorRT does not run is
    CUDA's; ONNX Runtime adds the CPU's itself.

    Args:
        runtime: a key of `PROVIDERS`.
        graph: a file, or the bytes of one.
        batch: smallest, tuned-for and largest batch of an engine; None builds one anew for sizes it has not seen.
    """
    if runtime != "onnxruntime-tensorrt":
        return [PROVIDERS[runtime]]
    return [(PROVIDERS[runtime], batch_profile(graph, batch) if batch else {}), PROVIDERS["onnxruntime-cuda"]]


def batch_profile(graph: Path | bytes, batch: tuple[int, int, int]) -> dict[str, str]:
    """Options of TensorRT's provider for a dynamic batch, (smallest, tuned-for, largest); none for a fixed one.

    Args:
        graph: a file, or the bytes of one; its first input is (N, C, H, W).
        batch: the sizes.
    """
    model = onnx.load_model_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph)
    images = model.graph.input[0]
    first, *rest = images.type.tensor_type.shape.dim
    if first.HasField("dim_value"):
        return {}
    sides = [dimension.dim_value for dimension in rest]
    return {
        f"trt_profile_{which}_shapes": f"{images.name}:{'x'.join(map(str, (size, *sides)))}"
        for which, size in zip(("min", "opt", "max"), batch, strict=True)
    }


@dataclass(frozen=True)
class Placement:
    """How many nodes of a graph a provider took, of how many, and the operators that it left to others."""

    taken: int
    nodes: int
    left: tuple[str, ...]


def placement(session: Any, provider: str) -> Placement | None:
    """How much of its graph a provider took; None where ONNX Runtime is too old to tell.

    Args:
        session: an InferenceSession made with `RECORD_PLACES`.
        provider: ONNX Runtime's name of it.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    by_provider = [
        (part.ep_name == provider, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    left = sorted({operator for taken, operator in by_provider if not taken})
    return Placement(sum(taken for taken, _ in by_provider), len(by_provider), tuple(left))


def load_problem(provider: str) -> str | None:
    """Why the library of a provider that ONNX Runtime was built with does not load; None where it does.

    For after a session that did without it: the library expects that ONNX Runtime has begun to load it.
    """
    import onnxruntime

    short = provider.removesuffix("ExecutionProvider").lower()
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{short}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if own := re.search(r"libnvinfer\.so\.(\d+)", str(error)):  # another major release does not do
            return f"{error}; it needs TensorRT {own[1]}: pip install 'tensorrt=={own[1]}.*'"
        return f"{error}; install what it needs (onnxruntime.ai, Execution Providers)"
    return None


@contextmanager
def quiet_logger() -> Iterator[None]:
    """Keep ONNX Runtime from writing to stderr what stands in an error already; then its default level again."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
