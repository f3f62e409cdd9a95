"""What a table consists of: models, cells, the command that makes a cell, and what its report says of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_ENVIRONMENT = ("python", "torch", "onnx", "onnxruntime", "cpu", "cpu_int8", "cores", "memory_bytes", "gpu")
_NOT_SETTINGS = ("model", "data", "bits", "first_last", "seed", "build", "benchmark")
"""What a run's configuration holds that is the cell's own, or moves no accuracy."""

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
        label: the row's name, where settings make it another row.
        settings: of `RunConfig`, on top of the recipe's.
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
        """Identifies the cell among the results; the row's name is no part of it."""
        return digest({name: value for name, value in asdict(self).items() if name != "label"})

    @property
    def slug(self) -> str:
        """Name of the cell's variant in a run."""
        return f"{self.bits}-first-last" if self.first_last else self.bits

    @property
    def synthesis(self) -> str:
        """Cells for which this is the same share their images."""
        own = digest(self.settings)[:8] if self.settings else None
        parts = [self.model, self.recipe, self.effort, f"s{self.seed}", own]
        return "-".join(part for part in parts if part)

    def __str__(self) -> str:
        return " ".join(part for part in (self.synthesis, self.slug, self.label) if part)


@dataclass(frozen=True)
class Places:
    """Where things lie; all but `workdir` are named in results by their last part alone."""

    workdir: Path
    models_file: Path | None = None
    data_dir: Path | None = None

    def model(self, model: Model, *, whole: bool = True) -> str:
        """MODEL of `clusterq`; by the name of its file alone unless `whole`."""
        if model.data is None or self.models_file is None:
            return model.name
        return f"{self.models_file if whole else self.models_file.name}:{model.name}"

    def hidden(self, text: str) -> str:
        """The text without the folders of this machine."""
        folders = [self.workdir, self.data_dir, self.models_file and self.models_file.parent, ROOT, Path.home()]
        for folder in sorted((str(f) for f in folders if f), key=len, reverse=True):
            text = text.replace(f"{folder}/", "")
        return text


def digest(value: Any) -> str:
    """The first 12 digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later ones on top."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = isinstance(value, Mapping)
            result[key] = merged(result.get(key, {}), value) if inner else value
    return result


def arguments(cell: Cell, verb: str, model: str, data: str | None, settings: Path, out: Path) -> list[str]:
    """The arguments of `clusterq` that make a cell (`run`) or its images (`synthesize`)."""
    own = [verb, model, "--recipe", cell.recipe, "--seed", str(cell.seed)]
    if cell.effort:
        own += ["--effort", cell.effort]
    if verb == "run":
        own += ["--bits", cell.bits, *(["--first-last"] if cell.first_last else [])]
        own += ["--data", data] if data else []
    return [*own, "--config", str(settings), "--out", str(out)]


def read_cell(report: Record, cell: Cell) -> tuple[Record, Record]:
    """What a report says of a cell (percentages, seconds), and the settings that it was made with."""
    variants = {variant["name"]: variant for variant in report["variants"]}
    executed = {entry["graph"]: entry for entry in variants[cell.bits]["accuracy"]}
    ours, spelled = (executed[f"{cell.bits}/model.{kind}.onnx"] for kind in ("ort", "trt"))
    fp32 = next(a for a in variants["fp32"]["accuracy"] if a["graph"] == "fp32/model.onnx")
    config = {name: value for name, value in report["config"].items() if name not in _NOT_SETTINGS}
    record = {
        "key": cell.key,
        **asdict(cell),
        "dataset": report["evaluation"]["dataset"],
        "images": report["evaluation"]["images"],
        "fp32_top1": fp32["top1"],
        "runtime": ours["runtime"],
        "top1": ours["top1"],
        "top1_tensorrt_graph": spelled["top1"],
        "drop": fp32["top1"] - ours["top1"],
        "agreement": ours["agreement"],
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
