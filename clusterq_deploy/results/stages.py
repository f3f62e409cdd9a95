"""What the stages of a run find: a record for each kind of stage, which the manifest keeps as JSON."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer

from clusterq_deploy.results.base import Count, Percent, Record
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.results.features import FeatureInfo
from clusterq_deploy.results.report import (
    Accuracy,
    Artifact,
    Environment,
    ImageNote,
    Latency,
    LayerHistograms,
    LayerNote,
    Skipped,
)


class StageResult(Record):
    """What a stage found. A field that was not set is left out of the manifest, and has its default when read."""

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class SynthesisResult(StageResult):
    """The calibration set; see `CalibrationInfo`. `flip` says whether its images keep their class when mirrored."""

    images: Count
    teacher_top1: Percent
    within_class_diversity: float | None
    flip: bool
    recipe: str
    losses: dict[str, list[float]]
    batch_divisor: int = 1


class Divergence(Record):
    """How far a quantized model is from the teacher on images.

    The expected drop is what top-1 would lose if the teacher's probabilities were the truth: the mean of p(the
    teacher's class) - p(the student's class). No label is needed; an overconfident teacher makes it too high.
    """

    kl: float  # mean KL(teacher || student), in nats
    agreement: float  # percentage of images with the same top-1
    expected_drop: float  # in points


class Sensitivity(Record):
    """What it costs to quantize only one layer, its weight and what it reads, at `bits`; all others in float."""

    layer: str
    bits: str
    cost: Divergence


class SensitivityResult(StageResult):
    """The quantized layers, in order of execution."""

    layers: list[Sensitivity]


class QuantizeResult(StageResult):
    """How a student was made; see `Variant`, for pairs, errors and shifts `PTQResult`. `format` is that of its file."""

    format: int
    cpu: Literal["any", "vnni"] | None = None
    losses: dict[str, list[float]] = Field(default_factory=dict)
    kept_step: int | None = None
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
    """The graphs. `no_fp16` says why FP32 has none in FP16; `verification` has the checks of a variant's, by file."""

    artifacts: list[Artifact]
    no_fp16: str | None = None
    verification: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def graph(self, target: str) -> str:
        """Return the path of the graph for a target."""
        return next(artifact.path for artifact in self.artifacts if artifact.target == target)


class BuildResult(StageResult):
    """The engines."""

    artifacts: list[Artifact]


class UnreadableImages(Record):
    """How many of the `total` images of a set cannot be read, and the first of them."""

    count: Count
    total: Count
    files: list[ImageNote]


class EvaluationResult(StageResult):
    """The accuracy in each runtime; `unreadable` is None in manifests from before it was kept."""

    accuracy: list[Accuracy]
    unreadable: UnreadableImages | None = None


class FeaturesResult(StageResult):
    """The comparison, or why there is none; `inputs` are the real images that it is of.

    `provisional` says that another process may be able to do it: the memory was not enough.
    """

    inputs: dict[str, str | int | None]
    features: FeatureInfo | None = None
    skipped: str | None = None
    provisional: bool = False


class BenchmarkResult(StageResult):
    """Latencies and engines by variant, what measured them, and what was left out; `provisional` as for features."""

    latency: dict[str, list[Latency]]
    environment: Environment
    inspections: dict[str, list[EngineInspection]] = Field(default_factory=dict)
    skipped: list[Skipped] = Field(default_factory=list)
    provisional: bool = False

    @field_serializer("latency")
    def _measured(self, latency: dict[str, list[Latency]]) -> dict[str, list[dict[str, Any]]]:
        return {variant: [latency_values(entry) for entry in entries] for variant, entries in latency.items()}


def latency_values(latency: Latency) -> dict[str, Any]:
    """Return a latency as JSON values, without what was not measured except `graph` and `threads` if they were set."""
    named: list[str] = [name for name in ("graph", "threads") if name in latency.model_fields_set]
    values = latency.model_dump(mode="json", exclude_none=True, exclude=set(named))
    return {**values, **{name: getattr(latency, name) for name in named}}
