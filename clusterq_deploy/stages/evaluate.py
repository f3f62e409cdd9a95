"""Measure a variant's accuracy: its graphs and the evaluation images go in, top-1, top-5 and agreement come out."""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import DataError, EngineError, ExportError
from clusterq_deploy.evaluation.accuracy import check_labels, predictions, score
from clusterq_deploy.evaluation.data import EvaluationSet, load_evaluation
from clusterq_deploy.files import sha256_file
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.inputs import label_names
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.report.text import label_warning
from clusterq_deploy.results.report import Accuracy, LabelCheck
from clusterq_deploy.results.stages import EvaluationResult, UnreadableImages
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages import build, deployables, export
from clusterq_deploy.stages.deployables import Deployable

logger = logging.getLogger(__name__)

NAME, RESULT = "evaluate", EvaluationResult


def needs(run: Run, stage: AnyStage) -> Needs:
    """Require the graphs, and the synthetic images if there are no real ones; read the engines if they exist."""
    images = () if run.has_own_data else ("synthesize",)
    return Needs((f"export/{stage.variant}", *images), optional=deployables.engine_stages(stage.variant))


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the images."""
    return run.data_inputs


def work(run: Run, stage: AnyStage) -> tuple[EvaluationResult, list[str]]:
    """Measure accuracy in torch and as each runtime executes the graphs."""
    data, environment = run.evaluation, run.environment.model_dump(mode="json")  # results depend on the runtimes
    teacher = run.teacher_predictions(run.checkpoint(stage, environment=environment))
    # the checkpoint is invalid if other images can be read now
    identity = [hashlib.sha256(teacher.tobytes()).hexdigest(), data.readable.tolist()]
    checkpoint = run.checkpoint(stage, environment=environment, teacher=identity)
    accuracies = [score("torch", teacher, teacher, data)] if stage.variant == FP32 else []
    for model, runner in deployables.in_turn(_deployables(run, stage.variant)):
        answers = run.predictions(runner, checkpoint, "-".join([runner.runtime, *Path(model.path or "").parts]))
        accuracies.append(score(runner.runtime, answers, teacher, data, model.path))
    unreadable = UnreadableImages.model_validate(data.unreadable.summary())
    check = check_labels(teacher, data) if stage.variant == FP32 else None
    _warn_of_labels(None if run.config.weights == "none" else check, data, FP32)
    return EvaluationResult(accuracy=accuracies, unreadable=unreadable, label_check=check), []


def _warn_of_labels(check: LabelCheck | None, data: EvaluationSet, model: str) -> None:
    if check and (warning := label_warning(check, model)):
        logger.warning("%s: %s", data.name, warning)


def describe(run: Run, _: AnyStage) -> str:
    """Count the images."""
    return f"{run.evaluated:,} images"


def _deployables(run: Run, variant: str) -> list[Deployable[Runner]]:
    """Return the torch student, graphs and engines of a variant.

    The FP16 baseline is only measured as an engine: ONNX Runtime has few FP16 kernels on a CPU and casts to float.
    """
    exported, models = run.require_finished(Stage(export, variant)).result, list[Deployable[Runner]]()
    if variant != FP32:
        bits = BitWidths.parse(variant)
        models.append(Deployable(variant, None, TorchRunner.runtime, lambda: TorchRunner(run.student(bits))))
    for graph in exported.artifacts:
        if variant != FP32 or graph.target == "onnxruntime":
            path, optimized = run.directory.path / graph.path, graph.target != "tensorrt"
            open_graph = partial(OnnxRunner, path, optimized=optimized)
            models.append(Deployable(variant, graph.path, deployables.CPU, open_graph))
    return [*models, *deployables.run_engines(run, variant), *deployables.run_graphs_on_gpu(run, {variant: exported})]


@dataclass(frozen=True)
class Graph:
    """The metadata of an exported file that loading evaluation data requires."""

    name: str
    source: str
    input: InputSpec
    classes: int
    class_names: tuple[str, ...] = ()


def evaluate_file(
    path: Path, data: Path | None, limit: int | None, progress: Progress = SILENT
) -> tuple[list[Accuracy], EvaluationSet]:
    """Measure accuracy on evaluation data: of an ONNX file in every available runtime, or of an engine.

    The engines next to an ONNX file are measured too, except FP16 baselines, which are only for comparing times.

    Returns:
        The accuracies, without agreement with a teacher, and the images, some of which may be unreadable.

    Raises:
        DataError: there is no data, or it does not fit.
        ExportError: the file cannot be run, or is of another exporter.
        EngineError: an engine cannot be run, or the graph that it was built from is not next to it.
    """
    source = _source_of(path) if path.suffix == build.ENGINE else path
    with OnnxRunner(source) as runner:
        graph = _described(source, runner.metadata(), runner.classes)
    if data is None and graph.source != "bundled":
        raise DataError(f"{path} was exported from {graph.name}; give the evaluation images with --data")
    images, accuracies = load_evaluation(data, graph, limit), list[Accuracy]()

    def measure(runner: Runner, name: str | None) -> None:
        answers = predictions(runner, images, EVALUATION_BATCH, progress)
        if not accuracies:
            _warn_of_labels(check_labels(answers, images), images, graph.name)
        accuracies.append(score(runner.runtime, answers, answers, images, name))

    graphs = deployables.file_graphs(path, (1, EVALUATION_BATCH, EVALUATION_BATCH)) if source == path else ()
    for model, session in deployables.in_turn(graphs, warn=True):
        measure(session, model.path)
    for built in deployables.file_engines(path, baselines=False):
        with deployables.file_engine(built, path) as running:
            measure(running, built.path)
    return accuracies, images


def _described(path: Path, metadata: dict[str, str], classes: int) -> Graph:
    try:
        spec = InputSpec.model_validate_json(metadata["clusterq.input"])
        names = label_names({"label_names": json.loads(metadata.get("clusterq.label_names", "[]"))}, classes)
        return Graph(metadata["clusterq.model"], metadata["clusterq.source"], spec, classes, names)
    except (KeyError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} has no description of its input; only graphs of clusterq export do") from error


def _source_of(path: Path) -> Path:
    """Return the graph next to an engine that it was built from: its metadata describe how images are prepared.

    Raises:
        EngineError: the graph is missing or has changed, or the engine is an FP16 baseline.
    """
    info = engine.read_sidecar(path)
    if info.derived:
        raise EngineError(f"{path} is the FP16 baseline of {info.source}, only for comparing times; evaluate that")
    source = path.with_name(info.source)
    if not source.is_file() or sha256_file(source) != info.source_sha256:
        raise EngineError(f"{path} was built from a {source.name} that is not next to it and describes its input")
    return source
