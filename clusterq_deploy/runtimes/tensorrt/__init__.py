"""TensorRT engines: build them from ONNX, load them, run and time them.

Importing this package needs neither TensorRT nor a GPU; `unavailable_reason` reports if the rest works here.
Only names that TensorRT 10.3 to 11.4 share are used: objects of TensorRT have their class as an annotation, and a test
checks their attributes against the public members of those releases.
"""

from clusterq_deploy.runtimes.tensorrt.build import build_engine
from clusterq_deploy.runtimes.tensorrt.gpu import unavailable_reason
from clusterq_deploy.runtimes.tensorrt.inspect import parse_layers, summarize_layers
from clusterq_deploy.runtimes.tensorrt.runner import TensorRTRunner
from clusterq_deploy.runtimes.tensorrt.sidecar import BuildConfig, EngineInfo, read_sidecar, sidecar_path, this_machine

__all__ = [
    "BuildConfig",
    "EngineInfo",
    "TensorRTRunner",
    "build_engine",
    "parse_layers",
    "read_sidecar",
    "sidecar_path",
    "summarize_layers",
    "this_machine",
    "unavailable_reason",
]
