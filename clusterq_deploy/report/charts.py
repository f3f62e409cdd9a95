"""The charts of the HTML report, as inline SVG that takes its colours and its font from the page."""

import math
import statistics
from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from calib.support.progress import Advance
from clusterq_deploy.report import formats
from clusterq_deploy.report.canvas import (
    ACCENT,
    CLASSES,
    INK,
    MUTED,
    RULE,
    TEXT,
    WIDTH,
    canvas,
    chart_style,
    compact,
    plain,
    svg,
)
from clusterq_deploy.report.engine_wording import shortened
from clusterq_deploy.report.findings import FLOAT, LatencyRow
from clusterq_deploy.report.verdicts import Point
from clusterq_deploy.results.engines import EngineLayer
from clusterq_deploy.results.features import Points
from clusterq_deploy.results.report import Histogram, LayerSensitivity

_CURVE_POINTS = 240
_CURVE_WIDTH = 146  # two curves stand side by side on a phone, each some 142 px wide
_LAYER_WIDTH = 28  # characters of a layer's name beside its bar
_LETTER = 6.3  # points that a letter takes, about
_NAME_WIDTH = 45.0  # points that a variant's name takes, about
_GRID_LINES = 32  # a finer grid has a line at every second value, every fourth, and so on
_LEAST_RANGE = 5.0  # percentage points: a smaller range would make noise look like a difference
_FARTHEST = 2.0  # times the end of the last box: where an axis of latencies ends, whatever the whiskers


def tradeoff_chart(points: Sequence[Point], labelled: bool, name: str) -> str:
    """Accuracy (agreement without labels) over median latency, a labelled point for each variant.

    `name` makes the ids of this chart unique in the page.
    """
    with chart_style(name):
        figure, axes = canvas(WIDTH, 250, left=0.13, right=0.97, bottom=0.17, top=0.86)
        placed = [(p.latency.median_ms, _score(p, labelled), p.variant) for p in points]
        for x, y, variant in placed:
            colour = MUTED if variant in FLOAT else ACCENT
            axes.plot([x], [y], "o", color=colour, markersize=7, clip_on=False, zorder=3)
        lowest, highest = min(y for _, y, _ in placed), max(y for _, y, _ in placed)
        pad = 0.2 * max(highest - lowest, _LEAST_RANGE)
        axes.set_ylim(lowest - pad, min(highest + pad, 100.0))
        axes.set_xlim(0, 1.2 * max(x for x, _, _ in placed))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(
            f"median latency, ms at batch {points[0].latency.batch}", color=MUTED, fontsize=TEXT, loc="right"
        )
        title = "top-1, %" if labelled else "agreement with fp32, %"
        axes.set_title(title, color=MUTED, fontsize=TEXT, loc="left", pad=14)  # clear of names at the top
        _label(axes, placed)
        listed = "; ".join(f"{variant} {y:.2f} % at {x:.3f} ms" for x, y, variant in placed)
        return svg(figure, name, f"Accuracy over latency in {points[0].latency.runtime}: {listed}")


def distribution_chart(rows: Sequence[LatencyRow], name: str) -> str:
    """A box for each measurement: the middle half of its calls, the median, and whiskers from 5 to 95 % of them.

    A whisker that is long beside the boxes would make them unreadable: it ends at the edge, in an arrow and its number.
    """
    with chart_style(name):
        widest = max(row.latency.quantiles_ms[15] for row in rows)
        limit = min(1.05 * max(row.latency.quantiles_ms[19] for row in rows), _FARTHEST * widest)
        beyond = {at: own for at, row in enumerate(rows, 1) if (own := row.latency.quantiles_ms[19]) > limit}
        height = 52 + 20 * len(rows)
        right = 0.85 if beyond else 0.97
        figure, axes = canvas(WIDTH, height, left=0.14, right=right, bottom=42 / height, top=1 - 6 / height)
        boxes = []
        for row in rows:
            low, first, median, third, high = (row.latency.quantiles_ms[at] for at in (1, 5, 10, 15, 19))
            boxes.append({"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high})
        drawn = axes.bxp(boxes, orientation="horizontal", showfliers=False, widths=0.5, patch_artist=True)
        for row, box, middle in zip(rows, drawn["boxes"], drawn["medians"], strict=True):
            colour = MUTED if row.variant in FLOAT else ACCENT
            box.set(facecolor=colour, edgecolor=colour)
            middle.set(color=INK, linewidth=1.6)
        for line in (*drawn["whiskers"], *drawn["caps"]):
            line.set(color=MUTED, linewidth=0.9)
        axes.set_yticks(range(1, len(rows) + 1), [plain(row.variant) for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(rows) + 0.6, 0.4)
        axes.set_xlim(0, limit)
        for at, end in beyond.items():
            axes.plot([limit], [at], ">", color=MUTED, markersize=5, clip_on=False)
            _beside(axes, formats.milliseconds(end), (limit, at))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x", color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("time of a call, ms", color=MUTED, fontsize=TEXT, loc="right")
        medians = "; ".join(f"{row.variant} {row.latency.median_ms:.3f} ms" for row in rows)
        ends = "; ".join(f"{rows[at - 1].variant} {formats.milliseconds(end)} ms" for at, end in beyond.items())
        far = f"; beyond the picture, 95 % of the calls: {ends}" if ends else ""
        return svg(figure, name, f"Distribution of the time of a call in ms, medians: {medians}{far}")


def curve_chart(losses: Sequence[float], title: str, name: str) -> str:
    """One training curve: its lowest and highest value beside it, those of its start and end below it.

    `losses` may have been thinned, so the axis has no numbers of steps. What is not finite is a gap, as where a term
    is not computed at first. A long curve is drawn as means over windows.
    """
    with chart_style(name):
        window = math.ceil(len(losses) / _CURVE_POINTS) or 1
        means = [_mean(losses[start : start + window]) for start in range(0, len(losses), window)]
        finite = [(step, value) for step, value in enumerate(means) if math.isfinite(value)]
        written = formats.alike([value for _, value in finite])
        figure, axes = canvas(_CURVE_WIDTH, 118, left=0.39, right=0.96, bottom=0.27, top=0.82)
        figure.text(0, 1, plain(title), color=INK, fontsize=TEXT + 1, va="top")
        axes.plot(means, color=ACCENT, linewidth=1.2)  # the line breaks at NaN
        axes.spines["left"].set_visible(False)
        axes.margins(0.02, 0.06)
        axes.tick_params(length=2.5)
        axes.set_xlim(-0.02 * len(means), 1.02 * len(means) - 1)
        described = f"{title} over the training"
        if finite:
            axes.plot(*finite[-1], "o", color=ACCENT, markersize=3, clip_on=False)
            lowest, highest = (choose(value for _, value in finite) for choose in (min, max))
            first, last = (written(value) for _, value in (finite[0], finite[-1]))
            described += f": from {first} to {last}, between {written(lowest)} and {written(highest)}"
            ticks = sorted({lowest, highest})
            axes.set_yticks(ticks, [written(tick) for tick in ticks])
            described += "; gaps where no value is finite" if len(finite) < len(means) else ""
        else:
            described += ": no finite value"
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no finite value", color=MUTED, fontsize=TEXT, ha="center", transform=axes.transAxes)
        ends = {0: "start", len(means) - 1: "end"} if len(means) > 1 else {0: "one value"}
        axes.set_xticks(list(ends), [f"{word}\n{written(means[step])}" for step, word in ends.items()])
        axes.get_xticklabels()[-1].set_horizontalalignment("right" if len(means) > 1 else "center")
        return svg(figure, name, described)


def sensitivity_chart(costs: Sequence[LayerSensitivity], kept: Collection[str], name: str) -> str:
    """A bar for each layer, as long as its KL, in order of execution; layers of other bits are grey."""
    rows = [(own.layer, own.kl, formats.scientific(own.kl), own.layer not in kept) for own in costs]
    worst = max(costs, key=lambda own: own.kl)
    described = f"Sensitivity of {len(costs)} layers; the highest is {worst.layer}, {formats.scientific(worst.kl)}"
    return _bar_chart(rows, "KL from the fp32 model, nats", name, described)


def layer_chart(layers: Sequence[EngineLayer], name: str) -> str:
    """A bar for each layer of an engine, as long as its time in a call; layers that read no INT8 are grey."""
    rows = [(own.name, own.mean_ms, f"{own.mean_ms:.3g}", own.precision == "INT8") for own in layers]
    described = f"The {len(layers)} slowest layers; the first is {layers[0].name}, {layers[0].mean_ms:.3g} ms"
    return _bar_chart(rows, "ms of a call; grey: reads no INT8", name, described)


def _bar_chart(rows: Sequence[tuple[str, float, str, bool]], title: str, name: str, described: str) -> str:
    """A bar for each layer: its name, its length, that as a number, and whether it is coloured, grey otherwise."""
    with chart_style(name):
        height = 30 + 15 * len(rows)
        layers = [shortened(layer, _LAYER_WIDTH) for layer, *_ in rows]
        left = (10 + _LETTER * max(map(len, layers))) / WIDTH
        figure, axes = canvas(WIDTH, height, left=left, right=0.84, bottom=8 / height, top=1 - 22 / height)
        colours = [ACCENT if coloured else MUTED for *_, coloured in rows]
        bars = axes.barh(range(len(rows)), [length for _, length, *_ in rows], color=colours, height=0.66)
        axes.bar_label(bars, [number for _, _, number, _ in rows], padding=4, color=INK, fontsize=TEXT)
        axes.set_yticks(range(len(rows)), [plain(layer) for layer in layers])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xticks([])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(title, color=MUTED, fontsize=TEXT, loc="left")
        return svg(figure, name, described)


def projection_charts(sets: Sequence[tuple[str, Points]], method: str, name: str) -> list[str]:
    """A chart for each titled set of projected images, all over the same axes, with the same colour for a class.

    A class's number stands at the image that is nearest to the middle of the class. `name` makes the ids unique.
    """
    every = sorted({label for _, points in sets for label in points.labels})
    colours = {label: CLASSES[index % len(CLASSES)] for index, label in enumerate(every)}
    xs, ys = ([value for _, points in sets for value in getattr(points, axis)] for axis in ("x", "y"))
    middle = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    reach = 0.54 * max(max(xs) - min(xs), max(ys) - min(ys), 1e-9)
    charts = []
    for index, (title, points) in enumerate(sets):
        chart = f"{name}{index}"
        with chart_style(chart):
            figure, axes = canvas(300, 300, left=0.02, right=0.98, bottom=0.02, top=0.98)
            axes.set_xlim(middle[0] - reach, middle[0] + reach)
            axes.set_ylim(middle[1] - reach, middle[1] + reach)
            axes.set_xticks([])
            axes.set_yticks([])
            places = list(zip(points.labels, points.x, points.y, strict=True))
            for label in every:
                own = [(x, y) for other, x, y in places if other == label]
                if not own:
                    continue
                axes.plot(*zip(*own, strict=True), "o", color=colours[label], markersize=3, markeredgewidth=0)
                axes.annotate(
                    str(label), _central(own), ha="center", va="center", color=INK, fontsize=12, fontweight="bold"
                )
            shown = ", ".join(str(label) for label in every)
            charts.append(svg(figure, chart, f"{title}: {len(places)} images of the classes {shown} by {method}"))
    return charts


def histogram_charts(titled: Sequence[tuple[str, Histogram]], name: str, advance: Advance) -> list[str]:
    """A chart for each titled histogram: counts on a logarithmic scale, behind the values of their grid.

    The ends of a grid are stronger lines, with their integers. A page has two charts of each layer, so they are
    small, and drawn on one figure, since making a figure takes longer than drawing. `advance` hears of each.
    """
    charts = []
    with chart_style(name):
        figure, axes = canvas(240, 96, left=0.08, right=0.97, bottom=0.25, top=0.99)
        axes.axis("off")
        figure.text(0.525, 0.01, "grid steps", color=MUTED, fontsize=8, ha="center", va="bottom")
        figure.text(0.01, 0.62, "count (log)", color=MUTED, fontsize=8, ha="left", va="center", rotation=90)
        for title, values in titled:
            _draw(axes, values)
            described = (
                f"{title}: {sum(values.counts)} values on the grid from {values.low} to {values.high}; "
                "counts, on a logarithmic scale, over grid steps"
            )
            charts.append(compact(svg(figure, name, described)))
            for artist in (*axes.lines, *axes.patches, *axes.texts):
                artist.remove()
            advance()
    return charts


def _draw(axes: Axes, values: Histogram) -> None:
    tops = [math.log1p(count) for count in values.counts]
    edges = [values.start + index * values.width for index in range(len(tops) + 1)]
    highest, every = max(tops), 1
    while (values.high - values.low + 1) / every > _GRID_LINES:
        every *= 2
    axes.stairs(tops, edges, fill=True, facecolor=(ACCENT, 0.2), edgecolor=ACCENT, linewidth=0.8, clip_on=False)
    for colour, width, marks in (
        (RULE, 0.6, range(values.low + every, values.high, every)),
        (MUTED, 1.1, (values.low, values.high)),
    ):
        xs = [x for mark in marks for x in (mark, mark, math.nan)]  # one path: the line breaks at NaN
        axes.plot(xs, [0, highest, math.nan] * len(marks), color=colour, linewidth=width, clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.04 * highest)
    for mark in (values.low, values.high):
        number = str(mark).replace("-", "\N{MINUS SIGN}")
        axes.text(mark, -0.04 * highest, number, color=MUTED, fontsize=8, ha="center", va="top")


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite ones; NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _beside(axes: Axes, text: str, place: tuple[float, float]) -> None:
    """Write right of a point."""
    axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", color=MUTED, fontsize=TEXT)


def _central(places: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The place that is nearest to the median of all."""
    x, y = (statistics.median(column) for column in zip(*places, strict=True))
    return min(places, key=lambda place: math.dist(place, (x, y)))


def _score(point: Point, labelled: bool) -> float:
    top1 = point.accuracy.top1
    return top1 if labelled and top1 is not None else point.accuracy.agreement


def _label(axes: Axes, placed: Sequence[tuple[float, float, str]]) -> None:
    """Write each name right of its point, left where another point is; names that would overlap move down."""
    scale = 72 / axes.figure.dpi
    spots = [tuple(axes.transData.transform((x, y)) * scale) for x, y, _ in placed]
    taken: list[tuple[float, float]] = []
    for (column, row), (x, y, variant) in sorted(zip(spots, placed, strict=True), key=lambda item: -item[0][1]):
        left = any(0 < other - column < _NAME_WIDTH and abs(height - row) < 10 for other, height in spots)
        start, shift = column + (-_NAME_WIDTH if left else 0), 0.0
        for other_start, other_row in taken:
            if abs(start - other_start) < _NAME_WIDTH and row + shift > other_row - 13:
                shift = other_row - 13 - row
        taken.append((start, row + shift))
        axes.annotate(
            plain(variant),
            (x, y),
            (-9 if left else 9, shift),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=INK,
            fontsize=11,
            fontweight="normal" if variant in FLOAT else "bold",
            zorder=2.5,
        )
