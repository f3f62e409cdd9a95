"""What the measurements of a report say: drops, speed-ups, shares of the size, and which variant to deploy.

Numbers only; `wording` turns them into sentences. Everything is compared with the variant `fp32`, in the same
runtime and, for time, at the same batch and threads; time also with the float model in FP16 where that was timed. What
was measured of that stands in the report under `fp32`, and in rows and points as `fp16`.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from clusterq_deploy.report.schema import Accuracy, Artifact, Latency, Report, Variant

BASELINE = "fp32"
HALF = "fp16"
FLOAT = {BASELINE, HALF}
MAX_DROP = 1.0
"""Points of top-1 that a suggested variant may lose."""
MAX_DISAGREEMENT = 5.0
"""Without labels: the percentage of images on which a suggested variant may contradict the teacher."""
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
    """One measurement; `speedup` is fp32's median over this one's, None where fp32 was not measured so.

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


@dataclass(frozen=True, slots=True)
class Point:
    """A variant that was both scored and timed in a runtime.

    `cost` is the drop in points of top-1, or the percentage of disagreement where there are no labels.
    """

    variant: str
    accuracy: Accuracy
    latency: Latency
    cost: float | None
    speedup: float | None
    over_half: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to deploy in one runtime.

    `choice` is the point that is suggested ("deploy"), or the nearest miss: too inaccurate ("inaccurate") or
    no faster than fp32 ("slow"). It is None where nothing could be compared ("unknown").
    """

    runtime: str
    outcome: Literal["deploy", "inaccurate", "slow", "unknown"]
    choice: Point | None
    baseline: Point | None
    size_share: float | None


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
    """sqrt(p (1 - p) / n) of a share that was measured on `images` images; in points, as `percentage` is."""
    return math.sqrt(max(percentage * (100 - percentage), 0.0) / images) if images else math.nan


def accuracy_rows(report: Report) -> list[AccuracyRow]:
    """A row for each variant and runtime, in the order of the report."""
    reference = _by_runtime(baseline(report))
    return [
        _accuracy_row(report.evaluation.images, variant, accuracy, reference.get(accuracy.runtime))
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
            None if name == BASELINE else _speedup(reference, latency),
            (latency.compute or latency).coefficient_of_variation > UNSTEADY,
            None if name in FLOAT else _speedup(reference, latency, HALF),
        )
        for variant in report.variants
        for latency in variant.latency
        for name in [name_of(variant, latency.graph)]
    ]


def file_rows(report: Report) -> list[FileRow]:
    """A row for each file, in the order of the report."""
    return [
        FileRow(variant.name, artifact, _share(report, artifact.size_bytes))
        for variant in report.variants
        for artifact in variant.artifacts
    ]


def points(report: Report, runtime: str) -> list[Point]:
    """Every graph that was scored and timed in `runtime`, at the smallest batch with the most threads."""
    reference = baseline(report)
    return [
        Point(
            name,
            accuracy,
            latency,
            None if name == BASELINE else _cost(report, accuracy, _by_runtime(reference).get(runtime)),
            None if name == BASELINE else _speedup(reference, latency),
            None if name in FLOAT else _speedup(reference, latency, HALF),
        )
        for variant in report.variants
        for accuracy in variant.accuracy
        if accuracy.runtime == runtime
        for name in [name_of(variant, accuracy.graph)]
        if (latency := _headline(variant, accuracy)) is not None
    ]


def verdicts(report: Report) -> list[Verdict]:
    """What to deploy in each runtime that was timed, in the order of the report.

    Of the variants that lose no more than `MAX_DROP` (`MAX_DISAGREEMENT` without labels), the fastest; of
    those within `SPEED_TIE` of it, the one that loses least. One that is no faster than fp32 by more than
    that is not suggested. fp16 counts as a variant. torch only simulates integers and is left out.
    """
    timed = dict.fromkeys(latency.runtime for variant in report.variants for latency in variant.latency)
    return [_verdict(report, runtime) for runtime in timed if runtime != "torch"]


def _verdict(report: Report, runtime: str) -> Verdict:
    measured = points(report, runtime)
    float_point = next((point for point in measured if point.variant == BASELINE), None)
    # Without its fp32 counterpart a point has neither a cost nor a speed-up, and nothing can be said of it.
    compared = [(point, point.cost, point.speedup) for point in measured if point.variant != BASELINE]
    known = [(point, cost, speed) for point, cost, speed in compared if cost is not None and speed is not None]
    if not known:
        return Verdict(runtime, "unknown", None, float_point, None)
    limit = MAX_DROP if report.evaluation.labelled else MAX_DISAGREEMENT
    accurate = [candidate for candidate in known if candidate[1] <= limit]
    if not accurate:
        choice = min(known, key=lambda candidate: candidate[1])[0]
        return Verdict(runtime, "inaccurate", choice, float_point, _point_share(report, choice))
    fastest = max(speed for _, _, speed in accurate)
    tied = [candidate for candidate in accurate if candidate[2] >= fastest * (1 - SPEED_TIE)]
    choice, _, speed = min(tied, key=lambda candidate: (candidate[1], -candidate[2]))
    # fp32 itself is a candidate that loses nothing: a variant has to beat it by more than a tie.
    outcome: Literal["deploy", "slow"] = "deploy" if speed * (1 - SPEED_TIE) > 1 else "slow"
    return Verdict(runtime, outcome, choice, float_point, _point_share(report, choice))


def _accuracy_row(images: int, variant: Variant, accuracy: Accuracy, reference: Accuracy | None) -> AccuracyRow:
    drop = drop_error = None
    name = name_of(variant, accuracy.graph)
    if name != BASELINE and reference and reference.top1 is not None and accuracy.top1 is not None:
        drop = reference.top1 - accuracy.top1
        # Where both agree with the teacher they agree with each other, so they differ on at most this share.
        differing = min((200 - accuracy.agreement - reference.agreement) / 100, 1.0)
        drop_error = 100 * math.sqrt(max(differing - (drop / 100) ** 2, 0.0) / images) if images else math.nan
    return AccuracyRow(
        variant=name,
        accuracy=accuracy,
        size_bytes=next((a.size_bytes for a in variant.artifacts if a.path == accuracy.graph), None),
        top1_error=None if accuracy.top1 is None else standard_error(accuracy.top1, images),
        drop=drop,
        drop_error=drop_error,
        agreement_error=standard_error(accuracy.agreement, images),
    )


def _by_runtime(reference: Variant | None) -> dict[str, Accuracy]:
    """What fp32 scored, by runtime; of several files the first counts."""
    found: dict[str, Accuracy] = {}
    for accuracy in reference.accuracy if reference else ():
        if reference and name_of(reference, accuracy.graph) == BASELINE:
            found.setdefault(accuracy.runtime, accuracy)
    return found


def _speedup(reference: Variant | None, latency: Latency, over: str = BASELINE) -> float | None:
    """The median of the float model, as fp32 or as fp16, over this one's; None where it was not measured so."""
    setting = (latency.runtime, latency.batch, latency.threads)
    for other in reference.latency if reference else ():
        same = (other.runtime, other.batch, other.threads) == setting
        if same and reference and name_of(reference, other.graph) == over:
            return other.median_ms / latency.median_ms if latency.median_ms else None
    return None


def _cost(report: Report, accuracy: Accuracy, reference: Accuracy | None) -> float | None:
    if not report.evaluation.labelled:
        return 100 - accuracy.agreement
    if reference is None or reference.top1 is None or accuracy.top1 is None:
        return None
    return reference.top1 - accuracy.top1


def _headline(variant: Variant, accuracy: Accuracy) -> Latency | None:
    timed = [
        latency
        for latency in variant.latency
        if latency.runtime == accuracy.runtime and latency.graph == accuracy.graph
    ]
    return min(timed, key=lambda latency: (latency.batch, -(latency.threads or 0)), default=None)


def _share(report: Report, size_bytes: int) -> float | None:
    reference = baseline(report)
    float_size = graph_size(reference) if reference else None
    return size_bytes / float_size if float_size else None


def _point_share(report: Report, point: Point) -> float | None:
    for row in file_rows(report):
        if row.artifact.path == point.accuracy.graph:
            return row.share
    return None
