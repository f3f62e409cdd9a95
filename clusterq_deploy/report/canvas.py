"""What all charts of the HTML report share: a canvas in placeholder colours, and the SVG that it becomes.

matplotlib draws in placeholder colours, which are then replaced by the page's CSS variables: so a chart
follows light and dark without a script. Text stays text. The same numbers always give the same bytes.
"""

import io
import re
from contextlib import AbstractContextManager
from html import escape

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT = "#010101", "#020202", "#030303", "#040404"
CLASSES = [f"#05050{digit}" for digit in range(10)]  # as many as the page has colours for
WIDTH, TEXT = 340, 10.5
"""Width of a chart and size of its text, in points: on a phone, where it is some 327 px wide, text stays above 10."""
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES |= {colour: f"var(--class-{index})" for index, colour in enumerate(CLASSES)}
_POINT = 1 / 72  # of an inch: figures are laid out in points, which become the units of the SVG


def chart_style(name: str) -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever the user's are; `name` seeds the ids in the SVG."""
    fonts = {"font.sans-serif": ["DejaVu Sans"]}  # which it brings along; the page has its own
    return style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name, **fonts}])


def canvas(width: float, height: float, *, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """A transparent figure of `width` x `height` points; its axes lie between the given shares of it."""
    figure = Figure(figsize=(width * _POINT, height * _POINT), frameon=False)
    axes = figure.add_axes((left, bottom, right - left, top - bottom), frameon=True)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=TEXT)
    return figure, axes


def plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that scales to its container."""
    page = io.StringIO()
    figure.savefig(page, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = page.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet inside an inline <svg> would hold for the whole page.
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(f": {colour}", f": {variable}")
    opening = f'<svg class="chart" role="img" aria-label="{escape(description)}" '
    text = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', lambda tag: f"{opening}{tag[1]}>", text, count=1)
    return text.strip()


def compact(text: str) -> str:
    """The same picture in fewer bytes: coordinates with one decimal, no line breaks, no ids of groups."""
    opening, end, drawing = text.partition(">")  # the description in the opening tag stays as it is
    for pattern, shorter in ((r"(\d\.\d)\d+", r"\1"), (r"\s*\n\s*", " "), (r'<g id="[^"]*">', "<g>"), (r"> <", "><")):
        drawing = re.sub(pattern, shorter, drawing)
    return opening + end + drawing
