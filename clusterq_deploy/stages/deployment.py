"""What is deployed: ONNX graphs, and the engines that TensorRT makes of them."""

from collections.abc import Iterable, Iterator

import onnx

from clusterq_deploy import engine, export
from clusterq_deploy.export.integers import SiteComparison
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.report.schema import Artifact
from clusterq_deploy.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.rundir import Result, StageRecord
from clusterq_deploy.runners import OnnxRunner, Runner


def write_graphs(run: Run, variant: str) -> StageRecord:
    """Write a variant's graphs, each verified against torch first."""
    size = run.model.input.size

    def write(graph: onnx.ModelProto, name: str, target: export.Spelling, notes: Iterable[str] = ()) -> Result:
        annotated = export.annotate(
            graph,
            model=run.model.slug,
            source=run.model.source,
            variant=variant,
            inputs=run.model.input,
            provenance=run.provenance(variant, target=target),
        )
        data = annotated.SerializeToString()
        path = run.directory.write(f"{variant}/{name}", data)
        made = Artifact(kind="onnx", target=target, path=path, size_bytes=len(data), notes=list(notes))
        return made.model_dump(mode="json")

    def work_float() -> tuple[Result, list[str]]:
        graph = export.float_graph(run.model.module, size, seed=run.config.seed, name=f"{FP32}/model.onnx")
        artifact = write(graph, "model.onnx", "onnxruntime")
        return {"artifacts": [artifact]}, [artifact["path"]]

    def work() -> tuple[Result, list[str]]:
        student = run.student(BitWidths.parse(variant))
        images = run.calibration.images[: export.VERIFIED_IMAGES].numpy()
        made = export.student_graphs(student, images, size=size, name=variant, fp16=run.config.fp16)
        artifacts, checks = [], {}
        for own in made:
            checks[own.file] = own.checks
            artifacts.append(write(own.graph, own.file, own.spelling, own.notes))
        return {"artifacts": artifacts, "verification": checks}, [a["path"] for a in artifacts]

    if variant == FP32:
        return run.perform("export/fp32", {}, work_float)
    run.done(f"quantize/{variant}")
    settings = {"fp16": run.config.fp16}
    return run.perform(f"export/{variant}", settings, work, upstream=["synthesize", f"quantize/{variant}"])


def compare_graphs(run: Run, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
    """Hold a variant's graphs against torch on up to so many synthetic images.

    Gives each graph's path, the percentage of images with torch's top-1 as ONNX Runtime executes the graph (that
    of TensorRT with optimizations off), and the integers at every quantizer.
    """
    student, batch = run.student(BitWidths.parse(variant)), run.calibration.images[:images].numpy()
    for artifact in run.done(f"export/{variant}").result["artifacts"]:
        path, spelling = run.directory.path / artifact["path"], artifact["target"]
        with runner_of(run, artifact) as own:
            same = export.agreement(own, student, batch, spelling=spelling, batch_size=EVALUATION_BATCH)
        found = export.compare_integers(onnx.load(path), student, batch, spelling=spelling)
        yield artifact["path"], same, found


def build_engine(run: Run, variant: str) -> StageRecord | None:
    """Build a variant's TensorRT engine; None where that cannot be done."""
    if engine.unavailable_reason() is not None:
        return None
    source, settings = run.done(f"export/{variant}"), _build_config(run)
    graph = graph_for(source, "tensorrt") or graph_for(source, "onnxruntime")

    def work() -> tuple[Result, list[str]]:
        path = run.directory.path / variant / "model.engine"
        info = engine.build_engine(run.directory.path / str(graph), path, settings, run.progress)
        name = f"{variant}/model.engine"
        artifact = Artifact(kind="engine", target="tensorrt", path=name, size_bytes=info.size_bytes)
        return {"artifacts": [artifact.model_dump(mode="json")]}, [name, f"{variant}/model.engine.json"]

    inputs = {"settings": settings.model_dump(mode="json")}
    return run.perform(f"build/{variant}", inputs, work, upstream=[f"export/{variant}"])


def _build_config(run: Run) -> engine.BuildConfig:
    """The build settings, with a profile that holds the batches to be timed."""
    return run.config.build.model_copy(update={"batch": tuned_batches(run)})


def tuned_batches(run: Run) -> tuple[int, int, int]:
    """The smallest, the tuned-for and the largest batch of what TensorRT builds; the batches to be timed are in it."""
    low, best, high = run.config.build.batch
    timed = run.config.benchmark.batches
    return min(low, *timed), best, max(high, *timed)


def built_engine(run: Run, variant: str) -> StageRecord | None:
    """The finished build stage of a variant, where its engine can run."""
    return None if engine.unavailable_reason() else run.directory.finished(f"build/{variant}")


def engine_stage(variant: str, built: StageRecord | None) -> list[str]:
    """The build stage, for the stages that use its engine."""
    return [f"build/{variant}"] if built else []


def graph_for(record: StageRecord, target: str) -> str | None:
    """The path of a finished export's graph for a target."""
    return next((str(a["path"]) for a in record.result["artifacts"] if a["target"] == target), None)


def runner_of(run: Run, artifact: Result) -> Runner:
    """Executes an artifact as its target does."""
    path = run.directory.path / artifact["path"]
    if artifact["kind"] == "engine":
        return engine.TensorRTRunner(path)
    return OnnxRunner(path, optimized=artifact["target"] != "tensorrt")
