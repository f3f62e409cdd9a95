#!/usr/bin/env bash
# Expected: a convolution in INT8 between two quantizers, with a step per output channel, is one kernel that reads INT8 and
#   writes INT8, as TensorRT has them; a network whose scales are FP16 writes nothing wider than FP16 in between.
# Seen (TensorRT-RTX 1.7.1, for sm86, by the builder's own table of kernels; no GPU is needed): it writes FP32 to memory,
#   and a second kernel rounds, even if every scale is FP16. With one step for the whole weight it writes FP16. For sm75
#   the same graph builds, and the convolution reads FP16: nothing of it is INT8.
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
    """Keeps the table of kernels that the builder logs."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.table = ""

    def log(self, severity, text):
        if text.startswith("Layers:"):
            self.table = text


def network(per_channel):
    """Return quantizer, convolution, quantizer, with FP16 scales."""
    count = (CHANNELS,) if per_channel else ()
    weight = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    arrays = {"w": weight, "ws": np.full(count, 0.01, np.float16), "wz": np.zeros(count, np.int8)}
    arrays |= {"s": np.array(0.05, np.float16), "z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]),
    ]
    shape = [1, CHANNELS, SIDE, SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def convolution(per_channel, target):
    """Return the types that the convolution's kernel reads and writes."""
    log = Log()
    log.min_severity = trt.ILogger.Severity.VERBOSE
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, config = trt.OnnxParser(definition, log), builder.create_builder_config()
    assert parser.parse(network(per_channel))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    assert builder.build_serialized_network(definition, config) is not None
    (row,) = (line for line in log.table.splitlines() if "LayerType: correlation" in line)
    read = re.search(r"Inputs: \[.*?Datatype: (\w+)", row)[1]
    return read, re.search(r"Outputs: \[.*?Datatype: (\w+)", row)[1]


cases = {(per_channel, target): convolution(per_channel, target) for per_channel in (True, False) for target in ("SM86", "SM75")}
print(f"TensorRT-RTX {trt.__version__}, onnx {onnx.__version__}: what a quantized convolution reads and writes")
for (per_channel, target), types in cases.items():
    print(f"{target}, {'a step per output channel' if per_channel else 'one step'}: {' -> '.join(types)}")
seen = {(True, "SM86"): ("Int8", "Float"), (False, "SM86"): ("Int8", "Half")}
same = all(cases[case] == types for case, types in seen.items()) and all(cases[c, "SM75"][0] == "Half" for c in (True, False))
sys.exit(0 if same else "this is not what was seen before")
PYTHON
venv/bin/python look.py
