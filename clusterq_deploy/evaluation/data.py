"""Labelled images to measure accuracy on, decoded when they are read."""

import csv
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from clusterq_deploy.errors import DataError, UnreadableImageError
from clusterq_deploy.evaluation.images import SUFFIXES, Images, Unreadable, printable, read_image
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.digits import HELD_OUT
from clusterq_deploy.models.weights import first_line

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

_LABELS_FILE = "labels.csv"
_FORMATS = f"a directory of class folders, a directory with {_LABELS_FILE} (file,label), or an .npz"
_DECODERS = min(8, os.cpu_count() or 1)


class Classifier(Protocol):
    """The attributes of a model, such as a `LoadedModel`, that evaluation data depends on."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def input(self) -> InputSpec: ...
    @property
    def classes(self) -> int: ...


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Images in a fixed order, with their labels if they have any.

    Reading an image may show that it is unreadable. Batches leave such images out; `readable` has the others.

    Attributes:
        name: in the report.
        rows: (N,) int64, the images' rows in the whole set, if this one is a subset.
        labels: (N,) int64, or None.
        read: returns the image of a row, (C, H, W) float32, normalized, or raises an `UnreadableImageError`. It is
            called from several threads.
        unreadable: the unreadable rows so far.
    """

    name: str
    rows: Rows
    labels: Labels | None
    read: Callable[[int], Images]
    unreadable: Unreadable

    @classmethod
    def of(cls, name: str, count: int, labels: Labels | None, read: Callable[[int], Images]) -> Self:
        """Make a set of `count` images; none is read yet."""
        return cls(name, np.arange(count, dtype=np.int64), labels, read, Unreadable(name, count))

    @classmethod
    def from_images(cls, name: str, images: Images, labels: npt.ArrayLike | None = None) -> Self:
        """Make a set of images in memory: (N, C, H, W) float32, normalized, with labels (N,) or without."""
        if images.ndim != 4 or not len(images):
            raise DataError(f"{name}: images have shape {images.shape}; expected (N, C, H, W) with N > 0")
        images = np.ascontiguousarray(images, dtype=np.float32)
        classes = None if labels is None else np.asarray(labels, dtype=np.int64)
        if classes is not None and classes.shape != (len(images),):
            raise DataError(f"{name}: labels have shape {classes.shape}; expected ({len(images)},)")
        return cls.of(name, len(images), classes, lambda row: images[row])

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured on it."""
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def readable(self) -> Rows:
        """The indices (M,) int64 of the images that are not known to be unreadable: at first of all."""
        return np.array([i for i, row in enumerate(self.rows) if int(row) not in self.unreadable], dtype=np.int64)

    def subset(self, indices: Rows) -> "EvaluationSet":
        """Return the set of the images of the given indices (M,) int64, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def batches(self, batch_size: int, done: int = 0) -> Iterator[tuple[Images, Labels | None]]:
        """Yield images (B, C, H, W) float32, normalized, and labels (B,) int64, or None if there are none.

        An unreadable image makes its batch smaller, in every pass, so that all passes have the same batches.

        Args:
            done: number of images that an earlier pass yielded, in batches of the same size; they are skipped.

        Raises:
            DataError: more images cannot be read than `unreadable` allows.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        first = -(-(int(self.readable[done - 1]) + 1) // batch_size) * batch_size if done else 0
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(first, len(self), batch_size):
                rows = dict(enumerate(map(int, self.rows[start : start + batch_size]), start))
                reads = {i: pool.submit(self.read, row) for i, row in rows.items() if row not in self.unreadable}
                images = {}
                for index, reading in reads.items():
                    try:
                        images[index] = reading.result()
                    except UnreadableImageError as error:
                        self.unreadable.add(rows[index], error)
                if images:
                    labels = None if self.labels is None else self.labels[list(images)]
                    yield np.stack(list(images.values())), labels
        self.unreadable.log()


def load_evaluation(path: Path | None, model: Classifier, limit: int | None = None) -> EvaluationSet:
    """Open evaluation data for a model.

    Args:
        path: a directory of class folders, a directory with labels.csv, or an .npz with `images` (N, H, W, C)
            or (N, H, W) uint8 and `labels` (N,). Class folders whose names are class numbers are labelled by
            them; any others are the classes in sorted order. None: the bundled model's held-out images.
        model: its input and its classes.
        limit: the largest number of images, evenly spaced over the set.

    Raises:
        DataError: the data is missing, of another format, or for another task than the model's.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit} images; expected at least 1")
    if path is None:
        if model.source != "bundled":
            raise DataError(f"no evaluation data was given for {model.name!r}; expected {_FORMATS}")
        return _from_npz(HELD_OUT, "digits, held out", model, limit)
    if path.is_dir():
        return _from_folder(path, model, limit)
    if not path.exists():
        raise DataError(f"evaluation data {str(path)!r} does not exist; expected {_FORMATS}")
    if path.suffix != ".npz":
        raise DataError(f"evaluation data {str(path)!r} has an unknown format; expected {_FORMATS}")
    return _from_npz(path, path.name, model, limit)


def _from_folder(path: Path, model: Classifier, limit: int | None) -> EvaluationSet:
    in_table = (path / _LABELS_FILE).is_file()
    samples = _read_labels_file(path) if in_table else _read_class_folders(path, model.classes)
    if not samples:
        raise DataError(f"no images were found in {str(path)!r}; expected {_FORMATS}")
    labels = _check_labels(path, [label for _, label in samples], model.classes)
    chosen, spec = _evenly_spaced(len(samples), limit), model.input
    files = [samples[index][0] for index in chosen]

    def read(row: int) -> Images:
        return read_image(files[row], printable(files[row].relative_to(path).as_posix()), spec)

    return EvaluationSet.of(printable(path.resolve().name), len(files), labels[chosen], read)


def _read_class_folders(path: Path, classes: int) -> list[tuple[Path, int]]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{str(path)!r} has neither {_LABELS_FILE} nor folders; expected {_FORMATS}")
    numbers = [int(folder.name) if folder.name.isdecimal() else -1 for folder in folders]
    if not all(0 <= number < classes for number in numbers):
        if len(folders) != classes:
            raise DataError(
                f"{str(path)!r} has {len(folders)} class folders, but the model has {classes} classes; "
                f"expected one folder per class, or folders named by class numbers 0..{classes - 1}"
            )
        numbers = list(range(classes))
    return [
        (file, number)
        for folder, number in zip(folders, numbers, strict=True)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not file.is_dir()
    ]


def _read_labels_file(path: Path) -> list[tuple[Path, int]]:
    """Read rows of file,label; the files are in `path` or in its `images` folder."""
    table = path / _LABELS_FILE
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = [(number, row) for number, row in enumerate(csv.reader(stream), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {str(table)!r} ({first_line(error)}); expected rows of file,label") from error
    if rows and _label(rows[0][1]) is None and not Path(rows[0][1][0]).suffix:
        del rows[0]  # a header: neither a label nor a file's name
    samples = []
    for number, row in rows:
        where, label = f"{str(table)!r} row {number}", _label(row)
        if label is None:
            raise DataError(f"{where} is {','.join(row)!r}; expected file,label with a whole number as label")
        # Windows' rules find an absolute path and `..` in the syntax of both systems
        windows = PureWindowsPath(row[0])
        if windows.anchor or ".." in windows.parts:
            raise DataError(f"{where} names {row[0]!r}, outside of the folder; expected a path below it")
        file = next((file for file in (path / row[0], path / "images" / row[0]) if _is_file(file)), None)
        if file is None:
            raise DataError(f"{where} names {row[0]!r}, but there is no such file in the folder or its images folder")
        if not file.resolve().is_relative_to(path.resolve()):
            raise DataError(f"{where} names {row[0]!r}, a link out of the folder; expected a file below it")
        samples.append((file, label))
    return samples


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # an impossible name: too long, or with a NUL
        return False


def _label(row: list[str]) -> int | None:
    """Return the label of a row of file,label, or None."""
    try:
        return int(row[1]) if len(row) == 2 else None
    except ValueError:
        return None


def _from_npz(path: Path, name: str, model: Classifier, limit: int | None) -> EvaluationSet:
    expected = "expected an .npz with images (N,H,W,C) or (N,H,W) uint8 and labels (N,) integers"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except KeyError as error:
        raise DataError(f"{str(path)!r} has no {str(error.args[0]).split()[0]}; {expected}") from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"cannot read {str(path)!r} ({first_line(error)}); {expected}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{str(path)!r} has images {images.shape} {images.dtype}; {expected}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{str(path)!r} has labels {labels.shape} {labels.dtype} for {len(images)} images; {expected}")
    if not images.size:
        raise DataError(f"{str(path)!r} has no images; {expected}")
    channels = images.shape[3] if images.ndim == 4 else 1
    if channels != model.input.size[0]:
        raise DataError(
            f"{str(path)!r} has images of {channels} channels, but the model has {model.input.size[0]}; "
            "convert the images, or choose other data"
        )
    labels = _check_labels(path, labels, model.classes)
    chosen, spec = _evenly_spaced(len(images), limit), model.input
    images = images[chosen, ..., 0] if images.ndim == 4 and channels == 1 else images[chosen]

    def read(row: int) -> Images:
        try:
            return spec.preprocess(Image.fromarray(images[row]))
        except ValueError as error:
            raise UnreadableImageError(f"image {row}", first_line(error)) from error

    return EvaluationSet.of(name, len(images), labels[chosen], read)


def _check_labels(path: Path, labels: npt.ArrayLike, classes: int) -> Labels:
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= classes:
        outside = f"labels down to {low}" if low < 0 else f"labels up to {high}"
        raise DataError(f"{str(path)!r} has {outside}, but the model has {classes} classes; expected 0..{classes - 1}")
    return np.asarray(labels, dtype=np.int64)


def _evenly_spaced(count: int, limit: int | None) -> Rows:
    """Return the indices of at most `limit` of `count` images, evenly spaced, as sets are often sorted by class."""
    chosen = count if limit is None else min(limit, count)
    return np.arange(chosen, dtype=np.int64) * count // chosen
