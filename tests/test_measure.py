"""Accuracy and latency records."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import SMALL
from torch import nn

from clusterq_deploy import Pipeline
from clusterq_deploy.config import make_config
from clusterq_deploy.data import EvaluationSet
from clusterq_deploy.errors import DataError, ExportError
from clusterq_deploy.measure import BenchmarkConfig, benchmark, predictions, score, summarize
from clusterq_deploy.memory import in_memory
from clusterq_deploy.runners import Array, OnnxRunner, TorchRunner


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


def limited(largest: int, message: str) -> type[nn.Module]:
    """A layer that passes on batches of so many images, and has no memory for more."""

    class Limited(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > largest:
                raise torch.OutOfMemoryError(message)
            return x

    return Limited


def test_an_evaluation_that_does_not_fit_the_memory_goes_on_in_smaller_batches_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60}), tmp_path / "run")
    with TorchRunner(run.model.module) as runner:
        whole = run.predictions(runner)
    narrow = nn.Sequential(limited(13, "CUDA out of memory. Tried to allocate 2.00 GiB.")(), run.model.module)
    with TorchRunner(narrow) as runner:
        assert run.predictions(runner).tolist() == whole.tolist()
    object.__setattr__(run.model, "module", narrow)
    assert run.teacher_predictions.tolist() == whole.tolist()
    said = "evaluation on torch: the memory does not suffice; again, with batches divided by"
    assert [record.getMessage() for record in caplog.records] == [f"{said} {divisor}" for divisor in (2, 4)] * 2


def test_a_runtime_that_fails_for_want_of_memory_gets_smaller_batches_and_for_no_other_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60}), tmp_path / "run")
    run.begin()
    run.export("fp32")
    calls: list[int] = []
    infer = OnnxRunner.infer

    def narrow(self: OnnxRunner, images: Array) -> Array:
        calls.append(len(images))
        if len(images) > 30:
            raise ExportError(f"onnxruntime-cpu cannot run the graph: {reason}")
        return infer(self, images)

    monkeypatch.setattr(OnnxRunner, "infer", narrow)
    reason = "[ONNXRuntimeError] : 6 : bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9"
    with OnnxRunner(tmp_path / "run/fp32/model.onnx") as runner:
        found = run.predictions(runner)
        assert found.tolist() == run.teacher_predictions.tolist()
        assert calls == [50, 25, 25, 10]
        reason = "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input"
        with pytest.raises(ExportError, match="invalid dimensions"):
            run.predictions(runner)
    assert calls == [50, 25, 25, 10, 50]


def test_features_that_do_not_fit_the_memory_are_taken_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60, **SMALL}), tmp_path / "run")
    run.begin()
    run.synthesize()
    infer, calls = TorchRunner.infer, []

    def narrow(self: TorchRunner, images: Array) -> Array:
        calls.append(len(images))
        if len(images) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return infer(self, images)

    monkeypatch.setattr(TorchRunner, "infer", narrow)
    found = run.features().result["features"]
    assert calls == [50, 25, 25, 25, 5, 25, 25, 10]
    assert (found["synthetic"]["images"], found["real"]["images"]) == (80, 60)
    assert "features: the memory does not suffice; again, with batches divided by 2" in caplog.text


def test_memory_that_python_lacks_counts_too() -> None:
    def work(divisor: int) -> int:
        if divisor < 4:
            raise MemoryError
        return divisor

    assert in_memory(work, "work") == (4, 4)
