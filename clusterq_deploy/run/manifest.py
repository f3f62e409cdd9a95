"""The manifest of a run directory: which stages are finished, and what they made."""

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
    """A finished stage, as the manifest has it.

    Attributes:
        inputs: digest of everything that its result depends on.
        upstream: digest of each stage that it built on, by name.
        files: SHA-256 of each file that it wrote, by path relative to the run directory.
        result: what the report needs of it: a `StageResult` as JSON.
        seconds: how long it took; if it went on from a checkpoint, from there on.
        result_sha256: digest of the result; None in manifests from before there was one.
        command: the command line that did it; empty in manifests from before it was kept.
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
        """Whether the result is the one that the stage returned."""
        return self.result_sha256 in {None, result_digest(self.result)}

    @property
    def provisional(self) -> bool:
        """Whether something is missing that another process may be able to do, as the memory was not enough."""
        return bool(self.result.get("provisional"))

    @property
    def digest(self) -> str:
        """What identifies the stage's work for the stages that build on it."""
        return digest({"inputs": self.inputs, "files": self.files})


class Manifest(BaseModel):
    """What `manifest.json` holds.

    Attributes:
        form: the version of its form.
        model: name and weights digest of the model whose run it is.
        stages: the finished stages, by name.
        command: the command line that did the last of them.

    Raises:
        pydantic.ValidationError: something is missing, of another type, or a stage builds on itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal[1] = Field(alias="schema")
    model: dict[str, str]
    stages: dict[str, StageRecord]
    command: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _no_stage_builds_on_itself(self) -> Self:
        TopologicalSorter({name: record.upstream for name, record in self.stages.items()}).prepare()
        return self


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def result_digest(result: Json) -> str:
    """Return the SHA-256 of a result as it comes back from the manifest, where all keys are strings."""
    return digest(json.loads(json.dumps(result)))


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a run directory, or None if there is none.

    Raises:
        RunDirectoryError: it cannot be read, or is no manifest.
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
    """Return the error of a run directory whose manifest does not fit, at or below a place in it."""
    first = error.errors()[0]
    where = ".".join(map(str, (*place, *first["loc"])))
    reason = f"{where}: {first['msg']}" if where else first["msg"]
    return RunDirectoryError(f"{path / MANIFEST} is no manifest of a run ({reason}); choose another folder with --out")
