"""What becomes of an optimization whose loss is no longer a number."""

import copy
import logging
import math

import torch
from torch import nn

from clusterq_deploy.errors import TuningError

logger = logging.getLogger(__name__)

_ATTEMPTS = 3


class Recovery:
    """Takes an optimization that diverges back to its last good state, with half the learning rates.

    Args:
        module: what is optimized.
        optimizer: of its parameters.
        what: what messages call it: `fine-tuning w4a4`.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, what: str) -> None:
        self._module, self._optimizer, self._what = module, optimizer, what
        self._left = _ATTEMPTS
        self.save()

    def save(self) -> None:
        """This state is good."""
        self._state = copy.deepcopy((self._module.state_dict(), self._optimizer.state_dict()))

    def went_back(self, loss: float) -> bool:
        """Put the last good state there again if the loss of a step is not finite; whether it was not.

        Raises:
            TuningError: it is not after three times either.
        """
        if math.isfinite(loss):
            return False
        if not self._left:
            raise TuningError(
                f"{self._what} diverges: its loss is not finite, nor was it after its learning rates were halved "
                f"{_ATTEMPTS} times; try other images (--seed), or --effort fast, which does without"
            )
        self._left -= 1
        rates = [group["lr"] / 2 for group in self._optimizer.param_groups]
        module, optimizer = copy.deepcopy(self._state)
        self._module.load_state_dict(module)
        self._optimizer.load_state_dict(optimizer)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        logger.warning("%s: the loss is not finite; it goes back, with half the learning rates", self._what)
        return True
