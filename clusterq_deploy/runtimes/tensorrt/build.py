"""Build a TensorRT engine from an ONNX graph with explicit Q/DQ."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calib.support.progress import Progress
from clusterq_deploy.errors import EngineError
from clusterq_deploy.files import sha256_file, write_bytes, write_text
from clusterq_deploy.runtimes.tensorrt.availability import require_tensorrt
from clusterq_deploy.runtimes.tensorrt.config import BuildConfig
from clusterq_deploy.runtimes.tensorrt.log import explained, failure, tensorrt_log
from clusterq_deploy.runtimes.tensorrt.monitor import Phases, interruptible, progress_monitor
from clusterq_deploy.runtimes.tensorrt.parse import parse
from clusterq_deploy.runtimes.tensorrt.sidecar import EngineInfo, require_compatible, sidecar_path, this_machine
from clusterq_deploy.runtimes.tensorrt.timing import keep_timing_cache, timing_cache_path, use_timing_cache

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

__all__ = ["BuildConfig", "EngineInfo", "build_engine"]


def build_engine(
    onnx_path: Path, engine_path: Path, config: BuildConfig, progress: Progress, *, derived_from: Path | None = None
) -> EngineInfo:
    """Build an engine for the current CUDA device, and write it with its sidecar.

    The network is strongly typed: every precision is the graph's own. Both files appear whole or not at all;
    the sidecar comes last, and holds the engine's digest. Ctrl-C cancels the build, and leaves nothing behind.

    Args:
        onnx_path: the graph; of its inputs only the batch dimension may be dynamic.
        engine_path: where the engine goes; the sidecar goes to the same name with `.json` behind it.
        config: how to build.
        progress: shows one task of two steps, parsing and building, and in it TensorRT's own phases, which nest; tasks
            are opened and closed in several threads.
        derived_from: the file that the graph was made of, such as a quantized one whose FP16 baseline it is; the
            sidecar names it in the graph's place.

    Raises:
        TensorRTMissing: there is no TensorRT, or no NVIDIA GPU.
        EngineError: TensorRT cannot parse the graph, or cannot build it; or not as this GPU allows.
        RunDirectoryError: the graph cannot be read, or the engine cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; so does any exception of a signal handler end a build.
    """
    require_tensorrt()
    import tensorrt as trt

    started = time.perf_counter()
    source, machine = derived_from or onnx_path, this_machine()
    require_compatible(machine, config)
    source_sha256 = sha256_file(source)
    with (
        progress.task(f"build {engine_path.name}", total=2) as advance,
        Phases(progress) as phases,
        explained(f"build {source}"),
    ):
        builder: trt.Builder = trt.Builder(tensorrt_log())
        network: trt.INetworkDefinition = builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        # The parser owns the weights that the network points to: it has to live until the engine is built.
        parser: trt.OnnxParser = trt.OnnxParser(network, tensorrt_log())
        parse(parser, onnx_path, source)
        options: trt.IBuilderConfig
        options, taken = _builder_config(builder, network, config, source)
        cache_path = timing_cache_path(config, machine)
        cache = None if cache_path is None else use_timing_cache(options, cache_path)
        advance()
        plan: trt.IHostMemory | None = _build(builder, network, options, phases)
        if not plan:
            raise failure(f"TensorRT cannot build {source}")
        advance()

    if taken != config and "batch" in config.model_fields_set and derived_from is None:
        logger.warning(
            "%s fixes the batch at %d; the batch sizes %s do not count", source, taken.batch[0], config.batch
        )
    engine = memoryview(plan)
    info = EngineInfo(
        built_on=machine,
        source=source.name,
        source_sha256=source_sha256,
        derived=derived_from is not None,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        size_bytes=engine.nbytes,
        options=taken,
        seconds=time.perf_counter() - started,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    sidecar_path(engine_path).unlink(missing_ok=True)  # that of an earlier engine
    write_bytes(engine_path, engine)
    try:
        write_text(sidecar_path(engine_path), info.model_dump_json(indent=2) + "\n")
    except BaseException:
        engine_path.unlink(missing_ok=True)
        raise
    if cache_path is not None:
        keep_timing_cache(options, cache, cache_path)
    return info


def _build(
    builder: trt.Builder, network: trt.INetworkDefinition, options: trt.IBuilderConfig, phases: Phases
) -> trt.IHostMemory | None:
    """The serialized engine, None where TensorRT gives up; an exception of a signal handler cancels the build."""
    cancelled = threading.Event()
    options.progress_monitor = progress_monitor(phases, cancelled)
    device = torch.cuda.current_device()

    def work() -> trt.IHostMemory | None:
        torch.cuda.set_device(device)  # each thread has a current device of its own
        return builder.build_serialized_network(network, options)

    return interruptible(work, cancelled.set)


def _builder_config(
    builder: trt.Builder, network: trt.INetworkDefinition, config: BuildConfig, onnx_path: Path
) -> tuple[trt.IBuilderConfig, BuildConfig]:
    """TensorRT's own configuration, and ours with the batch sizes that the engine will take."""
    import tensorrt as trt

    options: trt.IBuilderConfig = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    options.builder_optimization_level = config.optimization_level
    options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector names layers and their types
    if config.version_compatible:
        options.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        options.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return options, _with_batch(builder, network, options, config, onnx_path)


def _with_batch(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    options: trt.IBuilderConfig,
    config: BuildConfig,
    onnx_path: Path,
) -> BuildConfig:
    """Give every dynamic input its smallest, tuned-for and largest shape; a graph that fixes the batch has no profile.

    The configuration with the batch sizes that the engine takes.
    """
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    batches = []
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        batch, *rest = tensor.shape
        if -1 in rest:
            raise EngineError(
                f"input {tensor.name} of {onnx_path} has shape {(batch, *rest)}; "
                "only the first dimension, the batch, may be dynamic (-1)"
            )
        if batch == -1:
            profile.set_shape(tensor.name, *((size, *rest) for size in config.batch))
        batches.append(batch)
    if -1 in batches:
        if options.add_optimization_profile(profile) < 0:
            raise failure(f"TensorRT refuses the batch sizes {config.batch} for {onnx_path}")
        return config
    if not batches:
        raise EngineError(f"{onnx_path} has no input")
    return config.model_copy(update={"batch": (batches[0],) * 3})
