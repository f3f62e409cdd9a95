#!/usr/bin/env bash
# Expected: an engine that is built ahead of time for several families of GPUs has code for each of them: to name another
#   family makes the file larger, and leaves what the others do.
# Seen (TensorRT-RTX 1.7.1, by the builder's own table of kernels; no GPU is needed): there is one plan for all families.
#   The first FP16 convolution of an RGB image pads it to 4 channels for sm86, and to 8 as soon as sm75 is named too, so
#   that every GPU reads twice as much of it. Convolutions of 64 channels are planned alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnx==1.23.2 numpy==2.4.6
venv/bin/pip install --quiet --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu12==0.5.0 tensorrt-rtx-cu12-bindings==1.7.1.116

cat >look.py <<'PYTHON'
import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

package = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx").submodule_search_locations[0]
for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
    for file in Path(package).glob(pattern):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt


class Log(trt.ILogger):
    """Keeps the table of kernels that the builder logs."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.table = ""

    def log(self, severity, text):
        if text.startswith("Layers:"):
            self.table = text


def network(channels):
    """Return a graph of one FP16 convolution, 7x7 with stride 2, to 64 channels."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.05, (64, channels, 7, 7)).astype(np.float16), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[3] * 4)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("x", [1, channels, 224, 224]), ("y", [1, 64, 112, 112]))
    ]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def channels_read(channels, *targets):
    """Return how many channels the convolution's kernel reads, in an engine for these families."""
    log = Log()
    log.min_severity = trt.ILogger.Severity.VERBOSE
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, config = trt.OnnxParser(definition, log), builder.create_builder_config()
    assert parser.parse(network(channels))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    assert builder.build_serialized_network(definition, config) is not None
    (row,) = (line for line in log.table.splitlines() if "LayerType: correlation" in line)
    return int(re.search(r"Dimensions: \[1,(\d+),", row)[1])


asked = ((3, "sm86"), (3, "sm86", "sm120"), (3, "sm86", "sm75"), (64, "sm86"), (64, "sm86", "sm75"))
read = [channels_read(*case) for case in asked]
print(f"TensorRT-RTX {trt.__version__}, onnx {onnx.__version__}: channels that the convolution reads")
for (channels, *targets), number in zip(asked, read):
    print(f"{channels} in the graph, for {', '.join(targets)}: {number}")
sys.exit(0 if read == [4, 4, 8, 64, 64] else "this is not what was seen before")
PYTHON
venv/bin/python look.py
