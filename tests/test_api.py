"""The functional core: images, a student and a graph of a module that is at hand."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import images as noise
from nets import make_net
from torch import nn

from clusterq_deploy import (
    CalibrationSet,
    FinetuneConfig,
    InputSpec,
    OnnxRunner,
    Student,
    SynthesisConfig,
    TorchRunner,
    export,
    quantize,
    synthesize,
)
from clusterq_deploy.errors import ExportError, GraphError, ModelError, NoBatchNormError

SPEC = InputSpec(size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
FEW = SynthesisConfig.model_validate(
    {
        "images": 40,
        "generator": {"steps": 6, "warmup_steps": 3, "batch_size": 20, "width": 8},
        "refine": {"steps": 4, "batch_size": 20},
    }
)
SHORT = FinetuneConfig(steps=8, batch_size=8, checkpoints=2)


@cache
def made() -> tuple[nn.Module, CalibrationSet, Student]:
    model = make_net("residual")
    images = synthesize(model, SPEC, config=FEW)
    return model, images, quantize(model, images, "w4a4", config=SHORT)


def test_images_are_of_the_classes_and_the_range_that_the_model_takes() -> None:
    _, images, _ = made()
    assert images.images.shape == (40, 3, 16, 16)
    assert images.labels.bincount().tolist() == [4] * 10
    pixels = images.images * 0.25 + 0.5
    assert pixels.min() > -1e-3
    assert pixels.max() < 1 + 1e-3
    assert images.provenance["seed"] == 0


def test_the_model_stays_as_it_is() -> None:
    model, images = make_net("mobile"), noise(16)
    before = copy.deepcopy(model.state_dict())
    quantize(model, images, "w8a8", config=FinetuneConfig(steps=0))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("target", "file"), [("onnxruntime", "a.onnx"), ("tensorrt", "b.onnx"), ("int4", "c.onnx")])
def test_a_graph_computes_what_the_student_computes(target: str, file: str, tmp_path: Path) -> None:
    _, images, student = made()
    path = export(student, tmp_path / file, images, target=target)  # type: ignore[arg-type]
    onnx.checker.check_model(path)
    batch = images.images[:16].numpy()
    with (
        OnnxRunner(path, optimized=target != "tensorrt") as runner,
        student.for_target("tensorrt" if target == "tensorrt" else "onnxruntime"),
    ):
        np.testing.assert_allclose(runner.infer(batch), TorchRunner(student).infer(batch), atol=1e-4)


def test_the_same_seed_makes_the_same_images_and_student() -> None:
    model, images, student = made()
    again = synthesize(model, SPEC, config=FEW)
    assert torch.equal(again.images, images.images)
    assert not torch.equal(synthesize(model, SPEC, config=FEW, seed=1).images, images.images)
    other = quantize(model, again, "w4a4", config=SHORT)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())


def test_unlabelled_images_take_the_classes_that_the_model_gives_them() -> None:
    model = make_net("residual")
    with torch.no_grad():
        labels = model(noise(24)).argmax(1)
    student, other = (
        quantize(model, given, "w8a8", config=SHORT) for given in (noise(24), CalibrationSet(noise(24), labels))
    )
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())


def test_what_is_wrong_is_told_in_one_line() -> None:
    model, images, _ = made()
    for call in (
        lambda: synthesize(copy.deepcopy(model).train(), SPEC),
        lambda: quantize(copy.deepcopy(model).train(), images, "w8a8"),
    ):
        with pytest.raises(ModelError, match=r"Residual is in training mode; call .eval\(\) first"):
            call()
    with pytest.raises(ModelError, match="fails on an input of shape"):
        synthesize(model, InputSpec(size=(1, 16, 16), mean=(0.5,), std=(0.5,)))
    with pytest.raises(NoBatchNormError):
        synthesize(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval(), SPEC)
    with pytest.raises(GraphError, match="nowhere"):
        quantize(model, images, "w8a8", keep={"nowhere": 8})


def test_int4_is_refused_for_wider_weights(tmp_path: Path) -> None:
    student = quantize(make_net("residual"), noise(16), "w8a8", config=FinetuneConfig(steps=0))
    with pytest.raises(ExportError, match="more than four bits"):
        export(student, tmp_path / "model.onnx", noise(16), target="int4")
    assert list(tmp_path.iterdir()) == []
