"""What a run would do, and roughly how long it would take, without doing it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.pipeline import Pipeline
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.run.estimate import Estimate, estimate
from clusterq_deploy.run.manifest import MANIFEST, Result, StageRecord
from clusterq_deploy.runtimes import tensorrt as engine

State = Literal["finished", "to do", "skipped"]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the run.

    Attributes:
        stage: its name, such as quantize/w8a8.
        state: `finished` stages are not done again; `skipped` ones cannot be done here.
        work: what it does, or why it is skipped.
        seconds: how long it would take, roughly; None where that is not estimated, 0 where nothing is done.
    """

    stage: str
    state: State
    work: str
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        model, device: what is quantized, and where.
        settings: what decides how much work there is, as it would be done.
        scaled: of those, the ones that the model's size on a CPU makes smaller: what was asked for.
        stages: in order.
        seconds: of all stages whose time is estimated.
        memory_bytes: the most that is held at a time, roughly; None where nothing is to be done.
    """

    model: str
    device: str
    settings: dict[str, int]
    scaled: dict[str, int]
    stages: list[PlannedStage]
    seconds: float
    memory_bytes: int | None


class _NotDoneError(Exception):
    """A stage would have to be done."""


class Planner(Pipeline):
    """A pipeline that does nothing and writes nothing: it finds out which stages it would do.

    Args: as for `Run`. Where there is no run yet, shapes are enough of a model that has no file of weights.
    """

    def __init__(
        self, config: RunConfig, out: Path, *, progress: Progress = SILENT, command: list[str] | None = None
    ) -> None:
        fresh = not (out / MANIFEST).exists()
        super().__init__(config, out, progress=progress, command=command, shapes_only=fresh)

    _pending: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        """Look at every stage, and estimate the time of those that are to be done: in seconds, for any model.

        Raises:
            GraphError: the model cannot be traced.
            DataError: the evaluation data does not fit.
        """
        self.check()
        states = self._states()
        to_do = {stage for stage, state in states.items() if state == "to do"}
        expected = self._estimate(to_do)
        stages = [
            PlannedStage(stage, state, self._work(stage, state), self._seconds(stage, state, expected))
            for stage, state in states.items()
        ]
        return Plan(
            model=self.model.name,
            device=self.device.type,
            settings=amounts(self.config),
            scaled={name: n for name, n in amounts(self.asked).items() if n != amounts(self.config)[name]},
            stages=stages,
            seconds=sum(own.seconds or 0.0 for own in stages),
            memory_bytes=expected.memory_bytes if expected else None,
        )

    def perform(
        self,
        stage: str,
        inputs: Result,
        work: Callable[[], tuple[Result, list[str]]],
        upstream: Iterable[str] = (),
    ) -> StageRecord:
        """The record of a finished stage; work is never called."""
        upstream = list(upstream)
        record = self.directory.look_up(stage, self.own_inputs(inputs), upstream)
        if record is None or self._pending.intersection(upstream):
            raise _NotDoneError(stage)
        return record

    def done(self, stage: str) -> StageRecord:
        """As in a run; a stage that would be done again counts as not finished."""
        if stage in self._pending:
            raise _NotDoneError(stage)
        return super().done(stage)

    def _states(self) -> dict[str, State]:
        states: dict[str, State] = {}
        for step in self.steps():
            kind = step.name.partition("/")[0]
            if kind == "build" and engine.unavailable_reason():
                states[step.name] = "skipped"
            elif self._pending & _measured(step.name, states) or not self._is_finished(step.do):
                self._pending |= {step.name}
                states[step.name] = "to do"
            else:
                states[step.name] = "finished"
        return states

    def _is_finished(self, stage: Callable[[], StageRecord | None]) -> bool:
        try:
            stage()
        except (_NotDoneError, RunDirectoryError):  # the latter: of a stage that it builds on
            return False
        return True

    def _estimate(self, to_do: set[str]) -> Estimate | None:
        return estimate(self, [bits for bits in self.config.widths if f"quantize/{bits}" in to_do]) if to_do else None

    def _work(self, stage: str, state: str) -> str:
        """What a stage does, in words."""
        kind, _, variant = stage.partition("/")
        if state == "skipped":
            return str(engine.unavailable_reason())
        synthesis, timing = self.config.synthesis, self.config.benchmark
        if kind == "synthesize":
            generator, refine = synthesis.generator, synthesis.refine
            batches = math.ceil(synthesis.images / refine.batch_size)
            return (
                f"{generator.steps:,} steps of {generator.batch_size}, then {synthesis.images:,} images: "
                f"{refine.steps:,} steps for each of {batches} batches"
            )
        if kind == "quantize":
            tuning = self.config.finetune.scaled_to(BitWidths.parse(variant))
            raised = ", sensitivities first" if self.config.max_drop is not None and variant != "w8a8" else ""
            return f"at most {tuning.steps:,} steps of {tuning.batch_size}{raised}"
        if kind == "evaluate":
            return f"{self._evaluated:,} images"
        if kind == "features":
            return f"{synthesis.images:,} synthetic and {self._evaluated if self.has_own_data else 0:,} real images"
        if kind == "benchmark":
            return f"batches of {', '.join(map(str, timing.batches))}, {timing.cpu_threads} threads"
        return "ONNX, checked against torch" if kind == "export" else "a TensorRT engine"

    def _seconds(self, stage: str, state: State, expected: Estimate | None) -> float | None:
        return expected.seconds(stage, self.config, self._evaluated) if expected and state == "to do" else 0.0

    @property
    def _evaluated(self) -> int:
        """Images that accuracy is measured on: real ones, or those of the synthetic ones that are held out."""
        if self.has_own_data:
            return len(self.evaluation)
        return max(1, round(self.config.synthesis.images * self.config.finetune.held_out))


def _measured(stage: str, earlier: Iterable[str]) -> set[str]:
    """The stages whose files a measuring stage takes if they are there: it is done again once they are made."""
    kind, _, variant = stage.partition("/")
    if kind == "evaluate":
        return {f"build/{variant}"}
    return {name for name in earlier if name.startswith(("export/", "build/"))} if kind == "benchmark" else set()


def amounts(config: RunConfig) -> dict[str, int]:
    """The settings that decide how much work there is, by their place in `run.toml`."""
    synthesis, tuning = config.synthesis, config.finetune
    return {
        "synthesis.images": synthesis.images,
        "synthesis.generator.steps": synthesis.generator.steps,
        "synthesis.generator.warmup_steps": synthesis.generator.warmup_steps,
        "synthesis.generator.batch_size": synthesis.generator.batch_size,
        "synthesis.refine.steps": synthesis.refine.steps,
        "synthesis.refine.batch_size": synthesis.refine.batch_size,
        "finetune.steps": tuning.steps,
        "finetune.batch_size": tuning.batch_size,
    }
