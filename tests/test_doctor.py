"""`clusterq doctor`: what it finds on this machine, and on broken ones."""

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from support import ROOT, call, error_line, run_python

from cli.doctor import (
    REQUIRABLE,
    _with_remedy,
    disk,
    healthy,
    memory_limit,
    missing_findings,
    probe_reason,
    run_probe,
    unmet,
)
from cli.main import main
from cli.probe import ESSENTIAL, GPU_PROVIDERS, Finding, gpu_remedy, tensorrt_remedy, torch_remedy


def doctor(*options: str, modules: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own, which finds the modules of a folder before all others."""
    paths = f"{modules}{os.pathsep}{ROOT}"
    return run_python("-m", "cli", "doctor", *options, **{"PYTHONPATH": paths, **environment})


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """Return the findings on this machine by name, from the JSON of a real process."""
    done = doctor("--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    content = json.loads(done.stdout)
    assert content["healthy"] is True
    return {entry["name"]: Finding(**entry) for entry in content["findings"]}


def test_doctor_finds_that_what_a_run_needs_works(findings: dict[str, Finding]) -> None:
    packages = {row.name for rows in ESSENTIAL.values() for row in rows}
    essential = {name: finding.state for name, finding in findings.items() if finding.essential}
    assert set(essential) == {"Python", "disk for temporary files", *packages}
    assert set(essential.values()) <= {"ok", "low"}
    assert findings["torch"].found == torch.__version__
    assert all(finding.purpose for finding in findings.values())


def test_doctor_says_what_is_missing_and_what_fixes_it(findings: dict[str, Finding]) -> None:
    from clusterq_deploy.runtimes.tensorrt import unavailable_reason

    if torch.cuda.is_available():
        assert findings["GPU 0"].state == "ok"
    else:
        assert findings["GPU"].state in {"absent", "broken"}
        assert findings["GPU"].state == "broken" or "--effort fast" in str(findings["GPU"].remedy)
        assert findings.get("ONNX Runtime, CUDA", findings["GPU"]).state != "ok"
    if unavailable_reason() is not None:
        assert findings["TensorRT"].state in {"absent", "broken"}
        assert findings["TensorRT"].remedy


def test_doctor_has_a_row_for_every_provider_that_is_listed(findings: dict[str, Finding]) -> None:
    import onnxruntime

    for provider in onnxruntime.get_available_providers():
        assert "ONNX Runtime, " + provider.removesuffix("ExecutionProvider") in findings


def test_doctor_shows_a_row_per_finding_and_a_verdict() -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) < 40
    for text in ("Python", "torch", "ONNX Runtime, CPU", "TensorRT", "memory", "disk here", "Runs work here."):
        assert text in result.stdout
    assert "\x1b" not in result.stdout


def test_doctor_reports_a_broken_torch_and_looks_at_the_rest(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    done = doctor("--json", modules=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    assert content["healthy"] is False
    by_name = {entry["name"]: entry for entry in content["findings"]}
    assert by_name["torch"]["state"] == by_name["clusterq-deploy"]["state"] == "broken"
    assert "libcudart.so.13" in by_name["torch"]["found"]
    assert by_name["torch"]["remedy"].startswith("pip install")
    assert by_name["memory"]["state"] in {"ok", "low"}


def test_doctor_names_a_missing_dependency_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError(\"No module named 'jinja2'\", name='jinja2')\n")
    done = doctor(modules=tmp_path)
    assert done.returncode == 1, done.stderr
    for text in ("No module named 'jinja2'", "clusterq-deploy: pip install", "Runs do not work here"):
        assert text in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_finds_builds_for_the_cpu_on_a_machine_with_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text(
        "import onnxruntime, torch\n"
        "onnxruntime.get_available_providers = lambda: ['CPUExecutionProvider']\n"
        "torch.version.cuda = None\n"
    )
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = doctor("--json", "--require", "tensorrt", "--require", "gpu", modules=tmp_path, PATH=path)
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    assert (done.returncode, content["unmet"]) == (1, ["tensorrt", "gpu"])
    found = {entry["name"]: entry for entry in content["findings"]}
    for row in GPU_PROVIDERS.values():
        assert found[row.name]["state"] == "absent"
        assert found[row.name]["remedy"].endswith("pip install onnxruntime-gpu")
    for name in ("CUDA of torch", "GPU"):
        assert "torch torchvision --index-url https://download.pytorch.org/whl/cu" in found[name]["remedy"]
    assert found["TensorRT"]["state"] == "broken"
    assert "libnvinfer.so.10" in found["TensorRT"]["found"]
    assert found["TensorRT"]["remedy"].startswith("pip install --force-reinstall 'tensorrt>=")


def test_unmet_names_what_no_finding_says_to_work() -> None:
    (param,) = (param for param in main.commands["doctor"].params if param.name == "require")
    assert list(param.type.choices) == list(REQUIRABLE)
    there = [Finding("GPU 0", "broken", "", ""), Finding("GPU 1", "ok", "", ""), Finding("TensorRT", "broken", "", "")]
    assert unmet(there, ("gpu", "tensorrt", "timm")) == ["tensorrt", "timm"]
    assert unmet(there[:1], ("gpu",)) == ["gpu"]
    assert unmet([], ()) == []
    assert "'tensorrt'" in error_line("doctor", "--require", "tensort")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_disk_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (finding,) = disk(tmp_path)
    assert (finding.state, finding.essential) == ("broken", False)


def test_disk_of_a_folder_that_is_not_there_is_essential_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    (here,), (temporary,) = disk(tmp_path / "gone"), disk()
    assert here.state == temporary.state == "broken"
    assert "No such file" in here.found
    assert healthy([here])
    assert not healthy([temporary])


def test_memory_limit_of_a_container(tmp_path: Path) -> None:
    limited, free = tmp_path / "memory.max", tmp_path / "free"
    limited.write_text("1073741824\n")
    free.write_text("max\n")
    assert memory_limit((str(tmp_path / "gone"), str(limited))) == 2**30
    assert memory_limit((str(free), str(limited))) is None
    assert memory_limit(()) is None


# in every process of the doctor: notes what it was asked, and at its end what it has loaded
NOTES = """
import atexit, json, os, sys
heavy = ("torch", "torchvision", "onnx", "onnxruntime", "clusterq_deploy", "calib", "numpy")
def note():
    what = [part for part in heavy if part in sys.modules]
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([sys.orig_argv[-1], what]) + "\\n")
atexit.register(note)
"""


def test_doctor_processes_load_only_what_they_answer_for(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    notes = tmp_path / "notes"
    done = doctor("--json", modules=tmp_path, NOTES=str(notes))
    assert done.returncode == 0, done.stderr
    loaded = [json.loads(line) for line in notes.read_text().splitlines()]
    by_part = dict(loaded)
    assert len(loaded) == len(by_part) == 1 + len(by_part.keys() & {*ESSENTIAL, *GPU_PROVIDERS, "tensorrt", "rtx"})
    assert by_part["--json"] == []  # the doctor itself
    assert by_part["torchvision"] == ["torch", "torchvision", "numpy"]
    assert by_part["runtime"] == ["onnx", "onnxruntime", "numpy"]
    assert "torchvision" not in by_part["library"]


@pytest.mark.slow
def test_run_probe_kills_a_part_that_hangs_and_keeps_its_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    onnx, *owed = run_probe("runtime", limit=10)
    assert psutil.Process().children() == []
    assert (onnx.name, onnx.state) == ("onnx", "ok")
    assert owed == [replace(row, found="no answer within 10 s") for row in ESSENTIAL["runtime"][1:]]
    assert not healthy([onnx, *owed])


def test_missing_findings_reports_a_crash_after_all_essential_rows() -> None:
    said = [replace(row, state="ok") for row in ESSENTIAL["library"]]
    (last,) = missing_findings("library", said, "crashes with signal 11")
    assert (last.name, last.state, last.found) == ("torch and clusterq-deploy", "broken", "crashes with signal 11")
    assert healthy([*said, last])


def test_probe_reason_is_what_onnx_runtime_logged() -> None:
    assert probe_reason(-11, "") == "crashes with signal 11"
    log = (
        "\x1b[1;31m2026-01-01 [E:onnxruntime:Default, provider_bridge_ort.cc:1 TryGetProviderInfo_CUDA] /a/b.cc:2 X "
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open\x1b[m\n"
        "ONNX Runtime fell back to CPUExecutionProvider\n"
    )
    assert probe_reason(1, log) == "libcublasLt.so.12: cannot open"


@pytest.mark.parametrize(
    ("remedy", "expected"),
    [
        (torch_remedy("580.65.06"), "torch torchvision --index-url https://download.pytorch.org/whl/cu130"),
        (torch_remedy("550.54.14"), "torch torchvision --index-url https://download.pytorch.org/whl/cu126"),
        (gpu_remedy("550.54.14", None), torch_remedy("550.54.14")),
        (tensorrt_remedy("580.65.06", again=False), "clusterq-deploy[tensorrt]"),
        (tensorrt_remedy("550.54.14", again=False), "pip install 'tensorrt-cu12>=10.3'"),
        (tensorrt_remedy("550.54.14", again=True), "pip install --force-reinstall 'tensorrt-cu12>=10.3'"),
        (torch_remedy("470.256.02"), "update the NVIDIA driver to 525"),
        (tensorrt_remedy("470.256.02", again=True), "update the NVIDIA driver to 525"),
    ],
)
def test_remedies_fit_the_cuda_release_of_the_driver(remedy: str, expected: str) -> None:
    assert expected in remedy


def test_gpu_remedy_names_what_hides_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu_remedy("580.65.06", "13.0") == f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_remedy("470.256.02", "12.6").startswith("update the NVIDIA driver to 525")
    between = gpu_remedy("550.54.14", "13.0")
    assert between.startswith("update the NVIDIA driver to 580")
    assert between.endswith("whl/cu126")
    assert "nvidia-smi" in gpu_remedy("580.65.06", "13.0")


# a TensorRT whose builder does as a variable of the environment says
TENSORRT = """
import os
__version__ = os.environ["TENSORRT"]
class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)
def Builder(logger):
    if os.environ["BUILDER"] == "crashes":
        os.kill(os.getpid(), 11)
    if os.environ["BUILDER"] == "fails":
        raise TypeError("pybind11::init(): factory function returned nullptr")
    return object()
"""


@pytest.mark.parametrize(
    ("version", "builder", "reason"),
    [
        ("10.9.0", "starts", None),
        ("10.9.0", "crashes", "crashes with signal 11"),
        ("10.9.0", "fails", "TensorRT cannot start the builder; pybind11::init()"),
        ("10.1.0", "starts", "tensorrt 10.1.0 is too old"),
    ],
)
def test_run_probe_tensorrt_is_ok_if_its_builder_starts(
    version: str, builder: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(TENSORRT)
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    for name, value in {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TENSORRT": version, "BUILDER": builder}.items():
        monkeypatch.setenv(name, value)
    finding = _with_remedy(run_probe("tensorrt"), driver=None)
    if reason is None:
        assert finding == Finding("TensorRT", "ok", version, "engines")
    else:
        assert finding.state == "broken"
        assert reason in finding.found
        assert finding.remedy == "pip install --force-reinstall 'tensorrt>=10.3'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU_PROVIDERS)
def test_run_probe_of_a_provider_says_why_it_does_not_load(name: str) -> None:
    (finding,) = run_probe(name)
    assert finding.name == GPU_PROVIDERS[name].name
    assert finding.state in {"absent", "broken"}
    assert "no GPU for it" not in finding.found
    assert str(finding.remedy).startswith("pip ")
