"""Measures cells of a table: each by the product's own commands, in processes of their own.

A cell is a model at a bit width, by a recipe, from a seed. `clusterq synthesize` makes the images once for all cells
that share them, then `clusterq run` makes each cell in the same run directory, so that wall time and peak memory are
those of a process that did this and nothing else.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import tomli_w
from cells import ROOT, Cell, Model, Places, Record, arguments, digest, merged, read_cell
from store import Results, write

# Nothing of the product is imported here: Linux counts the memory of the process that starts a child into the
# child's peak, so the starting one has to stay small beside torch.

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "cli")
TIMING = {"benchmark": {"batches": [1], "min_seconds": 0.1, "min_runs": 3, "rounds": 1}}
"""Latency is no part of these tables: its stage is kept short."""

_MEASURED = {"calib": (), "clusterq_deploy": ("report",)}
"""Packages whose sources decide the numbers, and the folders in them that do not."""


class CommandError(Exception):
    """A command ended with an error; the message is its last line on stderr."""


class SourcesChangedError(Exception):
    """The package is another one than when the measurement began."""


def code_digest() -> str:
    """Identifies the sources that decide the numbers: another text of docs or reports measures nothing anew."""
    found = {}
    for package, left_out in _MEASURED.items():
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT)
            if name.parts[1] not in left_out:
                found[name.as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest(found)


def commit() -> str | None:
    """The commit that is measured, with `+` where the package's sources differ from it; None without git."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        return head + "+" if _git("status", "--porcelain", "--", "calib", "clusterq_deploy", "cli").strip() else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def measured(arguments: list[str], log: Path) -> Record:
    """Run `clusterq` in a process of its own: its wall time, CPU time and peak memory.

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
    return {
        "wall_seconds": wall_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


class Harness:
    """Measures cells and keeps their results.

    Args:
        models: what cells may name.
        places: where things lie.
        results: where records go.
    """

    def __init__(self, models: Iterable[Model], places: Places, results: Results) -> None:
        self.models = {model.name: model for model in models}
        self.places, self.results = places, results
        self.code, self.commit = code_digest(), commit()

    def measure(self, cells: Iterable[Cell], *, again: bool = False, keep_old: bool = False) -> int:
        """Measure the cells that are not among the results; gives the number of those that failed.

        Args:
            cells: what to measure.
            again: measure all of them.
            keep_old: results of other sources of the package count too.

        Raises:
            SourcesChangedError: the package's sources changed on the way; what was measured before is kept.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.synthesis, []).append(cell)
        failures = 0
        for group in groups.values():
            there = [] if again else [c for c in group if self.results.has(c.key, None if keep_old else self.code)]
            for cell in there:
                print(f"there already: {cell}", flush=True)
            wanted = [cell for cell in group if cell not in there]
            if wanted:
                failures += self._measure_group(wanted, again)
        return failures

    def _measure_group(self, cells: list[Cell], again: bool) -> int:
        folder = self.places.workdir / f"{cells[0].synthesis}-{self.code[:8]}"
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        failures = 0
        made: Record | CommandError
        try:
            made = self._synthesize(cells[0], folder)
        except CommandError as error:
            made = error
        for cell in cells:
            try:
                if isinstance(made, CommandError):
                    raise made
                record, config = self._run(cell, folder, made)
            except CommandError as error:
                failures += 1
                line = self.places.hidden(str(error))
                self.results.fail({"key": cell.key, **asdict(cell), "error": line})
                print(f"failed: {cell}: {line}", flush=True)
            else:
                if code_digest() != self.code:
                    raise SourcesChangedError("the package's sources changed while they were measured; start again")
                self.results.add(record, config)
                print(f"{cell}: {record['top1']:.2f} %, drop {record['drop']:.2f}", flush=True)
        return failures

    def _synthesize(self, cell: Cell, folder: Path) -> Record:
        """The calibration set of a group of cells: made by the first of them, and measured once."""
        figures = folder / "synthesize.json"
        if figures.is_file():
            known: Record = json.loads(figures.read_text())
            return known
        shutil.rmtree(folder, ignore_errors=True)  # made in part, or made and not measured
        write(folder / "settings.toml", tomli_w.dumps(merged(TIMING, cell.settings)))
        found = self._command(cell, "synthesize", folder)
        write(figures, json.dumps(found))
        return found

    def _run(self, cell: Cell, folder: Path, made: Record) -> tuple[Record, Record]:
        """Make one cell from the calibration set: its record and settings. What an earlier attempt left is remade."""
        shutil.rmtree(folder / "run" / cell.bits, ignore_errors=True)
        ran = self._command(cell, "run", folder)
        text = (folder / "run" / "report.json").read_text(encoding="utf-8")
        write(folder / "reports" / f"{cell.slug}.json", text)  # the next cell's run writes its own over it
        record, config = read_cell(json.loads(text), cell)
        whole = {
            **record,
            "wall_seconds": made["wall_seconds"] + ran["wall_seconds"],
            "cpu_seconds": made["cpu_seconds"] + ran["cpu_seconds"],
            "peak_memory_bytes": max(made["peak_memory_bytes"], ran["peak_memory_bytes"]),
            "commands": [made, ran],
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "code": self.code,
            "commit": self.commit,
        }
        return whole, config

    def _command(self, cell: Cell, verb: str, folder: Path) -> Record:
        model = self.models[cell.model]
        data = str(self.places.data_dir / model.data) if self.places.data_dir and model.data else None
        real = arguments(cell, verb, self.places.model(model), data, folder / "settings.toml", folder / "run")
        found = measured(real, folder / "logs" / f"{verb}-{cell.slug}.txt")
        name = self.places.model(model, whole=False)
        shown = arguments(cell, verb, name, model.data, Path("settings.toml"), Path("runs") / cell.synthesis)
        return {"command": " ".join(["clusterq", *shown]), **found}


class _Seeds(click.ParamType[Any]):
    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of seeds such as 0,1,2", param, ctx)


SEEDS = _Seeds()


def options(results: Path) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that every table's script has; `results` is its JSON file."""
    folder, file = click.Path(path_type=Path), click.Path(path_type=Path, dir_okay=False)
    existing = click.Path(path_type=Path, dir_okay=False, exists=True)
    own = [
        click.option("--models-file", type=file, help="Python file with a factory for each model but digits."),
        click.option("--data-dir", type=folder, help="Folder of the evaluation data."),
        click.option("--effort", help="Passed on to clusterq."),
        click.option("--settings", type=existing, help="TOML settings for every run, on top of the recipe's."),
        click.option("--out", type=folder, default="runs/benchmarks", show_default=True, help="Folder of the runs."),
        click.option("--results", type=file, default=results, help="JSON file of the results."),
        click.option("--again", is_flag=True, help="Measure what is among the results too."),
        click.option("--keep-old", is_flag=True, help="Keep results of other sources of the package."),
    ]

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(own):
            function = option(function)
        return function

    return apply


def places(
    models: Iterable[Model], cells: Iterable[Cell], out: Path, models_file: Path | None, data: Path | None
) -> Places:
    """Where things lie, checked against what the cells need.

    Raises:
        click.UsageError: a file or folder that they need is not given, or not there.
    """
    used = {cell.model for cell in cells}
    needed = [data / model.data if data else None for model in models if model.name in used and model.data]
    for option, path in (
        ("--models-file", models_file if needed else ROOT),
        *(("--data-dir", path) for path in needed),
    ):
        if path is None:
            raise click.UsageError(f"give {option}: all models but digits need it; or choose --model digits")
        if not path.exists():
            raise click.UsageError(f"{option}: {path} does not exist")
    return Places(out.resolve(), models_file and models_file.resolve(), data and data.resolve())


def carry_out(harness: Harness, cells: list[Cell], *, again: bool, keep_old: bool) -> int:
    """Measure the cells, as a script does: gives the number of failures, and takes its child along when it is ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return harness.measure(cells, again=again, keep_old=keep_old)
    except SourcesChangedError as error:
        raise click.ClickException(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, before)
