"""What a deployable costs and saves: accuracy as a runtime executes it, and latency."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from calib.checkpoint import NOWHERE, Checkpoint, State
from calib.config import StageConfig
from calib.progress import SILENT, Progress
from clusterq_deploy.data import EvaluationSet
from clusterq_deploy.engine.calls import EngineTimes
from clusterq_deploy.environment import available_cores
from clusterq_deploy.errors import DataError
from clusterq_deploy.memory import inferred_in_parts, is_of_memory
from clusterq_deploy.report.engines import Spread
from clusterq_deploy.report.schema import Accuracy, Latency
from clusterq_deploy.runners import Array, Runner

Predictions = npt.NDArray[np.int64]


class BenchmarkConfig(StageConfig):
    """How latency is measured.

    Attributes:
        batches: batch sizes.
        threads: threads of CPU runtimes; None takes one for each core that the process may use.
        warmup_ms: each runtime runs this long before anything counts.
        min_runs, min_seconds: each measurement has at least both.
        rounds: the runtimes take turns so many times, so that a machine that slows down slows all of them.
    """

    batches: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = Field((1, 32), min_length=1)
    threads: int | None = Field(None, ge=1, le=1024)
    warmup_ms: float = Field(200, ge=0)
    min_runs: int = Field(10, ge=1)
    min_seconds: float = Field(3, ge=0)
    rounds: int = Field(3, ge=1)

    @property
    def cpu_threads(self) -> int:
        """The number of threads, counted where it was not given."""
        return self.threads or available_cores()


def predictions(
    runner: Runner,
    data: EvaluationSet,
    batch_size: int,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
    phase: str = "predictions",
) -> Predictions:
    """The five most likely classes of each image that can be read, most likely first: (N, min(5, classes)) int64.

    Ties go to the lower class. Where a batch does not fit the memory, it and those after it are computed in parts.

    Args:
        runner: executes the model.
        data: the images.
        batch_size: images a batch.
        progress: shows how far it is.
        checkpoint: keeps what was reached, for the same runner on the same data.
        phase: this runner's name in it.

    Raises:
        DataError: too many images cannot be read.
        OutOfMemoryError: the memory does not suffice for the smallest parts either.
    """
    infer, found = inferred_in_parts(runner.infer, f"evaluation on {runner.runtime}"), []
    if kept := checkpoint.load(phase):
        data.unreadable.restore(kept["unreadable"])
        found.append(kept["found"].numpy())

    def state() -> State:
        return reached(np.concatenate(found), data)

    with progress.task(f"Evaluating on {runner.runtime}", len(data)) as advance:
        read = sum(map(len, found))
        advance(read)
        for images, _ in data.batches(batch_size, read):
            found.append(np.argsort(-infer(images), axis=1, kind="stable")[:, :5])
            checkpoint.save(phase, state)
            advance(len(images))
    checkpoint.save(phase, state, at_once=True)
    return np.concatenate(found)


def reached(found: Predictions, data: EvaluationSet) -> State:
    """What `predictions` goes on from, of so many images of the set."""
    return {"found": torch.from_numpy(found), "unreadable": data.unreadable.rows()}


def score(
    runtime: str, own: Predictions, teacher: Predictions, data: EvaluationSet, graph: str | None = None
) -> Accuracy:
    """Percentages from `predictions` of a model and of its teacher on the same images, those that can be read.

    Args:
        runtime: what executed the model.
        own, teacher: (N, 5) from `predictions`.
        data: the images, for their labels.
        graph: the file that was executed.

    Raises:
        DataError: the counts differ.
    """
    kept = data.kept
    if len(own) != len(teacher) or len(own) != len(kept):
        raise DataError(
            f"{len(own)} predictions, {len(teacher)} of the teacher and {len(kept)} images do not fit: "
            "leave the data as it is while it is evaluated"
        )
    agreement = 100 * float((own[:, 0] == teacher[:, 0]).mean())
    if data.labels is None:
        return Accuracy(runtime=runtime, top1=None, top5=None, agreement=agreement, graph=graph)
    hits = own == data.labels[kept, None]
    return Accuracy(
        runtime=runtime,
        top1=100 * float(hits[:, 0].mean()),
        top5=100 * float(hits.any(axis=1).mean()),
        agreement=agreement,
        graph=graph,
    )


def benchmark(
    runners: Mapping[str, Runner],
    size: tuple[int, int, int],
    config: BenchmarkConfig,
    progress: Progress = SILENT,
    unfit: list[str] | None = None,
) -> dict[str, list[Latency]]:
    """Time `infer`, host to host, of several runtimes in turn.

    Args:
        runners: by a name of the caller's.
        size: (channels, height, width) of an image.
        config: how to measure.
        progress: shows how far it is.
        unfit: takes a line for each batch size that does not fit the memory in a runtime, which is then left out.

    Returns:
        For each name one record a batch size. Records of one call can be compared with each other.
    """
    unfit = [] if unfit is None else unfit
    found: dict[str, list[Latency]] = {name: [] for name in runners}
    turns = len(config.batches) * config.rounds * len(runners)
    with progress.task("Benchmark", turns) as advance:
        for batch in config.batches:
            images = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
            times: dict[str, list[float]] = {name: [] for name in runners}
            for turn in range(config.rounds):
                for name, runner in runners.items():
                    try:
                        if name in times:
                            times[name] += _turn(runner, images, config, first=turn == 0)
                    except (RuntimeError, MemoryError) as error:
                        if not is_of_memory(error):
                            raise
                        unfit.append(f"{name}: a batch of {batch} does not fit the memory")
                        del times[name]
                    advance(1)
            for name, own in times.items():
                found[name].append(summarize(runners[name].runtime, batch, own))
    return found


def _turn(runner: Runner, images: Array, config: BenchmarkConfig, *, first: bool) -> list[float]:
    """Milliseconds of each call in one turn of a runtime, which warms up in its first."""
    if first:
        runner.infer(images)  # ONNX Runtime's TensorRT provider builds an engine here
        _run_for(runner, images, config.warmup_ms / 1000, 0)
    return _run_for(runner, images, config.min_seconds / config.rounds, -(-config.min_runs // config.rounds))


def _run_for(runner: Runner, images: Array, seconds: float, runs: int) -> list[float]:
    """Milliseconds of each call, for at least so long and so many."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < runs or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        runner.infer(images)
        times.append(1000 * (time.perf_counter() - before))
    return times


def summarize(runtime: str, batch: int, times_ms: Sequence[float]) -> Latency:
    """The record of a series of times of one call, in milliseconds."""
    own = spread(times_ms)
    return Latency(
        runtime=runtime,
        batch=batch,
        runs=len(times_ms),
        images_per_second=1000 * batch / own.mean_ms,
        quantiles_ms=quantiles(times_ms),
        **own.model_dump(),
    )


def summarize_engine(runtime: str, batch: int, times: EngineTimes) -> Latency:
    """The record of an engine's measurement: the latency as trtexec has it, its parts, and the GPU meanwhile.

    Throughput is by the time of the whole loop on the host: copies run beside the computation.
    """
    calls, latencies_ms = times.calls, [call.latency_ms for call in times.calls]
    return Latency(
        runtime=runtime,
        batch=batch,
        runs=len(calls),
        images_per_second=batch * len(calls) / times.wall_seconds,
        host_to_device=spread([call.host_to_device_ms for call in calls]),
        compute=spread([call.compute_ms for call in calls]),
        device_to_host=spread([call.device_to_host_ms for call in calls]),
        enqueue=spread([call.enqueue_ms for call in calls]),
        cuda_graph=times.cuda_graph,
        wall_seconds=times.wall_seconds,
        gpu=times.gpu,
        quantiles_ms=quantiles(latencies_ms),
        **spread(latencies_ms).model_dump(),
    )


def quantiles(times_ms: Sequence[float]) -> list[float]:
    """The quantiles 0, 0.05, 0.1 and so on to 1 of times in milliseconds."""
    found: list[float] = np.quantile(times_ms, np.linspace(0, 1, 21)).tolist()
    return found


def spread(times_ms: Sequence[float]) -> Spread:
    """Mean, percentiles and coefficient of variation of times in milliseconds."""
    times = np.array(times_ms)
    median, p90, p95, p99 = (float(np.percentile(times, q)) for q in (50, 90, 95, 99))
    mean = float(times.mean())
    return Spread(
        mean_ms=mean,
        median_ms=median,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        coefficient_of_variation=float(times.std()) / mean if mean else 0.0,
    )
