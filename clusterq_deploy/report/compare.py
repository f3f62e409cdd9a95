"""Several reports side by side: what was run, how accurate and how fast it is, and on what it was measured."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterq_deploy.errors import ReportError
from clusterq_deploy.report import formats, wording
from clusterq_deploy.report.findings import BASELINE, HALF, UNSTEADY, AccuracyRow, accuracy_rows, latency_rows
from clusterq_deploy.report.tables import escaped, markdown_table
from clusterq_deploy.results.report import Report, read_report

Row = dict[str, Any]
"""A row of a table: a value a column, as JSON has it; None where nothing was measured."""

_REPORT = "report.json"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, as tables whose rows are in the order of variants, then of runs.

    Attributes:
        runs: what each run was asked to do.
        accuracy: top-1 and agreement in percent, drop in points, sizes in bytes.
        latency: medians in milliseconds, the speed-up over the same run's fp32, and whether it was unsteady.
        machines: the versions and the hardware that measured.
        notes: what in the runs cannot be compared or deserves no trust, whole sentences.
    """

    runs: list[Row]
    accuracy: list[Row]
    latency: list[Row]
    machines: list[Row]
    notes: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, list[Row]]:
        """The tables that have rows, by title."""
        named = {"Runs": self.runs, "Accuracy": self.accuracy, "Latency": self.latency, "Machines": self.machines}
        return {title: rows for title, rows in named.items() if rows}


def read_reports(paths: list[Path]) -> dict[str, Report]:
    """The reports of run directories, or of `report.json` files, by the shortest names that tell them apart.

    Raises:
        ReportError: one has none, or it cannot be read, or one is named twice.
    """
    files = [path if path.is_file() else path / _REPORT for path in paths]
    for path, file in zip(paths, files, strict=True):
        if not file.is_file():
            raise ReportError(f"{path} has no {_REPORT}; write it with clusterq report {path}")
    places = [file.resolve().parent.parts for file in files]
    if len(set(places)) < len(places):
        raise ReportError(f"a run is named twice: {', '.join(map(str, paths))}; give each once")
    depth = next(n for n in range(1, 1 + max(map(len, places))) if len({p[-n:] for p in places}) == len(places))
    return {"/".join(place[-depth:]): read_report(file) for place, file in zip(places, files, strict=True)}


def compare(reports: Mapping[str, Report]) -> Comparison:
    """Lay reports side by side.

    Args:
        reports: by the name that a run has in the tables.
    """
    variants = [variant.name for report in reports.values() for variant in report.variants]
    # fp32's rows on its files in FP16 are called fp16
    order = list(dict.fromkeys(n for name in variants for n in ((BASELINE, HALF) if name == BASELINE else (name,))))

    def sorted_rows(rows: list[Row], *keys: str) -> list[Row]:
        """Rows of the same variant, runtime and file next to each other, in the order in which each came first."""
        seen = {key: list(dict.fromkeys(row[key] for row in rows)) for key in keys}
        return sorted(rows, key=lambda row: (order.index(row["variant"]), *(seen[key].index(row[key]) for key in keys)))

    accuracy = [_accuracy(run, row) for run, report in reports.items() for row in accuracy_rows(report)]
    latency = [row for run, report in reports.items() for row in _latency(run, report)]
    return Comparison(
        runs=[_run(run, report) for run, report in reports.items()],
        accuracy=sorted_rows(accuracy, "runtime", "graph"),
        latency=sorted_rows(latency, "runtime", "graph", "batch"),
        machines=[_machine(run, report) for run, report in reports.items()],
        notes=[*_notes(list(reports.values())), *_unsteady_note(latency)],
    )


def to_markdown_tables(comparison: Comparison) -> str:
    """The tables as Markdown, each under its title."""
    parts = []
    for title, rows in comparison.tables().items():
        cells = [[escaped(text) for text in formatted(row)] for row in rows]
        parts += [f"### {title}", markdown_table(headings(rows), cells, left=text_columns(rows))]
    parts += [f"- {escaped(note)}" for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One table, a row a run, variant, runtime and file: numbers as they are, empty where nothing was measured.

    Latency has a column a batch size. What was asked of the run and what measured it stand in every row.
    """
    batches = sorted({row["batch"] for row in comparison.latency})
    about = {row["run"]: row for row in comparison.runs}
    machines = {row["run"]: row for row in comparison.machines}
    timed: dict[tuple[Any, ...], Row] = {}
    for row in comparison.latency:
        own = timed.setdefault(_key(row), {})
        own |= {f"{name}_batch_{row['batch']}": row[name] for name in (*_TIMES, *_MORE_TIMES, *_INTERVAL)}
        own[f"unsteady_batch_{row['batch']}"] = "true" if row["unsteady"] else "false"
    scored = {_key(row): row for row in comparison.accuracy}
    rows = [
        {
            **about[key[0]],
            **dict(zip(_KEY, key, strict=True)),
            **scored.get(key, {}),
            **timed.get(key, {}),
            **machines[key[0]],
        }
        for key in dict.fromkeys([*scored, *timed])
    ]
    measured = ("size_bytes", "top1", "top1_error", "top5", "drop", "drop_error", "agreement")
    latencies = [f"{name}_batch_{batch}" for batch in batches for name in _TIMES]
    later = [f"{name}_batch_{batch}" for batch in batches for name in (*_MORE_TIMES, "unsteady")]
    later += [f"{name}_batch_{batch}" for batch in batches for name in _INTERVAL]
    about_columns = [key for key in comparison.runs[0] if key != "run"]
    machine_columns = [key for key in comparison.machines[0] if key != "run"]
    # columns are added at the end: others may count them
    columns = [*_KEY, *measured, *latencies, *about_columns, *machine_columns, "agreement_error", *later]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_KEY = ("run", "variant", "runtime", "graph")
_TIMES = ("median_ms", "speedup")
_INTERVAL = ("speedup_low", "speedup_high")
_MORE_TIMES = ("p90_ms", "p99_ms", "images_per_second", "threads")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _run(run: str, report: Report) -> Row:
    return {
        "run": run,
        "model": wording.model_name(report),
        "seed": report.seed,
        "recipe": report.calibration.recipe,
        "effort": report.config.get("effort"),
        "synthetic_images": report.calibration.images,
        "evaluated_on": report.evaluation.dataset,
        "evaluated_images": report.evaluation.images,
        "created": report.created,
    }


def _accuracy(run: str, row: AccuracyRow) -> Row:
    return {
        "run": run,
        "variant": row.variant,
        "runtime": row.accuracy.runtime,
        "graph": row.accuracy.graph,
        "size_bytes": row.size_bytes,
        "top1": row.accuracy.top1,
        "top1_error": row.top1_error,
        "top5": row.accuracy.top5,
        "drop": row.drop,
        "drop_error": row.drop_error,
        "agreement": row.accuracy.agreement,
        "agreement_error": row.agreement_error,
    }


def _latency(run: str, report: Report) -> list[Row]:
    return [
        {
            "run": run,
            "variant": row.variant,
            "runtime": row.latency.runtime,
            "graph": row.latency.graph,
            "batch": row.latency.batch,
            "threads": row.latency.threads,
            "median_ms": row.latency.median_ms,
            "p90_ms": row.latency.p90_ms,
            "p99_ms": row.latency.p99_ms,
            "images_per_second": row.latency.images_per_second,
            "speedup": row.speedup,
            "unsteady": row.unsteady,
            "speedup_low": row.latency.speedup_low,
            "speedup_high": row.latency.speedup_high,
        }
        for row in latency_rows(report)
    ]


def _machine(run: str, report: Report) -> Row:
    environment = report.environment
    return {
        "run": run,
        "clusterq_deploy": report.clusterq_deploy,
        "torch": environment.torch,
        "onnxruntime": environment.onnxruntime,
        "tensorrt": environment.tensorrt,
        "driver": environment.driver,
        "gpu": environment.gpu,
        "cpu": environment.cpu,
        "cores": environment.cores,
    }


def _notes(reports: list[Report]) -> list[str]:
    """What differs between the runs so that numbers of one column do not measure the same."""
    notes = []
    if len({report.model.name for report in reports}) > 1:
        notes.append("The models differ: compare drops and speed-ups, not top-1 and times.")
    if len({(report.evaluation.dataset, report.evaluation.images) for report in reports}) > 1:
        notes.append("Accuracy was measured on different images: top-1, drop and agreement do not compare.")
    hardware = {(r.environment.gpu, r.environment.cpu, r.environment.cores, r.environment.driver) for r in reports}
    if len(hardware) > 1:
        notes.append("The machines differ: times do not compare, speed-ups only roughly.")
    if len({(r.environment.onnxruntime, r.environment.tensorrt, r.environment.torch) for r in reports}) > 1:
        notes.append("The versions of the runtimes differ: some of a difference in time may be theirs.")
    return notes


def _unsteady_note(latency: list[Row]) -> list[str]:
    """What the mark of an unsteady median says; nothing where there is none."""
    runs = dict.fromkeys(row["run"] for row in latency if row["unsteady"])
    if not runs:
        return []
    return [
        f"~ marks a median whose measurement was unsteady (standard deviation above {100 * UNSTEADY:g} % of the "
        f"mean), in {', '.join(runs)}: the machine was not quiet."
    ]


# how a column reads; what is not here stands as it is
_FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "graph": ("file", formats.file_name),
    "size_bytes": ("size", formats.size),
    "top1": ("top-1 %", formats.number),
    "top5": ("top-5 %", formats.number),
    "drop": ("drop", formats.number),
    "agreement": ("agreement %", formats.number),
    "median_ms": ("p50 ms", formats.milliseconds),
    "p90_ms": ("p90 ms", formats.milliseconds),
    "p99_ms": ("p99 ms", formats.milliseconds),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "speedup": ("speed-up", formats.speedup),
}
_BESIDE = (
    "top1_error",
    "drop_error",
    "agreement_error",
    "unsteady",
    *_INTERVAL,
)  # no columns: they stand at their number
_FIRST_NUMBERS = ("size_bytes", "batch")


def headings(rows: list[Row]) -> list[str]:
    """The headings of a table for people."""
    return [_FORMATS[key][0] if key in _FORMATS else key.replace("_", " ") for key in rows[0] if key not in _BESIDE]


def formatted(row: Row) -> list[str]:
    """A row for people: units, errors behind their numbers, ~ before an unsteady median, a dash where nothing is."""
    cells = []
    for key, value in row.items():
        if key in _BESIDE:
            continue
        if f"{key}_error" in row:
            cells.append(formats.with_error(value, row[f"{key}_error"]))
        elif value is None:
            cells.append(formats.ABSENT)
        else:
            mark = "~" if key == "median_ms" and row["unsteady"] else ""
            cells.append(mark + (_FORMATS[key][1](value) if key in _FORMATS else str(value)))
    return cells


def text_columns(rows: list[Row]) -> int:
    """How many columns of a table hold text, from the left; numbers stand behind them."""
    shown = [key for key in rows[0] if key not in _BESIDE]
    return next((index for index, key in enumerate(shown) if key in _FIRST_NUMBERS), len(shown))
