"""A build that can be watched, and cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self, TypeVar

from calib.support.progress import Advance, Progress

if TYPE_CHECKING:
    from types import TracebackType

    import tensorrt as trt

_T = TypeVar("_T")

_POLL_S = 0.5
"""On Windows a wait without end does not hear Ctrl-C."""


class Phases:
    """The phases of a build that are under way, each a task of a `Progress`. A context manager, for any thread.

    TensorRT names them; a name is free again once its phase has finished. A phase may finish before all its steps are
    done; those that are still open when the context is left are closed.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._open: dict[str, tuple[ExitStack, Advance, int]] = {}

    def start(self, name: str, steps: int) -> None:
        """A phase of so many steps has begun."""
        with self._lock:
            self._close(name)
            stack = ExitStack()
            advance = stack.enter_context(self._progress.task(name, steps))
            self._open[name] = stack, advance, 0

    def step(self, name: str, step: int) -> None:
        """Step `step` of a phase is done; the first is 0."""
        with self._lock:
            if name in self._open:
                stack, advance, done = self._open[name]
                if step >= done:
                    advance(step + 1 - done)
                    self._open[name] = stack, advance, step + 1

    def finish(self, name: str) -> None:
        """A phase has ended."""
        with self._lock:
            self._close(name)

    def _close(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name)[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()


def progress_monitor(phases: Phases, cancelled: threading.Event) -> trt.IProgressMonitor:
    """What TensorRT tells how far it is, and asks whether it shall go on: until `cancelled` is set it shall."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the binding asks for this call rather than super()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def interruptible(work: Callable[[], _T], cancel: Callable[[], None]) -> _T:
    """The result of `work`, done in a thread of its own while this one waits.

    Python runs signal handlers in the main thread, between its own instructions. A long call into a library there
    would hold back Ctrl-C until it returns; a wait does not.

    Args:
        work: a call that releases the GIL.
        cancel: makes `work` return early; called where a signal handler raises (KeyboardInterrupt, SystemExit).

    Raises:
        BaseException: what a signal handler raised, once `work` has ended; or what `work` raised.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="build") as pool:
        try:
            future = pool.submit(work)
            while not wait([future], timeout=_POLL_S).done:
                pass
            return future.result()
        except BaseException:
            cancel()
            raise
