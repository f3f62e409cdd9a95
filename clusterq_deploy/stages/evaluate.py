"""Measure a variant's accuracy: its graphs and the evaluation images go in, top-1, top-5 and agreement come out."""

import hashlib
from pathlib import Path

from clusterq_deploy.evaluation.accuracy import score
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.results.report import Accuracy
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import Needs
from clusterq_deploy.runtimes.runners import Runner, TorchRunner
from clusterq_deploy.stages.deployables import (
    built_engine,
    engine_stages,
    executed_graphs,
    provider_runners,
    runner_of,
)

NAME = "evaluate"


def needs(run: Run, variant: str) -> Needs:
    """The graphs, the engines where there are some, and synthetic images where there are no real ones."""
    own_images = () if run.has_own_data else ("synthesize",)
    return Needs((f"export/{variant}", *own_images), optional=engine_stages(variant))


def inputs(run: Run, _: str) -> Result:
    """The images."""
    return run.data_inputs


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Measure accuracy in torch and as each runtime executes the graphs."""
    source, built, data = run.finished(f"export/{variant}"), built_engine(run, variant), run.evaluation
    stage, upstream = f"{NAME}/{variant}", run.upstream(needs(run, variant))
    kept = {**run.data_inputs, "environment": run.environment}  # another runtime may answer otherwise
    teacher = run.teacher_predictions(run.checkpoint(stage, kept, 1, upstream))
    # an image that can be read by now makes all that is kept another set's
    kept["teacher"] = [hashlib.sha256(teacher.tobytes()).hexdigest(), data.kept.tolist()]
    checkpoint = run.checkpoint(stage, kept, 1, upstream)

    def accuracy(runner: Runner, graph: str | None) -> Accuracy:
        own = run.predictions(runner, checkpoint, "-".join([runner.runtime, *Path(graph or "").parts]))
        return score(runner.runtime, own, teacher, data, graph)

    found: list[Accuracy] = []
    if variant == FP32:
        found.append(score("torch", teacher, teacher, data))
    else:
        with TorchRunner(run.student(BitWidths.parse(variant))) as student:
            found.append(accuracy(student, None))
    for artifact in [*executed_graphs(variant, source), *(built.result["artifacts"] if built else [])]:
        with runner_of(run, artifact) as runner:
            found.append(accuracy(runner, artifact["path"]))
    for own in provider_runners(run, {variant: source}, []):  # the benchmark says which are left out
        with own.runner as provided:
            found.append(accuracy(provided, own.graph))
    return {"accuracy": [a.model_dump(mode="json") for a in found], "unreadable": data.unreadable.summary()}, []


def describe(run: Run, _: str) -> str:
    """Count the images."""
    return f"{run.evaluated:,} images"
