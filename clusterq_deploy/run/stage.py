"""What a stage of a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from clusterq_deploy.run.manifest import Result
    from clusterq_deploy.run.run import Run


@dataclass(frozen=True)
class Needs:
    """The stages that a stage reads.

    Attributes:
        required: these have to be finished.
        optional: these are read if they are there; the stage is done again once they are made.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Kind(Protocol):
    """Every module of `clusterq_deploy.stages` that is a stage; `variant` is empty for a stage of the whole run."""

    NAME: str

    def needs(self, run: Run, variant: str, /) -> Needs:
        """Return the stages that it reads."""

    def inputs(self, run: Run, variant: str, /) -> Result:
        """Return what else its result depends on, as JSON values; it is hashed."""

    def work(self, run: Run, variant: str, /) -> tuple[Result, list[str]]:
        """Do it; return its result as JSON values, and the files that it wrote, relative to the run directory."""

    def describe(self, run: Run, variant: str, /) -> str:
        """Return in words what it does."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run: of the whole run, or of one of its variants."""

    kind: Kind
    variant: str = ""

    @property
    def name(self) -> str:
        """Its name in the manifest, such as synthesize or quantize/w8a8."""
        return f"{self.kind.NAME}/{self.variant}" if self.variant else self.kind.NAME

    def needs(self, run: Run) -> Needs:
        """Return the stages that it reads."""
        return self.kind.needs(run, self.variant)

    def inputs(self, run: Run) -> Result:
        """Return what else its result depends on."""
        return self.kind.inputs(run, self.variant)

    def describe(self, run: Run) -> str:
        """Return in words what it does."""
        return self.kind.describe(run, self.variant)
