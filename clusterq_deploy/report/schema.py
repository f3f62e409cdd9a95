"""What `report.json` holds (schema 1). Field names are a contract; more may be added, none renamed."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Environment(_Record):
    """Versions and hardware of the machine that measured; None where a thing is not there."""

    python: str
    torch: str
    torchvision: str | None = None
    onnx: str
    onnxruntime: str
    tensorrt: str | None = None
    cuda: str | None = None
    driver: str | None = None
    gpu: str | None = None
    cpu: str
    cores: int
    memory_bytes: int
    platform: str


class ModelInfo(_Record):
    """The teacher: `input_size` is (channels, height, width)."""

    name: str
    parameters: int
    input_size: tuple[int, int, int]
    classes: int


class CalibrationInfo(_Record):
    """The calibration set: `teacher_top1` is the share (percent) of images that the teacher gives their label."""

    images: int
    seconds: float
    teacher_top1: float
    recipe: str
    within_class_diversity: float | None = None
    losses: dict[str, list[float]] = Field(default_factory=dict)


class EvaluationInfo(_Record):
    """What accuracy was measured on. `labelled` is False where only agreement has a meaning."""

    dataset: str
    images: int
    labelled: bool = True


class Accuracy(_Record):
    """Percentages, as `runtime` executed the model; top1 and top5 are None without labels.

    `agreement` is the share of images on which the prediction equals the FP32 teacher's. `graph` names the
    artifact that was executed, None for the torch model.
    """

    runtime: str
    top1: float | None
    top5: float | None
    agreement: float
    graph: str | None = None


class Artifact(_Record):
    """A deployable file; `path` is relative to the run directory."""

    kind: Literal["onnx", "engine"]
    target: Literal["onnxruntime", "tensorrt", "int4"]
    path: str
    size_bytes: int
    sha256: str | None = None
    notes: list[str] = Field(default_factory=list)


class Latency(_Record):
    """Time of one inference call of `batch` images, in milliseconds."""

    runtime: str
    batch: int
    threads: int | None = None
    runs: int
    mean_ms: float
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    coefficient_of_variation: float
    images_per_second: float
    graph: str | None = None


class LayerNote(_Record):
    """A layer that was left in float, and why."""

    layer: str
    reason: str


class Variant(_Record):
    """One bit-width setting of the model (`w4a4`), or the float baseline (`fp32`)."""

    name: str
    seconds: float
    accuracy: list[Accuracy] = Field(default_factory=list)
    artifacts: list[Artifact] = Field(default_factory=list)
    latency: list[Latency] = Field(default_factory=list)
    quantized_layers: int | None = None
    skipped_layers: list[LayerNote] = Field(default_factory=list)
    losses: dict[str, list[float]] = Field(default_factory=dict)


class Skipped(_Record):
    """A stage that did not run, and why."""

    stage: str
    reason: str


class Report(_Record):
    """The whole of `report.json`. Extra keys of a newer writer are ignored on reading."""

    schema_: Literal[1] = Field(1, alias="schema")
    command: list[str]
    seed: int
    created: str
    clusterq_deploy: str
    environment: Environment
    model: ModelInfo
    calibration: CalibrationInfo
    evaluation: EvaluationInfo
    variants: list[Variant]
    skipped: list[Skipped] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `report.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        ReportError: the file cannot be read, is no JSON, or is no report of schema 1.
    """
    raise NotImplementedError
