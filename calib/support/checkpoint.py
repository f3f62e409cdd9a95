"""How long-running work saves its progress, without knowing where."""

from collections.abc import Callable
from typing import Any, Protocol

State = dict[str, Any]
"""Tensors, numbers, strings, and lists and dicts of them."""


class Checkpoint(Protocol):
    """Saves the newest state of each phase of some work, to continue it after an interruption."""

    def load(self, phase: str) -> State | None:
        """Return the state that a phase was left in, its tensors on the CPU; None if it has not begun."""
        ...

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase if it is time to, or `at_once`, as at the end of a phase that others follow."""
        ...


class _Nowhere:
    def load(self, phase: str) -> State | None:
        return None

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        pass


NOWHERE: Checkpoint = _Nowhere()
"""A checkpoint that saves nothing."""


class ScopedCheckpoint:
    """The checkpoint of one of several turns of work that have the same phases; only the newest turn's are kept.

    Args:
        checkpoint: where to save, under phase names that begin with `scope`.
        number: which turn it is.
    """

    def __init__(self, checkpoint: Checkpoint, scope: str, number: int) -> None:
        self._checkpoint, self._scope, self._number = checkpoint, scope, number

    def load(self, phase: str) -> State | None:
        """Return the state that a phase of this turn was left in; None if it has not begun."""
        saved = self._checkpoint.load(f"{self._scope}-{phase}")
        return saved["state"] if saved and saved["turn"] == self._number else None

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Save the state of a phase of this turn, in place of those of other turns."""
        scoped = f"{self._scope}-{phase}"
        self._checkpoint.save(scoped, lambda: {"turn": self._number, "state": state()}, at_once=at_once)
