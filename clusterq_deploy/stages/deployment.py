"""What is deployed: ONNX graphs, and the engines that TensorRT makes of them."""

from collections.abc import Iterable, Iterator
from contextlib import closing

import onnx

from clusterq_deploy import export
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.export.integers import SiteComparison
from clusterq_deploy.quantize import BitWidths
from clusterq_deploy.results.report import Artifact
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import EVALUATION_BATCH, FP32, Run
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner


def write_graphs(run: Run, variant: str) -> StageRecord:
    """Write a variant's graphs, each verified against torch first."""
    size = run.model.input.size

    def write(
        graph: onnx.ModelProto,
        name: str,
        target: export.Spelling,
        notes: Iterable[str] = (),
        *,
        fp16: bool = False,
    ) -> Result:
        annotated = export.annotate(
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

    def work_float() -> tuple[Result, list[str]]:
        made = export.float_graphs(run.model.module, size, seed=run.config.seed, name=FP32, progress=run.progress)
        artifacts = [write(made.single, export.FLOAT_FILE, "onnxruntime")]
        if made.half is not None:
            artifacts.append(write(made.half, export.HALF_FILE, "tensorrt", fp16=True))
        return {"artifacts": artifacts, "no_fp16": made.no_half}, [a["path"] for a in artifacts]

    def work() -> tuple[Result, list[str]]:
        student = run.student(BitWidths.parse(variant))
        images = run.calibration.images[: export.VERIFIED_IMAGES].numpy()
        made = export.student_graphs(
            student, images, size=size, name=variant, fp16=run.config.fp16, progress=run.progress
        )
        artifacts, checks = [], {}
        with closing(made):  # ends its task where a file cannot be written
            for own in made:
                checks[own.file] = own.checks
                fp16 = run.config.fp16 and own.spelling == "tensorrt"
                artifacts.append(write(own.graph, own.file, own.spelling, own.notes, fp16=fp16))
        return {"artifacts": artifacts, "verification": checks}, [a["path"] for a in artifacts]

    if variant == FP32:
        # the names make a run redo what it exported before there was a baseline in FP16
        return run.perform("export/fp32", {"graphs": [export.FLOAT_FILE, export.HALF_FILE]}, work_float)
    run.done(f"quantize/{variant}")
    settings = {"fp16": run.config.fp16}
    return run.perform(f"export/{variant}", settings, work, upstream=["synthesize", f"quantize/{variant}"])


def compare_graphs(run: Run, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
    """Hold a variant's graphs against torch on up to so many synthetic images.

    Gives each graph's path, the percentage of images with torch's top-1 as ONNX Runtime executes the graph (that
    of TensorRT with optimizations off), and the integers at every quantizer.
    """
    student, batch = run.student(BitWidths.parse(variant)), run.calibration.images[:images].numpy()
    artifacts, progress = run.done(f"export/{variant}").result["artifacts"], run.progress
    with progress.task(f"Verify {variant}", len(artifacts)) as advance:
        for artifact in artifacts:
            graph, spelling = onnx.load(run.directory.path / artifact["path"]), artifact["target"]
            with runner_of(run, artifact) as own:
                same = export.agreement(
                    own, student, batch, spelling=spelling, batch_size=EVALUATION_BATCH, progress=progress
                )
            found = export.compare_integers(graph, student, batch, spelling=spelling, progress=progress)
            advance()
            yield artifact["path"], same, found


def build_engine(run: Run, variant: str) -> StageRecord | None:
    """Build a variant's TensorRT engine, of the float baseline one in FP32 and one in FP16; None where none can be."""
    if engine.unavailable_reason() is not None:
        return None
    source, settings = run.done(f"export/{variant}"), _build_config(run)

    def work() -> tuple[Result, list[str]]:
        made = [_build(run, graph, settings) for graph in _engine_graphs(variant, source)]
        return {"artifacts": made}, [file for a in made for file in (a["path"], f"{a['path']}.json")]

    # where measurements are kept decides nothing about the engine
    inputs = {
        "settings": settings.model_dump(mode="json", exclude={"timing_cache"}),
        "machine": engine.this_machine().binding(settings),
    }
    return run.perform(f"build/{variant}", inputs, work, upstream=[f"export/{variant}"])


def _build(run: Run, graph: Result, settings: engine.BuildConfig) -> Result:
    """Build the engine of an exported graph, beside it."""
    name = _engine_name(graph["path"])
    directory = run.directory.path
    info = engine.build_engine(directory / graph["path"], directory / name, settings, run.progress)
    fp16 = graph.get("fp16", False)
    made = Artifact(kind="engine", target="tensorrt", path=name, size_bytes=info.size_bytes, fp16=fp16)
    return made.model_dump(mode="json")


def _engine_graphs(variant: str, source: StageRecord) -> list[Result]:
    """The exported graphs that engines are built from: of the float baseline all, of a variant TensorRT's."""
    return [a for a in source.result["artifacts"] if variant == FP32 or a["target"] == "tensorrt"]


def _engine_name(graph: str) -> str:
    """`w8a8/model.engine` for `w8a8/model.trt.onnx`, `fp32/model.fp16.engine` for `fp32/model.fp16.onnx`."""
    return f"{graph.removesuffix('.onnx').removesuffix('.trt')}.engine"


def _build_config(run: Run) -> engine.BuildConfig:
    """The build settings, with a profile that holds the batches to be timed."""
    return run.config.build.model_copy(update={"batch": tuned_batches(run.config)})


def tuned_batches(config: RunConfig) -> tuple[int, int, int]:
    """The smallest, the tuned-for and the largest batch of what TensorRT builds; the batches to be timed are in it."""
    low, best, high = config.build.batch
    timed = config.benchmark.batches
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


def executed_graphs(variant: str, source: StageRecord) -> list[Result]:
    """The exported graphs that are measured as graphs.

    Not the FP16 baseline's: ONNX Runtime has few FP16 kernels on a CPU and casts most of it to float, slowly; its
    engine is measured where there is one.
    """
    return [a for a in source.result["artifacts"] if variant != FP32 or a["target"] == "onnxruntime"]


def runner_of(run: Run, artifact: Result) -> Runner:
    """Executes an artifact as its target does."""
    path = run.directory.path / artifact["path"]
    if artifact["kind"] == "engine":
        return engine.TensorRTRunner(path)
    return OnnxRunner(path, optimized=artifact["target"] != "tensorrt")
