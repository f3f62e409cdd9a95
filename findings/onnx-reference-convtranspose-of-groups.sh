#!/usr/bin/env bash
# Expected: ONNX's own reference evaluator, which says what an operator means, computes a ConvTranspose of several groups
#   as runtimes do: group g of the outputs from group g of the inputs, plus the bias of each output channel.
# Seen (onnx 1.23.2): with a bias, every group gets the first group's; with two output channels a group it raises
#   ValueError. ONNX Runtime 1.31.1 computes both as defined. A graph with such a layer cannot be checked against the
#   reference; one group, or groups of one channel without a bias, can.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cat >look.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

CHANNELS, SIDE = 4, 5
rng = np.random.default_rng(0)
x = rng.normal(size=(2, CHANNELS, SIDE, SIDE)).astype(np.float32)


def model(groups, outputs, bias):
    """Return a ConvTranspose with a kernel of 2 x 2 pixels that makes `outputs` channels in each group."""
    stored = [numpy_helper.from_array(rng.normal(size=(CHANNELS, outputs, 2, 2)).astype(np.float32), "w")]
    if bias:
        stored.append(numpy_helper.from_array(np.arange(groups * outputs, dtype=np.float32), "b"))
    node = helper.make_node("ConvTranspose", ["x", *(s.name for s in stored)], ["y"], group=groups)
    ends = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape), helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph([node], "graph", [ends[0]], [ends[1]], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_hand(proto):
    """Return what the operator is defined to compute: each value, times the kernel, is added where it stands."""
    weight, *biases = (numpy_helper.to_array(tensor) for tensor in proto.graph.initializer)
    groups, inputs = proto.graph.node[0].attribute[0].i, CHANNELS // proto.graph.node[0].attribute[0].i
    y = np.zeros((len(x), groups * weight.shape[1], SIDE + 1, SIDE + 1))
    for c in range(CHANNELS):
        outputs = slice(c // inputs * weight.shape[1], (c // inputs + 1) * weight.shape[1])
        for i, j in np.ndindex(2, 2):
            y[:, outputs, i : i + SIDE, j : j + SIDE] += x[:, c : c + 1] * weight[c, :, i, j][:, None, None]
    return y + (biases[0][:, None, None] if biases else 0)


def error(proto, answer):
    """Return the largest error of an evaluator, or the name of what it raises."""
    try:
        return float(np.abs(answer(proto) - by_hand(proto)).max())
    except ValueError as raised:
        return type(raised).__name__


evaluators = {
    "reference": lambda proto: ReferenceEvaluator(proto).run(None, {"x": x})[0],
    "runtime": lambda proto: onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, {"x": x})[0],
}
print(f"onnx {onnx.__version__}, ONNX Runtime {onnxruntime.__version__}: largest error of each")
found = []
for groups, outputs, bias in [(1, 4, True), (4, 1, False), (4, 1, True), (2, 2, False)]:
    proto = model(groups, outputs, bias)
    errors = {name: error(proto, answer) for name, answer in evaluators.items()}
    found.append(errors)
    print(f"{groups} groups of {outputs} outputs, {'with' if bias else 'no'} bias: {errors}")
right = all(errors["runtime"] < 1e-5 for errors in found) and all(e["reference"] < 1e-5 for e in found[:2])
seen = right and found[2]["reference"] > 0.5 and found[3]["reference"] == "ValueError"
sys.exit(0 if seen else "this is not what was seen before")
PYTHON
venv/bin/python look.py
