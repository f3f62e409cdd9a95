"""The manifest of a run directory: which stages are finished, and what they made."""

import hashlib
import json
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clusterq_deploy.errors import RunDirectoryError

MANIFEST, CONFIG = "manifest.json", "run.toml"

Result = dict[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """A finished stage.

    Attributes:
        inputs: digest of everything that its result depends on.
        upstream: digest of each stage that it built on, by name.
        files: SHA-256 of each file that it wrote, by path relative to the run directory.
        result: what the report needs of it, JSON values only.
        seconds: how long it took; where it went on from a checkpoint, from there on.
        result_sha256: digest of the result; None in manifests from before there was one.
        command: the command line that did it; empty in manifests from before it was kept.
    """

    inputs: str
    upstream: dict[str, str]
    files: dict[str, str]
    result: Result
    seconds: float
    result_sha256: str | None = None
    command: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the result is the one that the stage gave."""
        return self.result_sha256 in {None, result_digest(self.result)}

    @property
    def provisional(self) -> bool:
        """Whether something is missing in the result that another process may be able to do, for want of memory."""
        return bool(self.result.get("provisional"))

    @property
    def digest(self) -> str:
        """Identifies what the stage made, for the stages that build on it."""
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
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def result_digest(result: Result) -> str:
    """SHA-256 of a result as it comes back from the manifest, where all keys are strings."""
    return digest(json.loads(json.dumps(result)))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a run directory, or None where there is none.

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
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise RunDirectoryError(
            f"{file} is no manifest of a run ({reason}); choose another folder with --out"
        ) from error
