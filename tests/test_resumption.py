"""A run that is killed, changed or altered goes on with the same command: real processes, real signals."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clusterq_deploy.run.manifest import StageRecord, read_manifest

pytestmark = pytest.mark.slow  # whole commands in processes of their own

ROOT = Path(__file__).parents[1]
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
SLOWER = """
[synthesis]
images = 64
generator = {steps = 30, warmup_steps = 10, batch_size = 32}
refine = {steps = 30, batch_size = 32}
[finetune]
steps = 60
checkpoints = 4
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
    folder, arguments, often, tensorrt, before, number = json.loads(line)
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if often:
            clusterq_deploy.run.checkpoint._EVERY, clusterq_deploy.run.checkpoint._LARGEST_SHARE = 0.1, 1.0
        if tensorrt:
            tensorrt_double.install(pytest.MonkeyPatch())
        if before:
            def hook(event, arguments):
                if event == "os.rename" and os.fspath(arguments[1]).endswith(before):
                    os.kill(os.getpid(), number)
            sys.addaudithook(hook)
        sys.argv = ["clusterq", "--verbose", *arguments]
        main()
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Shell:
    """Starts commands, one after the other, each as a process of its own that finds the imports done.

    Each writes its errors to the file `log` in the folder that it is started in.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(
        self,
        folder: Path,
        command: tuple[str, ...],
        *,
        often: bool = False,
        tensorrt: bool = False,
        before: str | None = None,
        number: int = 0,
    ) -> int:
        """The process's id.

        Args:
            folder: where it is started.
            command: its arguments.
            often: whether it keeps checkpoints ten times a second.
            tensorrt: whether it has a double of TensorRT.
            before: a file, by the end of its path; the process gets the signal `number` when it is written and is
                about to take its name.
        """
        assert self._process.stdin is not None
        line = json.dumps([str(folder), command, often, tensorrt, before, number])
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, folder: Path, *command: str, tensorrt: bool = False) -> str:
        """The log of a command that ends well."""
        self.start(folder, command, tensorrt=tensorrt)
        code, log = self._answer(), (folder / "log").read_text()
        assert code == 0, log
        return log

    def end_before(self, file: str, number: int, folder: Path, *command: str, tensorrt: bool = False) -> int:
        """The exit code of a command that gets a signal just before a file has its name."""
        self.start(folder, command, tensorrt=tensorrt, before=file, number=number)
        return self._answer()

    def end(self, moment: str, number: int, folder: Path, *command: str, often: bool = False) -> int:
        """The exit code of a command that gets a signal as a file is written, or as its log tells of something."""
        (folder / "log").unlink(missing_ok=True)
        process = self.start(folder, command, often=often)
        log = folder / "log"
        while not (folder / moment).is_file() and not (log.is_file() and f"{moment}\n" in log.read_text()):
            os.kill(process, 0)  # an error once it has ended
            time.sleep(0.005)
        os.kill(process, number)
        return self._answer()


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """Commands are started with it."""
    with subprocess.Popen(
        [sys.executable, "-c", SHELL],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Shell(process)
        assert process.stdin is not None
        process.stdin.close()


def stages(folder: Path, run: str = "run") -> dict[str, StageRecord]:
    manifest = read_manifest(folder / run)
    assert manifest is not None
    return manifest.stages


def redone(before: dict[str, StageRecord], after: dict[str, StageRecord]) -> set[str]:
    """The stages that were done in between: no two take the same time."""
    return {name for name, record in after.items() if name not in before or record.seconds != before[name].seconds}


def intact(folder: Path) -> bool:
    """Whether all files of finished stages are what they were when the stages were finished."""
    files = {name: sha256 for record in stages(folder).values() for name, sha256 in record.files.items()}
    return all(hashlib.sha256((folder / "run" / name).read_bytes()).hexdigest() == files[name] for name in files)


def timeless(value: Any) -> Any:
    """A JSON value without what the clock says."""
    if isinstance(value, dict):
        clock = {"created", "seconds", "runs", "images_per_second", "coefficient_of_variation"}
        measured = ("_ms", "speedup", "speedup_low", "speedup_high")
        return {k: timeless(own) for k, own in value.items() if k not in clock and not k.endswith(measured)}
    return [timeless(own) for own in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.toml").write_text(SMALL)
    shell.run(folder, *RUN)
    return folder


def copied(whole: Path, folder: Path) -> Path:
    return Path(shutil.copytree(whole, folder / "copy"))


def test_a_run_that_is_ended_in_any_stage_goes_on_and_ends_the_same(shell: Shell, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    wanted = stages(whole)
    order: list[str] = [*wanted, "report"]
    before: dict[str, StageRecord] = {}
    kill, terminate, interrupt = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
    for file, unfinished, number, code in (
        ("fp32/model.fp16.onnx", "export/fp32", kill, -kill),
        ("calibration/preview.png", "synthesize", kill, -kill),
        ("w8a8/quantized.safetensors", "quantize/w8a8", terminate, -terminate),
        ("w8a8/quantized.safetensors", "quantize/w8a8", kill, -kill),
        ("w8a8/model.trt.onnx", "export/w8a8", kill, -kill),
        ("evaluate/fp32/batches-by-1/onnxruntime-cpu-fp32-model.onnx", "evaluate/fp32", interrupt, 1),
        ("evaluate/w8a8/batches-by-1/onnxruntime-cpu-w8a8-model.ort.onnx", "evaluate/w8a8", kill, -kill),
        ("stage features", "features", kill, -kill),
        ("stage benchmark", "benchmark", kill, -kill),
        ("run/report.html", "report", kill, -kill),
    ):
        end = shell.end if file.startswith("stage ") else shell.end_before
        assert end(file, number, tmp_path, *RUN) == code, (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        after = stages(tmp_path)
        assert list(after) == order[: order.index(unfinished)]
        assert before.items() <= after.items()  # nothing was done twice
        assert intact(tmp_path)
        before = after
    assert (tmp_path / "run/report.json").is_file()
    assert not (tmp_path / "run/report.html").is_file()
    shell.run(tmp_path, *RUN)
    after = stages(tmp_path)
    assert after == before
    for name, record in after.items():
        assert (record.inputs, record.upstream, record.files) == (
            wanted[name].inputs,
            wanted[name].upstream,
            wanted[name].files,
        )
        assert timeless(record.result) == timeless(wanted[name].result)
    ours, theirs = (json.loads((folder / "run/report.json").read_text()) for folder in (tmp_path, whole))
    assert timeless(ours) == timeless(theirs)
    names = [sorted(str(p.relative_to(f)) for p in (f / "run").rglob("*")) for f in (tmp_path, whole)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("option", "depending"),
    [
        (["--limit", "50"], {"evaluate/fp32", "evaluate/w8a8", "features"}),
        (["--fp16"], {"export/w8a8", "evaluate/w8a8", "benchmark"}),
    ],
)
def test_a_changed_option_redoes_only_what_depends_on_it(
    shell: Shell, whole: Path, tmp_path: Path, option: list[str], depending: set[str]
) -> None:
    folder = copied(whole, tmp_path)
    shell.run(folder, *RUN, *option)
    assert redone(stages(whole), stages(folder)) == depending


def test_altered_and_truncated_artifacts_are_made_again_the_same(shell: Shell, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    before = stages(folder)
    images, graph, single = (
        folder / "run" / name for name in ("calibration/images.safetensors", "w8a8/model.ort.onnx", "fp32/model.onnx")
    )
    content = images.read_bytes()
    images.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    graph.write_bytes(graph.read_bytes()[:-100])
    single.unlink()
    shell.run(folder, *RUN)
    assert redone(before, stages(folder)) == {"synthesize", "export/w8a8", "export/fp32"}
    assert intact(folder)
    assert {name: record.files for name, record in stages(folder).items()} == {
        name: record.files for name, record in before.items()
    }


def test_synthesis_and_quantization_that_are_killed_go_on_and_end_with_the_same_files(
    shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "small.toml").write_text(SLOWER)

    def synthesis(folder: str) -> list[str]:
        return ["synthesize", "digits", "--config", "small.toml", "--out", folder]

    def quantization(folder: str) -> list[str]:
        return ["quantize", folder, "--bits", "w4a4", "--max-drop", "5"]

    def killed_in(phase: str, command: list[str]) -> None:
        code = shell.end(f"run/.checkpoints/{phase}", signal.SIGKILL, tmp_path, *command, often=True)
        assert code == -signal.SIGKILL

    for phase in ("generator", "refine"):
        killed_in(f"synthesize/batches-by-1/{phase}", synthesis("run"))
    assert "goes on from its checkpoint" in shell.run(tmp_path, *synthesis("run"))
    killed_in("sensitivity/w4a4/batches-by-1/costs", quantization("run"))
    for phase in ("precision-reconstruction", "tuning"):
        killed_in(f"quantize/w4a4/batches-by-1/{phase}", quantization("run"))
    assert "goes on from its checkpoint" in shell.run(tmp_path, *quantization("run"))
    assert not (tmp_path / "run" / ".checkpoints").exists()
    log = shell.run(tmp_path, *synthesis("whole")) + shell.run(tmp_path, *quantization("whole"))
    assert "goes on from its checkpoint" not in log
    for stage in ("synthesize", "sensitivity/w4a4", "quantize/w4a4"):
        resumed, uninterrupted = (stages(tmp_path, folder)[stage] for folder in ("run", "whole"))
        assert resumed.files == uninterrupted.files
        assert resumed.result == uninterrupted.result


def test_an_evaluation_that_is_killed_goes_on_behind_the_runtimes_that_are_done(
    shell: Shell, whole: Path, tmp_path: Path
) -> None:
    folder = copied(whole, tmp_path)
    command = ("evaluate", "run", "--limit", "150")
    for file in ("torch", "onnxruntime-cpu-w8a8-model.trt.onnx"):
        code = shell.end_before(f"w8a8/batches-by-1/{file}", signal.SIGKILL, folder, *command)
        assert code == -signal.SIGKILL
    log = shell.run(folder, *command)
    kept = [Path(line.split()[-1]).name for line in log.splitlines() if "goes on from its checkpoint" in line]
    assert kept == ["teacher", "torch", "onnxruntime-cpu-w8a8-model.ort.onnx"]
    again = copied(whole, tmp_path / "again")
    assert "goes on from its checkpoint" not in shell.run(again, *command)
    assert stages(folder)["evaluate/w8a8"].result == stages(again)["evaluate/w8a8"].result


def test_an_image_that_can_be_read_by_now_starts_an_evaluation_over(shell: Shell, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    images = folder / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (150, 32, 32), dtype=np.uint8)
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(images / f"{index:03}.png")
    (images / "labels.csv").write_text("".join(f"{index:03}.png,{index % 10}\n" for index in range(len(pixels))))
    command = ("evaluate", "run", "--data", "images")
    hidden, state = images / "007.png", (images / "007.png").stat()
    content = hidden.read_bytes()
    hidden.write_bytes(b"\0" * len(content))
    os.utime(hidden, ns=(state.st_atime_ns, state.st_mtime_ns))
    file = "w8a8/batches-by-1/onnxruntime-cpu-w8a8-model.ort.onnx"
    assert shell.end_before(file, signal.SIGKILL, folder, *command) == -signal.SIGKILL
    hidden.write_bytes(content)
    os.utime(hidden, ns=(state.st_atime_ns, state.st_mtime_ns))  # nothing tells that it is another file
    (folder / "run/.checkpoints/evaluate/w8a8/batches-by-1/teacher").unlink(missing_ok=True)
    shell.run(folder, *command)
    found = stages(folder)["evaluate/w8a8"].result
    assert found["unreadable"]["count"] == 0
    assert len({round(own["top1"] * 150 / 100, 6) % 1 for own in found["accuracy"]}) == 1  # of 150 images each


def test_a_build_that_is_killed_leaves_whole_engines_and_is_done_again(
    shell: Shell, whole: Path, tmp_path: Path
) -> None:
    folder = copied(whole, tmp_path)
    for file, unfinished in (
        ("fp32/model.fp16.engine", "build/fp32"),
        ("w8a8/model.engine", "build/w8a8"),
        ("w8a8/model.engine.json", "build/w8a8"),
    ):
        code = shell.end_before(file, signal.SIGKILL, folder, "build", "run", tensorrt=True)
        assert code == -signal.SIGKILL, (folder / "log").read_text()
        assert unfinished not in stages(folder)
        assert intact(folder)
    assert "build/fp32" in stages(folder)
    shell.run(folder, "build", "run", tensorrt=True)
    again = copied(whole, tmp_path / "again")
    shell.run(again, "build", "run", tensorrt=True)
    ours, theirs = stages(folder), stages(again)
    for name in ("build/fp32", "build/w8a8"):
        assert ours[name].result == theirs[name].result
    assert intact(folder)
    assert not list((folder / "run").rglob(".*.tmp"))


def test_a_run_that_is_done_leaves_no_checkpoint_of_what_it_was_once_asked_for(
    shell: Shell, whole: Path, tmp_path: Path
) -> None:
    folder = copied(whole, tmp_path)
    more = (*RUN, "--bits", "w4a4")
    assert shell.end_before("w4a4/quantized.safetensors", signal.SIGKILL, folder, *more) == -signal.SIGKILL
    assert (folder / "run/.checkpoints/quantize/w4a4").is_dir()
    shell.run(folder, *RUN)
    assert not (folder / "run/.checkpoints").exists()
    assert not list((folder / "run").rglob(".*.tmp"))
