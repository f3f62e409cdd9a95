"""Runs that are killed, and runs that meet in one folder: real processes, real signals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from calib.synthesis import SynthesisConfig
from cli.main import main
from clusterq_deploy.errors import RunDirectoryError
from clusterq_deploy.quantization import FinetuneConfig
from clusterq_deploy.report.text import notes
from clusterq_deploy.results.report import read_report
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.stages import quantize, sensitivity, synthesize

pytestmark = pytest.mark.slow  # whole commands in processes of their own

ROOT = Path(__file__).parents[1]
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
            lambda: other.write_config("mine"),
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


def test_what_does_not_fit_the_memory_is_done_in_smaller_batches_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images, finetune, seen = synthesize.make_images, quantize.finetune, []
    sensitivities = sensitivity.sensitivities

    def images(*args: object, config: SynthesisConfig, **more: object) -> object:
        seen.append((config.generator.batch_size, config.refine.batch_size))
        if config.generator.batch_size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return make_images(*args, config=config, **more)

    def tuned(*args: object, config: FinetuneConfig, **more: object) -> object:
        seen.append(config.batch_size)
        if config.batch_size > 4:
            torch.empty(1 << 60)  # more than any machine has: torch's own error of a CPU
        return finetune(*args, config=config, **more)

    def costs(*args: object, batch_size: int, **more: object) -> object:
        seen.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return sensitivities(*args, batch_size=batch_size, **more)

    monkeypatch.setattr(synthesize, "make_images", images)
    monkeypatch.setattr(sensitivity, "sensitivities", costs)
    monkeypatch.setattr(quantize, "finetune", tuned)
    settings = tmp_path / "small.toml"
    settings.write_text(
        "[synthesis]\nimages = 64\ngenerator = {steps = 8, warmup_steps = 4, batch_size = 64}\n"
        "refine = {steps = 4, batch_size = 64}\n[finetune]\nsteps = 4\nbatch_size = 16\n"
    )
    for command in (
        ["synthesize", "digits", "--config", settings, "--out", tmp_path / "out"],
        ["quantize", tmp_path / "out", "--bits", "w4a4"],
        ["sensitivity", tmp_path / "out", "--bits", "w4a4"],
        ["export", tmp_path / "out"],
        ["report", tmp_path / "out"],
    ):
        result = CliRunner().invoke(main, [str(part) for part in command])
        assert result.exit_code == 0, result.output
    assert seen == [(64, 64), (32, 32), (16, 16), 16, 8, 4, 16, 8]
    report = read_report(tmp_path / "out" / "report.json")
    assert report.calibration.batch_divisor == 4
    assert [n for n in notes(report) if "the memory did not suffice" in n] == [
        f"{what} took batches of 1/4 of the size in the configuration: the memory did not suffice for more."
        for what in ("Synthesis", "Fine-tuning of w4a4")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_leaves_whole_files_alone(tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    program = "import signal; from cli.main import main; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); main()"  # background jobs ignore it
    command = [sys.executable, "-c", program, "synthesize", "digits", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (out / "run.toml").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, log = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in log
    assert sorted(p.name for p in out.iterdir()) == [".lock", "manifest.json", "run.toml"]
    assert json.loads((out / "manifest.json").read_text())["stages"] == {}


def clusterq(
    *command: str, largest: int = resource.RLIM_INFINITY, as_owner: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run a command that can write no file of more bytes; `as_owner` has root keep to the permissions of files."""
    prefix = ["setpriv", "--bounding-set=-dac_override"] if as_owner and os.geteuid() == 0 else []
    return subprocess.run(
        [*prefix, sys.executable, "-m", "cli", "--quiet", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY)),
    )


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its first stage done."""
    folder = tmp_path_factory.mktemp("synthesized")
    (folder / "small.toml").write_text(
        "[synthesis]\nimages = 32\ngenerator = {steps = 8, warmup_steps = 4}\nrefine = {steps = 4}\n"
        "[finetune]\nsteps = 0\n"
    )
    made = clusterq("synthesize", "digits", "--config", str(folder / "small.toml"), "--out", str(folder / "run"))
    assert made.returncode == 0, made.stderr
    return folder / "run"


def test_a_disk_that_is_full_is_one_line_and_the_finished_stage_stands(synthesized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(synthesized, tmp_path / "run"))
    full = clusterq("quantize", str(out), "--bits", "w4a4", largest=16_384)
    assert full.returncode == 2
    *_, last = full.stderr.strip().splitlines()
    assert last == f"Error: cannot write {out / 'w4a4' / 'quantized.safetensors'}: File too large"
    images = "calibration/images.safetensors"
    assert (out / images).read_bytes() == (synthesized / images).read_bytes()
    assert not list(out.rglob("*.tmp"))
    assert clusterq("quantize", str(out), "--bits", "w4a4").returncode == 0
    assert (out / "w4a4" / "quantized.safetensors").is_file()


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes to read-only folders")
def test_a_folder_that_is_read_only_is_one_line_and_its_files_stand(synthesized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(synthesized, tmp_path / "run"))
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    folders = [out, *(file for file in out.rglob("*") if file.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        refused = clusterq("quantize", str(out), "--bits", "w4a4", as_owner=True)
        shown = clusterq("run", "digits", "--out", str(out), "--dry-run", as_owner=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines() == [f"Error: cannot write to {out}: Permission denied"]
    assert shown.returncode == 0, shown.stderr
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == files
