"""Run, time and inspect an engine of TensorRT or TensorRT-RTX, with torch tensors as its buffers."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from clusterq_deploy.errors import EngineError
from clusterq_deploy.runtimes.runners import Array, Runner
from clusterq_deploy.runtimes.tensorrt.gpu import explained, failure, require, tensorrt_log, title, unavailable_reason
from clusterq_deploy.runtimes.tensorrt.library import trt, using
from clusterq_deploy.runtimes.tensorrt.sidecar import EngineInfo, check_machine, read_sidecar, this_machine
from clusterq_deploy.runtimes.tensorrt.timing import CallTimer, EngineTimes

logger = logging.getLogger(__name__)

_PROFILE_WARMUP_RUNS = 10


class TensorRTRunner(Runner):
    """Runs an engine with one input (N, C, H, W) and one output (N, classes).

    Batches of any size are accepted: above the engine's largest they are split, below its smallest padded. The buffers
    are those of the largest batch, so that their addresses never change.

    Attributes:
        runtime: `tensorrt` or `tensorrt-rtx`.
        info: the engine's sidecar.
        batch_range: smallest and largest batch that the engine accepts in one call.
    """

    runtime = "tensorrt"

    def __init__(self, engine_path: Path, device: str = "cuda") -> None:
        """Load the engine at `engine_path` onto a CUDA device, if it can run there according to its sidecar.

        Raises:
            TensorRTMissing: its library is not there, or no NVIDIA GPU that it serves.
            EngineError: the engine is for another machine, differs from its sidecar, or cannot be loaded.
        """
        self.info = read_sidecar(engine_path)
        library = self.info.options.library
        self.runtime = library.replace("_", "-")
        require(unavailable_reason(library))
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        with self._working(f"load {engine_path}"):
            check_machine(engine_path, self.info, this_machine())
            self._engine: trt.ICudaEngine = _deserialize(engine_path, self.info)
            self._context: trt.IExecutionContext = self._engine.create_execution_context()
            if self._context is None:
                raise failure(f"{title()} cannot make an execution context for {engine_path}")
            self._input_name, self._output_name = _input_and_output(self._engine)
            shape = tuple(self._engine.get_tensor_shape(self._input_name))
            self._is_dynamic = -1 in shape
            profile = self._engine.get_tensor_profile_shape(self._input_name, 0) if self._is_dynamic else [shape] * 3
            smallest, _, largest = map(tuple, profile)
            self.batch_range = smallest[0], largest[0]
            self._input = torch.zeros(largest, dtype=_torch_dtype(self._engine, self._input_name), device=device)
            output_shape = self._set_batch(self._context, largest[0])
            if len(output_shape) != 2 or output_shape[0] != largest[0]:
                raise EngineError(f"the engine's output has shape {output_shape}; expected ({largest[0]}, classes)")
            self._output = torch.zeros(output_shape, dtype=_torch_dtype(self._engine, self._output_name), device=device)
            self._set_addresses(self._context)

    def infer(self, images: Array) -> Array:
        """Return logits (N, classes) float32 of images (N, C, H, W) float32, normalized.

        Raises:
            EngineError: the images have another shape than the engine accepts, or TensorRT cannot run.
        """
        self._require_open()
        if images.shape[1:] != self._input.shape[1:]:
            expected = ", ".join(map(str, self._input.shape[1:]))
            raise EngineError(f"images have shape {images.shape}; the engine accepts (N, {expected})")
        logits = np.empty((len(images), *self._output.shape[1:]), dtype=np.float32)
        smallest, largest = self.batch_range
        with self._working("run the engine"):
            for first in range(0, len(images), largest):
                chunk = images[first : first + largest]
                # rows of a padded batch beyond the chunk are of an earlier batch; their logits are not read
                self._set_batch(self._context, max(len(chunk), smallest))
                self._input[: len(chunk)].copy_(torch.from_numpy(np.require(chunk, np.float32, ["C", "W"])))
                self._enqueue(self._context)
                logits[first : first + len(chunk)] = self._output[: len(chunk)].float().cpu().numpy()
        return logits

    def measure(
        self, batch: int, warmup_ms: float = 200, min_runs: int = 10, min_seconds: float = 3, cuda_graph: bool = False
    ) -> EngineTimes:
        """Time many calls of `batch` random images as trtexec does, with separate times of copies and computation.

        The next call is enqueued before the last has ended, and copies run in parallel with the computation.

        Args:
            batch: images per call, within `batch_range`.
            warmup_ms: time to run before the first measurement.
            min_runs, min_seconds: the least number of measurements and the least time.
            cuda_graph: replay a CUDA graph instead of enqueuing. If none can be captured, a warning is logged, the
                engine is enqueued, and the result's `cuda_graph` is False.

        Raises:
            EngineError: the batch is outside `batch_range`, or TensorRT cannot run.
        """
        self._require_open(batch)
        with self._working("run the engine"):
            self._set_batch(self._context, batch)
            graph = self._capture() if cuda_graph else None
            launch = graph.replay if graph is not None else lambda: self._enqueue(self._context)
            timer = CallTimer(launch, self._input[:batch], self._output[:batch], self._stream)
            return timer.measure(
                warmup_ms=warmup_ms, min_runs=min_runs, min_seconds=min_seconds, cuda_graph=graph is not None
            )

    def trtexec_command(
        self, engine: str, batch: int, *, warmup_ms: float, min_runs: int, min_seconds: float, cuda_graph: bool
    ) -> str:
        """Return the shell command that repeats `measure` on the path `engine` with `trtexec`, NVIDIA's own tool.

        By default trtexec 11 copies nothing and replays a CUDA graph; 10 does the opposite, and refuses the flags of
        11. It accepts shapes only for engines with a dynamic batch, and requires a flag to load the runtime in a
        version-compatible engine.
        """
        if int(trt.__version__.partition(".")[0]) >= 11:
            mode = ["--includeDataTransfers", *([] if cuda_graph else ["--noCudaGraph"])]
        else:  # torch waits for events without sleep
            mode = ["--useSpinWait", *(["--useCudaGraph"] if cuda_graph else [])]
        shape = "x".join(map(str, (batch, *self._input.shape[1:])))
        command = [
            "trtexec",
            f"--loadEngine={engine}",
            *([f"--shapes={self._input_name}:{shape}"] if self._is_dynamic else []),
            f"--warmUp={warmup_ms:g}",
            f"--duration={min_seconds:g}",
            f"--iterations={min_runs}",
            "--percentile=50,90,95,99",
            *mode,
            *(["--versionCompatible"] if self.info.options.version_compatible else []),
        ]
        return shlex.join(command)

    def layer_information(self, batch: int) -> str:
        """Return the JSON of TensorRT's engine inspector about the layers, for calls of `batch` images.

        Raises:
            EngineError: the batch is outside `batch_range`, or TensorRT cannot inspect the engine.
        """
        self._require_open(batch)
        with self._working("inspect the engine"):
            self._set_batch(self._context, batch)
            inspector: trt.EngineInspector = self._engine.create_engine_inspector()
            inspector.execution_context = self._context  # its shapes determine formats
            information: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            return information

    def weights_bytes(self) -> int | None:
        """Return the memory of the engine's weights; None if this release does not tell (before TensorRT 10.16)."""
        self._require_open()
        return int(self._engine.get_engine_stat()) if hasattr(self._engine, "get_engine_stat") else None

    def layer_times(self, batch: int, runs: int = 50) -> dict[str, float]:
        """Return mean milliseconds of each layer in a call of `batch` images, in order, by TensorRT's profiler.

        The profiler slows the engine down: it has a separate execution context, and the sum of the layers is more than
        the time of a call. There is no CUDA graph. The mean is over `runs` calls, after a few to warm up.

        Raises:
            EngineError: the batch is outside `batch_range`, or TensorRT cannot run.
        """
        self._require_open(batch)
        times_ms: dict[str, float] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)  # the binding requires this call instead of super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times_ms[layer_name] = times_ms.get(layer_name, 0.0) + ms

        with self._working("profile the engine"):
            context: trt.IExecutionContext | None = self._engine.create_execution_context()
            if context is None:
                raise failure(f"{title()} cannot make an execution context to profile")
            self._set_batch(context, batch)
            self._set_addresses(context)
            profiler = Profiler()
            context.profiler = profiler  # each call reports to it, and waits for its layers to end
            for run in range(_PROFILE_WARMUP_RUNS + runs):
                if run == _PROFILE_WARMUP_RUNS:
                    times_ms.clear()
                self._enqueue(context)
                self._stream.synchronize()
        return {name: total / runs for name, total in times_ms.items()}

    def __exit__(self, *error: object) -> None:
        try:
            with suppress(RuntimeError) if error[0] else nullcontext():  # CUDA repeats an error
                self._stream.synchronize()
        finally:
            self._context = self._engine = None
            self._input = self._output = torch.empty(0)

    @contextmanager
    def _working(self, action: str) -> Iterator[None]:
        """Make the engine's stream current and its library the one in use; see `explained`."""
        with torch.cuda.stream(self._stream), using(self.info.options.library), explained(action):
            yield

    def _require_open(self, batch: int | None = None) -> None:
        """Raise an EngineError if the runner is closed, or the batch is outside `batch_range`."""
        if self._context is None:
            raise EngineError("the runner is closed; open the engine again")
        smallest, largest = self.batch_range
        if batch is not None and not smallest <= batch <= largest:
            raise EngineError(f"batch is {batch}; the engine accepts {smallest} to {largest} images per call")

    def _set_batch(self, context: trt.IExecutionContext, batch: int) -> tuple[int, ...]:
        """Shape a context's next call for `batch` images; return the shape of its output."""
        shape = (batch, *self._input.shape[1:])
        if not context.set_input_shape(self._input_name, shape):
            raise failure(f"{title()} refuses the input shape {shape}")
        if unknown := context.infer_shapes():
            raise failure(f"{title()} cannot infer {', '.join(unknown)} for the input shape {shape}")
        return tuple(context.get_tensor_shape(self._output_name))

    def _set_addresses(self, context: trt.IExecutionContext) -> None:
        context.set_tensor_address(self._input_name, self._input.data_ptr())
        context.set_tensor_address(self._output_name, self._output.data_ptr())

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise failure(f"{title()} cannot enqueue the engine")

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Return one call as a CUDA graph; None if TensorRT cannot be captured."""
        self._enqueue(self._context)  # the first call after a change of the shapes prepares for them
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue(self._context)
        except RuntimeError as error:
            logger.warning("no CUDA graph can be captured, each call is enqueued: %s", error)
            tensorrt_log().errors.clear()  # not of a later failure
            return None
        return graph


def _deserialize(engine_path: Path, info: EngineInfo) -> trt.ICudaEngine:
    try:
        plan = engine_path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {engine_path}: {error.strerror}") from error
    if hashlib.sha256(plan).hexdigest() != info.engine_sha256:
        raise EngineError(f"{engine_path} is not the file that its sidecar describes; build it again")
    runtime: trt.Runtime = trt.Runtime(tensorrt_log())
    # a version-compatible engine has its own runtime, as host code
    runtime.engine_host_code_allowed = info.options.version_compatible
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(f"{title()} cannot load {engine_path}")
    return engine


def _input_and_output(engine: trt.ICudaEngine) -> tuple[str, str]:
    names: list[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if len(inputs) != 1 or len(outputs) != 1:
        raise EngineError(f"the engine has inputs {inputs} and outputs {outputs}; expected one of each")
    return inputs[0], outputs[0]


def _torch_dtype(engine: trt.ICudaEngine, name: str) -> torch.dtype:
    dtypes = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}
    dtype: trt.DataType = engine.get_tensor_dtype(name)
    if dtype not in dtypes:
        raise EngineError(f"tensor {name} of the engine is {dtype}; expected a floating-point type")
    return dtypes[dtype]
