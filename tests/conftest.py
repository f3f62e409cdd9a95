"""Fixtures of several test modules."""

from pathlib import Path

import pytest
from tensorrt_double import World, install


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
