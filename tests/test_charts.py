"""The charts of report.html: what is drawn, where, in which colours, and with which words."""

import math
import re
from typing import Any

import pytest
from sample_reports import (
    CPU,
    DASH,
    FEATURES,
    FP32,
    TENSORRT,
    W4A4,
    W8A8,
    build,
    histograms,
    sensitivities,
    with_latency,
)

from clusterq_deploy.report import formats, to_html
from clusterq_deploy.results.report import LayerHistograms, Points, Report, Variant


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(build())


def section(page: str, name: str) -> str:
    return page[page.index(f'id="{name}"') :].split("</section>", maxsplit=1)[0]


def charts(page: str, name: str, described: str = "") -> list[str]:
    """Return the charts of a section whose description begins so."""
    opening = rf'<svg class="chart" role="img" aria-label="{described}'
    return re.findall(rf"{opening}.*?</svg>", section(page, name), flags=re.DOTALL)


def texts(chart: str) -> list[str]:
    return re.findall(r">([^<>\s][^<>]*)</t(?:ext|span)>", chart)


def figures(page: str, name: str) -> list[str]:
    return re.findall(r"<figure>.*?</figure>", section(page, name), flags=re.DOTALL)


def test_charts_take_their_colours_from_the_page(page: str) -> None:
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)) <= {
            "none", "var(--ink)", "var(--muted)", "var(--rule)", "var(--accent)",
            *(f"var(--class-{index})" for index in range(10)),
        }  # fmt: skip
    for mode in page.split("@media screen", 1)[0], page.split("@media screen", 1)[1].split("}", 1)[0]:
        assert set(re.findall(r"--class-(\d):", mode)) == set("0123456789")


# Training curves


def loss_chart(*values: float) -> str:
    """Return the chart of one curve."""
    (chart,) = charts(to_html(build(calibration={"losses": {"sfda": list(values)}})), "training", "sfda ")
    return chart


def path_starts(chart: str) -> list[float]:
    """Return where the path of the curve starts; it starts again after a gap."""
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--accent\)', chart)
    return [float(x) for x in re.findall(r"M (\S+)", path)]


def test_curve_has_its_range_and_its_ends() -> None:
    chart = loss_chart(5.0, 0.25, 12.5, 0.5)
    assert texts(chart) == ["start", "5.00", "end", "0.500", "0.250", "12.5", "sfda"]
    assert 'aria-label="sfda over the training: from 5.00 to 0.500, between 0.250 and 12.5"' in chart
    assert texts(loss_chart(*[0.0007] * 3)) == ["start", "0.00070", "end", "0.00070", "0.00070", "sfda"]
    assert texts(loss_chart(2.0)) == ["one value", "2.00", "2.00", "sfda"]


def test_curve_has_a_gap_where_no_value_is_finite() -> None:
    whole, late = (loss_chart(*[first] * 5, 3.0, 2.0, math.nan, 4.0, 1.0) for first in (9.0, math.nan))
    starts = path_starts(late)
    assert len(starts) == 2
    assert path_starts(whole)[0] + 20 < starts[0] < starts[1]
    assert texts(late) == ["start", DASH, "end", "1.00", "1.00", "4.00", "sfda"]
    assert "from 3.00 to 1.00, between 1.00 and 4.00; gaps where no value is finite" in late
    never = loss_chart(*[math.nan] * 4)
    assert texts(never) == ["start", DASH, "end", DASH, "no finite value", "sfda"]
    assert 'aria-label="sfda over the training: no finite value"' in never
    assert texts(loss_chart(1.0, math.nan, math.inf)) == ["start", "1.00", "end", DASH, "1.00", "sfda"]
    assert "gaps" not in loss_chart(math.nan, *[1.0, 3.0] * 240)  # means over three values: of the finite ones


def test_uniform_writes_all_with_an_exponent_or_none() -> None:
    assert [*map(formats.uniform([19.7, 0.0148]), (19.7, 0.0148, 0, math.nan))] == ["19.7", "0.0148", "0", DASH]
    assert [*map(formats.uniform([9e-5, 8e-6]), (9e-5, 8e-6, 0))] == ["9.0e-05", "8.0e-06", "0"]
    assert [*map(formats.uniform([2e6, 1.0]), (2e6, 1.0))] == ["2.0e+06", "1.0e+00"]
    assert formats.uniform([])(1.0) == "1.00"


def test_shortened_leaves_out_the_middle() -> None:
    assert formats.shortened("first" + "x" * 100 + "last", 11) == "first…xlast"
    assert formats.shortened("short", 11) == "short"


# Sensitivities


def test_sensitivity_bars_are_as_long_as_kl() -> None:
    costs = sensitivities(6.9e-6, 0.5, 1.25, prefix="x" * 60)
    costly = W4A4.model_copy(update={"sensitivities": costs, "keep": {costs[1].layer: 8}})
    (chart,) = charts(to_html(build(variants=[FP32, W8A8, costly])), "sensitivity", "Sensitivity of 3 layers")
    assert {"6.9e-06", "5.0e-01", "1.2e+00"} <= set(texts(chart))
    assert sum("\N{HORIZONTAL ELLIPSIS}" in words for words in texts(chart)) == 3  # a long name is cut
    bars = re.findall(r'<rect [^>]*width="([\d.]+)"[^>]*style="fill: var\(--(\w+)\)"', chart)
    assert [colour for _, colour in bars] == ["accent", "muted", "accent"]  # grey: has bits of its own
    shortest, middle, longest = (float(width) for width, _ in bars)
    assert shortest == 0 < middle
    assert middle / longest == pytest.approx(0.4, abs=0.01)


def test_sensitivity_bars_of_values_that_are_not_finite() -> None:
    costly = W4A4.model_copy(update={"sensitivities": sensitivities(math.nan, math.inf, 0.5)})
    (chart,) = charts(to_html(build(variants=[FP32, W8A8, costly])), "sensitivity")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([^"]*)"', chart)]
    assert widths[0] == 0
    assert widths[1] == widths[2] > 0


# Features


def places(panel: str, colour: int) -> set[tuple[str, str]]:
    """Return the dots of one colour."""
    return set(re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--class-{colour}\)', panel))


def test_projection_has_every_image_in_the_colour_of_its_class(page: str) -> None:
    synthetic, real = figures(page, "features")
    assert "<figcaption>Synthetic images</figcaption>" in synthetic
    assert "<figcaption>Real images: imagenet-val</figcaption>" in real
    for panel, count in ((synthetic, 60), (real, 48)):
        assert len(re.findall(r'<use [^>]*style="fill: var\(--class-', panel)) == count
        assert {f">{label}</text>" for label in range(12)} <= set(re.findall(r">\d+</text>", panel))
    assert "60 images of the classes 0, 1, 2" in synthetic
    assert len(places(synthetic, 4)) == 1  # all of class 4 are in one place; 0 and 10 share a colour
    assert len(places(synthetic, 0)) == 2


def test_projection_panels_have_the_same_axes(page: str) -> None:
    same = FEATURES.synthetic.model_copy(update={"dataset": "the same"})
    left, right = figures(to_html(build(features=FEATURES.model_copy(update={"real": same}))), "features")
    assert places(left, 3) == places(right, 3)
    left, right = figures(page, "features")
    (x_left, y_left), (x_right, y_right) = *places(left, 3), *places(right, 3)
    assert y_left == y_right
    assert float(x_left) > float(x_right)  # shifted by one unit


def test_projection_of_a_single_point() -> None:
    one = FEATURES.synthetic.model_copy(update={"points": Points(x=[1.5], y=[2.5], labels=[3])})
    alone = FEATURES.model_copy(update={"synthetic": one, "real": None})
    (panel,) = figures(to_html(build(features=alone)), "features")
    assert len(places(panel, 0)) == 1


# Histograms


def layers(page: str) -> list[tuple[str, list[str]]]:
    """Return the line and the figures of each layer."""
    pattern = r'<details class="layer">\s*<summary>(.*?)</summary>(.*?)</details>'
    found = re.findall(pattern, section(page, "histograms"), flags=re.DOTALL)
    return [(line, re.findall(r"<figure>.*?</figure>", body, flags=re.DOTALL)) for line, body in found]


def lines(figure: str, colour: str) -> list[float]:
    """Return where the vertical lines of one colour are."""
    (path,) = re.findall(rf'<path d="([^"]*)" style="fill: none; stroke: var\(--{colour}\)', figure)
    return [float(x) for x in re.findall(r"M (\S+)", path)]


def test_histograms_are_shown_on_demand_for_every_layer(page: str) -> None:
    assert re.findall(r"<summary>(w\w+: \d+ layers)</summary>", page) == ["w8a8: 2 layers", "w4a4: 2 layers"]
    assert "<details open" not in page
    shown = layers(page)
    assert [re.findall("<code>(.*)</code>", line)[0] for line, _ in shown] == ["conv1", "layer1.10.conv2"] * 2
    for bits, (line, (weight, read)) in zip((8, 8, 4, 4), shown, strict=True):
        assert f"weight {bits} bits, none clipped; input {bits} bits, 20.00 % clipped" in line
        assert "<figcaption>Weight: steps of 0.01 to 0.03, none of 288 clipped</figcaption>" in weight
        assert "<figcaption>Input: step 0.25, 20.00 % of 320 clipped</figcaption>" in read
        ends = [f"\N{MINUS SIGN}{1 << bits - 1}", str((1 << bits - 1) - 1)]
        assert sorted(texts(weight)) == sorted([*ends, "grid steps", "count (log)"])
        assert sorted(texts(read)) == sorted(["0", str((1 << bits) - 1), "grid steps", "count (log)"])
    described = "288 values on the grid from -8 to 7; counts, on a logarithmic scale, over grid steps"
    assert f'aria-label="Weight of layer1.10.conv2: {described}"' in page


def test_histogram_lines_are_the_values_of_the_grid(page: str) -> None:
    for (_, pair), between in zip(layers(page)[1:3], (31, 14), strict=True):
        for figure in pair:
            (low, high), inner = lines(figure, "muted"), lines(figure, "rule")
            assert len(inner) == between  # with eight bits every eighth
            assert low < inner[0] < inner[-1] < high
            gaps = [b - a for a, b in zip([low, *inner], inner, strict=False)]
            assert max(gaps) - min(gaps) < 0.25  # drawn to a tenth of a point
    weight, read = (lines(figure, "muted") for figure in layers(page)[2][1])
    assert weight[1] - weight[0] > read[1] - read[0]  # a fifth of the input is beyond its grid


def test_histogram_bins_are_logarithms_of_counts() -> None:
    weight = histograms(4)[0].weight.model_copy(update={"counts": [0, 9, 99, 0]})
    layer = LayerHistograms(layer="conv", weight=weight, activation=weight.model_copy(update={"counts": [0, 0, 0]}))
    ((_, pair),) = layers(to_html(build(variants=[Variant(name="w4a4", seconds=1.0, histograms=[layer])])))
    heights = [[float(y) for y in re.findall(r"V(-?[\d.]+)H", figure)] for figure in pair]
    assert heights[0] == pytest.approx([0, heights[0][2] / 2, heights[0][2], 0], abs=0.1)  # log 10 and log 100
    assert heights[0][2] < -50
    assert heights[1] == [0, 0, 0]


def test_histograms_of_sixty_layers_add_less_than_half_a_megabyte() -> None:
    weight, read = histograms(8)[0].weight, histograms(8)[0].activation
    shown = [
        LayerHistograms(
            layer=f"blocks.{index}.conv",
            weight=weight.model_copy(update={"counts": [index * place for place in range(1, 65)]}),
            activation=read.model_copy(update={"counts": list(range(1, 65))}),
        )
        for index in range(1, 61)
    ]
    sizes = [len(to_html(build(variants=[Variant(name="w8a8", seconds=1.0, histograms=own)]))) for own in ([], shown)]
    assert sizes[1] - sizes[0] < 400_000


# Latencies


def test_latencies_are_drawn_for_each_runtime_and_batch(page: str) -> None:
    captions = re.findall(r"<figcaption>(.*), calls of batch (\d+)</figcaption>", page)
    assert captions == [(CPU, "1"), (CPU, "32"), (TENSORRT, "1"), (TENSORRT, "32")]
    assert "Distribution of the time of a call in ms, medians: fp32" in page
    old = [with_latency(own, quantiles_ms=[]) for own in (FP32, W8A8, W4A4)]
    assert "calls of batch" not in to_html(build(variants=old))  # of an earlier version


def test_latency_box_ends_a_far_whisker_in_an_arrow() -> None:
    def spread(far: float) -> str:
        """Return the chart of boxes that end at 0.2 ms, with one whisker at `far`."""
        quantiles = [0.10 + 0.01 * step for step in range(11)] + [0.2] * 8 + [far, far + 1]
        timing = FP32.latency[0].model_copy(update={"quantiles_ms": quantiles, "median_ms": 0.2})
        update: dict[str, Any] = {"latency": [timing]}
        report: Report = build(variants=[FP32.model_copy(update=update)])
        (chart,) = charts(to_html(report), "latency")
        return chart

    near, far = spread(0.3), spread(4.3)
    for chart in (near, far):
        assert "time of a call, ms" in texts(chart)
    assert max(float(words) for words in texts(far) if re.fullmatch(r"0\.\d+", words)) <= 0.4  # the end of the axis
    assert "4.300" in texts(far)  # next to the arrow
    assert "outside the axes, 95 % of the calls: fp32 4.300 ms" in far
    assert "0.300" not in texts(near)
    assert "beyond" not in near
