"""The commands, as a person calls them: exit code, output, files."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, call, error_line, json_of, output_of

from cli.main import main


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
def test_stage_commands_add_up_to_a_run(settings: Path, tmp_path: Path) -> None:
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
    assert (synthetic["images"], real["images"]) == (80, 100)
    assert synthetic["silhouette"] == report["features"]["synthetic"]["silhouette"]
    assert "digits, held out" in output_of("features", out)
    for variant in report["variants"]:
        assert variant["accuracy"]
        assert variant["latency"]
    graph = out / "w4a8/model.ort.onnx"  # which says how its input is made
    row, *_ = json_of("evaluate", graph, "--limit", 100)
    assert row["top1"] == report["variants"][1]["accuracy"][1]["top1"]
    assert json_of("benchmark", graph, "--batches", "1")[0]["median_ms"] > 0


def test_models_lists_available_models() -> None:
    names = [entry["name"] for entry in json_of("models")]
    assert names[0] == "digits"
    assert {"resnet18", "mobilenet_v2"} <= set(names)
    assert "digits" in output_of("models")


def test_synthesize_options_override_config_and_run_toml_has_both(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output_of("synthesize", "digits", "--config", settings, "--images", "20", "--seed", "5", "--out", out)
    text = (out / "run.toml").read_text()
    for line in ("images = 20", "seed = 5", "steps = 12"):
        assert line in text
    assert "effort" not in text  # which was not given


def test_commands_refuse_wrong_input_in_one_line(tmp_path: Path) -> None:
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
    assert "is not a run directory" in error_line("quantize", tmp_path)
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
def test_run_refuses_wrong_settings_of_a_file_under_options(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    assert said in error_line("run", "digits", "--config", file, "--images", "64", "--effort", "fast")
    assert said in error_line("run", "digits", "--config", file, "--recipe", "paper")


def test_failed_commands_leave_run_toml_as_it_was(run_copy: Path) -> None:
    before = (run_copy / "run.toml").read_text()
    for said, arguments in {
        "run clusterq quantize --bits w3a3 first": ("export", run_copy, "--bits", "w3a3"),
        "does not exist": ("evaluate", run_copy, "--data", run_copy / "nowhere"),
        "run clusterq export": ("evaluate", run_copy, "--bits", "w3a3"),
        "--batches": ("benchmark", run_copy, "--batches", "1,x"),
        "greater than 0": ("benchmark", run_copy, "--batches", "0"),
        "holds a run of digits": ("run", "resnet18", "--weights", "none", "--out", run_copy),
    }.items():
        assert said in error_line(*arguments)
        assert (run_copy / "run.toml").read_text() == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names of files are Unicode")
def test_run_refuses_a_model_path_that_is_not_utf8(settings: Path, tmp_path: Path) -> None:
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
def test_synthesize_refuses_an_out_that_is_not_utf8_and_works_inside_one(settings: Path, tmp_path: Path) -> None:
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
def test_synthesize_without_out_goes_on_in_the_unfinished_run(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("synthesize", "digits", "--config", settings)
    output_of(*command)
    (first,) = Path("runs").iterdir()
    again = call(*command)
    assert again.exit_code == 0
    assert again.stderr == f"Resuming the unfinished run in {first}.\n"
    assert list(Path("runs").iterdir()) == [first]
    (first / "report.html").touch()
    monkeypatch.setattr(time, "strftime", lambda *_: "later")  # a folder is named by the second
    output_of(*command)
    assert {path.name for path in Path("runs").iterdir()} == {first.name, "digits-later"}
    assert call(*command, "--seed", "1").stderr == ""


def test_build_without_tensorrt_says_what_is_missing(tmp_path: Path) -> None:
    from clusterq_deploy.runtimes.tensorrt import unavailable_reason

    if unavailable_reason() is None:
        pytest.skip("TensorRT and a GPU are there")
    (tmp_path / "x.onnx").write_bytes(b"")
    assert "no engine can be built here" in error_line("build", tmp_path / "x.onnx")
