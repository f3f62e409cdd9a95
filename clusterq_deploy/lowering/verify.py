"""Verify that a runtime computes with a graph what torch computes, before the graph is written."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from clusterq_deploy.environment import adds_in_32_bits
from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering.fp16 import computes_in_fp16
from clusterq_deploy.lowering.saturation import pair_sums, require_no_saturation
from clusterq_deploy.oom import infer_split_on_oom
from clusterq_deploy.quantization.grid import Cpu
from clusterq_deploy.runtimes.runners import Array, OnnxRunner

_CLOSE, _TINY = 1e-2, 1e-6  # of the logits' standard deviation, and in absolute terms


@dataclass(frozen=True)
class _Tolerance:
    """How far a graph may differ: `agreement` at least, `typical` at most; logits within `tie` count as the same."""

    agreement: float
    typical: float
    tie: float


_FP32 = _Tolerance(agreement=0.98, typical=0.05, tie=1e-4)
"""Of 64 images one may be on a boundary between two classes."""
_EXACT, _AGREEMENT_WITH_TIES = 1e-5, 0.9
"""If half of the images have exactly torch's logits, in standard deviations, the graph is the same function, and the
others differ at ties of rounding, which `compare_integers` checks one by one. A narrow grid magnifies a tie: at W4A4 a
MobileNetV1 gave another class to 2 of 64 images, and torch's logits to most."""
_TIES = _Tolerance(agreement=0.9, typical=0.25, tie=1e-4)
"""If no integer differs except at ties, and the logits of an image without any are exactly torch's: a channel that is
constant can be on a rounding boundary in most images (0.06 at W4A4)."""
_FP16 = _Tolerance(agreement=0.98, typical=0.1, tie=5e-2)
"""FP16 without quantizers: every layer rounds its weights and what it writes to eleven bits, by at most 2^-12 of a
value. On noise that was measured to add up to 0.0003 to 0.01 with trained nets, and to 0.04 with random ones whose
logits hardly differ from image to image (ResNet-50); the logits of another net would be off by 1.4."""
_FP16_WITH_QUANTIZERS = _Tolerance(agreement=0.9, typical=0.25, tie=5e-2)
"""FP16 around quantizers: eleven bits move about one value in a hundred over a rounding boundary of a 4-bit grid."""


@dataclass(frozen=True)
class Verification:
    """How near a graph comes to the torch model on the same images, with the runtime's optimizations off.

    Attributes:
        agreement: share of images with the same top-1, with optimizations on too; a class whose logit in torch is the
            same except for rounding counts as the same, as an untrained net has many of them.
        close: share of images whose logits differ by at most a hundredth of the logits' standard deviation. A value
            on the other side of a rounding boundary moves an image out of it without anything being wrong.
        typical: the median image's root mean square difference of a logit, in standard deviations of the logits.
        largest: the largest difference of a logit.
        pair_sum: the largest magnitude that two integer products of an output channel add up to; see `pair_sums`.
    """

    agreement: float
    close: float
    typical: float
    largest: float
    pair_sum: int = 0


def verify(
    graph: onnx.ModelProto,
    images: Array,
    reference: Array,
    *,
    name: str,
    optimized: bool,
    cpu: Cpu = "any",
    same_integers: bool = False,
) -> Verification:
    """Check a graph by ONNX's checker, run it in ONNX Runtime, and compare it with torch.

    Args:
        images: (N, C, H, W) float32, normalized.
        reference: torch's logits for them, (N, classes) float32.
        name: what messages call the graph.
        optimized: whether it is meant for ONNX Runtime, and is therefore run with optimizations too.
        cpu: the CPUs that it is meant for. A graph for ONNX Runtime on `any` must not saturate; one for `vnni` is
            executed only if this CPU has VNNI.
        same_integers: whether `compare_integers` found nothing but ties.

    Raises:
        VerificationError: the graph is invalid, does not run, disagrees with torch, or saturates.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"{name} is no valid ONNX: {str(error).splitlines()[0]}") from error
    if optimized and cpu == "any":
        pair_sum = require_no_saturation(graph, name=name)
    else:
        pair_sum = max((abs(pair.largest) for pair in pair_sums(graph)), default=0)
    plain = executed = _infer(graph, images, name, optimized=False)
    if optimized and (cpu == "any" or adds_in_32_bits()):
        executed = _infer(graph, images, name, optimized=True)
    if not all(np.isfinite(logits).all() for logits in (reference, plain, executed)):
        raise VerificationError(f"{name} or its torch model has logits that are not finite; the file is not written")
    difference = np.abs(plain - reference)
    deviation = max(float(reference.std()), 1e-30)
    distances = np.sqrt(np.square(difference).mean(axis=1)) / deviation
    only_ties = same_integers and float(distances.min()) <= _EXACT and not computes_in_fp16(graph)
    tolerance = _TIES if only_ties else _tolerance(graph)
    tie = tolerance.tie * deviation + _TINY
    result = Verification(
        agreement=min(_agreement(logits, reference, tie) for logits in (plain, executed)),
        close=float((difference.max(axis=1) <= _CLOSE * deviation).mean()),
        typical=float(np.median(distances)),
        largest=float(difference.max()),
        pair_sum=pair_sum,
    )
    expected = _AGREEMENT_WITH_TIES if result.typical <= _EXACT else tolerance.agreement
    if result.agreement < expected or result.typical > tolerance.typical:
        raise VerificationError(
            f"{name} has torch's top-1 on {100 * result.agreement:.1f} % of {len(images)} images (expected "
            f"{100 * expected:.0f} %), its logits differ by {result.typical:.2g} standard deviations "
            f"(expected at most {tolerance.typical}); the file is not written"
        )
    return result


def integer_layers(graph: onnx.ModelProto) -> tuple[int, int]:
    """Return how many convolutions, and how many linear layers, ONNX Runtime's CPU provider runs on integers.

    Raises:
        ExportError: ONNX Runtime cannot load the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        with OnnxRunner(graph.SerializeToString(), write_optimized=optimized):
            kinds = Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)
    return kinds["QLinearConv"], kinds["QGemm"] + kinds["QLinearMatMul"]


def _infer(graph: onnx.ModelProto, images: Array, name: str, *, optimized: bool) -> Array:
    with OnnxRunner(graph.SerializeToString(), optimized=optimized) as runner:
        return infer_split_on_oom(runner.infer, name)(images)


def _tolerance(graph: onnx.ModelProto) -> _Tolerance:
    if not computes_in_fp16(graph):
        return _FP32
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    return _FP16_WITH_QUANTIZERS if quantized else _FP16


def _agreement(logits: Array, reference: Array, tie: float) -> float:
    """Return the share of images for which both choose the same class, or one whose logit is within `tie` of it."""
    chosen = np.take_along_axis(reference, logits.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float((reference.max(axis=1) - chosen <= tie).mean())
