"""A common interface to run a model, images to logits, in torch and in ONNX Runtime's providers."""

import ctypes
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from clusterq_deploy.errors import ExportError

Array = npt.NDArray[np.float32]
Provider = str | tuple[str, dict[str, str]]

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's name for the provider behind a runtime of the report."""

_WARNING, _FATAL = 2, 4  # ONNX Runtime's logging levels; the first is its default

# ONNX Runtime reads it when it is imported, which is later
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class Runner(Protocol):
    """Executes one model. Runners are context managers that free their memory at the end."""

    runtime: str
    """The runtime's name in the report: torch, tensorrt or a key of `PROVIDERS`."""

    def infer(self, images: Array) -> Array:
        """Return logits (N, classes) float32 of images (N, C, H, W) float32, normalized."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class TorchRunner(Runner):
    """Runs a torch model in eval mode, on the device that its parameters are on."""

    runtime = "torch"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def infer(self, images: Array) -> Array:
        """Return logits (N, classes) float32 of images (N, C, H, W) float32, normalized."""
        logits: Array = self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return logits


@dataclass(frozen=True)
class Placement:
    """How many of a graph's nodes a provider took, and the operators that it did not take."""

    taken: int
    nodes: int
    left: tuple[str, ...]


class OnnxRunner(Runner):
    """Runs an ONNX graph in ONNX Runtime, with its default session options.

    Args:
        graph: a file, or the bytes of one.
        runtime: a key of `PROVIDERS`.
        threads: threads of the CPU provider; None leaves the choice to ONNX Runtime.
        optimized: False executes the operators as they are written, for a reference, and for TensorRT's provider.
        write_optimized: where to write ONNX Runtime's optimized graph, which is for this machine only.
        batch: smallest, optimal and largest batch of an engine of TensorRT's provider; None builds an engine for each
            new size.

    Raises:
        ExportError: ONNX Runtime cannot load the graph, or the provider's libraries.
    """

    def __init__(
        self,
        graph: Path | bytes,
        *,
        runtime: str = "onnxruntime-cpu",
        threads: int | None = None,
        optimized: bool = True,
        write_optimized: Path | None = None,
        batch: tuple[int, int, int] | None = None,
    ) -> None:
        import onnxruntime

        self.runtime = runtime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL  # it also raises what it logs as an error
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if runtime != "onnxruntime-cpu":  # record which provider takes which node, since ONNX Runtime 1.24
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if write_optimized is not None:
            options.optimized_model_filepath = str(write_optimized)
        self._session = _open_session(graph, options, runtime, batch)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def infer(self, images: Array) -> Array:
        """Return logits (N, classes) float32 of images (N, C, H, W) float32, normalized. Raises as `outputs` does."""
        return next(iter(self.outputs(images).values()))

    def outputs(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        """Return all outputs of the graph for images (N, C, H, W) float32, by name.

        Raises:
            ExportError: the provider cannot run the graph, or not on these images.
        """
        try:
            return dict(zip(self._outputs, self._session.run(None, {self._input: images}), strict=True))
        except Exception as error:  # a provider that builds its engine at the first call can fail here
            raise ExportError(f"{self.runtime} cannot run the graph: {_first_line(error)}") from error

    def metadata(self) -> dict[str, str]:
        """Return the exporter's entries in the graph."""
        entries: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return entries

    def placement(self) -> Placement | None:
        """Return how much of the graph this runner's provider took; None if ONNX Runtime is too old to report it."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return None
        nodes = [
            (part.ep_name == PROVIDERS[self.runtime], node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        left = sorted({operator for taken, operator in nodes if not taken})
        return Placement(sum(taken for taken, _ in nodes), len(nodes), tuple(left))

    @property
    def input_shape(self) -> tuple[int | None, int, int, int]:
        """(batch, channels, height, width) of the input; the batch is None if any is accepted.

        Raises:
            ExportError: the input is not images with fixed channels, height and width.
        """
        shape = self._session.get_inputs()[0].shape
        if len(shape) != 4 or not all(isinstance(side, int) for side in shape[1:]):
            raise ExportError(
                f"the input {self._input} has shape {shape}; expected images with a fixed size, except for the batch"
            )
        batch, channels, height, width = shape
        return batch if isinstance(batch, int) else None, channels, height, width

    @property
    def classes(self) -> int:
        """The width of the logits."""
        return int(self._session.get_outputs()[0].shape[-1])

    def __exit__(self, *_: object) -> None:
        del self._session


def _open_session(graph: Path | bytes, options: Any, runtime: str, batch: tuple[int, int, int] | None) -> Any:
    """Return an InferenceSession in the runtime's provider, which ONNX Runtime may skip without an error."""
    import onnxruntime

    model, name = (graph, "the graph") if isinstance(graph, bytes) else (str(graph), str(graph))
    provider, on_gpu = PROVIDERS[runtime], runtime != "onnxruntime-cpu"
    if provider not in onnxruntime.get_available_providers():
        raise ExportError(f"this ONNX Runtime has no {provider}; install onnxruntime-gpu, or use the CPU")
    if runtime == "onnxruntime-tensorrt":
        with suppress(ImportError, OSError):  # the wheel loads the libraries that the provider needs
            import tensorrt  # noqa: F401
    if on_gpu:
        onnxruntime.set_default_logger_severity(_FATAL)  # it would write to stderr what the error says
    try:
        # with its fallback ONNX Runtime would continue without the provider, and print that to stdout
        providers = provider_list(runtime, graph, batch)
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions have no public base
        if on_gpu and (problem := load_problem(provider)) is not None:
            raise ExportError(f"ONNX Runtime has no working {provider} here: {problem}") from error
        raise ExportError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from error
    finally:
        if on_gpu:
            onnxruntime.set_default_logger_severity(_WARNING)
    if provider not in session.get_providers():
        problem = load_problem(provider) or "its libraries load, but it does not start; is there an NVIDIA GPU?"
        raise ExportError(f"ONNX Runtime has no working {provider} here: {problem}")
    return session


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def provider_list(runtime: str, graph: Path | bytes, batch: tuple[int, int, int] | None) -> list[Provider]:
    """Return the providers of a session, as `InferenceSession` accepts them.

    TensorRT's uses the types of the graph, as this project's engines do, and a profile of (smallest, optimal, largest)
    `batch` if the graph's is dynamic. Its cache of engines is off: it ignores a change of the weights. Nodes that
    TensorRT does not take go to CUDA; ONNX Runtime adds the CPU.
    """
    provider = PROVIDERS[runtime]
    if runtime != "onnxruntime-tensorrt":
        return [provider]
    options = {}
    if batch is not None:
        model = onnx.load_model_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph)
        images = model.graph.input[0]
        first, *rest = images.type.tensor_type.shape.dim
        size = "x".join(str(dimension.dim_value) for dimension in rest)
        if not first.HasField("dim_value"):
            shapes = {name: f"{images.name}:{n}x{size}" for name, n in zip(("min", "opt", "max"), batch, strict=True)}
            options = {f"trt_profile_{name}_shapes": shape for name, shape in shapes.items()}
    return [(provider, options), PROVIDERS["onnxruntime-cuda"]]


def load_problem(provider: str) -> str | None:
    """Return why the library of a provider does not load, after a session that skipped it; None if it does."""
    import onnxruntime

    short = provider.removesuffix("ExecutionProvider").lower()
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{short}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if match := re.search(r"libnvinfer\.so\.(\d+)", str(error)):  # another major release does not work
            return f"{error}; it needs TensorRT {match[1]}: pip install 'tensorrt=={match[1]}.*'"
        return f"{error}; install what it needs (onnxruntime.ai, Execution Providers)"
    return None
