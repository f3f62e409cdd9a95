"""The functional core: images, a student and a graph of a module that is at hand."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import images as noise
from nets import make_net
from support import SMALL
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
FEW = SynthesisConfig.model_validate({**SMALL["synthesis"], "images": 40})
SHORT = FinetuneConfig.model_validate(SMALL["finetune"])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_net("residual")


@pytest.fixture(scope="module")
def images(model: nn.Module) -> CalibrationSet:
    return synthesize(model, SPEC, config=FEW)


@pytest.fixture(scope="module")
def student(model: nn.Module, images: CalibrationSet) -> Student:
    return quantize(model, images, "w4a4", config=SHORT)


def equal_states(module: nn.Module, other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in module.state_dict().items())


def test_synthesize_covers_the_classes_and_the_range_of_the_model(images: CalibrationSet) -> None:
    assert images.images.shape == (40, 3, 16, 16)
    assert images.labels.bincount().tolist() == [4] * 10
    pixels = images.images * 0.25 + 0.5
    assert pixels.min() > -1e-3
    assert pixels.max() < 1 + 1e-3
    assert images.provenance["seed"] == 0


def test_quantize_leaves_the_model_as_it_is() -> None:
    model = make_net("mobile")
    before = copy.deepcopy(model.state_dict())
    quantize(model, noise(16), "w8a8", config=FinetuneConfig(steps=0))
    assert not model.training
    assert equal_states(model, before)


@pytest.mark.parametrize(("target", "file"), [("onnxruntime", "a.onnx"), ("tensorrt", "b.onnx"), ("int4", "c.onnx")])
def test_export_writes_a_graph_that_computes_what_the_student_does(
    target: str, file: str, tmp_path: Path, student: Student, images: CalibrationSet
) -> None:
    path = export(student, tmp_path / file, images, target=target)  # type: ignore[arg-type]
    onnx.checker.check_model(path)
    batch = images.images[:16].numpy()
    with (
        OnnxRunner(path, optimized=target != "tensorrt") as runner,
        student.for_target("tensorrt" if target == "tensorrt" else "onnxruntime"),
    ):
        np.testing.assert_allclose(runner.infer(batch), TorchRunner(student).infer(batch), atol=1e-4)


def test_synthesize_and_quantize_repeat_with_the_same_seed(
    model: nn.Module, images: CalibrationSet, student: Student
) -> None:
    again = synthesize(model, SPEC, config=FEW)
    assert torch.equal(again.images, images.images)
    assert not torch.equal(synthesize(model, SPEC, config=FEW, seed=1).images, images.images)
    assert equal_states(student, quantize(model, again, "w4a4", config=SHORT).state_dict())


def test_quantize_labels_images_by_the_model(model: nn.Module) -> None:
    with torch.no_grad():
        labels = model(noise(24)).argmax(1)
    student, other = (
        quantize(model, data, "w8a8", config=SHORT) for data in (noise(24), CalibrationSet(noise(24), labels))
    )
    assert equal_states(student, other.state_dict())


def test_synthesize_and_quantize_refuse_wrong_models(model: nn.Module, images: CalibrationSet) -> None:
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


def test_export_for_int4_refuses_wider_weights(tmp_path: Path, model: nn.Module) -> None:
    student = quantize(model, noise(16), "w8a8", config=FinetuneConfig(steps=0))
    with pytest.raises(ExportError, match="more than four bits"):
        export(student, tmp_path / "model.onnx", noise(16), target="int4")
    assert list(tmp_path.iterdir()) == []
