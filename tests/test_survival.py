"""Runs that meet in one folder, die in it, or cannot write to it: real processes, real signals."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support import ROOT, read_files, run_python

from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.run.directory import RunDirectory

pytestmark = pytest.mark.slow  # whole commands in processes of their own

MODEL = {"name": "net", "weights_sha256": "0"}
HOLDER = """
import signal, sys, time
from pathlib import Path
from clusterq_deploy.run.directory import RunDirectory
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
out = RunDirectory(Path(sys.argv[1]), {"name": "net", "weights_sha256": "0"})
out.write_config("")
out.perform("synthesize", {}, lambda: ({}, [out.write("images", "whole")]))
print("at work", flush=True)
out.perform("quantize/w8a8", {}, lambda: time.sleep(600))
"""
QUANTIZE = ("-m", "cli", "--quiet", "quantize")


@contextmanager
def at_work(out: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that is in the middle of its second stage."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        try:
            yield process
        finally:
            process.kill()


def test_run_directory_in_use_refuses_a_second_writer(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with at_work(out):
        other = RunDirectory(out, MODEL)
        for write in (
            lambda: other.write_config("mine"),
            lambda: other.write("images", "mine"),
            lambda: other.perform("synthesize", {"seed": 1}, lambda: ({}, [])),
        ):
            with pytest.raises(RunDirectoryError, match="another clusterq is at work in"):
                write()
        assert (out / "images").read_text() == "whole"
        assert (out / "run.toml").read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_directory_of_a_dead_process_is_free_and_keeps_finished_stages(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    early = RunDirectory(out, MODEL)  # looked at before the other began
    with at_work(out) as process:
        process.send_signal(number)
        process.wait()
    assert early.finished("synthesize") is None
    early.perform("synthesize", {}, lambda: pytest.fail("it is finished"))
    early.perform("quantize/w8a8", {}, lambda: ({"made": 1}, []))
    assert RunDirectory(out, MODEL).finished("quantize/w8a8") is not None


def test_command_reports_that_the_folder_is_in_use(run_copy: Path) -> None:
    hold = "import sys\nfrom filelock import FileLock\nwith FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, run_copy / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        refused = run_python(*QUANTIZE, run_copy, "--bits", "w3a3")
        holder.kill()
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines() == [
        f"Error: another clusterq is at work in {run_copy}; wait for it, or choose another folder with --out"
    ]


def test_command_on_a_full_disk_is_one_line_and_keeps_the_finished_stages(run_copy: Path) -> None:
    files = read_files(run_copy)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(files["manifest.json"]) + 1000, -1))
    full = run_python(*QUANTIZE, run_copy, "--bits", "w3a3", preexec_fn=limit)
    assert full.returncode == 2
    *_, last = full.stderr.strip().splitlines()
    assert last == f"Error: cannot write {run_copy / 'w3a3' / 'quantized.safetensors'}: File too large"
    left = read_files(run_copy)
    assert {name for name in left if left[name] != files.get(name)} <= {"manifest.json", "run.toml"}
    assert run_python(*QUANTIZE, run_copy, "--bits", "w3a3").returncode == 0
    assert (run_copy / "w3a3" / "quantized.safetensors").is_file()


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes to read-only folders")
def test_command_in_a_read_only_folder_is_one_line_and_its_files_stay(run_copy: Path) -> None:
    as_owner = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []  # root keeps to permissions

    def clusterq(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [*as_owner, sys.executable, "-m", "cli", "--quiet", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    files = read_files(run_copy)
    folders = [run_copy, *(path for path in run_copy.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        refused = clusterq("quantize", run_copy, "--bits", "w3a3")
        shown = clusterq("run", "digits", "--out", run_copy, "--dry-run")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines() == [f"Error: cannot write to {run_copy}: Permission denied"]
    assert shown.returncode == 0, shown.stderr
    assert read_files(run_copy) == files
