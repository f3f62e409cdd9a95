"""What `report.json` holds of TensorRT engines: their time in parts, the GPU meanwhile, and their layers."""

from typing import Literal

from pydantic import Field

from clusterq_deploy.results.base import Duration, Finite, Record


class LatencyStats(Record):
    """Times over all calls of a measurement, in milliseconds.

    `coefficient_of_variation` is the standard deviation over the mean: 0.025 is 2.5 %.
    """

    mean_ms: Duration
    median_ms: Duration
    p90_ms: Duration
    p95_ms: Duration
    p99_ms: Duration
    coefficient_of_variation: Finite


class Reading(Record):
    """One quantity of a GPU over a measurement: the lowest, the mean and the highest of its samples."""

    lowest: float
    mean: float
    highest: float


class GpuTelemetry(Record):
    """What NVML reported of a GPU while a latency was measured; None for what it did not report.

    Attributes:
        reason: why nothing was reported; None if something was.
        samples: how often it was asked.
        sm_clock_mhz, memory_clock_mhz: clocks; `*_limit_mhz` the most that the device can have.
        clocks: `set`: limited by application clocks; `steady`: the SM clock was the same in every sample, as locked
            clocks are, which NVML does not report; `floating`: it moved.
        power_watts: drawn by the board; `power_limit_watts` is the limit in force.
        temperature_celsius: of the GPU.
        throttling: the share of the samples, by the reason that NVML gave for lowered clocks; empty if it gave none.
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
    """One layer of an engine: `kind` and `precision` (of what it reads) are None if the engine does not say.

    `mean_ms` is its time per call by TensorRT's profiler, `share` that over the time of all layers.
    """

    name: str
    kind: str | None = None
    precision: str | None = None
    mean_ms: float
    share: float


class MissedLayer(Record):
    """A layer that is quantized in the graph and does not run in INT8 in the engine, and what it does instead.

    `layer` is the node's name in the graph, `weight` that of its weight.
    """

    layer: str
    weight: str
    reason: str


class EngineInspection(Record):
    """What TensorRT made of a graph.

    Attributes:
        engine: the engine's path in the run directory.
        batch: images per call of the inspection.
        detailed: whether the engine says more about its layers than their names.
        layers: how many there are; `reformats` and `quantizers` are among them, and only change a layout or a type.
        precisions: how many of the layers that compute read each type.
        total_ms: mean time of all layers per call, by the profiler, which slows them down; `reformat_ms` of the
            reformats.
        slowest: the ten that take longest, the longest first.
        quantized_layers: convolutions and Gemms that are quantized in the graph.
        missed: those of them that do not run in INT8.
        notes: whole sentences that say what is not known, and why.
    """

    engine: str
    batch: int
    detailed: bool
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
