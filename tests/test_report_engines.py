"""What the report shows of TensorRT engines: their time in parts, the GPU, their layers, and what to distrust."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_reports import DASH, TIMES, build

from cli.render import rich_table
from clusterq_deploy.evaluation.latency import latency_stats
from clusterq_deploy.report import read_report, to_html, to_markdown
from clusterq_deploy.report.analysis import latency_rows
from clusterq_deploy.report.engines import engine_notes
from clusterq_deploy.report.plans import plan_sentences, plan_tables
from clusterq_deploy.report.tables import closing_table
from clusterq_deploy.report.text import notes
from clusterq_deploy.results.engines import (
    EngineInspection,
    EngineLayer,
    EnginePlan,
    GpuTelemetry,
    LatencyStats,
    MissedLayer,
    Reading,
)
from clusterq_deploy.results.report import Accuracy, Artifact, Latency, Report, Variant

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


PARTS = {"host_to_device": part(0.31), "compute": part(1.25), "device_to_host": part(0.02), "enqueue": part(0.05)}
LATENCY = Latency(
    runtime="tensorrt",
    batch=8,
    runs=2000,
    images_per_second=6321.0,
    graph="w8a8/model.engine",
    cuda_graph=True,
    wall_seconds=3.0,
    trtexec=TRTEXEC,
    gpu=GPU,
    **dict(part(1.58)),
    **PARTS,
)
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


def timed(**changes: Any) -> Latency:
    return LATENCY.model_copy(update=changes)


def report(*latencies: Latency, inspections: tuple[EngineInspection, ...] = (INSPECTED,), **more: Any) -> Report:
    own = Variant(name="w8a8", seconds=1.0, latency=latencies, inspections=inspections, **more)
    return build(variants=[own], features=None, calibration={"losses": {}})


def test_records_of_engines_round_trip_through_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(report(timed()).to_json())
    assert read_report(path) == report(timed())


@pytest.mark.parametrize("render", [to_markdown, to_html])
def test_pages_have_the_numbers_of_engines(render: Callable[[Report], str]) -> None:
    page = render(report(timed()))
    for text in (
        "0.310", "1.250", "0.020", "0.050", "6,321", "1.0 %",
        f"1410{DASH}1965 of 1980", "2619 of 2619", "floating", f"201{DASH}412 of 700", f"41{DASH}57",
        "0.123", "7.7 %", "Slowest layers of w8a8/model.engine, batch 8",
        "12.5 %",  # of the layers' time, for reformats
        "1 of 21", "fc.weight (node_linear) reads FP16 in node_linear",
        TRTEXEC,
    ):  # fmt: skip
        assert text in page, text


def test_markdown_counts_layers_by_type() -> None:
    (line,) = [line for line in to_markdown(report(timed())).splitlines() if "1 of 21" in line]
    assert re.split(r"\s*\|\s*", line)[1:-1] == [
        "w8a8", "model.engine", "30", "20", "4", "1", "1", "3", "12.5 %", "1 of 21",
    ]  # fmt: skip


def test_html_bars_of_layers_without_int8_are_grey() -> None:
    page = to_html(report(timed()))
    (chart,) = re.findall(r'<svg class="chart"[^>]*aria-label="The 2 slowest layers.*?</svg>', page, re.DOTALL)
    assert re.findall(r'<rect [^>]*style="fill: (var\(--[a-z]+\))', chart) == ["var(--accent)", "var(--muted)"]
    assert ">0.4<" in chart
    assert "$relu$" in chart


def test_html_tables_have_a_cell_per_column() -> None:
    tables = re.findall(r"<table>.*?</table>", to_html(report(timed())), re.DOTALL)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}) == 1


def test_pages_without_engines_have_no_section() -> None:
    cpu = timed(runtime="onnxruntime-cpu", **dict.fromkeys(PARTS), trtexec=None)
    own = report(cpu, inspections=())
    assert "TensorRT engines" not in to_markdown(own)
    assert 'id="engines"' not in to_html(own)
    assert list(engine_notes(own)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"enqueue": part(1.2)},
            "w8a8, model.engine, batch 8: enqueuing takes about as long as the computation (1.200 ms against "
            "1.250 ms): the host may slow down the GPU.",
        ),
        ({"enqueue": part(1.2), "cuda_graph": False}, "slow down the GPU, because no CUDA graph was replayed."),
        ({"compute": part(1.25, 0.041)}, "is 4.1 % of its mean, more than 2.5 %. The GPU's clocks were floating."),
        ({"host_to_device": part(1.3)}, "copying to the GPU takes longer than the computation (1.300 ms against"),
        (
            {"wall_seconds": 3.2},
            "a call started every 1.600 ms, though no part of it takes the GPU longer than 1.250 ms: the host,",
        ),
        (
            {"gpu": GPU.model_copy(update={"throttling": {"power limit": 0.4}})},
            "the GPU lowered its clocks: power limit (40 % of the time).",
        ),
        ({"gpu": GPU.model_copy(update={"clocks": "steady"})}, "NVML does not report whether they are locked"),
        ({"gpu": GpuTelemetry(reason="NVML does not start")}, "of the GPU are unknown: NVML does not start."),
    ],
)
def test_engine_notes_warn_only_of_what_was_measured(changes: dict[str, object], words: str) -> None:
    assert any(words in note for note in engine_notes(report(timed(**changes))))
    assert not any(words in note for note in engine_notes(report(timed())))


def test_latency_rows_of_an_engine_are_unsteady_if_its_computation_is() -> None:
    calm, shaky = timed(coefficient_of_variation=0.2), timed(compute=part(1.25, 0.03))
    assert [row.unsteady for row in latency_rows(report(calm, shaky))] == [False, True]


def test_pages_of_an_engine_without_details_have_dashes_and_a_note() -> None:
    note = "The engine has only the names of its layers."
    unknown = EngineInspection(
        engine="w8a8/model.engine",
        batch=1,
        detailed=False,
        weights_bytes=2_500_000,
        layers=12,
        quantized_layers=21,
        notes=[note],
    )
    own = report(timed(gpu=GpuTelemetry(reason="none")), inspections=(unknown,))
    assert f"w8a8, model.engine: {note}" in engine_notes(own)
    assert "w8a8, model.engine: its weights take 2.5 MB of the GPU's memory." in engine_notes(own)
    (line,) = [line for line in to_markdown(own).splitlines() if " 12 |" in line]
    assert line.count(DASH) == 7
    assert "The GPU during" not in to_markdown(own)
    assert "Slowest layers" not in to_html(own)


def test_notes_explain_the_gpu_providers_that_were_timed() -> None:
    def explained(own: Report) -> list[str]:
        return [note for note in notes(own) if note.startswith("ONNX Runtime's")]

    absent = dict.fromkeys(PARTS)
    own = report(*(timed(runtime=name, **absent) for name in ("onnxruntime-cuda", "onnxruntime-tensorrt")))
    cuda, tensorrt = explained(own)
    assert "no INT8 convolutions" in cuda
    assert "from host to host" in tensorrt
    assert cuda.replace("'", "&#39;") in to_html(own)
    assert explained(report(timed())) == []


def test_compute_speedup_is_over_the_first_engine_of_fp32_at_the_same_batch() -> None:
    fp32 = timed(compute=part(5.0), graph="fp32/model.engine")
    half, other = timed(compute=part(2.5), graph="fp32/model.fp16.engine"), timed(compute=part(9.0), batch=1)
    baseline = Variant(name="fp32", seconds=1.0, latency=[other, fp32, half])
    page = to_markdown(build(variants=[baseline, *report(timed()).variants]))
    table = page[page.index("### Time of a call") : page.index("### The GPU")]
    assert re.findall(rf"(\S+){TIMES} ", table) == ["1.00", "1.00", "2.00", "4.00"]


def test_engine_notes_cut_a_long_list_of_missed_layers() -> None:
    missed = [MissedLayer(layer=f"conv{index}", weight="w", reason="reads FP32") for index in range(13)]
    own = report(inspections=(INSPECTED.model_copy(update={"missed": missed}),))
    (note,) = [note for note in engine_notes(own) if "(conv0)" in note]
    assert "w (conv9) reads FP32; and 3 more (report.json has them)." in note
    assert "conv10" not in note


def test_report_table_has_the_time_of_the_runtime_that_was_scored() -> None:
    graph, milliseconds = "w8a8/model.ort.onnx", {"onnxruntime-cpu": 3.0, "onnxruntime-cuda": 7.0}
    latencies = [
        timed(runtime=name, batch=1, graph=graph, median_ms=ms, **dict.fromkeys(PARTS))
        for name, ms in milliseconds.items()
    ]
    scores = [Accuracy(runtime=name, top1=None, top5=None, agreement=99, graph=graph) for name in milliseconds]
    table = rich_table(closing_table(report(*latencies, accuracy=scores)))
    columns = {column.header: [str(cell) for cell in column.cells] for column in table.columns}
    assert columns["batch 1, ms"] == ["3.000", "7.000"]


def planned(stored: tuple[int, int] = (0, 0), **moved: int) -> Report:
    """Return a report with a plan for each variant: `fp32`, `fp16`, `w8a8` with that many bytes read.

    `stored` are the bytes of weights in the float plans and in that of `w8a8`.
    """
    variants = []
    for name in ("fp32", "w8a8"):
        suffixes = {"fp32": "", "fp16": ".fp16"} if name == "fp32" else {name: ""}
        plans, files = [], []
        for row, suffix in suffixes.items():
            path = f"{name}/model{suffix}.rtx.engine"
            if row in moved:
                counts = {"kernels": 20, "convolutions": 9, "convolutions_write": {"FP32": 9}, "padded_channels": 3721}
                origin = {"engine": path, "release": "1.7.1", "targets": ["sm86"]}
                weights = stored[row == "w8a8"]
                plans.append(EnginePlan(**origin, **counts, bytes_in=moved[row], bytes_stored=weights))
            file = {"kind": "engine", "target": "tensorrt_rtx", "path": path, "size_bytes": 9, "fp16": row == "fp16"}
            files.append(Artifact.model_validate(file))
        variants.append(Variant(name=name, seconds=0, artifacts=files, plans=plans))
    return build().model_copy(update={"variants": variants})


def test_plans_are_a_table_a_picture_and_a_sentence() -> None:
    report = planned(fp32=2_000_000, fp16=1_000_000, w8a8=1_900_000)
    (table,) = plan_tables(report)
    assert [(row[0], row[1], row[2], row[5], row[9]) for row in table.rows] == [
        ("fp32", "20", "0 of 9", "3,721", "2.00\N{MULTIPLICATION SIGN}"),
        ("fp16", "20", "0 of 9", "3,721", "1.00\N{MULTIPLICATION SIGN}"),
        ("w8a8", "20", "0 of 9", "3,721", "1.90\N{MULTIPLICATION SIGN}"),
    ]
    sentence = "On RTX GPUs w8a8 moves 1.9 times the bytes of fp16, in 20 kernels against 20: expect no gain."
    page, markdown = to_html(report), to_markdown(report)
    assert sentence in page
    assert f"- {sentence}" in markdown
    assert 'aria-label="kernels: fp32 20, fp16 20, w8a8 20"' in page
    assert "MB per image: fp32 2.00, fp16 1.00, w8a8 1.90" in page
    assert "(TensorRT-RTX 1.7.1 for sm86): nothing was run and nothing was timed" in markdown
    assert "TensorRT-RTX, ahead of time" not in to_html(build())


@pytest.mark.parametrize(
    ("moved", "sentences"),
    [
        ({"fp16": 1000, "w8a8": 700}, ["moves 0.7 times the bytes of fp16", "it may be faster: measure it there"]),
        ({"fp16": 1000, "w8a8": 960}, ["moves 1.0 times the bytes of fp16", "expect no gain"]),
        ({"fp32": 1000, "w8a8": 700}, ["moves 0.7 times the bytes of fp32"]),
        ({"w8a8": 700}, []),
        ({"fp16": 1000}, []),
    ],
)
def test_plan_sentences_compare_bytes_with_the_float_model(moved: dict[str, int], sentences: list[str]) -> None:
    found = plan_sentences(planned(**moved))
    assert len(found) == bool(sentences)
    assert all(words in found[0] for words in sentences)


def test_plan_sentence_counts_weights_at_batch_1() -> None:
    (sentence,) = plan_sentences(planned(stored=(1000, 500), fp16=1000, w8a8=1100))
    assert sentence.endswith(
        "moves 1.1 times the bytes of fp16, in 20 kernels against 20: expect no gain at large batches; with the "
        "weights, at batch 1, it moves 0.80 times the bytes."
    )


def test_plan_sentences_are_silent_where_engines_were_timed() -> None:
    report = planned(fp16=1000, w8a8=2000)
    timed = report.variants[1].model_copy(update={"latency": [LATENCY.model_copy(update={"runtime": "tensorrt-rtx"})]})
    assert plan_sentences(report.model_copy(update={"variants": [report.variants[0], timed]})) == []


def test_a_plan_that_cannot_be_read_is_a_note() -> None:
    report = planned(fp16=1000)
    unread = EnginePlan(engine="w8a8/model.rtx.engine", notes=["the plan is unknown."])
    variant = report.variants[1].model_copy(update={"plans": [unread]})
    page = to_html(report.model_copy(update={"variants": [report.variants[0], variant]}))
    assert "w8a8/model.rtx.engine: the plan is unknown." in page
