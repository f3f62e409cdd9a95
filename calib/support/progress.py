"""The interface by which long-running functions report progress."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]
"""`advance(n=1, **figures)`: n more units are done; figures are of the newest state, such as a loss."""


class Progress(Protocol):
    """Shows the progress of tasks; `cli` renders it, `SILENT` ignores it."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of `total` units, in any thread, also within another one; yield the function that advances it."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield lambda n=1, **figures: None


SILENT: Progress = _Silent()
"""A progress that shows nothing."""
