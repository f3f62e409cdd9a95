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

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """Keep the state of a phase, if it is time to, or `at_once`, as at the end of a phase that others follow."""
        ...


class _Nowhere:
    def load(self, phase: str) -> State | None:
        return None

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        pass


NOWHERE: Checkpoint = _Nowhere()
"""A checkpoint that keeps nothing."""


class ScopedCheckpoint:
    """The checkpoint of one of several turns of work that have the same phases; the newest turn's states are kept.

    Args:
        checkpoint: of the whole.
        phase: stands in front of the names of the turns' phases.
        number: of the turn.
    """

    def __init__(self, checkpoint: Checkpoint, phase: str, number: int) -> None:
        self._checkpoint, self._phase, self._number = checkpoint, phase, number

    def load(self, phase: str) -> State | None:
        """As `Checkpoint.load`; another turn's state is none."""
        kept = self._checkpoint.load(f"{self._phase}-{phase}")
        if kept is None or kept["turn"] != self._number:
            return None
        state: State = kept["state"]
        return state

    def save(self, phase: str, state: Callable[[], State], *, at_once: bool = False) -> None:
        """As `Checkpoint.save`."""
        own = f"{self._phase}-{phase}"
        self._checkpoint.save(own, lambda: {"turn": self._number, "state": state()}, at_once=at_once)
