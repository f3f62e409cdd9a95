"""`clusterq doctor`: what it finds on this machine, and on broken ones."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from cli import diagnosis, machine, remedies
from cli.diagnosis import Answer, ask, healthy, probe_reason
from cli.machine import Finding, memory_limit
from cli.main import main
from cli.probe import ESSENTIAL, GPU_PROVIDERS

ROOT = Path(__file__).parents[1]


def doctor(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where packages can be broken and streams are real."""
    paths = [environment.pop("PYTHONPATH", ""), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-m", "cli", "doctor", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    """The findings on this machine by name, from the JSON of a real process."""
    done = doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    content = json.loads(done.stdout)
    assert content["healthy"] is True
    return {entry["name"]: Finding(**entry) for entry in content["findings"]}


def test_what_a_run_needs_works_here(found: dict[str, Finding]) -> None:
    essential = {name: finding.state for name, finding in found.items() if finding.essential}
    assert set(essential) == {
        "Python",
        "torch",
        "torchvision",
        "onnx",
        "onnxruntime",
        "clusterq-deploy",
        "ONNX Runtime, CPU",
        "disk for temporary files",
    }
    assert set(essential.values()) <= {"ok", "low"}
    assert found["torch"].found == torch.__version__
    assert all(finding.purpose for finding in found.values())


def test_what_is_missing_says_so_and_what_mends_it(found: dict[str, Finding]) -> None:
    from clusterq_deploy.runtimes.tensorrt import unavailable_reason

    if torch.cuda.is_available():
        assert found["GPU 0"].state == "ok"
    else:
        assert found["GPU"].state in {"absent", "broken"}
        assert found.get("ONNX Runtime, CUDA", found["GPU"]).state != "ok"
    if unavailable_reason() is not None:
        assert found["TensorRT"].state in {"absent", "broken"}
        assert found["TensorRT"].remedy


def test_every_provider_that_is_listed_has_a_row(found: dict[str, Finding]) -> None:
    import onnxruntime

    for provider in onnxruntime.get_available_providers():
        assert "ONNX Runtime, " + provider.removesuffix("ExecutionProvider") in found


def test_the_screen_has_a_row_a_finding_and_a_verdict() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) < 40
    for text in ("Python", "torch", "ONNX Runtime, CPU", "TensorRT", "memory", "disk here", "Runs work here."):
        assert text in result.stdout
    assert "\x1b" not in result.stdout


def test_a_broken_torch_is_a_finding_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    done = doctor("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    assert content["healthy"] is False
    by_name = {entry["name"]: entry for entry in content["findings"]}
    assert by_name["torch"]["state"] == "broken"
    assert "libcudart.so.13" in by_name["torch"]["found"]
    assert by_name["torch"]["remedy"].startswith("pip install")
    assert by_name["clusterq-deploy"]["state"] == "broken"
    assert by_name["memory"]["state"] in {"ok", "low"}  # what needs no torch is looked at all the same


def test_a_missing_dependency_of_the_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError(\"No module named 'jinja2'\", name='jinja2')\n")
    done = doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "No module named 'jinja2'" in done.stdout
    assert "clusterq-deploy: pip install" in done.stdout
    assert "Runs do not work here" in done.stdout


def beside_a_gpu(tmp_path: Path, *args: str, **environment: str) -> tuple[int, dict[str, dict[str, str]], list[str]]:
    """Exit code, findings by name and what is unmet, on a machine whose nvidia-smi answers."""
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    done = doctor("--json", *args, PATH=f"{tool.parent}{os.pathsep}{os.environ['PATH']}", **environment)
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)
    return done.returncode, {entry["name"]: entry for entry in content["findings"]}, content["unmet"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_builds_for_the_cpu_beside_a_gpu_are_told_with_what_mends_them(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import onnxruntime, torch\n"
        "onnxruntime.get_available_providers = lambda: ['CPUExecutionProvider']\n"
        "torch.version.cuda = None\n"
    )
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    code, found, unmet = beside_a_gpu(tmp_path, "--require", "tensorrt", "--require", "gpu", PYTHONPATH=str(tmp_path))
    assert (code, unmet) == (1, ["tensorrt", "gpu"])
    for name in ("ONNX Runtime, CUDA", "ONNX Runtime, Tensorrt"):
        assert found[name]["state"] == "absent"
        assert found[name]["remedy"].endswith("pip install onnxruntime-gpu")
    for name in ("CUDA of torch", "GPU"):
        assert "torch torchvision --index-url https://download.pytorch.org/whl/cu" in found[name]["remedy"]
    assert found["TensorRT"]["state"] == "broken"
    assert "libnvinfer.so.10" in found["TensorRT"]["found"]
    assert found["TensorRT"]["remedy"].startswith("pip install --force-reinstall 'tensorrt>=")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_told(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert remedies.gpu("580.65.06", "13.0") == f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"


def test_a_missing_gpu_says_what_can_be_done_without(found: dict[str, Finding]) -> None:
    if found.get("GPU", Finding("", "ok", "", "")).state == "absent":
        assert "--effort fast" in str(found["GPU"].remedy)


def test_what_is_required_is_met_by_what_works_alone() -> None:
    assert {f"--require={name}" for name in diagnosis.REQUIRABLE} == {
        f"--require={name}"
        for param in main.commands["doctor"].params
        if param.name == "require"
        for name in param.type.choices
    }
    there = [Finding("GPU 0", "broken", "", ""), Finding("GPU 1", "ok", "", ""), Finding("TensorRT", "broken", "", "")]
    assert diagnosis.unmet(there, ("gpu", "tensorrt", "timm")) == ["tensorrt", "timm"]
    assert diagnosis.unmet(there[:1], ("gpu",)) == ["gpu"]
    assert diagnosis.unmet([], ()) == []


def test_a_near_match_of_what_is_required_is_refused() -> None:
    result = CliRunner().invoke(main, ["doctor", "--require", "tensort"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'tensorrt'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (finding,) = machine.disk("disk here", tmp_path)
    assert (finding.state, finding.essential) == ("broken", False)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (here,) = machine.disk("disk here", tmp_path / "gone")
    (temporary,) = machine.disk("temporary", tmp_path / "gone", temporary=True)
    assert here.state == temporary.state == "broken"
    assert "No such file" in here.found
    assert healthy([here])
    assert not healthy([temporary])


def test_the_limit_of_a_container_is_read(tmp_path: Path) -> None:
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


def test_each_process_loads_what_it_answers_for_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    notes = tmp_path / "notes"
    done = doctor("--json", PYTHONPATH=str(tmp_path), NOTES=str(notes))
    assert done.returncode == 0, done.stderr
    loaded = [json.loads(line) for line in notes.read_text().splitlines()]
    by_part = dict(loaded)
    assert len(loaded) == len(by_part) == 1 + len(by_part.keys() & {*ESSENTIAL, *GPU_PROVIDERS, "tensorrt"})
    assert by_part["--json"] == []  # the doctor itself
    assert by_part["torchvision"] == ["torch", "torchvision", "numpy"]
    assert by_part["runtime"] == ["onnx", "onnxruntime", "numpy"]
    assert "torchvision" not in by_part["library"]


@pytest.mark.slow
def test_a_part_that_hangs_is_killed_at_its_limit_and_what_it_said_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    answer = ask("runtime", limit=10)
    assert psutil.Process().children() == []
    assert [(own.name, own.state) for own in answer.findings] == [("onnx", "ok")]
    onnx, runtime, on_cpu = diagnosis._answered("runtime", answer)
    assert onnx.state == "ok"
    assert runtime == replace(ESSENTIAL["runtime"][1], state="broken", found="gives no answer in 10 s")
    assert (on_cpu.name, on_cpu.found) == ("ONNX Runtime, CPU", "gives no answer in 10 s")
    assert not healthy([onnx, runtime, on_cpu])


def test_a_part_that_crashes_after_all_that_is_essential_is_told() -> None:
    said = [replace(row, state="ok") for row in ESSENTIAL["library"]]
    *_, last = diagnosis._answered("library", Answer(said, "crashes with signal 11"))
    assert (last.name, last.state, last.found) == ("torch and clusterq-deploy", "broken", "crashes with signal 11")
    assert healthy([*said, last])


def test_a_probe_tells_why_a_provider_does_not_load() -> None:
    assert probe_reason(-11, "") == "crashes with signal 11"
    log = (
        "\x1b[1;31m2026-01-01 [E:onnxruntime:Default, provider_bridge_ort.cc:1 TryGetProviderInfo_CUDA] /a/b.cc:2 X "
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open\x1b[m\n"
        "ONNX Runtime fell back to CPUExecutionProvider\n"
    )
    assert probe_reason(1, log) == "libcublasLt.so.12: cannot open"


@pytest.mark.parametrize(
    ("driver", "torch_index", "tensorrt"),
    [("580.65.06", "cu130", "clusterq-deploy[tensorrt]"), ("550.54.14", "cu126", "tensorrt-cu12>=10.3")],
)
def test_what_is_to_be_installed_is_of_the_cuda_that_the_driver_runs(
    driver: str, torch_index: str, tensorrt: str
) -> None:
    assert remedies.cuda_torch(driver).endswith(f"--index-url https://download.pytorch.org/whl/{torch_index}")
    assert remedies.gpu(driver, None) == remedies.cuda_torch(driver)
    assert tensorrt in remedies.tensorrt(driver, again=False)
    assert remedies.tensorrt(driver, again=True).startswith("pip install --force-reinstall 'tensorrt")


def test_a_driver_that_is_too_old_is_to_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    old = "470.256.02"
    for remedy in (
        remedies.cuda_torch(old),
        remedies.tensorrt(old, again=True),
        remedies.gpu(old, "12.6"),
    ):
        assert remedy.startswith("update the NVIDIA driver to 525")
    between = remedies.gpu("550.54.14", "13.0")
    assert between.startswith("update the NVIDIA driver to 580")
    assert between.endswith("whl/cu126")
    assert "nvidia-smi" in remedies.gpu("580.65.06", "13.0")


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
    ("version", "builder", "found", "remedy"),
    [
        ("10.9.0", "starts", None, None),
        ("10.9.0", "crashes", "crashes with signal 11", "pip install --force-reinstall"),
        ("10.9.0", "fails", "TensorRT cannot start the builder; pybind11::init()", "pip install --force-reinstall"),
        ("10.1.0", "starts", "tensorrt 10.1.0 is too old", "pip install --force-reinstall 'tensorrt>=10.3'"),
    ],
)
def test_tensorrt_is_there_where_its_builder_starts(
    version: str,
    builder: str,
    found: str | None,
    remedy: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tensorrt.py").write_text(TENSORRT)
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    for name, value in {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TENSORRT": version, "BUILDER": builder}.items():
        monkeypatch.setenv(name, value)
    finding = diagnosis._tensorrt(ask("tensorrt"), driver=None)
    if found is None or remedy is None:
        assert finding == Finding("TensorRT", "ok", version, "engines")
    else:
        assert finding.state == "broken"
        assert found in finding.found
        assert str(finding.remedy).startswith(remedy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU_PROVIDERS)
def test_providers_are_tried_where_a_driver_is_and_say_why_they_do_not_load(name: str) -> None:
    (finding,) = diagnosis._of_provider(name, ask(name))
    assert finding.name == GPU_PROVIDERS[name].name
    assert finding.state in {"absent", "broken"}
    assert "no GPU for it" not in finding.found
    assert str(finding.remedy).startswith("pip ")
