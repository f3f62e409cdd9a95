"""The content of `report.json` (schema 1). Field names are a contract: fields may be added, none may be renamed."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from clusterq_deploy.errors import ReportError
from clusterq_deploy.results import Count, Duration, Finite, Percent, Record
from clusterq_deploy.results.engines import EngineInspection, EnginePlan, GpuTelemetry, LatencyStats

_QUANTILES = 21
_MOST_DIGITS = 20
_SIGNIFICANT = 0.01
_LEAST_GAIN = 10.0  # points
_Step = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Environment(Record):
    """Versions and hardware of the machine that measured; None if absent.

    `cores` counts the logical cores that the process may use. `cpu_int8` lists the CPU's instructions for INT8 dot
    products (avx512_vnni, amx_int8, ...): empty if it has none, None if unknown.
    """

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
    cpu_int8: list[str] | None = None
    cores: Count
    memory_bytes: Count
    platform: str


class ModelInfo(Record):
    """The teacher: `input_size` is (channels, height, width); `weights` describes its weights in words.

    `probabilities` is the function at its end that makes probabilities of logits; None if it answers with logits.
    """

    name: str
    parameters: Count
    input_size: tuple[int, int, int]
    classes: Count
    weights: str | None = None
    probabilities: Literal["softmax", "sigmoid"] | None = None

    @property
    def random(self) -> bool:
        """Whether its weights are random: the measurements then say nothing about a trained model."""
        return (self.weights or "").startswith("random (seed ")


class CalibrationInfo(Record):
    """The calibration set; the teacher classifies `teacher_top1` percent of the images as labelled.

    `within_class_diversity` is measured at the inputs of the teacher's last BatchNorm; for `silhouette` see
    `FeatureSet`. `losses` has the training curves, a value per recorded step. The batches of synthesis were divided by
    `batch_divisor` to fit the memory. `preview_classes` has a number, and a name if known, per column of the preview.

    `statistics_distance` is how far the images are from the running statistics of the median BatchNorm layer, in
    standard deviations; None in older reports. `new_statistics` says that these are the ones of new layers, mean 0
    and variance 1.
    """

    images: Count
    seconds: Duration
    teacher_top1: Percent
    recipe: str
    within_class_diversity: float | None = None
    silhouette: float | None = None
    losses: dict[str, list[float]] = Field(default_factory=dict)
    batch_divisor: int = 1
    preview_classes: list[str] = Field(default_factory=list)
    statistics_distance: float | None = None
    new_statistics: bool = False


class ImageNote(Record):
    """An image that cannot be read, by its name in the data set, and why."""

    file: str
    reason: str


class LabelCheck(Record):
    """Tests of whether labels belong to a model's classes: its top-1 against that with permuted labels, in percent.

    `permuted` is the mean top-1 of `permutations` random permutations of the labels over the images, of which a share
    in [0, 1], `reaching`, has at least `top1`. `renamed` is the top-1 after the one-to-one renaming of classes that
    fits best, `renamed_permuted` the mean of the same for permuted labels; None if there are too many classes. `shift`
    is -1 or 1 if that added to all labels explains most of `renamed`, with a top-1 of `shifted`.
    """

    top1: Percent
    permutations: Count
    permuted: Percent
    reaching: float = Field(ge=0, le=1)
    renamed: Percent | None = None
    renamed_permuted: Percent | None = None
    shift: Literal[-1, 1] | None = None
    shifted: Percent | None = None

    @property
    def at_chance(self) -> bool:
        """Whether more than 1 % of the permutations reach a low top-1."""
        return self.reaching > _SIGNIFICANT and self.top1 < (self.permuted + 100) / 2

    @property
    def renaming_helps(self) -> bool:
        """Whether a renaming of classes has more than twice the top-1, in excess of chance."""
        if self.renamed is None or self.renamed_permuted is None:
            return False
        return self.renamed - self.renamed_permuted > max(2 * (self.top1 - self.permuted), _LEAST_GAIN)


class EvaluationInfo(Record):
    """The images that accuracy was measured on. `labelled` is False if only agreement is meaningful.

    `unreadable` more images could not be read and are not counted; `unreadable_files` has the first of them. `notes`
    say how labels were read if that was not certain, and which files were passed over. `label_check` is None without
    labels, for few images, and in older reports.
    """

    dataset: str
    images: Count
    labelled: bool = True
    unreadable: Count = 0
    unreadable_files: list[ImageNote] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    label_check: LabelCheck | None = None


class Accuracy(Record):
    """Percentages, as `runtime` executed the model; top1 and top5 are None without labels.

    `agreement` is the percentage of images on which the prediction equals the FP32 teacher's. `graph` is the path of
    the executed artifact, None for the torch model.
    """

    runtime: str
    top1: Percent | None
    top5: Percent | None
    agreement: Percent
    graph: str | None = None


class Artifact(Record):
    """A deployable file; `path` is relative to the run directory.

    `fp16` says whether layers that are not quantized compute in FP16: in the float baseline, all layers.
    """

    kind: Literal["onnx", "engine"]
    target: Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "int4"]
    path: str
    size_bytes: Count
    fp16: bool = False
    sha256: str | None = None
    notes: list[str] = Field(default_factory=list)


class Latency(LatencyStats):
    """Time of one inference call of `batch` images, in milliseconds.

    `graph` is the path of the executed artifact, None for the torch model. `quantiles_ms` are at 0, 0.05, 0.1 and so on
    to 1. `speedup` is relative to fp32 timed in alternation, `speedup_low` to `speedup_high` its 95 % interval; None if
    the two were not alternated, or too few times.

    The other fields are set for engines only. Their time is the sum of `host_to_device`, `compute` and
    `device_to_host`, by CUDA events; `enqueue` is the host's time to start the computation, by replaying a CUDA graph
    if `cuda_graph`. `images_per_second` is computed from `wall_seconds`, from the first call to the end of the last.
    The command `trtexec` repeats the measurement.
    """

    runtime: str
    batch: Count
    threads: int | None = None
    runs: Count
    images_per_second: Duration
    graph: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    quantiles_ms: list[Duration] = Field(default_factory=list)
    host_to_device: LatencyStats | None = None
    compute: LatencyStats | None = None
    device_to_host: LatencyStats | None = None
    enqueue: LatencyStats | None = None
    cuda_graph: bool | None = None
    wall_seconds: float | None = None
    trtexec: str | None = None
    gpu: GpuTelemetry | None = None

    @field_validator("quantiles_ms")
    @classmethod
    def _all_or_none(cls, quantiles_ms: list[float]) -> list[float]:
        if len(quantiles_ms) not in (0, _QUANTILES):
            raise ValueError(f"there are {len(quantiles_ms)} quantiles; expected {_QUANTILES} or none")
        return quantiles_ms


class LayerNote(Record):
    """A layer that was left in float, and why."""

    layer: str
    reason: str


class LayerSensitivity(Record):
    """The cost of quantizing only this layer, on synthetic images: KL in nats, percentages."""

    layer: str
    bits: str
    kl: float
    agreement: float
    expected_drop: float


class Histogram(Record):
    """Values in units of the quantization step: the grid has the integers from `low` to `high`.

    `steps` are the smallest and the largest step of an output channel, equal if the tensor has one step. Bin i of
    `counts` begins at `start` + i * `width`; a bin is within one step or covers whole steps, so none mixes clipped
    values with others. The outermost two also count values beyond them. `clipped` is the share of clipped values.
    """

    low: int = Field(ge=-128, le=0)
    high: int = Field(ge=1, le=255)
    steps: tuple[_Step, _Step]
    start: Finite = Field(ge=-1024, le=1024)
    width: _Step = Field(le=1024)
    counts: list[Count] = Field(min_length=1, max_length=1024)
    clipped: float = Field(ge=0, le=1)


class LayerHistograms(Record):
    """The weight and the input of a quantized layer: the FP32 model's, equalized as in the variant."""

    layer: str
    weight: Histogram
    activation: Histogram


class Variant(Record):
    """One bit-width setting of the model (`w4a4`), or the float baseline (`fp32`).

    `keep` has the layers with other widths. `expected_drop` is the drop in top-1, in points, that was expected before
    fine-tuning, if a bound, `max_drop`, was set. The batches of fine-tuning were divided by `batch_divisor` to fit the
    memory. `histograms` has the quantized layers in order of execution. `kept_step` is the step of fine-tuning whose
    weights were used: 0 if none improved on the start on held-out images, None if nothing was tuned. `cpu` is the
    target of the graph for ONNX Runtime: `any`, or `vnni`, without which its sums saturate; None for the baseline.
    `plans` has the kernels of its engines of TensorRT-RTX.
    """

    name: str
    seconds: Duration
    accuracy: list[Accuracy] = Field(default_factory=list)
    artifacts: list[Artifact] = Field(default_factory=list)
    latency: list[Latency] = Field(default_factory=list)
    inspections: list[EngineInspection] = Field(default_factory=list)
    plans: list[EnginePlan] = Field(default_factory=list)
    quantized_layers: int | None = None
    skipped_layers: list[LayerNote] = Field(default_factory=list)
    keep: dict[str, int] = Field(default_factory=dict)
    expected_drop: float | None = None
    max_drop: float | None = None
    sensitivities: list[LayerSensitivity] = Field(default_factory=list)
    histograms: list[LayerHistograms] = Field(default_factory=list)
    losses: dict[str, list[float]] = Field(default_factory=dict)
    batch_divisor: int = 1
    kept_step: int | None = None
    cpu: Literal["any", "vnni"] | None = None


class Points(Record):
    """Projected images: image i of class `labels[i]` is at (`x[i]`, `y[i]`), rounded to two decimals."""

    x: list[Finite] = Field(default_factory=list)
    y: list[Finite] = Field(default_factory=list)
    labels: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if not len(self.x) == len(self.y) == len(self.labels):
            raise ValueError(f"x, y and labels differ in length: {len(self.x)}, {len(self.y)}, {len(self.labels)}")
        return self


class FeatureSet(Record):
    """The teacher's penultimate features of `images` images of `classes` classes.

    `silhouette` is the mean silhouette coefficient by class, in [-1, 1]; `within_class_diversity` the share of the
    variance within classes, in [0, 1]; None if undefined.
    """

    dataset: str
    images: int
    classes: int
    silhouette: float | None = None
    within_class_diversity: float | None = None
    points: Points = Points()


class Projection(Record):
    """The method that projected features to two coordinates."""

    method: str
    parameters: dict[str, float | int | str] = Field(default_factory=dict)


class FeatureInfo(Record):
    """Synthetic and real images, compared by the teacher's penultimate features, `width` of them.

    `real` is None without labelled images; both sets share one `projection`. `density` and `coverage` (arXiv
    2002.09797, k = 5) say how the synthetic features cover the real ones. `notes` are sentences on what is missing.
    """

    width: int
    synthetic: FeatureSet
    real: FeatureSet | None = None
    density: float | None = None
    coverage: float | None = None
    projection: Projection | None = None
    notes: list[str] = Field(default_factory=list)


class Skipped(Record):
    """A stage or a runtime that was left out, and why."""

    stage: str
    reason: str


class Report(Record):
    """The whole of `report.json`.

    `command` is the command line that ran the last stage; `commands` has all that ran a stage, each once, in order.
    """

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
    features: FeatureInfo | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    commands: list[list[str]] = Field(default_factory=list)

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        ReportError: the file cannot be read, is not JSON, or is not a report of schema 1.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ReportError(f"{path} is not JSON ({error}): give the report.json of a run") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise ReportError(f'{path} is not a report: it has no "schema"; give the report.json of a run')
    if content["schema"] != 1:
        raise ReportError(
            f"{path} has schema {content['schema']!r}, this version reads schema 1: "
            "read it with the version of clusterq-deploy that wrote it"
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ReportError(f"{path} is not a report of schema 1: {field}: {first['msg']}") from error


def _integer(digits: str) -> int:
    """Parse an integer of JSON; raise ValueError if it may not fit a float."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)
