"""What is measured of a TensorRT engine: its latency in parts, and what TensorRT made of the graph."""

from pathlib import Path

from clusterq_deploy.errors import EngineError
from clusterq_deploy.evaluation.measure import BenchmarkConfig, summarize_engine
from clusterq_deploy.export import quantized_layers
from clusterq_deploy.files import read_graph
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.results.report import Latency
from clusterq_deploy.runtimes import tensorrt as engine


def time_engine(runner: engine.TensorRTRunner, name: str, settings: BenchmarkConfig) -> list[Latency]:
    """The latency of an engine at each batch size, with a CUDA graph where one can be captured.

    Args:
        runner: the engine, open.
        name: its path in the run directory, which its `trtexec` commands start from.
        settings: how to measure.

    Raises:
        EngineError: TensorRT cannot run, or not at one of the batch sizes.
    """
    warmup_ms, min_runs, min_seconds = settings.warmup_ms, settings.min_runs, settings.min_seconds
    found = []
    for batch in settings.batches:
        times = runner.measure(batch, warmup_ms=warmup_ms, min_runs=min_runs, min_seconds=min_seconds, cuda_graph=True)
        command = engine.trtexec_command(
            name,
            input_name=runner.input_name,
            shape=runner.input_shape(batch),
            dynamic=runner.dynamic,
            warmup_ms=warmup_ms,
            min_runs=min_runs,
            min_seconds=min_seconds,
            cuda_graph=times.cuda_graph,
            version_compatible=runner.info.options.version_compatible,
            tensorrt=engine.this_machine().tensorrt,
        )
        record = summarize_engine(runner.runtime, batch, times)
        found.append(record.model_copy(update={"graph": name, "trtexec": command}))
    return found


def inspect_engine(runner: engine.TensorRTRunner, name: str, path: Path, batch: int) -> tuple[EngineInspection, str]:
    """Which of an engine's layers run in which type, and how long they take in calls of `batch` images.

    An engine that cannot be inspected is a note in the record: its latency holds nevertheless.

    Args:
        runner: the engine, open.
        name: its path in the run directory, for the record.
        path: the engine; the graph that it was built from lies beside it.
        batch: images a call.

    Returns:
        The record, and the JSON of TensorRT's inspector for other tools, empty where there is none.
    """
    graph = path.with_name(runner.info.source)
    quantized = quantized_layers(read_graph(graph)) if graph.is_file() and not runner.info.derived else {}
    text = ""
    try:
        text = runner.layer_information(batch)
        found, times_ms = engine.parse_layers(text), runner.layer_times(batch)
    except EngineError as error:
        note = f"The engine could not be inspected: {error}."
        return EngineInspection(engine=name, batch=batch, detailed=False, layers=0, notes=[note]), text
    return engine.summarize_layers(found, times_ms, quantized, engine=name, batch=batch), text
