"""The words and tables on TensorRT engines that the Markdown and the HTML report share."""

from collections.abc import Iterator
from dataclasses import dataclass

from clusterq_deploy.report.findings import BASELINE, UNSTEADY
from clusterq_deploy.report.formats import ABSENT, file_name, milliseconds, percent, speedup
from clusterq_deploy.results.engines import EngineInspection, EngineLayer, GpuTelemetry, Reading
from clusterq_deploy.results.report import Latency, Report

ENQUEUE_BOUND = 0.8
"""Enqueue time over compute time above which the host may hold the GPU back; trtexec warns at the same share."""
HOST_BOUND = 1.2
"""Time between calls over their longest part on the GPU above which the host's pace is what the throughput shows."""
_SHOWN = 48  # characters of a layer's name
_LISTED = 10  # layers in a sentence


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text; columns from `left` on are numbers and stand to the right."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int


def engine_tables(report: Report) -> list[TextTable]:
    """The tables on engines that have rows: times, the GPU, layers by type."""
    tables = (timing_table(report), gpu_table(report), layer_table(report))
    return [table for table in tables if table is not None]


def timing_table(report: Report) -> TextTable | None:
    """The parts of each engine's calls, medians in milliseconds; None without engines."""
    rows = []
    for variant, latency in _engine_latencies(report):
        parts = (latency.host_to_device, latency.compute, latency.device_to_host, latency.enqueue)
        rows.append(
            (
                variant,
                file_name(latency.graph),
                {True: "yes", False: "no", None: ABSENT}[latency.cuda_graph],
                str(latency.batch),
                *(milliseconds(part.median_ms) if part else ABSENT for part in parts),
                milliseconds(latency.compute.p99_ms) if latency.compute else ABSENT,
                percent(latency.compute.coefficient_of_variation) if latency.compute else ABSENT,
                speedup(_compute_speedup(report, latency)),
                f"{latency.images_per_second:,.0f}",
            )
        )
    headings = ("Variant", "Engine", "CUDA graph", "Batch", "To GPU, ms", "Compute, ms", "From GPU, ms", "Enqueue, ms")
    more = ("Compute p99, ms", "Variation", "Compute speed-up", "Images/s")
    return TextTable("Time of a call in parts, medians", headings + more, rows, 3) if rows else None


def gpu_table(report: Report) -> TextTable | None:
    """What NVML told of the GPU during each engine's measurement; None where it told nothing."""
    rows = [
        (variant, file_name(latency.graph), str(latency.batch), *_gpu_cells(latency.gpu))
        for variant, latency in _engine_latencies(report)
        if latency.gpu is not None and latency.gpu.reason is None
    ]
    headings = ("Variant", "Engine", "Batch", "SM clock, MHz", "Memory clock, MHz", "Clocks", "Power, W", "°C")
    return TextTable("The GPU meanwhile", (*headings, "Throttled by"), rows, 9) if rows else None


def layer_table(report: Report) -> TextTable | None:
    """How many layers of each engine run in which type; None where no engine was inspected."""
    rows = []
    for variant, own in _inspections(report):
        named = [own.precisions.get(kind, 0) for kind in ("INT8", "FP16", "FP32")]
        counts = [*named, sum(own.precisions.values()) - sum(named), own.reformats]
        rows.append(
            (
                variant,
                file_name(own.engine),
                str(own.layers),
                *(str(count) if own.detailed else ABSENT for count in counts),
                percent(own.reformat_ms / own.total_ms) if own.detailed and own.total_ms else ABSENT,
                f"{len(own.missed)} of {own.quantized_layers}" if own.detailed and own.quantized_layers else ABSENT,
            )
        )
    headings = ("Variant", "Engine", "Layers", "INT8", "FP16", "FP32", "Other", "Reformats", "Their time")
    return TextTable("Layers by the type that they read", (*headings, "Missed INT8"), rows, 2) if rows else None


def slowest_tables(report: Report) -> list[TextTable]:
    """The ten slowest layers of each engine."""
    headings = ("Layer", "Kind", "Reads", "ms", "Of all")
    return [
        TextTable(f"{own.engine}, batch {own.batch}", headings, [_layer_cells(layer) for layer in own.slowest], 3)
        for _, own in _inspections(report)
        if own.slowest
    ]


def trtexec_commands(report: Report) -> list[str]:
    """The commands that repeat the engines' measurements, from the run directory."""
    return [latency.trtexec for _, latency in _engine_latencies(report) if latency.trtexec]


def engine_notes(report: Report) -> list[str]:
    """How to read the numbers on engines, what to distrust in them, and what is missing."""
    notes = [*_timing_notes(report)]
    for variant, own in _inspections(report):
        where = f"{variant}, {file_name(own.engine)}"
        if own.missed:
            listed = [f"{missed.weight} ({missed.layer}) {missed.reason}" for missed in own.missed[:_LISTED]]
            if more := len(own.missed) - len(listed):
                listed.append(f"and {more} more (report.json has them)")
            notes.append(f"{where}: quantized in the graph, and not in INT8 in the engine: {'; '.join(listed)}.")
        notes += [f"{where}: {note}" for note in own.notes]
    if any(own.slowest for _, own in _inspections(report)):
        notes.append(
            "Layers are timed by TensorRT's profiler, one after the other: their sum is more than the time of a call. "
            "Their type is that of what they read; reformats change a layout or a type alone, and cost time for it."
        )
    return notes


def provider_notes(report: Report) -> list[str]:
    """What to know of ONNX Runtime's providers for the GPU, where one was timed."""
    timed = {latency.runtime for variant in report.variants for latency in variant.latency}
    notes = []
    if "onnxruntime-cuda" in timed:
        notes.append(
            "ONNX Runtime's CUDA provider has no INT8 convolutions: it dequantizes and convolves in float, and a "
            "quantized model is no faster there."
        )
    if "onnxruntime-tensorrt" in timed:
        notes.append(
            "ONNX Runtime's TensorRT provider builds an engine of its own of the graph for TensorRT; its latency is "
            "from host to host, as ONNX Runtime's others are."
        )
    return notes


def shortened(name: str, most: int = _SHOWN) -> str:
    """A long name without its middle."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def _timing_notes(report: Report) -> Iterator[str]:
    timed = list(_engine_latencies(report))
    if not timed:
        return
    yield (
        "An engine's latency is what trtexec calls so: the sum of the copy to the GPU, the computation and the copy "
        "back, by CUDA events; the compute speed-up leaves the copies out. Copies run beside the computation of "
        "another batch, and throughput is by the time of the whole measurement."
    )
    for variant, latency in timed:
        where = f"{variant}, {file_name(latency.graph)}, batch {latency.batch}"
        for warning in _warnings(latency):
            yield f"{where}: {warning}"
    for reason in dict.fromkeys(latency.gpu.reason for _, latency in timed if latency.gpu and latency.gpu.reason):
        yield f"Clocks, power, temperature and throttling of the GPU are not known: {reason}."
    if any(latency.gpu and latency.gpu.clocks == "steady" for _, latency in timed):
        yield (
            "Steady clocks did not move while they were watched; whether they are locked (nvidia-smi -lgc) is not "
            "something that NVML tells."
        )


def _compute_speedup(report: Report, latency: Latency) -> float | None:
    """How many times as fast as fp32's first engine an engine computes, at the same batch, copies left out."""
    for variant, other in _engine_latencies(report):
        if variant == BASELINE and other.batch == latency.batch and other.compute and latency.compute:
            return other.compute.median_ms / latency.compute.median_ms
    return None


def _warnings(latency: Latency) -> Iterator[str]:
    compute, enqueue, upload, gpu = latency.compute, latency.enqueue, latency.host_to_device, latency.gpu
    if compute is None:
        return
    if compute.coefficient_of_variation > UNSTEADY:
        clocks = " The GPU's clocks were floating." if gpu and gpu.clocks == "floating" else ""
        yield (
            f"the standard deviation of the computation is {percent(compute.coefficient_of_variation)} of its mean, "
            f"more than {100 * UNSTEADY:g} %.{clocks}"
        )
    if enqueue and enqueue.median_ms > ENQUEUE_BOUND * compute.median_ms:
        times = f"{milliseconds(enqueue.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        graph = "" if latency.cuda_graph else ", for no CUDA graph was replayed"
        yield f"enqueuing takes about as long as the computation ({times}): the host may hold the GPU back{graph}."
    if upload and upload.median_ms >= compute.median_ms:
        times = f"{milliseconds(upload.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        yield f"copying to the GPU takes longer than the computation ({times}), and bounds the throughput."
    if latency.wall_seconds and upload and latency.device_to_host:
        between = 1000 * latency.wall_seconds / latency.runs
        longest = max(part.mean_ms for part in (upload, compute, latency.device_to_host))
        if between > HOST_BOUND * longest:
            yield (
                f"a call came every {milliseconds(between)} ms, though no part of it takes the GPU longer than "
                f"{milliseconds(longest)} ms: the host, which starts the calls, bounds the throughput."
            )
    if gpu and gpu.throttling:
        listed = ", ".join(f"{reason} ({100 * share:.0f} % of the time)" for reason, share in gpu.throttling.items())
        yield f"the GPU lowered its clocks: {listed}."


def _gpu_cells(gpu: GpuTelemetry) -> tuple[str, ...]:
    return (
        _range(gpu.sm_clock_mhz, gpu.sm_clock_limit_mhz),
        _range(gpu.memory_clock_mhz, gpu.memory_clock_limit_mhz),
        gpu.clocks or ABSENT,
        _range(gpu.power_watts, gpu.power_limit_watts),
        _range(gpu.temperature_celsius, None),
        ABSENT if gpu.throttling is None else ", ".join(gpu.throttling) or "nothing",
    )


def _layer_cells(layer: EngineLayer) -> tuple[str, ...]:
    name, kind, precision = shortened(layer.name), layer.kind or ABSENT, layer.precision or ABSENT
    return name, kind, precision, milliseconds(layer.mean_ms), percent(layer.share)


def _range(reading: Reading | None, limit: float | None) -> str:
    """`1410\N{EN DASH}1980 of 1980`; one number where the least and the most are the same."""
    if reading is None:
        return ABSENT
    ends = dict.fromkeys((f"{reading.lowest:.0f}", f"{reading.highest:.0f}"))
    return ABSENT.join(ends) + (f" of {limit:.0f}" if limit is not None else "")


def _engine_latencies(report: Report) -> Iterator[tuple[str, Latency]]:
    for variant in report.variants:
        yield from ((variant.name, latency) for latency in variant.latency if latency.compute is not None)


def _inspections(report: Report) -> Iterator[tuple[str, EngineInspection]]:
    for variant in report.variants:
        yield from ((variant.name, own) for own in variant.inspections)
