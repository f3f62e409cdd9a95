"""The charts of the HTML report, as inline SVG that takes its colours and its font from the page.

matplotlib draws in placeholder colours, which are then replaced by the page's CSS variables: so a chart
follows light and dark without a script. Text stays text. The same numbers always give the same bytes.
"""

import io
import math
import re
import statistics
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from html import escape

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from calib.progress import Advance
from clusterq_deploy.report.engine_wording import shortened
from clusterq_deploy.report.engines import EngineLayer
from clusterq_deploy.report.findings import FLOAT, LatencyRow
from clusterq_deploy.report.histograms import Histogram
from clusterq_deploy.report.schema import LayerSensitivity, Points
from clusterq_deploy.report.verdicts import Point

_INK, _MUTED, _RULE, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_CLASSES = [f"#05050{digit}" for digit in range(10)]  # as many as the page has colours for
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)", _ACCENT: "var(--accent)"}
_VARIABLES |= {colour: f"var(--class-{index})" for index, colour in enumerate(_CLASSES)}
_POINT = 1 / 72  # of an inch: figures are laid out in points, which become the units of the SVG
_CURVE_POINTS = 240
_LAYER_WIDTH = 34  # characters of a layer's name beside its bar
_NAME_WIDTH = 45.0  # points that a variant's name takes, about
_GRID_LINES = 32  # a finer grid has a line at every second value, every fourth, and so on
_LEAST_RANGE = 5.0  # percentage points: a smaller range would make noise look like a difference


def tradeoff_chart(points: Sequence[Point], labelled: bool, name: str) -> str:
    """Accuracy (agreement without labels) over median latency, a labelled point for each variant.

    `name` makes the ids of this chart unique in the page.
    """
    with _style(name):
        figure, axes = _canvas(360, 250, left=0.11, right=0.97, bottom=0.17, top=0.90)
        placed = [(p.latency.median_ms, _score(p, labelled), p.variant) for p in points]
        for x, y, variant in placed:
            colour = _MUTED if variant in FLOAT else _ACCENT
            axes.plot([x], [y], "o", color=colour, markersize=7, clip_on=False, zorder=3)
        lowest, highest = min(y for _, y, _ in placed), max(y for _, y, _ in placed)
        pad = 0.2 * max(highest - lowest, _LEAST_RANGE)
        axes.set_ylim(lowest - pad, min(highest + pad, 100.0))
        axes.set_xlim(0, 1.2 * max(x for x, _, _ in placed))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(
            f"median latency, ms at batch {points[0].latency.batch}", color=_MUTED, fontsize=10, loc="right"
        )
        axes.set_title("top-1, %" if labelled else "agreement with fp32, %", color=_MUTED, fontsize=10, loc="left")
        _label(axes, placed)
        listed = "; ".join(f"{variant} {y:.2f} % at {x:.3f} ms" for x, y, variant in placed)
        return _svg(figure, name, f"Accuracy over latency in {points[0].latency.runtime}: {listed}")


def distribution_chart(rows: Sequence[LatencyRow], name: str) -> str:
    """A box for each measurement: the middle half of its calls, the median, and whiskers from 5 to 95 % of them."""
    with _style(name):
        height = 34 + 20 * len(rows)
        figure, axes = _canvas(360, height, left=0.13, right=0.97, bottom=24 / height, top=1 - 6 / height)
        boxes = []
        for row in rows:
            low, first, median, third, high = (row.latency.quantiles_ms[at] for at in (1, 5, 10, 15, 19))
            boxes.append({"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high})
        drawn = axes.bxp(boxes, orientation="horizontal", showfliers=False, widths=0.5, patch_artist=True)
        for row, box, middle in zip(rows, drawn["boxes"], drawn["medians"], strict=True):
            colour = _MUTED if row.variant in FLOAT else _ACCENT
            box.set(facecolor=colour, edgecolor=colour)
            middle.set(color=_INK, linewidth=1.6)
        for line in (*drawn["whiskers"], *drawn["caps"]):
            line.set(color=_MUTED, linewidth=0.9)
        axes.set_yticks(range(1, len(rows) + 1), [_plain(row.variant) for row in rows])
        axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=_INK)
        axes.set_ylim(len(rows) + 0.6, 0.4)
        axes.set_xlim(0, 1.05 * max(row.latency.quantiles_ms[19] for row in rows))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x", color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        medians = "; ".join(f"{row.variant} {row.latency.median_ms:.3f} ms" for row in rows)
        return _svg(figure, name, f"Distribution of the time of a call in ms, medians: {medians}")


def curve_chart(losses: Sequence[float], title: str, name: str) -> str:
    """One training curve, with its first and last finite value; a long one is drawn as means over windows."""
    with _style(name):
        figure, axes = _canvas(220, 110, left=0.03, right=0.78, bottom=0.10, top=0.76)
        window = math.ceil(len(losses) / _CURVE_POINTS) or 1
        chunks = [losses[start : start + window] for start in range(0, len(losses), window)]
        means = [sum(chunk) / len(chunk) for chunk in chunks]
        finite = [(step, value) for step, value in enumerate(means) if math.isfinite(value)]
        # A gap where the loss was not finite: matplotlib breaks the line at NaN.
        axes.plot([value if math.isfinite(value) else math.nan for value in means], color=_ACCENT, linewidth=1.3)
        axes.set_title(_plain(title), color=_INK, fontsize=12, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(0.02, 0.12)
        if finite:
            (_, first), (last_step, last) = finite[0], finite[-1]
            axes.plot([last_step], [last], "o", color=_ACCENT, markersize=3.5, clip_on=False)
            axes.annotate(
                f"{last:.3g}",
                (last_step, last),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                fontsize=12,
            )
            axes.set_title(f"from {first:.3g}", color=_MUTED, fontsize=11, loc="right")
        return _svg(figure, name, f"{title} over {len(losses)} recorded steps")


def sensitivity_chart(costs: Sequence[LayerSensitivity], kept: Collection[str], name: str) -> str:
    """A bar for each layer, as long as its KL, in order of execution; layers of other bits are grey."""
    with _style(name):
        height = 30 + 13 * len(costs)
        figure, axes = _canvas(420, height, left=0.36, right=0.90, bottom=8 / height, top=1 - 22 / height)
        places = range(len(costs))
        colours = [_MUTED if own.layer in kept else _ACCENT for own in costs]
        bars = axes.barh(places, [own.kl for own in costs], color=colours, height=0.66)
        axes.bar_label(bars, [f"{own.kl:.2g}" for own in costs], padding=4, color=_INK, fontsize=9)
        axes.set_yticks(places, [_plain(own.layer) for own in costs])
        axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
        axes.set_xticks([])
        axes.set_ylim(len(costs) - 0.4, -0.6)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title("KL from the fp32 model, nats", color=_MUTED, fontsize=10, loc="left")
        worst = max(costs, key=lambda own: own.kl)
        return _svg(figure, name, f"Sensitivity of {len(costs)} layers; the highest is {worst.layer}, {worst.kl:.2g}")


def layer_chart(layers: Sequence[EngineLayer], name: str) -> str:
    """A bar for each layer of an engine, as long as its time in a call; layers that read no INT8 are grey."""
    with _style(name):
        height = 30 + 13 * len(layers)
        figure, axes = _canvas(420, height, left=0.52, right=0.90, bottom=8 / height, top=1 - 22 / height)
        places = range(len(layers))
        colours = [_ACCENT if own.precision == "INT8" else _MUTED for own in layers]
        bars = axes.barh(places, [own.mean_ms for own in layers], color=colours, height=0.66)
        axes.bar_label(bars, [f"{own.mean_ms:.3g}" for own in layers], padding=4, color=_INK, fontsize=9)
        axes.set_yticks(places, [_plain(shortened(own.name, _LAYER_WIDTH)) for own in layers])
        axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
        axes.set_xticks([])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title("ms of a call; grey: reads no INT8", color=_MUTED, fontsize=10, loc="left")
        first = layers[0]
        return _svg(
            figure, name, f"The {len(layers)} slowest layers; the first is {first.name}, {first.mean_ms:.3g} ms"
        )


def projection_charts(sets: Sequence[tuple[str, Points]], method: str, name: str) -> list[str]:
    """A chart for each titled set of projected images, all over the same axes, with the same colour for a class.

    A class's number stands at the image that is nearest to the middle of the class. `name` makes the ids unique.
    """
    every = sorted({label for _, points in sets for label in points.labels})
    colours = {label: _CLASSES[index % len(_CLASSES)] for index, label in enumerate(every)}
    xs, ys = ([value for _, points in sets for value in getattr(points, axis)] for axis in ("x", "y"))
    middle = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    reach = 0.54 * max(max(xs) - min(xs), max(ys) - min(ys), 1e-9)
    charts = []
    for index, (title, points) in enumerate(sets):
        chart = f"{name}{index}"
        with _style(chart):
            figure, axes = _canvas(300, 300, left=0.02, right=0.98, bottom=0.02, top=0.98)
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
                    str(label), _central(own), ha="center", va="center", color=_INK, fontsize=12, fontweight="bold"
                )
            shown = ", ".join(str(label) for label in every)
            charts.append(_svg(figure, chart, f"{title}: {len(places)} images of the classes {shown} by {method}"))
    return charts


def histogram_charts(titled: Sequence[tuple[str, Histogram]], name: str, advance: Advance) -> list[str]:
    """A chart for each titled histogram: counts on a logarithmic scale, behind the values of their grid.

    The ends of a grid are stronger lines, with their integers. A page has two charts of each layer, so they are
    small, and drawn on one figure, since making a figure takes longer than drawing. `advance` hears of each.
    """
    charts = []
    with _style(name):
        figure, axes = _canvas(240, 84, left=0.03, right=0.97, bottom=0.16, top=0.99)
        axes.axis("off")
        for title, values in titled:
            _draw(axes, values)
            described = f"{title}: {sum(values.counts)} values on the grid from {values.low} to {values.high}"
            charts.append(_compact(_svg(figure, name, described)))
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
    axes.stairs(tops, edges, fill=True, facecolor=(_ACCENT, 0.2), edgecolor=_ACCENT, linewidth=0.8, clip_on=False)
    for colour, width, marks in (
        (_RULE, 0.6, range(values.low + every, values.high, every)),
        (_MUTED, 1.1, (values.low, values.high)),
    ):
        xs = [x for mark in marks for x in (mark, mark, math.nan)]  # one path: the line breaks at NaN
        axes.plot(xs, [0, highest, math.nan] * len(marks), color=colour, linewidth=width, clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.04 * highest)
    for mark in (values.low, values.high):
        number = str(mark).replace("-", "\N{MINUS SIGN}")
        axes.text(mark, -0.04 * highest, number, color=_MUTED, fontsize=8, ha="center", va="top")


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


def _style(name: str) -> AbstractContextManager[None]:
    """matplotlib's own defaults, whatever the user's are; `name` seeds the ids in the SVG."""
    fonts = {"font.sans-serif": ["DejaVu Sans"]}  # which it brings along; the page has its own
    return style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name, **fonts}])


def _canvas(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float
) -> tuple[Figure, Axes]:
    """A transparent figure of `width` x `height` points; its axes lie between the given shares of it."""
    figure = Figure(figsize=(width * _POINT, height * _POINT), frameon=False)
    axes = figure.add_axes((left, bottom, right - left, top - bottom), frameon=True)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.tick_params(colors=_MUTED, labelsize=10)
    return figure, axes


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that scales to its container."""
    page = io.StringIO()
    figure.savefig(page, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = page.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style sheet inside an inline <svg> would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f": {colour}", f": {variable}")
    opening = f'<svg class="chart" role="img" aria-label="{escape(description)}" '
    svg = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', lambda tag: f"{opening}{tag[1]}>", svg, count=1)
    return svg.strip()


def _compact(svg: str) -> str:
    """The same picture in fewer bytes: coordinates with one decimal, no line breaks, no ids of groups."""
    opening, end, drawing = svg.partition(">")  # the description in the opening tag stays as it is
    for pattern, shorter in ((r"(\d\.\d)\d+", r"\1"), (r"\s*\n\s*", " "), (r'<g id="[^"]*">', "<g>"), (r"> <", "><")):
        drawing = re.sub(pattern, shorter, drawing)
    return opening + end + drawing
