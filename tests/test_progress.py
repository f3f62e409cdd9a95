"""What the library reports of how far it is: every long task is there, and ends at its total."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import captured, images, make_net
from support import Counter, seeded, small_config
from torchvision.models import resnet18

from calib.support.progress import SILENT
from cli import doctor
from cli.probe import Finding
from clusterq_deploy import Pipeline
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.evaluation.features import compare_features
from clusterq_deploy.lowering import float_graphs, student_graphs
from clusterq_deploy.quantization import (
    BitWidths,
    Student,
    make_student,
    plan_precision,
    post_training_quantize,
    sensitivities,
)
from clusterq_deploy.run.directory import RunDirectory

SIZE = (3, 16, 16)


def quantized(bits: str, counter: Counter) -> Student:
    """Return a student after post-training quantization."""
    student = make_student(captured("residual"), BitWidths.parse(bits))
    post_training_quantize(student, images(16), batch_size=16, rng=seeded(), progress=counter)
    return student


@pytest.mark.parametrize(("bits", "fp16"), [("w4a4", False), ("w8a8", True)])
def test_student_graphs_count_their_graphs_and_checks(bits: str, fp16: bool) -> None:
    counter, student = Counter(), quantized(bits, Counter())
    graphs = list(student_graphs(student, images(8).numpy(), size=SIZE, name=bits, fp16=fp16, progress=counter))
    assert counter.ended == [(f"Export {bits}", *[1 + 2 + 3 * len(graphs) + 2 * fp16] * 2)]


def test_float_graphs_without_fp16_end_at_their_total() -> None:
    counter, net = Counter(), make_net("residual")
    net.fc.weight *= 1e6
    assert float_graphs(net, SIZE, seed=0, name="fp32", progress=counter).fp16 is None
    assert counter.ended == [("Export fp32", 4, 4)]


def test_post_training_quantize_counts_the_layers_whose_bias_is_corrected() -> None:
    counter = Counter()
    layers = len(quantized("w8a8", counter).placement.weights)
    counter.require_whole()
    assert ("Bias correction", layers, layers) in counter.ended


@pytest.mark.parametrize("max_drop", [100.0, 1e-9])
def test_sensitivities_and_plan_precision_show_each_quantization(max_drop: float) -> None:
    teacher, bits, counter = make_net("residual"), BitWidths(4, 4), Counter()
    judged = {"judged": images(16), "batch_size": 16, "rng": seeded()}
    costs = sensitivities(make_student(captured(teacher), bits), images(16), **judged, progress=counter)  # type: ignore[arg-type]
    assert counter.names == ["Trunks", "Equalisation", "Calibration", "Reconstruction", "Sensitivity w4a4"]
    counter.ended.clear()
    layers = {"quantize_first_last": False, "layer_bits": {}, "images": images(16)}
    plan_precision(captured(teacher), bits, costs=costs, max_drop=max_drop, **layers, **judged, progress=counter)  # type: ignore[arg-type]
    counter.require_whole()
    assert counter.names[-1] == "Precision w4a4"
    students = counter.names.count("Calibration")
    assert students == 1 if max_drop == 100 else 3 <= students <= counter.ended[-1][2]


def test_compare_features_counts_its_geometry() -> None:
    counter, batch = Counter(), images(40).numpy()
    synthetic, real = (EvaluationSet.from_images(name, batch, np.arange(40) % 4) for name in ("made", "real"))
    for other in (real, None):
        compare_features(captured("residual"), synthetic, other, classes=10, seed=0, progress=counter)
    counter.require_whole()
    assert [task for task in counter.ended if task[0].startswith("Geometry")] == [
        ("Geometry of features", 4, 4),
        ("Geometry of features", 3, 3),
    ]


@pytest.mark.slow
def test_compare_graphs_and_report_show_their_tasks_and_a_failed_export_leaves_none(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    pipeline = Pipeline(small_config(), run_copy, progress=counter)
    graphs = list(pipeline.compare_graphs("w8a8", 70))
    both = [("Agreement", 70, 70), ("Integers", 70, 70)]
    assert counter.ended == [*both * len(graphs), ("Verify w8a8", len(graphs), len(graphs))]
    counter.ended.clear()
    pipeline.report()
    assert counter.ended == [("Report", 3, 3)]

    def fail(*_: object) -> str:
        raise RunDirectoryError("the disk is full")

    (run_copy / "w8a8/model.ort.onnx").unlink()
    monkeypatch.setattr(RunDirectory, "write", fail)
    with pytest.raises(RunDirectoryError, match="full"):
        pipeline.export("w8a8")
    assert "Export w8a8" in counter.names
    assert counter.open == []  # no bar stays on the screen next to the error


def test_diagnose_counts_what_it_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()

    def fail() -> Iterator[Finding]:
        raise OSError("no such library")
        yield

    monkeypatch.setattr(doctor, "memory", fail)
    findings = doctor.diagnose(tmp_path, counter)
    counter.require_whole()
    assert {"Doctor", "torch and clusterq-deploy", "torchvision", "ONNX Runtime"} <= set(counter.names)
    failed = [(finding.name, finding.state) for finding in findings if "no such library" in finding.found]
    assert failed == [("memory", "broken")]


@pytest.mark.parametrize("watched", [True, False])
def test_pipeline_shows_a_download_if_its_progress_is_shown(
    watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bool] = []

    def download(url: str, *, progress: bool, **_: object) -> dict[str, torch.Tensor]:
        shown.append(progress)
        return resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    Pipeline(make_config({"model": "resnet18"}), tmp_path / "run", progress=Counter() if watched else SILENT)
    assert shown == [watched]
