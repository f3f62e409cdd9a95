"""Measure a variant's accuracy: its graphs and the evaluation images go in, top-1, top-5 and agreement come out."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import DataError, EngineError, ExportError
from clusterq_deploy.evaluation.accuracy import predictions, score
from clusterq_deploy.evaluation.data import EvaluationSet, load_evaluation
from clusterq_deploy.files import sha256_file
from clusterq_deploy.models import InputSpec
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.results.report import Accuracy
from clusterq_deploy.results.stages import EvaluationResult, UnreadableImages
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages import build, deployables, export
from clusterq_deploy.stages.deployables import Deployable

NAME, RESULT = "evaluate", EvaluationResult


def needs(run: Run, stage: AnyStage) -> Needs:
    """Require the graphs, and synthetic images if there are no real ones; read the engines if there are some."""
    images = () if run.has_own_data else ("synthesize",)
    return Needs((f"export/{stage.variant}", *images), optional=deployables.engine_stages(stage.variant))


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the images."""
    return run.data_inputs


def work(run: Run, stage: AnyStage) -> tuple[EvaluationResult, list[str]]:
    """Measure accuracy in torch and as each runtime executes the graphs."""
    data, environment = run.evaluation, run.environment.model_dump(mode="json")  # another runtime may answer otherwise
    teacher = run.teacher_predictions(run.checkpoint(stage, environment=environment))
    # an image that can be read by now makes all that is kept another set's
    kept = [hashlib.sha256(teacher.tobytes()).hexdigest(), data.readable.tolist()]
    checkpoint = run.checkpoint(stage, environment=environment, teacher=kept)
    accuracies = [score("torch", teacher, teacher, data)] if stage.variant == FP32 else []
    for model, runner in deployables.in_turn(_deployables(run, stage.variant)):
        answers = run.predictions(runner, checkpoint, "-".join([runner.runtime, *Path(model.path or "").parts]))
        accuracies.append(score(runner.runtime, answers, teacher, data, model.path))
    unreadable = UnreadableImages.model_validate(data.unreadable.summary())
    return EvaluationResult(accuracy=accuracies, unreadable=unreadable), []


def describe(run: Run, _: AnyStage) -> str:
    """Count the images."""
    return f"{run.evaluated:,} images"


def _deployables(run: Run, variant: str) -> list[Deployable[Runner]]:
    """Return all that is measured of a variant: torch's student, graphs and engines.

    The FP16 baseline is measured as an engine only: ONNX Runtime has few FP16 kernels on a CPU and casts most of it to
    float, slowly.
    """
    exported, folder = run.require_finished(Stage(export, variant)).result, run.directory.path
    models: list[Deployable[Runner]] = [
        Deployable(
            variant,
            graph.path,
            deployables.CPU,
            partial(OnnxRunner, folder / graph.path, optimized=graph.target != "tensorrt"),
        )
        for graph in exported.artifacts
        if variant != FP32 or graph.target == "onnxruntime"
    ]
    if variant != FP32:
        bits = BitWidths.parse(variant)
        models.insert(0, Deployable(variant, None, TorchRunner.runtime, lambda: TorchRunner(run.student(bits))))
    return [*models, *deployables.run_engines(run, variant), *deployables.run_graphs_on_gpu(run, {variant: exported})]


@dataclass(frozen=True)
class Graph:
    """What an exported file says of itself, as evaluation data asks for it."""

    name: str
    source: str
    input: InputSpec
    classes: int


def evaluate_file(
    path: Path, data: Path | None, limit: int | None, progress: Progress = SILENT
) -> tuple[list[Accuracy], EvaluationSet]:
    """Measure accuracy on evaluation data: of an ONNX file in every runtime that is here, or of an engine.

    With an ONNX file the engines next to it are measured too, except FP16 baselines: their time is what they are for.

    Returns:
        The accuracies, with no teacher to agree with, and the images, of which some may have turned out unreadable.

    Raises:
        DataError: there is no data, or it does not fit.
        ExportError: the file cannot be run, or is of another exporter.
        EngineError: an engine cannot be run, or the graph that it was built from is not next to it.
    """
    source = _source_of(path) if path.suffix == build.ENGINE else path
    with OnnxRunner(source) as runner:
        graph = _described(source, runner.metadata(), runner.classes)
    if data is None and graph.source != "bundled":
        raise DataError(f"{path} was exported from {graph.name}; give the images to evaluate it on with --data")
    images, accuracies = load_evaluation(data, graph, limit), []

    def measure(runner: Runner, name: str | None) -> None:
        answers = predictions(runner, images, EVALUATION_BATCH, progress)
        accuracies.append(score(runner.runtime, answers, answers, images, name))

    graphs = deployables.file_graphs(path, (1, EVALUATION_BATCH, EVALUATION_BATCH)) if source == path else ()
    for model, session in deployables.in_turn(graphs, tell=True):
        measure(session, model.path)
    for built in deployables.file_engines(path, baselines=False):
        with deployables.file_engine(built, path) as running:
            measure(running, built.path)
    return accuracies, images


def _described(path: Path, metadata: dict[str, str], classes: int) -> Graph:
    try:
        spec = InputSpec.model_validate_json(metadata["clusterq.input"])
        return Graph(metadata["clusterq.model"], metadata["clusterq.source"], spec, classes)
    except (KeyError, ValueError) as error:
        raise ExportError(f"{path} does not say how its input is made; only graphs of clusterq export do") from error


def _source_of(path: Path) -> Path:
    """Return the graph next to an engine that it was built from: it says how images are prepared.

    Raises:
        EngineError: there is none, or another; or the engine is a baseline, which is no model to evaluate.
    """
    info = engine.read_sidecar(path)
    if info.derived:
        raise EngineError(f"{path} is the FP16 baseline of {info.source}, to compare times with; evaluate that")
    source = path.with_name(info.source)
    if not source.is_file() or sha256_file(source) != info.source_sha256:
        missing = f"{path} was built from a {source.name} that is not next to it"
        raise EngineError(f"{missing}; it says how images are prepared")
    return source
