"""The commands, as a person calls them: exit code, output, files."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, call, write_settings
from support import error_line as fails

import clusterq_deploy

COMMANDS = (
    "run",
    "synthesize",
    "sensitivity",
    "quantize",
    "export",
    "build",
    "evaluate",
    "features",
    "benchmark",
    "report",
    "check",
    "models",
    "doctor",
)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write_settings(tmp_path / "small.toml", limit=60)


def test_every_command_has_help() -> None:
    listing = call("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", listing, re.M)
        result = call(name, "--help")
        assert result.exit_code == 0
        assert "Usage: " in result.stdout


@pytest.mark.slow
def test_run_prints_a_table_and_leaves_a_report(settings: Path, tmp_path: Path) -> None:
    result = call("run", "digits", "--config", settings, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in ("digits", "w8a8", "w4a4", "model.ort.onnx", "Skipped build", "report.html"):
        assert text in result.stdout
    assert (tmp_path / "out/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_stages_alone_add_up_to_a_run(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = call("synthesize", "digits", "--config", settings, "--out", out, "--json")
    assert json.loads(made.stdout)["images"] == 80, made.output
    steps = [
        call("quantize", out, "--bits", "w4a8", "--json"),
        call("export", out, "--bits", "w4a8", "--json"),
        call("evaluate", out, "--bits", "w4a8", "--json"),
        call("features", out, "--json"),
        call("benchmark", out, "--json"),
        call("report", out, "--json"),
    ]
    assert [r.exit_code for r in steps] == [0] * 6, [r.output for r in steps]
    exported = json.loads(steps[1].stdout)
    assert {row["path"] for row in exported} >= {"fp32/model.onnx", "w4a8/model.int4.onnx"}
    compared = json.loads(call("export", out, "--verify", "--json").stdout)
    assert [row["graph"] for row in compared] == [f"w4a8/model.{kind}.onnx" for kind in ("ort", "trt", "int4")]
    assert all(row["parts_at"] is None and row["integers"] > 10_000 for row in compared)
    report = json.loads(steps[5].stdout)
    assert [v["name"] for v in report["variants"]] == ["fp32", "w4a8"]
    synthetic, real = json.loads(steps[3].stdout)
    assert (synthetic["images"], real["images"]) == (80, 60)
    assert synthetic["silhouette"] == report["features"]["synthetic"]["silhouette"]
    assert "digits, held out" in call("features", out).stdout
    for variant in report["variants"]:
        assert variant["accuracy"]
        assert variant["latency"]
    # a graph alone says how it is fed
    graph = out / "w4a8/model.ort.onnx"
    alone = json.loads(call("evaluate", graph, "--limit", 60, "--json").stdout)[0]
    assert alone["top1"] == report["variants"][1]["accuracy"][1]["top1"]
    timed = json.loads(call("benchmark", graph, "--batches", "1", "--json").stdout)
    assert timed[0]["median_ms"] > 0
    assert "exported from digits" not in call("evaluate", graph).output


def test_models_lists_what_is_there() -> None:
    entries = json.loads(call("models", "--json").stdout)
    names = [entry["name"] for entry in entries]
    assert names[0] == "digits"
    assert {"resnet18", "mobilenet_v2"} <= set(names)
    assert "digits" in call("models").stdout


def test_options_override_the_file(settings: Path, tmp_path: Path) -> None:
    result = call(
        "synthesize", "digits", "--config", settings, "--images", "20", "--seed", "5", "--out", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "o/run.toml").read_text()
    assert "images = 20" in text
    assert "seed = 5" in text
    assert "steps = 12" in text


def test_wrong_input_ends_in_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "did you mean" in fails("run", "resnet81", *out)
    assert "BatchNorm" in fails("run", "vgg11", "--weights", "none", *out)
    assert "from 2 to 8" in fails("run", "digits", "--bits", "w9a4", *out)
    assert "no model was given" in fails("run", *out)
    assert "does not exist" in fails("run", "digits", "--data", tmp_path / "nowhere", *out)
    assert "no run directory" in fails("quantize", tmp_path)
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in fails("run", "digits", "--device", "cuda", *out)
    weights = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(3)}, weights)
    assert "weights" in fails("run", "digits", "--weights", weights, *out)
    (tmp_path / "wrong.toml").write_text("modle = 'digits'")
    assert "did you mean 'model'" in fails("run", "digits", "--config", tmp_path / "wrong.toml", *out)
    assert "did you mean 'model'" in fails("run", "--config", tmp_path / "wrong.toml", *out)
    assert "does not exist" in fails("benchmark", tmp_path / "none.onnx")
    for text, said in {
        "synthesis = 3": "synthesis in",
        "imags = 64": "did you mean 'synthesis.images'",
        "effort = 'bogus'": "effort in",
        "finetune." + ".".join("a" * 3000) + " = 1": "nested too deeply",
        "[synthesis]\nrecipe = 'papr'": "synthesis.recipe in",
    }.items():
        (tmp_path / "wrong.toml").write_text(text)
        given = ("run", "digits", "--config", tmp_path / "wrong.toml", *out)
        assert said in fails(*given, "--images", "64", "--effort", "fast")
        assert said in fails(*given, "--recipe", "paper")
    assert not (tmp_path / "out").exists()


def test_what_fails_leaves_the_run_as_it_was(run_copy: Path, tmp_path: Path) -> None:
    out = run_copy
    assert "run clusterq quantize --bits w2a2 first" in fails("export", out, "--bits", "w2a2")
    before = (out / "run.toml").read_text()
    assert "does not exist" in fails("evaluate", out, "--data", tmp_path / "nowhere")
    assert "run clusterq export" in fails("evaluate", out, "--bits", "w3a3")
    assert "--batches" in fails("benchmark", out, "--batches", "1,x")
    assert "greater than 0" in fails("benchmark", out, "--batches", "0")
    assert "No such option" in fails("run", "digits", "--bitts", "w4a4")
    assert (out / "run.toml").read_text() == before


def test_a_data_folder_of_other_classes_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog", "fish"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "data" / name / "1.png")
    message = fails("run", "digits", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "3 class folders, but the model has 10 classes" in message
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    message = fails("run", "digits", "--weights", tmp_path / "evil.pth", "--out", tmp_path / "out")
    assert "safetensors" in message
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "out").exists()


def test_another_models_run_is_refused(finished_run: Path) -> None:
    assert "holds a run of digits" in fails("run", "resnet18", "--weights", "none", "--out", finished_run)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names of files are Unicode")
def test_a_path_that_is_not_utf8_is_one_line_where_run_toml_would_hold_it(settings: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "net.py").write_text("from clusterq_deploy.models.digits import DigitsNet\n")
    spec, fed = f"{folder / 'net.py'}:DigitsNet", ("--input-size", "1,16,16", "--mean", "0", "--std", "1")
    line = fails("run", spec, *fed, "--config", settings, "--out", tmp_path / "out")
    path = str(folder / "net.py")
    assert line == f"Error: model: the path {path!r} is not UTF-8, so that run.toml cannot hold it; rename it"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_folder_that_is_not_utf8_is_one_line_and_one_in_such_a_folder_works(
    settings: Path, tmp_path: Path
) -> None:
    """Real processes: their arguments are in the manifest."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    command = [sys.executable, "-m", "cli", "synthesize", "digits", "--config", settings, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run([*command, folder / "out"], capture_output=True, check=False, cwd=ROOT)
    assert refused.returncode == 2
    assert refused.stderr.endswith(b"is not UTF-8, which safetensors cannot read; choose another\n")
    assert len(refused.stderr.splitlines()) == 1
    done = subprocess.run([*command, "out"], capture_output=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert (folder / "out/calibration/images.safetensors").is_file()


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_did_not_end(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("synthesize", "digits", "--config", settings)
    assert call(*command).exit_code == 0
    (first,) = Path("runs").iterdir()
    again = call(*command)
    assert again.exit_code == 0
    assert again.stderr == f"Goes on in {first}, where the same run did not come to its end.\n"
    assert list(Path("runs").iterdir()) == [first]
    (first / "report.html").touch()
    time.sleep(1.1)  # a folder is named by the second
    assert call(*command).exit_code == 0
    assert len(list(Path("runs").iterdir())) == 2
    assert call(*command, "--seed", "1").stderr == ""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(settings: Path, tmp_path: Path) -> None:
    """The kernel refuses to let files grow past 20 kB: the settings fit, the images do not."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from cli.main import main; main(sys.argv[1:])\n"
    )
    args = ["synthesize", "digits", "--config", str(settings), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *warnings, line = done.stderr.strip().splitlines()
    assert all(own.startswith("no checkpoint was kept: cannot write") for own in warnings)
    assert line.startswith("Error: cannot write")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        ".lock",
        "manifest.json",
        "run.toml",
    ]
    again = call(*args)  # with room, the same command goes on in the same folder
    assert again.exit_code == 0, again.output


def test_building_without_tensorrt_says_what_is_missing(tmp_path: Path) -> None:
    from clusterq_deploy.runtimes.tensorrt import unavailable_reason

    if unavailable_reason() is None:
        pytest.skip("TensorRT and a GPU are there")
    (tmp_path / "x.onnx").write_bytes(b"")
    assert "no engine can be built here" in fails("build", tmp_path / "x.onnx")


def test_the_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"clusterq (\w+)([^`\n]*)", text)
    assert set(COMMANDS) == {command for command, _ in lines}
    for command, rest in lines:
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in call(command, "--help").stdout, (command, option)
    assert text.index("make demo") < text.index("make test")


def test_the_readmes_python_names_what_is_there() -> None:
    calls, block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    named = {n.attr for n in ast.walk(ast.parse(calls)) if isinstance(n, ast.Attribute)}
    assert named == {"InputSpec", "synthesize", "quantize", "export"}
    assert named <= set(clusterq_deploy.__all__)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "clusterq_deploy":
            assert {alias.name for alias in node.names} <= set(clusterq_deploy.__all__)
    head = block[: block.index("report =")]
    names: dict[str, object] = {}
    exec(head, names)
    assert names["config"] == clusterq_deploy.RunConfig(model="digits")
