"""Work whose batches do not fit the memory is done again in smaller ones."""

import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from clusterq_deploy.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

_LARGEST_DIVISOR = 64
# of torch on a CPU, where it has no kind of its own, of CUDA, and of runtimes, whose errors have the library's kinds
_MESSAGE = re.compile(
    r"memory: you tried to allocate|out of memory|OutOfMemory|bad_alloc|STATUS_ALLOC_FAILED|failed to allocate memory"
    r"|memory ran out",
    re.IGNORECASE,
)
_T = TypeVar("_T")


def in_memory(work: Callable[[int], _T], what: str) -> tuple[_T, int]:
    """The result of `work(divisor)`, and the divisor of its batches that the memory sufficed for: 1, 2, 4, and so on.

    Work begins anew with each, or where it was interrupted at the same one, so that its result is the same as if such
    batches had been asked for.

    Args:
        work: raises what torch, Python or a runtime raises where memory does not suffice; what it leaves behind then
            is of that divisor alone.
        what: what messages call it.

    Raises:
        OutOfMemoryError: a sixty-fourth of the batch does not fit either.
    """
    divisor = 1
    while True:
        try:
            return work(divisor), divisor
        except (RuntimeError, MemoryError) as error:
            if not is_of_memory(error):
                raise
            if divisor == _LARGEST_DIVISOR:
                raise OutOfMemoryError(
                    f"{what}: the memory does not suffice for batches of 1/{divisor} either; end what else uses it, or "
                    "give --device cpu"
                ) from error
        divisor *= 2
        torch.cuda.empty_cache()  # outside of the handler: the error's traceback holds tensors
        logger.warning("%s: the memory does not suffice; again, with batches divided by %d", what, divisor)


def is_of_memory(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
    )
