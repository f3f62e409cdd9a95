"""report.html in headless Chromium, driven by Playwright: its numbers, on a phone, in the dark, on paper."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from sample_reports import FP32, W4A4, W8A8, build, sensitivities

from clusterq_deploy.report import to_html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The system's; where there is none, Playwright's own, which `playwright install chromium` gets."""
pytestmark = pytest.mark.timeout(120)

NUMBERS = ("69.50 ± 0.65", "0.24 ± 0.19", "4.604", "~133.5", "11.8 MB")
TEXTS = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const kinds = 'p, li, th, td, dt, dd, h1, h2, h3, figcaption, summary, pre, .meta, .eyebrow, svg.chart text';
  return [...document.querySelectorAll(kinds)]
    .filter(node => node.textContent.trim() && node.getClientRects().length)
    .map(node => {
      const style = getComputedStyle(node);
      const colour = node.tagName === 'text' ? style.fill : style.color;
      const [a, b] = [numbers(colour).slice(0, 3), ground(node)].map(luminance);
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return [ratio, node.tagName, node.textContent.trim().slice(0, 40)];
    });
}"""
"""Contrast by WCAG 2, tag and beginning of every text that is shown."""


SIZES = """() => [...document.querySelectorAll('svg.chart text')].map(node => {
  const chart = node.ownerSVGElement;
  const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
  return [parseFloat(getComputedStyle(node).fontSize) * scale, node.textContent.trim()];
})"""
"""Size on the screen, in px, and words of every text in a chart."""
OVERLAPS = """() => [...document.querySelectorAll('svg.chart')].flatMap(chart => {
  const boxes = [...chart.querySelectorAll('text')]
    .map(node => [node.getBoundingClientRect(), node.textContent.trim()]);
  return boxes.flatMap(([a, one], index) => boxes.slice(index + 1)
    .filter(([b]) => a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom)
    .map(([, other]) => [one, other]));
})"""
"""The words of every two texts of a chart that lie on one another."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        try:
            own = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(
                f"{CHROMIUM or 'no chromium on PATH, and that of Playwright'} does not start: {error.message[:300]}"
            )
        with own:
            yield own


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a report of four variants, and of ten classes with the longest of names."""
    sheet = io.BytesIO()
    Image.new("RGB", (2258, 1806)).save(sheet, "PNG")
    names = ["0 tench", *["111 nematode worm with a name that is long"] * 8, "999 incomprehensibilities"]
    # as good as fp32 and far faster: its name is at the upper left, under the title
    fast = W8A8.model_copy(
        update={
            "name": "w2a2",
            "latency": [own.model_copy(update={"median_ms": own.median_ms / 60}) for own in W8A8.latency],
            "accuracy": [own.model_copy(update={"top1": 99.99}) for own in W8A8.accuracy],
            "losses": {"features": [math.nan] * 9 + [0.00071] * 90 + [0.00012]},
            "sensitivities": sensitivities(6.9e-6, 0.0007, 0.25),
        }
    )
    report = build(calibration={"preview_classes": names}, variants=[FP32, W8A8, W4A4, fast])
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(report, sheet.getvalue()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Yield the report with everything unfolded, on a screen of the width that a test asks for, in its colours."""
    width, scheme = getattr(request, "param", (1280, "light"))
    screen = {"width": width, "height": 844}
    context = browser.new_context(viewport=screen, is_mobile=width < 600, color_scheme=scheme)
    with context, context.new_page() as own:
        said: list[str] = []
        own.on("console", lambda message: said.append(message.text))
        own.on("pageerror", lambda error: said.append(str(error)))
        own.on("request", lambda asked: said.append(asked.url) if asked.url.startswith("http") else None)
        own.goto(address)
        own.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
        yield own
        assert said == []  # neither errors nor requests


def test_browser_shows_numbers_and_charts(page: Page) -> None:
    cells = page.locator("td, th").all_text_contents()
    assert set(NUMBERS) <= {cell.strip() for cell in cells}
    assert page.locator("svg.chart").count() == 16 + 12  # two of each layer


@pytest.mark.parametrize(
    "page", [(320, "light"), (390, "light"), (1280, "light")], indirect=True, ids=["small", "phone", "desk"]
)
def test_page_does_not_scroll_sideways(page: Page) -> None:
    width = page.evaluate("innerWidth")
    assert width == page.viewport_size["width"] if page.viewport_size else False
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter(node => node.scrollWidth > node.clientWidth).length"
    assert (page.evaluate(wide) > 0) == (width < 600)  # the tables do, by themselves


@pytest.mark.parametrize("page", [(390, "light"), (1280, "light")], indirect=True, ids=["phone", "desk"])
def test_preview_names_are_above_their_columns(page: Page) -> None:
    picture = page.locator(".sheet img").bounding_box()
    for column in (1, 10):
        name = page.locator(f".sheet li:nth-child({column})").bounding_box()
        assert name["x"] == pytest.approx(picture["x"] + (column - 1) * picture["width"] / 10, abs=1.5)
        assert name["width"] == pytest.approx(picture["width"] / 10, abs=1)


@pytest.mark.parametrize("page", [(390, "light"), (1280, "light")], indirect=True, ids=["phone", "desk"])
def test_chart_texts_are_large_and_do_not_overlap(page: Page) -> None:
    sizes = page.evaluate(SIZES)
    assert {"KL from the fp32 model, nats", "6.9e-06", "end", "0.00012", "grid steps"} <= {text for _, text in sizes}
    assert [text for text in sizes if text[0] < 10] == []
    assert page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("page", [(1280, "light"), (1280, "dark")], indirect=True, ids=["light", "dark"])
def test_texts_have_enough_contrast(page: Page, request: pytest.FixtureRequest) -> None:
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == dark == ("dark" in request.node.name)
    texts = page.evaluate(TEXTS)
    assert {"P", "TD", "TH", "LI", "DD", "text"} <= {tag for _, tag, _ in texts}
    assert [text for text in texts if text[0] < 4.5] == []


@pytest.mark.parametrize("page", [(1280, "dark")], indirect=True, ids=["dark"])
def test_print_is_light_and_has_the_numbers(page: Page, tmp_path: Path) -> None:
    printed = page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 29, 33)"
    if shutil.which("pdftotext") is None:
        return
    command = ["pdftotext", "-layout", tmp_path / "report.pdf", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [number for number in NUMBERS if number not in text] == []
