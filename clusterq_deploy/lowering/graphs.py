"""Every graph of a model, held against torch before it may be written."""

from collections.abc import Collection, Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from torch import nn

from calib.support.progress import SILENT, Advance, Progress
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
FLOAT_FILE, HALF_FILE = "model.onnx", "model.fp16.onnx"
VERIFIED_IMAGES = 64
_COMPARED_IMAGES = 16
_INT4 = 4


@dataclass(frozen=True)
class VerifiedGraph:
    """A graph of a student that computes what torch computes.

    Attributes:
        graph_format: which one.
        file: the name of its file.
        graph: to be written.
        checks: what was found, as JSON: `Verification`, the integers, and of TensorRT's graph its rules.
        notes: what a user should know of it, for the report.
    """

    graph_format: GraphFormat
    file: str
    graph: onnx.ModelProto
    checks: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class FloatGraphs:
    """The teacher's graphs.

    Attributes:
        single: in FP32.
        half: in FP16 but for its inputs and outputs, for TensorRT; None where the model does not fit FP16.
        no_half: why `half` is None.
    """

    single: onnx.ModelProto
    half: onnx.ModelProto | None
    no_half: str | None


def float_graphs(
    model: nn.Module, size: tuple[int, int, int], *, seed: int, name: str, progress: Progress = SILENT
) -> FloatGraphs:
    """The teacher's graphs, verified on noise.

    Args:
        model: in eval mode.
        size: (channels, height, width).
        seed: of the noise.
        name: what messages call the teacher, such as fp32.
        progress: shows how far it is.

    Raises:
        ExportError: torch cannot export the model.
        VerificationError: the FP32 graph does not compute what torch computes, or TensorRT would refuse it.
    """
    images = np.random.default_rng(seed).standard_normal((VERIFIED_IMAGES, *size), dtype=np.float32)
    with progress.task(f"Export {name}", 4) as advance:  # torch's answers, the graph, and its checks in both precisions
        expected = infer_split_on_oom(TorchRunner(model).infer, f"{name} in torch")(images)
        advance()
        single = export_graph(model, size)
        advance()
        verify(single, images, expected, name=f"{name}/{FLOAT_FILE}", optimized=True)
        require_tensorrt(single, name=f"{name}/{FLOAT_FILE}")
        advance()
        try:
            half = to_fp16(single)
            verify(half, images, expected, name=f"{name}/{HALF_FILE}", optimized=False)
            require_tensorrt(half, name=f"{name}/{HALF_FILE}")
        except ExportError as error:
            return FloatGraphs(single, None, str(error))
        finally:
            advance()
    return FloatGraphs(single, half, None)


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
    """A student's graphs, one after the other: INT4's where weights have at most four bits.

    Args:
        student: tuned.
        images: (N, C, H, W) float32, normalized, on which they are held against torch.
        size: (channels, height, width).
        name: what messages call the student, such as w4a4.
        targets: which of them.
        fp16: whether TensorRT's computes in FP16 what is not quantized.
        progress: shows how far it is; its task is open until the last graph is taken, or the generator closed.

    Raises:
        ExportError: a graph cannot be written.
        VerificationError: a graph does not compute what torch computes, or TensorRT would refuse it.
    """
    fitting = [own for own in FILES if own in targets and (own != "int4" or student.bits.weights <= _INT4)]
    files = {graph_format: FILES[graph_format] for graph_format in fitting}
    logits: dict[Target, Array] = {}

    def checked(graph: onnx.ModelProto, graph_format: GraphFormat, name: str, advance: Advance) -> dict[str, Any]:
        expected, for_cpu = logits[target_of(graph_format)], graph_format != "tensorrt"
        found = verify(graph, images, expected, name=name, optimized=for_cpu, cpu=student.target_cpu)
        advance()
        integers = compare_integers(graph, student, images[:_COMPARED_IMAGES], graph_format=graph_format)
        require_same_integers(integers, name=name)
        advance()
        return {**asdict(found), "integers": [asdict(site) for site in integers]}

    executed = [target for target in TARGETS if target in map(target_of, files)]
    fp16 = fp16 and "tensorrt" in files
    with progress.task(f"Export {name}", 1 + len(executed) + 3 * len(files) + 2 * fp16) as advance:
        marked = export_graph(student, size)
        advance()
        for target in executed:
            with student.for_target(target):
                logits[target] = infer_split_on_oom(TorchRunner(student).infer, f"{name} in torch")(images)
            advance()
        for graph_format, file in files.items():
            graph = lower(marked, student, graph_format)
            checks = checked(graph, graph_format, f"{name}/{file}", advance)
            if graph_format == "tensorrt":
                if fp16:
                    graph = _halved(graph)
                    checks["half"] = checked(graph, graph_format, f"{name}/{file} in FP16", advance)
                checks["rules"] = [asdict(own) for own in require_tensorrt(graph, name=f"{name}/{file}")]
            notes = [f"TensorRT: {own['message']} ({own['node']})" for own in checks.get("rules", [])]
            if graph_format == "onnxruntime":
                notes += _float_layers(graph, student)
            advance()
            yield VerifiedGraph(graph_format, file, graph, checks, notes)


def _halved(graph: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return to_fp16(graph)
    except ExportError as error:
        raise ExportError(f"{error}; export without --fp16") from error


def _float_layers(graph: onnx.ModelProto, student: Student) -> list[str]:
    """A note for each kind of quantized layer that ONNX Runtime does not run on integers, whole."""
    layers = list(student.layers().values())
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    wanted = {"convolutions": convolutions, "linear layers": len(layers) - convolutions}
    found = dict(zip(wanted, integer_layers(graph), strict=True))
    return [
        f"{count - found[kind]} of {count} quantized {kind} run in float in ONNX Runtime: they gain no speed there"
        for kind, count in wanted.items()
        if found[kind] < count
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
    """Percentage of images (N, C, H, W) with the student's top-1, as a runner executes that graph of it."""
    infer = infer_split_on_oom(runner.infer, f"agreement on {runner.runtime}")
    reference, same = infer_split_on_oom(TorchRunner(student).infer, "agreement on torch"), []
    with student.for_target(target_of(graph_format)), progress.task("Agreement", len(images)) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            same.append(infer(batch).argmax(1) == reference(batch).argmax(1))
            advance(len(batch))
    return 100 * float(np.concatenate(same).mean())
