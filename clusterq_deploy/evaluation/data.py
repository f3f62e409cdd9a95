"""Labelled images to measure accuracy on, decoded when they are read."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from clusterq_deploy.errors import DataError, UnreadableImageError
from clusterq_deploy.evaluation.images import SUFFIXES, Images, Unreadable, printable, read_image
from clusterq_deploy.evaluation.labels import (
    LABELS_FILE,
    Samples,
    classes_of_folders,
    numbering,
    read_labels_file,
)
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.digits import HELD_OUT
from clusterq_deploy.models.weights import first_line

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

_FORMATS = f"a directory of class folders, a directory with {LABELS_FILE} (file,label), or an .npz"
_NAMED = 5
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
    @property
    def class_names(self) -> tuple[str, ...]: ...


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
        notes: clauses on how the labels were read, if that was not certain, and on files that were passed over.
        label_digest: digest of the labels, if versions that knew neither names nor numbers from 1 read them otherwise.
    """

    name: str
    rows: Rows
    labels: Labels | None
    read: Callable[[int], Images]
    unreadable: Unreadable
    notes: tuple[str, ...] = ()
    label_digest: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        count: int,
        labels: Labels | None,
        read: Callable[[int], Images],
        notes: Sequence[str | None] = (),
    ) -> Self:
        """Make a set of `count` images; none is read yet. Log the notes that are not None."""
        given = tuple(filter(None, notes))
        for note in given:
            logger.warning("%s: %s", name, note)
        return cls(name, np.arange(count, dtype=np.int64), labels, read, Unreadable(name, count), given)

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
            or (N, H, W) uint8 and `labels` (N,). Class folders are named by the model's class names, by class
            numbers from 0 or from 1, or by ImageNet's synsets; any others are the classes in sorted order. None: the
            bundled model's held-out images.
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
    in_table = (path / LABELS_FILE).is_file()
    read_samples = read_labels_file if in_table else _read_class_folders
    samples, *notes = read_samples(path, model.classes, model.class_names)
    passed_over = None if in_table else _passed_over(path)
    if not samples:
        problem = f"no images were found in {str(path)!r}"
        raise DataError(f"{problem}{f' ({passed_over})' if passed_over else ''}; expected {_FORMATS}")
    labels, note = _check_labels(path, [label for _, label in samples], model.classes)
    chosen, spec = _evenly_spaced(len(samples), limit), model.input
    files = [samples[index][0] for index in chosen]

    def read(row: int) -> Images:
        return read_image(files[row], printable(files[row].relative_to(path).as_posix()), spec)

    name = printable(path.resolve().name)
    data = EvaluationSet.of(name, len(files), labels[chosen], read, [*notes, note, passed_over])
    if in_table or (np.diff(labels) >= 0).all() or _has_numbered_folders(path, samples):
        return data
    return replace(data, label_digest=hashlib.sha256(labels.tobytes()).hexdigest())


def _has_numbered_folders(path: Path, samples: Samples) -> bool:
    """Return whether every label is the number that its folder is named by."""
    folders = [(file.relative_to(path).parts[0], label) for file, label in samples]
    return all(folder.isdecimal() and int(folder) == label for folder, label in folders)


def _read_class_folders(path: Path, classes: int, names: Sequence[str]) -> tuple[Samples, str | None]:
    folders = _folders(path)
    if not folders:
        raise DataError(f"{str(path)!r} has neither {LABELS_FILE} nor folders; expected {_FORMATS}")
    try:
        numbers, note = classes_of_folders([folder.name for folder in folders], classes, names)
    except DataError as error:
        raise DataError(f"{str(path)!r} {error}{_deeper(folders, classes, names)}") from error
    samples = [
        (file, number)
        for folder, number in zip(folders, numbers, strict=True)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not file.is_dir()
    ]
    return samples, note


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _deeper(folders: list[Path], classes: int, names: Sequence[str]) -> str:
    """Return which of the folders to give instead, as a clause, if there are class folders in one of them."""
    fitting = []
    for folder in folders:
        try:
            inner = [entry.name for entry in _folders(folder)]
            if inner and classes_of_folders(inner, classes, names):
                fitting.append((len(inner), not folder.name.startswith("train"), folder))
        except (DataError, OSError):
            continue
    return f"; the class folders seem to be in {str(max(fitting)[-1])!r}: give that" if fitting else ""


def _passed_over(path: Path) -> str | None:
    """Return the number of files in class folders and next to them that are not read, by suffix; None if all are."""
    suffixes = Counter(
        file.suffix.lower() or "no suffix"
        for file in path.rglob("*")
        if not file.name.startswith(".") and not file.is_dir()
        if file.suffix.lower() not in SUFFIXES or file.parent == path
    )
    if not suffixes:
        return None
    counts = [f"{count:,} with {printable(suffix)}" for suffix, count in suffixes.most_common(_NAMED)]
    more = [f"{len(suffixes) - _NAMED} more suffixes"] if len(suffixes) > _NAMED else []
    read = " ".join(sorted(SUFFIXES))
    return (
        f"{suffixes.total():,} files were passed over: {', '.join([*counts, *more])}; {read} in class folders are read"
    )


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
    labels, note = _check_labels(path, labels, model.classes)
    chosen, spec = _evenly_spaced(len(images), limit), model.input
    images = images[chosen, ..., 0] if images.ndim == 4 and channels == 1 else images[chosen]

    def read(row: int) -> Images:
        try:
            return spec.preprocess(Image.fromarray(images[row]))
        except ValueError as error:
            raise UnreadableImageError(f"image {row}", first_line(error)) from error

    return EvaluationSet.of(name, len(images), labels[chosen], read, [note])


def _check_labels(path: Path, labels: npt.ArrayLike, classes: int) -> tuple[Labels, str | None]:
    """Return labels as class numbers, and a note if they count from 1."""
    low, high = int(np.min(labels)), int(np.max(labels))
    offset, note = numbering([low, high], classes)
    if offset:
        return np.asarray(labels, dtype=np.int64) - offset, note
    if low < 0 or high >= classes:
        outside = f"labels down to {low}" if low < 0 else f"labels up to {high}"
        raise DataError(f"{str(path)!r} has {outside}, but the model has {classes} classes; expected 0..{classes - 1}")
    return np.asarray(labels, dtype=np.int64), None


def _evenly_spaced(count: int, limit: int | None) -> Rows:
    """Return the indices of at most `limit` of `count` images, evenly spaced, as sets are often sorted by class."""
    chosen = count if limit is None else min(limit, count)
    return np.arange(chosen, dtype=np.int64) * count // chosen
