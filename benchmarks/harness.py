"""Measures the cells of a table by the product's commands, each in a separate process.

A cell is a model at a bit width, by a recipe, from a seed. `clusterq synthesize` generates the images once for all
cells that share them, then `clusterq run` does each cell in the same run directory.
"""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import tomli_w
from cells import ROOT, Cell, Model, Record, arguments, digest, merged, read_cell
from store import Results, write

# The product is not imported here: Linux counts the memory of the process that starts a child into the child's peak.

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "cli")
TIMING = {"benchmark": {"batches": [1], "min_seconds": 0.1, "min_runs": 3, "rounds": 1}}
"""Latency is not in these tables: its stage is kept short."""

_MEASURED = {"calib": (), "clusterq_deploy": ("report",)}
"""Packages whose sources determine the numbers, and the folders in them that do not."""


class CommandError(Exception):
    """A command ended with an error; the message is its last line on stderr."""


class SourcesChangedError(Exception):
    """The package changed during the measurement."""


def code_digest() -> str:
    """Return the digest of the sources that determine the numbers, without docs and reports."""
    digests = {}
    for package, excluded in _MEASURED.items():
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT)
            if name.parts[1] not in excluded:
                digests[name.as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest(digests)


def commit() -> str | None:
    """Return the measured commit, with `+` if the package's sources differ from it; None without git."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        return head + "+" if _git("status", "--porcelain", "--", "calib", "clusterq_deploy", "cli").strip() else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Measured:
    """A command, without the paths of this machine, and its cost."""

    command: str
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


def run_measured(arguments: list[str], log: Path, shown: Iterable[str] = ()) -> Measured:
    """Run `clusterq` in a separate process, and measure it; `shown` are the arguments to record in place of these.

    Raises:
        CommandError: it ended with an error.
    """
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*PROGRAM, "-q", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall_seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        raise CommandError(f"ended by signal {-process.returncode}")
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise CommandError(lines[-1].strip() if lines else f"exit code {process.returncode}, nothing on stderr")
    peak_memory_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    command = " ".join(["clusterq", *(shown or arguments)])
    return Measured(command, wall_seconds, usage.ru_utime + usage.ru_stime, peak_memory_bytes)


@dataclass(frozen=True)
class Options:
    """The options that every table's script has."""

    models_file: Path | None
    data_dir: Path | None
    effort: str | None
    settings: dict[str, Any]
    out: Path
    results: Results
    again: bool
    keep_old: bool


class Harness:
    """Measures cells of `models`, and saves their results."""

    def __init__(self, models: Iterable[Model], options: Options) -> None:
        self.models = {model.name: model for model in models}
        self.results, self.options, self.workdir = options.results, options, options.out.resolve()
        self.models_file = options.models_file and options.models_file.resolve()
        self.data_dir = options.data_dir and options.data_dir.resolve()
        self.code, self.commit = code_digest(), commit()

    def measure(self, cells: Iterable[Cell]) -> int:
        """Measure the cells that have no results. Return the number of those that failed.

        Raises:
            SourcesChangedError: the package's sources changed meanwhile; earlier results are saved.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            if not self.options.again and self.results.has(cell.key, None if self.options.keep_old else self.code):
                print(f"already measured: {cell}", flush=True)
            else:
                groups.setdefault(cell.synthesis, []).append(cell)
        return sum(self._measure_group(group) for group in groups.values())

    def _measure_group(self, cells: list[Cell]) -> int:
        """Measure cells that share their images. Return the number of those that failed."""
        folder = self.workdir / f"{cells[0].synthesis}-{self.code[:8]}"
        if self.options.again:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            synthesis = self._synthesize(cells[0], folder)
        except CommandError as error:
            for cell in cells:
                self._note_failure(cell, error)
            return len(cells)
        failures = 0
        for cell in cells:
            try:
                record, config = self._run(cell, folder, synthesis)
            except CommandError as error:
                failures += 1
                self._note_failure(cell, error)
                continue
            if code_digest() != self.code:
                raise SourcesChangedError("the package's sources changed while they were measured; start again")
            self.results.add(record, config)
            print(f"{cell}: {record['top1']:.2f} %, drop {record['drop']:.2f}", flush=True)
        return failures

    def _note_failure(self, cell: Cell, error: CommandError) -> None:
        line = self.hide_folders(str(error))
        self.results.fail({"key": cell.key, **asdict(cell), "error": line})
        print(f"failed: {cell}: {line}", flush=True)

    def hide_folders(self, text: str) -> str:
        """Return the text without the folders of this machine."""
        folders = [self.workdir, self.data_dir, self.models_file and self.models_file.parent, ROOT, Path.home()]
        for folder in sorted((str(f) for f in folders if f), key=len, reverse=True):
            text = text.replace(f"{folder}/", "")
        return text

    def _synthesize(self, cell: Cell, folder: Path) -> Measured:
        """Generate the calibration set of a group of cells once, with the settings of one of them."""
        figures = folder / "synthesize.json"
        if figures.is_file():
            return Measured(**json.loads(figures.read_text()))
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted command
        write(folder / "settings.toml", tomli_w.dumps(merged(TIMING, cell.settings)))
        measured = self._command(cell, "synthesize", folder)
        write(figures, json.dumps(asdict(measured)))
        return measured

    def _run(self, cell: Cell, folder: Path, synthesis: Measured) -> tuple[Record, Record]:
        """Run one cell, without the files of an earlier attempt. Return record and settings."""
        shutil.rmtree(folder / "run" / cell.bits, ignore_errors=True)
        run = self._command(cell, "run", folder)
        text = (folder / "run" / "report.json").read_text(encoding="utf-8")
        write(folder / "reports" / f"{cell.slug}.json", text)  # the next cell's run overwrites its file
        record, config = read_cell(json.loads(text), cell)
        costs = {
            "wall_seconds": synthesis.wall_seconds + run.wall_seconds,
            "cpu_seconds": synthesis.cpu_seconds + run.cpu_seconds,
            "peak_memory_bytes": max(synthesis.peak_memory_bytes, run.peak_memory_bytes),
            "commands": [asdict(synthesis), asdict(run)],
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "code": self.code,
            "commit": self.commit,
        }
        return {**record, **costs}, config

    def _command(self, cell: Cell, verb: str, folder: Path) -> Measured:
        model = self.models[cell.model]
        name, shown, data = model.name, model.name, None
        if model.data and self.models_file and self.data_dir:
            name, shown = (f"{file}:{model.name}" for file in (self.models_file, self.models_file.name))
            data = str(self.data_dir / model.data)
        return run_measured(
            arguments(cell, verb, name, data, folder / "settings.toml", folder / "run"),
            folder / "logs" / f"{verb}-{cell.slug}.txt",
            arguments(cell, verb, shown, model.data, Path("settings.toml"), Path("runs") / cell.synthesis),
        )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds such as `0,1,2`."""
    return tuple(int(part) for part in text.split(","))


def add_options(results: Path) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the `Options` to a command, as `options`; `results` is its JSON file."""
    folder, file = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)
    existing = click.Path(path_type=Path, dir_okay=False, exists=True)
    shared = [
        click.option("--models-file", type=file, help="Python file with a factory for each model except digits."),
        click.option("--data-dir", type=folder, help="Folder of the evaluation data."),
        click.option("--effort", help="Passed on to clusterq."),
        click.option("--settings", type=existing, help="TOML settings for every run, on top of the recipe's.",
                     callback=lambda _, __, path: tomllib.loads(path.read_text()) if path else {}),
        click.option("--out", type=folder, default="runs/benchmarks", show_default=True, help="Folder of the runs."),
        click.option("--results", type=file, default=results, help="JSON file of the results.",
                     callback=lambda _, __, path: Results(path)),
        click.option("--again", is_flag=True, help="Measure what is among the results too."),
        click.option("--keep-old", is_flag=True, help="Keep results of other sources of the package."),
    ]  # fmt: skip

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            options = Options(**{field.name: values.pop(field.name) for field in fields(Options)})
            function(**values, options=options)

        for option in reversed(shared):
            command = option(command)
        return command

    return decorate


def carry_out(models: Iterable[Model], cells: list[Cell], options: Options) -> int:
    """Measure cells; end a child with the script. Return the number of failures.

    Raises:
        click.UsageError: a file or folder that the cells need is not given, or does not exist.
    """
    used = {cell.model for cell in cells}
    names = [model.data for model in models if model.name in used and model.data]
    needed = [("--data-dir", options.data_dir and options.data_dir / name) for name in names]
    for option, path in [("--models-file", options.models_file), *needed] if names else []:
        if path is None:
            raise click.UsageError(f"give {option}: all models except digits need it; or choose --model digits")
        if not path.exists():
            raise click.UsageError(f"{option}: {path} does not exist")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return Harness(models, options).measure(cells)
    except SourcesChangedError as error:
        raise click.ClickException(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, before)
