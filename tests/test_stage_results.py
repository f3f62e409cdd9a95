"""The records of stages: what the manifest keeps of them, and a manifest that does not fit."""

import math
from pathlib import Path

import pytest
import torch

from clusterq_deploy import Pipeline
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.results.report import Artifact, Latency
from clusterq_deploy.results.stages import BenchmarkResult, ExportResult, FeaturesResult, SynthesisResult
from clusterq_deploy.run.stage import Stage
from clusterq_deploy.stages import synthesize

TIMES = {"mean_ms": 1, "median_ms": 1, "p90_ms": 1, "p95_ms": 1, "p99_ms": 1, "coefficient_of_variation": 0}


def test_stage_result_leaves_out_what_was_not_set() -> None:
    skipped = FeaturesResult(inputs={"data": "digits", "limit": None}, skipped="too large", provisional=True)
    assert skipped.model_dump(mode="json") == {
        "inputs": {"data": "digits", "limit": None}, "skipped": "too large", "provisional": True,
    }  # fmt: skip
    graph = Artifact(kind="onnx", target="onnxruntime", path="fp32/model.onnx", size_bytes=9)
    exported = ExportResult(artifacts=[graph], no_fp16=None).model_dump(mode="json")
    assert exported == {"artifacts": [graph.model_dump(mode="json")], "no_fp16": None}
    assert exported["artifacts"][0]["sha256"] is None


def test_benchmark_result_keeps_what_was_measured_and_the_names_that_were_set() -> None:
    named = Latency.model_validate({"runtime": "torch", "batch": 1, "runs": 3, "images_per_second": 9, **TIMES})
    entries = [named, named.model_copy(update={"graph": "w8a8/model.ort.onnx", "threads": None})]
    result = BenchmarkResult(latency={"w8a8": entries}, environment=collect_environment(torch.device("cpu")))
    kept = result.model_dump(mode="json")["latency"]["w8a8"]
    assert kept[0].keys() == {"runtime", "batch", "runs", "images_per_second", "quantiles_ms", *TIMES}
    assert kept[1] == {**kept[0], "graph": "w8a8/model.ort.onnx", "threads": None}
    assert BenchmarkResult.model_validate(result.model_dump(mode="json")) == result


def test_synthesis_result_keeps_a_loss_that_diverged_as_a_number() -> None:
    values = {"images": 2, "teacher_top1": 50, "within_class_diversity": None, "flip": False, "recipe": "default"}
    result = SynthesisResult.model_validate({**values, "losses": {"generator.ce": [math.nan, 1.0]}})
    kept = result.model_dump(mode="json")
    assert kept["losses"]["generator.ce"][1] == 1.0
    assert math.isnan(kept["losses"]["generator.ce"][0])
    assert "batch_divisor" not in kept
    assert result.batch_divisor == 1


def test_require_finished_tells_a_result_that_does_not_fit_in_one_line(tmp_path: Path) -> None:
    run = Pipeline(make_config({"model": "digits"}), tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="no finished synthesize stage; run clusterq synthesize first"):
        run.require_finished(Stage(synthesize))
    run.directory.perform("synthesize", {}, lambda: ({"images": "many"}, []))
    for read in (run.finished, run.require_finished):
        with pytest.raises(
            RunDirectoryError, match=r"is not the manifest of a run \(stages\.synthesize\.result\."
        ) as caught:
            read(Stage(synthesize))
        assert "\n" not in str(caught.value)
