"""Time FP32 and the exported variants in alternation: graphs and engines go in, latencies and layers come out."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import EngineError
from clusterq_deploy.evaluation.latency import BenchmarkConfig, benchmark, summarize_engine
from clusterq_deploy.files import read_graph
from clusterq_deploy.lowering import quantized_layers
from clusterq_deploy.oom import is_out_of_memory
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.results.report import Latency, Skipped
from clusterq_deploy.results.stages import BenchmarkResult
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.runtimes import tensorrt as engine
from clusterq_deploy.runtimes.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.stages import build, deployables, export
from clusterq_deploy.stages.deployables import CPU, Deployable

logger = logging.getLogger(__name__)

NAME, RESULT = "benchmark", BenchmarkResult


def needs(run: Run, _: AnyStage) -> Needs:
    """Require FP32's graph; read the other graphs and the engines if they exist."""
    exports = tuple(f"export/{bits}" for bits in run.config.bits)
    return Needs((f"export/{FP32}",), optional=(*exports, *deployables.engine_stages(FP32, *run.config.bits)))


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the settings and the machine."""
    environment = run.environment.model_dump(mode="json")
    return {"settings": run.config.benchmark.model_dump(mode="json"), "environment": environment}


def work(run: Run, _: AnyStage) -> tuple[BenchmarkResult, list[str]]:
    """Time each variant in the runtimes of its files."""
    folder, settings = run.directory.path, run.config.benchmark
    finished = {variant: run.finished(Stage(export, variant)) for variant in (FP32, *run.config.bits)}
    exports = {variant: stage.result for variant, stage in finished.items() if stage}
    open_graph = partial(OnnxRunner, threads=settings.cpu_threads)
    graphs = {variant: exported.graph("onnxruntime") for variant, exported in exports.items()}
    models: list[Deployable[Runner]] = [
        *(Deployable(variant, path, CPU, partial(open_graph, folder / path)) for variant, path in graphs.items()),
        *deployables.run_graphs_on_gpu(run, exports),
    ]
    if run.device.type == "cuda":
        models.append(Deployable(FP32, None, TorchRunner.runtime, partial(TorchRunner, run.model.original)))
    timed, skipped = time_in_turn(models, run.model.input.size, settings, run.progress)
    latency = {v: [entry for model, entries in timed if model.variant == v for entry in entries] for v in exports}
    inspections: dict[str, list[EngineInspection]] = {variant: [] for variant in exports}
    files: list[str] = []
    for model in chain.from_iterable(deployables.run_engines(run, variant) for variant in exports):
        name = str(model.path)
        try:
            with model.open() as runner:
                latency[model.variant] += time_engine(runner, name, settings)
                inspection, text = inspect_engine(runner, name, folder / name, settings.batches[0])
        except EngineError as error:  # a loaded engine allocates the memory of its largest batch
            if not is_out_of_memory(error):
                raise
            skipped.append(Skipped(stage=NAME, reason=f"{name}: {' '.join(str(error).split())}"))
            continue
        inspections[model.variant].append(inspection)
        files += [run.directory.write(f"{name}.layers.json", text)] if text else []
    result = BenchmarkResult(
        latency=latency,
        environment=run.environment,
        inspections=inspections,
        skipped=skipped,
        provisional=any(entry.stage == NAME for entry in skipped),  # there was not enough memory
    )
    return result, files


def describe(run: Run, _: AnyStage) -> str:
    """State the batches and the number of threads."""
    timing = run.config.benchmark
    return f"batches of {', '.join(map(str, timing.batches))}, {timing.cpu_threads} threads"


def time_in_turn(
    models: Iterable[Deployable[Runner]], size: tuple[int, int, int], settings: BenchmarkConfig, progress: Progress
) -> tuple[list[tuple[Deployable[Runner], list[Latency]]], list[Skipped]]:
    """Time graphs and the torch model from host to host, with the speed-up of variants over FP32 in the same runtime.

    All models are open at the same time. `size` is (channels, height, width) of an image.

    Returns:
        The latencies of the models that could be opened, and what was skipped.
    """
    timed: dict[str, tuple[Deployable[Runner], Runner]] = {}
    skipped: list[Skipped] = []
    with ExitStack() as stack:  # closed before TensorRT loads engines: sessions use its logger and the memory
        for item in deployables.opened(models):
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                stack.enter_context(item[1])
                timed[f"{item[0].runtime} {item[0].path}"] = item
        fp32 = {model.runtime: key for key, (model, _) in timed.items() if model.variant == FP32}
        variants = {key: model.runtime for key, (model, _) in timed.items() if model.variant != FP32}
        baselines = {key: fp32[runtime] for key, runtime in variants.items() if runtime in fp32}
        runners = {key: runner for key, (_, runner) in timed.items()}
        timings = benchmark(runners, size, settings, progress, baselines)
    skipped += [Skipped(stage=NAME, reason=reason) for reason in timings.skipped]
    described = []
    for key, (model, _) in timed.items():
        update = {"graph": model.path, "threads": settings.cpu_threads if model.runtime == CPU else None}
        described.append((model, [entry.model_copy(update=update) for entry in timings.latencies[key]]))
    return described, skipped


def benchmark_file(path: Path, config: RunConfig, progress: Progress = SILENT) -> list[Latency]:
    """Time an ONNX file, of any exporter, in every available runtime, with the engines next to it; or an engine.

    Raises:
        ExportError: the file cannot be run.
        EngineError: the engine cannot be run.
    """
    settings, latencies = config.benchmark, list[Latency]()
    if path.suffix != build.ENGINE:
        with OnnxRunner(path) as session:
            fixed, channels, height, width = session.input_shape
        if fixed is not None and settings.batches != (fixed,):
            logger.warning("%s has a fixed batch size: only %d is timed", path, fixed)
            settings = settings.model_copy(update={"batches": (fixed,)})
        graphs = deployables.file_graphs(path, build.profile_batches(config), settings.cpu_threads)
        timed, skipped = time_in_turn(graphs, (channels, height, width), settings, progress)
        for entry in skipped:
            deployables.warn_of(entry)
        latencies += [latency for _, entries in timed for latency in entries]
    for model in deployables.file_engines(path):
        with deployables.file_engine(model, path) as runner:
            latencies += time_engine(runner, str(model.path), settings)
    return latencies


def time_engine(runner: engine.TensorRTRunner, name: str, settings: BenchmarkConfig) -> list[Latency]:
    """Time an open engine at each batch size, with a CUDA graph if one can be captured.

    `name` is its path in the run directory, where its `trtexec` commands run.

    Raises:
        EngineError: TensorRT cannot run the engine at one of the batch sizes.
    """
    options = settings.model_dump(include={"warmup_ms", "min_runs", "min_seconds"})
    latencies = []
    for batch in settings.batches:
        times = runner.measure(batch, **options, cuda_graph=True)
        command = None
        if runner.info.options.library == "tensorrt":  # TensorRT-RTX has another tool
            command = runner.trtexec_command(name, batch, **options, cuda_graph=times.cuda_graph)
        record = summarize_engine(runner.runtime, batch, times)
        latencies.append(record.model_copy(update={"graph": name, "trtexec": command}))
    return latencies


def inspect_engine(runner: engine.TensorRTRunner, name: str, path: Path, batch: int) -> tuple[EngineInspection, str]:
    """Return the types and times of an open engine's layers in calls of `batch` images, and TensorRT's JSON of them.

    If the engine cannot be inspected, the record has a note, and the JSON is empty or what was read. `name` is its path
    in the run directory; the graph that it was built from is next to `path`.
    """
    graph, text = path.with_name(runner.info.source), ""
    quantized = quantized_layers(read_graph(graph)) if graph.is_file() and not runner.info.derived else {}
    try:
        text = runner.layer_information(batch)
        layers, times_ms = engine.parse_layers(text), runner.layer_times(batch)
    except EngineError as error:
        note = f"The engine could not be inspected: {error}."
        return EngineInspection(engine=name, batch=batch, detailed=False, layers=0, notes=[note]), text
    inspection = engine.summarize_layers(layers, times_ms, quantized, engine=name, batch=batch)
    return inspection.model_copy(update={"weights_bytes": runner.weights_bytes()}), text
