"""Bars and lines on the terminal."""

import io
import threading
import time

import pytest
from rich.console import Console
from sample_reports import build

from cli.render import LiveProgress, conclusions


def terminal() -> tuple[LiveProgress, io.StringIO]:
    shown = io.StringIO()
    return LiveProgress(False, Console(file=shown, force_terminal=True, width=120)), shown


def test_live_progress_removes_nested_tasks_when_they_end() -> None:
    progress, shown = terminal()
    with progress.task("outer", 2) as advance:
        with progress.task("inner", 4) as step:
            step(3, loss=0.25)
            deadline = time.monotonic() + 10
            while "3/4" not in shown.getvalue() and time.monotonic() < deadline:  # drawn ten times a second
                time.sleep(0.02)
        advance()
        with progress.task("second", 1) as step:
            step()
        advance()
    text = shown.getvalue()
    assert "  inner" in text
    assert "3/4" in text
    assert "loss 0.25" in text
    final = text[text.rindex("outer") :]  # the last time that the screen was drawn
    assert "2/2" in final
    assert "inner" not in final


def test_live_progress_ends_tasks_in_another_thread_and_order() -> None:
    progress, shown = terminal()
    outer, inner = progress.task("outer", 1), progress.task("inner", 1)
    with progress.task("whole", 1):
        outer.__enter__()
        inner.__enter__()(1)
        thread = threading.Thread(target=outer.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        inner.__exit__(None, None, None)
    assert "whole" in shown.getvalue()
    with progress.task("afterwards", 1) as advance:  # the screen is free again
        advance()
    assert "afterwards" in shown.getvalue()


def test_live_progress_counts_depth_by_thread() -> None:
    progress, _ = terminal()
    depths: list[int] = []

    def work() -> None:
        with progress._display() as (_, depth), progress._display() as (_, below):
            depths.extend((depth, below))
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work) for _ in range(2)]
    with progress.task("whole", 1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert depths == [1, 2, 1, 2]


def test_live_progress_ends_its_bars_after_an_exception() -> None:
    progress, _ = terminal()
    with pytest.raises(KeyboardInterrupt), progress.task("outer", 1), progress.task("inner", 1):
        raise KeyboardInterrupt
    assert progress._bars is None


def test_live_progress_shows_nothing_without_a_terminal() -> None:
    shown = io.StringIO()
    with LiveProgress(False, Console(file=shown)).task("outer", 1) as advance:
        advance()
    assert shown.getvalue() == ""


def test_conclusions_say_what_to_deploy() -> None:
    assert [line[:31] for line in conclusions(build())] == [
        "On onnxruntime-cpu deploy w8a8 ",
        "On tensorrt deploy w8a8 (w8a8/m",
    ]
    assert conclusions(build(evaluation={"images": 90}))[-1].startswith("90 images are too few to tell")
