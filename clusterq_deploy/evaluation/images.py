"""Decode image files of unknown origin within bounds, and record those that cannot be read.

Only some formats are decoded: Pillow passes PostScript to Ghostscript, which executes it. Files that Pillow warns of or
refuses as decompression bombs are not decoded.
"""

import errno
import logging
import stat
import threading
import warnings
from collections.abc import Iterable
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
_PROCESS_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # not the file's fault
_OPENING = threading.Lock()
"""One thread at a time opens a file, as warning filters belong to the process; any number decode."""


def read_image(file: Path, name: str, spec: InputSpec) -> Images:
    """Decode an image file of any size and mode to (C, H, W) float32, normalized; errors and the report call it `name`.

    Raises:
        UnreadableImageError: it is missing, truncated, too large, not an image, or of an unsupported mode.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
            raise ValueError("it is not a plain file")
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_formats())
        with image:
            return spec.preprocess(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, OSError) and error.errno in _PROCESS_ERRORS:
            raise
        raise UnreadableImageError(name, _reason(error)) from error


def printable(name: str) -> str:
    """Return a file's name in one line, with escapes for characters that are not printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


class Unreadable:
    """Images of a set of `total` that cannot be read; its subsets share the record."""

    def __init__(self, dataset: str, total: int) -> None:
        self.dataset, self.total = dataset, total
        self._errors: dict[int, UnreadableImageError] = {}
        self._logged = 0

    def __len__(self) -> int:
        return len(self._errors)

    def __contains__(self, row: int) -> bool:
        return row in self._errors

    def add(self, row: int, error: UnreadableImageError) -> None:
        """Record that the image of a row of the set cannot be read.

        Raises:
            DataError: there are more of them than `MAX_UNREADABLE` allows.
        """
        self._errors[row] = error
        limit = min(max(1, int(MAX_UNREADABLE * self.total)), self.total - 1)
        if len(self) > limit:
            raise DataError(
                f"more than {limit} of the {self.total} images of {self.dataset!r} cannot be read, and no "
                f"more than {100 * MAX_UNREADABLE:g} % may be; replace them or leave them out: {self._listed()}"
            ) from error

    def rows(self) -> list[tuple[int, str, str]]:
        """Return row, file and reason of each image so far."""
        return [(row, error.file, error.reason) for row, error in self._errors.items()]

    def restore(self, rows: Iterable[tuple[int, str, str]]) -> None:
        """Add the `rows` of an earlier pass over the same set; raise as `add` does."""
        for row, file, reason in rows:
            self.add(row, UnreadableImageError(file, reason))

    def log(self) -> None:
        """Log the number of images and the first names, if there are new ones since the last call."""
        if len(self) > self._logged:
            message = "%d of the %d images of %r cannot be read and are left out: %s"
            logger.warning(message, len(self), self.total, self.dataset, self._listed())
        self._logged = len(self)

    def summary(self) -> dict[str, Any]:
        """Return JSON values for a stage's record: the counts, and the first files with reasons."""
        files = [{"file": error.file, "reason": error.reason} for error in self._first()]
        return {"count": len(self), "total": self.total, "files": files}

    def _first(self) -> list[UnreadableImageError]:
        return [self._errors[row] for row in sorted(self._errors)[:_NAMED]]

    def _listed(self) -> str:
        names = [f"{error.file} ({error.reason})" for error in self._first()]
        return "; ".join(names if len(self) <= _NAMED else [*names, f"{len(self) - _NAMED} more"])


def _reason(error: Exception) -> str:
    """Return the problem, without the file's path."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of these formats: {', '.join(_formats())}"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


@cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats with these suffixes."""
    return tuple(sorted({name for suffix, name in Image.registered_extensions().items() if suffix in SUFFIXES}))
