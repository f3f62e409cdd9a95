"""One way to run a model, whatever executes it: images in, logits out."""

from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clusterq_deploy.errors import ExportError
from clusterq_deploy.runtimes.onnx_providers import (
    PROVIDERS,
    RECORD_PLACES,
    Placement,
    load_problem,
    placement,
    provider_list,
    quiet_logger,
)

Array = npt.NDArray[np.float32]


def _session(graph: Path | bytes, options: Any, runtime: str, batch: tuple[int, int, int] | None) -> Any:
    """An InferenceSession of the runtime's provider, which ONNX Runtime may leave out without an error."""
    import onnxruntime

    name, place = (graph, "the graph") if isinstance(graph, bytes) else (str(graph), str(graph))
    provider = PROVIDERS[runtime]
    if provider not in onnxruntime.get_available_providers():
        raise ExportError(f"this ONNX Runtime has no {provider}; install onnxruntime-gpu, or use the CPU")
    on_gpu = runtime != "onnxruntime-cpu"
    if runtime == "onnxruntime-tensorrt":
        with suppress(ImportError, OSError):  # it loads the libraries that the provider looks for, and its wheel has
            import tensorrt  # noqa: F401
    try:
        with quiet_logger() if on_gpu else nullcontext():
            # With its fallback ONNX Runtime would go on without the provider, and say so on stdout.
            providers = provider_list(runtime, graph, batch)
            session = onnxruntime.InferenceSession(name, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions have no public base
        if on_gpu and (problem := load_problem(provider)) is not None:
            raise ExportError(f"ONNX Runtime has no working {provider} here: {problem}") from error
        raise ExportError(f"ONNX Runtime cannot load {place}: {_first_line(error)}") from error
    if provider not in session.get_providers():
        problem = load_problem(provider) or "its libraries load, and it does not start; is there an NVIDIA GPU?"
        raise ExportError(f"ONNX Runtime has no working {provider} here: {problem}")
    return session


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class Runner(Protocol):
    """Executes one model. Runners are context managers; leaving the context frees what they hold."""

    runtime: str
    """The runtime's name in the report: torch, onnxruntime-cpu, onnxruntime-cuda, onnxruntime-tensorrt or tensorrt."""

    def infer(self, images: Array) -> Array:
        """Logits (N, classes) float32 of images (N, C, H, W) float32, normalized."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TorchRunner:
    """Runs a torch model in eval mode, on the device that its parameters are on."""

    runtime: str = "torch"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def infer(self, images: Array) -> Array:
        """Logits (N, classes) float32 of images (N, C, H, W) float32, normalized."""
        logits: Array = self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return logits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class OnnxRunner:
    """Runs an ONNX graph in ONNX Runtime, in the session that whoever loads the file has: no option changes results.

    Args:
        graph: a file, or the bytes of one.
        runtime: `onnxruntime-cpu`, `onnxruntime-cuda` or `onnxruntime-tensorrt`.
        threads: threads of the CPU provider; None leaves the choice to ONNX Runtime.
        optimized: False executes the operators as they are written, for a reference, and for TensorRT's provider.
        write_optimized: where the graph is written that ONNX Runtime made of it, for this machine alone.
        batch: smallest, tuned-for and largest batch of TensorRT's provider; see `provider_list`.

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
        options.log_severity_level = 4  # what it logs as an error it raises too; its warnings are of no use here
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if runtime != "onnxruntime-cpu":
            options.add_session_config_entry(RECORD_PLACES, "1")
        if write_optimized is not None:
            options.optimized_model_filepath = str(write_optimized)
        self._session = _session(graph, options, runtime, batch)
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: Array) -> Array:
        """Logits (N, classes) float32 of images (N, C, H, W) float32, normalized.

        Raises:
            ExportError: the provider cannot run the graph, or not on these images.
        """
        logits: Array = self._run(images)[0]
        return logits

    def outputs(self, images: Array) -> dict[str, npt.NDArray[Any]]:
        """Everything that the graph gives for images (N, C, H, W) float32, by name.

        Raises:
            ExportError: as for `infer`.
        """
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._run(images), strict=True))

    def _run(self, images: Array) -> list[Any]:
        try:
            found: list[Any] = self._session.run(None, {self._input: images})
        except Exception as error:  # a provider that builds its engine at the first call can fail here
            raise ExportError(f"{self.runtime} cannot run the graph: {_first_line(error)}") from error
        return found

    def metadata(self) -> dict[str, str]:
        """What the exporter wrote into the graph."""
        found: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def placement(self) -> Placement | None:
        """How much of the graph the GPU provider of this runner took; None where ONNX Runtime does not tell."""
        return placement(self._session, PROVIDERS[self.runtime])

    @property
    def input_shape(self) -> tuple[int | None, int, int, int]:
        """(batch, channels, height, width) of the input; the batch is None where any does.

        Raises:
            ExportError: the graph leaves more open, or takes no images.
        """
        shape = self._session.get_inputs()[0].shape
        if len(shape) != 4 or not all(isinstance(side, int) for side in shape[1:]):
            raise ExportError(f"the input {self._input} has shape {shape}; expected images whose batch alone is open")
        batch, channels, height, width = shape
        return batch if isinstance(batch, int) else None, channels, height, width

    @property
    def classes(self) -> int:
        """The width of the logits."""
        return int(self._session.get_outputs()[0].shape[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
