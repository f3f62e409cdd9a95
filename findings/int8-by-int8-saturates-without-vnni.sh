#!/usr/bin/env bash
# Expected: with zero-point 0 on both sides INT8 times INT8 is safe on x86 without VNNI, as two products of at most
#   127 * 127 fit 16 bits; UINT8 weights, with products of up to 255 * 255, are the dangerous ones; and depthwise
#   convolutions are summed as all others are.
# Seen (ONNX Runtime 1.31.1, OpenVINO 2026.4.0; a layer of weights 127 on activations 127): the other way round. Both add
#   128 to INT8 activations and multiply UINT8 by INT8 in pairs of 16 bits, so that next to nothing is left of the sum.
#   UINT8 weights are exact (OpenVINO convolves them in float), and so are depthwise convolutions.
# Needs an x86 CPU without VNNI, or one that Linux can let hide it (cpuid_fault in /proc/cpuinfo), and gcc; else exit 77.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime==1.31.1 openvino==2026.4.0 onnx==1.23.0 numpy==2.4.6

hide=""
if grep -q -E "avx512_vnni|avx_vnni" /proc/cpuinfo; then
  if ! grep -q cpuid_fault /proc/cpuinfo || ! command -v gcc >/dev/null; then
    echo "this CPU has VNNI and cannot hide it: nothing to be seen here"
    exit 77
  fi
  cat >hide.c <<'C'
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
static void set(long allowed) { syscall(SYS_arch_prctl, 0x1012, allowed); }
static void on_cpuid(int s, siginfo_t *i, void *c) {
    greg_t *g = ((ucontext_t *)c)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)g[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0xa2) { signal(SIGSEGV, SIG_DFL); return; }
    uint32_t leaf = g[REG_RAX], sub = g[REG_RCX], a, b, x, d;
    set(1);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(x), "=d"(d) : "a"(leaf), "c"(sub));
    set(0);
    if (leaf == 7 && sub == 0) { a = 0; b &= ~0xdc230000u; x &= ~0x00005842u; d &= ~0x03c0010cu; }
    else if (leaf == 7) a = b = x = d = 0;
    else if (leaf == 0xd && sub == 0) a &= 7;
    g[REG_RAX] = a; g[REG_RBX] = b; g[REG_RCX] = x; g[REG_RDX] = d; g[REG_RIP] += 2;
}
__attribute__((constructor)) static void start(void) {
    struct sigaction own = {.sa_sigaction = on_cpuid, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &own, 0);
    set(0);
}
C
  gcc -O1 -shared -fPIC -o hide.so hide.c
  hide="$folder/hide.so"
fi

cat >look.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import helper, numpy_helper

STEP = 2.0**13


def graph(weight, x_type, groups):
    channels = weight.shape[1] * groups
    w_zero = weight.dtype.type(0 if weight.dtype == np.int8 else 128)
    constants = {"one": np.float32(1), "x0": x_type(0), "w": weight, "w0": w_zero, "wide": np.float32(STEP)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "x0"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "x0"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w0"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["y"], group=groups),
        helper.make_node("QuantizeLinear", ["y", "wide", "x0"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "wide", "x0"], ["out"]),
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, 1, [1, c, 8, 8]) for name, c in (("x", channels), ("out", len(weight)))]
    ends[1].type.tensor_type.shape.dim[2].dim_value = ends[1].type.tensor_type.shape.dim[3].dim_value = 6
    body = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


full = np.full((8, 8, 3, 3), 127, np.int8)
layers = {
    "INT8 x INT8": (full, np.int8, 1),
    "UINT8 x INT8": (full, np.uint8, 1),
    "INT8 x UINT8": (np.full((8, 8, 3, 3), 255, np.uint8), np.int8, 1),
    "INT8 x INT8, depthwise": (np.full((8, 1, 3, 3), 127, np.int8), np.int8, 8),
}
shares = {}
for name, (weight, x_type, groups) in layers.items():
    onnx.save(graph(weight, x_type, groups), "layer.onnx")
    x = np.full((1, 8, 8, 8), 127 if x_type is np.int8 else 255, np.float32)
    right = min(round(x.flat[0] * 127 * weight[0].size / STEP), 127 if x_type is np.int8 else 255) * STEP
    runtime = onnxruntime.InferenceSession("layer.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model("layer.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shares[name] = [float(np.median(own)) / right for own in (runtime.run(None, {"x": x})[0], compiled(x)[0])]
print(f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__}, numpy {np.__version__}, no VNNI")
print(f"{'activations x weights':24} {'ONNX Runtime':>14} {'OpenVINO':>10}  (share of the right sum)")
for name, (first, second) in shares.items():
    print(f"{name:24} {first:14.2f} {second:10.2f}")
as_seen = (
    all(share < 0.1 for share in shares["INT8 x INT8"])
    and all(0.4 < share < 0.6 for share in shares["UINT8 x INT8"])
    and all(share == 1 for name in ("INT8 x UINT8", "INT8 x INT8, depthwise") for share in shares[name])
)
sys.exit(0 if as_seen else "this is not what was seen before")
PYTHON
LD_PRELOAD="$hide" venv/bin/python look.py
