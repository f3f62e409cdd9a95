"""Timing an engine as trtexec does: copies and computation apart, by CUDA events, one call ahead of the GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch

from clusterq_deploy.results.engines import GpuTelemetry
from clusterq_deploy.runtimes.tensorrt.telemetry import GpuMonitor

_UNDER_WAY = 2
"""Calls on the GPU at a time: the next is there when one ends."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory of one batch; that of the host is pinned, so that copies do not wait for it."""

    host_input: torch.Tensor
    device_input: torch.Tensor
    device_output: torch.Tensor
    host_output: torch.Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """Milliseconds of one call: the copy to the GPU, the computation, the copy back, and the host's for starting it."""

    host_to_device_ms: float
    compute_ms: float
    device_to_host_ms: float
    enqueue_ms: float

    @property
    def latency_ms(self) -> float:
        """What trtexec calls the latency: the sum of the three parts on the GPU."""
        return self.host_to_device_ms + self.compute_ms + self.device_to_host_ms


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """A measurement: the calls in order, the seconds from the first to the end of the last, and the GPU meanwhile."""

    calls: list[Call]
    wall_seconds: float
    cuda_graph: bool
    gpu: GpuTelemetry


class CallTimer:
    """Sends calls of one batch to the GPU, and waits for each when the next is under way.

    Copies have streams of their own, so that the next batch arrives while this one is computed. Every call carries the
    same images: a copy into a buffer that is still read changes nothing in it.

    Args:
        launch: starts the computation on the current stream.
        buffers: the batch's memory.
        stream: of the computation; the current one.
    """

    def __init__(self, launch: Callable[[], None], buffers: Buffers, stream: torch.cuda.Stream) -> None:
        device = buffers.device_input.device
        self._launch, self._buffers, self._compute = launch, buffers, stream
        self._upload = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        self._download = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        streams = self._upload, self._compute, self._download
        self._events = cycle([tuple(map(_Span, streams)) for _ in range(_UNDER_WAY)])  # making them takes the host time

    def measure(self, *, warmup_ms: float, min_runs: int, min_seconds: float, cuda_graph: bool) -> EngineTimes:
        """Run for `warmup_ms`, then until both `min_runs` calls are done and `min_seconds` have passed.

        Args:
            cuda_graph: what the record is to say of `launch`.
        """
        self._run(0, warmup_ms / 1000)
        with GpuMonitor(self._buffers.device_input.device) as monitor:
            start = time.perf_counter()
            calls = self._run(min_runs, min_seconds)
            wall_seconds = time.perf_counter() - start
        return EngineTimes(calls, wall_seconds, cuda_graph, monitor.telemetry())

    def _run(self, least: int, seconds: float) -> list[Call]:
        calls: list[Call] = []
        running: deque[_Running] = deque()
        end = time.perf_counter() + seconds
        while len(calls) + len(running) < least or time.perf_counter() < end:
            running.append(self._start())
            if len(running) == _UNDER_WAY:
                calls.append(running.popleft().finish())
        return calls + [call.finish() for call in running]

    def _start(self) -> _Running:
        buffers = self._buffers
        upload, compute, download = next(self._events)
        with torch.cuda.stream(self._upload):
            upload.begin()
            buffers.device_input.copy_(buffers.host_input, non_blocking=True)
            upload.end()
        self._compute.wait_event(upload.stop)
        compute.begin()
        before = time.perf_counter()
        self._launch()
        enqueue_ms = 1000 * (time.perf_counter() - before)
        compute.end()
        self._download.wait_event(compute.stop)
        with torch.cuda.stream(self._download):
            download.begin()
            buffers.host_output.copy_(buffers.device_output, non_blocking=True)
            download.end()
        return _Running(upload, compute, download, enqueue_ms)


class _Span:
    """Two events on a stream, around what is enqueued between them."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._start, self.stop = _event(), _event()

    def begin(self) -> None:
        self._start.record(self._stream)

    def end(self) -> None:
        self.stop.record(self._stream)

    @property
    def milliseconds(self) -> float:
        return float(self._start.elapsed_time(self.stop))


@dataclass(frozen=True, slots=True)
class _Running:
    """A call that the GPU may not have finished."""

    upload: _Span
    compute: _Span
    download: _Span
    enqueue_ms: float

    def finish(self) -> Call:
        self.download.stop.synchronize()
        return Call(self.upload.milliseconds, self.compute.milliseconds, self.download.milliseconds, self.enqueue_ms)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
