"""Find the classes that folders and rows of labels.csv name: by a model's class names, by numbers, or by synsets.

A reading that is not the only possible one comes with a note, a clause that says how the labels were read.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.images import SUFFIXES, printable
from clusterq_deploy.models.registry import IMAGENET_CLASSES, imagenet_names, imagenet_synsets
from clusterq_deploy.models.weights import first_line

LABELS_FILE = "labels.csv"
_DELIMITERS = ",;\t"
_FILE_COLUMNS = (
    "file",
    "filename",
    "filepath",
    "path",
    "image",
    "imagefile",
    "imagepath",
    "imagename",
    "imageid",
    "id",
)
_LABEL_COLUMNS = ("label", "labelid", "class", "classid", "target", "category", "y", "labelname", "classname", "breed")
"""Names of columns, in lower case and without spaces and underscores, the most telling first."""
_SYNSET = re.compile(r"n\d{8}")
_AROUND_NUMBER = re.compile(r"(\D*)([0-9]{1,9})(?:[\W_].*)?")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NAMED, _MOST_DIGITS = 5, 20

Samples = list[tuple[Path, int]]


def classes_of_folders(
    folders: Sequence[str], classes: int, names: Sequence[str], noun: str = "folder"
) -> tuple[list[int], str | None]:
    """Return the class of each folder, given in sorted order, and a note on the numbering if it is not the only one.

    Args:
        folders: names of folders, or of labels, as `noun` says.
        classes: number of the model's classes.
        names: the model's class names, or none.

    Raises:
        DataError: the folders are not the model's classes.
    """
    by_name = _by_name(folders, names)
    if by_name and None not in by_name:
        return _named(folders, [number for number in by_name if number is not None], names, noun)
    if all(folder.isdecimal() and len(folder) <= _MOST_DIGITS for folder in folders):
        numbers = [int(folder) for folder in folders]
        offset, note = numbering(numbers, classes)
        if offset <= min(numbers) and max(numbers) - offset < classes:
            if offset == 0 and set(numbers) == set(range(1, len(numbers) + 1)):
                note = (
                    f"{noun}s 1..{len(numbers)} are read as classes 1..{len(numbers)}: there is none for 0 or {classes}"
                )
                note += f"; if they count from 1, add an empty folder {classes}" if noun == "folder" else ""
            return [number - offset for number in numbers], note
    if all(map(_SYNSET.fullmatch, folders)) and (by_synset := _by_synset(folders, classes, names)):
        return by_synset, None
    if (by_part := _by_number_in_name(folders, classes)) is not None:
        return by_part, f"{noun}s are numbered by the number in their names: {_equations(folders, by_part)}"
    ordered = list(range(len(folders)))
    agrees = not by_name or all(number in (None, place) for place, number in enumerate(by_name))
    if len(folders) == classes and agrees and not _SPLITS.issuperset(folder.casefold() for folder in folders):
        other = f", as {_listed(_unknown(folders, by_name))} are not class names of the model" if by_name else ""
        return (
            ordered,
            f"{noun}s are numbered in the sorted order of their names{other}: {_equations(folders, ordered)}",
        )
    raise DataError(_mismatch(folders, classes, names, by_name, noun))


def numbering(labels: Sequence[int], classes: int) -> tuple[int, str | None]:
    """Return what to subtract from numbers to get classes, 1 if they count from 1 to `classes`, and a note on it."""
    if min(labels) >= 1 and max(labels) == classes:
        return 1, f"labels are numbered from 1: 1..{classes} are read as classes 0..{classes - 1}"
    return 0, None


def read_labels_file(path: Path, classes: int, names: Sequence[str]) -> tuple[Samples, str | None]:
    """Read the rows of a table: files that are in `path` or in its `images` folder, and their labels.

    A header names the columns; without one they are found by content. Suffixes of files may be missing. Labels are
    whole numbers, written as floats or not, or class names.

    Returns:
        Files with labels, which may be out of range, and a note on the numbering of class names.

    Raises:
        DataError: a row does not fit.
    """
    table = path / LABELS_FILE
    rows = _read_rows(table)
    expected = "expected file,label with a whole number as label, such as 'cat/001.png,3'"
    expected += f", or a class name, such as {f'cat/001.png,{names[0]}'!r}" if names else ""
    files = _Files(path)
    header = _header(files, rows[0][1], names) if rows else []
    rows = rows[1:] if header else rows
    if not rows:
        return [], None
    columns = _columns(files, header, [row for _, row in rows], names)
    samples: list[tuple[Path, str]] = []
    for number, row in rows:
        where = f"{str(table)!r} row {number}"
        if columns is None or max(columns) >= len(row) or not row[columns[1]].strip():
            raise DataError(f"{where} is {','.join(row)!r}; {expected}")
        samples.append((files.get(row[columns[0]], where), row[columns[1]].strip()))
    texts = sorted({text for _, text in samples})
    by_name, numbers = _by_name(texts, names), {text: _whole_number(text) for text in texts}
    if by_name and None not in by_name:
        matched, note = _named(texts, [number for number in by_name if number is not None], names, "label")
        label_of = dict(zip(texts, matched, strict=True))
    elif any(number is not None for number in numbers.values()):
        label_of, note = {text: number for text, number in numbers.items() if number is not None}, None
        for (number, row), (_, text) in zip(rows, samples, strict=True):
            if text not in label_of:
                raise DataError(f"{str(table)!r} row {number} is {','.join(row)!r}; {expected}")
    else:
        number, row = rows[0]
        try:
            matched, note = classes_of_folders(texts, classes, names, "label")
        except DataError as error:
            raise DataError(f"{str(table)!r} {error}; row {number} is {','.join(row)!r}; {expected}") from error
        label_of = dict(zip(texts, matched, strict=True))
    return [(file, label_of[text]) for file, text in samples], note


# ---- names ----


def _key(name: str) -> str:
    """Return a name without differences in case, spaces, hyphens and underscores."""
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _by_name(given: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return the class that has each name, or one of its synonyms separated by commas; nothing if none is found."""
    exact, whole, parts = (
        defaultdict[str, set[int]](set),
        defaultdict[str, set[int]](set),
        defaultdict[str, set[int]](set),
    )
    for number, name in enumerate(names):
        exact[name].add(number)
        whole[_key(name)].add(number)
        for part in name.split(","):
            parts[_key(part)].add(number)
    found: list[int | None] = []
    for name in given:
        candidates = exact.get(name) or whole.get(_key(name)) or parts.get(_key(name)) or set()
        found.append(next(iter(candidates)) if len(candidates) == 1 else None)
    return [] if all(number is None for number in found) else found


def _named(given: Sequence[str], numbers: list[int], names: Sequence[str], noun: str) -> tuple[list[int], str | None]:
    """Return classes that were found by name, with a note if some are missing, or if the names are other numbers."""
    decimal = [(int(name), number) for name, number in zip(given, numbers, strict=True) if name.isdecimal()]
    if any(value != number for value, number in decimal):
        return numbers, f"numbers are read as the model's class names: {_equations(given, numbers)}"
    missing = [name for number, name in enumerate(names) if number not in set(numbers)]
    if missing and len(decimal) < len(given):
        return numbers, f"{len(missing)} of the model's {len(names)} classes have no {noun}: {_listed(missing)}"
    return numbers, None


def _by_synset(folders: Sequence[str], classes: int, names: Sequence[str]) -> list[int] | None:
    """Return the classes of ImageNet's synsets: 1000 classes are in their order, others are found by English names."""
    place = {synset: number for number, synset in enumerate(imagenet_synsets())}
    if not place.keys() >= set(folders):
        return None
    if classes == IMAGENET_CLASSES:
        return [place[folder] for folder in folders]
    english = imagenet_names() if names else ()
    found = _by_name([english[place[folder]] for folder in folders], names) if english else []
    numbers = [number for number in found if number is not None]
    return numbers if len(set(numbers)) == len(folders) else None


def _by_number_in_name(folders: Sequence[str], classes: int) -> list[int] | None:
    """Return the numbers in names such as class_1 and 001.cat, if they are exactly 0..N-1 or 1..N."""
    matches = [_AROUND_NUMBER.fullmatch(folder) for folder in folders]
    if len({match and match[1] for match in matches}) > 1:
        return None
    numbers = [int(match[2]) for match in matches if match]
    first = min(numbers, default=-1)
    complete = first in (0, 1) and sorted(numbers) == list(range(first, first + classes))
    return [number - first for number in numbers] if complete else None


def _unknown(given: Sequence[str], by_name: Sequence[int | None]) -> list[str]:
    return [name for name, number in zip(given, by_name, strict=True) if number is None]


def _mismatch(
    folders: Sequence[str], classes: int, names: Sequence[str], by_name: Sequence[int | None], noun: str
) -> str:
    """Return why folders are not a model's classes."""
    expected = f"expected one {noun} per class, or {noun}s named by class numbers 0..{classes - 1}"
    expected += f" or class names ({_listed(names)})" if names else ""
    problem = f"has {len(folders)} class {noun}s, but the model has {classes} classes"
    if by_name and (unknown := _unknown(folders, by_name)):
        keys = {_key(name): name for name in names}
        near = [keys[key] for name in unknown[:_NAMED] for key in get_close_matches(_key(name), keys, 1)]
        hint = f" (near: {_listed(near)})" if near else ""
        problem = f"has {noun}s that are not one of the model's class names: {_listed(unknown)}{hint}"
    elif len(folders) == classes:
        problem = f"has the {noun}s {_listed(folders)}, which are parts of a data set and not classes"
    return f"{problem}; {expected}"


def _equations(names: Sequence[str], numbers: Sequence[int]) -> str:
    """Return the first names with their classes, and the last one."""
    shown = [f"{name} = {number}" for name, number in zip(map(printable, names), numbers, strict=True)]
    return ", ".join(shown if len(shown) <= _NAMED else [*shown[: _NAMED - 1], "...", shown[-1]])


def _listed(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:_NAMED]]
    return ", ".join([*shown, f"{len(names) - _NAMED} more"] if len(names) > _NAMED else shown)


# ---- labels.csv ----


def _read_rows(table: Path) -> list[tuple[int, list[str]]]:
    """Return the rows that are not blank, with their numbers from 1; cells are separated by `,`, `;` or tabs."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = next((character for character in _DELIMITERS if character in first), ",")
            return [(number, row) for number, row in enumerate(csv.reader(stream, delimiter=delimiter), 1) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {str(table)!r} ({first_line(error)}); expected rows of file,label") from error


def _header(files: "_Files", row: list[str], names: Sequence[str]) -> list[str]:
    """Return the columns that a first row names; none if it has a label, a suffix or the name of a file."""
    header = [re.sub(r"[\W_]", "", cell).casefold() for cell in row]
    if set(header) & set(_FILE_COLUMNS) and set(header) & set(_LABEL_COLUMNS):
        return header
    is_data = any(_can_be_label(cell, names) for cell in row[1:]) or Path(row[0]).suffix
    return [] if is_data or any(map(files.find, row)) else header


def _columns(files: "_Files", header: list[str], rows: list[list[str]], names: Sequence[str]) -> tuple[int, int] | None:
    """Return the columns of files and labels, by the header, else by content; None if it is not clear."""
    file = next((header.index(name) for name in _FILE_COLUMNS if name in header), None)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header and header.index(name) != file), None)
    width = max(map(len, rows), default=0)
    if file is None:
        others = [column for column in range(width) if column != label]
        file = next((c for c in others if rows and c < len(rows[0]) and files.find(rows[0][c])), 0)
    if label is None:
        others = [column for column in range(width) if column != file]
        if len(others) > 1:  # the only column whose every cell can be a label
            others = [c for c in others if all(c < len(row) and _can_be_label(row[c], names) for row in rows)]
        label = others[0] if len(others) == 1 else None
    return None if label is None or label == file else (file, label)


def _can_be_label(cell: str, names: Sequence[str]) -> bool:
    return _whole_number(cell) is not None or bool(_by_name([cell.strip()], names))


def _whole_number(text: str) -> int | None:
    """Return the number that a text such as 3 or 3.0 is, or None."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return int(float(text)) if float(text).is_integer() else None
    except ValueError:
        return None


class _Files:
    """The files of a folder and of its `images` folder, by their names with or without suffixes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stems: dict[Path, dict[str, list[Path]]] = {}

    def get(self, name: str, where: str) -> Path:
        """Return the file of a name; raise DataError, which says `where` the name is, if there is none."""
        if _leads_out(name):
            raise DataError(f"{where} names {name!r}, outside of the folder; expected a path below it")
        file = self.find(name)
        if file is None:
            raise DataError(f"{where} names {name!r}, but there is no such file in the folder or its images folder")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise DataError(f"{where} names {name!r}, a link out of the folder; expected a file below it")
        return file

    def find(self, name: str) -> Path | None:
        """Return the file of a name, or None; without its suffix a name may be that of one image only."""
        if _leads_out(name) or not name.strip():
            return None
        places = [folder / name for folder in (self.path, self.path / "images")]
        try:
            images = [files for place in places if (files := self._named(place))]
        except (OSError, ValueError):  # an impossible name: too long, or with a NUL
            return None
        return images[0][0] if images and len(images[0]) == 1 else None

    def _named(self, place: Path) -> list[Path]:
        if place.is_file():
            return [place]
        folder = place.parent
        if folder not in self._stems:
            stems = self._stems[folder] = defaultdict[str, list[Path]](list)
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.suffix.lower() in SUFFIXES:
                    stems[file.stem].append(file)
        return self._stems[folder].get(place.name, [])


def _leads_out(name: str) -> bool:
    # Windows' rules find an absolute path and `..` in the syntax of both systems
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or ".." in windows.parts
