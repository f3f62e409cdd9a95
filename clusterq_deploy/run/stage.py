"""The interface of a stage, and the record of a finished one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from clusterq_deploy.results.stages import StageResult

if TYPE_CHECKING:
    from clusterq_deploy.run.run import Run

R_co = TypeVar("R_co", bound=StageResult, covariant=True)
Json = dict[str, Any]
"""JSON values by name."""


@dataclass(frozen=True)
class Needs:
    """The stages that a stage reads: `required` ones have to be finished; it is done again when `optional` ones are."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Kind(Protocol[R_co]):
    """The interface of the modules of `clusterq_deploy.stages` that are stages."""

    NAME: str

    @property
    def RESULT(self) -> type[R_co]:  # noqa: N802
        """The record of its result."""

    def needs(self, run: Run, stage: AnyStage, /) -> Needs:
        """Return the stages that it reads."""

    def inputs(self, run: Run, stage: AnyStage, /) -> Json:
        """Return what else its result depends on; it is hashed."""

    def work(self, run: Run, stage: AnyStage, /) -> tuple[R_co, list[str]]:
        """Do it; return its result, and the files that it wrote, relative to the run directory."""

    def describe(self, run: Run, stage: AnyStage, /) -> str:
        """Return one line for `--dry-run`."""


@dataclass(frozen=True)
class Stage(Generic[R_co]):
    """A stage of a variant, or of the whole run, without one."""

    kind: Kind[R_co]
    variant: str = ""

    @property
    def name(self) -> str:
        """Its name in the manifest, such as synthesize or quantize/w8a8."""
        return f"{self.kind.NAME}/{self.variant}" if self.variant else self.kind.NAME


AnyStage = Stage[StageResult]


@dataclass(frozen=True)
class Finished(Generic[R_co]):
    """A finished stage: its result, the SHA-256 of each file that it wrote by path, and how many seconds it took."""

    result: R_co
    files: dict[str, str]
    seconds: float
