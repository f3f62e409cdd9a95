"""The part of the report on TensorRT engines: the parts of their latency, the GPU, their layers, and warnings."""

from collections.abc import Iterator

from clusterq_deploy.report.analysis import BASELINE, UNSTEADY
from clusterq_deploy.report.formats import ABSENT, file_name, milliseconds, percent, shortened, size, speedup
from clusterq_deploy.report.tables import Table
from clusterq_deploy.results.engines import EngineInspection, GpuTelemetry, LatencyStats, Reading
from clusterq_deploy.results.report import Latency, Report

_ENQUEUE_BOUND = 0.8  # ratio of enqueue to compute time above which the host may slow down the GPU, as in trtexec
_HOST_BOUND = 1.2  # ratio of the time between calls to their longest part above which the host limits the throughput
_LISTED = 10  # layers in a sentence


def engine_tables(report: Report) -> list[Table]:
    """Return the tables of TensorRT engines that have rows: the parts of a call, the GPU, layers by type."""
    parts = ("To GPU, ms", "Compute, ms", "From GPU, ms", "Enqueue, ms", "Compute p99, ms")
    calls = ("Variant", "Engine", "CUDA graph", "Batch", *parts, "Variation", "Compute speed-up", "Images/s")
    clocks = ("Variant", "Engine", "Batch", "SM clock, MHz", "Memory clock, MHz", "Clocks", "Power, W", "°C")
    types = ("Variant", "Engine", "Layers", "INT8", "FP16", "FP32", "Other", "Reformats", "Their time", "Missed INT8")
    timing = [(variant, *_timing_cells(report, latency, compute)) for variant, latency, compute in _timed(report)]
    gpu = [(variant, *_gpu_cells(t, t.gpu)) for variant, t, _ in _timed(report) if t.gpu and t.gpu.reason is None]
    layers = [(variant, *_layer_cells(inspection)) for variant, inspection in _inspected(report)]
    tables = (
        Table("Time of a call in parts, medians", calls, timing, 3),
        Table("The GPU during the measurement", (*clocks, "Throttled by"), gpu, 9),
        Table("Layers by input type", types, layers, 2),
    )
    return [table for table in tables if table.rows]


def slowest_tables(report: Report) -> list[Table]:
    """Return the ten slowest layers of each engine."""
    tables = []
    for _, inspection in _inspected(report):
        rows = [
            (shortened(x.name), x.kind or ABSENT, x.precision or ABSENT, milliseconds(x.mean_ms), percent(x.share))
            for x in inspection.slowest
        ]
        title = f"Slowest layers of {inspection.engine}, batch {inspection.batch}"
        tables.append(Table(title, ("Layer", "Kind", "Input", "ms", "Of all"), rows, 3))
    return [table for table in tables if table.rows]


def trtexec_commands(report: Report) -> list[str]:
    """Return the commands that repeat the engines' measurements in the run directory."""
    return [latency.trtexec for _, latency, _ in _timed(report) if latency.trtexec]


def engine_notes(report: Report) -> Iterator[str]:
    """Yield how to read the numbers of engines, warnings, and what is missing."""
    timed, inspected = list(_timed(report)), list(_inspected(report))
    if timed:
        yield (
            "An engine's latency is defined as in trtexec: the sum of the copy to the GPU, the computation and the "
            "copy back, by CUDA events; the compute speed-up excludes the copies. Copies overlap with the computation "
            "of another batch, and throughput is computed from the time of the whole measurement."
        )
    for variant, latency, compute in timed:
        for warning in _warnings(latency, compute):
            yield f"{variant}, {file_name(latency.graph)}, batch {latency.batch}: {warning}"
    for reason in dict.fromkeys(latency.gpu.reason for _, latency, _ in timed if latency.gpu and latency.gpu.reason):
        yield f"Clocks, power, temperature and throttling of the GPU are unknown: {reason}."
    if any(latency.gpu and latency.gpu.clocks == "steady" for _, latency, _ in timed):
        yield "Steady clocks did not change; NVML does not report whether they are locked (nvidia-smi -lgc)."
    for variant, inspection in inspected:
        where = f"{variant}, {file_name(inspection.engine)}"
        if inspection.missed:
            layers = [f"{layer.weight} ({layer.layer}) {layer.reason}" for layer in inspection.missed[:_LISTED]]
            if more := len(inspection.missed) - len(layers):
                layers.append(f"and {more} more (report.json has them)")
            yield f"{where}: quantized in the graph, but not in INT8 in the engine: {'; '.join(layers)}."
        if inspection.weights_bytes is not None:
            yield f"{where}: its weights take {size(inspection.weights_bytes)} of the GPU's memory."
        yield from (f"{where}: {note}" for note in inspection.notes)
    if any(inspection.slowest for _, inspection in inspected):
        yield (
            "Layers are timed by TensorRT's profiler, one after the other: their sum is more than the time of a call. "
            "Their type is that of their input; reformats only change a layout or a type."
        )


def _warnings(latency: Latency, compute: LatencyStats) -> Iterator[str]:
    enqueue, upload, download, gpu = latency.enqueue, latency.host_to_device, latency.device_to_host, latency.gpu
    if compute.coefficient_of_variation > UNSTEADY:
        clocks = " The GPU's clocks were floating." if gpu and gpu.clocks == "floating" else ""
        yield (
            f"the standard deviation of the computation is {percent(compute.coefficient_of_variation)} of its mean, "
            f"more than {100 * UNSTEADY:g} %.{clocks}"
        )
    if enqueue and enqueue.median_ms > _ENQUEUE_BOUND * compute.median_ms:
        times = f"{milliseconds(enqueue.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        graph = "" if latency.cuda_graph else ", because no CUDA graph was replayed"
        yield f"enqueuing takes about as long as the computation ({times}): the host may slow down the GPU{graph}."
    if upload and upload.median_ms >= compute.median_ms:
        times = f"{milliseconds(upload.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        yield f"copying to the GPU takes longer than the computation ({times}), and limits the throughput."
    if latency.wall_seconds and upload and download:
        between = 1000 * latency.wall_seconds / latency.runs
        longest = max(part.mean_ms for part in (upload, compute, download))
        if between > _HOST_BOUND * longest:
            yield (
                f"a call started every {milliseconds(between)} ms, though no part of it takes the GPU longer than "
                f"{milliseconds(longest)} ms: the host, which starts the calls, limits the throughput."
            )
    if gpu and gpu.throttling:
        reasons = ", ".join(f"{reason} ({100 * share:.0f} % of the time)" for reason, share in gpu.throttling.items())
        yield f"the GPU lowered its clocks: {reasons}."


def _timing_cells(report: Report, latency: Latency, compute: LatencyStats) -> tuple[str, ...]:
    parts = (latency.host_to_device, compute, latency.device_to_host, latency.enqueue)
    fp32 = [other for name, timing, other in _timed(report) if name == BASELINE and timing.batch == latency.batch]
    return (
        file_name(latency.graph),
        {True: "yes", False: "no", None: ABSENT}[latency.cuda_graph],
        str(latency.batch),
        *(milliseconds(part.median_ms) if part else ABSENT for part in parts),
        milliseconds(compute.p99_ms),
        percent(compute.coefficient_of_variation),
        speedup(fp32[0].median_ms / compute.median_ms if fp32 else None),
        f"{latency.images_per_second:,.0f}",
    )


def _gpu_cells(latency: Latency, gpu: GpuTelemetry) -> tuple[str, ...]:
    return (
        file_name(latency.graph),
        str(latency.batch),
        _range(gpu.sm_clock_mhz, gpu.sm_clock_limit_mhz),
        _range(gpu.memory_clock_mhz, gpu.memory_clock_limit_mhz),
        gpu.clocks or ABSENT,
        _range(gpu.power_watts, gpu.power_limit_watts),
        _range(gpu.temperature_celsius, None),
        ABSENT if gpu.throttling is None else ", ".join(gpu.throttling) or "nothing",
    )


def _range(reading: Reading | None, limit: float | None) -> str:
    """Return the lowest and the highest, one number if they are equal, and the limit: `1410-1965 of 1980`."""
    if reading is None:
        return ABSENT
    ends = dict.fromkeys((f"{reading.lowest:.0f}", f"{reading.highest:.0f}"))
    return ABSENT.join(ends) + (f" of {limit:.0f}" if limit is not None else "")


def _layer_cells(inspection: EngineInspection) -> tuple[str, ...]:
    place = (file_name(inspection.engine), str(inspection.layers))
    if not inspection.detailed:
        return (*place, *[ABSENT] * 7)
    named = [inspection.precisions.get(kind, 0) for kind in ("INT8", "FP16", "FP32")]
    counts = [*named, sum(inspection.precisions.values()) - sum(named), inspection.reformats]
    reformats = percent(inspection.reformat_ms / inspection.total_ms) if inspection.total_ms else ABSENT
    missed = f"{len(inspection.missed)} of {inspection.quantized_layers}" if inspection.quantized_layers else ABSENT
    return (*place, *map(str, counts), reformats, missed)


def _timed(report: Report) -> Iterator[tuple[str, Latency, LatencyStats]]:
    """Yield variant, latency and its computation of each engine; only engines have parts."""
    for variant in report.variants:
        yield from ((variant.name, latency, latency.compute) for latency in variant.latency if latency.compute)


def _inspected(report: Report) -> Iterator[tuple[str, EngineInspection]]:
    for variant in report.variants:
        yield from ((variant.name, inspection) for inspection in variant.inspections)
