"""The engine package with TensorRT itself and a GPU: a small graph, held against torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.progress import SILENT
from clusterq_deploy.engine import (
    BuildConfig,
    TensorRTRunner,
    build_engine,
    sidecar_path,
    unavailable_reason,
)
from clusterq_deploy.errors import EngineError

pytestmark = pytest.mark.tensorrt


@pytest.fixture(autouse=True)
def _available() -> None:
    if reason := unavailable_reason():
        pytest.skip(reason)


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    ).eval()


@pytest.fixture
def graph(network: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.trt.onnx"
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network, (torch.zeros(2, 3, 16, 16),), dynamo=True, opset_version=21, dynamic_shapes=({0: batch},)
    )
    assert program is not None
    program.save(path)
    return path


def build(graph: Path, config: BuildConfig) -> Path:
    engine = graph.with_name("model.engine")
    build_engine(graph, engine, config, SILENT)
    return engine


def test_computes_what_torch_computes(network: torch.nn.Module, graph: Path) -> None:
    images = np.random.default_rng(0).normal(size=(11, 3, 16, 16)).astype(np.float32)
    engine = build(graph, BuildConfig(batch=(2, 2, 4)))
    assert json.loads(sidecar_path(engine).read_text())["size_bytes"] == engine.stat().st_size
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    with TensorRTRunner(engine) as runner:
        np.testing.assert_allclose(runner.infer(images), expected, atol=5e-3)  # TensorRT may use TF32
        np.testing.assert_allclose(runner.infer(images[:1]), expected[:1], atol=5e-3)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_measures(graph: Path, cuda_graph: bool) -> None:
    engine = build(graph, BuildConfig(timing_cache=graph.with_name("timing.cache")))
    assert graph.with_name("timing.cache").stat().st_size > 0
    with TensorRTRunner(engine) as runner:
        times = runner.measure(4, warmup_ms=10, min_runs=20, min_seconds=0, cuda_graph=cuda_graph)
        assert len(times.calls) == 20
        assert min(call.compute_ms for call in times.calls) > 0
        assert min(call.host_to_device_ms for call in times.calls) > 0
        assert times.cuda_graph is cuda_graph


def test_tells_of_its_layers(graph: Path) -> None:
    with TensorRTRunner(build(graph, BuildConfig())) as runner:
        found, times_ms = runner.layers(4), runner.layer_times(4, runs=5)
        assert found.layers
        assert {layer.name for layer in found.layers} >= set(times_ms)
        assert min(times_ms.values()) >= 0
        assert sum(times_ms.values()) > 0


def test_a_compatible_engine_loads(graph: Path) -> None:
    engine = build(graph, BuildConfig(version_compatible=True, hardware_compatible=True))
    with TensorRTRunner(engine) as runner:
        assert runner.infer(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 10)


def test_a_broken_graph_is_an_engine_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot parse"):
        build(path, BuildConfig())
