#!/usr/bin/env bash
# Expected: a convolution between DequantizeLinear and QuantizeLinear runs on integers, whatever 8-bit type the graph
#   uses; a ReLU or a clip in between is fused too, as the range of the quantizer contains it.
# Seen (ONNX Runtime 1.31.1, CPU): behind a ReLU only UINT8 runs on integers. With INT8 and zero-point 0 (the only kind
#   that TensorRT accepts) the same convolution runs in float, between quantizers that now only cost time. A clip that is
#   narrower than the quantizer's range does the same to UINT8; a clip of the integers behind the quantizer leaves UINT8
#   on integers, and INT8 in float.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6

cat >look.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

WEIGHT = np.random.default_rng(0).integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)


def runs_on_integers(kind, between, behind):
    """Return whether the convolution became a QLinearConv in the graph that ONNX Runtime executes."""
    constants = {"s": np.float32(0.05), "z": kind(0), "w": WEIGHT, "ws": np.float32(0.01), "wz": np.int8(0)}
    constants |= {"ys": np.float32(0.5), "low": np.float32(0), "high": np.float32(7.5)}
    constants |= {"ilow": kind(0), "ihigh": kind(15)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["y"]),
    ]
    last = "y"
    if between:
        ends = ["low", "high"] if between == "Clip" else []
        nodes.append(helper.make_node(between, [last, *ends], ["f"]))
        last = "f"
    nodes.append(helper.make_node("QuantizeLinear", [last, "ys", "z"], ["yq"]))
    last = "yq"
    if behind:
        nodes.append(helper.make_node(behind, [last, "ilow", "ihigh"], ["yc"]))
        last = "yc"
    nodes.append(helper.make_node("DequantizeLinear", [last, "ys", "z"], ["out"]))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    x, out = (helper.make_tensor_value_info(n, 1, [1, 8, side, side]) for n, side in (("x", 8), ("out", 6)))
    graph = helper.make_graph(nodes, "graph", [x], [out], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "optimized.onnx", 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return "QLinearConv" in {node.op_type for node in onnx.load("optimized.onnx").graph.node}


CASES = {("", ""): "nothing", ("Relu", ""): "ReLU", ("Clip", ""): "Clip to 0..15 steps", ("", "Clip"): "integer Clip behind"}
SEEN = {np.uint8: [True, True, False, True], np.int8: [True, False, False, False]}
print(f"ONNX Runtime {onnxruntime.__version__}, onnx {onnx.__version__}: does the convolution run on integers?")
found = {kind: [runs_on_integers(kind, *case) for case in CASES] for kind in SEEN}
for kind, answers in found.items():
    for name, answer in zip(CASES.values(), answers, strict=True):
        print(f"{kind.__name__:6} {name:20} {'integers' if answer else 'float'}")
sys.exit(0 if found == SEEN else "this is not what was seen before")
PYTHON
venv/bin/python look.py
