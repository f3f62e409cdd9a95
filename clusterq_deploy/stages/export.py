"""Write a variant's graphs, after verification against torch: the student goes in, ONNX files come out."""

from collections.abc import Iterable, Iterator
from contextlib import closing

import onnx

from clusterq_deploy import lowering
from clusterq_deploy.lowering.integers import SiteComparison
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.results.report import Artifact
from clusterq_deploy.results.stages import ExportResult
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.runtimes.runners import OnnxRunner

NAME, RESULT = "export", ExportResult


def needs(_: Run, stage: AnyStage) -> Needs:
    """Require the student, and the images on which its graphs are verified; nothing for the float model."""
    return Needs() if stage.variant == FP32 else Needs(required=(f"quantize/{stage.variant}", "synthesize"))


def inputs(run: Run, stage: AnyStage) -> Json:
    """Return the types in TensorRT's graph; for the float model, the names of its graphs."""
    if stage.variant == FP32:
        # the names invalidate exports from before there was an FP16 baseline
        return {"graphs": [lowering.FLOAT_FILE, lowering.FP16_FILE]}
    return {"fp16": run.config.fp16}


def work(run: Run, stage: AnyStage) -> tuple[ExportResult, list[str]]:
    """Write the graphs of the float model, or of a student."""
    result = _float_graphs(run) if stage.variant == FP32 else _student_graphs(run, stage.variant)
    return result, [artifact.path for artifact in result.artifacts]


def describe(_: Run, __: AnyStage) -> str:
    """Name the result."""
    return "ONNX, checked against torch"


def _float_graphs(run: Run) -> ExportResult:
    graphs = lowering.float_graphs(
        run.model.module, run.model.input.size, seed=run.config.seed, name=FP32, progress=run.progress
    )
    artifacts = [_write(run, FP32, graphs.fp32, lowering.FLOAT_FILE, "onnxruntime")]
    if graphs.fp16 is not None:
        artifacts.append(_write(run, FP32, graphs.fp16, lowering.FP16_FILE, "tensorrt", fp16=True))
    return ExportResult(artifacts=artifacts, no_fp16=graphs.no_fp16)


def _student_graphs(run: Run, variant: str) -> ExportResult:
    student = run.student(BitWidths.parse(variant))
    images = run.calibration.images[: lowering.VERIFIED_IMAGES].numpy()
    graphs = lowering.student_graphs(
        student, images, size=run.model.input.size, name=variant, fp16=run.config.fp16, progress=run.progress
    )
    artifacts, checks = [], {}
    with closing(graphs):  # closes its task if a file cannot be written
        for graph in graphs:
            checks[graph.file] = graph.checks
            fp16 = run.config.fp16 and graph.graph_format == "tensorrt"
            artifacts.append(_write(run, variant, graph.graph, graph.file, graph.graph_format, graph.notes, fp16=fp16))
    return ExportResult(artifacts=artifacts, verification=checks)


def _write(
    run: Run,
    variant: str,
    graph: onnx.ModelProto,
    name: str,
    target: lowering.GraphFormat,
    notes: Iterable[str] = (),
    *,
    fp16: bool = False,
) -> Artifact:
    """Write a graph with its provenance."""
    annotated = lowering.annotate(
        graph,
        model=run.model.slug,
        source=run.model.source,
        variant=variant,
        inputs=run.model.input,
        class_names=run.model.class_names,
        provenance=run.provenance(variant, target=target, **({"fp16": True} if fp16 else {})),
    )
    content = annotated.SerializeToString()
    path = run.directory.write(f"{variant}/{name}", content)
    return Artifact(kind="onnx", target=target, path=path, size_bytes=len(content), fp16=fp16, notes=list(notes))


def compare_graphs(
    run: Run, stage: Stage[ExportResult], images: int
) -> Iterator[tuple[str, float, list[SiteComparison]]]:
    """Compare a variant's graphs with torch on up to `images` synthetic images.

    Yields:
        Each graph's path, the percentage of images with torch's top-1 as ONNX Runtime executes the graph (that of
        TensorRT without optimizations), and the integers at every quantizer.
    """
    student, batch = run.student(BitWidths.parse(stage.variant)), run.calibration.images[:images].numpy()
    artifacts, progress = run.require_finished(stage).result.artifacts, run.progress
    graphs = [(artifact.path, artifact.target) for artifact in artifacts if artifact.target != "tensorrt_rtx"]
    with progress.task(f"Verify {stage.variant}", len(graphs)) as advance:
        for name, target in graphs:
            path = run.directory.path / name
            with OnnxRunner(path, optimized=target != "tensorrt") as runner:
                same = lowering.agreement(
                    runner, student, batch, graph_format=target, batch_size=EVALUATION_BATCH, progress=progress
                )
            sites = lowering.compare_integers(onnx.load(path), student, batch, graph_format=target, progress=progress)
            advance()
            yield name, same, sites
