"""The results of a table in a JSON file: records by key, added one at a time."""

import json
import os
from pathlib import Path
from typing import TypedDict

from cells import Record

_ORDER = ("model", "recipe", "effort", "label", "first_last", "bits", "seed", "key")


def write(path: Path, text: str) -> None:
    """Write a file in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Content(TypedDict):
    """Measured cells, failed ones, and the configurations of the runs by their digest."""

    schema: int
    cells: list[Record]
    failed: list[Record]
    configs: dict[str, Record]


class Results:
    """The results of a table in the JSON file `path`, which is read and written for every change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Content:
        """Return the content of the file."""
        if not self.path.is_file():
            return {"schema": 1, "cells": [], "failed": [], "configs": {}}
        content: Content = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    @property
    def cells(self) -> list[Record]:
        """The measured cells, one per key."""
        return self.read()["cells"]

    @property
    def failed(self) -> list[Record]:
        """The cells whose last attempt failed."""
        return self.read()["failed"]

    def has(self, key: str, code: str | None) -> bool:
        """Return whether a cell was measured, with this code of the package if one is given."""
        return any(cell["key"] == key and code in (None, cell["code"]) for cell in self.cells)

    def add(self, record: Record, config: Record) -> None:
        """Add a cell in place of an earlier one, and the settings of its `config_digest`."""
        content = self.read()
        content["cells"] = _replace(content["cells"], record)
        content["failed"] = [cell for cell in content["failed"] if cell["key"] != record["key"]]
        configs = {**content["configs"], record["config_digest"]: config}
        used = {cell["config_digest"] for cell in content["cells"]}
        content["configs"] = {name: configs[name] for name in sorted(used)}
        write(self.path, json.dumps(content, indent=1) + "\n")

    def fail(self, record: Record) -> None:
        """Record that a cell failed, next to an earlier result."""
        content = self.read()
        content["failed"] = _replace(content["failed"], record)
        write(self.path, json.dumps(content, indent=1) + "\n")


def _replace(records: list[Record], record: Record) -> list[Record]:
    others = [other for other in records if other["key"] != record["key"]]
    return sorted([*others, record], key=lambda r: [str(r[name]) for name in _ORDER])
