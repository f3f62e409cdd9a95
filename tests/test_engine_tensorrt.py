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
from nets import images, make_net

from calib.support.progress import SILENT
from clusterq_deploy.errors import EngineError
from clusterq_deploy.lowering import export_graph, lower, quantized_layers, to_fp16
from clusterq_deploy.quantization import BitWidths, calibrate, make_student
from clusterq_deploy.runtimes.runners import TorchRunner
from clusterq_deploy.runtimes.tensorrt import (
    BuildConfig,
    TensorRTRunner,
    build_engine,
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


@pytest.mark.parametrize("fp16", [False, True])
def test_a_quantized_graph_runs_in_integers_and_agrees_with_torch(tmp_path: Path, fp16: bool) -> None:
    student = make_student(make_net("residual"), BitWidths(8, 8))
    calibrate(student, images(), batch_size=16, rng=torch.Generator().manual_seed(0))
    made = lower(export_graph(student, (3, 16, 16)), student, "tensorrt")
    path = tmp_path / "model.trt.onnx"
    onnx.save(to_fp16(made) if fp16 else made, path)
    batch = images(64, seed=7).numpy()
    with student.for_target("tensorrt"):
        expected = TorchRunner(student).infer(batch)
    with TensorRTRunner(build(path, BuildConfig())) as runner:
        found = runner.infer(batch)
        layers = runner.layers(8)
        inspected = summarize_layers(
            layers, runner.layer_times(8, runs=5), quantized_layers(made), engine="model.engine", batch=8
        )
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95
    assert inspected.quantized_layers == len(quantized_layers(made))
    assert inspected.precisions.get("INT8", 0) > 0


def test_a_second_build_reads_what_the_first_measured(graph: Path) -> None:
    cache = graph.with_name("timing.cache")
    build(graph, BuildConfig(timing_cache=cache))
    kept = cache.stat().st_size
    build(graph, BuildConfig(timing_cache=cache))
    assert cache.stat().st_size == kept  # nothing was left to measure


def test_a_signal_cancels_a_build_and_leaves_nothing(graph: Path) -> None:
    script = (
        "import sys, signal; from pathlib import Path; from calib.support.progress import SILENT; "
        "from clusterq_deploy.runtimes.tensorrt import BuildConfig, build_engine; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); graph = Path(sys.argv[1]); "
        "config = BuildConfig(optimization_level=5, timing_cache='none'); "
        "build_engine(graph, graph.with_name('model.engine'), config, SILENT); print('at work', flush=True); "
        "[build_engine(graph, graph.with_name('model.engine'), config, SILENT) for _ in range(1000)]"
    )
    command = [sys.executable, "-c", script, str(graph)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # TensorRT has started, and builds once more
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert said.rstrip().endswith("KeyboardInterrupt")
    left = {own.name for own in graph.parent.iterdir()} - {"model.engine", "model.engine.json"}  # of a build before
    assert left == {graph.name}
    assert sidecar_path(graph.with_name("model.engine")).exists() is graph.with_name("model.engine").exists()


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
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
        build(path, BuildConfig())


def test_a_compatible_engine_loads(graph: Path) -> None:
    engine = build(graph, BuildConfig(version_compatible=True, hardware_compatible=True))
    with TensorRTRunner(engine) as runner:
        assert runner.infer(np.zeros((1, 3, 16, 16), np.float32)).shape == (1, 10)


def test_a_broken_graph_is_an_engine_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot parse"):
        build(path, BuildConfig())
