"""Image files of unknown origin: decoded within bounds, and what cannot be read counted and named.

A file is decoded by the formats that evaluation data may have alone: Pillow hands PostScript to Ghostscript, which runs
it. What Pillow warns of or refuses as a decompression bomb is not decoded.
"""

import errno
import logging
import stat
import threading
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clusterq_deploy.errors import DataError, UnreadableImageError
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.weights import first_line

logger = logging.getLogger(__name__)

Images = npt.NDArray[np.float32]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_UNREADABLE = 0.01
"""The share of a set that may be unreadable; of a small set one image, of a single image none."""
_NAMED = 5
_OF_THE_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # no file is at fault
_OPENING = threading.Lock()
"""Filters of warnings belong to the process: one thread at a time opens a file, any number decode."""


def read_image(file: Path, name: str, spec: InputSpec) -> Images:
    """Decode an image file of any size and mode: (C, H, W) float32, normalized.

    Args:
        file: where it is.
        name: what it is called in messages and in the report.
        spec: how it becomes the model's input.

    Raises:
        UnreadableImageError: it is missing, truncated, too large, no image, or of a mode that has no meaning as pixels.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # to open a pipe would wait for its writer
            raise ValueError("it is not a plain file")
        with _open(file) as image:
            return spec.preprocess(image)
    except MemoryError:
        raise
    except Exception as error:  # damage shows wherever the parser meets it
        if isinstance(error, OSError) and error.errno in _OF_THE_PROCESS:
            raise
        raise UnreadableImageError(name, _reason(error)) from error


def prepare_image(image: Image.Image, name: str, spec: InputSpec) -> Images:
    """The same for an image in memory.

    Raises:
        UnreadableImageError: its size or mode cannot become the model's input.
    """
    try:
        return spec.preprocess(image)
    except ValueError as error:
        raise UnreadableImageError(name, first_line(error)) from error


def printable(name: str) -> str:
    """A file's name as one line that a terminal and JSON take: what does not print stands as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


class Unreadable:
    """The images of a set that cannot be read; one record for a set and its subsets, filled as they are read.

    Args:
        dataset: the set's name, for messages.
        total: how many images the set has.
    """

    def __init__(self, dataset: str, total: int) -> None:
        self.dataset, self.total = dataset, total
        self._errors: dict[int, UnreadableImageError] = {}
        self._told = 0

    def __len__(self) -> int:
        return len(self._errors)

    def __contains__(self, row: int) -> bool:
        return row in self._errors

    @property
    def limit(self) -> int:
        """How many of the images may be unreadable."""
        return min(max(1, int(MAX_UNREADABLE * self.total)), self.total - 1)

    def add(self, row: int, error: UnreadableImageError) -> None:
        """Record that the image of a row of the set cannot be read.

        Raises:
            DataError: there are more of them than the limit.
        """
        self._errors[row] = error
        if len(self) > self.limit:
            raise DataError(
                f"more than {self.limit} of the {self.total} images of {self.dataset!r} cannot be read, and no "
                f"more than {100 * MAX_UNREADABLE:g} % may be; replace them or leave them out: {self._listed()}"
            ) from error

    def rows(self) -> list[tuple[int, str, str]]:
        """What was found so far: row, file and reason of each."""
        return [(row, own.file, own.reason) for row, own in self._errors.items()]

    def restore(self, rows: Iterable[tuple[int, str, str]]) -> None:
        """Take over what an earlier pass over the same set found.

        Raises:
            DataError: as for `add`.
        """
        for row, file, reason in rows:
            self.add(row, UnreadableImageError(file, reason))

    def tell(self) -> None:
        """Log how many there are, with the first names, if there are more than were told last."""
        if len(self) > self._told:
            logger.warning(
                "%d of the %d images of %r cannot be read and are left out: %s",
                len(self),
                self.total,
                self.dataset,
                self._listed(),
            )
        self._told = len(self)

    def summary(self) -> dict[str, Any]:
        """JSON values for a stage's record: how many of how many, and the first in the set's order with reasons."""
        files = [{"file": own.file, "reason": own.reason} for own in self._first()]
        return {"count": len(self), "total": self.total, "files": files}

    def _first(self) -> list[UnreadableImageError]:
        return [self._errors[row] for row in sorted(self._errors)[:_NAMED]]

    def _listed(self) -> str:
        more = len(self) - _NAMED
        named = [f"{own.file} ({own.reason})" for own in self._first()]
        return "; ".join([*named, *([f"{more} more"] if more > 0 else [])])


def _reason(error: Exception) -> str:
    """What is wrong, without the file's path: the report has it too."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image of these formats: {', '.join(_formats())}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def _open(file: Path) -> Image.Image:
    """Read a file's header; a size at which Pillow would warn is refused as one that it refuses itself."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that have these suffixes."""
    known: Mapping[str, str] = Image.registered_extensions()
    return tuple(sorted({known[suffix] for suffix in SUFFIXES if suffix in known}))
