"""Building engines: the flow of control, driven through a double of TensorRT."""

import logging
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError
from support import Counter, python_environment
from tensorrt_double import World, build

from clusterq_deploy.errors import EngineError
from clusterq_deploy.files import sha256_file
from clusterq_deploy.runtimes.tensorrt import BuildConfig, read_sidecar, sidecar_path
from clusterq_deploy.runtimes.tensorrt import build as build_module
from clusterq_deploy.runtimes.tensorrt.sidecar import Machine


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_build_writes_the_engine_and_its_sidecar(world: World, graph: Path) -> None:
    engine = build(graph, batch=(1, 2, 4))
    info = read_sidecar(engine)
    assert sidecar_path(engine).name == "model.engine.json"
    assert (info.built_on.gpu, info.built_on.compute_capability) == ("NVIDIA Test 100", "9.0")
    assert (info.built_on.tensorrt, info.built_on.driver) == ("10.9.0", "555.1")
    assert info.source == "model.trt.onnx"
    assert info.source_sha256 == sha256_file(graph)
    assert info.engine_sha256 == sha256_file(engine)
    assert info.size_bytes == engine.stat().st_size
    assert info.options.batch == (1, 2, 4)
    assert info.created.tzinfo is not None
    assert world.profiles == {"images": ((1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 4))}
    assert left(graph.parent) == ["model.engine", "model.engine.json", "model.trt.onnx"]


def test_build_passes_the_options_on(world: World, graph: Path) -> None:
    build(graph, optimization_level=5, workspace_bytes=2**29, version_compatible=True, hardware_compatible=True)
    assert world.flags == ["VERSION_COMPATIBLE"]
    assert world.options.builder_optimization_level == 5
    assert world.options.hardware_compatibility_level == "AMPERE_PLUS"
    assert world.options.profiling_verbosity == "DETAILED"
    assert world.options._workspace == 2**29


def test_build_refuses_a_compatible_engine_on_an_older_gpu(world: World, graph: Path) -> None:
    world.gpu, world.capability = "Tesla T4", (7, 5)
    build(graph)
    with pytest.raises(
        EngineError, match=r"Tesla T4 has compute capability 7\.5; --hardware-compatible .* leave the option out"
    ):
        build(graph, hardware_compatible=True)


def test_build_for_the_same_capability(world: World, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(graph, same_capability=True)
    assert world.options.hardware_compatibility_level == "SAME_COMPUTE_CAPABILITY"
    monkeypatch.delattr(sys.modules["tensorrt"].HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
    world.move(version="10.3.0")
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 has no --same-capability engines: 10\.9 and later have"):
        build(graph, same_capability=True)


def test_build_passes_a_route_on_where_the_release_knows_it(
    world: World, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"TensorRT 10\.9\.0 has no --build-route: 11\.4 and later have"):
        build(graph, build_route="-fuse=off")
    config = sys.modules["tensorrt"].IBuilderConfig
    monkeypatch.setattr(config, "build_route", "", raising=False)
    monkeypatch.setattr(config, "all_build_routes", "-fuse=on|off -tile=1", raising=False)
    build(graph, build_route="-fuse=off -tile=2")
    assert world.options.build_route == "-fuse=off -tile=2"
    with pytest.raises(EngineError, match=r"--build-route: TensorRT 10\.9\.0 knows no lanes; it knows fuse, tile"):
        build(graph, build_route="-fuse=off --lanes=3")


def test_build_uses_the_callers_device_in_another_thread(
    world: World, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    build(graph)
    assert world.devices == [3]


def test_build_leaves_no_engine_if_its_sidecar_cannot_be_written(
    world: World, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        path.write_bytes(data)

    build(graph)  # an earlier one
    monkeypatch.setattr(build_module, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        build(graph)
    assert left(graph.parent) == [graph.name]


@pytest.mark.parametrize(
    "options",
    [
        {"hardware_compatible": True, "same_capability": True},
        {"batch": (4, 2, 8)},
        {"batch": (0, 1, 1)},
        {"optimization_level": 6},
        {"fp16": True},
    ],
)
def test_build_config_refuses(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BuildConfig.model_validate(options)


NO_KERNEL = "Error Code 10: Internal Error (Could not find any implementation for node conv1 + relu.)"
OLD_DRIVER = "Error Code 6: API Usage Error (CUDA initialization failure with error: 35. Please check)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"profile_error": "Shape provided for max is inconsistent."},
            r"TensorRT cannot build \S+; .* is inconsistent\.",
        ),
        ({"profile_index": -1}, r"TensorRT refuses the batch sizes \(1, 8, 32\) for \S+"),
        ({"build_error": "Nobody knows this\n one."}, r"TensorRT cannot build \S+; Nobody knows this one\."),
        (
            {"build_error": NO_KERNEL},
            r"TensorRT cannot build \S+: it has no kernel for the layer conv1 \+ relu: raise --workspace.* "
            rf"\(TensorRT: {re.escape(NO_KERNEL)}\)",
        ),
        (
            {"build_error": OLD_DRIVER, "raises": {"Builder": TypeError("factory function returned nullptr")}},
            r".*: the NVIDIA driver is older than .*: install a newer driver.*",
        ),
        ({"raises": {"build": MemoryError()}}, r".*onnx: the computer's memory ran out: .*\(TensorRT: MemoryError\)"),
    ],
)
def test_build_raises_one_line_and_leaves_nothing(
    world: World, graph: Path, changes: dict[str, object], message: str
) -> None:
    vars(world).update(changes)
    with pytest.raises(EngineError, match=f"^{message}$"):
        build(graph)
    assert left(graph.parent) == ["model.trt.onnx"]


def test_build_raises_no_error_of_an_earlier_build(world: World, graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    for world.build_error in ("first error", "second error"):
        with pytest.raises(EngineError) as caught:
            build(graph)
    assert str(caught.value).endswith("model.trt.onnx; second error")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_timing_cache_is_kept_per_gpu_and_release_in_the_users_cache(world: World, graph: Path) -> None:
    build(graph)
    (cache,) = world.caches.rglob("*.cache")
    assert cache.name.startswith("NVIDIA-Test-100-sm9.0-cuda")
    assert cache.name.endswith("-tensorrt10.9.0.cache")
    assert cache.read_bytes() == b"conv1"
    world.measures = "conv2"
    build(graph)
    assert world.timing_caches_read == [b"", b"", b"conv1", b"conv1"]
    assert cache.read_bytes() == b"conv1 conv2"


def test_timing_cache_is_the_given_file(world: World, graph: Path) -> None:
    cache = graph.with_name("timing.cache")
    build(graph, timing_cache=cache)
    assert cache.read_bytes() == b"conv1"
    assert list(world.caches.rglob("*.cache")) == []


@pytest.mark.parametrize("options", [{"timing_cache": "none"}, {"optimization_level": 0}])
def test_timing_cache_can_be_switched_off(world: World, graph: Path, options: dict[str, object]) -> None:
    build(graph, **options)
    assert world.timing_caches_read == []
    assert list(world.caches.iterdir()) == []


@pytest.mark.parametrize("content", [b"damaged", b"other-machine"])
def test_timing_cache_starts_empty_if_the_file_does_not_fit(
    world: World, graph: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = graph.with_name("timing.cache")
    cache.write_bytes(content)
    build(graph, timing_cache=cache)
    assert cache.read_bytes() == b"conv1"
    assert "a new one is started" in caplog.text


def test_timing_cache_keeps_what_another_build_wrote_meanwhile(world: World, graph: Path) -> None:
    cache = graph.with_name("timing.cache")
    world.on_step = lambda: cache.write_bytes(b"of-another-build")
    build(graph, timing_cache=cache)
    assert cache.read_bytes() == b"conv1 of-another-build"


def test_timing_cache_loses_no_measurement_of_concurrent_builds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, path, read = sys.modules["tensorrt"], tmp_path / "timing.cache", build_module._read_cache

    def slow_read(file: Path) -> bytes:
        content = read(file)
        time.sleep(0.01)  # without a lock every writer would have read by now, and the last would win
        return content

    monkeypatch.setattr(build_module, "_read_cache", slow_read)

    def write(entry: int) -> None:
        build_module.save_timing_cache(trt.IBuilderConfig(), trt.ITimingCache(f"layer{entry}".encode()), path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert set(path.read_bytes().split()) == {f"layer{entry}".encode() for entry in range(8)}


def test_timing_cache_that_cannot_be_written_is_a_warning(
    world: World, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph.with_name("file").write_bytes(b"")
    engine = build(graph, timing_cache=graph.with_name("file") / "timing.cache")
    assert engine.is_file()
    assert "is not saved" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_timing_cache_is_in_the_platforms_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = Machine(gpu="A/B", compute_capability="8.6", driver=None, cuda="13.0", tensorrt="11.4.0")
    expected = tmp_path / "clusterq-deploy/timing/A-B-sm8.6-cuda13.0-tensorrt11.4.0.cache"
    assert build_module.timing_cache_path(BuildConfig(), machine) == expected


def test_progress_has_the_nested_phases_of_the_build(world: World, graph: Path) -> None:
    world.steps, counter = 2, Counter()
    build(graph, counter)
    inner = ["open Tactic selection", "close Tactic selection 3/4"]
    assert counter.events == [
        "open build model.engine",
        "open Building engine",
        *inner,
        *inner,
        "close Building engine 2/2",
        "close build model.engine 2/2",
    ]


def test_progress_closes_what_a_failure_leaves_open(world: World, graph: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the worst")

    world.on_step, counter = fail, Counter()
    with pytest.raises(EngineError, match="the worst"):
        build(graph, counter)
    assert counter.events[-2:] == ["close Building engine 0/3", "close build model.engine 1/2"]


CANCELLED = """
import signal, sys
import pytest
from tensorrt_double import install

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
if sys.argv[1] == "SIGTERM":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with pytest.MonkeyPatch.context() as patch:
    world = install(patch)
    world.steps, world.step_seconds = 2000, 0.01
    world.on_step = lambda: print("building", file=sys.__stdout__, flush=True)
    from cli.main import main
    try:
        main(["build", sys.argv[2]])
    finally:
        print("cancelled at", world.cancelled_at, list(world.caches.rglob("*.cache")), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 143)])
def test_build_is_cancelled_by_a_signal_and_leaves_nothing(graph: Path, name: str, code: int) -> None:
    command = [sys.executable, "-c", CANCELLED, name, str(graph)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=python_environment(), cwd=graph.parent) as child:
        assert child.stdout.readline() == "building\n"
        child.send_signal(getattr(signal, name))
        output, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert errors.split() == (["Aborted!"] if name == "SIGINT" else [])
    last = output.splitlines()[-1]
    assert last.startswith("cancelled at ")
    assert int(last.split()[2]) < 1999
    assert last.endswith("[]")  # no timing cache either
    assert left(graph.parent) == ["model.trt.onnx"]
