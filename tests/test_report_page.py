"""report.html in a browser: on a phone, in the dark, on paper. One Chromium, driven over its debugging pipe."""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from test_report import PNG, build

from clusterq_deploy.report import to_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH"), pytest.mark.timeout(120)]

TEXTS = """(() => {
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
  return [...document.querySelectorAll('p, li, th, td, dt, dd, h1, h2, h3, figcaption, summary, pre, .meta, .eyebrow')]
    .filter(node => node.textContent.trim() && node.getClientRects().length)
    .map(node => {
      const [a, b] = [numbers(getComputedStyle(node).color).slice(0, 3), ground(node)].map(luminance);
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return [ratio, node.tagName, node.textContent.trim().slice(0, 40)];
    });
})()"""
"""Contrast by WCAG 2, tag and beginning of every text that is shown."""


class Page:
    """A page in Chromium, by the DevTools protocol: messages that end in a NUL, on file descriptors 3 and 4."""

    def __init__(self, to: IO[bytes], since: IO[bytes]) -> None:
        self._to, self._from, self._numbers = to, since, itertools.count(1)
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method and give its result; events in between are left out."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression; the page's own policy, which allows no script, does not bind it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        while self.value("document.readyState + location.href") != f"complete{url}":
            pass

    def show(self, width: int, scheme: str = "light") -> None:
        """Lay the page out so many pixels wide, as a phone does where that is narrow, in light or dark colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=features)

    def _read(self) -> bytes:
        read = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser ended"
            read += byte
        return bytes(read)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A report of three variants, everything unfolded."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(to_html(build(), PNG), encoding="utf-8")
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    command = f'exec "$0" "$@" 3<&{their_in} 4>&{their_out}'
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'p'}",
    ]
    with (
        os.fdopen(our_out, "wb") as to,
        os.fdopen(our_in, "rb") as since,
        subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), *flags], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL
        ) as browser,
    ):
        os.close(their_in)
        os.close(their_out)
        try:
            shown = Page(to, since)
            shown.open(path.as_uri())
            shown.value("document.querySelectorAll('details').forEach(node => node.open = true)")
            yield shown
        finally:
            browser.kill()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_does_not_scroll_sideways(page: Page, width: int) -> None:
    page.show(width)
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter(node => node.scrollWidth > node.clientWidth).length"
    assert (page.value(wide) > 0) == (width < 600)  # the tables do, by themselves


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(page: Page, scheme: str) -> None:
    page.show(1280, scheme)
    red, green, blue = map(int, re.findall(r"\d+", page.value("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue < 150) == (scheme == "dark")
    texts = page.value(TEXTS)
    assert {"P", "TD", "TH", "LI", "DD"} <= {tag for _, tag, _ in texts}
    assert [text for text in texts if text[0] < 4.5] == []


def test_it_prints_with_its_numbers_dark_or_not(page: Page, tmp_path: Path) -> None:
    page.show(1280, "dark")
    printed = base64.b64decode(
        page.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)["data"]
    )
    assert printed.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 3
    if shutil.which("pdftotext") is None:
        return
    (tmp_path / "report.pdf").write_bytes(printed)
    text = subprocess.run(
        ["pdftotext", "-layout", tmp_path / "report.pdf", "-"], capture_output=True, text=True, check=True
    ).stdout
    for number in ("69.50 ± 0.65", "0.24 ± 0.19", "4.604", "~133.5", "11.8 MB", "86.40"):
        assert number in text
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.value("getComputedStyle(document.body).color") == "rgb(27, 29, 33)"
