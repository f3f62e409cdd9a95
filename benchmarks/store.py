"""The results of a table in a JSON file: records by key, merged one at a time."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_ORDER = ("model", "recipe", "effort", "label", "first_last", "bits", "seed", "key")


def write(path: Path, text: str) -> None:
    """Write a file as one step: a reader finds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Results:
    """`cells` that were measured, `failed` ones, and the `configs` of the runs by their digest.

    The file is read and written for every change, so that it is complete whenever the script ends.

    Args:
        path: the JSON file; made when the first record comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _read(self) -> Record:
        if not self.path.is_file():
            return {"schema": 1, "cells": [], "failed": [], "configs": {}}
        content: Record = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    @property
    def cells(self) -> list[Record]:
        """The measured cells, one a key."""
        found: list[Record] = self._read()["cells"]
        return found

    @property
    def failed(self) -> list[Record]:
        """The cells whose last attempt failed."""
        found: list[Record] = self._read()["failed"]
        return found

    def has(self, key: str, code: str | None) -> bool:
        """Whether a cell was measured, with this code of the package where one is given."""
        return any(cell["key"] == key and code in (None, cell["code"]) for cell in self.cells)

    def add(self, record: Record, config: Record) -> None:
        """Put a measured cell, and the settings behind its `config_digest`, in the place of what its key had."""
        content = self._read()
        content["cells"] = _replaced(content["cells"], record)
        content["failed"] = [cell for cell in content["failed"] if cell["key"] != record["key"]]
        configs = {**content["configs"], record["config_digest"]: config}
        used = {cell["config_digest"] for cell in content["cells"]}
        content["configs"] = {name: configs[name] for name in sorted(used)}
        self._write(content)

    def fail(self, record: Record) -> None:
        """Note that a cell failed; an earlier result of it stays."""
        content = self._read()
        content["failed"] = _replaced(content["failed"], record)
        self._write(content)

    def _write(self, content: Record) -> None:
        write(self.path, json.dumps(content, indent=1) + "\n")


def _replaced(records: list[Record], record: Record) -> list[Record]:
    others = [known for known in records if known["key"] != record["key"]]
    return sorted([*others, record], key=lambda r: [str(r[name]) for name in _ORDER])
