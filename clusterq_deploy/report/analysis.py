"""Derived numbers of a report: drops, speed-ups, shares of the size, and which variant to deploy.

`text` turns them into sentences. Everything is compared with the variant `fp32` in the same runtime and, for time, at
the same batch and threads; time also with the float model in FP16 if that was timed. The report stores the latter under
`fp32`; rows and points call it `fp16`.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from clusterq_deploy.results.report import Accuracy, Latency, Report, Variant

BASELINE = "fp32"
HALF = "fp16"
FLOAT = {BASELINE, HALF}
SPEED_TIE = 0.05
"""Variants whose medians are this close (as a fraction) count as equally fast."""
UNSTEADY = 0.025
"""Coefficient of variation above which the last digits of a latency are noise."""
MAX_DROP = 1.0
"""Points of top-1 that a suggested variant may lose."""
MAX_DISAGREEMENT = 5.0
"""Percentage of images on which a suggested variant may disagree with the teacher, without labels."""
WIDEST = 1.25
"""Ratio of the ends of a speed-up's interval above which, if it includes 1, it is inconclusive."""


class AccuracyRow(Accuracy):
    """One variant in one runtime. `top1_error`, `drop_error` and `agreement_error` are standard errors, in points.

    `drop` is fp32's top-1 in the same runtime minus this one's. Both see the same images, so `drop_error` is
    the standard error of a paired difference: an upper bound, derived from the agreements with the teacher.
    """

    variant: str
    size_bytes: int | None
    top1_error: float | None
    drop: float | None
    drop_error: float | None
    agreement_error: float


class LatencyRow(Latency):
    """One measurement. If it was not alternated with fp32, `speedup` is the ratio of medians; None without fp32's.

    `over_half` is fp16's median over this one's. An engine is `unsteady` if its computation is: the time of copies
    depends on the load of the host.
    """

    variant: str
    over_half: float | None
    unsteady: bool


@dataclass(frozen=True, slots=True)
class Point:
    """A variant whose accuracy and latency were measured in a runtime.

    `cost` is the drop in points of top-1, or the percentage of disagreement without labels, `cost_error` its standard
    error; both are None for fp32. `interval` is that of the speed-up over fp32: the measured one, else the ratio of
    medians within `SPEED_TIE`. A point is `unsteady` if one of the two latencies is.
    """

    variant: str
    accuracy: AccuracyRow
    latency: LatencyRow
    cost: float | None
    cost_error: float | None
    interval: tuple[float, float] | None
    unsteady: bool
    size_share: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to deploy in one runtime.

    `choice` is the suggested point ("deploy", or "unsure" if the standard error of its cost exceeds the allowed cost,
    or the model's weights are random), or the nearest miss: too inaccurate ("inaccurate"), slower than fp32 ("slow"),
    as fast ("same"), or with an inconclusive interval ("unmeasured"). It is None if nothing could be compared
    ("unknown").
    """

    runtime: str
    outcome: Literal["deploy", "unsure", "inaccurate", "slow", "same", "unmeasured", "unknown"]
    choice: Point | None
    baseline: Point | None


def accuracy_rows(report: Report) -> list[AccuracyRow]:
    """Return a row for each variant and runtime, in the order of the report."""
    images, rows = report.evaluation.images, []
    fp32 = _baseline(report)
    scored = [accuracy for accuracy in reversed(fp32.accuracy) if name_of(fp32, accuracy.graph) == BASELINE]
    baselines = {accuracy.runtime: accuracy for accuracy in scored}  # the first file in each runtime
    for variant in report.variants:
        sizes: dict[str | None, int] = {file.path: file.size_bytes for file in variant.artifacts}
        for accuracy in variant.accuracy:
            name, drop, drop_error = name_of(variant, accuracy.graph), None, None
            other = None if name == BASELINE else baselines.get(accuracy.runtime)
            if other and other.top1 is not None and accuracy.top1 is not None:
                drop = other.top1 - accuracy.top1
                # They differ at most on the images on which one of them disagrees with the teacher.
                differing = min(200 - accuracy.agreement - other.agreement, 100.0)
                drop_error = standard_error(differing, images, drop)
            row = AccuracyRow(
                **dict(accuracy),
                variant=name,
                size_bytes=sizes.get(accuracy.graph),
                top1_error=None if accuracy.top1 is None else standard_error(accuracy.top1, images),
                drop=drop,
                drop_error=drop_error,
                agreement_error=standard_error(accuracy.agreement, images),
            )
            rows.append(row)
    return rows


def latency_rows(report: Report) -> list[LatencyRow]:
    """Return a row for each measurement, in the order of the report."""
    rows = []
    for variant in report.variants:
        for latency in variant.latency:
            name = name_of(variant, latency.graph)
            speedup = None if name == BASELINE else latency.speedup or _ratio(report, latency, BASELINE)
            over_half = None if name in FLOAT else _ratio(report, latency, HALF)
            values = dict(latency) | {"speedup": speedup}
            rows.append(LatencyRow(**values, variant=name, over_half=over_half, unsteady=_is_unsteady(latency)))
    return rows


def size_share(report: Report, size_bytes: int | None) -> float | None:
    """Return a size over that of fp32's graph for ONNX Runtime."""
    files = _baseline(report).artifacts
    float_size = next((file.size_bytes for file in files if file.target == "onnxruntime"), None)
    return size_bytes / float_size if float_size and size_bytes is not None else None


def standard_error(percentage: float, images: int, difference: float | None = None) -> float:
    """Return the standard error of a percentage of `images` images, in points.

    It is sqrt(p (1 - p) / n), with half an image added to both counts of p (Jeffreys' prior), so that it is not 0 if
    all images agree. With `difference`, in points, it is that of a paired difference, where two models differ on
    `percentage` of the images.
    """
    if not images:
        return math.nan
    share = (percentage / 100 * images + 0.5) / (images + 1)
    variance = share * (1 - share) if difference is None else share - (difference / 100) ** 2
    return 100 * math.sqrt(max(variance, 0.0) / images)


def allowed_cost(report: Report) -> float:
    """Return what a suggested variant may lose: points of top-1, or of agreement without labels."""
    return MAX_DROP if report.evaluation.labelled else MAX_DISAGREEMENT


def points(report: Report, runtime: str) -> list[Point]:
    """Return every graph with accuracy and latency in `runtime`, at the smallest batch with the most threads."""
    timed = [row for row in latency_rows(report) if row.runtime == runtime]
    measured, labelled = [], report.evaluation.labelled
    for row in accuracy_rows(report):
        timings = [timing for timing in timed if (timing.variant, timing.graph) == (row.variant, row.graph)]
        if row.runtime != runtime or not timings:
            continue
        latency = min(timings, key=lambda timing: (timing.batch, -(timing.threads or 0)))
        disagreement = (None, None) if row.variant == BASELINE else (100 - row.agreement, row.agreement_error)
        cost, cost_error = (row.drop, row.drop_error) if labelled else disagreement
        unsteady = any(map(_is_unsteady, [latency, *_counterparts(report, latency, BASELINE)]))
        share = size_share(report, row.size_bytes)
        measured.append(Point(row.variant, row, latency, cost, cost_error, _interval(latency), unsteady, share))
    return measured


def verdicts(report: Report) -> list[Verdict]:
    """Return what to deploy in each runtime that was timed, in the order of the report.

    Of the variants that lose no more than `MAX_DROP` (`MAX_DISAGREEMENT` without labels), it is the fastest; of those
    within `SPEED_TIE` of it, the one with the smallest loss. It is suggested if the whole interval of its speed-up is
    above 1. fp16 counts as a variant; torch, which only simulates integers, is left out.
    """
    timed = dict.fromkeys(latency.runtime for variant in report.variants for latency in variant.latency)
    return [_verdict(report, runtime) for runtime in timed if runtime != "torch"]


class _Candidate(NamedTuple):
    """A point with the values that a verdict compares, none of them None."""

    point: Point
    cost: float
    speedup: float
    interval: tuple[float, float]


def _verdict(report: Report, runtime: str) -> Verdict:
    measured, limit = points(report, runtime), allowed_cost(report)
    baseline = next((point for point in measured if point.variant == BASELINE), None)
    # without fp32 in the same runtime a point has neither a cost nor a speed-up
    compared = [
        _Candidate(point, point.cost, point.latency.speedup, point.interval)
        for point in measured
        if point.cost is not None and point.latency.speedup is not None and point.interval
    ]
    if not compared:
        return Verdict(runtime, "unknown", None, baseline)
    accurate = [candidate for candidate in compared if candidate.cost <= limit]
    if not accurate:
        nearest = min(compared, key=lambda candidate: candidate.cost)
        return Verdict(runtime, "inaccurate", nearest.point, baseline)
    fastest = max(candidate.speedup for candidate in accurate)
    tied = [candidate for candidate in accurate if candidate.speedup >= fastest * (1 - SPEED_TIE)]
    choice, _, _, (low, high) = min(tied, key=lambda candidate: (candidate.cost, -candidate.speedup))
    if high < 1:
        return Verdict(runtime, "slow", choice, baseline)
    if low <= 1:
        return Verdict(runtime, "unmeasured" if high > WIDEST * low else "same", choice, baseline)
    unsure = report.model.random or choice.cost_error is None or choice.cost_error > limit
    return Verdict(runtime, "unsure" if unsure else "deploy", choice, baseline)


def _baseline(report: Report) -> Variant:
    """Return the variant fp32, an empty one if there is none."""
    fp32 = (variant for variant in report.variants if variant.name == BASELINE)
    return next(fp32, Variant(name=BASELINE, seconds=0))


def name_of(variant: Variant, graph: str | None) -> str:
    """Return the name of a row about one of a variant's files: `fp16` for the float model in FP16, else the variant."""
    half = any(artifact.path == graph and artifact.fp16 for artifact in variant.artifacts)
    return HALF if half and variant.name == BASELINE else variant.name


def _is_unsteady(latency: Latency) -> bool:
    return (latency.compute or latency).coefficient_of_variation > UNSTEADY


def _counterparts(report: Report, latency: Latency, name: str) -> list[Latency]:
    """Return the latencies of `name` (fp32 or fp16) in the same runtime, at the same batch and threads."""
    setting, fp32 = (latency.runtime, latency.batch, latency.threads), _baseline(report)
    return [
        other
        for other in fp32.latency
        if (other.runtime, other.batch, other.threads) == setting and name_of(fp32, other.graph) == name
    ]


def _ratio(report: Report, latency: Latency, name: str) -> float | None:
    """Return the median of `name` (fp32 or fp16) over this one's; None if it was not measured."""
    others = _counterparts(report, latency, name)
    return others[0].median_ms / latency.median_ms if others and latency.median_ms else None


def _interval(row: LatencyRow) -> tuple[float, float] | None:
    if row.speedup is None:
        return None
    if row.speedup_low is not None and row.speedup_high is not None:
        return row.speedup_low, row.speedup_high
    return row.speedup * (1 - SPEED_TIE), row.speedup / (1 - SPEED_TIE)
