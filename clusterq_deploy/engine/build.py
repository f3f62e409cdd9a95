"""Build a TensorRT engine from an ONNX graph with explicit Q/DQ."""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from calib.progress import Progress
from clusterq_deploy.engine.availability import require_tensorrt
from clusterq_deploy.engine.config import BuildConfig
from clusterq_deploy.engine.log import explained, failure, tensorrt_log
from clusterq_deploy.engine.sidecar import EngineInfo, sidecar_path, this_machine
from clusterq_deploy.errors import EngineError, RunDirectoryError
from clusterq_deploy.files import sha256_file, write_bytes, write_text

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BuildConfig", "EngineInfo", "build_engine"]

logger = logging.getLogger(__name__)


def build_engine(onnx_path: Path, engine_path: Path, config: BuildConfig, progress: Progress) -> EngineInfo:
    """Build an engine for the current CUDA device, and write it with its sidecar.

    The network is strongly typed: every precision is the graph's own. Both files appear whole or not at all;
    the sidecar comes last, and holds the engine's digest.

    Args:
        onnx_path: the graph; of its inputs only the batch dimension may be dynamic.
        engine_path: where the engine goes; the sidecar goes to the same name with `.json` behind it.
        config: how to build.
        progress: shows one task of two steps, parsing and building.

    Raises:
        TensorRTMissing: there is no TensorRT, or no NVIDIA GPU.
        EngineError: TensorRT cannot parse the graph, or cannot build it.
        RunDirectoryError: the graph cannot be read, or the engine cannot be written.
    """
    require_tensorrt()
    import tensorrt as trt

    started = time.perf_counter()
    source_sha256 = sha256_file(onnx_path)
    with progress.task(f"build {engine_path.name}", total=2) as advance, explained(f"build {onnx_path}"):
        builder: trt.Builder = trt.Builder(tensorrt_log())
        network: trt.INetworkDefinition = builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        # The parser owns the weights that the network points to: it has to live until the engine is built.
        parser: trt.OnnxParser = trt.OnnxParser(network, tensorrt_log())
        _parse(parser, onnx_path)
        options: trt.IBuilderConfig = _builder_config(builder, network, config, onnx_path)
        cache: trt.ITimingCache | None = _timing_cache(options, config.timing_cache)
        advance()
        plan: trt.IHostMemory | None = builder.build_serialized_network(network, options)
        if not plan:
            raise failure(f"TensorRT cannot build {onnx_path}")
        advance()

    engine = memoryview(plan)
    info = EngineInfo(
        built_on=this_machine(),
        source=onnx_path.name,
        source_sha256=source_sha256,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        size_bytes=engine.nbytes,
        options=config,
        seconds=time.perf_counter() - started,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    write_bytes(engine_path, engine)
    write_text(sidecar_path(engine_path), info.model_dump_json(indent=2) + "\n")
    if cache is not None and config.timing_cache is not None:
        _save_timing_cache(cache, config.timing_cache)
    return info


def _parse(parser: trt.OnnxParser, onnx_path: Path) -> None:
    """Parse the graph into the parser's network; all that is wrong with it goes into one EngineError."""
    parsed: bool = parser.parse_from_file(str(onnx_path))
    if parsed:
        return
    problems = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        node = f"{error.node_name() or 'unnamed node'} ({error.node_operator() or 'no operator'})"
        description: str = error.desc()
        problems.append(f"{node}: {' '.join(description.split())}")
    raise EngineError(f"TensorRT cannot parse {onnx_path}: {'; '.join(problems) or 'no reason given'}")


def _builder_config(
    builder: trt.Builder, network: trt.INetworkDefinition, config: BuildConfig, onnx_path: Path
) -> trt.IBuilderConfig:
    import tensorrt as trt

    options: trt.IBuilderConfig = builder.create_builder_config()
    options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
    options.builder_optimization_level = config.optimization_level
    if config.version_compatible:
        options.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        options.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    _add_batch_profile(builder, network, options, config, onnx_path)
    return options


def _add_batch_profile(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    options: trt.IBuilderConfig,
    config: BuildConfig,
    onnx_path: Path,
) -> None:
    """Give every dynamic input its smallest, tuned-for and largest shape; without one there is no profile."""
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    dynamic = False
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
            dynamic = True
    if dynamic and options.add_optimization_profile(profile) < 0:
        raise failure(f"TensorRT refuses the batch sizes {config.batch} for {onnx_path}")


def _timing_cache(options: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    """Let the builder use, and add to, the measurements kept at `path` if they are of this machine."""
    if path is None:
        return None
    kept = b""
    if path.exists():
        try:
            kept = path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(f"cannot read {path}: {error.strerror}") from error
    cache: trt.ITimingCache | None = options.create_timing_cache(kept)
    if cache is not None and options.set_timing_cache(cache, False):
        return cache
    logger.warning("the timing cache %s is of another machine or damaged: it is started afresh", path)
    tensorrt_log().errors.clear()
    empty: trt.ITimingCache = options.create_timing_cache(b"")
    options.set_timing_cache(empty, False)
    return empty


def _save_timing_cache(cache: trt.ITimingCache, path: Path) -> None:
    serialized: trt.IHostMemory = cache.serialize()
    try:
        write_bytes(path, memoryview(serialized))
    except RunDirectoryError as error:  # the engine is complete, and the cache only saves time
        logger.warning("the timing cache is not kept: %s", error)
