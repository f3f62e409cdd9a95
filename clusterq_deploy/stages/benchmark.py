"""Time FP32 and every exported variant in turn: graphs and engines go in, latencies come out.

Of an engine also what TensorRT made of the graph.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clusterq_deploy.errors import EngineError
from clusterq_deploy.evaluation.latency import BenchmarkConfig, benchmark, summarize_engine
from clusterq_deploy.files import read_graph
from clusterq_deploy.lowering import quantized_layers
from clusterq_deploy.oom import is_out_of_memory
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.results.report import Latency, Skipped
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import Needs
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages.deployables import built_engine, engine_stages, graph_for, provider_runners

NAME = "benchmark"


def needs(run: Run, _: str) -> Needs:
    """The graphs and engines that are there; FP32's graph has to be."""
    exports = tuple(f"export/{bits}" for bits in run.config.bits)
    return Needs((f"export/{FP32}",), optional=(*exports, *engine_stages(FP32, *run.config.bits)))


def inputs(run: Run, _: str) -> Result:
    """The settings and the machine."""
    return {"settings": run.config.benchmark.model_dump(mode="json"), "environment": run.environment}


def work(run: Run, _: str) -> tuple[Result, list[str]]:
    """Time each variant as its target executes it."""
    variants = [v for v in (FP32, *run.config.bits) if run.directory.finished(f"export/{v}")]
    sources = {v: run.finished(f"export/{v}") for v in variants}
    built = {v: built_engine(run, v) for v in variants}
    settings, size = run.config.benchmark, run.model.input.size
    skipped: list[Skipped] = []
    latency: dict[str, list[Result]] = {v: [] for v in variants}
    with ExitStack() as opened:  # closed before TensorRT loads engines: sessions hold its logger and the memory
        timed = {own.key: own for own in _timed(run, sources, skipped)}
        for own in timed.values():
            opened.enter_context(own.runner)
        runners = {key: own.runner for key, own in timed.items()}
        single = {own.runner.runtime: key for key, own in timed.items() if own.variant == FP32}
        baselines = {
            key: single[own.runner.runtime]
            for key, own in timed.items()
            if own.variant != FP32 and own.runner.runtime in single
        }
        timings = benchmark(runners, size, settings, run.progress, baselines)
        skipped += [Skipped(stage="benchmark", reason=reason) for reason in timings.skipped]
    for key, records in timings.latencies.items():
        own = timed[key]
        latency[own.variant] += [_result(r, graph=own.graph, threads=own.threads) for r in records]
    inspections: dict[str, list[Result]] = {v: [] for v in variants}
    files: list[str] = []
    for variant, record in built.items():
        for artifact in record.result["artifacts"] if record else ():
            name, path = artifact["path"], run.directory.path / artifact["path"]
            try:
                with engine.TensorRTRunner(path) as runner:
                    latency[variant] += [_result(r) for r in time_engine(runner, name, settings)]
                    inspected, text = inspect_engine(runner, name, path, settings.batches[0])
            except EngineError as error:  # loaded, it takes the memory of its largest batch
                if not is_out_of_memory(error):
                    raise
                skipped.append(Skipped(stage="benchmark", reason=f"{name}: {' '.join(str(error).split())}"))
                continue
            inspections[variant].append(inspected.model_dump(mode="json"))
            if text:
                files.append(run.directory.write(f"{name}.layers.json", text))
    more: Result = {"inspections": inspections, "skipped": [s.model_dump(mode="json") for s in skipped]}
    more["provisional"] = any(own.stage == "benchmark" for own in skipped)  # of what did not fit the memory
    return {"latency": latency, "environment": run.environment, **more}, files


def describe(run: Run, _: str) -> str:
    """Say which batches and how many threads."""
    timing = run.config.benchmark
    return f"batches of {', '.join(map(str, timing.batches))}, {timing.cpu_threads} threads"


@dataclass(frozen=True)
class _Timed:
    """What is timed from host to host; `graph` and `threads` are None for the torch model, threads on a GPU too."""

    variant: str
    runner: Runner
    graph: str | None = None
    threads: int | None = None

    @property
    def key(self) -> str:
        return f"{self.runner.runtime} {self.graph}"


def _timed(run: Run, exports: Mapping[str, StageRecord], skipped: list[Skipped]) -> Iterator[_Timed]:
    """Every graph in ONNX Runtime on the CPU, and, where the run has a GPU, in its GPU providers and in torch."""
    threads = run.config.benchmark.cpu_threads
    for variant, record in exports.items():
        graph = str(graph_for(record, "onnxruntime"))
        yield _Timed(variant, OnnxRunner(run.directory.path / graph, threads=threads), graph, threads)
    for own in provider_runners(run, exports, skipped):
        yield _Timed(own.variant, own.runner, own.graph)
    if run.device.type == "cuda":
        yield _Timed(FP32, TorchRunner(run.model.module))


def _result(record: Latency, **more: object) -> Result:
    """A record as the manifest keeps it: without what was not measured."""
    return {**record.model_dump(mode="json", exclude_none=True), **more}


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
        command = runner.trtexec_command(
            name,
            batch,
            warmup_ms=warmup_ms,
            min_runs=min_runs,
            min_seconds=min_seconds,
            cuda_graph=times.cuda_graph,
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
