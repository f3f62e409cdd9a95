"""Models and cells of a table, the commands that make a cell, and its record from their report."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_ENVIRONMENT = ("python", "torch", "onnx", "onnxruntime", "cpu", "cpu_int8", "cores", "memory_bytes", "gpu")
_NOT_SETTINGS = ("model", "data", "bits", "first_last", "seed", "build", "benchmark")
"""Parts of a run's configuration that identify the cell, or do not change accuracy."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of the tables: `data` is its evaluation data under --data-dir, None for the bundled model's own."""

    name: str
    title: str
    data: str | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: name of the model.
        bits: such as w4a4.
        first_last: whether the first and last layers have those bits too, not 8.
        recipe, effort, seed: as for `clusterq run`; an effort of None is not passed on.
        label: the row's name, if it has its own settings.
        settings: of `RunConfig`, which replace the recipe's.
    """

    model: str
    bits: str
    first_last: bool = False
    recipe: str = "default"
    effort: str | None = None
    seed: int = 0
    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies the cell in the results, independent of the row's name."""
        return digest({name: value for name, value in asdict(self).items() if name != "label"})

    @property
    def slug(self) -> str:
        """Name of the cell's variant in a run."""
        return f"{self.bits}-first-last" if self.first_last else self.bits

    @property
    def synthesis(self) -> str:
        """The name of the images, which cells may share."""
        settings = digest(self.settings)[:8] if self.settings else None
        parts = [self.model, self.recipe, self.effort, f"s{self.seed}", settings]
        return "-".join(part for part in parts if part)

    def __str__(self) -> str:
        return " ".join(part for part in (self.synthesis, self.slug, self.label) if part)


def digest(value: Any) -> str:
    """Return the first 12 digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested settings as one; those of `above` replace those of `below`."""
    inner = {key: merged(below.get(key, {}), value) for key, value in above.items() if isinstance(value, Mapping)}
    return {**below, **above, **inner}


def arguments(cell: Cell, verb: str, model: str, data: str | None, settings: Path, out: Path) -> list[str]:
    """Return the arguments of `clusterq` that make a cell (`run`) or its images (`synthesize`)."""
    result = [verb, model, "--recipe", cell.recipe, "--seed", str(cell.seed)]
    if cell.effort:
        result += ["--effort", cell.effort]
    if verb == "run":
        result += ["--bits", cell.bits, *(["--first-last"] if cell.first_last else [])]
        result += ["--data", data] if data else []
    return [*result, "--config", str(settings), "--out", str(out)]


def read_cell(report: Record, cell: Cell) -> tuple[Record, Record]:
    """Return the record of a cell from its report (percentages, seconds), and the settings of the run."""
    variants = {variant["name"]: variant for variant in report["variants"]}
    executed = {entry["graph"]: entry for name in ("fp32", cell.bits) for entry in variants[name]["accuracy"]}
    fp32 = executed["fp32/model.onnx"]
    ort, trt = (executed[f"{cell.bits}/model.{kind}.onnx"] for kind in ("ort", "trt"))
    config = {name: value for name, value in report["config"].items() if name not in _NOT_SETTINGS}
    record = {
        "key": cell.key,
        **asdict(cell),
        "dataset": report["evaluation"]["dataset"],
        "images": report["evaluation"]["images"],
        "fp32_top1": fp32["top1"],
        "runtime": ort["runtime"],
        "top1": ort["top1"],
        "top1_tensorrt_graph": trt["top1"],
        "drop": fp32["top1"] - ort["top1"],
        "agreement": ort["agreement"],
        "teacher_top1": report["calibration"]["teacher_top1"],
        "within_class_diversity": report["calibration"].get("within_class_diversity"),
        "synthesis_seconds": report["calibration"]["seconds"],
        "quantize_seconds": variants[cell.bits]["seconds"],
        "date": report["created"],
        "version": report["clusterq_deploy"],
        "environment": {name: report["environment"].get(name) for name in _ENVIRONMENT},
        "config_digest": digest(config),
    }
    return record, config
