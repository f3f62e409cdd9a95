"""Fixtures of several test modules."""

import os
from pathlib import Path

import pytest
import torch
from tensorrt_double import World, install

from clusterq_deploy.models import LoadedModel, load_model


def pytest_configure() -> None:
    """Of the cores, a worker of pytest-xdist takes its share, and so do the processes that its tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draws without a generator of their own are the same in each run, and in each test alone."""
    torch.manual_seed(0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """The doubles of TensorRT and of torch's CUDA, in their place."""
    return install(monkeypatch)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A file that the double of TensorRT takes for a graph."""
    path = tmp_path / "model.trt.onnx"
    path.write_bytes(b"a graph")
    return path


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of RGB images with three classes."""
    file = tmp_path_factory.mktemp("colour") / "net.py"
    file.write_text(
        "from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Flatten, Sequential\n"
        "def make():\n"
        "    return Sequential(Conv2d(3, 3, 1), BatchNorm2d(3), AdaptiveAvgPool2d(1), Flatten())\n"
    )
    size, mean, std = (3, 16, 16), (0.0,) * 3, (1.0,) * 3
    return load_model(f"{file}:make", input_size=size, mean=mean, std=std, device=torch.device("cpu"))
