"""Students of the small nets, calibrated and exported, and helpers to look into their graphs and change them."""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import calibrated
from onnx import numpy_helper

from clusterq_deploy.lowering import GraphFormat, export_graph, lower, target_of
from clusterq_deploy.quantization import Student
from clusterq_deploy.quantization.grid import Cpu
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner
from clusterq_deploy.runtimes.tensorrt.library import library_problem

SIZE = (3, 16, 16)
_MISSING = library_problem("tensorrt_rtx")
needs_compiler = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
"""Marks a test that asks the real parser and compiler of TensorRT-RTX, which need no GPU."""

GRAPH_FORMATS: tuple[GraphFormat, ...] = ("onnxruntime", "tensorrt", "int4")


@cache
def exported(name: str, bits: str = "w4a4", cpu: Cpu = "any") -> tuple[Student, onnx.ModelProto]:
    """Return a student of a net of `NETS` and its graph with markers; not to be changed."""
    student = calibrated(name, bits, cpu=cpu)
    return student, export_graph(student, SIZE)


def graph_of(
    name: str, graph_format: GraphFormat, bits: str = "w4a4", cpu: Cpu = "any"
) -> tuple[Student, onnx.ModelProto]:
    """Return a student of a net of `NETS` and its graph in a format, the caller's to change."""
    student, marked = exported(name, bits, cpu)
    return student, lower(marked, student, graph_format)


def reference(student: Student, graph_format: GraphFormat, batch: torch.Tensor) -> np.ndarray:
    """Return torch's logits for the target of a format."""
    with student.for_target(target_of(graph_format)):
        return TorchRunner(student).infer(batch.numpy())


def infer(graph: onnx.ModelProto, batch: np.ndarray, *, optimized: bool = False) -> np.ndarray:
    """Return the logits of a graph in ONNX Runtime."""
    with OnnxRunner(graph.SerializeToString(), optimized=optimized) as runner:
        return runner.infer(batch)


def optimized_operators(graph: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Count the operators that ONNX Runtime makes of a graph."""
    with OnnxRunner(graph.SerializeToString(), write_optimized=folder / "optimized.onnx"):
        return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def initializers(graph: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return the stored tensors by name."""
    return {tensor.name: tensor for tensor in graph.graph.initializer}


def stored(graph: onnx.ModelProto, name: str) -> np.ndarray:
    """Return a copy of a stored tensor's values."""
    return numpy_helper.to_array(initializers(graph)[name]).copy()


def with_stored(graph: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    """Return a copy of a graph with other values in a stored tensor."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    initializers(changed)[name].CopyFrom(numpy_helper.from_array(values, name))
    return changed


def producers(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each tensor, by the tensor's name."""
    return {output: node for node in graph.graph.node for output in node.output}
