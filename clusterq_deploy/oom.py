"""Work whose batches do not fit the memory is done again in smaller ones."""

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
# of torch and of oneDNN on a CPU, where they have no class of their own, of CUDA, and of runtimes, whose errors have
# the library's classes
_MESSAGE = re.compile(
    r"memory: you tried to allocate|out of memory|OutOfMemory|bad_alloc|STATUS_ALLOC_FAILED|failed to allocate memory"
    r"|memory ran out|cannot allocate memory|resource temporarily unavailable|can't start new thread"
    r"|could not create a memory|could not (create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)
_T = TypeVar("_T")
_Array = npt.NDArray[np.float32]


def retry_on_oom(work: Callable[[int], _T], what: str, *, first: int = 1) -> tuple[_T, int]:
    """Return the result of `work(divisor)`, and the divisor of its batches for which the memory was enough: 1, 2, 4...

    Work starts over with each, or goes on if it was interrupted at the same one, so that its result is the same as if
    such batches had been asked for.

    Args:
        work: raises what torch, Python or a runtime raises if there is not enough memory; what it leaves behind then
            belongs to that divisor only.
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
            if not is_out_of_memory(error):
                raise
            if divisor >= _LARGEST_DIVISOR:
                elsewhere = ", or give --device cpu" if "CUDA" in str(error) else ""
                raise OutOfMemoryError(
                    f"{what}: there is not enough memory for batches of 1/{divisor} either; end what else uses it"
                    f"{elsewhere}"
                ) from error
        divisor *= 2
        torch.cuda.empty_cache()  # outside of the handler: the error's traceback holds tensors
        logger.warning("%s: there is not enough memory; again, with batches divided by %d", what, divisor)


def split_on_oom(work: Callable[[_Array], _T], what: str) -> Callable[[_Array], list[_T]]:
    """Return `work` on a batch (N, C, H, W) in as many parts as fit the memory: what it returns for each, in order.

    A batch after one that had to be divided is divided likewise from the start.

    Args:
        work: of a part of a batch; what it does to one image has to depend on that image only.
        what: as for `retry_on_oom`, whose errors it raises.
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
    """Return whether an error, of whatever class, says that the memory was not enough."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
    )
