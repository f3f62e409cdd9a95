"""`clusterq report`: several runs side by side, and tables to paste."""

import csv
import io
import re
from pathlib import Path

import pytest
from sample_reports import CPU, ENVIRONMENT, FP32, TIMES, W4A4, W8A8, build, with_half, with_latency
from support import error_line, json_of, output_of

from clusterq_deploy.errors import ReportError
from clusterq_deploy.report.analysis import standard_error
from clusterq_deploy.report.compare import compare, read_reports
from clusterq_deploy.results.report import Report


def written(folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs: the second with another seed, on another machine, with only fp32 and w8a8."""
    other = ENVIRONMENT.model_copy(update={"cpu": "Intel Xeon 8480", "onnxruntime": "1.30.0"})
    second = build(seed=8, environment=other, variants=[FP32, W8A8])
    return [written(tmp_path / "a" / "resnet18", build()), written(tmp_path / "b" / "resnet18", second)]


def test_read_reports_names_runs_by_the_shortest_paths_that_differ(two: list[Path], tmp_path: Path) -> None:
    assert list(read_reports(two)) == ["a/resnet18", "b/resnet18"]
    assert list(read_reports([two[0]])) == ["resnet18"]
    assert list(read_reports([two[0] / "report.json"])) == ["resnet18"]
    assert list(read_reports([two[0], written(tmp_path / "c", build())])) == ["resnet18", "c"]


def test_compare_sorts_rows_by_variant_runtime_and_run(two: list[Path]) -> None:
    comparison = compare(read_reports(two))
    order = [(row.variant, row.runtime, run) for run, row in comparison.accuracy]
    assert order[:4] == [("fp32", runtime, run) for runtime in ("torch", CPU) for run in ("a/resnet18", "b/resnet18")]
    assert [variant for variant, _, _ in order] == ["fp32"] * 6 + ["w8a8"] * 6 + ["w4a4"] * 3
    timed = [(row.batch, run) for run, row in comparison.latency if row.runtime == CPU][:4]
    assert timed == [(1, "a/resnet18"), (1, "b/resnet18"), (32, "a/resnet18"), (32, "b/resnet18")]
    assert [run["seed"] for run in comparison.runs] == [7, 8]
    assert [machine["onnxruntime"] for machine in comparison.machines] == ["1.31.1", "1.30.0"]
    mixed = compare({"gpu": with_half(0.55), "cpu": build()})
    assert list(dict.fromkeys(row.variant for _, row in mixed.latency)) == ["fp32", "fp16", "w8a8", "w4a4"]


def test_compare_notes_what_differs(two: list[Path]) -> None:
    notes = compare(read_reports(two)).notes
    assert any("machines differ" in note for note in notes)
    assert any("versions" in note for note in notes)
    (unsteady,) = compare({"a": build(), "b": build(seed=9)}).notes
    assert unsteady.startswith("~ marks a median whose measurement was unsteady (standard deviation above 2.5 %")
    assert "in a, b: the machine" in unsteady
    quiet = build(variants=[with_latency(own, coefficient_of_variation=0.0) for own in (FP32, W8A8, W4A4)])
    assert compare({"a": quiet}).notes == []
    other = compare({"a": build(), "b": build(model={"name": "resnet50"}, evaluation={"images": 100})}).notes
    assert any("models differ" in note for note in other)
    assert any("different images" in note for note in other)


def test_csv_has_every_number_in_one_table(two: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(compare(read_reports(two)).to_csv())))
    assert len(rows) == 15  # three runtimes of five variants
    (row,) = (r for r in rows if (r["run"], r["variant"], r["runtime"]) == ("b/resnet18", "w8a8", CPU))
    assert float(row["median_ms_batch_1"]) == 4.604
    assert float(row["speedup_batch_1"]) == pytest.approx(15.104 / 4.604)
    assert (row["model"], row["seed"], row["cpu"]) == ("resnet18", "8", "Intel Xeon 8480")
    assert float(row["p90_ms_batch_1"]) == pytest.approx(4.604 * 1.04)
    assert float(row["p99_ms_batch_32"]) == pytest.approx(4.604 * 29 * 1.15)
    assert float(row["images_per_second_batch_1"]) == pytest.approx(1000 / 4.604)
    assert (row["threads_batch_1"], row["unsteady_batch_1"], row["unsteady_batch_32"]) == ("2", "false", "true")
    assert float(row["agreement_error"]) == pytest.approx(standard_error(98.26, 5000))
    columns = list(row)
    assert columns[columns.index("agreement") + 1] == "median_ms_batch_1"  # new columns are at the end
    assert columns[columns.index("cores") + 1 :][:2] == ["agreement_error", "p90_ms_batch_1"]
    torch_row = next(r for r in rows if r["runtime"] == "torch")
    assert torch_row["median_ms_batch_1"] == torch_row["graph"] == ""


def test_markdown_has_every_table(two: list[Path]) -> None:
    text = compare(read_reports(two)).to_markdown()
    assert re.findall(r"^### (.*)", text, re.M) == ["Runs", "Accuracy", "Latency", "Machines"]
    assert sum(line.startswith("|") for line in text.splitlines()) == 4 * 2 + 2 + 15 + 20 + 2
    assert "66.16 ± 0.67" in text
    assert "98.26 ± 0.19" in text
    latency = text[text.index("### Latency") :].splitlines()
    heading, once, batched = (
        re.split(r"\s*\|\s*", next(line for line in latency if re.match(pattern, line)))[1:-1]
        for pattern in (r"\| run", r"\| a/resnet18 \| w8a8 .* 1 \| ", r"\| a/resnet18 \| w8a8 .* 32 \| ")
    )
    assert heading[4:] == ["batch", "threads", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up"]
    assert once[4:] == ["1", "2", "4.604", "4.788", "5.295", "217", f"3.28{TIMES}"]
    assert batched[4:] == ["32", "2", "~133.5", "138.9", "153.5", "240", f"3.28{TIMES}"]
    assert "- The machines differ" in text


def test_report_compare_prints_every_form_and_writes_nothing(two: list[Path]) -> None:
    shown = output_of("report", "--compare", *two)
    for text in ("Runs", "Accuracy", "Latency", "a/resnet18", "b/resnet18", "p50 ms", "machines differ"):
        assert text in shown
    content = json_of("report", "--compare", *two)
    assert content.keys() == {"runs", "accuracy", "latency", "machines", "notes"}
    (row,) = (r for r in content["accuracy"] if (r["run"], r["variant"], r["runtime"]) == ("a/resnet18", "w4a4", CPU))
    assert (row["graph"], row["size_bytes"]) == ("w4a4/model.ort.onnx", 11_830_000)
    assert (row["top1"], row["drop"], row["agreement"]) == pytest.approx((66.16, 3.58, 86.40))
    assert content["latency"][0].keys() == {
        "run", "variant", "runtime", "graph", "batch", "threads", "median_ms", "p90_ms", "p99_ms",
        "images_per_second", "speedup", "unsteady", "speedup_low", "speedup_high",
    }  # fmt: skip
    assert output_of("report", "--compare", *two, "--csv").startswith("run,variant,runtime,graph,size_bytes,top1")
    assert output_of("report", "--compare", *two, "--markdown").startswith("### Runs\n\n| run")
    assert [p.name for folder in two for p in folder.iterdir()] == ["report.json"] * 2


def test_report_command_rejects_wrong_arguments(two: list[Path], tmp_path: Path) -> None:
    assert "add --compare" in error_line("report", *two)
    assert "write it with clusterq report" in error_line("report", "--compare", two[0], tmp_path)
    assert "named twice" in error_line("report", "--compare", two[0], two[0] / "report.json")
    assert "is not a run directory" in error_line("report", two[0])
    with pytest.raises(ReportError, match="no report"):
        read_reports([tmp_path / "nowhere"])


def test_report_of_one_run_prints_tables_to_paste(run_copy: Path) -> None:
    (run_copy / "report.html").unlink()
    assert "| run | digits |" in output_of("report", run_copy, "--markdown")
    assert (run_copy / "report.html").is_file()
    output_of("report", "--compare", run_copy)
