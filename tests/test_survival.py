"""Runs that are killed, and runs that meet in one folder: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.rundir import RunDirectory

ROOT = Path(__file__).parents[1]
MODEL = {"name": "net", "weights_sha256": "0"}
HOLDER = """
import sys, time
from pathlib import Path
from clusterq_deploy.rundir import RunDirectory
out = RunDirectory(Path(sys.argv[1]), {"name": "net", "weights_sha256": "0"})
out.begin("")
out.perform("synthesize", {}, lambda: ({}, [out.write("images", "whole")]))
print("at work", flush=True)
out.perform("quantize/w8a8", {}, lambda: time.sleep(600))
"""


@contextmanager
def at_work(out: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process in the middle of its second stage."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path) -> None:
    with at_work(tmp_path / "run"):
        other = RunDirectory(tmp_path / "run", MODEL)
        for write in (
            lambda: other.begin("mine"),
            lambda: other.write("images", "mine"),
            lambda: other.perform("synthesize", {"seed": 1}, lambda: ({}, [])),
        ):
            with pytest.raises(RunDirectoryError, match="another clusterq is at work in"):
                write()
        assert (tmp_path / "run" / "images").read_text() == "whole"
        assert (tmp_path / "run" / "run.toml").read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_folder_of_a_run_that_died_is_free_and_its_finished_stages_stand(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    early = RunDirectory(out, MODEL)  # looked at before the other began
    with at_work(out) as process:
        process.send_signal(number)
        process.wait()
    assert early.finished("synthesize") is None
    early.perform("synthesize", {}, lambda: pytest.fail("it is finished"))
    early.perform("quantize/w8a8", {}, lambda: ({"made": 1}, []))
    assert RunDirectory(out, MODEL).finished("quantize/w8a8") is not None


def test_the_command_says_that_the_folder_is_in_use(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cli", "run", "digits", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as first:
        try:
            while not (out / "run.toml").is_file():
                assert first.poll() is None
                time.sleep(0.1)
            second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        finally:
            first.kill()
    assert second.returncode == 2
    assert second.stderr.strip().splitlines() == [
        f"Error: another clusterq is at work in {out}; wait for it, or choose another folder with --out"
    ]
