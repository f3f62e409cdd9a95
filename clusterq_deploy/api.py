"""Quantize a model in memory, without a run directory: images, a student and a graph, by one call each.

    images = clusterq_deploy.synthesize(model, InputSpec(size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))
    student = clusterq_deploy.quantize(model, images, "w4a4")
    clusterq_deploy.export(student, "model.ort.onnx", images)

`Pipeline` is the resumable shell around the same functions.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calib.bn_statistics import never_trained
from calib.calibration_set import CalibrationSet
from calib.refine import survives_flip
from calib.support.progress import SILENT, Progress
from calib.synthesis import SynthesisConfig
from clusterq_deploy import lowering
from clusterq_deploy.errors import ExportError, ModelError
from clusterq_deploy.evaluation.accuracy import predictions
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.files import write_bytes
from clusterq_deploy.lowering import VERIFIED_IMAGES, GraphFormat
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.capture import capture, require_same
from clusterq_deploy.models.loading import count_classes, require_batchnorm
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization import BitWidths, FinetuneConfig, Student, make_student
from clusterq_deploy.quantization.grid import Cpu
from clusterq_deploy.report.text import statistics_warning
from clusterq_deploy.runtimes.runners import TorchRunner
from clusterq_deploy.stages.quantize import in_smaller_batches, tune
from clusterq_deploy.stages.synthesize import synthesize_in_memory

__all__ = ["export", "quantize", "synthesize"]

logger = logging.getLogger(__name__)


def synthesize(
    model: nn.Module,
    spec: InputSpec,
    *,
    config: SynthesisConfig | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Make images for calibration and fine-tuning from a classifier only (ClusterQ, arXiv 2205.00179, section III).

    Args:
        model: in eval mode, with BatchNorm; images (N, C, H, W) float32, normalized, to logits (N, classes); unchanged.
        spec: the size of an image, and the mean and standard deviation of pixels in [0, 1] that it is normalized by.
        config: how many images, from how many steps; the standard schedule by default.

    Returns:
        Images (N, C, H, W) float32, normalized, on the CPU, and their classes (N,) int64.

    Raises:
        ModelError: the model is in training mode, or does not map such images to logits.
        NoBatchNormError: it has no BatchNorm statistics.
        GraphError: it cannot be captured as a graph.
        SynthesisError: the images diverge.
        OutOfMemoryError: the smallest batches do not fit the memory.
    """
    device, name, settings = _device_of(model), type(model).__name__, config or SynthesisConfig()
    classes, teacher = count_classes(name, model, spec), capture(model, spec.size)
    require_batchnorm(name, "nn.Module", teacher)
    synthesis, _ = synthesize_in_memory(
        teacher,
        spec,
        classes,
        settings,
        rng=lambda: torch.Generator(device).manual_seed(seed),
        progress=progress,
    )
    if warning := statistics_warning(synthesis.statistics_distance, new=never_trained(teacher)):
        logger.warning("%s: %s", name, warning)
    provenance = {"seed": seed, "input": spec.model_dump(mode="json"), "synthesis": settings.model_dump(mode="json")}
    return replace(synthesis.calibration, provenance=provenance)


def quantize(
    model: nn.Module,
    images: CalibrationSet | Tensor,
    bits: BitWidths | str,
    *,
    config: FinetuneConfig | None = None,
    first_last: bool = False,
    keep: dict[str, int] | None = None,
    cpu: Cpu = "any",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Student:
    """Quantize a classifier and tune the result on images.

    Args:
        model: in eval mode; images (N, C, H, W) float32, normalized, to logits (N, classes); unchanged.
        images: of `synthesize`; or any images (N, C, H, W) float32, normalized, labelled by the model's predictions.
        bits: of weights and activations, such as "w4a4"; 2 to 8 each.
        config: how long to tune; `FinetuneConfig(steps=0)` only calibrates and corrects.
        first_last: whether the first and last layer have those widths too, not 8 bits.
        keep: bits of single layers, by name.
        cpu: the CPUs that the graph for ONNX Runtime is for; see `Student.target_cpu`.

    Returns:
        A student on the model's device, which computes what its graphs compute.

    Raises:
        ModelError: the model is in training mode.
        GraphError: it cannot be captured as a graph, or has no layer of a name in `keep`.
        TuningError: the loss is not finite.
        OutOfMemoryError: the smallest batches do not fit the memory.
    """
    device = _device_of(model)
    widths = BitWidths.parse(bits) if isinstance(bits, str) else bits
    settings = (config or FinetuneConfig()).scaled_to(widths)
    sample = images.images if isinstance(images, CalibrationSet) else images
    _, channels, height, width = sample.shape
    teacher = capture(model, (channels, height, width))
    require_same(model, teacher, sample[:VERIFIED_IMAGES].to(device), "the captured graph")
    if isinstance(images, Tensor):
        unlabelled = EvaluationSet.from_images("images", images.cpu().numpy())
        classes = predictions(TorchRunner(teacher), unlabelled, settings.batch_size)[:, 0]
        images = CalibrationSet(images.cpu(), torch.from_numpy(classes))
    calibration = images

    def attempt(divisor: int) -> Student:
        rng, smaller = torch.Generator(device).manual_seed(seed), in_smaller_batches(settings, divisor)
        student = make_student(teacher, widths, quantize_first_last=first_last, layer_bits=keep, cpu=cpu)
        tune(
            student,
            calibration,
            config=smaller,
            flip=survives_flip(
                teacher, calibration.images.to(device), calibration.labels.to(device), smaller.batch_size
            ),
            rng=rng,
            progress=progress,
        )
        return student

    student, _ = retry_on_oom(attempt, f"quantization to {widths}")
    return student


def export(
    student: Student,
    path: Path | str,
    images: CalibrationSet | Tensor,
    *,
    target: GraphFormat = "onnxruntime",
    fp16: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a student's graph, verified: it computes what the student computes, integer by integer.

    Args:
        student: of `quantize`.
        images: some of those that the student was tuned on, (N, C, H, W) float32; graph and student are compared on
            the first 64.
        target: "onnxruntime" (quantized operators for its CPU kernels), "tensorrt" (INT8 Q/DQ), or "int4" (weights
            of up to four bits, two to a byte, for storage).
        fp16: whether TensorRT's graph computes in FP16 what is not quantized.

    Returns:
        `path`.

    Raises:
        ExportError: the graph cannot be written, or "int4" was requested for wider weights.
        VerificationError: it computes something else, or TensorRT would refuse it.
    """
    batch = images.images if isinstance(images, CalibrationSet) else images
    sample = batch[:VERIFIED_IMAGES].cpu().numpy().astype(np.float32)
    _, channels, height, width = sample.shape
    size, name = (channels, height, width), str(student.bits)
    graphs = list(
        lowering.student_graphs(student, sample, size=size, name=name, targets=(target,), fp16=fp16, progress=progress)
    )
    if not graphs:
        raise ExportError(f"{student.bits} has weights of more than four bits: there is no INT4 graph")
    write_bytes(Path(path), graphs[0].graph.SerializeToString())
    return Path(path)


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; raise a ModelError if it is in training mode."""
    if model.training:
        raise ModelError(f"{type(model).__name__} is in training mode; call .eval() first")
    return next(model.parameters()).device
