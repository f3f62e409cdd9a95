"""Build a variant's TensorRT engine: its graph goes in, an engine and its sidecar come out."""

from clusterq_deploy.results.report import Artifact
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import Needs
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.stages.deployables import tuned_batches

NAME = "build"


def needs(_: Run, variant: str) -> Needs:
    """The graph."""
    return Needs(required=(f"export/{variant}",))


def inputs(run: Run, _: str) -> Result:
    """The build settings and the machine; where measurements are kept decides nothing about the engine."""
    settings = _build_config(run)
    return {
        "settings": settings.model_dump(mode="json", exclude={"timing_cache"}),
        "machine": engine.this_machine().binding(settings),
    }


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Build a variant's engine, of the float baseline one in FP32 and one in FP16."""
    source, settings = run.finished(f"export/{variant}"), _build_config(run)
    made = [_build(run, graph, settings) for graph in _engine_graphs(variant, source)]
    return {"artifacts": made}, [file for a in made for file in (a["path"], f"{a['path']}.json")]


def describe(_: Run, __: str) -> str:
    """Say what is built."""
    return "a TensorRT engine"


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
