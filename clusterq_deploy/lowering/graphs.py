"""Export every graph of a model, each verified against torch before it may be written."""

from collections.abc import Collection, Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from torch import nn

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import ExportError
from clusterq_deploy.lowering.fp16 import to_fp16
from clusterq_deploy.lowering.integers import compare_integers, require_same_integers
from clusterq_deploy.lowering.lower import GraphFormat, lower, target_of
from clusterq_deploy.lowering.torch_export import export_graph
from clusterq_deploy.lowering.trt_rules import require_tensorrt
from clusterq_deploy.lowering.verify import integer_layers, verify
from clusterq_deploy.oom import infer_split_on_oom
from clusterq_deploy.quantization.graph.placement import TARGETS, Target
from clusterq_deploy.quantization.student import Student
from clusterq_deploy.runtimes.runners import Array, Runner, TorchRunner

FILES: dict[GraphFormat, str] = {
    "onnxruntime": "model.ort.onnx",
    "tensorrt": "model.trt.onnx",
    "int4": "model.int4.onnx",
}
FLOAT_FILE, FP16_FILE = "model.onnx", "model.fp16.onnx"
VERIFIED_IMAGES = 64
_COMPARED_IMAGES = 16


@dataclass(frozen=True)
class VerifiedGraph:
    """A graph of a student that computes what torch computes, and the name of its file.

    `checks` has as JSON what was measured: `Verification`, the integers, and for TensorRT the warnings of its rules.
    `notes` has what a user should know of the graph, for the report.
    """

    graph_format: GraphFormat
    file: str
    graph: onnx.ModelProto
    checks: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class FloatGraphs:
    """The teacher's graphs in FP32 and, for TensorRT, in FP16 except for its inputs and outputs.

    `no_fp16` says why `fp16` is None: the model does not fit FP16.
    """

    fp32: onnx.ModelProto
    fp16: onnx.ModelProto | None
    no_fp16: str | None


def float_graphs(
    model: nn.Module, size: tuple[int, int, int], *, seed: int, name: str, progress: Progress = SILENT
) -> FloatGraphs:
    """Return the graphs of a teacher in eval mode, verified on noise of the size (channels, height, width).

    Raises:
        ExportError: torch cannot export the model.
        VerificationError: the FP32 graph does not compute what torch computes, or TensorRT would refuse it.
    """
    images = np.random.default_rng(seed).standard_normal((VERIFIED_IMAGES, *size), dtype=np.float32)
    with progress.task(f"Export {name}", 4) as advance:  # torch's answers, the graph, and its checks in both precisions
        expected = infer_split_on_oom(TorchRunner(model).infer, f"{name} in torch")(images)
        advance()
        fp32 = export_graph(model, size)
        advance()
        verify(fp32, images, expected, name=f"{name}/{FLOAT_FILE}", optimized=True)
        require_tensorrt(fp32, name=f"{name}/{FLOAT_FILE}")
        advance()
        try:
            fp16 = to_fp16(fp32)
            verify(fp16, images, expected, name=f"{name}/{FP16_FILE}", optimized=False)
            require_tensorrt(fp16, name=f"{name}/{FP16_FILE}")
        except ExportError as error:
            return FloatGraphs(fp32, None, str(error))
        finally:
            advance()
    return FloatGraphs(fp32, fp16, None)


def student_graphs(
    student: Student,
    images: Array,
    *,
    size: tuple[int, int, int],
    name: str,
    targets: Collection[GraphFormat] = tuple(FILES),
    fp16: bool = False,
    progress: Progress = SILENT,
) -> Generator[VerifiedGraph, None, None]:
    """Yield a student's graphs one after the other, INT4's only if its weights have at most four bits.

    Args:
        images: (N, C, H, W) float32, normalized, to compare graphs and torch on.
        size: (channels, height, width).
        name: what messages call the student, such as w4a4.
        targets: the formats to export.
        fp16: whether TensorRT's graph computes in FP16 what is not quantized.
        progress: shows how far it is; its task is open until the last graph is taken, or the generator closed.

    Raises:
        ExportError: a graph cannot be written.
        VerificationError: a graph does not compute what torch computes, or TensorRT would refuse it.
    """
    formats = [f for f in FILES if f in targets and (f != "int4" or student.bits.weights <= 4)]
    executed = [target for target in TARGETS if target in map(target_of, formats)]
    fp16 = fp16 and "tensorrt" in formats
    logits: dict[Target, Array] = {}
    with progress.task(f"Export {name}", 1 + len(executed) + 3 * len(formats) + 2 * fp16) as advance:

        def check(graph: onnx.ModelProto, graph_format: GraphFormat, name: str) -> dict[str, Any]:
            expected, optimized = logits[target_of(graph_format)], graph_format != "tensorrt"
            integers = compare_integers(graph, student, images[:_COMPARED_IMAGES], graph_format=graph_format)
            advance()
            result = verify(
                graph,
                images,
                expected,
                name=name,
                optimized=optimized,
                cpu=student.target_cpu,
                same_integers=not any(site.differing for site in integers),
            )
            require_same_integers(integers, name=name)
            advance()
            return {**asdict(result), "integers": [asdict(site) for site in integers]}

        marked = export_graph(student, size)
        advance()
        for target in executed:
            with student.for_target(target):
                logits[target] = infer_split_on_oom(TorchRunner(student).infer, f"{name} in torch")(images)
            advance()
        for graph_format in formats:
            file, graph = f"{name}/{FILES[graph_format]}", lower(marked, student, graph_format)
            checks, notes = check(graph, graph_format, file), []
            if graph_format == "tensorrt":
                if fp16:
                    try:
                        graph = to_fp16(graph)
                    except ExportError as error:
                        raise ExportError(f"{error}; export without --fp16") from error
                    checks["half"] = check(graph, graph_format, f"{file} in FP16")
                warnings = require_tensorrt(graph, name=file)
                checks["rules"] = [asdict(warning) for warning in warnings]
                notes = [f"TensorRT: {warning.message} ({warning.node})" for warning in warnings]
            if graph_format == "onnxruntime":
                notes = _float_layers(graph, student)
            advance()
            yield VerifiedGraph(graph_format, FILES[graph_format], graph, checks, notes)


def _float_layers(graph: onnx.ModelProto, student: Student) -> list[str]:
    """Return a note for each kind of quantized layer of which ONNX Runtime runs some in float."""
    layers = list(student.layers().values())
    linear = sum(isinstance(layer, nn.Linear) for layer in layers)
    kinds = {"convolutions": len(layers) - linear, "linear layers": linear}
    return [
        f"{count - on_integers} of {count} quantized {kind} run in float in ONNX Runtime: they gain no speed there"
        for (kind, count), on_integers in zip(kinds.items(), integer_layers(graph), strict=True)
        if on_integers < count
    ]


def agreement(
    runner: Runner,
    student: Student,
    images: Array,
    *,
    graph_format: GraphFormat,
    batch_size: int,
    progress: Progress = SILENT,
) -> float:
    """Return the percentage of images (N, C, H, W) with the student's top-1, as a runner executes its graph."""
    infer = infer_split_on_oom(runner.infer, f"agreement on {runner.runtime}")
    reference, same = infer_split_on_oom(TorchRunner(student).infer, "agreement on torch"), []
    with student.for_target(target_of(graph_format)), progress.task("Agreement", len(images)) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            same.append(infer(batch).argmax(1) == reference(batch).argmax(1))
            advance(len(batch))
    return 100 * float(np.concatenate(same).mean())
