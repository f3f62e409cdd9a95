"""Build an engine of TensorRT or TensorRT-RTX from an ONNX graph with explicit Q/DQ."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from calib.support.progress import Advance, Progress
from clusterq_deploy.errors import EngineError, ExportError, GraphRefused, RunDirectoryError
from clusterq_deploy.files import read_graph, sha256_file, write_bytes
from clusterq_deploy.results.engines import EnginePlan, Refusal
from clusterq_deploy.runtimes.tensorrt.gpu import (
    build_problem,
    diagnose,
    explained,
    failure,
    require,
    tensorrt_log,
    title,
    without_driver,
)
from clusterq_deploy.runtimes.tensorrt.kernels import convolution_channels, plan_of
from clusterq_deploy.runtimes.tensorrt.library import trt, using
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig, EngineInfo, Machine, built_machine, sidecar_path

logger = logging.getLogger(__name__)

_DOC_LENGTH = 160
_UNNAMED = re.compile(r"Invalid Node - (?:node_of_)?(\S+)")  # of a node without a name the parser reports its output's
_LOCK_TIMEOUT_S = 30
_POLL_S = 0.5  # on Windows a wait without a timeout does not notice Ctrl-C


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    config: BuildConfig,
    progress: Progress,
    *,
    derived_from: Path | None = None,
    spelling_of: Path | None = None,
) -> EngineInfo:
    """Build an engine for the current CUDA device, or for the GPUs in `config.rtx`, and write it with its sidecar.

    The network is strongly typed: it has the precisions of the graph. Both files are written completely or not at all.
    Ctrl-C cancels the build.

    Args:
        onnx_path: the graph; of its inputs only the batch dimension may be dynamic.
        engine_path: of the engine; the sidecar has the same name with `.json` appended.
        progress: shows parsing and building, with TensorRT's own nested phases, from several threads.
        derived_from: the file that the graph was made from, such as a quantized one of which it is the FP16 baseline;
            the sidecar names it instead of the graph.
        spelling_of: the file whose function the graph has in another spelling; the sidecar names it instead, too.

    Raises:
        TensorRTMissing: the library is not there, or TensorRT has no NVIDIA GPU.
        EngineError: the library cannot parse or build the graph, or this GPU does not support `config`.
        RunDirectoryError: the graph cannot be read, or the engine cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; any exception of a signal handler ends a build in the same way.
    """
    require(build_problem(config.library))
    start, source = time.perf_counter(), derived_from or spelling_of or onnx_path
    with using(config.library):
        machine = built_machine(config)
        if config.hardware_compatible and not machine.is_ampere_or_later:
            raise EngineError(
                f"{machine.gpu} has compute capability {machine.compute_capability}; --hardware-compatible engines are "
                "for 8.0 (Ampere) and later, and built there: leave the option out"
            )
        source_sha256 = sha256_file(source)
        with progress.task(f"build {engine_path.name}", total=2) as advance, explained(f"build {source}"):
            builder: trt.Builder = trt.Builder(tensorrt_log())
            network: trt.INetworkDefinition = builder.create_network(
                1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            )
            # the parser owns the weights that the network points to: it has to exist until the engine is built
            parser: trt.OnnxParser = trt.OnnxParser(network, tensorrt_log())
            _parse(parser, onnx_path, source)
            options: trt.IBuilderConfig
            options, batch = _configure(builder, network, config, source)
            cache_path = timing_cache_path(config, machine)
            cache = use_timing_cache(options, cache_path) if cache_path else None
            advance()
            serialized: trt.IHostMemory | None = _build(builder, network, options, progress)
            if not serialized:
                raise failure(f"{title()} cannot build {source}")
            plan = _plan(onnx_path, engine_path.name, config, batch) if config.rtx else None
            if plan is not None and spelling_of is not None:
                plan = plan.model_copy(update={"respelled": True})
            advance()

    if batch != config.batch and "batch" in config.model_fields_set and derived_from is None:
        logger.warning("%s fixes the batch at %d; the batch sizes %s are ignored", source, batch[0], config.batch)
    engine = memoryview(serialized)
    info = EngineInfo(
        built_on=machine,
        source=source.name,
        source_sha256=source_sha256,
        derived=derived_from is not None,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        size_bytes=engine.nbytes,
        options=config.model_copy(update={"batch": batch}),
        plan=plan,
        seconds=time.perf_counter() - start,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    sidecar_path(engine_path).unlink(missing_ok=True)  # of an earlier engine
    write_bytes(engine_path, engine)
    try:
        write_bytes(sidecar_path(engine_path), f"{info.model_dump_json(indent=2)}\n".encode())
    except BaseException:
        engine_path.unlink(missing_ok=True)
        raise
    if cache_path:
        save_timing_cache(options, cache, cache_path)
    return info


def _plan(onnx_path: Path, engine: str, config: BuildConfig, batch: tuple[int, int, int]) -> EnginePlan:
    """Return the kernels of the engine that was built last; if they cannot be read, a record that says why."""
    only = batch[0] if batch[0] == batch[2] else 1
    try:
        plan = plan_of(tensorrt_log().layers, convolution_channels(read_graph(onnx_path)), engine=engine, batch=only)
    except (EngineError, ExportError) as error:
        logger.warning("%s: %s", engine, error)
        plan = EnginePlan(engine=engine, notes=[f"{error}."])
    return plan.model_copy(update={"release": str(trt.__version__), "targets": list(config.rtx)})


def _parse(parser: trt.OnnxParser, onnx_path: Path, source: Path) -> None:
    """Parse the graph into the parser's network.

    Raises:
        GraphRefused: the parser cannot; the message has every problem with its node, operator and doc string, and a
            hint about `source`, the user's file.
    """
    if parser.parse_from_file(str(onnx_path)):
        return
    try:
        docs = {node.name: " ".join(node.doc_string.split()) for node in read_graph(onnx_path).graph.node if node.name}
    except ExportError:  # TensorRT's own message describes the problem of the file
        docs = {}
    problems, refusals = [], []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        description: str = error.desc()
        reason = without_driver(description)
        name: str = error.node_name() or "".join(_UNNAMED.findall(reason)[:1])
        operator: str = error.node_operator()
        place = operator or "no operator"
        if doc := docs.get(name):
            place += f', "{doc}"' if len(doc) <= _DOC_LENGTH else f', "{doc[:_DOC_LENGTH]}..."'
        diagnosis = diagnose([reason])
        remedy = diagnosis.advice if diagnosis else ""
        refusals.append(Refusal(node=name, operator=operator, reason=reason, remedy=remedy))
        problems.append(f"{name or 'unnamed node'} ({place}): {reason}")
    hint = f"clusterq check {source} lists the rules of TensorRT that the graph breaks"
    remedies = [refusal.remedy for refusal in refusals if refusal.remedy]
    raise GraphRefused(
        f"{title()} cannot parse {source}: {'; '.join(problems) or 'no reason given'}; {(*remedies, hint)[0]}", refusals
    )


def _configure(
    builder: trt.Builder, network: trt.INetworkDefinition, config: BuildConfig, source: Path
) -> tuple[trt.IBuilderConfig, tuple[int, int, int]]:
    """Return TensorRT's configuration for `config`, and the batch sizes that the engine accepts.

    Every input with a dynamic batch gets its smallest, optimal and largest shape; a fixed batch has no profile.
    """
    options: trt.IBuilderConfig = _options(builder, config)
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    batches = []
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        batch, *rest = tensor.shape
        if -1 in rest:
            raise EngineError(
                f"input {tensor.name} of {source} has shape {(batch, *rest)}; "
                "only the first dimension, the batch, may be dynamic (-1)"
            )
        if batch == -1:
            profile.set_shape(tensor.name, *((size, *rest) for size in config.batch))
        batches.append(batch)
    if not batches:
        read_graph(source)  # the parser reads a file that is not ONNX as an empty graph
        raise EngineError(f"{source} has no input")
    if -1 not in batches:
        return options, (batches[0],) * 3
    if options.add_optimization_profile(profile) < 0:
        raise failure(f"{title()} refuses the batch sizes {config.batch} for {source}")
    return options, config.batch


def _options(builder: trt.Builder, config: BuildConfig) -> trt.IBuilderConfig:
    """Return TensorRT's configuration for `config`, without shapes."""
    options: trt.IBuilderConfig = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    options.builder_optimization_level = config.optimization_level
    options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # inspector and log name layers and their types
    if config.rtx:
        options.num_compute_capabilities = len(config.rtx)
        for index, target in enumerate(config.rtx):
            options.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if config.version_compatible:
        options.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        options.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if config.same_capability:
        if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
            raise EngineError(f"TensorRT {trt.__version__} has no --same-capability engines: 10.9 and later have")
        options.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if config.build_route:
        _set_route(options, config.build_route)
    return options


def _set_route(options: trt.IBuilderConfig, route: str) -> None:
    """Set what TensorRT's compiler is to do differently, by names that this release knows."""
    if not hasattr(options, "build_route"):
        raise EngineError(f"TensorRT {trt.__version__} has no --build-route: 11.4 and later have")
    asked, known = (
        [word.partition("=")[0].lstrip("-") for word in text.split()] for text in (route, options.all_build_routes)
    )
    if unknown := [name for name in asked if name not in known]:
        raise EngineError(
            f"--build-route: TensorRT {trt.__version__} knows no {', '.join(unknown)}; "
            f"it knows {', '.join(sorted(known)) or 'none'}"
        )
    options.build_route = route


def _build(
    builder: trt.Builder, network: trt.INetworkDefinition, options: trt.IBuilderConfig, progress: Progress
) -> trt.IHostMemory | None:
    """Return the serialized engine, None if TensorRT fails; an exception of a signal handler cancels the build.

    The build runs in a thread: Python runs signal handlers in the main thread, and only between its own instructions.
    """
    cancelled = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work() -> trt.IHostMemory | None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own current device
        return builder.build_serialized_network(network, options)

    with _progress_monitor(progress, cancelled) as monitor, ThreadPoolExecutor(1, "build") as pool:
        options.progress_monitor = monitor
        try:
            future = pool.submit(work)
            while not wait([future], timeout=_POLL_S).done:
                pass
            return future.result()
        except BaseException:
            cancelled.set()
            raise


@contextmanager
def _progress_monitor(progress: Progress, cancelled: threading.Event) -> Iterator[trt.IProgressMonitor]:
    """Yield a monitor that shows TensorRT's phases as tasks of `progress`, and ends the build once `cancelled` is set.

    TensorRT calls it from several threads, and may use a phase's name again, or finish a phase before its last step.
    """
    lock = threading.Lock()
    phases: dict[str, tuple[ExitStack, Advance, int]] = {}

    def close(name: str) -> None:
        if name in phases:
            phases.pop(name)[0].close()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the binding requires this call instead of super()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                close(phase_name)
                stack = ExitStack()
                phases[phase_name] = stack, stack.enter_context(progress.task(phase_name, num_steps)), 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                if phase_name in phases:
                    stack, advance, done = phases[phase_name]
                    advance(max(0, step + 1 - done))  # steps are counted from 0
                    phases[phase_name] = stack, advance, max(done, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                close(phase_name)

    try:
        yield Monitor()
    finally:
        with lock:
            for name in reversed(list(phases)):
                close(name)


def timing_cache_path(config: BuildConfig, machine: Machine) -> Path | None:
    """Return the file of the timing cache for a build, or None; by default there is one per GPU, CUDA and TensorRT."""
    # level 0 measures nothing, and neither does TensorRT-RTX
    if config.timing_cache == "none" or config.optimization_level == 0 or config.rtx:
        return None
    if config.timing_cache is not None:
        return config.timing_cache
    bound = f"{machine.gpu} sm{machine.compute_capability} cuda{machine.cuda} tensorrt{machine.tensorrt}"
    name = re.sub(r"[^\w.]+", "-", bound)
    return user_cache_path("clusterq-deploy", appauthor=False) / "timing" / f"{name}.cache"


def use_timing_cache(options: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Let the builder use and extend the cache at `path`, or an empty one if it is for another machine or damaged."""
    cache: trt.ITimingCache | None = options.create_timing_cache(_read_cache(path))
    if cache is not None and options.set_timing_cache(cache, False):
        return cache
    logger.warning("the timing cache %s is of another machine or damaged: a new one is started", path)
    tensorrt_log().errors.clear()
    empty: trt.ITimingCache = options.create_timing_cache(b"")
    options.set_timing_cache(empty, False)
    return empty


def save_timing_cache(options: trt.IBuilderConfig, cache: trt.ITimingCache, path: Path) -> None:
    """Write the cache to `path`, merged with that of other builds since; a failure is a warning: it costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
            others: trt.ITimingCache | None = options.create_timing_cache(_read_cache(path))
            if others is not None:
                cache.combine(others, False)  # ignores entries of another machine, and those of both
            serialized: trt.IHostMemory | None = cache.serialize()
            if serialized is not None:
                write_bytes(path, memoryview(serialized))
    except (OSError, NotImplementedError, RunDirectoryError) as error:  # filelock: a file system without locks
        logger.warning("the timing cache %s is not saved: %s", path, error)


def _read_cache(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        logger.warning("the timing cache %s cannot be read: %s", path, error.strerror)
        return b""
