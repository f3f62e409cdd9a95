"""The scripts that measure tables: what is measured, kept and made again, and what the page says."""

import json
import math
import sys
from pathlib import Path

import ablation
import accuracy
import coverage
import harness
import pytest
import tables
from cells import ROOT, Cell, arguments, read_cell
from click import Command
from click.testing import CliRunner, Result
from store import Results
from support import run_python

from cli import commands
from clusterq_deploy.config.run_config import make_config

STAND_IN = '''\
"""Stands in for clusterq: notes its arguments, and leaves the report of a run."""
import json, os, pathlib, sys
args = sys.argv[2:]
with open(os.environ["CALLS"], "a") as calls:
    print(*args[:1], *(args[args.index("--bits") + 1 :][:1] if "--bits" in args else []), file=calls)
out = pathlib.Path(args[args.index("--out") + 1])
if os.environ.get("FAILS", "none") in args:
    sys.exit(f"Traceback of something\\nError: no luck with {out.parent.parent / 'x'}\\n")
out.mkdir(parents=True, exist_ok=True)
if args[0] == "run":
    bits = args[args.index("--bits") + 1]
    graphs = [(f"{bits}/model.{kind}.onnx", 90 + int(args[args.index("--seed") + 1])) for kind in ("ort", "trt")]
    def accuracy(found):
        return [{"graph": g, "runtime": "onnxruntime-cpu", "top1": t, "agreement": 95.0} for g, t in found]
    (out / "report.json").write_text(json.dumps({
        "variants": [{"name": "fp32", "seconds": 1.0, "accuracy": accuracy([("fp32/model.onnx", 92)])},
                     {"name": bits, "seconds": 5.0, "accuracy": accuracy(graphs)}],
        "config": {"model": "digits", "seed": 3, "synthesis": {}, "data": str(out)}, "created": "2026-01-01",
        "evaluation": {"dataset": "digits, held out", "images": 5000}, "clusterq_deploy": "0.1.0",
        "calibration": {"seconds": 60.0, "teacher_top1": 99.0, "within_class_diversity": 0.25},
        "environment": {"cores": 2, "cpu": "Some CPU", "torch": "2.0", "onnxruntime": "1.0", "gpu": None}}))
'''


class Bench:
    """The scripts in a folder of their own, with a stand-in for the commands."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = path, monkeypatch
        (path / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setattr(harness, "PROGRAM", (sys.executable, str(path / "stand_in.py")))
        monkeypatch.setenv("CALLS", str(path / "calls"))
        monkeypatch.setattr(ablation, "RESULTS", path / "ablation.json")
        self.results, self.page = Results(path / "accuracy.json"), path / "page.md"

    def call(self, *options: str, models: tuple[str, ...] = ("--model", "digits")) -> Result:
        files = ["--results", str(self.results.path), "--page", str(self.page)]
        return self.invoke(accuracy.main, *files, *models, *options)

    def invoke(self, script: Command, *options: str) -> Result:
        result = CliRunner().invoke(script, ["--out", str(self.path / "work"), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    def calls(self) -> list[str]:
        """Return the commands since the last time this was called."""
        path = self.path / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.write_text("")
        return lines


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_one_synthesis_serves_all_bits_and_nothing_is_made_twice(bench: Bench) -> None:
    assert bench.call("--bits", "w8a8").exit_code == 0
    assert bench.calls() == ["synthesize", "run w8a8"]
    assert bench.call().exit_code == 0
    assert bench.calls() == ["run w4a8", "run w4a4"]
    assert "already measured: digits-default-s0 w8a8" in bench.call().stdout
    assert bench.calls() == []
    assert bench.call("--bits", "w4a4", "--again").exit_code == 0
    assert bench.calls() == ["synthesize", "run w4a4"]
    assert len(bench.results.cells) == 3
    (figures,) = (bench.path / "work").glob("*/synthesize.json")
    figures.unlink()  # as if it was interrupted between the command and its figures
    bench.results.path.unlink()
    bench.call("--bits", "w8a8")
    assert bench.calls() == ["synthesize", "run w8a8"]


def test_record_says_what_was_measured_and_how(bench: Bench) -> None:
    bench.call("--bits", "W4A4", "--seeds", "1")
    (cell,) = bench.results.cells
    assert (cell["fp32_top1"], cell["top1"], cell["drop"], cell["seed"]) == (92, 91, 1, 1)
    assert (cell["synthesis_seconds"], cell["quantize_seconds"]) == (60, 5)
    assert [c["command"].split()[:2] for c in cell["commands"]] == [["clusterq", "synthesize"], ["clusterq", "run"]]
    assert cell["wall_seconds"] == pytest.approx(sum(c["wall_seconds"] for c in cell["commands"]))
    assert cell["peak_memory_bytes"] == max(c["peak_memory_bytes"] for c in cell["commands"]) > 1e6
    content = bench.results.path.read_text()
    assert json.loads(content)["configs"] == {cell["config_digest"]: {"synthesis": {}}}
    assert str(bench.path) not in content


def test_failing_command_is_noted_and_the_rest_goes_on(bench: Bench) -> None:
    bench.patch.setenv("FAILS", "w4a8")
    result = bench.call()
    assert result.exit_code == 1
    assert bench.calls() == ["synthesize", "run w8a8", "run w4a8", "run w4a4"]
    (failure,) = bench.results.failed
    assert (failure["bits"], failure["error"]) == ("w4a8", "Error: no luck with x")
    assert "failed: digits-default-s0 w4a8: Error: no luck with x" in result.stdout
    assert "- failed: W4A8, first and last 8 bits, default, seed 0" in bench.page.read_text()
    bench.patch.setenv("FAILS", "synthesize")
    assert bench.call("--again").exit_code == 1
    assert bench.calls() == ["synthesize"]
    assert (len(bench.results.failed), len(bench.results.cells)) == (3, 2)  # earlier results stay
    bench.patch.delenv("FAILS")
    assert bench.call("--again").exit_code == 0
    assert (bench.results.failed, len(bench.results.cells)) == ([], 3)


def test_other_sources_of_the_package_are_measured_again(bench: Bench) -> None:
    bench.call("--bits", "w8a8")
    bench.calls()
    bench.patch.setattr(harness, "code_digest", lambda: "another")
    bench.call("--bits", "w8a8", "--keep-old")
    assert bench.calls() == []
    bench.call("--bits", "w8a8")
    assert bench.calls() == ["synthesize", "run w8a8"]
    assert [cell["code"] for cell in bench.results.cells] == ["another"]
    digests = iter(["before", "after"])
    bench.patch.setattr(harness, "code_digest", lambda: next(digests))
    result = bench.call("--bits", "w4a4")
    assert result.exit_code == 1
    assert "changed while they were measured" in result.stderr
    assert len(bench.results.cells) == 1


def test_missing_files_are_named(bench: Bench) -> None:
    assert "give --models-file" in bench.call(models=("--model", "resnet20_cifar10")).stderr
    assert "does not exist" in bench.call("--models-file", str(bench.path / "models.py"), models=()).stderr
    assert "no cell of the matrix" in bench.call("--bits", "w2a2").stderr


def test_arguments_of_a_cell_are_what_the_commands_accept() -> None:
    cell_with_all = Cell("net", "w4a4", True, "paper", "fast", 2)
    line = " ".join(arguments(cell_with_all, "run", "models.py:net", "data.npz", Path("settings.toml"), Path("runs/x")))
    assert line == (
        "run models.py:net --recipe paper --seed 2 --effort fast --bits w4a4 --first-last --data data.npz "
        "--config settings.toml --out runs/x"
    )
    for cell in (Cell("digits", "w4a4"), cell_with_all):
        for command in (commands.run, commands.synthesize):
            line = arguments(cell, str(command.name), "digits", "data.npz", Path("settings.toml"), Path("runs/x"))
            assert ("--effort" in line) is (cell.effort is not None)
            parameters = command.make_context(command.name, line[1:]).params
            assert (parameters["config_file"], parameters["seed"]) == (Path("settings.toml"), cell.seed)
    settings = [harness.merged(harness.TIMING, cell.settings) for cell in ablation.cells()]
    generators = [make_config({"model": "digits", **values}).synthesis.generator for values in settings]
    assert {(generator.steps, generator.warmup_steps) for generator in generators} == {(800, 100)}


def test_keys_tell_cells_apart() -> None:
    cells = [*accuracy.planned(), *ablation.cells()]
    assert len({cell.key for cell in cells}) == len(cells)
    assert Cell("net", "w4a4", label="row").key == Cell("net", "w4a4").key != Cell("net", "w4a4", effort="fast").key
    assert [c.seed for c in accuracy.planned(("resnet20_cifar10",), ("w4a4",)) if c.first_last] == [0, 1, 2]


def test_texts_of_figures() -> None:
    assert tables.mean_and_std([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.mean_and_std([-0.001]) == "0.00"
    # 5 % of 5,000 images differ; by hand: sqrt((0.05 - 0.01^2) / 5000)
    assert tables.standard_error(1, 95, 5000) == pytest.approx(100 * math.sqrt(0.0499 / 5000))
    assert tables.standard_error(0, 100, 10) == 0
    assert [tables.duration(s) for s in (44.6, 125, 12000)] == ["45 s", "2 min 5 s", "3 h 20 min"]
    assert [tables.memory(m) for m in (2.54e9, 7.3e8)] == ["2.5 GB", "730 MB"]


def test_page_shows_seeds_their_deviation_and_what_is_published(bench: Bench) -> None:
    bench.call("--bits", "w4a4", "--seeds", "0,1,2")
    page = bench.page.read_text()
    row = "| 3 | 92.00 | 91.00 ± 1.00 | 1.00 ± 1.00 | 0.32 | 95.00 ± 0.00 | 91.00 ± 1.00 | 1 min 5 s |"
    assert f"| W4A4, first and last 8 bits | default {row}" in page
    assert "5,000 images of digits, held out; 2 cores of Some CPU" in page
    assert "| W8A8, first and last 8 bits | not yet measured |" in page
    assert "| ResNet-20 W4A4, all layers | ClusterQ, arXiv 2205.00179 | 93.89 → 92.06 | 1.83 | Setting yes" in page
    assert bench.call("--table").exit_code == 0
    assert bench.page.read_text() == page


def test_ablation_leaves_out_one_part_at_a_time(bench: Bench) -> None:
    results = Results(ablation.RESULTS)
    options = ["--model", "digits", "--seeds", "0,1", "--scale", "0.0125", "--results", str(results.path)]
    result = bench.invoke(ablation.main, *options)
    assert result.exit_code == 0, result.output
    assert bench.calls() == ["synthesize", "run w4a4"] * 10
    settings = {cell["label"]: cell["settings"]["synthesis"]["generator"] for cell in results.cells}
    assert settings["without EMA (5)"] == {"steps": 80, "warmup_steps": 10, "ema_beta": 0}
    assert settings["without class alignment (4), (6)"].items() >= {"sfda_weight": 0, "icv_weight": 0}.items()
    assert all(cell["first_last"] and cell["recipe"] == "paper" for cell in results.cells)
    row = "| without EMA (5) | digits, W4A4, all layers | 80 (10) | 2 | 92.00 | 90.50 ± 0.71 | 1.50 ± 0.71 |"
    assert row in result.stdout
    bench.call("--table")
    assert row in bench.page.read_text()


def test_pages_in_the_docs_are_those_of_the_results() -> None:
    page = accuracy.page(Results(accuracy.RESULTS), Results(ablation.RESULTS))
    assert accuracy.PAGE.read_text() == page, "run python benchmarks/accuracy.py --table"
    page = coverage.page(json.loads(coverage.RESULTS.read_text()))
    assert coverage.PAGE.read_text() == page, "run python benchmarks/coverage.py --table"


def test_coverage_of_timm_asks_for_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = CliRunner().invoke(coverage.main, ["--timm", "--out", str(tmp_path / "coverage.json")])
    assert result.exit_code == 1
    assert "timm is not installed, and this project does not need it: pip install timm==" in result.stderr


def test_read_cell_reads_a_real_report() -> None:
    report = json.loads((ROOT / "benchmarks/results/digits.json").read_text())
    record, config = read_cell(report, Cell("digits", "w4a4"))
    assert (record["images"], record["fp32_top1"], record["runtime"]) == (450, record["top1"], "onnxruntime-cpu")
    assert record["synthesis_seconds"] > record["quantize_seconds"] > 1
    assert config["synthesis"]["generator"]["steps"] > 1
    assert not {"model", "data", "seed"} & set(config)
    assert all(record["environment"][name] for name in ("python", "torch", "onnx", "onnxruntime", "cpu", "cores"))


def test_run_measured_measures_a_real_command_and_raises_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = harness.run_measured(["--version"], tmp_path / "log")
    assert 0 < measured.cpu_seconds < 60
    assert measured.wall_seconds > 0
    with pytest.raises(harness.CommandError, match=r"^Error: No such option.*--bitts"):
        harness.run_measured(["run", "digits", "--bitts", "w4a4"], tmp_path / "log")
    killed = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(harness, "PROGRAM", killed)
    with pytest.raises(harness.CommandError, match="ended by signal 9"):
        harness.run_measured([], tmp_path / "log")


def test_script_that_measures_imports_nothing_heavy() -> None:
    """A child's peak counts the memory of the process that started it: torch in the script would be in every figure."""
    heavy = "{'torch', 'numpy', 'clusterq_deploy'} & set(sys.modules)"
    code = f"import sys, accuracy; sys.exit(len({heavy}))"
    assert run_python("-c", code, cwd=ROOT / "benchmarks").returncode == 0


@pytest.mark.slow
def test_gpu_runs_go_on_where_an_earlier_call_ended(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    options = ["--only", "digits-fast", "--device", "cpu", "--out", tmp_path / "runs", "--results", results]

    def call(minutes: float) -> str:
        process = run_python(ROOT / "benchmarks/gpu.py", *options, "--minutes", minutes)
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert call(0.15) == "to do: digits-fast; start again\n"
    assert not results.exists()
    assert call(9).endswith("nothing is left\n")
    record = json.loads(results.read_text())["digits-fast"]
    assert record["calls"] == 2
    assert record["wall_seconds"] > sum(record["stage_seconds"].values()) > 0
    assert {entry["runtime"] for entry in record["accuracy"]["w8a8"]} == {"torch", "onnxruntime-cpu"}
    assert call(9) == "nothing is left\n"


@pytest.mark.slow
def test_speed_times_every_stage_next_to_a_bare_pass(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    process = run_python(ROOT / "benchmarks/speed.py", "digits", "--steps", 2, "--out", file)
    assert process.returncode == 0, process.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert list(row["stages"]) == ["generator", "refinement", "tuning", "evaluation"]
    for stage, of in row["stages"].items():
        assert f"digits, {stage}: bare" in process.stdout
        assert of["ratio"] == pytest.approx(of["step_ms"] / of["bare_ms"])
        assert 0.3 < of["ratio"] < 10  # of the same work and more, on a machine that does other things
