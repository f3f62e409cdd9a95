"""Timing and watching an engine: the flow of control through doubles, NVML's absence for real."""

import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
from tensorrt_double import World, build, open_engine

from clusterq_deploy.evaluation.latency import BenchmarkConfig, summarize_engine
from clusterq_deploy.runtimes.tensorrt.timing import CallTimer, gpu_monitor, summarize_samples
from clusterq_deploy.stages.benchmark import time_engine

SETTINGS = BenchmarkConfig(batches=(1, 4), warmup_ms=0, min_runs=6, min_seconds=0)


@pytest.fixture
def engine(world: World, graph: Path) -> Path:
    return build(graph, batch=(1, 2, 8))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_measure_times_copies_and_computation_apart(world: World, engine: Path, cuda_graph: bool) -> None:
    with open_engine(engine) as runner:
        times = runner.measure(3, warmup_ms=0, min_runs=7, min_seconds=0, cuda_graph=cuda_graph)
    assert times.cuda_graph is cuda_graph
    assert len(times.calls) == 7
    for call in times.calls:
        assert (call.host_to_device_ms, call.device_to_host_ms) == (world.tick_ms, world.tick_ms)
        assert call.compute_ms == world.tick_ms + world.execute_ms
        assert call.latency_ms == pytest.approx(3 * world.tick_ms + world.execute_ms)
        assert 0 < call.enqueue_ms < 1000
    assert world.replays == (7 if cuda_graph else 0)
    record = summarize_engine("tensorrt", 3, times)
    assert record.enqueue is not None
    assert record.compute.median_ms == world.tick_ms + world.execute_ms
    assert record.compute.coefficient_of_variation == pytest.approx(0)
    assert record.host_to_device.median_ms == world.tick_ms
    assert record.median_ms == pytest.approx(3 * world.tick_ms + world.execute_ms)
    assert record.images_per_second == pytest.approx(21 / times.wall_seconds)
    assert record.cuda_graph is cuda_graph


def test_measure_enqueues_if_no_cuda_graph_can_be_captured(
    world: World, engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.captures = False
    with open_engine(engine) as runner:
        times = runner.measure(1, warmup_ms=0, min_runs=4, min_seconds=0, cuda_graph=True)
    assert (len(times.calls), times.cuda_graph, world.replays) == (4, False, 0)
    assert "no CUDA graph can be captured" in caplog.text


def test_call_timer_copies_the_batch_and_the_answer(engine: Path) -> None:
    with open_engine(engine) as runner, open_engine(engine) as other:
        timer, same = (
            CallTimer(lambda: runner._enqueue(runner._context), opened._input[:4], opened._output[:4], opened._stream)
            for opened in (runner, other)
        )
        np.testing.assert_array_equal(timer._host_input, same._host_input)  # the same images for every engine
        assert timer._host_input.std() > 0.5
        runner._set_batch(runner._context, 4)
        timer.measure(warmup_ms=0, min_runs=2, min_seconds=0, cuda_graph=False)
        np.testing.assert_array_equal(runner._input[:4], timer._host_input)
        # the engine's answer is the mean of the images, times the class's number
        torch.testing.assert_close(timer._host_output[:, 1], 2 * timer._host_input.mean(dim=(1, 2, 3)))


def test_call_timer_waits_for_the_images_and_for_the_computation(engine: Path) -> None:
    compute: Any = torch.cuda.Stream("cuda")
    launches: list[int] = []
    batch = torch.zeros(2, 3, 4, 4)
    timer = CallTimer(lambda: launches.append(len(compute.waited_for)), batch, torch.zeros(2, 5), compute)
    timer.measure(warmup_ms=0, min_runs=3, min_seconds=0, cuda_graph=False)
    assert compute.waited_for == [timer._upload] * 3
    assert launches == [1, 2, 3]  # each is started after the wait
    assert timer._download.waited_for == [compute] * 3


def test_measure_warms_up_and_runs_until_both_limits_are_met(world: World, engine: Path) -> None:
    with open_engine(engine) as runner:
        start = time.perf_counter()
        times = runner.measure(1, warmup_ms=50, min_runs=1, min_seconds=0.05)
        assert time.perf_counter() - start >= 0.1
    assert 7 < len(times.calls) < len(world.batches)


def test_time_engine_has_the_trtexec_command_of_each_batch(engine: Path) -> None:
    with open_engine(engine) as runner:
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
def test_trtexec_command_quotes_paths_and_has_no_shapes_for_a_fixed_batch(
    world: World, graph: Path, tensorrt: str, cuda_graph: bool, flags: str
) -> None:
    world.input_shape = (8, 3, 4, 4)
    world.move(version=tensorrt)
    with open_engine(build(graph, version_compatible=True)) as runner:
        command = runner.trtexec_command(
            "my runs/model.engine", 8, warmup_ms=200, min_runs=10, min_seconds=2.5, cuda_graph=cuda_graph
        )
    assert command == (
        "trtexec '--loadEngine=my runs/model.engine' --warmUp=200 --duration=2.5 --iterations=10 "
        f"--percentile=50,90,95,99 {flags} --versionCompatible"
    )


def test_telemetry_without_nvml_has_the_reason(engine: Path) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reason = f"NVML does not start: {error}"
    else:
        pynvml.nvmlShutdown()
        pytest.skip("NVML is there")
    with open_engine(engine) as runner:
        times = runner.measure(1, warmup_ms=0, min_runs=2, min_seconds=0)
    assert times.gpu.reason == reason
    assert (times.gpu.samples, times.gpu.clocks, times.gpu.sm_clock_mhz) == (0, None, None)


def test_gpu_monitor_samples_while_the_context_is_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(monkeypatch)
    with gpu_monitor("cuda") as telemetry:
        while nvml.samples < 2:
            time.sleep(0.01)
    assert nvml.opened == ["GPU-01234567-89ab-cdef-0123-456789abcdef"]
    assert nvml.shut_down == 1
    gpu = telemetry()
    assert gpu.reason is None
    assert gpu.samples >= 2
    assert (gpu.sm_clock_mhz.highest, gpu.sm_clock_limit_mhz) == (1500, 1980)
    assert (gpu.memory_clock_mhz.mean, gpu.memory_clock_limit_mhz) == (2619, 2619)
    assert (gpu.power_watts.mean, gpu.power_limit_watts) == (pytest.approx(250), 700)
    assert gpu.temperature_celsius is None  # this device does not tell
    assert gpu.clocks == "steady"
    assert gpu.throttling == {"power limit": 1.0}


def test_gpu_monitor_has_the_reason_if_nvml_does_not_know_the_device(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = fake_nvml(monkeypatch)
    nvml.known = False
    with gpu_monitor("cuda") as telemetry:
        pass
    assert "NVML does not have the device: Not Found" in (telemetry().reason or "")
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
def test_summarize_samples_says_how_clocks_behaved(clocks: list[int], mask: int, words: str | None) -> None:
    assert summarize_samples([sample(clock, mask) for clock in clocks], {}).clocks == words


def test_summarize_samples_does_not_count_idling_as_throttling() -> None:
    hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonGpuIdle
    gpu = summarize_samples([sample(1, 0), sample(1, hot), sample(1, 0), sample(1, hot)], {})
    assert gpu.throttling == {"temperature (software)": 0.5}
    assert summarize_samples([sample(1, 0)], {}).throttling == {}
    assert summarize_samples([sample(1, None)], {}).throttling is None


def sample(clock: float | None, mask: int | None) -> dict[str, float | None]:
    names = ("memory_clock_mhz", "power_watts", "temperature_celsius")
    return {"sm_clock_mhz": clock, "reasons": mask, **dict.fromkeys(names)}


def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace functions of nvidia-ml-py by NVML's answers, without its library."""
    state = SimpleNamespace(known=True, opened=[], samples=0, shut_down=0)

    def handle(uuid: str) -> str:
        if not state.known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        state.opened.append(uuid)
        return "handle"

    def shut_down() -> None:
        state.shut_down += 1

    def reasons(_: str) -> int:
        state.samples += 1
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
        monkeypatch.setattr(pynvml, name, answer)  # fails if nvidia-ml-py has no such name
    return state
