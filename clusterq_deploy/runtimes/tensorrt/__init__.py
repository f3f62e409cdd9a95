"""Engines of TensorRT and TensorRT-RTX: build them from ONNX, load them, run and time them.

Importing this package needs no library and no GPU; `build_problem` and `unavailable_reason` report if the rest works.
Only names that TensorRT 10.3 to 11.4 and TensorRT-RTX share are used, and of TensorRT-RTX those that choose the GPUs:
objects of the libraries have their class as an annotation, and a test checks their attributes against the public
members of those releases.
"""

from clusterq_deploy.runtimes.tensorrt.build import build_engine
from clusterq_deploy.runtimes.tensorrt.gpu import build_problem, require, unavailable_reason
from clusterq_deploy.runtimes.tensorrt.inspect import parse_layers, summarize_layers
from clusterq_deploy.runtimes.tensorrt.library import RTX_TARGETS, TURING, Library, library_version
from clusterq_deploy.runtimes.tensorrt.runner import TensorRTRunner
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig, EngineInfo, read_sidecar, sidecar_path, this_machine

__all__ = [
    "RTX_TARGETS",
    "TURING",
    "BuildConfig",
    "EngineInfo",
    "Library",
    "TensorRTRunner",
    "build_engine",
    "build_problem",
    "library_version",
    "parse_layers",
    "read_sidecar",
    "require",
    "sidecar_path",
    "summarize_layers",
    "this_machine",
    "unavailable_reason",
]
