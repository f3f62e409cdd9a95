"""What a run would do, and roughly how long it would take, without doing it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.pipeline import stages, unavailable
from clusterq_deploy.run.estimate import estimate
from clusterq_deploy.run.manifest import MANIFEST
from clusterq_deploy.run.run import Run
from clusterq_deploy.run.stage import AnyStage

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


def plan(config: RunConfig, out: Path, *, progress: Progress = SILENT, command: list[str] | None = None) -> Plan:
    """Look at every stage, and estimate the time of those that are to be done: in seconds, for any model.

    Nothing is done and nothing is written. Where there is no run yet, shapes are enough of a model that has no file of
    weights.

    Raises:
        GraphError: the model cannot be traced.
        DataError: the evaluation data does not fit.
    """
    fresh = not (out / MANIFEST).exists()
    run = Run(config, out, progress=progress, command=command, shapes_only=fresh)
    run.check()
    known = states(run)
    to_do = {stage.name for stage, state in known.items() if state == "to do"}
    expected = estimate(run, [bits for bits in run.config.widths if f"quantize/{bits}" in to_do]) if to_do else None
    planned = [
        PlannedStage(
            stage.name,
            state,
            str(unavailable(stage)) if state == "skipped" else stage.kind.describe(run, stage),
            expected.seconds(stage.name, run.config, run.evaluated) if expected and state == "to do" else 0.0,
        )
        for stage, state in known.items()
    ]
    asked, done = amounts(config), amounts(run.config)
    return Plan(
        model=run.model.name,
        device=run.device.type,
        settings=done,
        scaled={name: number for name, number in asked.items() if number != done[name]},
        stages=planned,
        seconds=sum(own.seconds or 0.0 for own in planned),
        memory_bytes=expected.memory_bytes if expected else None,
    )


def states(run: Run) -> dict[AnyStage, State]:
    """Return which stages are finished: one that reads a stage that is to be done is to be done too."""
    found: dict[AnyStage, State] = {}
    to_do: set[str] = set()
    for stage in stages(run.config):
        needs = stage.kind.needs(run, stage)
        if unavailable(stage):
            found[stage] = "skipped"
        elif to_do.intersection(needs.required + needs.optional) or not run.is_finished(stage):
            found[stage] = "to do"
            to_do.add(stage.name)
        else:
            found[stage] = "finished"
    return found


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
