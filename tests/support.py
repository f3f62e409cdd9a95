"""Settings, commands and doubles that several test modules share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch
from click.testing import CliRunner, Result

from calib.support.progress import Advance
from cli.main import main
from clusterq_deploy import RunConfig
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.run.manifest import StageRecord, read_manifest

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "synthesis": {
        "images": 80,
        "generator": {"steps": 12, "warmup_steps": 6, "batch_size": 40, "samples_per_class": 4, "width": 8},
        "refine": {"steps": 12, "batch_size": 80},
    },
    "finetune": {"steps": 12, "batch_size": 16, "checkpoints": 2},
    "benchmark": {"batches": [1, 2], "min_seconds": 0.03, "min_runs": 3, "warmup_ms": 0},
}
"""Settings with which every stage is done in seconds."""


def small_config(**settings: object) -> RunConfig:
    """Return the configuration of the run `finished_run`, with some settings changed."""
    return make_config({"model": "digits", "limit": 100, **SMALL, **settings})


def write_settings(file: Path, **settings: object) -> Path:
    """Write the small settings, with some of them changed, as a file for `--config`."""
    file.write_text(tomli_w.dumps({"limit": 100, **SMALL, **settings}))
    return file


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator of random numbers with a seed."""
    return torch.Generator().manual_seed(seed)


def call(*arguments: object) -> Result:
    """Invoke `clusterq` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def output_of(*arguments: object) -> str:
    """Return what a command prints, which has to succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def json_of(*arguments: object) -> Any:
    """Return what a command prints with `--json`."""
    return json.loads(output_of(*arguments, "--json"))


def error_line(*arguments: object) -> str:
    """Return the one line with which a command has to fail."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output + repr(result.exception)
    (line,) = result.stderr.splitlines()
    return line


def python_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that finds the project and the modules of its tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}


def run_python(
    *arguments: object, cwd: Path = ROOT, preexec_fn: Callable[[], object] | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a Python process that finds the project in `cwd` too, with its streams in pipes."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        preexec_fn=preexec_fn,
        env=python_environment(**environment),
    )


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder and its subfolders, by relative path."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_stages(folder: Path) -> dict[str, StageRecord]:
    """Return the finished stages in a run's manifest."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.stages


def redone(before: dict[str, StageRecord], after: dict[str, StageRecord]) -> set[str]:
    """Return the stages that were done between two looks at a manifest: no two take the same time."""
    return {name for name, record in after.items() if name not in before or record.seconds != before[name].seconds}


@contextmanager
def edited_stages(folder: Path) -> Iterator[dict[str, Any]]:
    """Open the stages in a run's manifest, as JSON values, and write what was made of them."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    yield manifest["stages"]
    file.write_text(json.dumps(manifest))


class Counter:
    """A progress display that counts what each task reports."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.events: list[str] = []
        """What was opened, and closed at how much of its total, in order."""
        self.ended: list[tuple[str, int, int]] = []
        """Description, units done and total of each task, in the order in which they ended."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Count a task."""
        assert total > 0
        done = 0

        def advance(n: int = 1, **_: float) -> None:
            nonlocal done
            done += n

        self.open.append(description)
        self.events.append(f"open {description}")
        try:
            yield advance
        finally:
            self.open.remove(description)
            self.events.append(f"close {description} {done}/{total}")
            self.ended.append((description, done, total))

    @property
    def names(self) -> list[str]:
        """The descriptions of the tasks that ended."""
        return [name for name, _, _ in self.ended]

    def require_whole(self) -> None:
        """Require that no task is open, and that each ended at its total."""
        assert self.ended
        assert not self.open
        assert [(name, done) for name, done, total in self.ended if done != total] == []
