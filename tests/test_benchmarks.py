"""The scripts that measure tables: what is measured, kept and made again, and what the page says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import ablation
import accuracy
import harness
import pytest
import tables
from cells import ROOT, Cell, Places, arguments, read_cell
from click.testing import CliRunner, Result
from store import Results

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
    """The script in a folder of its own, with a stand-in for the commands."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = path, monkeypatch
        (path / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setattr(harness, "PROGRAM", (sys.executable, str(path / "stand_in.py")))
        monkeypatch.setenv("CALLS", str(path / "calls"))
        self.results = Results(path / "accuracy.json")

    def call(self, *more: str) -> Result:
        files = ["--results", self.results.path, "--page", self.path / "page.md", "--out", self.path / "work"]
        options = [*files, "--ablation-results", self.path / "ablation.json"]
        result = CliRunner().invoke(accuracy.main, [*map(str, options), *more])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    def calls(self) -> list[str]:
        """The commands since the last time this was asked."""
        path = self.path / "calls"
        found = path.read_text().splitlines() if path.is_file() else []
        path.write_text("")
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


DIGITS = ("--model", "digits")


def test_one_synthesis_serves_all_bits_and_nothing_is_made_twice(bench: Bench) -> None:
    assert bench.call(*DIGITS, "--bits", "w8a8").exit_code == 0
    assert bench.calls() == ["synthesize", "run w8a8"]
    assert bench.call(*DIGITS).exit_code == 0
    assert bench.calls() == ["run w4a8", "run w4a4"]
    assert "there already: digits-default-s0 w8a8" in bench.call(*DIGITS).stdout
    assert bench.calls() == []
    assert bench.call(*DIGITS, "--bits", "w4a4", "--again").exit_code == 0
    assert bench.calls() == ["synthesize", "run w4a4"]
    assert len(bench.results.cells) == 3


def test_a_result_says_what_was_measured_and_how(bench: Bench) -> None:
    bench.call(*DIGITS, "--bits", "W4A4", "--seeds", "1")
    (cell,) = bench.results.cells
    assert (cell["fp32_top1"], cell["top1"], cell["drop"], cell["seed"]) == (92, 91, 1, 1)
    assert (cell["synthesis_seconds"], cell["quantize_seconds"]) == (60, 5)
    assert [c["command"].split()[:2] for c in cell["commands"]] == [["clusterq", "synthesize"], ["clusterq", "run"]]
    assert cell["wall_seconds"] == pytest.approx(sum(c["wall_seconds"] for c in cell["commands"]))
    assert cell["peak_memory_bytes"] == max(c["peak_memory_bytes"] for c in cell["commands"]) > 1e6
    content = bench.results.path.read_text()
    assert json.loads(content)["configs"] == {cell["config_digest"]: {"synthesis": {}}}
    assert str(bench.path) not in content


def test_a_failing_command_is_noted_and_the_rest_goes_on(bench: Bench) -> None:
    bench.patch.setenv("FAILS", "w4a8")
    result = bench.call(*DIGITS)
    assert result.exit_code == 1
    assert bench.calls() == ["synthesize", "run w8a8", "run w4a8", "run w4a4"]
    (failure,) = bench.results.failed
    assert (failure["bits"], failure["error"]) == ("w4a8", "Error: no luck with x")
    assert "failed: digits-default-s0 w4a8: Error: no luck with x" in result.stdout
    assert "- failed: W4A8, first and last 8 bits, default, seed 0" in (bench.path / "page.md").read_text()
    bench.patch.delenv("FAILS")
    assert bench.call(*DIGITS).exit_code == 0
    assert bench.calls() == ["run w4a8"]
    assert (bench.results.failed, len(bench.results.cells)) == ([], 3)


def test_a_failure_leaves_an_earlier_result(bench: Bench) -> None:
    bench.call(*DIGITS, "--bits", "w8a8")
    bench.patch.setenv("FAILS", "synthesize")
    assert bench.call(*DIGITS, "--bits", "w8a8", "--again").exit_code == 1
    assert [len(bench.results.cells), len(bench.results.failed)] == [1, 1]


def test_other_sources_of_the_package_are_measured_anew(bench: Bench) -> None:
    bench.call(*DIGITS, "--bits", "w8a8")
    bench.calls()
    bench.patch.setattr(harness, "code_digest", lambda: "another")
    bench.call(*DIGITS, "--bits", "w8a8", "--keep-old")
    assert bench.calls() == []
    bench.call(*DIGITS, "--bits", "w8a8")
    assert bench.calls() == ["synthesize", "run w8a8"]
    assert [cell["code"] for cell in bench.results.cells] == ["another"]
    changing = iter(["before", "after"])
    bench.patch.setattr(harness, "code_digest", lambda: next(changing))
    result = bench.call(*DIGITS, "--bits", "w4a4")
    assert result.exit_code == 1
    assert "changed while they were measured" in result.stderr
    assert len(bench.results.cells) == 1


def test_what_an_interrupt_left_is_made_again(bench: Bench) -> None:
    bench.call(*DIGITS, "--bits", "w8a8")
    (figures,) = (bench.path / "work").glob("*/synthesize.json")
    figures.unlink()  # as if it had ended between the command and its figures
    bench.calls()
    bench.call(*DIGITS, "--bits", "w4a4")
    assert bench.calls() == ["synthesize", "run w4a4"]


def test_missing_files_are_named(bench: Bench) -> None:
    assert "give --models-file" in bench.call("--model", "resnet20_cifar10").stderr
    assert "does not exist" in bench.call("--models-file", str(bench.path / "models.py")).stderr
    assert "no cell of the matrix" in bench.call(*DIGITS, "--bits", "w2a2").stderr


def test_the_command_of_a_cell() -> None:
    cell = Cell("net", "w4a4", True, "paper", "fast", 2)
    places = Places(Path("/w"), Path("/m/models.py"), Path("/d"))
    made = arguments(cell, "run", "models.py:net", "data.npz", Path("settings.toml"), Path("runs/x"))
    assert " ".join(made) == (
        "run models.py:net --recipe paper --seed 2 --effort fast --bits w4a4 --first-last --data data.npz "
        "--config settings.toml --out runs/x"
    )
    assert places.hidden("cannot read /d/data.npz of /m/models.py") == "cannot read data.npz of models.py"
    assert "--effort" not in arguments(Cell("net", "w4a4"), "synthesize", "net", None, Path("s"), Path("o"))


def test_keys_tell_cells_apart() -> None:
    cells = [*accuracy.planned(), *ablation.cells()]
    assert len({cell.key for cell in cells}) == len(cells)
    assert Cell("net", "w4a4", label="row").key == Cell("net", "w4a4").key != Cell("net", "w4a4", effort="fast").key
    assert [c.seed for c in accuracy.planned(("resnet20_cifar10",), ("w4a4",)) if c.first_last] == [0, 1, 2]


def test_mean_spread_and_standard_error() -> None:
    assert tables.mean_and_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.mean_and_spread([-0.001]) == "0.00"
    # 5 % of 5,000 images differ; by hand: sqrt((0.05 - 0.01^2) / 5000)
    assert tables.standard_error(1, 95, 5000) == pytest.approx(100 * math.sqrt(0.0499 / 5000))
    assert tables.standard_error(0, 100, 10) == 0
    assert [tables.duration(s) for s in (44.6, 125, 12000)] == ["45 s", "2 min 5 s", "3 h 20 min"]
    assert [tables.memory(m) for m in (2.54e9, 7.3e8)] == ["2.5 GB", "730 MB"]


def test_the_page_shows_seeds_their_spread_and_what_is_published(bench: Bench) -> None:
    bench.call(*DIGITS, "--bits", "w4a4", "--seeds", "0,1,2")
    page = (bench.path / "page.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| W4A4, first and last 8 bits | default")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:10] == [
        "3",
        "92.00",
        "91.00 ± 1.00",
        "1.00 ± 1.00",
        "0.32",
        "95.00 ± 0.00",
        "91.00 ± 1.00",
        "1 min 5 s",
    ]
    assert "5,000 images of digits, held out; 2 cores of Some CPU" in page
    assert "| W8A8, first and last 8 bits | not yet measured |" in page
    assert "| ResNet-20 W4A4, all layers | ClusterQ, arXiv 2205.00179 | 93.89 → 92.06 | 1.83 | Setting yes" in page
    assert bench.call("--table").exit_code == 0
    assert (bench.path / "page.md").read_text() == page


def test_the_ablation_leaves_out_one_part_at_a_time(bench: Bench) -> None:
    results = Results(bench.path / "ablation.json")
    options = ["--model", "digits", "--seeds", "0,1", "--scale", "0.0125", "--out", str(bench.path / "work")]
    result = CliRunner().invoke(ablation.main, [*options, "--results", str(results.path)])
    assert result.exit_code == 0, result.output
    assert bench.calls() == ["synthesize", "run w4a4"] * 10
    settings = {cell["label"]: cell["settings"]["synthesis"]["generator"] for cell in results.cells}
    assert settings["without EMA (5)"] == {"steps": 80, "warmup_steps": 10, "ema_beta": 0}
    assert settings["without class alignment (4), (6)"].items() >= {"sfda_weight": 0, "icv_weight": 0}.items()
    assert all(cell["first_last"] and cell["recipe"] == "paper" for cell in results.cells)
    row = "| without EMA (5) | digits, W4A4, all layers | 80 (10) | 2 | 92.00 | 90.50 ± 0.71 | 1.50 ± 0.71 |"
    assert row in result.stdout
    bench.call("--table")
    assert row in (bench.path / "page.md").read_text()


def test_the_page_in_the_docs_is_that_of_the_results() -> None:
    page = accuracy.page(Results(accuracy.RESULTS), Results(ablation.RESULTS))
    assert accuracy.PAGE.read_text() == page, "run python benchmarks/accuracy.py --table"


def test_a_real_report_has_what_is_read_of_it() -> None:
    """The cells above come from a stand-in; this is the report of a run of its own."""
    report = json.loads((ROOT / "benchmarks/results/digits.json").read_text())
    record, config = read_cell(report, Cell("digits", "w4a4"))
    assert (record["images"], record["fp32_top1"], record["runtime"]) == (450, record["top1"], "onnxruntime-cpu")
    assert record["synthesis_seconds"] > record["quantize_seconds"] > 1
    assert config["synthesis"]["generator"]["steps"] > 1
    assert not {"model", "data", "seed"} & set(config)
    assert all(record["environment"][name] for name in ("python", "torch", "onnx", "onnxruntime", "cpu", "cores"))


def test_the_real_commands_take_these_arguments() -> None:
    for cell in (Cell("digits", "w4a4"), Cell("digits", "w3a3", True, "paper", seed=2)):
        for command in (commands.run, commands.synthesize):
            made = arguments(cell, str(command.name), "digits", "data.npz", Path("settings.toml"), Path("runs/x"))
            context = command.make_context(command.name, made[1:])
            assert context.params["config_file"] == Path("settings.toml")
            assert context.params["seed"] == cell.seed
    settings = [harness.merged(harness.TIMING, cell.settings) for cell in ablation.cells()]
    made_of = [make_config({"model": "digits", **own}).synthesis.generator for own in settings]
    assert {g.steps for g in made_of} == {800}
    assert {g.warmup_steps for g in made_of} == {100}


def test_a_real_command_is_measured_and_its_error_is_its_last_line(tmp_path: Path) -> None:
    figures = harness.measured(["--version"], tmp_path / "log")
    assert 0 < figures["cpu_seconds"] < 60
    assert figures["wall_seconds"] > 0
    with pytest.raises(harness.CommandError, match=r"^Error: No such option.*--bitts"):
        harness.measured(["run", "digits", "--bitts", "w4a4"], tmp_path / "log")
    bad = tmp_path / "bad.py"
    bad.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PROGRAM", (sys.executable, str(bad)))
        with pytest.raises(harness.CommandError, match="ended by signal 9"):
            harness.measured([], tmp_path / "log")


def test_the_script_that_measures_stays_small() -> None:
    """A child's peak counts the memory of the process that started it: torch in the script would be in every figure."""
    heavy = "{'torch', 'numpy', 'clusterq_deploy'} & set(sys.modules)"
    code = f"import sys, accuracy; sys.exit(len({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=False)
    assert done.returncode == 0
