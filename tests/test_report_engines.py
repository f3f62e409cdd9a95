"""What the report shows of TensorRT engines: their time in parts, the GPU, their layers, and what to distrust."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.render import report_table
from clusterq_deploy.evaluation.latency import latency_stats
from clusterq_deploy.report import (
    Accuracy,
    CalibrationInfo,
    EngineInspection,
    EngineLayer,
    Environment,
    EvaluationInfo,
    GpuTelemetry,
    Latency,
    LatencyStats,
    MissedLayer,
    ModelInfo,
    Reading,
    Report,
    Skipped,
    Variant,
    read_report,
    to_html,
    to_markdown,
)
from clusterq_deploy.report.engine_wording import engine_notes, provider_notes, shortened
from clusterq_deploy.report.findings import latency_rows

ENVIRONMENT = Environment(
    python="3.11", torch="2.13", onnx="1.23", onnxruntime="1.31", cpu="a CPU", cores=2, memory_bytes=0, platform="Linux"
)
DASH = "\N{EN DASH}"
TRTEXEC = "trtexec --loadEngine=w8a8/model.engine --shapes=images:8x3x224x224 --useCudaGraph"
GPU = GpuTelemetry(
    samples=30,
    sm_clock_mhz=Reading(lowest=1410, mean=1800, highest=1965),
    sm_clock_limit_mhz=1980,
    memory_clock_mhz=Reading(lowest=2619, mean=2619, highest=2619),
    memory_clock_limit_mhz=2619,
    clocks="floating",
    power_watts=Reading(lowest=201, mean=300, highest=412.4),
    power_limit_watts=700,
    temperature_celsius=Reading(lowest=41, mean=50, highest=57),
)


def part(milliseconds: float, variation: float = 0.01) -> LatencyStats:
    return latency_stats([milliseconds]).model_copy(update={"coefficient_of_variation": variation})


def timed(**changes: object) -> Latency:
    parts = {"host_to_device": part(0.31), "compute": part(1.25), "device_to_host": part(0.02), "enqueue": part(0.05)}
    own = part(1.58)
    values = {
        "runtime": "tensorrt",
        "batch": 8,
        "runs": 2000,
        "images_per_second": 6321.0,
        "graph": "w8a8/model.engine",
        "cuda_graph": True,
        "wall_seconds": 3.0,
        "trtexec": TRTEXEC,
        "gpu": GPU,
        **own.model_dump(),
        **parts,
        **changes,
    }
    return Latency.model_validate(values)


INSPECTED = EngineInspection(
    engine="w8a8/model.engine",
    batch=8,
    detailed=True,
    layers=30,
    reformats=3,
    quantizers=1,
    precisions={"INT8": 20, "FP16": 4, "FP32": 1, "unknown": 1},
    total_ms=1.6,
    reformat_ms=0.2,
    slowest=[
        EngineLayer(name="node_conv2d + $relu$", kind="CaskConvolution", precision="INT8", mean_ms=0.4, share=0.25),
        EngineLayer(name="node_linear", kind="gemm", precision="FP16", mean_ms=0.123, share=0.0769),
    ],
    quantized_layers=21,
    missed=[MissedLayer(layer="node_linear", weight="fc.weight", reason="reads FP16 in node_linear (gemm)")],
)


def report(*latencies: Latency, inspections: tuple[EngineInspection, ...] = (INSPECTED,)) -> Report:
    own = Variant(name="w8a8", seconds=1.0, latency=list(latencies), inspections=list(inspections))
    return Report(
        schema=1,
        command=["clusterq", "run", "net"],
        seed=0,
        created="2026-01-01",
        clusterq_deploy="0.1.0",
        environment=ENVIRONMENT,
        model=ModelInfo(name="net", parameters=1, input_size=(3, 224, 224), classes=10),
        calibration=CalibrationInfo(images=1, seconds=1, teacher_top1=100, recipe="default"),
        evaluation=EvaluationInfo(dataset="images", images=100),
        variants=[own],
        skipped=[Skipped(stage="onnxruntime-cuda", reason="libcuda.so.1: not there")],
    )


def test_the_records_survive_the_way_through_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    own = report(timed())
    path.write_text(own.to_json())
    assert read_report(path) == own


@pytest.mark.parametrize("render", [to_markdown, to_html])
def test_pages_carry_the_numbers(render: Callable[[Report], str]) -> None:
    page = render(report(timed()))
    for text in ("0.310", "1.250", "0.020", "0.050", "6,321", "1.0 %"):
        assert text in page
    for text in (f"1410{DASH}1965 of 1980", "2619 of 2619", "floating", f"201{DASH}412 of 700", f"41{DASH}57"):
        assert text in page
    assert TRTEXEC in page
    assert "0.123" in page
    assert "7.7 %" in page
    assert "12.5 %" in page  # of the layers' time, for reformats
    assert "1 of 21" in page
    assert "fc.weight (node_linear) reads FP16 in node_linear" in page
    assert "onnxruntime-cuda" in page


def test_layers_are_counted_by_type() -> None:
    (line,) = [line for line in to_markdown(report(timed())).splitlines() if "1 of 21" in line]
    assert re.split(r"\s*\|\s*", line)[1:-1] == [
        "w8a8", "model.engine", "30", "20", "4", "1", "1", "3", "12.5 %", "1 of 21",
    ]  # fmt: skip


def test_the_chart_tells_int8_from_other_types() -> None:
    page = to_html(report(timed()))
    (chart,) = re.findall(r'<svg class="chart"[^>]*aria-label="The 2 slowest layers.*?</svg>', page, re.DOTALL)
    bars = re.findall(r'<path d="[^"]*z\s*"[^>]*style="fill: (var\(--[a-z]+\))', chart)
    assert bars == ["var(--accent)", "var(--muted)"]
    assert ">0.4<" in chart.replace(" ", "")
    assert "$relu$" in chart


def test_tables_of_the_page_are_whole() -> None:
    page = to_html(report(timed()))
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        widths = {len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1


def test_without_engines_there_is_no_section() -> None:
    cpu = Latency(runtime="onnxruntime-cpu", batch=1, runs=9, images_per_second=1, **part(1.0).model_dump())
    own = report(cpu, inspections=())
    assert "TensorRT engines" not in to_markdown(own)
    assert 'id="engines"' not in to_html(own)
    assert engine_notes(own) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"enqueue": part(1.2)},
            "w8a8, model.engine, batch 8: enqueuing takes about as long as the computation (1.200 ms against "
            "1.250 ms): the host may hold the GPU back.",
        ),
        ({"enqueue": part(1.2), "cuda_graph": False}, "hold the GPU back, for no CUDA graph was replayed."),
        ({"compute": part(1.25, 0.041)}, "is 4.1 % of its mean, more than 2.5 %. The GPU's clocks were floating."),
        ({"host_to_device": part(1.3)}, "copying to the GPU takes longer than the computation (1.300 ms against"),
        (
            {"wall_seconds": 3.2},
            "a call came every 1.600 ms, though no part of it takes the GPU longer than 1.250 ms: the host,",
        ),
        (
            {"gpu": GPU.model_copy(update={"throttling": {"power limit": 0.4}})},
            "the GPU lowered its clocks: power limit (40 % of the time).",
        ),
        ({"gpu": GPU.model_copy(update={"clocks": "steady"})}, "is not something that NVML tells."),
        ({"gpu": GpuTelemetry(reason="NVML does not start")}, "of the GPU are not known: NVML does not start."),
    ],
)
def test_what_to_distrust_is_said(changes: dict[str, object], words: str) -> None:
    assert any(words in note for note in engine_notes(report(timed(**changes))))
    assert not any(words in note for note in engine_notes(report(timed())))


def test_an_engine_is_unsteady_where_its_computation_is() -> None:
    calm, shaky = timed(coefficient_of_variation=0.2), timed(compute=part(1.25, 0.03))
    assert [row.unsteady for row in latency_rows(report(calm, shaky))] == [False, True]


def test_what_the_engine_does_not_tell_is_a_dash_and_a_note() -> None:
    named = EngineInspection(
        engine="w8a8/model.engine",
        batch=1,
        detailed=False,
        layers=12,
        quantized_layers=21,
        notes=["The engine tells only the names of its layers."],
    )
    own = report(timed(gpu=GpuTelemetry(reason="none")), inspections=(named,))
    assert "w8a8, model.engine: The engine tells only the names of its layers." in engine_notes(own)
    (line,) = [line for line in to_markdown(own).splitlines() if "| 12" in line or " 12 |" in line]
    assert line.count(DASH) == 7
    assert "The GPU meanwhile" not in to_markdown(own)
    assert "Slowest layers" not in to_html(own)


def test_gpu_providers_are_explained_where_they_were_timed() -> None:
    rest = {"compute": None, "host_to_device": None, "device_to_host": None, "enqueue": None}
    own = report(timed(runtime="onnxruntime-cuda", **rest), timed(runtime="onnxruntime-tensorrt", **rest))
    cuda, tensorrt = provider_notes(own)
    assert "no INT8 convolutions" in cuda
    assert "from host to host" in tensorrt
    assert cuda.replace("'", "&#39;") in to_html(own)
    assert provider_notes(report(timed())) == []


def test_the_speed_of_the_computation_is_against_the_first_engine_of_fp32_at_the_same_batch() -> None:
    own = report(timed())
    fp32 = timed(compute=part(5.0), graph="fp32/model.engine")
    half, other = timed(compute=part(2.5), graph="fp32/model.fp16.engine"), timed(compute=part(9.0), batch=1)
    baseline = Variant(name="fp32", seconds=1.0, latency=[other, fp32, half])
    page = to_markdown(own.model_copy(update={"variants": [baseline, *own.variants]}))
    table = page[page.index("### Time of a call") : page.index("### The GPU")]
    assert re.findall(r"(\S+)\N{MULTIPLICATION SIGN} ", table) == ["1.00", "1.00", "2.00", "4.00"]


def test_a_long_list_of_missed_layers_is_cut() -> None:
    missed = [MissedLayer(layer=f"conv{index}", weight="w", reason="reads FP32") for index in range(13)]
    own = report(inspections=(INSPECTED.model_copy(update={"missed": missed}),))
    (note,) = [note for note in engine_notes(own) if "(conv0)" in note]
    assert "w (conv9) reads FP32; and 3 more (report.json has them)." in note
    assert "conv10" not in note


def test_the_closing_table_takes_the_time_of_the_runtime_that_was_scored() -> None:
    graph = "w8a8/model.ort.onnx"
    runtimes = {"onnxruntime-cpu": 3.0, "onnxruntime-cuda": 7.0}
    own = Variant(
        name="w8a8",
        seconds=1.0,
        accuracy=[Accuracy(runtime=name, top1=None, top5=None, agreement=99, graph=graph) for name in runtimes],
        latency=[
            Latency(runtime=name, batch=1, runs=9, images_per_second=1, graph=graph, **part(ms).model_dump())
            for name, ms in runtimes.items()
        ],
    )
    table = report_table(report().model_copy(update={"variants": [own]}))
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["batch 1, ms"] == ["3.000", "7.000"]


def test_long_names_lose_their_middle() -> None:
    name = "first" + "x" * 100 + "last"
    assert shortened(name, 11) == "first…xlast"
    assert shortened("short", 11) == "short"
