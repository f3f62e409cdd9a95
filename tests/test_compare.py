"""`clusterq report`: several runs side by side, and tables to paste."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner, Result
from test_pipeline import SMALL
from test_report import ENVIRONMENT, build, with_half

from cli.main import main
from clusterq_deploy.errors import ReportError
from clusterq_deploy.report import Report
from clusterq_deploy.report.compare import compare, read_reports, to_csv, to_markdown_tables
from clusterq_deploy.report.findings import standard_error


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def written(folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs: the second of another seed, on another machine, with fp32 and w8a8 alone."""
    first = build()
    other = ENVIRONMENT.model_copy(update={"cpu": "Intel Xeon 8480", "onnxruntime": "1.30.0"})
    second = build(seed=8, environment=other, variants=first.variants[:2])
    return [written(tmp_path / "a" / "resnet18", first), written(tmp_path / "b" / "resnet18", second)]


def test_runs_are_named_by_what_tells_them_apart(two: list[Path], tmp_path: Path) -> None:
    assert list(read_reports(two)) == ["a/resnet18", "b/resnet18"]
    assert list(read_reports([two[0]])) == ["resnet18"]
    assert list(read_reports([two[0] / "report.json"])) == ["resnet18"]
    third = written(tmp_path / "c", build())
    assert list(read_reports([two[0], third])) == ["resnet18", "c"]


def test_rows_of_the_same_variant_and_file_are_neighbours(two: list[Path]) -> None:
    found = compare(read_reports(two))
    order = [(row["variant"], row["runtime"], row["run"]) for row in found.accuracy]
    assert order[:4] == [
        ("fp32", "torch", "a/resnet18"),
        ("fp32", "torch", "b/resnet18"),
        ("fp32", "onnxruntime-cpu", "a/resnet18"),
        ("fp32", "onnxruntime-cpu", "b/resnet18"),
    ]
    assert [variant for variant, _, _ in order] == ["fp32"] * 6 + ["w8a8"] * 6 + ["w4a4"] * 3
    timed = [(row["batch"], row["run"]) for row in found.latency if row["runtime"] == "onnxruntime-cpu"][:4]
    assert timed == [(1, "a/resnet18"), (1, "b/resnet18"), (32, "a/resnet18"), (32, "b/resnet18")]
    assert [row["seed"] for row in found.runs] == [7, 8]
    assert [row["onnxruntime"] for row in found.machines] == ["1.31.1", "1.30.0"]


def test_fp16_rows_stand_behind_those_of_fp32() -> None:
    compared = compare({"gpu": with_half(build(), 0.55), "cpu": build()})
    assert list(dict.fromkeys(row["variant"] for row in compared.latency)) == ["fp32", "fp16", "w8a8", "w4a4"]


def test_numbers_are_those_of_the_reports(two: list[Path]) -> None:
    (row,) = (
        r
        for r in compare(read_reports(two)).accuracy
        if (r["run"], r["variant"], r["runtime"]) == ("a/resnet18", "w4a4", "onnxruntime-cpu")
    )
    assert row["top1"] == pytest.approx(66.16)
    assert row["drop"] == pytest.approx(3.58)
    assert row["agreement"] == pytest.approx(86.40)
    assert row["size_bytes"] == 11_830_000


def test_what_does_not_compare_is_said(two: list[Path]) -> None:
    notes = compare(read_reports(two)).notes
    assert any("machines differ" in note for note in notes)
    assert any("versions" in note for note in notes)
    same = compare({"a": build(), "b": build(seed=9)})
    (unsteady,) = same.notes
    assert unsteady.startswith("~ marks a median whose measurement was unsteady (standard deviation above 2.5 %")
    assert "in a, b: the machine" in unsteady
    quiet = [
        v.model_copy(
            update={"latency": [own.model_copy(update={"coefficient_of_variation": 0.0}) for own in v.latency]}
        )
        for v in build().variants
    ]
    assert compare({"a": build(variants=quiet)}).notes == []
    model = build().model.model_copy(update={"name": "resnet50"})
    images = build().evaluation.model_copy(update={"images": 100})
    other = compare({"a": build(), "b": build(model=model, evaluation=images)}).notes
    assert any("models differ" in note for note in other)
    assert any("different images" in note for note in other)


def test_csv_is_one_table_with_every_number(two: list[Path]) -> None:
    reports = read_reports(two)
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(reports)))))
    assert len(rows) == 15  # three runtimes of five variants
    (row,) = (r for r in rows if (r["run"], r["variant"], r["runtime"]) == ("b/resnet18", "w8a8", "onnxruntime-cpu"))
    assert float(row["median_ms_batch_1"]) == 4.604
    assert float(row["speedup_batch_1"]) == pytest.approx(15.104 / 4.604)
    assert (row["model"], row["seed"], row["cpu"]) == ("resnet18", "8", "Intel Xeon 8480")
    assert float(row["p90_ms_batch_1"]) == pytest.approx(4.604 * 1.04)
    assert float(row["p99_ms_batch_32"]) == pytest.approx(4.604 * 29 * 1.15)
    assert float(row["images_per_second_batch_1"]) == pytest.approx(1000 / 4.604)
    assert (row["threads_batch_1"], row["unsteady_batch_1"], row["unsteady_batch_32"]) == ("2", "false", "true")
    assert float(row["agreement_error"]) == pytest.approx(standard_error(98.26, 5000))
    columns = list(row)
    assert columns[columns.index("agreement") + 1] == "median_ms_batch_1"  # what came later stands at the end
    assert columns[columns.index("cores") + 1 :][:2] == ["agreement_error", "p90_ms_batch_1"]
    torch_row = next(r for r in rows if r["runtime"] == "torch")
    assert torch_row["median_ms_batch_1"] == torch_row["graph"] == ""


def test_markdown_tables_are_whole(two: list[Path]) -> None:
    text = to_markdown_tables(compare(read_reports(two)))
    assert re.findall(r"^### (.*)", text, re.M) == ["Runs", "Accuracy", "Latency", "Machines"]
    widths = [re.findall(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert len(widths) == 4 * 2 + 2 + 15 + 20 + 2
    assert "66.16 ± 0.67" in text
    assert "98.26 ± 0.19" in text
    latency = text[text.index("### Latency") :].splitlines()
    heading, once, batched = (
        re.split(r"\s*\|\s*", next(line for line in latency if re.match(found, line)))[1:-1]
        for found in (r"\| run", r"\| a/resnet18 \| w8a8 .* 1 \| ", r"\| a/resnet18 \| w8a8 .* 32 \| ")
    )
    assert heading[4:] == ["batch", "threads", "p50 ms", "p90 ms", "p99 ms", "images/s", "speed-up"]
    times = "\N{MULTIPLICATION SIGN}"
    assert once[4:] == ["1", "2", "4.604", "4.788", "5.295", "217", f"3.28{times}"]
    assert batched[4:] == ["32", "2", "~133.5", "138.9", "153.5", "240", f"3.28{times}"]
    assert "- The machines differ" in text


def test_the_command_lays_runs_side_by_side_and_writes_nothing(two: list[Path]) -> None:
    result = call("report", "--compare", *two)
    assert result.exit_code == 0, result.output
    for text in ("Runs", "Accuracy", "Latency", "a/resnet18", "b/resnet18", "p50 ms", "machines differ"):
        assert text in result.stdout
    content = json.loads(call("report", "--compare", *two, "--json").stdout)
    assert content.keys() == {"runs", "accuracy", "latency", "machines", "notes"}
    assert call("report", "--compare", *two, "--csv").stdout.startswith("run,variant,runtime,graph,size_bytes,top1")
    assert call("report", "--compare", *two, "--markdown").stdout.startswith("### Runs\n\n| run")
    assert [p.name for folder in two for p in folder.iterdir()] == ["report.json"] * 2


def test_the_command_says_what_is_wrong(two: list[Path], tmp_path: Path) -> None:
    def fails(*args: object) -> str:
        result = call("report", *args)
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        return line

    assert "add --compare" in fails(*two)
    assert "exclude each other" in fails("--compare", two[0], "--json", "--csv")
    assert "write it with clusterq report" in fails("--compare", two[0], tmp_path)
    assert "named twice" in fails("--compare", two[0], two[0] / "report.json")
    assert "no run directory" in fails(two[0])
    with pytest.raises(ReportError, match="no report"):
        read_reports([tmp_path / "nowhere"])


def test_one_run_prints_tables_to_paste(tmp_path: Path) -> None:
    settings, out = tmp_path / "small.toml", tmp_path / "out"
    settings.write_text(tomli_w.dumps({"limit": 60, **SMALL}))
    assert call("synthesize", "digits", "--config", settings, "--out", out).exit_code == 0
    table = call("report", out, "--markdown")
    assert table.exit_code == 0, table.output
    assert "| out | digits |" in table.stdout
    assert (out / "report.html").is_file()
    assert call("report", "--compare", out).exit_code == 0
