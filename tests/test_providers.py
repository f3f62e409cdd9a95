"""ONNX Runtime's GPU providers: their options, and what is said if their libraries are not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from support import run_python

from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import ExportError
from clusterq_deploy.results.report import Artifact, Skipped
from clusterq_deploy.results.stages import ExportResult
from clusterq_deploy.run.run import EVALUATION_BATCH
from clusterq_deploy.runtimes import runners
from clusterq_deploy.runtimes.runners import OnnxRunner, Placement, provider_list
from clusterq_deploy.stages import deployables
from clusterq_deploy.stages.deployables import left_to_others, open_provider, opened, run_graphs_on_gpu

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the providers may load where there is a GPU")


def graph(batch: int | str = "batch") -> onnx.ModelProto:
    shapes = f"(float[{batch}, 3, 4, 5] images) => (float[{batch}, 60] logits)"
    text = f'<ir_version: 10, opset_import: ["" : 21]> flat {shapes} {{ logits = Flatten(images) }}'
    return onnx.parser.parse_model(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w8a8" / "model.trt.onnx"
    path.parent.mkdir()
    onnx.save(graph(), path)
    return path


def test_provider_list_has_one_profile_for_all_batches_and_cuda_after_tensorrt(file: Path) -> None:
    (tensorrt, options), cuda = provider_list("onnxruntime-tensorrt", file, (1, 8, 32))
    assert (tensorrt, cuda) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options == {
        "trt_profile_min_shapes": "images:1x3x4x5",
        "trt_profile_opt_shapes": "images:8x3x4x5",
        "trt_profile_max_shapes": "images:32x3x4x5",
    }
    assert provider_list("onnxruntime-cuda", file, (1, 8, 32)) == ["CUDAExecutionProvider"]


@pytest.mark.parametrize(("batch", "sizes"), [(8, (1, 8, 32)), ("batch", None)])
def test_provider_list_has_no_profile_for_a_fixed_batch_or_unknown_sizes(
    batch: int | str, sizes: tuple[int, int, int] | None
) -> None:
    assert provider_list("onnxruntime-tensorrt", graph(batch).SerializeToString(), sizes)[0][1] == {}


@needs_no_gpu
@pytest.mark.parametrize(
    ("runtime", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")],
)
def test_onnx_runner_names_the_libraries_that_a_provider_lacks(
    runtime: str, provider: str, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if provider not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime without GPU providers is installed")
    with pytest.raises(ExportError) as caught:
        OnnxRunner(file, runtime=runtime, optimized=False, batch=(1, 2, 4))
    message = str(caught.value)
    assert message.startswith(f"ONNX Runtime has no working {provider} here: lib")
    assert "cannot open shared object file" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")  # neither ONNX Runtime's fallback nor its logger says it again


def test_load_problem_names_the_release_of_tensorrt_that_a_provider_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(runners.ctypes, "CDLL", refuse)
    problem = runners.load_problem("TensorrtExecutionProvider") or ""
    assert problem.endswith("directory; it needs TensorRT 10: pip install 'tensorrt==10.*'")


def test_onnx_runner_names_a_build_without_the_provider(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="this ONNX Runtime has no CUDAExecutionProvider; install onnxruntime-gpu"):
        OnnxRunner(file, runtime="onnxruntime-cuda")


def test_infer_raises_an_error_of_one_line(file: Path) -> None:
    with (
        OnnxRunner(file) as runner,
        pytest.raises(ExportError, match=r"^onnxruntime-cpu cannot run the graph: .*dimensions"),
    ):
        runner.infer(np.zeros((1, 2, 4, 5), np.float32))


def run_on(device: str, path: Path) -> Any:
    """Return as much of a run as opens the graphs."""
    return SimpleNamespace(
        device=torch.device(device),
        directory=SimpleNamespace(path=path),
        config=RunConfig(model="digits"),
        model=SimpleNamespace(input=SimpleNamespace(size=(3, 4, 5))),
    )


def exported(name: str) -> ExportResult:
    own = [Artifact(kind="onnx", target="onnxruntime", path=name, size_bytes=0)]
    return ExportResult(artifacts=[*own, *(artifact.model_copy(update={"target": "tensorrt"}) for artifact in own)])


def test_provider_runners_ask_for_a_profile_with_every_batch_of_the_run(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are built for the batches to be timed; a provider takes those of the evaluation too."""
    asked = []

    def refuse(path: Path, **options: object) -> None:
        asked.append((path.name, options))
        raise ExportError("not here")

    monkeypatch.setattr(deployables, "OnnxRunner", refuse)
    list(opened(run_graphs_on_gpu(run_on("cuda", file.parents[1]), {"w8a8": exported("w8a8/model.trt.onnx")})))
    assert [options["runtime"] for _, options in asked] == ["onnxruntime-cuda", "onnxruntime-tensorrt"]
    assert [options["optimized"] for _, options in asked] == [True, False]
    assert {options["batch"] for _, options in asked} == {(1, 8, EVALUATION_BATCH)}


def test_placement_counts_the_nodes_that_a_provider_took(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("ONNX Runtime tells from 1.24 on")
    monkeypatch.setitem(runners.PROVIDERS, "onnxruntime-cuda", "CPUExecutionProvider")  # which is everywhere
    with OnnxRunner(file, runtime="onnxruntime-cuda") as runner:
        assert runner.placement() == Placement(1, 1, ())
        monkeypatch.undo()
        assert runner.placement() == Placement(0, 1, ("Flatten",))
        monkeypatch.setattr(runner, "_session", object())  # of an older ONNX Runtime
        assert runner.placement() is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (None, None),
        (Placement(9, 9, ()), None),
        (Placement(7, 9, ("Shape", "Gather")), None),
        (Placement(5, 9, ("Add", "Conv")), "it takes 5 of the 9 nodes of model.trt.onnx, and leaves Conv to others"),
        (Placement(0, 9, ("Add",)), "onnxruntime-cuda takes none of the 9 nodes of model.trt.onnx"),
    ],
)
def test_open_provider_names_what_is_left_to_others(
    place: Placement | None, message: str | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runners.PROVIDERS, "onnxruntime-cuda", "CPUExecutionProvider")
    monkeypatch.setattr(OnnxRunner, "placement", lambda _: place)
    if place is not None and not place.taken:
        with pytest.raises(ExportError, match=message):
            open_provider(file, "onnxruntime-cuda", (1, 2, 4))
        return
    with open_provider(file, "onnxruntime-cuda", (1, 2, 4)) as runner:
        assert left_to_others(runner, file.name) == message
        assert runner.infer(np.zeros((2, 3, 4, 5), np.float32)).shape == (2, 60)


@needs_no_gpu
def test_run_graphs_on_gpu_skips_once_what_cannot_load(file: Path) -> None:
    exports = {name: exported("w8a8/model.trt.onnx") for name in ("fp32", "w8a8")}
    skipped = list(opened(run_graphs_on_gpu(run_on("cuda", file.parents[1]), exports)))
    assert [e.stage for e in skipped if isinstance(e, Skipped)] == ["onnxruntime-cuda", "onnxruntime-tensorrt"]
    for entry in skipped:
        assert isinstance(entry, Skipped)
        assert entry.reason.startswith(("ONNX Runtime has no working", "this ONNX Runtime has no"))


def test_run_graphs_on_gpu_tries_no_provider_on_the_cpu(file: Path) -> None:
    assert run_graphs_on_gpu(run_on("cpu", file.parents[1]), {"fp32": exported("none.onnx")}) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
def test_run_graphs_on_gpu_compute_what_the_cpu_computes(file: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    graphs = run_graphs_on_gpu(run_on("cuda", file.parents[1]), {"w8a8": exported("w8a8/model.trt.onnx")})
    for item in opened(graphs):
        if not isinstance(item, Skipped):
            with item[1] as runner:
                np.testing.assert_allclose(runner.infer(images), images.reshape(3, -1))


RUNS = """
import numpy as np
from cli.probe import graph
from clusterq_deploy import OnnxRunner
with OnnxRunner(graph()) as runner:
    print(runner.infer(np.ones((1, 1, 3, 3), np.float32)).item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-c", RUNS], ["-m", "cli", "doctor"]], ids=["library", "doctor"])
def test_onnx_runtime_keeps_no_telemetry(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is on, it has a database in the user's cache."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    done = run_python(*command, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "9.0" in done.stdout or "Runs work here." in done.stdout
    assert not [path for path in tmp_path.rglob("*") if "microsoft" in path.name.lower()]
