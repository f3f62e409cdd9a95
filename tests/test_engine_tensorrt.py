"""The engine package with TensorRT itself and a GPU: a small graph, held against torch."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import calibrated, images
from support import python_environment
from tensorrt_double import build

from clusterq_deploy.errors import EngineError
from clusterq_deploy.lowering import export_graph, lower, quantized_layers, to_fp16
from clusterq_deploy.runtimes.runners import TorchRunner
from clusterq_deploy.runtimes.tensorrt import (
    TensorRTRunner,
    parse_layers,
    sidecar_path,
    summarize_layers,
    unavailable_reason,
)

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
    program.save(path)
    return path


def test_infer_computes_what_torch_computes(network: torch.nn.Module, graph: Path) -> None:
    images = np.random.default_rng(0).normal(size=(11, 3, 16, 16)).astype(np.float32)
    engine = build(graph, batch=(2, 2, 4))
    assert json.loads(sidecar_path(engine).read_text())["size_bytes"] == engine.stat().st_size
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    with TensorRTRunner(engine) as runner:
        np.testing.assert_allclose(runner.infer(images), expected, atol=5e-3)  # TensorRT may use TF32
        np.testing.assert_allclose(runner.infer(images[:1]), expected[:1], atol=5e-3)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_measure_times_each_part(graph: Path, cuda_graph: bool) -> None:
    engine = build(graph, timing_cache=graph.with_name("timing.cache"))
    assert graph.with_name("timing.cache").stat().st_size > 0
    with TensorRTRunner(engine) as runner:
        times = runner.measure(4, warmup_ms=10, min_runs=20, min_seconds=0, cuda_graph=cuda_graph)
        assert len(times.calls) == 20
        assert min(call.compute_ms for call in times.calls) > 0
        assert min(call.host_to_device_ms for call in times.calls) > 0
        assert times.cuda_graph is cuda_graph


def test_layers_are_named_and_timed(graph: Path) -> None:
    with TensorRTRunner(build(graph)) as runner:
        layers, times_ms = parse_layers(runner.layer_information(4)), runner.layer_times(4, runs=5)
        assert layers
        assert {layer.name for layer in layers} >= set(times_ms)
        assert min(times_ms.values()) >= 0
        assert sum(times_ms.values()) > 0


@pytest.mark.parametrize("fp16", [False, True])
def test_infer_of_a_quantized_graph_in_integers_agrees_with_torch(tmp_path: Path, fp16: bool) -> None:
    student = calibrated("residual", "w8a8")
    quantized = lower(export_graph(student, (3, 16, 16)), student, "tensorrt")
    path = tmp_path / "model.trt.onnx"
    onnx.save(to_fp16(quantized) if fp16 else quantized, path)
    batch = images(64, seed=7).numpy()
    with student.for_target("tensorrt"):
        expected = TorchRunner(student).infer(batch)
    nodes = quantized_layers(quantized)
    with TensorRTRunner(build(path)) as runner:
        logits = runner.infer(batch)
        layers, times_ms = parse_layers(runner.layer_information(8)), runner.layer_times(8, runs=5)
    inspection = summarize_layers(layers, times_ms, nodes, engine="model.engine", batch=8)
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.95
    assert inspection.quantized_layers == len(nodes)
    assert inspection.precisions.get("INT8", 0) > 0


def test_build_reads_what_an_earlier_build_measured(graph: Path) -> None:
    cache = graph.with_name("timing.cache")
    build(graph, timing_cache=cache)
    size = cache.stat().st_size
    build(graph, timing_cache=cache)
    assert cache.stat().st_size == size  # nothing was left to measure


BUILDS = """
import signal, sys
from pathlib import Path
from tensorrt_double import build
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in range(1000):
    build(Path(sys.argv[1]), optimization_level=5, timing_cache="none")
    print("built", number, flush=True)
"""


def test_build_is_cancelled_by_a_signal_and_leaves_nothing(graph: Path) -> None:
    command = [sys.executable, "-c", BUILDS, str(graph)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=python_environment()) as process:
        process.stdout.readline()  # TensorRT has started, and builds once more
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    left = {path.name for path in graph.parent.iterdir()} - {"model.engine", "model.engine.json"}  # of a build before
    assert left == {graph.name}
    assert sidecar_path(graph.with_name("model.engine")).exists() is graph.with_name("model.engine").exists()


def test_build_names_an_operator_that_tensorrt_lacks(tmp_path: Path) -> None:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in ("images", "logits")]
    node = onnx.helper.make_node(
        "NoSuchOperator", ["images"], ["logits"], name="odd", domain="example.org", doc_string="x"
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("example.org", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "net", ends[:1], ends[1:]), opset_imports=opsets), path
    )
    with pytest.raises(EngineError, match=r'odd \(NoSuchOperator, "x"\): .*an operator is neither TensorRT'):
        build(path)


def test_infer_runs_a_compatible_engine(graph: Path) -> None:
    engine = build(graph, version_compatible=True, hardware_compatible=True)
    with TensorRTRunner(engine) as runner:
        assert runner.infer(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 10)


def test_build_refuses_a_broken_graph(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot parse"):
        build(path)
