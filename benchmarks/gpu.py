"""What synthesis, tuning, evaluation and latency take on a CUDA device, and what they reach, in calls of a few minutes.

    python benchmarks/gpu.py --models-file models.py --data-dir data --minutes 9   # again, until nothing is left

A run that a call has no time to finish is interrupted, and the next call goes on with it. Results are in
benchmarks/results/gpu.json, a record per run: seconds of the commands, of each stage, and accuracy.
"""

import json
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from cells import ROOT
from harness import PROGRAM, code_digest, commit
from store import write

RESULTS = ROOT / "benchmarks/results/gpu.json"
_TO_STOP = 60.0  # seconds that an interrupted command may take to save its state


@dataclass(frozen=True)
class GpuRun:
    """One run: a factory of the models' file with its data under --data-dir, or the bundled `digits`."""

    model: str
    data: str | None
    effort: str
    bits: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder of the run, and its key in the results."""
        return f"{self.model}-{self.effort}"


RUNS = (
    GpuRun("digits", None, "fast", ("w8a8",)),  # whether the machine does it at all
    GpuRun("resnet18_pqf", "imagenet_val", "standard", ("w8a8", "w4a4")),
    GpuRun("mobilenet_v1_025", "imagenet_val", "standard", ("w8a8", "w4a8", "w4a4")),
    GpuRun("resnet18_pqf", "imagenet_val", "thorough", ("w8a8", "w4a4")),
    GpuRun("mobilenet_v1_025", "imagenet_val", "thorough", ("w8a8", "w4a8", "w4a4")),
)


def arguments(run: GpuRun, models: Path | None, data: Path | None, device: str, out: Path) -> list[str]:
    """Return the arguments of `clusterq` for a run."""
    given = [f"{models}:{run.model}" if run.data else run.model, "--effort", run.effort, "--device", device]
    given += [word for bits in run.bits for word in ("--bits", bits)]
    given += ["--data", str(data / run.data)] if run.data and data else []
    return ["--quiet", "run", *given, "--out", str(out / run.name)]


def attempt(command: list[str], log: Path, seconds: float) -> int | None:
    """Run `clusterq` for at most so long; return its exit code, None if it was interrupted."""
    with log.open("ab") as output:
        process = subprocess.Popen([*PROGRAM, *command], cwd=ROOT, stdout=output, stderr=output)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=_TO_STOP)
            return None
        finally:
            process.kill()


def record_of(folder: Path, run: GpuRun, seconds: float, calls: int) -> dict[str, Any]:
    """Return the record of a finished run; `seconds` are those of all its commands."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    stages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stages"]
    return {
        **asdict(run),
        "environment": report["environment"],
        "wall_seconds": seconds,
        "calls": calls,
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},  # of the call that finished it
        "accuracy": {variant["name"]: variant["accuracy"] for variant in report["variants"]},
        "latency": {variant["name"]: variant["latency"] for variant in report["variants"]},
    }


@click.command()
@click.option("--models-file", type=click.Path(path_type=Path, exists=True), help="Python file with the factories.")
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), help="Folder of the evaluation data.")
@click.option("--only", "names", multiple=True, type=click.Choice([run.name for run in RUNS]), help="May be repeated.")
@click.option("--device", default="cuda", show_default=True, help="For clusterq.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9.0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/gpu", show_default=True, help="Folder of the runs."
)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    models_file: Path | None,
    data_dir: Path | None,
    names: tuple[str, ...],
    device: str,
    minutes: float,
    out: Path,
    results: Path,
) -> None:
    """Do the runs that have no results of these sources, as far as the minutes go."""
    end, out = time.monotonic() + 60 * minutes, out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    wanted = [run for run in RUNS if not names or run.name in names]
    if any(run.data for run in wanted) and not (models_file and data_dir):
        raise click.UsageError("give --models-file and --data-dir, or --only digits-fast")
    code = code_digest()
    missing = [run for run in wanted if records.get(run.name, {}).get("code") != code]
    for run in list(missing):
        if (left := end - time.monotonic()) <= 0:
            break
        spent = out / f"{run.name}.json"
        seconds, calls = json.loads(spent.read_text()) if spent.is_file() else (0.0, 0)
        start = time.monotonic()
        command = arguments(run, models_file and models_file.resolve(), data_dir and data_dir.resolve(), device, out)
        ended = attempt(command, out / f"{run.name}.log", left)
        seconds, calls = seconds + time.monotonic() - start, calls + 1
        write(spent, json.dumps([seconds, calls]))
        if ended:
            raise click.ClickException(f"{run.name} ended with code {ended}; see {run.name}.log in {out.name}")
        if ended is None:
            break
        records[run.name] = {**record_of(out / run.name, run, seconds, calls), "code": code, "commit": commit()}
        write(results, f"{json.dumps(records, indent=1)}\n")
        click.echo(f"{run.name}: {seconds:.0f} s")
        missing.remove(run)
    names_left = ", ".join(run.name for run in missing)
    click.echo(f"to do: {names_left}; start again" if missing else "nothing is left")


if __name__ == "__main__":
    main()
