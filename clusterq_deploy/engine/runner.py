"""Run and time a TensorRT engine, with torch tensors as its buffers."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from clusterq_deploy.engine.availability import require_tensorrt
from clusterq_deploy.engine.log import explained, failure, tensorrt_log
from clusterq_deploy.engine.sidecar import EngineInfo, check_machine, read_sidecar, this_machine
from clusterq_deploy.errors import EngineError
from clusterq_deploy.runners import Array

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)


class TensorRTRunner:
    """Runs an engine with one input (N, C, H, W) and one output (N, classes). A context manager.

    Batches of any size are taken: above the engine's largest they are split, below its smallest padded. One
    pair of buffers of the largest batch lives as long as the runner, so that addresses never change.

    Attributes:
        info: the engine's sidecar.
        batch_range: smallest and largest batch that the engine takes in one call.
        cuda_graph: whether the newest `measure` replayed a CUDA graph.
    """

    runtime: str = "tensorrt"

    def __init__(self, engine_path: Path, device: str = "cuda") -> None:
        """Load the engine at `engine_path` onto a CUDA device, once its sidecar says that it can run there.

        Raises:
            TensorRTMissing: there is no TensorRT, or no NVIDIA GPU.
            EngineError: the engine is of another machine, differs from its sidecar, or cannot be loaded.
        """
        require_tensorrt()
        self.cuda_graph = False
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        with torch.cuda.stream(self._stream), explained(f"load {engine_path}"):
            self.info = read_sidecar(engine_path)
            check_machine(engine_path, self.info, this_machine())
            self._engine: trt.ICudaEngine | None = _deserialize(engine_path, self.info)
            self._context: trt.IExecutionContext | None = self._engine.create_execution_context()
            if self._context is None:
                raise failure(f"TensorRT cannot make an execution context for {engine_path}")
            self._input_name, self._output_name = _input_and_output(self._engine)
            smallest, largest = _input_shapes(self._engine, self._input_name)
            self.batch_range = smallest[0], largest[0]
            self._input = torch.zeros(largest, dtype=_torch_dtype(self._engine, self._input_name), device=device)
            output_shape = self._set_batch(largest[0])
            if len(output_shape) != 2 or output_shape[0] != largest[0]:
                raise EngineError(f"the engine's output has shape {output_shape}; expected ({largest[0]}, classes)")
            self._output = torch.zeros(output_shape, dtype=_torch_dtype(self._engine, self._output_name), device=device)
            self._context.set_tensor_address(self._input_name, self._input.data_ptr())
            self._context.set_tensor_address(self._output_name, self._output.data_ptr())

    def infer(self, images: Array) -> Array:
        """Logits (N, classes) float32 of images (N, C, H, W) float32, normalized.

        Raises:
            EngineError: the images have another shape than the engine takes, or TensorRT cannot run.
        """
        self._require_open()
        if images.shape[1:] != self._input.shape[1:]:
            expected = ", ".join(map(str, self._input.shape[1:]))
            raise EngineError(f"images have shape {images.shape}; the engine takes (N, {expected})")
        logits = np.empty((len(images), *self._output.shape[1:]), dtype=np.float32)
        smallest, largest = self.batch_range
        with torch.cuda.stream(self._stream), explained("run the engine"):
            for first in range(0, len(images), largest):
                chunk = images[first : first + largest]
                # Rows of a padded batch beyond the chunk hold an earlier batch; their logits are not read.
                self._set_batch(max(len(chunk), smallest))
                self._input[: len(chunk)].copy_(torch.from_numpy(np.require(chunk, np.float32, ["C", "W"])))
                self._enqueue()
                logits[first : first + len(chunk)] = self._output[: len(chunk)].float().cpu().numpy()
        return logits

    def measure(
        self,
        batch: int,
        warmup_ms: float = 200,
        min_runs: int = 10,
        min_seconds: float = 3,
        cuda_graph: bool = False,
    ) -> list[float]:
        """Time on the GPU of each of many inference calls of `batch` random images, in milliseconds.

        Only the computation counts, not the copies to and from the GPU. The next call is enqueued before the
        last has ended, so that the GPU does not wait for the host where enqueuing is the faster of the two.

        Args:
            batch: images a call, within `batch_range`.
            warmup_ms: time to run before the first measurement.
            min_runs: least number of measurements.
            min_seconds: least time to measure for.
            cuda_graph: replay a CUDA graph instead of enqueuing. If none can be captured, a warning is logged
                and the engine is enqueued; the attribute `cuda_graph` says which it was.

        Raises:
            EngineError: the batch is outside `batch_range`, or TensorRT cannot run.
        """
        self._require_open()
        smallest, largest = self.batch_range
        if not smallest <= batch <= largest:
            raise EngineError(f"batch is {batch}; the engine takes {smallest} to {largest} images a call")
        with torch.cuda.stream(self._stream), explained("run the engine"):
            self._set_batch(batch)
            self._input.normal_(generator=torch.Generator(self._input.device).manual_seed(0))
            graph = self._capture() if cuda_graph else None
            self.cuda_graph = graph is not None
            launch = graph.replay if graph is not None else self._enqueue
            end = time.perf_counter() + warmup_ms / 1000
            while time.perf_counter() < end:
                launch()
                self._stream.synchronize()
            return self._time(launch, min_runs, min_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.synchronize()
        self._context = self._engine = None
        self._input = self._output = torch.empty(0)

    def _require_open(self) -> None:
        if self._context is None:
            raise EngineError("the runner is closed; open the engine again")

    def _set_batch(self, batch: int) -> tuple[int, ...]:
        """Shape the next call for `batch` images; the shape of its output."""
        context: trt.IExecutionContext = self._context
        shape = (batch, *self._input.shape[1:])
        if not context.set_input_shape(self._input_name, shape):
            raise failure(f"TensorRT refuses the input shape {shape}")
        if unknown := context.infer_shapes():
            raise failure(f"TensorRT cannot infer {', '.join(unknown)} for the input shape {shape}")
        return tuple(context.get_tensor_shape(self._output_name))

    def _enqueue(self) -> None:
        context: trt.IExecutionContext = self._context
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise failure("TensorRT cannot enqueue the engine")

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """One call as a CUDA graph; None where TensorRT cannot be captured."""
        self._enqueue()  # TensorRT settles what depends on the shapes at the first call after they are set
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue()
        except RuntimeError as error:
            logger.warning("no CUDA graph can be captured, each call is enqueued: %s", error)
            return None
        return graph

    def _time(self, launch: Callable[[], None], min_runs: int, min_seconds: float) -> list[float]:
        times: list[float] = []
        running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

        def finish() -> None:
            start, stop = running.popleft()
            stop.synchronize()
            times.append(start.elapsed_time(stop))

        end = time.perf_counter() + min_seconds
        while len(times) + len(running) < min_runs or time.perf_counter() < end:
            start, stop = _event(), _event()
            start.record(self._stream)
            launch()
            stop.record(self._stream)
            running.append((start, stop))
            if len(running) == 2:
                finish()
        while running:
            finish()
        return times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]


def _deserialize(engine_path: Path, info: EngineInfo) -> trt.ICudaEngine:
    import tensorrt as trt

    try:
        plan = engine_path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {engine_path}: {error.strerror}") from error
    if hashlib.sha256(plan).hexdigest() != info.engine_sha256:
        raise EngineError(f"{engine_path} is not the file that its sidecar describes; build it again")
    runtime: trt.Runtime = trt.Runtime(tensorrt_log())
    # A version-compatible engine carries a runtime of its own, as host code.
    runtime.engine_host_code_allowed = info.options.version_compatible
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(f"TensorRT cannot load {engine_path}")
    return engine


def _input_and_output(engine: trt.ICudaEngine) -> tuple[str, str]:
    import tensorrt as trt

    names: list[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if len(inputs) != 1 or len(outputs) != 1:
        raise EngineError(f"the engine has inputs {inputs} and outputs {outputs}; expected one of each")
    return inputs[0], outputs[0]


def _input_shapes(engine: trt.ICudaEngine, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest shape of the input; they are the same where the graph fixes the batch."""
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape
    shapes: list[trt.Dims] = engine.get_tensor_profile_shape(name, 0)
    smallest, _, largest = shapes
    return tuple(smallest), tuple(largest)


def _torch_dtype(engine: trt.ICudaEngine, name: str) -> torch.dtype:
    import tensorrt as trt

    dtypes = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
    }
    dtype: trt.DataType = engine.get_tensor_dtype(name)
    if dtype not in dtypes:
        raise EngineError(f"tensor {name} of the engine is {dtype}; expected a floating-point type")
    return dtypes[dtype]
