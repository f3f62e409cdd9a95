"""The results of the stages of a run: a record for each kind of stage, which the manifest stores as JSON."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer

from clusterq_deploy.results import Count, Percent, Record
from clusterq_deploy.results.engines import EngineInspection, EnginePlan
from clusterq_deploy.results.report import (
    Accuracy,
    Artifact,
    Environment,
    FeatureInfo,
    ImageNote,
    LabelCheck,
    Latency,
    LayerHistograms,
    LayerNote,
    Skipped,
)


class StageResult(Record):
    """The result of a stage. Fields that were not set are left out of the manifest."""

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class SynthesisResult(StageResult):
    """The calibration set; see `CalibrationInfo`, and `ModelInfo` for `probabilities`.

    `flip` says whether its images keep their class when mirrored.
    """

    images: Count
    teacher_top1: Percent
    within_class_diversity: float | None
    flip: bool
    recipe: str
    losses: dict[str, list[float]]
    batch_divisor: int = 1
    statistics_distance: float | None = None
    new_statistics: bool = False
    probabilities: Literal["softmax", "sigmoid"] | None = None


class Divergence(Record):
    """How far a quantized model is from the teacher on images.

    The expected drop, in points, is the mean of p(the teacher's class) - p(the student's class) under the teacher's
    probabilities. It requires no labels; an overconfident teacher makes it too high.
    """

    kl: float  # mean KL(teacher || student), in nats
    agreement: float  # percentage of images with the same top-1
    expected_drop: float


class Sensitivity(Record):
    """The cost of quantizing only one layer, its weight and its input, at `bits`."""

    layer: str
    bits: str
    cost: Divergence


class SensitivityResult(StageResult):
    """The quantized layers, in order of execution."""

    layers: list[Sensitivity]


class QuantizeResult(StageResult):
    """How a student was made, in a file of this `format`; see `Variant` and `PTQResult`."""

    format: int
    cpu: Literal["any", "vnni"] | None = None
    losses: dict[str, list[float]] = Field(default_factory=dict)
    kept_step: int | None = None
    trunks: list[dict[str, str | int | float]] = Field(default_factory=list)
    equalized: list[dict[str, str | int | float]] = Field(default_factory=list)
    reconstruction_errors: dict[str, tuple[float, float]] = Field(default_factory=dict)
    bias_shifts: dict[str, float] = Field(default_factory=dict)
    batch_divisor: int = 1
    keep: dict[str, int] = Field(default_factory=dict)
    expected_drop: float | None = None
    max_drop: float | None = None
    quantized_layers: int | None = None
    skipped_layers: list[LayerNote] = Field(default_factory=list)
    histograms: list[LayerHistograms] = Field(default_factory=list)


class ExportResult(StageResult):
    """The graphs. `no_fp16` says why FP32 has none in FP16; `verification` has a variant's checks by file."""

    artifacts: list[Artifact]
    no_fp16: str | None = None
    verification: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def graph(self, target: str) -> str:
        """Return the path of the graph for a target."""
        return next(artifact.path for artifact in self.artifacts if artifact.target == target)


class BuildResult(StageResult):
    """The engines."""

    artifacts: list[Artifact]


class RtxResult(BuildResult):
    """The engines of TensorRT-RTX, the plan of each, and the graphs that have none."""

    plans: list[EnginePlan]
    skipped: list[Skipped] = Field(default_factory=list)


class UnreadableImages(Record):
    """The number of the `total` images of a set that cannot be read, and the first of them."""

    count: Count
    total: Count
    files: list[ImageNote]


class EvaluationResult(StageResult):
    """The accuracy in each runtime; `unreadable` is None in older manifests. FP32's has the `label_check`."""

    accuracy: list[Accuracy]
    unreadable: UnreadableImages | None = None
    label_check: LabelCheck | None = None


class FeaturesResult(StageResult):
    """The comparison with the real images `inputs`, or why there is none.

    `provisional` says that there was not enough memory, so a later process may try again.
    """

    inputs: dict[str, str | int | None]
    features: FeatureInfo | None = None
    skipped: str | None = None
    provisional: bool = False


class BenchmarkResult(StageResult):
    """Latencies and engines by variant, the machine, and what was skipped; for `provisional` see `FeaturesResult`."""

    latency: dict[str, list[Latency]]
    environment: Environment
    inspections: dict[str, list[EngineInspection]] = Field(default_factory=dict)
    skipped: list[Skipped] = Field(default_factory=list)
    provisional: bool = False

    @field_serializer("latency")
    def _measured(self, latency: dict[str, list[Latency]]) -> dict[str, list[dict[str, Any]]]:
        return {variant: [latency_values(entry) for entry in entries] for variant, entries in latency.items()}


def latency_values(latency: Latency) -> dict[str, Any]:
    """Return a latency as JSON values, without those that are None except `graph` and `threads` if they were set."""
    named = {name: getattr(latency, name) for name in ("graph", "threads") if name in latency.model_fields_set}
    return latency.model_dump(mode="json", exclude_none=True, exclude={"graph", "threads"}) | named
