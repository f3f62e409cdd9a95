"""The timing cache: what the builder measured of each layer, kept from one build to the next."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from platformdirs import user_cache_path

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.files import write_bytes
from clusterq_deploy.runtimes.tensorrt.config import BuildConfig
from clusterq_deploy.runtimes.tensorrt.log import tensorrt_log
from clusterq_deploy.runtimes.tensorrt.sidecar import Machine

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 30


def timing_cache_path(config: BuildConfig, machine: Machine) -> Path | None:
    """The file of the cache that a build on `machine` uses; None where it uses none.

    By default every GPU model, CUDA and TensorRT release has a file of its own, for what was measured is bound to them.
    """
    if config.timing_cache == "none" or config.optimization_level == 0:  # level 0 takes no measurements
        return None
    if isinstance(config.timing_cache, Path):
        return config.timing_cache
    bound = f"{machine.gpu} sm{machine.compute_capability} cuda{machine.cuda} tensorrt{machine.tensorrt}"
    name = re.sub(r"[^\w.]+", "-", bound)
    return user_cache_path("clusterq-deploy", appauthor=False) / "timing" / f"{name}.cache"


def use_timing_cache(options: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Let the builder use, and add to, what is kept at `path`; of another machine or damaged, it starts afresh."""
    cache: trt.ITimingCache | None = options.create_timing_cache(_kept(path))
    if cache is not None and options.set_timing_cache(cache, False):
        return cache
    logger.warning("the timing cache %s is of another machine or damaged: it is started afresh", path)
    tensorrt_log().errors.clear()
    empty: trt.ITimingCache = options.create_timing_cache(b"")
    options.set_timing_cache(empty, False)
    return empty


def keep_timing_cache(options: trt.IBuilderConfig, cache: trt.ITimingCache, path: Path) -> None:
    """Write the cache to `path`, together with what other builds have written there meanwhile.

    A failure is a warning: the engine is complete, and the cache only saves time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
            others: trt.ITimingCache | None = options.create_timing_cache(_kept(path))
            if others is not None:
                cache.combine(others, False)  # leaves out what is of another machine, or measured by both
            serialized: trt.IHostMemory | None = cache.serialize()
            if serialized is not None:
                write_bytes(path, memoryview(serialized))
    except (OSError, NotImplementedError, RunDirectoryError) as error:  # filelock: a file system without locks
        logger.warning("the timing cache %s is not kept: %s", path, error)


def _kept(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        logger.warning("the timing cache %s cannot be read: %s", path, error.strerror)
        return b""
