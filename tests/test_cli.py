"""The commands, as a person calls them: exit code, output, files."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, call, error_line, json_of, output_of, write_settings

import clusterq_deploy
from cli.main import main


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Return small settings as a file."""
    return write_settings(tmp_path / "small.toml", limit=60)


@pytest.fixture
def started(settings: Path, tmp_path: Path) -> Path:
    """Return a run directory that has calibration images."""
    out = tmp_path / "started"
    output_of("synthesize", "digits", "--config", settings, "--out", out)
    return out


def test_every_command_has_help() -> None:
    listing = output_of("--help")
    for name in main.commands:
        assert re.search(rf"^  {name} ", listing, re.M)
        assert "Usage: " in output_of(name, "--help")


@pytest.mark.slow
def test_run_prints_a_table_and_leaves_a_report(settings: Path, tmp_path: Path) -> None:
    shown = output_of("run", "digits", "--config", settings, "--out", tmp_path / "out")
    for text in ("digits", "w8a8", "w4a4", "model.ort.onnx", "Skipped build", "report.html"):
        assert text in shown
    assert (tmp_path / "out/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_stages_one_by_one_add_up_to_a_run(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert json_of("synthesize", "digits", "--config", settings, "--out", out)["images"] == 80
    json_of("quantize", out, "--bits", "w4a8")
    exported = json_of("export", out, "--bits", "w4a8")
    assert {row["path"] for row in exported} >= {"fp32/model.onnx", "w4a8/model.int4.onnx"}
    json_of("evaluate", out, "--bits", "w4a8")
    synthetic, real = json_of("features", out)
    json_of("benchmark", out)
    report = json_of("report", out)
    compared = json_of("export", out, "--verify")
    assert [row["graph"] for row in compared] == [f"w4a8/model.{kind}.onnx" for kind in ("ort", "trt", "int4")]
    assert all(row["parts_at"] is None and row["integers"] > 10_000 for row in compared)
    assert [variant["name"] for variant in report["variants"]] == ["fp32", "w4a8"]
    assert (synthetic["images"], real["images"]) == (80, 60)
    assert synthetic["silhouette"] == report["features"]["synthetic"]["silhouette"]
    assert "digits, held out" in output_of("features", out)
    for variant in report["variants"]:
        assert variant["accuracy"]
        assert variant["latency"]
    graph = out / "w4a8/model.ort.onnx"  # which says how its input is made
    row, *_ = json_of("evaluate", graph, "--limit", 60)
    assert row["top1"] == report["variants"][1]["accuracy"][1]["top1"]
    assert json_of("benchmark", graph, "--batches", "1")[0]["median_ms"] > 0


def test_models_lists_those_that_have_a_name() -> None:
    names = [entry["name"] for entry in json_of("models")]
    assert names[0] == "digits"
    assert {"resnet18", "mobilenet_v2"} <= set(names)
    assert "digits" in output_of("models")


def test_options_override_the_file_and_run_toml_holds_both(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output_of("synthesize", "digits", "--config", settings, "--images", "20", "--seed", "5", "--out", out)
    text = (out / "run.toml").read_text()
    for line in ("images = 20", "seed = 5", "steps = 12"):
        assert line in text
    assert "effort" not in text  # which was not given


def test_wrong_input_ends_in_one_line(tmp_path: Path) -> None:
    out, file, weights = ("--out", tmp_path / "out"), tmp_path / "wrong.toml", tmp_path / "weights.pth"
    file.write_text("modle = 'digits'")
    torch.save({"conv.weight": torch.zeros(3)}, weights)
    for said, arguments in {
        "did you mean": ("run", "resnet81"),
        "BatchNorm": ("run", "vgg11", "--weights", "none"),
        "from 2 to 8": ("run", "digits", "--bits", "w9a4"),
        "no model was given": ("run",),
        "does not exist": ("run", "digits", "--data", tmp_path / "nowhere"),
        "weights": ("run", "digits", "--weights", weights),
        "did you mean 'model'": ("run", "digits", "--config", file),
        "unknown setting 'modle'": ("run", "--config", file),
    }.items():
        assert said in error_line(*arguments, *out)
    assert "no run directory" in error_line("quantize", tmp_path)
    assert "does not exist" in error_line("benchmark", tmp_path / "none.onnx")
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in error_line("run", "digits", "--device", "cuda", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("synthesis = 3", "synthesis in"),
        ("imags = 64", "did you mean 'synthesis.images'"),
        ("effort = 'bogus'", "effort in"),
        ("finetune." + ".".join("a" * 3000) + " = 1", "nested too deeply"),
        ("[synthesis]\nrecipe = 'papr'", "synthesis.recipe in"),
    ],
)
def test_what_is_wrong_in_a_file_is_found_below_options(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    assert said in error_line("run", "digits", "--config", file, "--images", "64", "--effort", "fast")
    assert said in error_line("run", "digits", "--config", file, "--recipe", "paper")


def test_a_command_that_fails_leaves_the_run_as_it_was(started: Path) -> None:
    assert "run clusterq quantize --bits w8a8 first" in error_line("export", started)  # after the float baseline
    before = (started / "run.toml").read_text()
    assert "does not exist" in error_line("evaluate", started, "--data", started / "nowhere")
    assert "run clusterq export" in error_line("evaluate", started, "--bits", "w3a3")
    assert "--batches" in error_line("benchmark", started, "--batches", "1,x")
    assert "greater than 0" in error_line("benchmark", started, "--batches", "0")
    assert "holds a run of digits" in error_line("run", "resnet18", "--weights", "none", "--out", started)
    assert (started / "run.toml").read_text() == before


def test_data_of_other_classes_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog", "fish"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "data" / name / "1.png")
    message = error_line("run", "digits", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "3 class folders, but the model has 10 classes" in message
    assert not (tmp_path / "out").exists()


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    message = error_line("run", "digits", "--weights", tmp_path / "evil.pth", "--out", tmp_path / "out")
    assert "safetensors" in message
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names of files are Unicode")
def test_a_model_whose_path_is_not_utf8_is_refused(settings: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "net.py").write_text("from clusterq_deploy.models.digits import DigitsNet\n")
    model, fed = f"{folder / 'net.py'}:DigitsNet", ("--input-size", "1,16,16", "--mean", "0", "--std", "1")
    line = error_line("run", model, *fed, "--config", settings, "--out", tmp_path / "out")
    path = str(folder / "net.py")
    assert line == f"Error: model: the path {path!r} is not UTF-8, so that run.toml cannot hold it; rename it"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names of files are Unicode")
def test_a_run_directory_that_is_not_utf8_is_refused_and_one_inside_it_works(settings: Path, tmp_path: Path) -> None:
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
    output_of(*command)
    (first,) = Path("runs").iterdir()
    again = call(*command)
    assert again.exit_code == 0
    assert again.stderr == f"Goes on in {first}, where the same run did not come to its end.\n"
    assert list(Path("runs").iterdir()) == [first]
    (first / "report.html").touch()
    monkeypatch.setattr(time, "strftime", lambda *_: "later")  # a folder is named by the second
    output_of(*command)
    assert {path.name for path in Path("runs").iterdir()} == {first.name, "digits-later"}
    assert call(*command, "--seed", "1").stderr == ""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(settings: Path, tmp_path: Path) -> None:
    """The kernel refuses to let files grow past 20 kB: the settings fit, the images do not."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from cli.main import main; main(sys.argv[1:])\n"
    )
    arguments = ["synthesize", "digits", "--config", str(settings), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *warnings, line = done.stderr.strip().splitlines()
    assert all(warning.startswith("no checkpoint was written: cannot write") for warning in warnings)
    assert line.startswith("Error: cannot write")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {".lock", "manifest.json", "run.toml"}
    output_of(*arguments)  # with room, the same command goes on in the same folder


def test_build_without_tensorrt_says_what_is_missing(tmp_path: Path) -> None:
    from clusterq_deploy.runtimes.tensorrt import unavailable_reason

    if unavailable_reason() is None:
        pytest.skip("TensorRT and a GPU are there")
    (tmp_path / "x.onnx").write_bytes(b"")
    assert "no engine can be built here" in error_line("build", tmp_path / "x.onnx")


def test_the_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"clusterq (\w+)([^`\n]*)", text)
    assert set(main.commands) == {command for command, _ in lines}
    for command, rest in lines:
        known = {name for param in main.commands[command].params for name in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, command
    assert text.index("make demo") < text.index("make test")


def test_the_readmes_python_names_what_is_there() -> None:
    calls, block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    named = {node.attr for node in ast.walk(ast.parse(calls)) if isinstance(node, ast.Attribute)}
    assert named == {"InputSpec", "synthesize", "quantize", "export"}
    assert named <= set(clusterq_deploy.__all__)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "clusterq_deploy":
            assert {alias.name for alias in node.names} <= set(clusterq_deploy.__all__)
    names: dict[str, object] = {}
    exec(block[: block.index("report =")], names)
    assert names["config"] == clusterq_deploy.RunConfig(model="digits")
