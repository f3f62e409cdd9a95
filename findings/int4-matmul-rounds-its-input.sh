#!/usr/bin/env bash
# Expected: weights in INT4, dequantized in blocks in front of a MatMul, are stored more compactly; the product is that of
#   the dequantized weights and the float input, up to float32's rounding. Optimizations of a graph change its speed.
# Seen (ONNX Runtime 1.31.1, CPU): from the default optimization level on, both become one MatMulNBits that also rounds
#   the input to 8 bits. The product is off by a hundredth of its standard deviation, without a word. The session entry
#   session.qdq_matmulnbits_accuracy_level = "1" keeps the input in float32; it is set by the user of the file only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6

cat >look.py <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

INPUTS, OUTPUTS, BLOCK = 64, 32, 32
ENTRY = "session.qdq_matmulnbits_accuracy_level"
rng = np.random.default_rng(0)
integers = rng.integers(-8, 8, (INPUTS, OUTPUTS))
steps = (rng.random((INPUTS // BLOCK, OUTPUTS)) * 0.1 + 0.01).astype(np.float32)
x = rng.normal(size=(4, INPUTS)).astype(np.float32)
right = x @ (integers * np.repeat(steps, BLOCK, axis=0)).astype(np.float32)

nodes = [
    helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0, block_size=BLOCK),
    helper.make_node("MatMul", ["x", "wd"], ["out"]),
]
stored = [
    helper.make_tensor("w", TensorProto.INT4, (INPUTS, OUTPUTS), integers.flatten().tolist()),
    numpy_helper.from_array(steps, "s"),
]
ends = [helper.make_tensor_value_info(name, 1, [4, size]) for name, size in (("x", INPUTS), ("out", OUTPUTS))]
graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def error(optimized, level):
    """Return the largest error of a session, in standard deviations of the product."""
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if level:
        options.add_session_config_entry(ENTRY, level)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, {"x": x})[0] - right).max() / right.std())


found = {
    "no optimization": error(optimized=False, level=None),
    "as it is": error(optimized=True, level=None),
    f"{ENTRY} = 1": error(optimized=True, level="1"),
}
print(f"ONNX Runtime {onnxruntime.__version__}, numpy {np.__version__}: error of the product, in standard deviations")
for name, value in found.items():
    print(f"{name:50} {value:.6f}")
exact, default, told = found.values()
sys.exit(0 if exact < 1e-5 and told < 1e-5 and 3e-3 < default < 0.1 else "this is not what was seen before")
PYTHON
venv/bin/python look.py
