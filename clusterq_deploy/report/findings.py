"""What the measurements of a report say: drops, speed-ups and shares of the size.

Numbers only; `wording` turns them into sentences. Everything is compared with the variant `fp32`, in the same
runtime and, for time, at the same batch and threads; time also with the float model in FP16 where that was timed. What
was measured of that stands in the report under `fp32`, and in rows and points as `fp16`.
"""

import math
import re
from dataclasses import dataclass

from clusterq_deploy.results.report import Accuracy, Artifact, Latency, Report, Variant

BASELINE = "fp32"
HALF = "fp16"
FLOAT = {BASELINE, HALF}
SPEED_TIE = 0.05
"""Variants whose medians are this close (as a fraction) count as equally fast."""
UNSTEADY = 0.025
"""Coefficient of variation above which a latency deserves no trust in its last digits."""


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One variant in one runtime. `top1_error` and `drop_error` are standard errors, in points.

    `drop` is fp32's top-1 in the same runtime less this one's. Both answer the same images, so only those on
    which they differ add variance: `drop_error` is the bound that the agreements with the teacher set to the
    standard error of the paired difference.
    """

    variant: str
    accuracy: Accuracy
    size_bytes: int | None
    top1_error: float | None
    drop: float | None
    drop_error: float | None
    agreement_error: float


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One measurement; `speedup` is over fp32: of turns that both took, else of medians, None without fp32's.

    `over_half` is the same for fp16. An engine is `unsteady` where its computation is; copies vary with what else the
    host does.
    """

    variant: str
    latency: Latency
    speedup: float | None
    unsteady: bool
    over_half: float | None


@dataclass(frozen=True, slots=True)
class FileRow:
    """One deployable file; `share` is its size over that of fp32's ONNX file."""

    variant: str
    artifact: Artifact
    share: float | None


def baseline(report: Report) -> Variant | None:
    """The float variant that the others are compared with."""
    return next((variant for variant in report.variants if variant.name == BASELINE), None)


def name_of(variant: Variant, graph: str | None) -> str:
    """What a row on one of a variant's files is called: `fp16` for the float model in FP16, else the variant."""
    half = any(artifact.path == graph and artifact.fp16 for artifact in variant.artifacts)
    return HALF if half and variant.name == BASELINE else variant.name


def half_was_timed(report: Report) -> bool:
    """Whether the float model in FP16 was timed."""
    return any(row.variant == HALF for row in latency_rows(report))


def graph_size(variant: Variant) -> int | None:
    """Size in bytes of the variant's ONNX Runtime graph."""
    sizes = (artifact.size_bytes for artifact in variant.artifacts if artifact.target == "onnxruntime")
    return next(sizes, None)


def grid_bits(variant: str) -> int | None:
    """The fewer of the weight and activation bits that a name such as `w4a8` states; None without any."""
    match = re.fullmatch(r"w(\d+)a(\d+)(?:\W.*)?", variant)
    return min(int(match[1]), int(match[2])) if match else None


def standard_error(percentage: float, images: int) -> float:
    """Of a share that was measured on so many images, in points, as `percentage` is.

    It is sqrt(p (1 - p) / n), of a share p to which half an image of each kind was added (Jeffreys' prior): that all of
    300 images agree does not mean that all do.
    """
    if not images:
        return math.nan
    share = _share_of(percentage / 100 * images, images)
    return 100 * math.sqrt(share * (1 - share) / images)


def _share_of(count: float, images: int) -> float:
    """A share with half an image of each kind added."""
    return (count + 0.5) / (images + 1)


def accuracy_rows(report: Report) -> list[AccuracyRow]:
    """A row for each variant and runtime, in the order of the report."""
    reference = by_runtime(baseline(report))
    return [
        accuracy_row(report.evaluation.images, variant, accuracy, reference.get(accuracy.runtime))
        for variant in report.variants
        for accuracy in variant.accuracy
    ]


def latency_rows(report: Report) -> list[LatencyRow]:
    """A row for each measurement, in the order of the report."""
    reference = baseline(report)
    return [
        LatencyRow(
            name,
            latency,
            None if name == BASELINE else speedup_of(reference, latency),
            is_unsteady(latency),
            None if name in FLOAT else speedup_of(reference, latency, HALF),
        )
        for variant in report.variants
        for latency in variant.latency
        for name in [name_of(variant, latency.graph)]
    ]


def is_unsteady(latency: Latency) -> bool:
    """Whether a latency varies too much to be trusted in its last digits."""
    return (latency.compute or latency).coefficient_of_variation > UNSTEADY


def file_rows(report: Report) -> list[FileRow]:
    """A row for each file, in the order of the report."""
    return [
        FileRow(variant.name, artifact, _share(report, artifact.size_bytes))
        for variant in report.variants
        for artifact in variant.artifacts
    ]


def accuracy_row(images: int, variant: Variant, accuracy: Accuracy, reference: Accuracy | None) -> AccuracyRow:
    """The row of what a variant scored on so many images; `reference` is what fp32 scored in the same runtime."""
    drop = drop_error = None
    name = name_of(variant, accuracy.graph)
    if name != BASELINE and reference and reference.top1 is not None and accuracy.top1 is not None:
        drop = reference.top1 - accuracy.top1
        # Where both agree with the teacher they agree with each other, so they differ on at most this share.
        differing = min((200 - accuracy.agreement - reference.agreement) / 100, 1.0)
        drop_error = _drop_error(differing, drop / 100, images)
    return AccuracyRow(
        variant=name,
        accuracy=accuracy,
        size_bytes=next((a.size_bytes for a in variant.artifacts if a.path == accuracy.graph), None),
        top1_error=None if accuracy.top1 is None else standard_error(accuracy.top1, images),
        drop=drop,
        drop_error=drop_error,
        agreement_error=standard_error(accuracy.agreement, images),
    )


def _drop_error(differing: float, drop: float, images: int) -> float:
    """The standard error of a paired difference, in points, from the share of images on which the two differ."""
    if not images:
        return math.nan
    return 100 * math.sqrt(max(_share_of(differing * images, images) - drop**2, 0.0) / images)


def by_runtime(reference: Variant | None) -> dict[str, Accuracy]:
    """What fp32 scored, by runtime; of several files the first counts."""
    found: dict[str, Accuracy] = {}
    for accuracy in reference.accuracy if reference else ():
        if reference and name_of(reference, accuracy.graph) == BASELINE:
            found.setdefault(accuracy.runtime, accuracy)
    return found


def speedup_of(reference: Variant | None, latency: Latency, over: str = BASELINE) -> float | None:
    """How many times as fast as the float model, as fp32 or as fp16, this one ran; None where that was not measured so.

    Over fp32 it is that of turns which both took, where they did; else the float model's median over this one's.
    """
    if over == BASELINE and latency.speedup is not None:
        return latency.speedup
    for other in counterparts(reference, latency, over):
        return other.median_ms / latency.median_ms if latency.median_ms else None
    return None


def interval_of(latency: Latency, speedup: float) -> tuple[float, float]:
    """The interval of a speed-up over fp32: the measured one, else as far as two medians say nothing, `SPEED_TIE`."""
    if latency.speedup_low is not None and latency.speedup_high is not None:
        return latency.speedup_low, latency.speedup_high
    return speedup * (1 - SPEED_TIE), speedup / (1 - SPEED_TIE)


def counterparts(reference: Variant | None, latency: Latency, over: str) -> list[Latency]:
    """The float model's latencies, as fp32 or as fp16, at the same runtime, batch and threads."""
    setting = (latency.runtime, latency.batch, latency.threads)
    return [
        other
        for other in (reference.latency if reference else ())
        if (other.runtime, other.batch, other.threads) == setting
        and reference
        and name_of(reference, other.graph) == over
    ]


def _share(report: Report, size_bytes: int) -> float | None:
    reference = baseline(report)
    float_size = graph_size(reference) if reference else None
    return size_bytes / float_size if float_size else None
