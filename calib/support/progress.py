"""How long-running library functions report progress, without knowing who shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]
"""`advance(n=1, **figures)`: n more units are done; figures (a loss, a count) describe the newest state."""


class Progress(Protocol):
    """Shows how far a task is. The library accepts one; `cli` renders it, `SILENT` ignores it."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a task of `total` units, also while another one runs and in any thread; yield what advances it."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield lambda n=1, **figures: None


SILENT: Progress = _Silent()
"""A progress that shows nothing."""
