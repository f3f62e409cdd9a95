"""Time an engine as trtexec does: copies and computation by CUDA events, with NVML's readings of the GPU."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import torch

from clusterq_deploy.results.engines import GpuTelemetry, Reading

_IN_FLIGHT = 2  # calls on the GPU at a time: the next is enqueued before one ends
_INTERVAL_S = 0.1
_THROTTLING = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "temperature (software)",
    "HwThermalSlowdown": "temperature (hardware)",
    "HwPowerBrakeSlowdown": "external power brake",
}
"""NVML's reasons for reduced clocks, and their names in the report."""

_Query = Callable[[Any, Any], float]
_Sample = Mapping[str, float | None]

_SAMPLED: dict[str, _Query] = {
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
}
_LIMITS: dict[str, _Query] = {
    "sm_clock_limit_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_limit_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "power_limit_watts": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
}


@dataclass(frozen=True, slots=True)
class Call:
    """Milliseconds of one call: the copy to the GPU, the computation, the copy back, and the enqueuing on the host."""

    host_to_device_ms: float
    compute_ms: float
    device_to_host_ms: float
    enqueue_ms: float

    @property
    def latency_ms(self) -> float:
        """The latency as trtexec defines it: the sum of the three parts on the GPU."""
        return self.host_to_device_ms + self.compute_ms + self.device_to_host_ms


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """A measurement: the calls in order, the seconds from the first to the last, and the GPU's readings."""

    calls: list[Call]
    wall_seconds: float
    cuda_graph: bool
    gpu: GpuTelemetry


class CallTimer:
    """Enqueues calls with one batch of random images on the GPU, and waits for each after enqueuing the next.

    Copies have their own streams and pinned memory, so that the next batch is copied during the computation. All calls
    have the same images: a copy into a buffer that is still read does not change it.

    Args:
        launch: starts the computation on the current stream, from `device_input` (N, C, H, W) to `device_output`.
        stream: the current stream.
    """

    def __init__(
        self,
        launch: Callable[[], None],
        device_input: torch.Tensor,
        device_output: torch.Tensor,
        stream: torch.cuda.Stream,
    ) -> None:
        self._launch, self._compute = launch, stream
        self._device_input, self._device_output = device_input, device_output
        self._host_input, self._host_output = (
            torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
            for buffer in (device_input, device_output)
        )
        self._host_input.normal_(generator=torch.Generator().manual_seed(0))
        self._upload = torch.cuda.Stream(device_input.device)  # type: ignore[no-untyped-call,unused-ignore]
        self._download = torch.cuda.Stream(device_input.device)  # type: ignore[no-untyped-call,unused-ignore]
        self._events = cycle([[_event() for _ in range(6)] for _ in range(_IN_FLIGHT)])  # creating them takes time

    def measure(self, *, warmup_ms: float, min_runs: int, min_seconds: float, cuda_graph: bool) -> EngineTimes:
        """Run for `warmup_ms`, then until both `min_runs` calls are done and `min_seconds` have passed.

        `cuda_graph` records in the result whether `launch` replays a CUDA graph.
        """
        self._run(0, warmup_ms / 1000)
        with gpu_monitor(self._device_input.device) as telemetry:
            start = time.perf_counter()
            calls = self._run(min_runs, min_seconds)
            wall_seconds = time.perf_counter() - start
        return EngineTimes(calls, wall_seconds, cuda_graph, telemetry())

    def _run(self, min_runs: int, seconds: float) -> list[Call]:
        calls: list[Call] = []
        running: deque[Callable[[], Call]] = deque()
        end = time.perf_counter() + seconds
        while len(calls) + len(running) < min_runs or time.perf_counter() < end:
            running.append(self._start())
            if len(running) == _IN_FLIGHT:
                calls.append(running.popleft()())
        return calls + [finish() for finish in running]

    def _start(self) -> Callable[[], Call]:
        """Enqueue a call; return a function that waits for its end and returns its times."""
        upload, uploaded, compute, computed, download, downloaded = next(self._events)
        with torch.cuda.stream(self._upload):
            upload.record(self._upload)
            self._device_input.copy_(self._host_input, non_blocking=True)
            uploaded.record(self._upload)
        self._compute.wait_event(uploaded)
        compute.record(self._compute)
        before = time.perf_counter()
        self._launch()
        enqueue_ms = 1000 * (time.perf_counter() - before)
        computed.record(self._compute)
        self._download.wait_event(computed)
        with torch.cuda.stream(self._download):
            download.record(self._download)
            self._host_output.copy_(self._device_output, non_blocking=True)
            downloaded.record(self._download)

        def finish() -> Call:
            downloaded.synchronize()
            return Call(
                host_to_device_ms=upload.elapsed_time(uploaded),
                compute_ms=compute.elapsed_time(computed),
                device_to_host_ms=download.elapsed_time(downloaded),
                enqueue_ms=enqueue_ms,
            )

        return finish


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]


@contextmanager
def gpu_monitor(device: torch.device | str) -> Iterator[Callable[[], GpuTelemetry]]:
    """Read NVML's values of a CUDA device every 100 ms, in a thread, while the context is open.

    Yields:
        A function that returns the record so far, or the reason why NVML is not available.
    """
    gpu, problem = _nvml_device(device)
    if problem:
        yield lambda: GpuTelemetry(reason=problem)
        return
    import pynvml

    samples: list[_Sample] = []
    stop = threading.Event()

    def watch() -> None:
        samples.append(_read(gpu, _SAMPLED))
        while not stop.wait(_INTERVAL_S):
            samples.append(_read(gpu, _SAMPLED))

    limits = _read(gpu, _LIMITS)
    thread = threading.Thread(target=watch, name="gpu_monitor", daemon=True)
    thread.start()
    try:
        yield lambda: summarize_samples(samples, limits)
    finally:
        stop.set()
        thread.join()
        pynvml.nvmlShutdown()


def _nvml_device(device: torch.device | str) -> tuple[Any, str | None]:
    """Start NVML; return its handle of a device, or the reason why there is none."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, "nvidia-ml-py is not installed: pip install 'clusterq-deploy[tensorrt]'"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML does not start: {error}"
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), None
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        return None, f"NVML does not have the device: {error}"


def _read(gpu: Any, queries: Mapping[str, _Query]) -> _Sample:
    """Return NVML's values; None for those that the device or the driver does not support."""
    import pynvml

    values: dict[str, float | None] = dict.fromkeys(queries)
    for name, query in queries.items():
        with suppress(pynvml.NVMLError):
            values[name] = query(pynvml, gpu)
    return values


def summarize_samples(samples: Sequence[_Sample], limits: _Sample) -> GpuTelemetry:
    """Return the record of NVML's values: samples over a measurement, and the device's limits."""
    import pynvml

    readings = {name: _reading(samples, name) for name in _SAMPLED if name != "reasons"}
    masks = [int(mask) for sample in samples if (mask := sample["reasons"]) is not None]
    bits = {words: getattr(pynvml, f"nvmlClocksEventReason{name}") for name, words in _THROTTLING.items()}
    shares = {words: sum(bool(mask & bit) for mask in masks) / len(masks) for words, bit in bits.items() if masks}
    clocks: Literal["set", "steady", "floating"] | None = None
    if any(mask & pynvml.nvmlClocksEventReasonApplicationsClocksSetting for mask in masks):
        clocks = "set"
    elif sm_clock := readings["sm_clock_mhz"]:
        clocks = "steady" if sm_clock.lowest == sm_clock.highest else "floating"
    return GpuTelemetry(
        samples=len(samples),
        clocks=clocks,
        throttling={words: share for words, share in shares.items() if share} if masks else None,
        **readings,
        **limits,
    )


def _reading(samples: Sequence[_Sample], quantity: str) -> Reading | None:
    values = [value for sample in samples if (value := sample[quantity]) is not None]
    return Reading(lowest=min(values), mean=sum(values) / len(values), highest=max(values)) if values else None
