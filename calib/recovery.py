"""What becomes of an optimization whose loss is no longer a number."""

import copy
import logging
import math
from typing import Any

import torch
from torch import nn

from calib.support.errors import ClusterQError

logger = logging.getLogger(__name__)

_ATTEMPTS = 3


class Recovery:
    """Takes an optimization that diverges back to its last good state, with half the learning rates.

    Args:
        module: what is optimized.
        optimizer: of its parameters.
        what: what messages call it: `fine-tuning w4a4`.
        error: what to raise where nothing helps.
        advice: what to do then, for its message.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        what: str,
        *,
        error: type[ClusterQError],
        advice: str,
    ) -> None:
        self._module, self._optimizer, self._what, self._error, self._advice = module, optimizer, what, error, advice
        self._left = _ATTEMPTS
        self.save()

    def save(self) -> None:
        """This state is good."""
        self._good = copy.deepcopy((self._module.state_dict(), self._optimizer.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """The last good state, and how often it may still be gone back to."""
        module, optimizer = self._good
        return {"module": module, "optimizer": optimizer, "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._good, self._left = (state["module"], state["optimizer"]), state["left"]

    def went_back(self, loss: float) -> bool:
        """Put the last good state there again if the loss of a step is not finite; whether it was not.

        Raises:
            ClusterQError: of the kind that was asked for: it is not after three times either.
        """
        if math.isfinite(loss):
            return False
        if not self._left:
            raise self._error(
                f"{self._what} diverges: its loss is not finite, nor was it after its learning rates were halved "
                f"{_ATTEMPTS} times; {self._advice}"
            )
        self._left -= 1
        rates = [group["lr"] / 2 for group in self._optimizer.param_groups]
        module, optimizer = copy.deepcopy(self._good)
        self._module.load_state_dict(module)
        self._optimizer.load_state_dict(optimizer)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        logger.warning("%s: the loss is not finite; it goes back, with half the learning rates", self._what)
        return True
