"""Which variant to deploy in each runtime, and how sure that is."""

from dataclasses import dataclass
from typing import Literal

from clusterq_deploy.report.findings import (
    BASELINE,
    FLOAT,
    HALF,
    SPEED_TIE,
    accuracy_row,
    baseline,
    by_runtime,
    counterparts,
    file_rows,
    interval_of,
    is_unsteady,
    name_of,
    speedup_of,
)
from clusterq_deploy.results.report import Accuracy, Latency, Report, Variant

MAX_DROP = 1.0
"""Points of top-1 that a suggested variant may lose."""
MAX_DISAGREEMENT = 5.0
"""Without labels: the percentage of images on which a suggested variant may contradict the teacher."""
WIDEST = 1.25
"""Where a speed-up's interval holds 1 and its ends are further apart than this factor, it says nothing."""


@dataclass(frozen=True, slots=True)
class Point:
    """A variant that was both scored and timed in a runtime.

    `cost` is the drop in points of top-1, or the percentage of disagreement where there are no labels; `cost_error` is
    its standard error. The speed-up is over fp32, with its `interval`; it is `unsteady` where one of the two latencies
    is.
    """

    variant: str
    accuracy: Accuracy
    latency: Latency
    cost: float | None
    cost_error: float | None
    speedup: float | None
    interval: tuple[float, float] | None
    over_half: float | None
    unsteady: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to deploy in one runtime.

    `choice` is the point that is suggested ("deploy", or "unsure" where the standard error of what it costs is more
    than it may cost, or the model's weights are random), or the nearest miss: too inaccurate ("inaccurate"), slower
    than fp32 ("slow"), or neither faster nor slower as far as was measured: as fast ("same"), or with an interval that
    says nothing ("unmeasured"). It is None where nothing could be compared ("unknown").
    """

    runtime: str
    outcome: Literal["deploy", "unsure", "inaccurate", "slow", "same", "unmeasured", "unknown"]
    choice: Point | None
    baseline: Point | None
    size_share: float | None


def allowed(report: Report) -> float:
    """What a suggested variant may lose, in points of top-1, or of agreement where there are no labels."""
    return MAX_DROP if report.evaluation.labelled else MAX_DISAGREEMENT


def points(report: Report, runtime: str) -> list[Point]:
    """Every graph that was scored and timed in `runtime`, at the smallest batch with the most threads."""
    reference = baseline(report)
    scored = by_runtime(reference)
    return [
        Point(
            name,
            accuracy,
            latency,
            None if name == BASELINE else _cost(report, accuracy, scored.get(runtime)),
            None if name == BASELINE else _cost_error(report, variant, accuracy, scored.get(runtime)),
            faster,
            None if faster is None else interval_of(latency, faster),
            None if name in FLOAT else speedup_of(reference, latency, HALF),
            any(map(is_unsteady, [latency, *counterparts(reference, latency, BASELINE)])),
        )
        for variant in report.variants
        for accuracy in variant.accuracy
        if accuracy.runtime == runtime
        for name in [name_of(variant, accuracy.graph)]
        if (latency := _headline(variant, accuracy)) is not None
        for faster in [None if name == BASELINE else speedup_of(reference, latency)]
    ]


def verdicts(report: Report) -> list[Verdict]:
    """What to deploy in each runtime that was timed, in the order of the report.

    Of the variants that lose no more than `MAX_DROP` (`MAX_DISAGREEMENT` without labels), the fastest; of
    those within `SPEED_TIE` of it, the one that loses least. It is suggested where the whole interval of its speed-up
    lies above 1. fp16 counts as a variant. torch only simulates integers and is left out.
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
    limit = allowed(report)
    accurate = [candidate for candidate in known if candidate[1] <= limit]
    if not accurate:
        choice = min(known, key=lambda candidate: candidate[1])[0]
        return Verdict(runtime, "inaccurate", choice, float_point, _point_share(report, choice))
    fastest = max(speed for _, _, speed in accurate)
    tied = [candidate for candidate in accurate if candidate[2] >= fastest * (1 - SPEED_TIE)]
    choice, _, speed = min(tied, key=lambda candidate: (candidate[1], -candidate[2]))
    unsure = report.model.random or choice.cost_error is None or choice.cost_error > limit
    outcome: Literal["deploy", "unsure", "slow", "same", "unmeasured"] = "unsure" if unsure else "deploy"
    low, high = interval_of(choice.latency, speed)
    if high < 1:
        outcome = "slow"
    elif low <= 1:
        outcome = "unmeasured" if high > WIDEST * low else "same"
    return Verdict(runtime, outcome, choice, float_point, _point_share(report, choice))


def _cost(report: Report, accuracy: Accuracy, reference: Accuracy | None) -> float | None:
    if not report.evaluation.labelled:
        return 100 - accuracy.agreement
    if reference is None or reference.top1 is None or accuracy.top1 is None:
        return None
    return reference.top1 - accuracy.top1


def _cost_error(report: Report, variant: Variant, accuracy: Accuracy, reference: Accuracy | None) -> float | None:
    row = accuracy_row(report.evaluation.images, variant, accuracy, reference)
    return row.drop_error if report.evaluation.labelled else row.agreement_error


def _headline(variant: Variant, accuracy: Accuracy) -> Latency | None:
    timed = [
        latency
        for latency in variant.latency
        if latency.runtime == accuracy.runtime and latency.graph == accuracy.graph
    ]
    return min(timed, key=lambda latency: (latency.batch, -(latency.threads or 0)), default=None)


def _point_share(report: Report, point: Point) -> float | None:
    for row in file_rows(report):
        if row.artifact.path == point.accuracy.graph:
            return row.share
    return None
