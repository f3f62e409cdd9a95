"""Timing, profiling and watching an engine: the flow of control through doubles, NVML's absence for real."""

import json
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pynvml
import pytest
import torch
from onnx import TensorProto, helper
from tensorrt_double import World

from calib.support.progress import SILENT
from clusterq_deploy.errors import EngineError
from clusterq_deploy.evaluation.measure import BenchmarkConfig, summarize_engine
from clusterq_deploy.runtimes.tensorrt import BuildConfig, TensorRTRunner, build_engine, trtexec_command
from clusterq_deploy.runtimes.tensorrt.calls import CallTimer
from clusterq_deploy.runtimes.tensorrt.telemetry import GpuMonitor, summarize_samples
from clusterq_deploy.stages.benchmark import inspect_engine, time_engine

SETTINGS = BenchmarkConfig(batches=(1, 4), warmup_ms=0, min_runs=6, min_seconds=0)


@pytest.fixture
def engine(world: World, tmp_path: Path) -> Path:
    """An engine beside the graph that it was built from: two convolutions, of which the first is quantized."""
    path = tmp_path / "model.trt.onnx"
    onnx.save(half_quantized(), path)
    build_engine(path, tmp_path / "model.engine", BuildConfig(batch=(1, 2, 8)), SILENT)
    return tmp_path / "model.engine"


def half_quantized() -> onnx.ModelProto:
    zero = helper.make_tensor("zero", TensorProto.INT8, [], [0])
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    integers = helper.make_tensor("integers", TensorProto.INT8, [3, 3, 1, 1], [1] * 9)
    floats = helper.make_tensor("floats", TensorProto.FLOAT, [5, 3, 4, 4], [1.0] * 240)
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["w"], name="weight"),
        helper.make_node("Conv", ["dq", "w"], ["middle"], name="node_conv2d"),
        helper.make_node("Conv", ["middle", "floats"], ["logits"], name="node_conv2d_1"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5, 1, 1])
    graph = helper.make_graph(nodes, "half quantized", [images], [logits], [zero, scale, integers, floats])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class TestTiming:
    @pytest.mark.parametrize("cuda_graph", [False, True])
    def test_copies_and_computation_are_timed_apart(self, world: World, engine: Path, cuda_graph: bool) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            times = runner.measure(3, warmup_ms=0, min_runs=7, min_seconds=0, cuda_graph=cuda_graph)
        assert times.cuda_graph is cuda_graph
        assert len(times.calls) == 7
        for call in times.calls:
            assert (call.host_to_device_ms, call.device_to_host_ms) == (world.tick_ms, world.tick_ms)
            assert call.compute_ms == world.tick_ms + world.execute_ms
            assert call.latency_ms == pytest.approx(3 * world.tick_ms + world.execute_ms)
            assert 0 < call.enqueue_ms < 1000
        assert world.replays == (7 if cuda_graph else 0)
        assert times.wall_seconds > 0

    def test_every_call_copies_the_batch_and_the_answer(self, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            buffers = runner._buffers(4)
            buffers.device_input.zero_()
            assert buffers.host_input.shape == (4, 3, 4, 4)
            assert buffers.host_input.std() > 0.5
            runner.measure(4, warmup_ms=0, min_runs=2, min_seconds=0)
            # the engine's answer is the mean of the images, times the class's number
            means = buffers.host_input.mean(dim=(1, 2, 3))
            torch.testing.assert_close(buffers.device_output[:, 1], 2 * means)

    def test_the_computation_waits_for_its_images_and_the_copy_back_for_the_computation(self, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            compute: Any = torch.cuda.Stream("cuda")
            launches: list[int] = []
            timer = CallTimer(lambda: launches.append(len(compute.waited_for)), runner._buffers(2), compute)
            timer.measure(warmup_ms=0, min_runs=3, min_seconds=0, cuda_graph=False)
        assert compute.waited_for == [timer._upload] * 3
        assert launches == [1, 2, 3]  # each is started behind the wait
        assert timer._download.waited_for == [compute] * 3

    def test_measures_until_both_limits_are_met(self, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            assert len(runner.measure(1, warmup_ms=0, min_runs=1, min_seconds=0.05).calls) > 7

    def test_warms_up_first(self, world: World, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            start = time.perf_counter()
            times = runner.measure(1, warmup_ms=50, min_runs=3, min_seconds=0)
            assert time.perf_counter() - start >= 0.05
        assert len(times.calls) == 3
        assert len(world.batches) > 3

    def test_the_record_has_every_part_and_the_throughput_of_the_whole_loop(self, world: World, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            times = runner.measure(2, warmup_ms=0, min_runs=9, min_seconds=0)
        record = summarize_engine("tensorrt", 2, times)
        assert record.compute is not None
        assert record.host_to_device is not None
        assert record.enqueue is not None
        assert record.compute.median_ms == world.tick_ms + world.execute_ms
        assert record.compute.coefficient_of_variation == pytest.approx(0)
        assert record.median_ms == pytest.approx(3 * world.tick_ms + world.execute_ms)
        assert record.images_per_second == pytest.approx(18 / times.wall_seconds)
        assert record.cuda_graph is False


class TestTrtexec:
    def test_the_command_repeats_the_measurement(self, engine: Path) -> None:
        with TensorRTRunner(engine, device="cpu") as runner:
            records = time_engine(runner, "w8a8/model.engine", SETTINGS)
        assert [record.graph for record in records] == ["w8a8/model.engine"] * 2
        assert shlex.split(records[1].trtexec or "") == [
            "trtexec",
            "--loadEngine=w8a8/model.engine",
            "--shapes=images:4x3x4x4",
            "--warmUp=0",
            "--duration=0",
            "--iterations=6",
            "--percentile=50,90,95,99",
            "--useSpinWait",
            "--useCudaGraph",
        ]

    @pytest.mark.parametrize(
        ("tensorrt", "cuda_graph", "flags"),
        [
            ("10.16.1", False, "--useSpinWait"),
            ("10.16.1", True, "--useSpinWait --useCudaGraph"),
            ("11.0.0", False, "--includeDataTransfers --noCudaGraph"),
            ("11.4.0", True, "--includeDataTransfers"),
        ],
    )
    def test_a_fixed_batch_has_no_shapes_and_odd_paths_are_quoted(
        self, tensorrt: str, cuda_graph: bool, flags: str
    ) -> None:
        command = trtexec_command(
            "my runs/model.engine",
            input_name="images",
            shape=(8, 3, 4, 4),
            dynamic=False,
            warmup_ms=200,
            min_runs=10,
            min_seconds=2.5,
            cuda_graph=cuda_graph,
            version_compatible=True,
            tensorrt=tensorrt,
        )
        assert command == (
            "trtexec '--loadEngine=my runs/model.engine' --warmUp=200 --duration=2.5 --iterations=10 "
            f"--percentile=50,90,95,99 {flags} --versionCompatible"
        )

    def test_the_runner_knows_whether_the_batch_is_open(self, world: World, tmp_path: Path) -> None:
        world.input_shape = (8, 3, 4, 4)
        (tmp_path / "fixed.onnx").write_bytes(b"a graph")
        build_engine(tmp_path / "fixed.onnx", tmp_path / "fixed.engine", BuildConfig(), SILENT)
        with TensorRTRunner(tmp_path / "fixed.engine", device="cpu") as runner:
            assert (runner.dynamic, runner.input_shape(8)) == (False, (8, 3, 4, 4))


class TestInspection:
    LAYERS = (
        {"Name": "node_conv2d", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8"}]},
        {"Name": "node_conv2d_1", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}]},
    )

    def test_layers_are_timed_when_warm_in_a_context_of_their_own(self, world: World, engine: Path) -> None:
        world.layer_ms = {"node_conv2d": 0.25, "node_conv2d_1": 0.5}
        with TensorRTRunner(engine, device="cpu") as runner:
            assert runner.layer_times(4, runs=20) == {"node_conv2d": 0.25, "node_conv2d_1": 0.5}
            assert world.batches == [4] * 30
            runner.measure(4, warmup_ms=0, min_runs=3, min_seconds=0)
            assert world.profiled_runs == 30  # what is measured is not slowed down by a profiler

    def test_what_is_quantized_and_reads_a_float_is_named(self, world: World, engine: Path) -> None:
        world.inspected = json.dumps({"Layers": self.LAYERS})
        world.layer_ms = {"node_conv2d": 0.25, "node_conv2d_1": 0.5}
        with TensorRTRunner(engine, device="cpu") as runner:
            found, text = inspect_engine(runner, "w8a8/model.engine", engine, batch=4)
            assert text == world.inspected
            assert world.inspected_batch == 4  # formats are known where shapes are set
        assert (found.engine, found.batch, found.detailed, found.layers) == ("w8a8/model.engine", 4, True, 2)
        assert found.precisions == {"INT8": 1, "FP16": 1}
        assert (found.quantized_layers, found.missed) == (1, [])
        assert [layer.name for layer in found.slowest] == ["node_conv2d_1", "node_conv2d"]

        world.inspected = world.inspected.replace("Int8", "Float")
        with TensorRTRunner(engine, device="cpu") as runner:
            found, _ = inspect_engine(runner, "w8a8/model.engine", engine, batch=4)
        (missed,) = found.missed
        assert (missed.layer, missed.weight) == ("node_conv2d", "integers")
        assert missed.reason == "reads FP32 in node_conv2d (CaskConvolution)"

    def test_an_engine_without_its_graph_is_inspected_too(self, world: World, engine: Path) -> None:
        world.inspected = json.dumps({"Layers": self.LAYERS})
        engine.with_name("model.trt.onnx").unlink()
        with TensorRTRunner(engine, device="cpu") as runner:
            found, _ = inspect_engine(runner, "e", engine, batch=1)
        assert (found.quantized_layers, found.layers) == (0, 2)

    def test_what_cannot_be_inspected_is_a_note(self, world: World, engine: Path) -> None:
        world.inspected = "not available"
        with TensorRTRunner(engine, device="cpu") as runner:
            found, text = inspect_engine(runner, "e", engine, batch=1)
        assert text == "not available"
        assert found.notes == [
            "The engine could not be inspected: the engine inspector gave no JSON: "
            "Expecting value: line 1 column 1 (char 0)."
        ]

    @pytest.mark.parametrize("way", ["layer_information", "layers", "layer_times"])
    def test_a_batch_outside_the_profile_is_refused(self, engine: Path, way: str) -> None:
        with (
            TensorRTRunner(engine, device="cpu") as runner,
            pytest.raises(EngineError, match="batch is 9; the engine takes 1 to 8"),
        ):
            getattr(runner, way)(9)


class TestTelemetry:
    def test_without_nvml_the_reason_is_kept(self, engine: Path) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            reason = f"NVML does not start: {error}"
        else:
            pynvml.nvmlShutdown()
            pytest.skip("NVML is there")
        with TensorRTRunner(engine, device="cpu") as runner:
            times = runner.measure(1, warmup_ms=0, min_runs=2, min_seconds=0)
        assert times.gpu.reason == reason
        assert (times.gpu.samples, times.gpu.clocks, times.gpu.sm_clock_mhz) == (0, None, None)

    def test_samples_while_the_context_is_open(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = fake_nvml(monkeypatch)
        with GpuMonitor("cuda") as monitor:
            while nvml.samples < 2:
                time.sleep(0.01)
        assert nvml.opened == ["GPU-01234567-89ab-cdef-0123-456789abcdef"]
        assert nvml.shut_down == 1
        found = monitor.telemetry()
        assert found.reason is None
        assert found.samples >= 2
        assert found.sm_clock_mhz is not None
        assert (found.sm_clock_mhz.highest, found.sm_clock_limit_mhz) == (1500, 1980)
        assert found.memory_clock_mhz is not None
        assert (found.memory_clock_mhz.mean, found.memory_clock_limit_mhz) == (2619, 2619)
        assert found.power_watts is not None
        assert (found.power_watts.mean, found.power_limit_watts) == (pytest.approx(250), 700)
        assert found.temperature_celsius is None  # this device does not tell
        assert found.clocks == "steady"
        assert found.throttling == {"power limit": 1.0}

    def test_a_device_that_nvml_does_not_know_is_a_reason(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        nvml = fake_nvml(monkeypatch)
        nvml.known = False
        with GpuMonitor("cuda") as monitor:
            pass
        assert "NVML does not know the device: Not Found" in (monitor.telemetry().reason or "")
        assert nvml.shut_down == 1

    @pytest.mark.parametrize(
        ("clocks", "mask", "words"),
        [
            ([1980, 1980], 0, "steady"),
            ([1980, 1965], 0, "floating"),
            ([1410, 1410], pynvml.nvmlClocksEventReasonApplicationsClocksSetting, "set"),
            ([None, None], 0, None),
        ],
    )
    def test_says_of_clocks_what_nvml_tells(self, clocks: list[int], mask: int, words: str | None) -> None:
        found = summarize_samples([sample(clock, mask) for clock in clocks], {})
        assert found.clocks == words

    def test_idle_is_no_throttling(self) -> None:
        hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonGpuIdle
        found = summarize_samples([sample(1, 0), sample(1, hot), sample(1, 0), sample(1, hot)], {})
        assert found.throttling == {"temperature (software)": 0.5}
        assert summarize_samples([sample(1, 0)], {}).throttling == {}
        assert summarize_samples([sample(1, None)], {}).throttling is None


def sample(clock: float | None, mask: int | None) -> dict[str, float | None]:
    names = ("memory_clock_mhz", "power_watts", "temperature_celsius")
    return {"sm_clock_mhz": clock, "reasons": mask, **dict.fromkeys(names)}


def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NVML's answers without its library, in the place of functions that nvidia-ml-py has under these names."""
    told = SimpleNamespace(known=True, opened=[], samples=0, shut_down=0)

    def handle(uuid: str) -> str:
        if not told.known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        told.opened.append(uuid)
        return "handle"

    def shut_down() -> None:
        told.shut_down += 1

    def reasons(_: str) -> int:
        told.samples += 1
        return int(pynvml.nvmlClocksEventReasonSwPowerCap)

    def not_supported(*_: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    clocks = {pynvml.NVML_CLOCK_SM: 1500, pynvml.NVML_CLOCK_MEM: 2619}
    limits = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}
    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": shut_down,
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetClockInfo": lambda _, kind: clocks[kind],
        "nvmlDeviceGetMaxClockInfo": lambda _, kind: limits[kind],
        "nvmlDeviceGetPowerUsage": lambda _: 250_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetTemperature": not_supported,
        "nvmlDeviceGetCurrentClocksEventReasons": reasons,
    }.items():
        monkeypatch.setattr(pynvml, name, answer)  # fails where nvidia-ml-py has no such name
    return told


def test_the_random_images_are_the_same_for_every_engine(engine: Path) -> None:
    with TensorRTRunner(engine, device="cpu") as first, TensorRTRunner(engine, device="cpu") as second:
        np.testing.assert_array_equal(first._buffers(2).host_input, second._buffers(2).host_input)
