"""How long-running work keeps what it has reached, without knowing where."""

from collections.abc import Callable
from typing import Any, Protocol

State = dict[str, Any]
"""Tensors, numbers, strings, and lists and dicts of them."""


class Checkpoint(Protocol):
    """Keeps the newest state of each phase of some work, for the same work after it was interrupted."""

    def load(self, phase: str) -> State | None:
        """The state that a phase was left in, its tensors on the CPU; None where it begins."""
        ...

    def save(self, phase: str, state: Callable[[], State]) -> None:
        """Keep the state of a phase, if it is time to. What comes before a phase may have to be done again, alike."""
        ...


class _Nowhere:
    def load(self, phase: str) -> State | None:
        return None

    def save(self, phase: str, state: Callable[[], State]) -> None:
        pass


NOWHERE: Checkpoint = _Nowhere()
"""A checkpoint that keeps nothing."""
