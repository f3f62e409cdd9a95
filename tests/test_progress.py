"""What the library says of how far it is: every long task is there, and ends at its total."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import images, make_net
from test_pipeline import SMALL
from torchvision.models import resnet18

from calib.support.progress import SILENT, Advance
from cli import diagnosis
from cli.machine import Finding
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


class Counter:
    """Counts what tasks tell, and which are open."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.ended: list[tuple[str, int, int]] = []
        """Description, units done and total of each task, in the order in which they ended."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(n: int = 1, **_: float) -> None:
            nonlocal done
            done += n

        self.open.append(description)
        try:
            yield advance
        finally:
            self.open.remove(description)
            self.ended.append((description, done, total))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.ended]

    def require_whole(self) -> None:
        assert self.ended
        assert not self.open
        assert [(name, done) for name, done, total in self.ended if done != total] == []


def initialized(bits: str, counter: Counter) -> Student:
    student = make_student(make_net("residual"), BitWidths.parse(bits))
    post_training_quantize(student, images(16), batch_size=16, rng=torch.Generator().manual_seed(0), progress=counter)
    return student


@pytest.mark.parametrize(("bits", "fp16"), [("w4a4", False), ("w8a8", True)])
def test_an_export_counts_its_graphs_and_checks(bits: str, fp16: bool) -> None:
    counter = Counter()
    student = initialized(bits, Counter())
    made = list(student_graphs(student, images(8).numpy(), size=SIZE, name=bits, fp16=fp16, progress=counter))
    counter.require_whole()
    assert counter.ended == [(f"Export {bits}", *[1 + 2 + 3 * len(made) + 2 * fp16] * 2)]


def test_an_export_of_the_teacher_ends_at_its_total_without_fp16_too() -> None:
    counter = Counter()
    net = make_net("residual")
    net.fc.weight *= 1e6
    assert float_graphs(net, SIZE, seed=0, name="fp32", progress=counter).half is None
    assert counter.ended == [("Export fp32", 4, 4)]


def test_initialization_counts_the_layers_whose_bias_is_corrected() -> None:
    counter = Counter()
    layers = len(initialized("w8a8", counter).placement.weights)
    counter.require_whole()
    assert ("Bias correction", layers, layers) in counter.ended


@pytest.mark.parametrize("max_drop", [100.0, 1e-9])
def test_a_plan_of_widths_shows_each_initialization_and_sensitivities_theirs(max_drop: float) -> None:
    teacher, bits = make_net("residual"), BitWidths(4, 4)
    given = {"judged": images(16), "batch_size": 16, "rng": torch.Generator().manual_seed(0)}
    counter = Counter()
    costs = sensitivities(make_student(teacher, bits), images(16), **given, progress=counter)  # type: ignore[arg-type]
    assert counter.names == ["Equalisation", "Calibration", "Reconstruction", "Sensitivity w4a4"]
    counter.ended.clear()
    plan_precision(
        teacher,
        bits,
        costs=costs,
        max_drop=max_drop,
        quantize_first_last=False,
        layer_bits={},
        images=images(16),
        **given,
        progress=counter,
    )  # type: ignore[arg-type]
    counter.require_whole()
    assert counter.names[-1] == "Precision w4a4"
    students = counter.names.count("Calibration")
    assert students == 1 if max_drop == 100 else 3 <= students <= counter.ended[-1][2]


def test_features_count_their_geometry() -> None:
    counter = Counter()
    batch = images(40).numpy()
    made, real = (EvaluationSet.from_images(name, batch, np.arange(40) % 4) for name in ("made", "real"))
    compare_features(make_net("residual"), made, real, classes=10, seed=0, progress=counter)
    compare_features(make_net("residual"), made, None, classes=10, seed=0, progress=counter)
    counter.require_whole()
    assert counter.ended[2] == ("Geometry of features", 4, 4)
    assert counter.ended[4] == ("Geometry of features", 3, 3)


@pytest.mark.slow
def test_a_run_shows_its_exports_and_the_comparison_of_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    settings = {"model": "digits", "bits": ["w8a8"], **SMALL, "finetune": {"steps": 0}}
    pipeline = Pipeline(make_config(settings), tmp_path / "run", progress=counter)
    pipeline.begin()
    pipeline.synthesize()
    pipeline.quantize(BitWidths(8, 8))
    for variant in ("fp32", "w8a8"):
        pipeline.export(variant)
    counter.require_whole()
    assert {"Bias correction", "Export fp32", "Export w8a8"} <= set(counter.names)
    counter.ended.clear()
    compared = list(pipeline.compare_graphs("w8a8", 70))
    counter.require_whole()
    both = [("Agreement", 70, 70), ("Integers", 70, 70)]
    assert counter.ended == [*both * len(compared), ("Verify w8a8", len(compared), len(compared))]
    counter.ended.clear()
    shown = pipeline.report()
    layers = len(shown.variants[-1].histograms)
    assert layers
    assert counter.ended == [("Report", 2 * layers + 1, 2 * layers + 1)]

    def full(*_: object) -> str:
        raise RunDirectoryError("the disk is full")

    (tmp_path / "run/w8a8/model.ort.onnx").unlink()
    monkeypatch.setattr(RunDirectory, "write", full)
    with pytest.raises(RunDirectoryError, match="full"):
        pipeline.export("w8a8")
    assert counter.open == []  # no bar stays on the screen beside the error


def test_the_doctor_counts_what_it_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()

    def failing() -> Iterator[Finding]:
        raise OSError("no such library")
        yield

    monkeypatch.setattr(diagnosis, "memory", failing)
    found = diagnosis.diagnose(tmp_path, counter)
    counter.require_whole()
    assert {"Doctor", "torch and clusterq-deploy", "torchvision", "ONNX Runtime"} <= set(counter.names)
    assert [(own.name, own.state) for own in found if "no such library" in own.found] == [("memory", "broken")]


@pytest.mark.parametrize("watched", [True, False])
def test_a_download_shows_its_bar_where_somebody_watches(
    watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def download(url: str, *, progress: bool, **_: object) -> dict[str, torch.Tensor]:
        asked.append(progress)
        return resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    Pipeline(make_config({"model": "resnet18"}), tmp_path / "run", progress=Counter() if watched else SILENT)
    assert asked == [watched]
