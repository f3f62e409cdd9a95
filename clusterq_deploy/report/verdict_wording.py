"""The words for what to deploy, and for what keeps that from being certain."""

from clusterq_deploy.report.findings import BASELINE
from clusterq_deploy.report.formats import interval, milliseconds, number, percent, speedup, with_error
from clusterq_deploy.report.verdicts import MAX_DISAGREEMENT, MAX_DROP, Verdict, allowed, verdicts
from clusterq_deploy.results.report import Report

_RECOGNIZED = 50.0  # percent of the synthetic images


def sentence(verdict: Verdict, labelled: bool) -> str:
    """What to deploy in one runtime, what it costs and what it saves."""
    choice, reference = verdict.choice, verdict.baseline
    if choice is None or choice.cost is None:
        return f"On {verdict.runtime} nothing can be suggested: no variant could be compared with fp32 there."
    cost = _cost(choice.cost, choice.cost_error, labelled)
    if verdict.outcome == "inaccurate":
        return (
            f"On {verdict.runtime} keep fp32: no variant stays within {limit_words(labelled)}; "
            f"the nearest, {choice.variant}, {cost}."
        )
    half = f" and {speedup(choice.over_half)} that of fp16" if choice.over_half is not None else ""
    measured = choice.latency.speedup_low is not None  # an interval says more than "about"
    between = f" ({interval(choice.interval)})" if measured else ""
    about = "about " if choice.unsteady and not measured else ""
    pace = f"{about}{speedup(choice.speedup)}{between} the speed of fp32{half} at batch {choice.latency.batch}"
    if reference is not None:
        times = milliseconds(choice.latency.median_ms), milliseconds(reference.latency.median_ms)
        pace += f" ({times[0]} ms against {times[1]} ms)"
    space = f", in {percent(verdict.size_share)} of the size" if verdict.size_share is not None else ""
    if verdict.outcome in ("same", "unmeasured"):
        between = f"({interval(choice.interval)} at batch {choice.latency.batch})"
        told = (
            f"no difference in speed from fp32 was measured for {choice.variant} {between}"
            if verdict.outcome == "same"
            else f"the speed of {choice.variant} is not measurable here {between}: the machine was busy with other work"
        )
        return f"On {verdict.runtime} {told}{_of_size(space)}; it {cost}."
    if verdict.outcome == "slow":
        return f"On {verdict.runtime} keep fp32: {choice.variant} runs at {pace}{space}; it {cost}."
    file = f" ({choice.accuracy.graph})" if choice.accuracy.graph else ""
    todo = "deploy" if verdict.outcome == "deploy" else "consider"
    return f"On {verdict.runtime} {todo} {choice.variant}{file}: {pace}{space}; it {cost}."


def headline(verdict: Verdict) -> str:
    """What to do in one runtime, in a few words."""
    variant = verdict.choice.variant if verdict.choice else ""
    words = {
        "deploy": f"Deploy {variant}",
        "unsure": f"Perhaps {variant}",
        "same": "No difference in speed",
        "unmeasured": "Not measurable here",
        "unknown": "No suggestion",
    }
    return words.get(verdict.outcome, f"Keep {BASELINE}") if variant else "No suggestion"


def caveats(report: Report) -> list[str]:
    """What keeps the suggestions from being certain, in whole sentences; most important first."""
    found, images = [], f"{report.evaluation.images:,}"
    if report.model.random:
        found.append(
            "The weights are random: what is measured here shows that the model goes through, and what it takes; it "
            "says nothing of the accuracy of a trained one."
        )
    labelled, limit = report.evaluation.labelled, limit_words(report.evaluation.labelled)
    errors = [own.choice.cost_error for own in verdicts(report) if own.choice and own.choice.cost_error is not None]
    if any(error > allowed(report) for error in errors):
        found.append(f"{images} images are too few to tell whether a variant stays within {limit}: evaluate on more.")
    top1 = report.calibration.teacher_top1
    if not labelled and report.calibration.images and top1 < _RECOGNIZED:
        found.append(
            f"The teacher gives the intended label to {top1:.0f} % of the synthetic images alone: agreement on such "
            "images says little of real ones. Evaluate on labelled images with --data."
        )
    return found


def _of_size(space: str) -> str:
    """The clause on a file's size, where nothing is said of its speed."""
    return f"; it comes{space.removeprefix(',')}" if space else ""


def limit_words(labelled: bool) -> str:
    """What a suggested variant may lose."""
    return f"{MAX_DROP:g} point of top-1" if labelled else f"{MAX_DISAGREEMENT:g} % disagreement"


def _cost(points: float, error: float | None, labelled: bool) -> str:
    if not labelled:
        agreement = with_error(100 - points, error)
        return f"agrees with the teacher on {agreement} % of the images"
    within = "" if error is None else f" (± {number(error)} points)"
    if round(points, 2) == 0:
        return f"keeps the top-1 of fp32{within}"
    return f"{'loses' if points > 0 else 'gains'} {with_error(abs(points), error)} points of top-1"
