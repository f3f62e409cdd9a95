"""The interface by which long-running work saves its progress."""

from collections.abc import Callable
from typing import Any, Protocol

State = dict[str, Any]
"""Tensors, numbers, strings, and lists and dicts of them."""


class Checkpoint(Protocol):
    """Saves the newest state of each phase of some work, to continue it after an interruption."""

    def load(self, phase: str) -> State | None:
        """Return the last state of a phase, its tensors on the CPU; None if it has not begun."""
        ...

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase, from time to time or `at_once`, such as at its end."""
        ...


class _Nowhere:
    def load(self, phase: str) -> State | None:
        return None

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        pass


NOWHERE: Checkpoint = _Nowhere()
"""A checkpoint that saves nothing."""


class ScopedCheckpoint:
    """The checkpoint of one of several turns of work with the same phases; only those of the newest turn are saved.

    Args:
        checkpoint: where to save, under phase names that begin with `scope`.
        number: of the turn.
    """

    def __init__(self, checkpoint: Checkpoint, scope: str, number: int) -> None:
        self._checkpoint, self._scope, self._number = checkpoint, scope, number

    def load(self, phase: str) -> State | None:
        """Return the last state of a phase of this turn; None if it has not begun."""
        saved = self._checkpoint.load(f"{self._scope}-{phase}")
        return saved["state"] if saved and saved["turn"] == self._number else None

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase of this turn, in place of those of other turns."""
        scoped = f"{self._scope}-{phase}"
        self._checkpoint.save(scoped, lambda: {"turn": self._number, "state": state()}, at_once=at_once)
