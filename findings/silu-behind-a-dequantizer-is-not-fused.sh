#!/usr/bin/env bash
# Expected: ONNX Runtime fuses x * sigmoid(x) to one kernel, QuickGelu, and a DequantizeLinear in front of it changes
#   nothing: in a quantized graph whose SiLU stays in float, each one is one pass over the map.
# Seen (ONNX Runtime 1.31.1): each reader of the DequantizeLinear is given a DequantizeLinear of its own, so that the
#   sigmoid and the product no longer read the same tensor, and neither is fused: four kernels instead of two. The mean
#   of squeeze-excite, written as ReduceMean, runs in float between its quantizers too; as GlobalAveragePool, which is
#   the same numbers, it runs on integers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6
cat >look.py <<'PYTHON'
from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print(f"ONNX Runtime {onnxruntime.__version__}, onnx {onnx.__version__}")
node = helper.make_node
PAIR = ["scale", "zero"]


def kernels(*nodes: onnx.NodeProto, last: str) -> Counter:
    """Return the operators that ONNX Runtime makes of a graph from `x` (1, 8, 4, 4)."""
    constants = [
        numpy_helper.from_array(np.float32(0.05), "scale"),
        numpy_helper.from_array(np.uint8(100), "zero"),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]
    used = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [tensor for tensor in constants if tensor.name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load("optimized.onnx").graph.node)


quantized = [node("QuantizeLinear", ["x", *PAIR], ["q"]), node("DequantizeLinear", ["q", *PAIR], ["d"])]
restored = [node("QuantizeLinear", ["y", *PAIR], ["yq"]), node("DequantizeLinear", ["yq", *PAIR], ["end"])]


def silu(x: str) -> list[onnx.NodeProto]:
    return [node("Sigmoid", [x], ["gate"]), node("Mul", [x, "gate"], ["y"])]


plain = kernels(*silu("x"), last="y")
behind = kernels(*quantized, *silu("d"), *restored, last="end")
reduced = kernels(*quantized, node("ReduceMean", ["d", "axes"], ["y"], keepdims=1), *restored, last="end")
pooled = kernels(*quantized, node("GlobalAveragePool", ["d"], ["y"]), *restored, last="end")
for name, found in {"SiLU": plain, "SiLU between quantizers": behind, "ReduceMean": reduced, "pool": pooled}.items():
    print(f"{name}: {dict(found)}")
assert plain == {"QuickGelu": 1}, plain
assert (behind["QuickGelu"], behind["Sigmoid"], behind["Mul"], behind["DequantizeLinear"]) == (0, 1, 1, 3), behind
assert reduced["ReduceMean"] == 1, reduced
assert pooled["QLinearGlobalAveragePool"] == 1, pooled
PYTHON
venv/bin/python look.py
echo "as described"
