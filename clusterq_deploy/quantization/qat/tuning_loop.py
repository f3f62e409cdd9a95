"""The way of a student through fine-tuning: its steps, and which of its states is kept."""

import copy

import torch
from torch import Tensor

from calib.support.amp import FiniteSteps
from calib.support.checkpoint import State
from clusterq_deploy.errors import TuningError
from clusterq_deploy.quantization.student import Student


class TuningLoop:
    """Where fine-tuning is: optimizer, what was best so far, and the losses.

    Args:
        student: what is tuned.
        optimizer: of its parameters; its learning rates fall to zero on a cosine.
        steps: how many there will be.
        rng: source of all randomness; its state is kept.
        losses: where values go.
        start: the divergence on held-out images before the first step.

    Attributes:
        done: steps taken.
        losses: as in `Tuning`.
        kept, kept_step: the best state of the student, and its step.
    """

    def __init__(
        self,
        student: Student,
        optimizer: torch.optim.Optimizer,
        steps: int,
        rng: torch.Generator,
        losses: dict[str, list[float]],
        start: float,
    ) -> None:
        self._student, self._rng, self._best = student, rng, start
        self._optimizer = optimizer
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self._steps = FiniteSteps(
            f"fine-tuning {student.bits}",
            error=TuningError,
            advice="try other images (--seed), or --effort fast, which does without",
        )
        self.done, self.losses = 0, losses
        self.kept, self.kept_step = copy.deepcopy(student.state_dict()), 0

    def follow(self, loss: Tensor) -> bool:
        """Take an optimizer step down a loss (). Return False if it was skipped, as loss or gradient is not finite.

        Raises:
            TuningError: as for `finetune`.
        """
        self.done += 1
        if not self._steps.step(self._optimizer, loss):
            return False
        self._schedule.step()
        self._student.project()
        return True

    def judge(self, divergence: float, *, may_keep: bool) -> None:
        """Take note of the student's divergence on held-out images."""
        self.losses["held_out_kl"].append(divergence)
        if divergence < self._best and may_keep:
            self._best, self.kept, self.kept_step = divergence, copy.deepcopy(self._student.state_dict()), self.done

    def state_dict(self) -> State:
        """All that the next step goes on from."""
        return {
            "done": self.done,
            "student": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "kept": (self._best, self.kept_step, self.kept),
            "losses": self.losses,
            "rng": self._rng.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` gave."""
        self.done, self.losses = state["done"], state["losses"]
        self._student.load_state_dict(state["student"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._best, self.kept_step, self.kept = state["kept"]
        self._rng.set_state(state["rng"])
