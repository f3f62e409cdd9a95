"""Latency: several runtimes timed in turn, and the records of their times."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from calib.support.config import StageConfig
from calib.support.progress import SILENT, Progress
from clusterq_deploy.environment import available_cores
from clusterq_deploy.oom import is_out_of_memory
from clusterq_deploy.results.engines import LatencyStats
from clusterq_deploy.results.report import Latency
from clusterq_deploy.runtimes.runners import Array, Runner
from clusterq_deploy.runtimes.tensorrt.timing import EngineTimes

_QUANTILE = 0.25  # of a turn's calls, its speed
_MIN_TURNS = 6  # for which the extremes of all ratios are an interval of 95 %: 1 - 2 * 0.5**6
SESSIONS_DIFFER = 0.02
"""How much two sessions of the same graph can differ in speed permanently, by their place in memory."""


class BenchmarkConfig(StageConfig):
    """How latency is measured.

    Attributes:
        batches: batch sizes.
        threads: threads of CPU runtimes; None is one for each core that the process may use.
        warmup_ms: each runtime runs this long before the first measurement.
        min_runs, min_seconds: each measurement has at least both.
        rounds: the largest number of turns per runtime; they take turns, so that a slower machine slows all of them.
    """

    batches: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = Field((1, 32), min_length=1)
    threads: int | None = Field(None, ge=1, le=1024)
    warmup_ms: float = Field(200, ge=0)
    min_runs: int = Field(10, ge=1)
    min_seconds: float = Field(3, ge=0)
    rounds: int = Field(30, ge=1)

    @property
    def cpu_threads(self) -> int:
        """The number of threads; by default that of the cores."""
        return self.threads or available_cores()


@dataclass(frozen=True)
class BenchmarkResult:
    """One latency record per batch size for each name, and a line for each batch size that was skipped."""

    latencies: dict[str, list[Latency]]
    skipped: list[str]


def benchmark(
    runners: Mapping[str, Runner],
    size: tuple[int, int, int],
    config: BenchmarkConfig,
    progress: Progress = SILENT,
    baselines: Mapping[str, str] | None = None,
) -> BenchmarkResult:
    """Time `infer`, host to host, of several runtimes in turns of random order.

    A batch size that does not fit a runtime's memory is skipped for it.

    Args:
        runners: by any name.
        size: (channels, height, width) of an image.
        baselines: the name of the runner to which the speed of another is compared, by the latter's.
    """
    latencies: dict[str, list[Latency]] = {name: [] for name in runners}
    skipped = []
    rng = np.random.default_rng(0)
    with progress.task("Benchmark", len(config.batches) * config.rounds * len(runners)) as advance:
        for batch in config.batches:
            images = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
            turns: dict[str, list[list[float]]] = {name: [] for name in runners}
            for index in range(config.rounds):
                for name in rng.permutation(list(runners)) if index else list(runners):
                    try:
                        if name in turns:
                            turns[name].append(_time_turn(runners[name], images, config, first=index == 0))
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        skipped.append(f"{name}: a batch of {batch} does not fit the memory")
                        del turns[name]
                    advance(1)
                if all(_is_enough(times_ms, config) for times_ms in turns.values()):
                    advance((config.rounds - index - 1) * len(runners))
                    break
            for name, times_ms in turns.items():
                record = summarize(runners[name].runtime, batch, [time_ms for turn in times_ms for time_ms in turn])
                if (other := turns.get((baselines or {}).get(name, ""))) is not None:
                    record = record.model_copy(update=paired_speedup(other, times_ms))
                latencies[name].append(record)
    return BenchmarkResult(latencies, skipped)


def paired_speedup(baseline: Sequence[Sequence[float]], timed: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the speed relative to a baseline that was timed in the same turns: the `speedup` fields of `Latency`.

    The time of a turn is the first quartile of its calls, since other load on the machine slows down some of them. The
    speed-up is the median ratio of two such times of one turn. Its interval of 95 % is that of order statistics, which
    requires no distribution, widened by `SESSIONS_DIFFER`. Fewer than six turns have no interval.

    Args:
        baseline, timed: the times of each turn's calls, in milliseconds, of equally many turns.
    """
    pairs = zip(baseline, timed, strict=True)
    ratios = [float(np.quantile(first, _QUANTILE) / np.quantile(second, _QUANTILE)) for first, second in pairs]
    speedup = float(np.median(ratios))
    if len(ratios) < _MIN_TURNS:
        return {"speedup": speedup}
    from scipy.stats import quantile_test  # its import takes a second

    interval = quantile_test(ratios, q=speedup, p=0.5).confidence_interval(confidence_level=0.95)
    low, high = interval.low / (1 + SESSIONS_DIFFER), interval.high * (1 + SESSIONS_DIFFER)
    return {"speedup": speedup, "speedup_low": float(low), "speedup_high": float(high)}


def _time_turn(runner: Runner, images: Array, config: BenchmarkConfig, *, first: bool) -> list[float]:
    """Return the milliseconds of each call in one turn of a runtime, after a warm-up in the first turn."""
    if first:
        runner.infer(images)  # ONNX Runtime's TensorRT provider builds an engine here
        _time_calls(runner, images, config.warmup_ms / 1000, 0)
    return _time_calls(runner, images, config.min_seconds / config.rounds, -(-config.min_runs // config.rounds))


def _is_enough(turns: Sequence[Sequence[float]], config: BenchmarkConfig) -> bool:
    """Return whether a runtime has its runs and seconds, in enough turns for an interval."""
    runs, seconds = sum(map(len, turns)), sum(map(sum, turns)) / 1000
    return len(turns) >= _MIN_TURNS and runs >= config.min_runs and seconds >= config.min_seconds


def _time_calls(runner: Runner, images: Array, seconds: float, runs: int) -> list[float]:
    """Return the milliseconds of each call, for at least `seconds` and at least `runs` calls."""
    times_ms: list[float] = []
    start = time.perf_counter()
    while len(times_ms) < runs or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        runner.infer(images)
        times_ms.append(1000 * (time.perf_counter() - before))
    return times_ms


def summarize(runtime: str, batch: int, times_ms: Sequence[float]) -> Latency:
    """Return the record of the times of calls, in milliseconds, with their 21 quantiles from 0 to 1."""
    stats = latency_stats(times_ms)
    return Latency(
        runtime=runtime,
        batch=batch,
        runs=len(times_ms),
        images_per_second=1000 * batch / stats.mean_ms,
        quantiles_ms=np.quantile(times_ms, np.linspace(0, 1, 21)).tolist(),
        **stats.model_dump(),
    )


def summarize_engine(runtime: str, batch: int, times: EngineTimes) -> Latency:
    """Return the record of an engine's measurement: the latency as trtexec defines it, its parts, and the GPU's state.

    Throughput is by the time of the whole loop on the host: copies run in parallel with the computation.
    """
    calls = times.calls
    fields = {
        "images_per_second": batch * len(calls) / times.wall_seconds,
        "wall_seconds": times.wall_seconds,
        "cuda_graph": times.cuda_graph,
        "gpu": times.gpu,
    }
    for part in ("host_to_device", "compute", "device_to_host", "enqueue"):
        fields[part] = latency_stats([getattr(call, f"{part}_ms") for call in calls])
    return summarize(runtime, batch, [call.latency_ms for call in calls]).model_copy(update=fields)


def latency_stats(times_ms: Sequence[float]) -> LatencyStats:
    """Return mean, percentiles and coefficient of variation of times in milliseconds."""
    times = np.array(times_ms)
    median, p90, p95, p99 = np.percentile(times, (50, 90, 95, 99)).tolist()
    mean = float(times.mean())
    return LatencyStats(
        mean_ms=mean,
        median_ms=median,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        coefficient_of_variation=float(times.std()) / mean if mean else 0.0,
    )
