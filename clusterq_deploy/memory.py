"""Work whose batches do not fit the memory is done again in smaller ones."""

import logging
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from clusterq_deploy.errors import OutOfMemoryError
from clusterq_deploy.runners import Array

logger = logging.getLogger(__name__)

_LARGEST_DIVISOR = 64
# of torch and of oneDNN on a CPU, where they have no kind of their own, of CUDA, and of runtimes, whose errors have the
# library's kinds
_MESSAGE = re.compile(
    r"memory: you tried to allocate|out of memory|OutOfMemory|bad_alloc|STATUS_ALLOC_FAILED|failed to allocate memory"
    r"|memory ran out|cannot allocate memory|resource temporarily unavailable|can't start new thread"
    r"|could not create a memory|could not (create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)
_T = TypeVar("_T")


def in_memory(work: Callable[[int], _T], what: str, *, first: int = 1) -> tuple[_T, int]:
    """The result of `work(divisor)`, and the divisor of its batches that the memory sufficed for: 1, 2, 4, and so on.

    Work begins anew with each, or where it was interrupted at the same one, so that its result is the same as if such
    batches had been asked for.

    Args:
        work: raises what torch, Python or a runtime raises where memory does not suffice; what it leaves behind then
            is of that divisor alone.
        what: what messages call it.
        first: the divisor to begin with, a power of two.

    Raises:
        OutOfMemoryError: a sixty-fourth of the batch does not fit either.
    """
    divisor = first
    while True:
        try:
            return work(divisor), divisor
        except (RuntimeError, MemoryError) as error:
            if not is_of_memory(error):
                raise
            if divisor >= _LARGEST_DIVISOR:
                elsewhere = ", or give --device cpu" if "CUDA" in str(error) else ""
                raise OutOfMemoryError(
                    f"{what}: the memory does not suffice for batches of 1/{divisor} either; end what else uses it"
                    f"{elsewhere}"
                ) from error
        divisor *= 2
        torch.cuda.empty_cache()  # outside of the handler: the error's traceback holds tensors
        logger.warning("%s: the memory does not suffice; again, with batches divided by %d", what, divisor)


def in_parts(infer: Callable[[Array], Array], images: Array, what: str, *, first: int = 1) -> tuple[Array, int]:
    """`infer(images)`, (N, classes) of (N, C, H, W), in as many parts as the memory asks for; and how many these are.

    Args:
        infer: computes each image by itself.
        images: a batch.
        what, first: as for `in_memory`.

    Raises:
        OutOfMemoryError: as for `in_memory`.
    """

    def parts(divisor: int) -> Array:
        return np.concatenate([infer(part) for part in np.array_split(images, divisor) if len(part)])

    return in_memory(parts, what, first=first)


def is_of_memory(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
    )
