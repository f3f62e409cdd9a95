#!/usr/bin/env bash
# Expected: an activation that is quantized with a scale per channel, which integer convolutions cannot add up, is refused
#   by the parser, or ignored where all its scales are the same number; a quantizer and its dequantizer that disagree
#   about the axis are an error.
# Seen (TensorRT-RTX 1.7.1, for sm86, by the builder's own table of kernels; no GPU is needed): the graph builds without a
#   warning, and the convolution reads float, even if all scales are equal. If the QuantizeLinear alone has scales per
#   channel and the DequantizeLinear one, it builds too, and the convolution is INT8.
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

CHANNELS, SIDE = 64, 56
rng = np.random.default_rng(0)


class Log(trt.ILogger):
    """Keeps the table of kernels that the builder logs, and counts warnings about scales."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.table, self.warnings = "", 0

    def log(self, severity, text):
        self.warnings += severity <= trt.ILogger.Severity.WARNING and "scale" in text.lower()
        if text.startswith("Layers:"):
            self.table = text


def network(quantizer, dequantizer):
    """Return a convolution whose input has one scale or one per channel, at each end, all of them equal."""
    weight = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    arrays = {"w": weight, "ws": np.array(0.01, np.float32), "z": np.array(0, np.int8)}
    arrays |= {"zs": np.zeros(CHANNELS, np.int8), "one": np.array(0.05, np.float32)}
    arrays["many"] = np.full(CHANNELS, 0.05, np.float32)
    first, second = ((name, "z" if name == "one" else "zs") for name in (quantizer, dequantizer))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *first], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", *second], ["d"], axis=1),
        helper.make_node("DequantizeLinear", ["w", "ws", "z"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shape = [1, CHANNELS, SIDE, SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def convolution(quantizer, dequantizer):
    """Return the type that the convolution's kernel reads, and how many warnings there were."""
    log = Log()
    log.min_severity = trt.ILogger.Severity.VERBOSE
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, config = trt.OnnxParser(definition, log), builder.create_builder_config()
    assert parser.parse(network(quantizer, dequantizer))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(definition, config) is not None
    (row,) = (line for line in log.table.splitlines() if "LayerType: correlation" in line)
    return re.search(r"Inputs: \[.*?Datatype: (\w+)", row)[1], log.warnings


cases = {ends: convolution(*ends) for ends in (("one", "one"), ("many", "many"), ("many", "one"))}
print(f"TensorRT-RTX {trt.__version__}, onnx {onnx.__version__}: what the convolution reads, and warnings about scales")
for (first, second), (kind, warnings) in cases.items():
    print(f"QuantizeLinear: {first}, DequantizeLinear: {second}: {kind}, {warnings}")
seen = {("one", "one"): "Int8", ("many", "many"): "Float", ("many", "one"): "Int8"}
same = all(cases[ends] == (kind, 0) for ends, kind in seen.items())
sys.exit(0 if same else "this is not what was seen before")
PYTHON
venv/bin/python look.py
