"""Labels that cover all classes evenly."""

import torch
from torch import Tensor


class ClassSampler:
    """Labels for batches that cover all classes evenly: a shuffled round through the classes, then the next."""

    def __init__(self, classes: int, rng: torch.Generator) -> None:
        self._classes, self._rng = classes, rng
        self._queue = torch.empty(0, dtype=torch.int64, device=rng.device)

    def draw(self, count: int) -> Tensor:
        """The next `count` classes, (count,) int64."""
        while len(self._queue) < count:
            turn = torch.randperm(self._classes, generator=self._rng, device=self._rng.device)
            self._queue = torch.cat([self._queue, turn])
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    @property
    def waiting(self) -> Tensor:
        """What is left of the round, (n,) int64."""
        return self._queue

    @waiting.setter
    def waiting(self, labels: Tensor) -> None:
        self._queue = labels


def balanced_labels(count: int, classes: int, rng: torch.Generator) -> Tensor:
    """Labels (count,) int64 in which every class appears equally often, but for one."""
    return ClassSampler(classes, rng).draw(count)
