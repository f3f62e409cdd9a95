"""Records of engines: the parts of their latency, the GPU during it, their layers, and what a compiler planned."""

from typing import Literal

from pydantic import Field

from clusterq_deploy.results import Duration, Finite, Record


class LatencyStats(Record):
    """Times over all calls of a measurement; `coefficient_of_variation` is the standard deviation over the mean."""

    mean_ms: Duration
    median_ms: Duration
    p90_ms: Duration
    p95_ms: Duration
    p99_ms: Duration
    coefficient_of_variation: Finite


class Reading(Record):
    """One quantity of a GPU, sampled during a measurement."""

    lowest: float
    mean: float
    highest: float


class GpuTelemetry(Record):
    """Samples by NVML during a latency measurement; None for what it did not report.

    Attributes:
        reason: why nothing was reported; None if something was.
        samples: their number.
        sm_clock_mhz, memory_clock_mhz: clocks; `*_limit_mhz` is the device's maximum.
        clocks: `set`: limited by application clocks; `steady`: the SM clock was the same in every sample, as if locked,
            which NVML does not report; `floating`: it changed.
        power_watts: of the board; `power_limit_watts` is the enforced limit.
        throttling: share of the samples by NVML's reason for lowered clocks; empty if it gave none.
    """

    reason: str | None = None
    samples: int = 0
    sm_clock_mhz: Reading | None = None
    sm_clock_limit_mhz: float | None = None
    memory_clock_mhz: Reading | None = None
    memory_clock_limit_mhz: float | None = None
    clocks: Literal["set", "steady", "floating"] | None = None
    power_watts: Reading | None = None
    power_limit_watts: float | None = None
    temperature_celsius: Reading | None = None
    throttling: dict[str, float] | None = None


class EngineLayer(Record):
    """One layer of an engine: `kind` and `precision` (of its inputs) are None if the engine has no such details.

    `mean_ms` is its time per call by TensorRT's profiler, `share` its share of the time of all layers.
    """

    name: str
    kind: str | None = None
    precision: str | None = None
    mean_ms: float
    share: float


class MissedLayer(Record):
    """A layer that is quantized in the graph but not in INT8 in the engine, by the names of its node and weight."""

    layer: str
    weight: str
    reason: str


class EngineInspection(Record):
    """The layers of an engine.

    Attributes:
        engine: the engine's path in the run directory.
        batch: images per call of the inspection.
        detailed: whether the engine has more details of its layers than their names.
        weights_bytes: memory of the engine's weights; None if this release of TensorRT does not tell.
        layers: their number, including `reformats` and `quantizers`, which only change a layout or a type.
        precisions: number of computing layers by the type of their inputs.
        total_ms: mean time of all layers per call, by the profiler, which slows them down; `reformat_ms`: of reformats.
        slowest: the ten that take longest, the longest first.
        quantized_layers: number of convolutions and Gemms that are quantized in the graph.
        missed: those of them that do not run in INT8.
        notes: sentences on what is missing, and why.
    """

    engine: str
    batch: int
    detailed: bool
    weights_bytes: int | None = None
    layers: int
    reformats: int = 0
    quantizers: int = 0
    precisions: dict[str, int] = Field(default_factory=dict)
    total_ms: float = 0.0
    reformat_ms: float = 0.0
    slowest: list[EngineLayer] = Field(default_factory=list)
    quantized_layers: int = 0
    missed: list[MissedLayer] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class PlannedKernel(Record):
    """One kernel of a plan: TensorRT-RTX's type of it, the ONNX nodes it computes, and the activations it moves.

    `reads` and `writes` have the type of each activation, such as INT8; `bytes_in` and `bytes_out` are their sizes
    per image, `bytes_stored` that of its weights and other constants. `padded_channels` are those of a convolution's
    input and output that the graph does not have.
    """

    kind: str
    nodes: list[str] = Field(default_factory=list)
    reads: list[str] = Field(default_factory=list)
    writes: list[str] = Field(default_factory=list)
    bytes_in: int
    bytes_out: int
    bytes_stored: int = 0
    padded_channels: int = 0


class EnginePlan(Record):
    """What the compiler of TensorRT-RTX made of a graph, by its own table; nothing was run, and nothing timed.

    Attributes:
        engine: the engine's path in the run directory.
        release: that of TensorRT-RTX; `targets` are the families of GPUs that the engine is for.
        kernels: their number, without events and computations of shapes; 0 if the table cannot be read.
        convolutions: the kernels that are convolutions; `convolutions_int8` of them read INT8.
        convolutions_write: the number of convolutions by the type that they write.
        requantizations: separate kernels that make INT8 again of what a convolution or matrix product in INT8 wrote.
        padded_channels: channels of convolutions' inputs and outputs that the graph does not have.
        bytes_in, bytes_out: activations that all kernels read and write per image, without weights.
        bytes_stored: weights and other constants that all kernels read per call.
        respelled: whether the engine's graph was spelled for this compiler; see `lowering.to_tensorrt_rtx`.
        layers: the kernels, in order.
        notes: sentences on what is missing, and why.
    """

    engine: str
    release: str = ""
    targets: list[str] = Field(default_factory=list)
    kernels: int = 0
    convolutions: int = 0
    convolutions_int8: int = 0
    convolutions_write: dict[str, int] = Field(default_factory=dict)
    requantizations: int = 0
    padded_channels: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_stored: int = 0
    respelled: bool = False
    layers: list[PlannedKernel] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Bytes of activations that are read and written per image."""
        return self.bytes_in + self.bytes_out


class Refusal(Record):
    """What a parser or compiler refuses: a node of the graph, its operator, why, and what to do; empty if unknown."""

    node: str = ""
    operator: str = ""
    reason: str
    remedy: str = ""


class Compilation(Record):
    """The answer of TensorRT-RTX's parser and compiler about a graph: what they refuse, or the plan of an engine."""

    refusals: list[Refusal] = Field(default_factory=list)
    plan: EnginePlan | None = None
