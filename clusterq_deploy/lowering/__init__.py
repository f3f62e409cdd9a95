"""Make the ONNX graphs that targets run from a quantized torch model: trace, lower, verify, check."""

from clusterq_deploy.lowering.fp16 import fp16_baseline, to_fp16, to_tensorrt_rtx
from clusterq_deploy.lowering.graphs import (
    FLOAT_FILE,
    FP16_FILE,
    VERIFIED_IMAGES,
    agreement,
    float_graphs,
    student_graphs,
)
from clusterq_deploy.lowering.integers import compare_integers, require_same_integers
from clusterq_deploy.lowering.lower import GraphFormat, lower, target_of
from clusterq_deploy.lowering.qdq import quantized_layers
from clusterq_deploy.lowering.saturation import check_saturation, pair_sums, require_no_saturation
from clusterq_deploy.lowering.torch_export import annotate, export_graph
from clusterq_deploy.lowering.trt_rules import RULES, check_tensorrt, require_tensorrt
from clusterq_deploy.lowering.verify import verify

__all__ = [
    "FLOAT_FILE",
    "FP16_FILE",
    "RULES",
    "VERIFIED_IMAGES",
    "GraphFormat",
    "agreement",
    "annotate",
    "check_saturation",
    "check_tensorrt",
    "compare_integers",
    "export_graph",
    "float_graphs",
    "fp16_baseline",
    "lower",
    "pair_sums",
    "quantized_layers",
    "require_no_saturation",
    "require_same_integers",
    "require_tensorrt",
    "student_graphs",
    "target_of",
    "to_fp16",
    "to_tensorrt_rtx",
    "verify",
]
