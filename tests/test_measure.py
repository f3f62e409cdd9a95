"""Accuracy and latency records."""

import numpy as np
import pytest
from test_progress import Counter

from clusterq_deploy.data import EvaluationSet
from clusterq_deploy.errors import DataError
from clusterq_deploy.measure import BenchmarkConfig, benchmark, predictions, score, summarize
from clusterq_deploy.runners import Array


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
    runners = {"a": Fixed(), "b": Fixed()}
    config = BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=6, min_seconds=0, rounds=3)
    found = benchmark(runners, (1, 2, 3), config)
    assert [(r.batch, r.runs) for r in found["a"]] == [(1, 6), (3, 6)]
    assert runners["a"].calls == [1] * 7 + [3] * 7  # one call to warm up, then two a round


def test_a_batch_that_does_not_fit_is_left_out_and_counted_as_done() -> None:
    class Narrow(Fixed):
        def infer(self, images: Array) -> Array:
            if len(images) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().infer(images)

    config, unfit, counter = (
        BenchmarkConfig(batches=(1, 3), warmup_ms=0, min_runs=6, min_seconds=0),
        list[str](),
        Counter(),
    )
    found = benchmark({"a": Narrow(), "b": Fixed()}, (1, 2, 3), config, counter, unfit)
    assert [[record.batch for record in records] for records in found.values()] == [[1], [1, 3]]
    assert unfit == ["a: a batch of 3 does not fit the memory"]
    assert counter.ended == [("Benchmark", 12, 12)]
