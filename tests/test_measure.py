"""Accuracy and latency records."""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from test_progress import Counter
from torch import nn

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.measure import (
    SESSIONS_DIFFER,
    BenchmarkConfig,
    benchmark,
    paired_speedup,
    predictions,
    score,
    summarize,
)
from clusterq_deploy.lowering import export_graph
from clusterq_deploy.report.analysis import WIDEST
from clusterq_deploy.runtimes.runners import Array, OnnxRunner


class Fixed:
    """Answers with the first values of each image as logits."""

    runtime = "torch"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def infer(self, images: Array) -> Array:
        self.calls.append(len(images))
        return images.reshape(len(images), -1)[:, :6]

    def __enter__(self) -> "Fixed":
        return self

    def __exit__(self, *_: object) -> None:
        return None


def test_predictions_are_the_five_best_with_ties_to_the_lower_class() -> None:
    logits = np.array([[0, 5, 1, 2, 3, 4], [7, 7, 0, 0, 0, 0]], np.float32)
    data = EvaluationSet.from_images("x", logits.reshape(2, 1, 1, 6))
    assert predictions(Fixed(), data, 1).tolist() == [[1, 5, 4, 3, 2], [0, 1, 2, 3, 4]]


def test_scores_are_percentages() -> None:
    images = np.zeros((4, 1, 1, 6), np.float32)
    data = EvaluationSet.from_images("x", images, [1, 2, 3, 0])
    own = np.array([[1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    teacher = np.array([[1, 0, 2, 3, 4], [2, 0, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    found = score("torch", own, teacher, data, "file")
    assert (found.top1, found.top5, found.agreement, found.graph) == (50, 75, 75, "file")
    unlabelled = EvaluationSet.from_images("x", images)
    found = score("torch", own, teacher, unlabelled)
    assert (found.top1, found.top5, found.agreement) == (None, None, 75)
    with pytest.raises(DataError, match="do not fit"):
        score("torch", own[:2], teacher, data)


def test_latencies_are_summarized_with_percentiles() -> None:
    times = [float(t) for t in range(1, 101)]
    found = summarize("torch", 4, times)
    assert (found.runs, found.mean_ms, found.median_ms) == (100, 50.5, 50.5)
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == pytest.approx((90.1, 95.05, 99.01))
    assert found.images_per_second == pytest.approx(4000 / 50.5)
    assert found.coefficient_of_variation == pytest.approx(np.std(times) / 50.5)
    assert len(found.quantiles_ms) == 21
    assert found.quantiles_ms[::10] == pytest.approx([1, 50.5, 100])


def test_runtimes_take_turns() -> None:
    """Each turn is a block of calls of every runtime, in another order each time."""
    calls: list[tuple[str, int]] = []

    class Named(Fixed):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def infer(self, images: Array) -> Array:
            calls.append((self.name, len(images)))
            return super().infer(images)

    names = ["a", "b", "c"]
    config = BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=16, min_seconds=0, rounds=8)
    found = benchmark({name: Named(name) for name in names}, (1, 2, 3), config)
    assert [(r.batch, r.runs) for r in found["a"]] == [(1, 16), (3, 16)]
    of_one = [name for name, batch in calls if batch == 1]
    assert of_one[:9] == [name for name in names for _ in range(3)]  # one call to warm up, then two a turn
    later = [tuple(of_one[start : start + 6]) for start in range(9, len(of_one), 6)]
    assert all(sorted(turn) == ["a", "a", "b", "b", "c", "c"] for turn in later)
    assert all(turn[i] == turn[i + 1] for turn in later for i in (0, 2, 4))
    assert len(set(later)) > 2
    assert len(calls) == 2 * 3 * (1 + 16)


def test_turns_end_when_each_runtime_has_had_its_runs_and_seconds() -> None:
    class Slow(Fixed):
        def infer(self, images: Array) -> Array:
            time.sleep(0.01)
            return super().infer(images)

    config = BenchmarkConfig(batches=(1,), warmup_ms=0, min_runs=4, min_seconds=0.03, rounds=50)
    counter = Counter()
    (record,) = benchmark({"a": Slow()}, (1, 2, 3), config, counter)["a"]
    assert record.runs == 6  # turns enough for an interval
    assert counter.ended == [("Benchmark", 50, 50)]


def test_a_speed_up_is_the_median_ratio_of_the_turns() -> None:
    own = [[1.0, 1.0, 1.0, 9.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]
    baseline = [[2.0, 2.0, 2.0, 2.0], [6.0, 6.0, 6.0, 99.0], [1.5, 1.5, 1.5, 1.5]]
    assert paired_speedup(baseline, own) == {"speedup": 2.0}  # of 2, 3 and 1.5; too few for an interval
    ratios = [1.1, 1.4, 1.2, 1.3, 1.5, 1.6, 1.0, 1.7, 1.8, 1.9]
    found = paired_speedup([[ratio] for ratio in ratios], [[1.0]] * 10)
    assert found["speedup"] == pytest.approx(1.45)
    # of ten values the second and the ninth enclose the median in 1 - 2 * 11 / 1024 = 97.9 % of all cases
    assert found["speedup_low"] == pytest.approx(1.1 / (1 + SESSIONS_DIFFER))
    assert found["speedup_high"] == pytest.approx(1.8 * (1 + SESSIONS_DIFFER))


def test_calls_that_other_load_made_slow_do_not_move_a_speed_up() -> None:
    rng = np.random.default_rng(0)

    def turns(base: float, disturbed: float) -> list[list[float]]:
        slow = 1 + 5 * (rng.random((30, 40)) < disturbed) * rng.random((30, 40))
        return (base * slow * rng.normal(1, 0.01, (30, 40))).tolist()

    for disturbed in (0.0, 0.3, 0.6):
        found = paired_speedup(turns(1.5, disturbed), turns(1.0, disturbed))
        assert found["speedup"] == pytest.approx(1.5, rel=0.02), disturbed
        assert found["speedup_low"] < 1.5 < found["speedup_high"]
        assert found["speedup_high"] / found["speedup_low"] < 1.1
    only_one = paired_speedup(turns(1.0, 0.6), turns(1.0, 0.0))  # disturbed in turn, each by itself
    assert only_one["speedup_low"] < 1.02


def test_an_interval_holds_the_speed_up_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        ratios = 1.2 * np.exp(rng.standard_t(2, 15) * 0.2)
        found = paired_speedup([[ratio] for ratio in ratios], [[1.0]] * 15)
        low, high = found["speedup_low"] * (1 + SESSIONS_DIFFER), found["speedup_high"] / (1 + SESSIONS_DIFFER)
        held += low <= 1.2 <= high
    assert held >= 0.93 * 300


def test_a_batch_that_does_not_fit_is_left_out_and_counted_as_done() -> None:
    class Narrow(Fixed):
        def infer(self, images: Array) -> Array:
            if len(images) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().infer(images)

    config, unfit, counter = (
        BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=6, min_seconds=0, rounds=3),
        list[str](),
        Counter(),
    )
    found = benchmark({"a": Narrow(), "b": Fixed()}, (1, 2, 3), config, counter, unfit)
    assert [[record.batch for record in records] for records in found.values()] == [[1], [1, 3]]
    assert unfit == ["a: a batch of 3 does not fit the memory"]
    assert counter.ended == [("Benchmark", 12, 12)]


@pytest.mark.slow
def test_a_verdict_is_the_same_beside_a_process_that_keeps_a_core_busy(tmp_path: Path) -> None:
    """Real sessions: a net against itself, and against one of three times the work."""
    graphs = {}
    for name, depth in (("light", 3), ("heavy", 9)):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(depth)]
        graphs[name] = export_graph(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), (3, 24, 24))
    named = {"light": "light", "again": "light", "heavy": "heavy"}
    config = BenchmarkConfig(batches=(1,), min_seconds=1.0)
    for busy in (False, True):
        load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            with ExitStack() as opened:
                runners = {
                    own: opened.enter_context(OnnxRunner(graphs[name].SerializeToString(), threads=2))
                    for own, name in named.items()
                }
                baselines = {"again": "light", "light": "heavy"}
                found = benchmark(runners, (3, 24, 24), config, baselines=baselines)
        finally:
            if load is not None:
                load.kill()
                load.wait()
        (again,), (light,) = found["again"], found["light"]
        assert again.speedup_low is not None
        assert again.speedup_high is not None
        assert light.speedup_low is not None
        assert light.speedup_high is not None
        assert again.speedup_low <= 1 <= again.speedup_high, busy
        assert light.speedup_low > 1 or light.speedup_high > WIDEST * light.speedup_low, busy
        assert light.speedup is not None
        assert light.speedup > 1.5
