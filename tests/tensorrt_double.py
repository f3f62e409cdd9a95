"""A stand-in for the `tensorrt` module and for torch's CUDA, to drive the flow of control without either.

It proves which calls are made and what becomes of their answers; nothing about what TensorRT makes of a graph.
Its classes refuse, with an AssertionError, every name that not all supported releases have. An engine computes
`logits[i, k] = (k + 1) * mean(images[i])`, from and to the addresses that it is given.
"""

import ctypes
import functools
import json
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from calib.support.progress import SILENT, Progress
from clusterq_deploy.runtimes.tensorrt import BuildConfig, TensorRTRunner, build_engine, gpu, sidecar

API: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
"""The public members of TensorRT's classes, by release and class."""


RTX_ONLY = {
    "ComputeCapability.SM86",
    "ComputeCapability.SM89",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
"""The members that only TensorRT-RTX has, and the code asks of no other library."""


LATER = {
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
    "IBuilderConfig.all_build_routes",
    "IBuilderConfig.build_route",
    "ICudaEngine.get_engine_stat",
}
"""Members that only later releases have; the code looks whether they are there."""


def build(graph: Path, progress: Progress = SILENT, **options: object) -> Path:
    """Build `model.engine` next to a graph."""
    engine = graph.with_name("model.engine")
    build_engine(graph, engine, BuildConfig.model_validate(options), progress)
    return engine


def open_engine(engine: Path) -> TensorRTRunner:
    """Open an engine of the double, whose memory is the computer's."""
    return TensorRTRunner(engine, device="cpu")


class Strict:
    """Base of the doubles: defining, reading or setting a public name that a release lacks is an error."""

    def __init_subclass__(cls) -> None:
        for name in vars(cls):
            _require(cls.__name__, name)

    def __getattr__(self, name: str) -> Any:
        _require(type(self).__name__, name)
        if f"{type(self).__name__}.{name}" in LATER:
            raise AttributeError(name)
        raise NotImplementedError(f"the double has no {type(self).__name__}.{name}")

    def __setattr__(self, name: str, value: object) -> None:
        _require(type(self).__name__, name)
        super().__setattr__(name, value)


def _require(owner: str, name: str) -> None:
    if not name.startswith("_") and f"{owner}.{name}" not in RTX_ONLY | LATER:
        for release, classes in API.items():
            assert owner not in classes or name in classes[owner], f"{owner}.{name} is not in every release: {release}"


@dataclass
class World:
    """What the doubles are to do, and what was asked of them."""

    version: str = "10.9.0"
    gpu: str = "NVIDIA Test 100"
    capability: tuple[int, int] = (9, 0)
    input_shape: tuple[int, ...] = (-1, 3, 4, 4)
    classes: int = 5
    parsed: list[bytes] = field(default_factory=list)
    """The graphs that were parsed."""
    profile_error: str | None = None
    profile_index: int = 0
    build_error: str | None = None
    raises: dict[str, Exception] = field(default_factory=dict)
    """What creating a `Builder`, or the call `build`, raises."""
    steps: int = 3
    step_seconds: float = 0
    on_step: Callable[[], None] = lambda: None
    measures: str = "conv1"
    """What a build adds to its timing cache."""
    load_error: str | None = None
    captures: bool = True
    flags: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    """The compute capabilities of an engine of TensorRT-RTX."""
    options: Any = None
    profiles: dict[str, Any] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    replays: int = 0
    host_code_allowed: bool = False
    timing_caches_read: list[bytes] = field(default_factory=list)
    cancelled_at: int | None = None
    devices: list[int] = field(default_factory=list)
    """Which device was made current, in the thread that builds."""
    caches: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="clusterq-test-")))
    """The user's cache directory."""
    # running and inspecting: a clock of the GPU in milliseconds, and what the inspector and the profiler say
    clock_ms: float = 0.0
    tick_ms: float = 0.25
    execute_ms: float = 1.5
    inspected: str = '{"Layers": []}'
    inspected_batch: int = 0
    layer_ms: dict[str, float] = field(default_factory=dict)
    profiled_runs: int = 0
    weights_bytes: int | None = None
    """What the engine's statistics say, in releases that have them."""

    def move(self, **changes: object) -> None:
        """Go to another machine."""
        vars(self).update(changes)
        vars(sys.modules["tensorrt"])["__version__"] = self.version


def install(monkeypatch: pytest.MonkeyPatch) -> World:
    """Replace `tensorrt` and the parts of `torch.cuda` that the package uses."""
    world = World()
    weakref.finalize(world, shutil.rmtree, world.caches, ignore_errors=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.caches))
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(world))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_module(world))
    monkeypatch.setattr(gpu, "_log", functools.cache(gpu._log.__wrapped__))
    monkeypatch.setattr(sidecar, "driver_version", lambda: "555.1")

    class Graph:
        def replay(self) -> None:
            world.replays += 1
            world.clock_ms += world.execute_ms

    def capture(_: Graph, stream: Stream) -> nullcontext[None]:
        if not world.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return nullcontext()

    def properties(_: int) -> SimpleNamespace:
        major, minor = world.capability
        return SimpleNamespace(name=world.gpu, major=major, minor=minor, uuid="01234567-89ab-cdef-0123-456789abcdef")

    def set_device(device: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        world.devices.append(device)

    for name, value in {
        "is_available": lambda: True,
        "set_device": set_device,
        "current_device": lambda: 0,
        "get_device_properties": properties,
        "get_device_name": lambda _: world.gpu,
        "get_rng_state": lambda: torch.zeros(16, dtype=torch.uint8),  # torch.export puts it back
        "set_rng_state": lambda _: None,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "Event": functools.partial(Event, world),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return world


class Stream:
    def __init__(self, device: object) -> None:
        self.cuda_stream = 77
        self.waited_for: list[Stream] = []

    def synchronize(self) -> None: ...

    def wait_event(self, event: "Event") -> None:
        assert event.recorded_on is not None, "a stream waits for an event that nobody recorded"
        self.waited_for.append(event.recorded_on)


class Event:
    """Its recording takes a tick of the GPU's clock."""

    def __init__(self, world: World, enable_timing: bool) -> None:
        assert enable_timing
        self._world = world
        self.recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream
        self._at_ms = self._world.clock_ms
        self._world.clock_ms += self._world.tick_ms

    def synchronize(self) -> None:
        assert self.recorded_on is not None

    def elapsed_time(self, other: "Event") -> float:
        return other._at_ms - self._at_ms


VALUES: dict[str, dict[str, Any]] = {
    "ComputeCapability": {"SM86": "8.6", "SM89": "8.9"},
    "BuilderFlag": {"VERSION_COMPATIBLE": "VERSION_COMPATIBLE"},
    "DataType": {"FLOAT": "FLOAT", "HALF": "HALF", "BF16": "BF16"},
    "HardwareCompatibilityLevel": {
        "AMPERE_PLUS": "AMPERE_PLUS",
        "SAME_COMPUTE_CAPABILITY": "SAME_COMPUTE_CAPABILITY",
    },
    "ILogger": {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4},
    "IProfiler": {},
    "IProgressMonitor": {},
    "LayerInformationFormat": {"JSON": "JSON"},
    "MemoryPoolType": {"WORKSPACE": "WORKSPACE"},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": 1},
    "ProfilingVerbosity": {"DETAILED": "DETAILED"},
    "TensorIOMode": {"INPUT": "INPUT", "OUTPUT": "OUTPUT"},
}
"""The classes of TensorRT that are used for their values, or only to derive from."""


def tensorrt_module(world: World) -> ModuleType:
    """Return a module `tensorrt` that does what `world` says."""
    module: Any = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # `find_spec`, which torch._dynamo asks, requires one
    module.__version__ = world.version
    for name, values in VALUES.items():
        setattr(module, name, type(name, (Strict,), values))

    def strict(owner: str, **members: Any) -> Any:
        """Return an object of a class that has no more than these members."""
        return type(owner, (Strict,), members)()

    tensor = strict("ITensor", name="images", shape=property(lambda _: world.input_shape))
    network = strict("INetworkDefinition", num_inputs=1, get_input=lambda _, index: tensor)

    class OnnxParser(Strict):
        def __init__(self, parsed_into: Any, log: Any) -> None:
            assert parsed_into is network
            assert isinstance(log, module.ILogger)

        def parse_from_file(self, path: str) -> bool:
            world.parsed.append(Path(path).read_bytes())
            return True

    class IOptimizationProfile(Strict):
        def set_shape(self, name: str, smallest: Any, tuned: Any, largest: Any) -> None:
            if world.profile_error:
                raise ValueError(world.profile_error)
            world.profiles[name] = smallest, tuned, largest

    class ITimingCache(Strict):
        def __init__(self, content: bytes) -> None:
            self._entries = set(content.split())

        def combine(self, input_cache: "ITimingCache", ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            if b"other-machine" in input_cache._entries:
                return False
            self._entries |= input_cache._entries
            return True

        def serialize(self) -> bytes:
            return b" ".join(sorted(self._entries))

    class IBuilderConfig(Strict):
        def set_memory_pool_limit(self, pool: str, limit: int) -> None:
            assert pool == "WORKSPACE"
            self._workspace = limit

        def set_flag(self, flag: str) -> None:
            world.flags.append(flag)

        def set_compute_capability(self, target: str, index: int) -> None:
            assert index < self.num_compute_capabilities
            world.targets.append(target)

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            return world.profile_index

        def create_timing_cache(self, content: bytes) -> ITimingCache | None:
            world.timing_caches_read.append(content)
            return None if content == b"damaged" else ITimingCache(content)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            self._timing_cache = cache
            return b"other-machine" not in cache._entries

    class EngineInspector(Strict):
        def get_engine_information(self, format: str) -> str:
            assert format == "JSON"
            world.inspected_batch = self.execution_context._shape[0]
            return world.inspected

    class Builder(Strict):
        def __init__(self, log: Any) -> None:
            if "Builder" in world.raises:
                log.log(module.ILogger.ERROR, world.build_error or "")
                raise world.raises["Builder"]
            self._log = log

        def create_network(self, flags: int) -> Any:
            assert flags == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return network

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: IBuilderConfig) -> bytes | None:
            world.options = config
            if "build" in world.raises:
                raise world.raises["build"]
            if not self._goes_through_its_phases(config.progress_monitor):
                return None
            if world.build_error:
                self._log.log(module.ILogger.ERROR, world.build_error)
                return None
            shapes = [list(shape) for shape in world.profiles.get("images", [world.input_shape] * 3)]
            plan = {"shape": world.input_shape, "profile": shapes, "classes": world.classes}
            if cache := vars(config).get("_timing_cache"):
                cache._entries.add(world.measures.encode())
            return json.dumps(plan).encode()

        def _goes_through_its_phases(self, monitor: Any) -> bool:
            """Run two nested phases, the inner one without its last step; return False if the monitor cancels."""
            monitor.phase_start("Building engine", None, world.steps)
            for step in range(world.steps):
                monitor.phase_start("Tactic selection", "Building engine", 4)
                monitor.step_complete("Tactic selection", 0)
                monitor.step_complete("Tactic selection", 2)
                monitor.phase_finish("Tactic selection")
                time.sleep(world.step_seconds)
                world.on_step()
                if not monitor.step_complete("Building engine", step):
                    world.cancelled_at = step
                    break
            monitor.phase_finish("Building engine")
            return world.cancelled_at is None

    class IExecutionContext(Strict):
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan, self._shape, self._addresses = plan, (), {}
            self.profiler = None

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert name == "images"
            smallest, _, largest = self._plan["profile"]
            self._shape = shape
            return smallest[0] <= shape[0] <= largest[0]

        def infer_shapes(self) -> list[str]:
            return [] if self._shape else ["images"]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._shape[0], self._plan["classes"]

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == 77
            images = _floats(self._addresses["images"], self._shape)
            logits = _floats(self._addresses["logits"], (self._shape[0], self._plan["classes"]))
            logits[:] = images.mean(axis=(1, 2, 3))[:, None] * np.arange(1, self._plan["classes"] + 1)
            world.batches.append(self._shape[0])
            world.clock_ms += world.execute_ms
            if self.profiler is not None:
                world.profiled_runs += 1
                slower = 100 if world.profiled_runs <= 10 else 1  # until it is warm
                for name, milliseconds in world.layer_ms.items():
                    self.profiler.report_layer_time(name, slower * milliseconds)
            return True

    def cuda_engine(plan: dict[str, Any]) -> Any:
        later = {} if world.weights_bytes is None else {"get_engine_stat": lambda _: world.weights_bytes}
        return strict(
            "ICudaEngine",
            **later,
            num_io_tensors=2,
            get_tensor_name=lambda _, index: ("images", "logits")[index],
            get_tensor_mode=lambda _, name: "INPUT" if name == "images" else "OUTPUT",
            get_tensor_dtype=lambda _, name: "FLOAT",
            get_tensor_shape=lambda _, name: list(plan["shape"]),
            get_tensor_profile_shape=lambda _, name, profile: {("images", 0): list(plan["profile"])}[name, profile],
            create_execution_context=lambda _: IExecutionContext(plan),
            create_engine_inspector=lambda _: EngineInspector(),
        )

    class Runtime(Strict):
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            world.host_code_allowed = self.engine_host_code_allowed
            if world.load_error is None:
                return cuda_engine(json.loads(plan))
            self._log.log(module.ILogger.ERROR, world.load_error)
            return None

    for double in (Builder, OnnxParser, Runtime, IBuilderConfig, ITimingCache):
        setattr(module, double.__name__, double)
    return module


def _floats(address: int, shape: tuple[int, ...]) -> Any:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
