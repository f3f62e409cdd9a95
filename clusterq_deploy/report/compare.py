"""Several reports side by side: configurations, accuracy, latency and machines."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clusterq_deploy.errors import ReportError
from clusterq_deploy.report import tables
from clusterq_deploy.report.analysis import (
    BASELINE,
    HALF,
    UNSTEADY,
    AccuracyRow,
    LatencyRow,
    accuracy_rows,
    latency_rows,
)
from clusterq_deploy.report.formats import ABSENT
from clusterq_deploy.report.tables import Table, escaped
from clusterq_deploy.report.text import model_name
from clusterq_deploy.results.report import Report, read_report

Record = dict[str, str | int | float | None]
"""A row of JSON or CSV; None if nothing was measured."""
_Row = TypeVar("_Row", AccuracyRow, LatencyRow)

_REPORT = "report.json"
_FILE = ("variant", "runtime", "graph")
_SCORES = ("size_bytes", "top1", "top1_error", "top5", "drop", "drop_error", "agreement")
_TIMES = ("median_ms", "speedup")
_MORE = ("p90_ms", "p99_ms", "images_per_second", "threads", "unsteady")
_INTERVAL = ("speedup_low", "speedup_high")
_MACHINE = ("torch", "onnxruntime", "tensorrt", "driver", "gpu", "cpu", "cores")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; rows have the name of their run, and are ordered by variant, then by run.

    Attributes:
        runs: the configuration of each run.
        accuracy: top-1 and agreement in percent, drop in points, sizes in bytes.
        latency: medians in milliseconds, the speed-up over the same run's fp32, and whether it was unsteady.
        machines: versions and hardware.
        notes: sentences on what cannot be compared or trusted.
    """

    runs: list[Record]
    accuracy: list[tuple[str, AccuracyRow]]
    latency: list[tuple[str, LatencyRow]]
    machines: list[Record]
    notes: list[str]

    def tables(self) -> list[Table]:
        """Return the tables that have rows."""
        accuracy = tables.accuracy_table([row for _, row in self.accuracy])
        latency = tables.latency_table([row for _, row in self.latency], files=True)
        shown = (
            _record_table("Runs", self.runs),
            accuracy.with_first("run", [run for run, _ in self.accuracy]),
            latency.with_first("run", [run for run, _ in self.latency]),
            _record_table("Machines", self.machines),
        )
        return [table for table in shown if table.rows]

    def to_json(self) -> str:
        """Return the comparison with unrounded numbers."""
        times = ("batch", "threads", "median_ms", "p90_ms", "p99_ms", "images_per_second", "speedup", "unsteady")
        content = {
            "runs": self.runs,
            "accuracy": [_record(run, row, *_FILE, *_SCORES, "agreement_error") for run, row in self.accuracy],
            "latency": [_record(run, row, *_FILE, *times, *_INTERVAL) for run, row in self.latency],
            "machines": self.machines,
            "notes": self.notes,
        }
        return json.dumps(content, indent=2) + "\n"

    def to_csv(self) -> str:
        """Return one table, a row per run, variant, runtime and file: unrounded numbers, empty if not measured.

        Latency has a column per batch size. The run's configuration and machine are in every row.
        """
        facts = {run["run"]: run | machine for run, machine in zip(self.runs, self.machines, strict=True)}
        rows: dict[tuple[object, ...], Record] = defaultdict(dict)
        for run, score in self.accuracy:
            record = _record(run, score, *_FILE, *_SCORES, "agreement_error")
            rows[run, score.variant, score.runtime, score.graph] |= facts[run] | record
        for run, timing in self.latency:
            names = (*_TIMES, *_MORE, *_INTERVAL)
            record = _record(run, timing, *_FILE) | {f"{n}_batch_{timing.batch}": getattr(timing, n) for n in names}
            record[f"unsteady_batch_{timing.batch}"] = str(timing.unsteady).lower()
            rows[run, timing.variant, timing.runtime, timing.graph] |= facts[run] | record
        batches = sorted({row.batch for _, row in self.latency})
        times, later, last = (
            [f"{name}_batch_{batch}" for batch in batches for name in names] for names in (_TIMES, _MORE, _INTERVAL)
        )
        about = [name for record in (self.runs[0], self.machines[0]) for name in record if name != "run"]
        # new columns belong at the end: scripts may use column numbers
        columns = ["run", *_FILE, *_SCORES, *times, *about, "agreement_error", *later, *last]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return the tables as Markdown, each under its title."""
        parts = [part for table in self.tables() for part in (f"### {table.title}", tables.to_markdown(table))]
        return "\n\n".join([*parts, *(f"- {escaped(note)}" for note in self.notes)]) + "\n"


def read_reports(paths: list[Path]) -> dict[str, Report]:
    """Return the reports of run directories, or of `report.json` files, by the shortest names that differ.

    Raises:
        ReportError: a report is missing or cannot be read, or a run is named twice.
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
    """Compare reports, by the names that their runs have in the tables."""
    variants = [variant.name for report in reports.values() for variant in report.variants]
    # rows of fp32's files in FP16 are named fp16
    order = list(dict.fromkeys(n for name in variants for n in ((BASELINE, HALF) if name == BASELINE else (name,))))

    def neighbours(rows: list[tuple[str, _Row]], *keys: str) -> list[tuple[str, _Row]]:
        """Sort rows by variant, then by the given attributes, their values in order of first appearance."""
        pairs = rows
        for key in reversed(keys):
            seen = list(dict.fromkeys(getattr(row, key) for _, row in rows))
            pairs = sorted(pairs, key=lambda pair: seen.index(getattr(pair[1], key)))
        return sorted(pairs, key=lambda pair: order.index(pair[1].variant))

    latency = [(run, row) for run, report in reports.items() for row in latency_rows(report)]
    accuracy = [(run, row) for run, report in reports.items() for row in accuracy_rows(report)]
    return Comparison(
        runs=[
            {
                "run": run,
                "model": model_name(report),
                "seed": report.seed,
                "recipe": report.calibration.recipe,
                "effort": report.config.get("effort"),
                "synthetic_images": report.calibration.images,
                "evaluated_on": report.evaluation.dataset,
                "evaluated_images": report.evaluation.images,
                "created": report.created,
            }
            for run, report in reports.items()
        ],
        accuracy=neighbours(accuracy, "runtime", "graph"),
        latency=neighbours(latency, "runtime", "graph", "batch"),
        machines=[
            {"run": run, "clusterq_deploy": report.clusterq_deploy}
            | {name: getattr(report.environment, name) for name in _MACHINE}
            for run, report in reports.items()
        ],
        notes=_notes(list(reports.values()), [run for run, row in latency if row.unsteady]),
    )


def _record(run: str, row: AccuracyRow | LatencyRow, *names: str) -> Record:
    return {"run": run} | {name: getattr(row, name) for name in names}


def _record_table(title: str, records: Sequence[Record]) -> Table:
    columns = tuple(name.replace("_", " ") for name in records[0])
    rows = [tuple(ABSENT if value is None else str(value) for value in record.values()) for record in records]
    return Table(title, columns, rows, len(columns))


def _notes(reports: list[Report], unsteady: list[str]) -> list[str]:
    """Return the differences between the runs that make numbers of a column incomparable."""
    machines = [report.environment for report in reports]
    columns: dict[str, list[Hashable]] = {
        "The models differ: compare drops and speed-ups, not top-1 and times.": [r.model.name for r in reports],
        "Accuracy was measured on different images: top-1, drop and agreement cannot be compared.": [
            (report.evaluation.dataset, report.evaluation.images) for report in reports
        ],
        "The machines differ: times cannot be compared, speed-ups only roughly.": [
            (machine.gpu, machine.cpu, machine.cores, machine.driver) for machine in machines
        ],
        "The versions of the runtimes differ: they may cause a part of a difference in time.": [
            (machine.onnxruntime, machine.tensorrt, machine.torch) for machine in machines
        ],
        f"~ marks a median whose measurement was unsteady (standard deviation above {100 * UNSTEADY:g} % of the "
        f"mean), in {', '.join(dict.fromkeys(unsteady))}: the machine was busy.": [False, bool(unsteady)],
    }
    return [note for note, values in columns.items() if len(set(values)) > 1]
