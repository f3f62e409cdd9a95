"""A run that is killed, changed or altered goes on with the same command: real processes, real signals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import ROOT, read_files, read_stages, redone

from clusterq_deploy.files import sha256_file
from clusterq_deploy.run.manifest import StageRecord

pytestmark = pytest.mark.slow  # whole commands in processes of their own

SMALL = """
device = "cpu"
limit = 200
bits = ["w8a8"]
[synthesis]
images = 32
generator = {steps = 8, warmup_steps = 4}
refine = {steps = 4}
[finetune]
steps = 0
[benchmark]
batches = [1]
min_seconds = 0.3
min_runs = 3
warmup_ms = 0
"""
TUNED = """
[synthesis]
images = 32
generator = {steps = 8, warmup_steps = 4, batch_size = 16}
refine = {steps = 6, batch_size = 16}
[finetune]
steps = 20
checkpoints = 2
"""
RUN = ("run", "digits", "--config", "small.toml", "--out", "run")
SHELL = """
import json, os, signal, sys
sys.path.insert(0, "tests")
import pytest, tensorrt_double
from cli.main import main
import clusterq_deploy.pipeline, clusterq_deploy.run.checkpoint  # most of a command's time is theirs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
for line in sys.stdin:
    folder, arguments, end, tensorrt = json.loads(line)
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if tensorrt:
            tensorrt_double.install(pytest.MonkeyPatch())
        if end is not None:
            file, remaining, number, often = end
            if often:
                clusterq_deploy.run.checkpoint._EVERY, clusterq_deploy.run.checkpoint._LARGEST_SHARE = 0.0, 1e9
            def hook(event, arguments):
                global remaining
                if event == "os.rename" and os.fspath(arguments[1]).endswith(file):
                    remaining -= 1
                    if remaining == 0:
                        os.kill(os.getpid(), number)
            sys.addaudithook(hook)
        sys.argv = ["clusterq", "--verbose", *arguments]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Shell:
    """Runs commands one after the other, each as a process of its own that finds the imports done.

    Each writes its errors to the file `log` in the folder that it is started in.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def _exit_code(self, *request: object) -> int:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def run(self, folder: Path, *command: str, tensorrt: bool = False) -> str:
        """Return the log of a command that has to succeed; `tensorrt` installs the double of TensorRT."""
        code, log = self._exit_code(str(folder), command, None, tensorrt), (folder / "log").read_text()
        assert code == 0, log
        return log

    def end(
        self,
        folder: Path,
        *command: str,
        before: str,
        nth: int = 1,
        number: int = SIGKILL,
        often: bool = False,
        tensorrt: bool = False,
    ) -> None:
        """Start a command that gets a signal when a file is written and about to take its name, and must end of it.

        Args:
            folder: where it is started.
            command: its arguments.
            before: the file, by the end of its path.
            nth: which time that it is written.
            number: the signal.
            often: whether every state that can be kept as a checkpoint is kept.
            tensorrt: whether the double of TensorRT is installed.
        """
        code = self._exit_code(str(folder), command, (before, nth, number, often), tensorrt)
        log = (folder / "log").read_text()
        assert code == (1 if number == SIGINT else -number), log
        assert "Traceback" not in log


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with subprocess.Popen(
        [sys.executable, "-c", SHELL],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Shell(process)
        process.stdin.close()


def is_intact(folder: Path) -> bool:
    """Return whether all files of finished stages are what they were when the stages were finished."""
    files = {name: sha256 for record in read_stages(folder / "run").values() for name, sha256 in record.files.items()}
    return all(sha256_file(folder / "run" / name) == sha256 for name, sha256 in files.items())


def timeless(value: Any) -> Any:
    """Return a JSON value without what the clock says."""
    if isinstance(value, dict):
        clock = {"created", "seconds", "runs", "images_per_second", "coefficient_of_variation"}
        measured = ("_ms", "speedup", "speedup_low", "speedup_high")
        return {k: timeless(item) for k, item in value.items() if k not in clock and not k.endswith(measured)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.toml").write_text(SMALL)
    shell.run(folder, *RUN)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder that the test may change."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_run_ended_in_any_stage_goes_on_and_ends_the_same(shell: Shell, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    expected = read_stages(whole / "run")
    order: list[str] = [*expected, "report"]
    before: dict[str, StageRecord] = {}
    for file, nth, unfinished, number in (
        ("fp32/model.onnx", 1, "export/fp32", SIGTERM),
        ("fp32/model.fp16.onnx", 1, "export/fp32", SIGKILL),
        ("calibration/preview.png", 1, "synthesize", SIGKILL),
        ("w8a8/quantized.safetensors", 1, "quantize/w8a8", SIGTERM),
        ("w8a8/quantized.safetensors", 1, "quantize/w8a8", SIGKILL),
        ("w8a8/model.trt.onnx", 1, "export/w8a8", SIGKILL),
        ("evaluate/fp32/batches-by-1/onnxruntime-cpu-fp32-model.onnx", 1, "evaluate/fp32", SIGINT),
        ("evaluate/w8a8/batches-by-1/onnxruntime-cpu-w8a8-model.ort.onnx", 1, "evaluate/w8a8", SIGKILL),
        ("manifest.json", 3, "features", SIGKILL),  # after those of the start and of the stage that was ended before
        ("manifest.json", 3, "benchmark", SIGKILL),
        ("run/report.html", 1, "report", SIGKILL),
    ):
        shell.end(tmp_path, *RUN, before=file, nth=nth, number=number)
        after = read_stages(tmp_path / "run")
        assert list(after) == order[: order.index(unfinished)]
        assert before.items() <= after.items()  # nothing was done twice
        assert is_intact(tmp_path)
        if unfinished == order[0] and number == SIGTERM:
            files = {name for name in read_files(tmp_path / "run") if not name.endswith(".tmp")}
            assert files == {".lock", "manifest.json", "run.toml"}
        before = after
    assert (tmp_path / "run/report.json").is_file()
    assert not (tmp_path / "run/report.html").is_file()
    shell.run(tmp_path, *RUN)
    assert read_stages(tmp_path / "run") == before
    for name, record in before.items():
        assert (record.inputs, record.upstream, record.files) == (
            expected[name].inputs,
            expected[name].upstream,
            expected[name].files,
        )
        assert timeless(record.result) == timeless(expected[name].result)
    resumed, uninterrupted = (json.loads((f / "run/report.json").read_text()) for f in (tmp_path, whole))
    assert timeless(resumed) == timeless(uninterrupted)
    assert read_files(tmp_path / "run").keys() == read_files(whole / "run").keys()
    assert not (tmp_path / "run/.checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "depending"),
    [
        (["--limit", "50"], {"evaluate/fp32", "evaluate/w8a8", "features"}),
        (["--fp16"], {"export/w8a8", "evaluate/w8a8", "benchmark"}),
    ],
)
def test_changed_option_redoes_only_what_depends_on_it(
    shell: Shell, whole: Path, folder: Path, option: list[str], depending: set[str]
) -> None:
    shell.run(folder, *RUN, *option)
    assert redone(read_stages(whole / "run"), read_stages(folder / "run")) == depending


def test_synthesis_and_quantization_that_are_killed_end_with_the_same_files(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(TUNED)

    def commands(folder: str) -> tuple[list[str], list[str]]:
        return (
            ["synthesize", "digits", "--config", "small.toml", "--out", folder],
            ["quantize", folder, "--bits", "w4a4", "--max-drop", "5"],
        )

    phases = (
        ("synthesize/batches-by-1/generator", "synthesize/batches-by-1/refine"),
        (
            "sensitivity/w4a4/batches-by-1/costs",
            "quantize/w4a4/batches-by-1/precision-reconstruction",
            "quantize/w4a4/batches-by-1/tuned",
        ),
    )
    for command, checkpoints in zip(commands("run"), phases, strict=True):
        for checkpoint in checkpoints:
            shell.end(tmp_path, *command, before=f".checkpoints/{checkpoint}", nth=2, often=True)
        assert "resuming from the checkpoint" in shell.run(tmp_path, *command)
    assert not (tmp_path / "run" / ".checkpoints").exists()
    for command in commands("whole"):
        assert "resuming from the checkpoint" not in shell.run(tmp_path, *command)
    for stage in ("synthesize", "sensitivity/w4a4", "quantize/w4a4"):
        resumed, uninterrupted = (read_stages(tmp_path / folder)[stage] for folder in ("run", "whole"))
        assert resumed.files == uninterrupted.files
        assert resumed.result == uninterrupted.result


def test_evaluation_that_is_killed_goes_on_after_the_runtimes_that_are_done(
    shell: Shell, whole: Path, folder: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "run", "--limit", "150")
    for file in ("torch", "onnxruntime-cpu-w8a8-model.trt.onnx"):
        shell.end(folder, *command, before=f"w8a8/batches-by-1/{file}")
    log = shell.run(folder, *command)
    resumed = [Path(line.split()[-1]).name for line in log.splitlines() if "resuming from the checkpoint" in line]
    assert resumed == ["teacher", "torch", "onnxruntime-cpu-w8a8-model.ort.onnx"]
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    assert "resuming from the checkpoint" not in shell.run(again, *command)
    results = [read_stages(path / "run")["evaluate/w8a8"].result for path in (folder, again)]
    assert results[0] == results[1]


def test_evaluation_starts_over_when_an_image_can_be_read_again(shell: Shell, folder: Path) -> None:
    images = folder / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (150, 32, 32), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{index:03}.png")
    (images / "labels.csv").write_text("".join(f"{index:03}.png,{index % 10}\n" for index in range(len(pixels))))
    command = ("evaluate", "run", "--data", "images")
    hidden, state = images / "007.png", (images / "007.png").stat()
    content = hidden.read_bytes()
    hidden.write_bytes(b"\0" * len(content))
    os.utime(hidden, ns=(state.st_atime_ns, state.st_mtime_ns))
    shell.end(folder, *command, before="w8a8/batches-by-1/onnxruntime-cpu-w8a8-model.ort.onnx")
    hidden.write_bytes(content)
    os.utime(hidden, ns=(state.st_atime_ns, state.st_mtime_ns))  # nothing tells that it is another file
    (folder / "run/.checkpoints/evaluate/w8a8/batches-by-1/teacher").unlink(missing_ok=True)
    shell.run(folder, *command)
    result = read_stages(folder / "run")["evaluate/w8a8"].result
    assert result["unreadable"]["count"] == 0
    assert len({round(entry["top1"] * 150 / 100, 6) % 1 for entry in result["accuracy"]}) == 1  # of 150 images each


def test_build_that_is_killed_leaves_whole_engines_and_is_done_again(
    shell: Shell, whole: Path, folder: Path, tmp_path: Path
) -> None:
    for file, unfinished in (
        ("fp32/model.fp16.engine", "build/fp32"),
        ("w8a8/model.engine", "build/w8a8"),
        ("w8a8/model.engine.json", "build/w8a8"),
    ):
        shell.end(folder, "build", "run", before=file, tensorrt=True)
        assert unfinished not in read_stages(folder / "run")
        assert is_intact(folder)
    assert "build/fp32" in read_stages(folder / "run")
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    for path in (folder, again):
        shell.run(path, "build", "run", tensorrt=True)
    resumed, uninterrupted = (read_stages(path / "run") for path in (folder, again))
    for name in ("build/fp32", "build/w8a8"):
        assert resumed[name].result == uninterrupted[name].result
    assert is_intact(folder)
    assert not list((folder / "run").rglob(".*.tmp"))


def test_run_removes_checkpoints_of_bits_that_are_not_requested_again(shell: Shell, folder: Path) -> None:
    shell.end(folder, *RUN, "--bits", "w4a4", before="w4a4/quantized.safetensors")
    assert (folder / "run/.checkpoints/quantize/w4a4").is_dir()
    shell.run(folder, *RUN)
    assert not (folder / "run/.checkpoints").exists()
    assert not list((folder / "run").rglob(".*.tmp"))
