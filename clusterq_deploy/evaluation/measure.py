"""What a deployable costs and saves: accuracy as a runtime executes it, and latency."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.config import StageConfig
from calib.support.progress import SILENT, Progress
from clusterq_deploy.environment import available_cores
from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.oom import infer_split_on_oom, is_out_of_memory
from clusterq_deploy.results.engines import LatencyStats
from clusterq_deploy.results.report import Accuracy, Latency
from clusterq_deploy.runtimes.runners import Array, Runner
from clusterq_deploy.runtimes.tensorrt.calls import EngineTimes

_QUICK = 0.25  # the quantile of a turn's calls that counts for its speed
_FEWEST_TURNS = 6  # for which the extremes of all ratios are an interval of 95 %: 1 - 2 * 0.5**6
SESSIONS_DIFFER = 0.02
"""What the speed of two sessions of the same graph can differ by for good: where each lies in memory stays as it is."""

Predictions = npt.NDArray[np.int64]


class BenchmarkConfig(StageConfig):
    """How latency is measured.

    Attributes:
        batches: batch sizes.
        threads: threads of CPU runtimes; None takes one for each core that the process may use.
        warmup_ms: each runtime runs this long before anything counts.
        min_runs, min_seconds: each measurement has at least both.
        rounds: the runtimes take turns so many times, so that a machine that slows down slows all of them; fewer times
            where each has had its runs and seconds before.
    """

    batches: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = Field((1, 32), min_length=1)
    threads: int | None = Field(None, ge=1, le=1024)
    warmup_ms: float = Field(200, ge=0)
    min_runs: int = Field(10, ge=1)
    min_seconds: float = Field(3, ge=0)
    rounds: int = Field(30, ge=1)

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
    infer, found = infer_split_on_oom(runner.infer, f"evaluation on {runner.runtime}"), []
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
    baselines: Mapping[str, str] | None = None,
) -> dict[str, list[Latency]]:
    """Time `infer`, host to host, of several runtimes in turn, in another order each time.

    Args:
        runners: by a name of the caller's.
        size: (channels, height, width) of an image.
        config: how to measure.
        progress: shows how far it is.
        unfit: takes a line for each batch size that does not fit the memory in a runtime, which is then left out.
        baselines: for names whose speed-up over another name is asked for, that other name.

    Returns:
        For each name one record a batch size. Records of one call can be compared with each other.
    """
    unfit = [] if unfit is None else unfit
    found: dict[str, list[Latency]] = {name: [] for name in runners}
    rng = np.random.default_rng(0)
    with progress.task("Benchmark", len(config.batches) * config.rounds * len(runners)) as advance:
        for batch in config.batches:
            images = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
            turns: dict[str, list[list[float]]] = {name: [] for name in runners}
            for index in range(config.rounds):
                for name in rng.permutation(list(runners)) if index else list(runners):
                    try:
                        if name in turns:
                            turns[name].append(_turn(runners[name], images, config, first=index == 0))
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        unfit.append(f"{name}: a batch of {batch} does not fit the memory")
                        del turns[name]
                    advance(1)
                if all(_is_enough(own, config) for own in turns.values()):
                    advance((config.rounds - index - 1) * len(runners))
                    break
            for name, own in turns.items():
                record = summarize(runners[name].runtime, batch, [time for turn in own for time in turn])
                other = turns.get((baselines or {}).get(name, ""))
                found[name].append(record if other is None else record.model_copy(update=paired_speedup(other, own)))
    return found


def paired_speedup(baseline: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times as fast as a baseline something ran that took turns with it: `speedup` fields of `Latency`.

    A turn counts by the first quartile of its calls: what else the machine does makes some calls slow, and hardly ever
    so many. The speed-up is the median over turns of the ratio of two such quartiles, both of one turn. Its interval of
    95 % is that of order statistics, which assumes nothing of the ratios' distribution, widened by what two sessions
    of the same graph can differ by. Fewer than six turns have none.

    Args:
        baseline, own: the times of each turn's calls, in milliseconds; as many turns of both.
    """
    pairs = zip(baseline, own, strict=True)
    ratios = [float(np.quantile(first, _QUICK) / np.quantile(second, _QUICK)) for first, second in pairs]
    found = {"speedup": float(np.median(ratios))}
    if len(ratios) < _FEWEST_TURNS:
        return found
    from scipy.stats import quantile_test  # takes a second to import

    interval = quantile_test(ratios, q=found["speedup"], p=0.5).confidence_interval(confidence_level=0.95)
    low, high = interval.low / (1 + SESSIONS_DIFFER), interval.high * (1 + SESSIONS_DIFFER)
    return {**found, "speedup_low": float(low), "speedup_high": float(high)}


def _turn(runner: Runner, images: Array, config: BenchmarkConfig, *, first: bool) -> list[float]:
    """Milliseconds of each call in one turn of a runtime, which warms up in its first."""
    if first:
        runner.infer(images)  # ONNX Runtime's TensorRT provider builds an engine here
        _run_for(runner, images, config.warmup_ms / 1000, 0)
    return _run_for(runner, images, config.min_seconds / config.rounds, -(-config.min_runs // config.rounds))


def _is_enough(turns: Sequence[Sequence[float]], config: BenchmarkConfig) -> bool:
    """Whether a runtime has had its runs and seconds, in turns enough for an interval."""
    runs, seconds = sum(map(len, turns)), sum(map(sum, turns)) / 1000
    return len(turns) >= _FEWEST_TURNS and runs >= config.min_runs and seconds >= config.min_seconds


def _run_for(runner: Runner, images: Array, seconds: float, runs: int) -> list[float]:
    """Milliseconds of each call, for at least so long and so many, and one at least."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < runs or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        runner.infer(images)
        times.append(1000 * (time.perf_counter() - before))
    return times


def summarize(runtime: str, batch: int, times_ms: Sequence[float]) -> Latency:
    """The record of a series of times of one call, in milliseconds."""
    own = latency_stats(times_ms)
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
        host_to_device=latency_stats([call.host_to_device_ms for call in calls]),
        compute=latency_stats([call.compute_ms for call in calls]),
        device_to_host=latency_stats([call.device_to_host_ms for call in calls]),
        enqueue=latency_stats([call.enqueue_ms for call in calls]),
        cuda_graph=times.cuda_graph,
        wall_seconds=times.wall_seconds,
        gpu=times.gpu,
        quantiles_ms=quantiles(latencies_ms),
        **latency_stats(latencies_ms).model_dump(),
    )


def quantiles(times_ms: Sequence[float]) -> list[float]:
    """The quantiles 0, 0.05, 0.1 and so on to 1 of times in milliseconds."""
    found: list[float] = np.quantile(times_ms, np.linspace(0, 1, 21)).tolist()
    return found


def latency_stats(times_ms: Sequence[float]) -> LatencyStats:
    """Mean, percentiles and coefficient of variation of times in milliseconds."""
    times = np.array(times_ms)
    median, p90, p95, p99 = (float(np.percentile(times, q)) for q in (50, 90, 95, 99))
    mean = float(times.mean())
    return LatencyStats(
        mean_ms=mean,
        median_ms=median,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        coefficient_of_variation=float(times.std()) / mean if mean else 0.0,
    )
