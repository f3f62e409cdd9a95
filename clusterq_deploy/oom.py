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
# of torch and of oneDNN on a CPU, where they have no kind of their own, of CUDA, and of runtimes, whose errors have the
# library's kinds
_MESSAGE = re.compile(
    r"memory: you tried to allocate|out of memory|OutOfMemory|bad_alloc|STATUS_ALLOC_FAILED|failed to allocate memory"
    r"|memory ran out|cannot allocate memory|resource temporarily unavailable|can't start new thread"
    r"|could not create a memory|could not (create|execute) a primitive(?! descriptor)",
    re.IGNORECASE,
)
_T = TypeVar("_T")
_Array = npt.NDArray[np.float32]


def retry_on_oom(work: Callable[[int], _T], what: str, *, first: int = 1) -> tuple[_T, int]:
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
            if not is_out_of_memory(error):
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


def split_on_oom(work: Callable[[_Array], _T], what: str) -> Callable[[_Array], list[_T]]:
    """`work` on a batch (N, C, H, W) in as many parts as the memory asks for: what it gives for each part, in order.

    A batch after one that had to be divided is divided likewise from the start.

    Args:
        work: of a part of a batch; what it does to one image has to depend on that alone.
        what: as for `retry_on_oom`, whose errors it raises.
    """
    divisor = 1

    def on(images: _Array) -> list[_T]:
        nonlocal divisor

        def divided(by: int) -> list[_T]:
            return [work(part) for part in np.array_split(images, by) if len(part)]

        found, divisor = retry_on_oom(divided, what, first=divisor)
        return found

    return on


def infer_split_on_oom(infer: Callable[[_Array], _Array], what: str) -> Callable[[_Array], _Array]:
    """Return `infer`, logits (N, classes) of images (N, C, H, W), split by `split_on_oom`."""
    parts = split_on_oom(infer, what)
    return lambda images: np.concatenate(parts(images))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
    )
