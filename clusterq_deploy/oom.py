"""Retry work with smaller batches if they do not fit the memory."""

import logging
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from clusterq_deploy.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

_LARGEST_DIVISOR = 64
# errors without a class for it: of torch and oneDNN on a CPU, of CUDA, and of runtimes
_MESSAGE = re.compile(
    r"memory: you tried to allocate|out of memory|OutOfMemory|bad_alloc|STATUS_ALLOC_FAILED|failed to allocate memory"
    r"|memory ran out|cannot allocate memory|resource temporarily unavailable|can't start new thread"
    r"|could not create a memory|could not (create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)
_T = TypeVar("_T")
_Array = npt.NDArray[np.float32]


def retry_on_oom(work: Callable[[int], _T], what: str, *, first: int = 1) -> tuple[_T, int]:
    """Return the result of `work(divisor)` and its divisor: the first of 1, 2, 4... whose batches fit the memory.

    Work starts again with each divisor, so that its result is the same as with that batch size from the start.

    Args:
        work: raises the error of torch, Python or a runtime if there is not enough memory; state that it saves belongs
            to that divisor.
        what: its name in messages.
        first: the first divisor, a power of two.

    Raises:
        OutOfMemoryError: a sixty-fourth of the batch does not fit either.
    """
    divisor = first
    while True:
        try:
            return work(divisor), divisor
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if divisor >= _LARGEST_DIVISOR:
                advice = "end what else uses it" + (", or give --device cpu" if "CUDA" in str(error) else "")
                raise OutOfMemoryError(
                    f"{what}: there is not enough memory for batches of 1/{divisor} either; {advice}"
                ) from error
        divisor *= 2
        torch.cuda.empty_cache()  # outside of the handler: the error's traceback holds tensors
        logger.warning("%s: there is not enough memory; again, with batches divided by %d", what, divisor)


def split_on_oom(work: Callable[[_Array], _T], what: str) -> Callable[[_Array], list[_T]]:
    """Return a function that applies `work` to parts of a batch (N, C, H, W) that fit the memory: the results in order.

    A batch after one that had to be divided is divided by the same number from the start. Each image's result has to
    depend on that image only. Errors and `what` are those of `retry_on_oom`.
    """
    divisor = 1

    def in_parts(images: _Array) -> list[_T]:
        nonlocal divisor
        results, divisor = retry_on_oom(
            lambda by: [work(part) for part in np.array_split(images, by) if len(part)], what, first=divisor
        )
        return results

    return in_parts


def infer_split_on_oom(infer: Callable[[_Array], _Array], what: str) -> Callable[[_Array], _Array]:
    """Return `infer`, logits (N, classes) of images (N, C, H, W), split by `split_on_oom`."""
    parts = split_on_oom(infer, what)
    return lambda images: np.concatenate(parts(images))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of any class reports a lack of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
    )
