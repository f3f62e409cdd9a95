"""Numerical safety and speed of training loops: bfloat16 if it is fast, and only steps with finite gradients."""

import logging
import math

import torch
from torch import Tensor

from calib.support.errors import ClusterQError

logger = logging.getLogger(__name__)

_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
_GIVE_UP_AFTER = 3


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS)
    return False


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context in which convolutions and products run in bfloat16, if the device is fast at it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))


class FiniteSteps:
    """Takes optimizer steps, skips those without a finite gradient, and raises an error after three in a row.

    Args:
        what: the name of the optimization in messages, such as `fine-tuning w4a4`.
        error: the class of the error.
        advice: what to do then, for the error's message.
    """

    def __init__(self, what: str, *, error: type[ClusterQError], advice: str) -> None:
        self._what, self._error, self._advice = what, error, advice
        self._skipped = 0

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> bool:
        """Take a step down the gradient of `loss` (). Return False if the loss or the gradient is not finite.

        Raises:
            ClusterQError: `error`, if the two steps before were skipped too.
        """
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if bool(torch.nn.utils.get_total_norm([loss.detach(), *gradients], math.inf).isfinite()):
            optimizer.step()
            self._skipped = 0
            return True
        self._skipped += 1
        if self._skipped == _GIVE_UP_AFTER:
            raise self._error(
                f"{self._what} diverges: its loss or gradient is not finite, {_GIVE_UP_AFTER} steps in a row; "
                f"{self._advice}"
            )
        logger.warning("%s: the loss or its gradient is not finite; the step is skipped", self._what)
        return False
