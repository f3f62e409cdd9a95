"""The examples, in a short form."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from support import SMALL

from clusterq_deploy.lowering import check_saturation
from clusterq_deploy.models import InputSpec

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


@pytest.mark.slow
def test_torchvision_int8_makes_a_graph_that_classifies_a_photo(tmp_path: Path) -> None:
    module = example("torchvision_int8")
    small = {**SMALL, "finetune": {"steps": 0}, "weights": "none", "input_size": (3, 32, 32)}
    session, spec = module.open_graph(module.make_graph("resnet18", tmp_path / "out", **small), threads=1)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    batch = module.preprocess(photo, spec)[None]
    assert batch.shape == (1, 3, 32, 32)
    (answer,) = module.classify(session, batch)
    labels, probabilities = zip(*answer, strict=True)
    assert len(labels) == 5
    assert all(0 <= label < 1000 for label in labels)
    assert list(probabilities) == sorted(probabilities, reverse=True)


@pytest.mark.parametrize("size", [(300, 500), (256, 256), (90, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_int8_preprocesses_as_evaluation_does(size: tuple[int, int], channels: int) -> None:
    spec = InputSpec(size=(channels, 64, 64), mean=(0.4,) * channels, std=(0.2,) * channels, resize=64)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    pixels = example("torchvision_int8").preprocess(image, spec.model_dump(mode="json"))
    np.testing.assert_allclose(pixels, spec.preprocess(image), atol=1e-6)


def test_custom_module_is_as_accurate_in_int8_on_any_cpu(tmp_path: Path) -> None:
    module = example("custom_module")
    images, labels = module.digits()
    model = module.train(images, labels, epochs=3)
    with torch.no_grad():
        float_top1 = 100 * float((model(images).argmax(1) == labels).float().mean())
    assert float_top1 > 80
    graph = module.quantize(model, tmp_path / "out" / "model.onnx", **SMALL["synthesis"])
    assert module.top1(graph, images.numpy(), labels.numpy()) > float_top1 - 5
    assert not check_saturation(onnx.load(graph))
