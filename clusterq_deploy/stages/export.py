"""Write a variant's graphs, each verified against torch first: the student goes in, ONNX files come out."""

from collections.abc import Iterable, Iterator
from contextlib import closing

import onnx

from clusterq_deploy import lowering
from clusterq_deploy.lowering.integers import SiteComparison
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.results.report import Artifact
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.run.stage import Needs
from clusterq_deploy.stages.deployables import runner_of

NAME = "export"


def needs(_: Run, variant: str) -> Needs:
    """The student, and the images that its graphs are held against torch on; the float model needs neither."""
    return Needs() if variant == FP32 else Needs(required=(f"quantize/{variant}", "synthesize"))


def inputs(run: Run, variant: str) -> Result:
    """The types in TensorRT's graph; of the float model, the names of its graphs."""
    if variant == FP32:
        # the names make a run redo what it exported before there was a baseline in FP16
        return {"graphs": [lowering.FLOAT_FILE, lowering.FP16_FILE]}
    return {"fp16": run.config.fp16}


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Write the graphs of the float model, or of a student."""
    return _float_graphs(run) if variant == FP32 else _student_graphs(run, variant)


def describe(_: Run, __: str) -> str:
    """Say what is written."""
    return "ONNX, checked against torch"


def _float_graphs(run: Run) -> tuple[Result, list[str]]:
    made = lowering.float_graphs(
        run.model.module, run.model.input.size, seed=run.config.seed, name=FP32, progress=run.progress
    )
    artifacts = [_write(run, FP32, made.fp32, lowering.FLOAT_FILE, "onnxruntime")]
    if made.fp16 is not None:
        artifacts.append(_write(run, FP32, made.fp16, lowering.FP16_FILE, "tensorrt", fp16=True))
    return {"artifacts": artifacts, "no_fp16": made.no_fp16}, [a["path"] for a in artifacts]


def _student_graphs(run: Run, variant: str) -> tuple[Result, list[str]]:
    student = run.student(BitWidths.parse(variant))
    images = run.calibration.images[: lowering.VERIFIED_IMAGES].numpy()
    made = lowering.student_graphs(
        student, images, size=run.model.input.size, name=variant, fp16=run.config.fp16, progress=run.progress
    )
    artifacts, checks = [], {}
    with closing(made):  # ends its task where a file cannot be written
        for own in made:
            checks[own.file] = own.checks
            fp16 = run.config.fp16 and own.graph_format == "tensorrt"
            artifacts.append(_write(run, variant, own.graph, own.file, own.graph_format, own.notes, fp16=fp16))
    return {"artifacts": artifacts, "verification": checks}, [a["path"] for a in artifacts]


def _write(
    run: Run,
    variant: str,
    graph: onnx.ModelProto,
    name: str,
    target: lowering.GraphFormat,
    notes: Iterable[str] = (),
    *,
    fp16: bool = False,
) -> Result:
    """Write a graph that says where it came from; return its `Artifact` as JSON."""
    annotated = lowering.annotate(
        graph,
        model=run.model.slug,
        source=run.model.source,
        variant=variant,
        inputs=run.model.input,
        provenance=run.provenance(variant, target=target, **({"fp16": True} if fp16 else {})),
    )
    data = annotated.SerializeToString()
    path = run.directory.write(f"{variant}/{name}", data)
    made = Artifact(kind="onnx", target=target, path=path, size_bytes=len(data), fp16=fp16, notes=list(notes))
    return made.model_dump(mode="json")


def compare_graphs(run: Run, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
    """Hold a variant's graphs against torch on up to so many synthetic images.

    Gives each graph's path, the percentage of images with torch's top-1 as ONNX Runtime executes the graph (that
    of TensorRT with optimizations off), and the integers at every quantizer.
    """
    student, batch = run.student(BitWidths.parse(variant)), run.calibration.images[:images].numpy()
    artifacts, progress = run.finished(f"export/{variant}").result["artifacts"], run.progress
    with progress.task(f"Verify {variant}", len(artifacts)) as advance:
        for artifact in artifacts:
            graph, graph_format = onnx.load(run.directory.path / artifact["path"]), artifact["target"]
            with runner_of(run, artifact) as own:
                same = lowering.agreement(
                    own, student, batch, graph_format=graph_format, batch_size=EVALUATION_BATCH, progress=progress
                )
            found = lowering.compare_integers(graph, student, batch, graph_format=graph_format, progress=progress)
            advance()
            yield artifact["path"], same, found
