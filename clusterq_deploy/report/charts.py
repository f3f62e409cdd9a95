"""The charts of the HTML report, as inline SVG with the colours and the font of the page.

matplotlib draws in placeholder colours, which are replaced by the page's CSS variables for light and dark mode. Text
stays text. The same numbers always result in the same bytes. The page's template draws bars and histograms; this module
computes their lengths.
"""

import io
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clusterq_deploy.report import formats
from clusterq_deploy.report.analysis import BASELINE, FLOAT, LatencyRow, Point, latency_rows, points, verdicts
from clusterq_deploy.report.formats import scientific
from clusterq_deploy.report.plans import megabytes, plans
from clusterq_deploy.results.report import Histogram, Points, Report

_INK, _MUTED, _RULE, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_CLASSES = [f"#05050{digit}" for digit in range(10)]  # as many as the page has colours for
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)", _ACCENT: "var(--accent)"}
_VARIABLES |= {colour: f"var(--class-{index})" for index, colour in enumerate(_CLASSES)}
_WIDTH, _TEXT = 340, 10.5  # of a chart and its text, in points: on a phone with 327 px, text is larger than 10 px
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), _TEXT),
    **dict.fromkeys(("text.color", "axes.titlecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _RULE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "figure.frameon"), False),
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "xaxis.labellocation": "right",
    "grid.linewidth": 0.7,
    "font.sans-serif": ["DejaVu Sans"],  # for the layout; it comes with matplotlib
    "svg.fonttype": "none",
}
_CURVE_WIDTH = 146  # two curves fit side by side on a phone, each 142 px wide
_CURVE_POINTS = 240
_LAYER_WIDTH = 28  # characters of a layer's name next to its bar
_NAME_WIDTH = 45.0  # approximate width of a variant's name, in points
_GRID_LINES = 32  # a finer grid has a line at every second value, every fourth, and so on
_LEAST_RANGE = 5.0  # percentage points: a smaller range would make noise look like a difference
_FARTHEST = 2.0  # maximum of an axis of latencies, relative to the end of the last box


class Bar(NamedTuple):
    """One bar: its `share` of the longest, in [0, 1], the number at its end, and whether it is grey."""

    label: str
    share: float
    number: str
    grey: bool


class Bars(NamedTuple):
    """A chart of bars; screen readers read its description."""

    title: str
    description: str
    bars: list[Bar]


class Bins(NamedTuple):
    """A histogram of width 1: the heights of its bins in [0, 1], and the places of some values of its grid.

    `ends` are the outermost values, with their integers; `lines` are between them.
    """

    description: str
    heights: list[float]
    lines: list[float]
    ends: list[tuple[float, str]]


def tradeoff_charts(report: Report) -> list[tuple[str, str]]:
    """Return runtime and chart for each runtime in which accuracy and latency were measured."""
    measured = {verdict.runtime: points(report, verdict.runtime) for verdict in verdicts(report)}
    return [
        (runtime, _tradeoff_chart(candidates, report.evaluation.labelled, f"tradeoff{index}"))
        for index, (runtime, candidates) in enumerate(measured.items())
        if candidates
    ]


def _tradeoff_chart(points: Sequence[Point], labelled: bool, name: str) -> str:
    """Draw accuracy (agreement without labels) over median latency, a labelled point for each variant."""
    latency, places = points[0].latency, []
    for point in points:
        score = point.accuracy.top1 if labelled else None
        places.append((point.latency.median_ms, point.accuracy.agreement if score is None else score, point.variant))
    with _style(name):
        figure, axes = _canvas(_WIDTH, 250, left=0.13, right=0.97, bottom=0.17, top=0.86)
        for x, y, variant in places:
            axes.plot([x], [y], "o", color=_colour(variant), markersize=7, clip_on=False, zorder=3)
        lowest, highest = min(y for _, y, _ in places), max(y for _, y, _ in places)
        pad = 0.2 * max(highest - lowest, _LEAST_RANGE)
        axes.set_ylim(lowest - pad, min(highest + pad, 100.0))
        axes.set_xlim(0, 1.2 * max(x for x, _, _ in places))
        axes.locator_params(nbins=5)
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"median latency, ms at batch {latency.batch}")
        axes.set_title("top-1, %" if labelled else f"agreement with {BASELINE}, %", pad=14)  # clear of names at the top
        _label_points(axes, places)
        listed = "; ".join(f"{variant} {y:.2f} % at {x:.3f} ms" for x, y, variant in places)
        return _svg(figure, name, f"Accuracy over latency in {latency.runtime}: {listed}")


def _label_points(axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Write each name to the right of its point, to the left if another point is there; move overlapping names down."""
    scale = 72 / axes.figure.dpi
    spots = [tuple(axes.transData.transform((x, y)) * scale) for x, y, _ in places]
    taken: list[tuple[float, float]] = []
    for (column, row), (x, y, variant) in sorted(zip(spots, places, strict=True), key=lambda item: -item[0][1]):
        left = any(0 < other - column < _NAME_WIDTH and abs(height - row) < 10 for other, height in spots)
        start, shift = column + (-_NAME_WIDTH if left else 0), 0.0
        for other_start, other_row in taken:
            if abs(start - other_start) < _NAME_WIDTH and row + shift > other_row - 13:
                shift = other_row - 13 - row
        taken.append((start, row + shift))
        axes.annotate(
            _plain(variant),
            (x, y),
            (-9 if left else 9, shift),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=_INK,
            fontsize=11,
            fontweight="normal" if variant in FLOAT else "bold",
            zorder=2.5,
        )


def distribution_charts(report: Report) -> list[tuple[str, str]]:
    """Return caption and chart for each runtime and batch size with quantiles."""
    groups: dict[tuple[str, int], list[LatencyRow]] = {}
    for row in latency_rows(report):
        if row.quantiles_ms:
            groups.setdefault((row.runtime, row.batch), []).append(row)
    return [
        (f"{runtime}, calls of batch {batch}", _distribution_chart(rows, f"distribution{index}"))
        for index, ((runtime, batch), rows) in enumerate(groups.items())
    ]


def _distribution_chart(rows: Sequence[LatencyRow], name: str) -> str:
    """Draw a box for each measurement: the middle half of its calls, the median, and whiskers from 5 to 95 %.

    A whisker that would make the boxes unreadable ends at the edge, in an arrow and its number.
    """
    last_box = max(row.quantiles_ms[15] for row in rows)
    limit = min(1.05 * max(row.quantiles_ms[19] for row in rows), _FARTHEST * last_box)
    beyond = {at: end for at, row in enumerate(rows, 1) if (end := row.quantiles_ms[19]) > limit}
    parts = {"whislo": 1, "q1": 5, "med": 10, "q3": 15, "whishi": 19}
    boxes = [{part: row.quantiles_ms[at] for part, at in parts.items()} for row in rows]
    with _style(name):
        height = 52 + 20 * len(rows)
        right = 0.85 if beyond else 0.97
        figure, axes = _canvas(_WIDTH, height, left=0.14, right=right, bottom=42 / height, top=1 - 6 / height)
        drawn = axes.bxp(boxes, orientation="horizontal", showfliers=False, widths=0.5, patch_artist=True)
        for row, box, middle in zip(rows, drawn["boxes"], drawn["medians"], strict=True):
            box.set(facecolor=_colour(row.variant), edgecolor=_colour(row.variant))
            middle.set(color=_INK, linewidth=1.6)
        for line in (*drawn["whiskers"], *drawn["caps"]):
            line.set(color=_MUTED, linewidth=0.9)
        axes.set_yticks(range(1, len(rows) + 1), [_plain(row.variant) for row in rows], color=_INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) + 0.6, 0.4)
        axes.set_xlim(0, limit)
        for at, end in beyond.items():
            axes.plot([limit], [at], ">", color=_MUTED, markersize=5, clip_on=False)
            axes.annotate(formats.milliseconds(end), (limit, at), (6, 0), textcoords="offset points", va="center")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        axes.set_xlabel("time of a call, ms")
        medians = "; ".join(f"{row.variant} {row.median_ms:.3f} ms" for row in rows)
        ends = "; ".join(f"{rows[at - 1].variant} {formats.milliseconds(end)} ms" for at, end in beyond.items())
        far = f"; outside the axes, 95 % of the calls: {ends}" if ends else ""
        return _svg(figure, name, f"Distribution of the time of a call in ms, medians: {medians}{far}")


def curve_charts(report: Report) -> list[tuple[str, dict[str, str]]]:
    """Return the training curves of each stage that has any, by name."""
    stages = {"Synthesis": report.calibration.losses} | {variant.name: variant.losses for variant in report.variants}
    charts = []
    for at, (stage, losses) in enumerate(stages.items()):
        names = {name: f"curve{at}-{i}" for i, name in enumerate(losses) if losses[name]}
        charts.append((stage, {name: _curve_chart(losses[name], name, unique) for name, unique in names.items()}))
    return [(stage, curves) for stage, curves in charts if curves]


def _curve_chart(losses: Sequence[float], title: str, name: str) -> str:
    """Draw one training curve, with its lowest and highest value at the left, and its first and last value below.

    `losses` may have been thinned, so steps have no numbers. Values that are not finite are gaps, for instance if a
    term is not computed at first. A long curve is drawn as means over windows.
    """
    window = math.ceil(len(losses) / _CURVE_POINTS) or 1
    means = [_finite_mean(losses[start : start + window]) for start in range(0, len(losses), window)]
    finite = [(step, value) for step, value in enumerate(means) if math.isfinite(value)]
    written = formats.uniform([value for _, value in finite])
    with _style(name):
        figure, axes = _canvas(_CURVE_WIDTH, 118, left=0.39, right=0.96, bottom=0.27, top=0.82)
        figure.text(0, 1, _plain(title), color=_INK, fontsize=_TEXT + 1, va="top")
        axes.plot(means, color=_ACCENT, linewidth=1.2)  # the line breaks at NaN
        axes.margins(0.02, 0.06)
        axes.tick_params(length=2.5)
        axes.set_xlim(-0.02 * len(means), 1.02 * len(means) - 1)
        if finite:
            axes.plot(*finite[-1], "o", color=_ACCENT, markersize=3, clip_on=False)
            lowest, highest = (choose(value for _, value in finite) for choose in (min, max))
            ticks = sorted({lowest, highest})
            axes.set_yticks(ticks, [written(tick) for tick in ticks])
            first, last, low, high = (written(value) for value in (finite[0][1], finite[-1][1], lowest, highest))
            description = f"from {first} to {last}, between {low} and {high}"
            description += "; gaps where no value is finite" if len(finite) < len(means) else ""
        else:
            description = "no finite value"
            axes.set_yticks([])
            axes.text(0.5, 0.5, description, ha="center", transform=axes.transAxes)
        ends = {0: "start", len(means) - 1: "end"} if len(means) > 1 else {0: "one value"}
        axes.set_xticks(list(ends), [f"{word}\n{written(means[step])}" for step, word in ends.items()])
        axes.get_xticklabels()[-1].set_horizontalalignment("right" if len(means) > 1 else "center")
        return _svg(figure, name, f"{title} over the training: {description}")


def projection_charts(report: Report) -> list[tuple[str, str]]:
    """Return title and chart for each set of projected images, with the same axes and the same colour of each class.

    The number of a class is at the image that is nearest to the median of the class.
    """
    features = report.features
    if features is None or features.projection is None:
        return []
    sets = {"Synthetic images": features.synthetic.points}
    if features.real is not None:
        sets[f"Real images: {features.real.dataset}"] = features.real.points
    labels = sorted({label for images in sets.values() for label in images.labels})
    xs, ys = ([value for images in sets.values() for value in getattr(images, axis)] for axis in ("x", "y"))
    middle = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    reach = 0.54 * max(max(xs) - min(xs), max(ys) - min(ys), 1e-9)
    shown = f"images of the classes {', '.join(map(str, labels))} by {features.projection.method}"
    charts = []
    for index, (title, images) in enumerate(sets.items()):
        with _style(name := f"features{index}"):
            figure, axes = _canvas(300, 300, left=0.02, right=0.98, bottom=0.02, top=0.98)
            axes.set_xlim(middle[0] - reach, middle[0] + reach)
            axes.set_ylim(middle[1] - reach, middle[1] + reach)
            axes.axis("off")
            for place, label in enumerate(labels):
                _draw_class(axes, images, label, _CLASSES[place % len(_CLASSES)])
            charts.append((title, _svg(figure, name, f"{title}: {len(images.labels)} {shown}")))
    return charts


def _draw_class(axes: Axes, points: Points, label: int, colour: str) -> None:
    places = [(x, y) for x, y, other in zip(points.x, points.y, points.labels, strict=True) if other == label]
    if not places:
        return
    xs, ys = zip(*places, strict=True)
    middle = statistics.median(xs), statistics.median(ys)
    nearest = min(places, key=lambda place: math.dist(place, middle))
    axes.plot(xs, ys, "o", color=colour, markersize=3, markeredgewidth=0)
    axes.annotate(str(label), nearest, ha="center", va="center", color=_INK, fontsize=12, fontweight="bold")


def sensitivity_bars(report: Report) -> list[Bars]:
    """Return a bar per layer for its KL, in order of execution; layers in `keep` are grey."""
    charts = []
    for variant in report.variants:
        if layers := variant.sensitivities:
            worst = max(layers, key=lambda layer: layer.kl)
            described = f"Sensitivity of {len(layers)} layers; the highest is {worst.layer}, {scientific(worst.kl)}"
            rows = [(layer.layer, layer.kl, scientific(layer.kl), layer.layer in variant.keep) for layer in layers]
            charts.append(Bars("KL from the fp32 model, nats", described, _bars(rows)))
    return charts


def plan_bars(report: Report) -> list[Bars]:
    """Return the bytes that each plan of TensorRT-RTX moves, and its kernels; those of float engines are grey."""
    shown = plans(report)
    moved = [(name, plan.bytes_moved, megabytes(plan.bytes_moved), name in FLOAT) for name, plan in shown]
    kernels = [(name, plan.kernels, str(plan.kernels), name in FLOAT) for name, plan in shown]
    charts = {"activations read and written, MB per image": moved, "kernels": kernels}
    return [
        Bars(title, f"{title}: {', '.join(f'{name} {number}' for name, _, number, _ in rows)}", _bars(rows))
        for title, rows in charts.items()
        if rows
    ]


def slowest_bars(report: Report) -> list[Bars]:
    """Return a bar per slow layer of each engine for its time; layers without INT8 inputs are grey."""
    charts = []
    for layers in (inspection.slowest for variant in report.variants for inspection in variant.inspections):
        if layers:
            described = f"The {len(layers)} slowest layers; the first is {layers[0].name}, {layers[0].mean_ms:.3g} ms"
            rows = [(layer.name, layer.mean_ms, f"{layer.mean_ms:.3g}", layer.precision != "INT8") for layer in layers]
            charts.append(Bars("ms of a call; grey: input is not INT8", described, _bars(rows)))
    return charts


def _bars(rows: Sequence[tuple[str, float, str, bool]]) -> list[Bar]:
    longest = max((length for _, length, *_ in rows if math.isfinite(length)), default=0.0) or 1.0
    return [
        Bar(formats.shortened(name, _LAYER_WIDTH), max(0.0, min(length / longest, 1.0)), number, grey)
        for name, length, number, grey in rows
    ]


def bins(title: str, values: Histogram) -> Bins:
    """Return the bins of a histogram, with counts on a logarithmic scale."""
    width = values.width * len(values.counts)
    highest = math.log1p(max(values.counts)) or 1.0
    stride = 2 ** max(0, math.ceil(math.log2((values.high - values.low + 1) / _GRID_LINES)))
    return Bins(
        f"{title}: {sum(values.counts)} values on the grid from {values.low} to {values.high}; "
        "counts, on a logarithmic scale, over grid steps",
        [math.log1p(count) / highest for count in values.counts],
        [(mark - values.start) / width for mark in range(values.low + stride, values.high, stride)],
        [((mark - values.start) / width, formats.number(mark, 0)) for mark in (values.low, values.high)],
    )


def _style(name: str) -> AbstractContextManager[None]:
    """Use the page's style instead of the user's; `name` seeds the ids in the SVG."""
    return style.context(["default", _STYLE | {"svg.hashsalt": name}])


def _canvas(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float
) -> tuple[Figure, Axes]:
    """Return a figure of `width` x `height` points, the units of its SVG, and axes between these fractions of it."""
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.add_axes((left, bottom, right - left, top - bottom))


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an `<svg>` element that scales to its container; `name` makes its ids unique in the page."""
    page = io.StringIO()
    figure.savefig(page, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = page.getvalue()
    text = text[text.index("<svg") :]
    # a style sheet inside an inline <svg> would apply to the whole page
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(f": {colour}", f": {variable}")
    opening = f'<svg class="chart" role="img" aria-label="{escape(description)}" '
    text = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', lambda tag: f"{opening}{tag[1]}>", text, count=1)
    return text.strip()


def _plain(text: str) -> str:
    """Escape text that matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def _colour(variant: str) -> str:
    return _MUTED if variant in FLOAT else _ACCENT


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
