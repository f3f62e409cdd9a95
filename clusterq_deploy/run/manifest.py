"""The manifest of a run directory: its finished stages, their files and results."""

import hashlib
import json
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.run.stage import Json

MANIFEST, CONFIG = "manifest.json", "run.toml"


@dataclass(frozen=True)
class StageRecord:
    """A finished stage in the manifest.

    Attributes:
        inputs: digest of everything that its result depends on.
        upstream: digest of each stage that it read, by name.
        files: SHA-256 of each file that it wrote, by path relative to the run directory.
        result: a `StageResult` as JSON.
        seconds: its time; after an interruption, that of the resumed part.
        result_sha256: digest of the result; None in older manifests.
        command: the command line that did it; empty in older manifests.
    """

    inputs: str
    upstream: dict[str, str]
    files: dict[str, str]
    result: Json
    seconds: float
    result_sha256: str | None = None
    command: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the result is unchanged."""
        return self.result_sha256 in {None, result_digest(self.result)}

    @property
    def provisional(self) -> bool:
        """Whether a part is missing for lack of memory, which another process may have."""
        return bool(self.result.get("provisional"))

    @property
    def digest(self) -> str:
        """What identifies the stage's work for the stages that read it."""
        return digest({"inputs": self.inputs, "files": self.files})


class Manifest(BaseModel):
    """The content of `manifest.json`.

    Attributes:
        form: the version of the format.
        model: name and weights digest of the run's model.
        stages: the finished stages, by name.
        command: the command line that did the last of them.

    Raises:
        pydantic.ValidationError: something is missing or of another type, or a stage depends on itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal[1] = Field(alias="schema")
    model: dict[str, str]
    stages: dict[str, StageRecord]
    command: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_for_cycles(self) -> Self:
        TopologicalSorter({name: record.upstream for name, record in self.stages.items()}).prepare()
        return self


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def result_digest(result: Json) -> str:
    """Return the SHA-256 of a result as it is read from the manifest, where all keys are strings."""
    return digest(json.loads(json.dumps(result)))


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a run directory, or None if there is none.

    Raises:
        RunDirectoryError: it cannot be read, or is not a manifest.
    """
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise broken_manifest(path, error) from error


def broken_manifest(path: Path, error: ValidationError, *place: str) -> RunDirectoryError:
    """Return the error of a run directory whose manifest is invalid, at or below a place in it."""
    first = error.errors()[0]
    where = ".".join(map(str, (*place, *first["loc"])))
    reason = f"{where}: {first['msg']}" if where else first["msg"]
    return RunDirectoryError(
        f"{path / MANIFEST} is not the manifest of a run ({reason}); choose another folder with --out"
    )
