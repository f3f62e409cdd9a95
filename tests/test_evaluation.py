"""Predictions and their scores; runtimes timed in turn, and the records of their times."""

import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from support import Counter
from torch import nn

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.accuracy import check_labels, predictions, score
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.latency import (
    SESSIONS_DIFFER,
    BenchmarkConfig,
    benchmark,
    paired_speedup,
    summarize,
)
from clusterq_deploy.lowering import export_graph
from clusterq_deploy.report.analysis import WIDEST
from clusterq_deploy.report.text import label_warning
from clusterq_deploy.results.report import LabelCheck
from clusterq_deploy.runtimes.runners import Array, OnnxRunner, Runner


class Fixed(Runner):
    """Returns the first values of each image as logits."""

    runtime = "torch"

    def infer(self, images: Array) -> Array:
        return images.reshape(len(images), -1)[:, :6]


def test_predictions_are_the_five_best_with_ties_to_the_lower_class() -> None:
    logits = np.array([[0, 5, 1, 2, 3, 4], [7, 7, 0, 0, 0, 0]], np.float32)
    data = EvaluationSet.from_images("x", logits.reshape(2, 1, 1, 6))
    assert predictions(Fixed(), data, 1).tolist() == [[1, 5, 4, 3, 2], [0, 1, 2, 3, 4]]


def test_score_is_in_percent() -> None:
    images = np.zeros((4, 1, 1, 6), np.float32)
    data = EvaluationSet.from_images("x", images, [1, 2, 3, 0])
    predicted = np.array([[1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    teacher = np.array([[1, 0, 2, 3, 4], [2, 0, 1, 3, 4], [5, 0, 1, 2, 4], [0, 1, 2, 3, 4]])
    scored = score("torch", predicted, teacher, data, "file")
    assert (scored.top1, scored.top5, scored.agreement, scored.graph) == (50, 75, 75, "file")
    scored = score("torch", predicted, teacher, EvaluationSet.from_images("x", images))
    assert (scored.top1, scored.top5, scored.agreement) == (None, None, 75)
    with pytest.raises(DataError, match="do not fit"):
        score("torch", predicted[:2], teacher, data)


def test_summarize_has_percentiles() -> None:
    times = [float(t) for t in range(1, 101)]
    record = summarize("torch", 4, times)
    assert (record.runs, record.mean_ms, record.median_ms) == (100, 50.5, 50.5)
    assert (record.p90_ms, record.p95_ms, record.p99_ms) == pytest.approx((90.1, 95.05, 99.01))
    assert record.images_per_second == pytest.approx(4000 / 50.5)
    assert record.coefficient_of_variation == pytest.approx(np.std(times) / 50.5)
    assert len(record.quantiles_ms) == 21
    assert record.quantiles_ms[::10] == pytest.approx([1, 50.5, 100])


def test_benchmark_runs_the_runtimes_in_turn() -> None:
    calls: list[tuple[str, int]] = []

    class Named(Fixed):
        def __init__(self, name: str) -> None:
            self.name = name

        def infer(self, images: Array) -> Array:
            calls.append((self.name, len(images)))
            return super().infer(images)

    names = ["a", "b", "c"]
    config = BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=16, min_seconds=0, rounds=8)
    latencies = benchmark({name: Named(name) for name in names}, (1, 2, 3), config).latencies
    assert [(record.batch, record.runs) for record in latencies["a"]] == [(1, 16), (3, 16)]
    assert [batch for _, batch in calls] == [1] * (3 * 17) + [3] * (3 * 17)
    of_one = [name for name, batch in calls if batch == 1]
    assert of_one[:9] == [name for name in names for _ in range(3)]  # one call to warm up, then two per turn
    later = [tuple(of_one[start : start + 6]) for start in range(9, len(of_one), 6)]
    assert all(sorted(turn) == ["a", "a", "b", "b", "c", "c"] for turn in later)
    assert all(turn[i] == turn[i + 1] for turn in later for i in (0, 2, 4))
    assert len(set(later)) > 2


def test_benchmark_ends_when_each_runtime_has_had_its_runs_and_seconds() -> None:
    class Slow(Fixed):
        def infer(self, images: Array) -> Array:
            time.sleep(0.01)
            return super().infer(images)

    config = BenchmarkConfig(batches=(1,), warmup_ms=0, min_runs=4, min_seconds=0.03, rounds=50)
    counter = Counter()
    (record,) = benchmark({"a": Slow()}, (1, 2, 3), config, counter).latencies["a"]
    assert record.runs == 6  # enough turns for an interval
    assert counter.ended == [("Benchmark", 50, 50)]


def test_benchmark_leaves_out_a_batch_that_does_not_fit_and_counts_it_as_done() -> None:
    class Narrow(Fixed):
        def infer(self, images: Array) -> Array:
            if len(images) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().infer(images)

    config = BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=6, min_seconds=0, rounds=3)
    counter = Counter()
    result = benchmark({"a": Narrow(), "b": Fixed()}, (1, 2, 3), config, counter, baselines={"b": "a"})
    assert {name: [record.batch for record in records] for name, records in result.latencies.items()} == {
        "a": [1],
        "b": [1, 3],
    }
    assert [record.speedup is None for record in result.latencies["b"]] == [False, True]
    assert result.skipped == ["a: a batch of 3 does not fit the memory"]
    assert counter.ended == [("Benchmark", 12, 12)]


def test_benchmark_raises_other_errors() -> None:
    class Broken(Fixed):
        def infer(self, images: Array) -> Array:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        benchmark({"a": Broken()}, (1, 2, 3), BenchmarkConfig())


def test_paired_speedup_is_the_median_ratio_of_the_turns() -> None:
    timed = [[1.0, 1.0, 1.0, 9.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]
    baseline = [[2.0, 2.0, 2.0, 2.0], [6.0, 6.0, 6.0, 99.0], [1.5, 1.5, 1.5, 1.5]]
    assert paired_speedup(baseline, timed) == {"speedup": 2.0}  # of 2, 3 and 1.5; too few for an interval
    ratios = [1.1, 1.4, 1.2, 1.3, 1.5, 1.6, 1.0, 1.7, 1.8, 1.9]
    fields = paired_speedup([[ratio] for ratio in ratios], [[1.0]] * 10)
    assert fields["speedup"] == pytest.approx(1.45)
    # of ten values the second and the ninth enclose the median in 1 - 2 * 11 / 1024 = 97.9 % of all cases
    assert fields["speedup_low"] == pytest.approx(1.1 / (1 + SESSIONS_DIFFER))
    assert fields["speedup_high"] == pytest.approx(1.8 * (1 + SESSIONS_DIFFER))


def test_paired_speedup_ignores_calls_that_other_load_made_slow() -> None:
    rng = np.random.default_rng(0)

    def turns(base: float, disturbed: float) -> list[list[float]]:
        slow = 1 + 5 * (rng.random((30, 40)) < disturbed) * rng.random((30, 40))
        return (base * slow * rng.normal(1, 0.01, (30, 40))).tolist()

    for disturbed in (0.0, 0.3, 0.6):
        fields = paired_speedup(turns(1.5, disturbed), turns(1.0, disturbed))
        assert fields["speedup"] == pytest.approx(1.5, rel=0.02), disturbed
        assert fields["speedup_low"] < 1.5 < fields["speedup_high"]
        assert fields["speedup_high"] / fields["speedup_low"] < 1.1
    only_baseline = paired_speedup(turns(1.0, 0.6), turns(1.0, 0.0))
    assert only_baseline["speedup_low"] < 1.02


def test_paired_speedup_is_in_its_interval_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        ratios = 1.2 * np.exp(rng.standard_t(2, 15) * 0.2)
        fields = paired_speedup([[ratio] for ratio in ratios], [[1.0]] * 15)
        low, high = fields["speedup_low"] * (1 + SESSIONS_DIFFER), fields["speedup_high"] / (1 + SESSIONS_DIFFER)
        inside += low <= 1.2 <= high
    assert inside >= 0.93 * 300


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_benchmark_has_the_same_verdict_next_to_a_busy_process(busy: bool) -> None:
    """Real sessions: a net against itself, and against one of three times the work.

    An interval of 95 % misses the truth in one of twenty measurements, so that one of three has to contain it.
    """
    graphs = {}
    for name, depth in (("light", 3), ("heavy", 9)):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(depth)]
        graphs[name] = export_graph(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), (3, 24, 24))
    sources = {"light": "light", "again": "light", "heavy": "heavy"}
    config, baselines = BenchmarkConfig(batches=(1,), min_seconds=1.0), {"again": "light", "light": "heavy"}
    intervals = []
    with ExitStack() as stack:
        if busy:
            load = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(load.kill)
        runners = {
            name: stack.enter_context(OnnxRunner(graphs[source].SerializeToString(), threads=2))
            for name, source in sources.items()
        }
        for _ in range(3):
            latencies = benchmark(runners, (3, 24, 24), config, baselines=baselines).latencies
            (again,), (light,) = latencies["again"], latencies["light"]
            low, high = again.speedup_low, again.speedup_high
            intervals.append((low, high))
            if low <= 1 <= high:
                break
    assert any(low <= 1 <= high for low, high in intervals), intervals
    assert light.speedup_low > 1 or light.speedup_high > WIDEST * light.speedup_low
    assert light.speedup > 1.5


# ---- whether labels and classes belong together ----


def checked(labels: np.ndarray, top: np.ndarray) -> LabelCheck | None:
    """Return the check of predictions, of which only the first counts."""
    data = EvaluationSet.from_images("set", np.zeros((len(labels), 1, 1, 1), np.float32), labels)
    return check_labels(np.stack([top] * 5, axis=1), data)


def test_check_labels_finds_labels_that_do_not_belong_to_the_classes() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 12, 300)
    noise = rng.random(300) < 0.3
    top = np.where(noise, rng.integers(0, 12, 300), classes)
    order = np.array([0, 1, *np.roll(np.arange(2, 12), 3)])  # two of twelve classes are in their places
    right, shuffled = checked(classes, top), checked(order[classes], top)
    moved, unrelated = checked(classes + 1, top), checked(rng.permutation(classes), top)
    assert None not in (right, shuffled, moved, unrelated)
    assert label_warning(right, "fp32") is None
    assert (shuffled.at_chance, shuffled.renaming_helps) == (False, True)
    assert shuffled.renamed == right.renamed == pytest.approx(right.top1)
    assert "in another order" in label_warning(shuffled, "fp32")
    assert (moved.shift, moved.shifted) == (-1, pytest.approx(right.top1))
    assert "added to every label" in label_warning(moved, "fp32")
    assert (unrelated.at_chance, unrelated.renaming_helps) == (True, False)
    assert "no renaming fits well" in label_warning(unrelated, "fp32")


@pytest.mark.parametrize("hit_rate", [0.15, 0.4, 0.9])
@pytest.mark.parametrize(("images", "classes"), [(400, 2), (400, 10), (100, 1000), (2000, 1000)])
def test_check_labels_accepts_right_labels(images: int, classes: int, hit_rate: float) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, images)
    top = np.where(rng.random(images) < hit_rate + 1 / classes, labels, rng.integers(0, classes, images))
    check = checked(labels, top)
    assert check is not None
    assert label_warning(check, "fp32") is None


def test_check_labels_needs_images_and_labels_of_several_classes() -> None:
    labels = np.arange(30) % 3
    assert checked(labels[:19], labels[:19]) is None
    assert checked(labels * 0, labels) is None
    unlabelled = EvaluationSet.from_images("set", np.zeros((30, 1, 1, 1), np.float32))
    assert check_labels(np.stack([labels] * 5, axis=1), unlabelled) is None
