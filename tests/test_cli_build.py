"""`clusterq build` through a double of TensorRT: what its options become, and what a run's engines are."""

import functools
import json
import tomllib
from pathlib import Path

import onnx
import pytest
import tomli_w
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto
from tensorrt_double import World, install
from test_pipeline import SMALL

from cli.main import main
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.lowering import annotate, export_graph, lower
from clusterq_deploy.models import load_model
from clusterq_deploy.quantization import BitWidths, calibrate, make_student
from clusterq_deploy.runtimes import tensorrt as engine

BOTH = (".engine", ".fp16.engine")


@pytest.fixture(scope="module")
def exported() -> bytes:
    """The bundled model in W8A8, lowered for TensorRT."""
    model = load_model("digits", device=torch.device("cpu"))
    student = make_student(model.module, BitWidths(8, 8))
    images = torch.randn(32, *model.input.size, generator=torch.Generator().manual_seed(0))
    calibrate(student, images, batch_size=16, rng=torch.Generator().manual_seed(0))
    made = lower(export_graph(student, model.input.size), student, "tensorrt")
    named = {"model": model.slug, "source": model.source, "variant": "w8a8", "inputs": model.input}
    return annotate(made, **named, provenance={}).SerializeToString()


@pytest.fixture
def graph(exported: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported)
    return path


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_a_files_engine_lies_beside_it(world: World, graph: Path) -> None:
    done = call("build", graph, "--json")
    assert done.exit_code == 0, done.output
    row, _ = json.loads(done.stdout)
    assert row["engine"] == str(graph.with_suffix(".engine"))
    assert row["size_bytes"] == graph.with_suffix(".engine").stat().st_size
    assert engine.read_sidecar(graph.with_suffix(".engine")).options == engine.BuildConfig()


def test_a_files_engine_has_its_fp16_baseline_beside_it(world: World, graph: Path) -> None:
    done = call("build", graph, "--json")
    assert [row["engine"] for row in json.loads(done.stdout)] == [str(graph.with_suffix(s)) for s in BOTH]
    quantized, baseline = (engine.read_sidecar(graph.with_suffix(suffix)) for suffix in BOTH)
    assert (baseline.source, baseline.source_sha256) == (quantized.source, quantized.source_sha256)
    assert (quantized.derived, baseline.derived) == (False, True)
    assert world.parsed[0] == graph.read_bytes()
    built = onnx.load_model_from_string(world.parsed[1]).graph
    assert "QuantizeLinear" not in {node.op_type for node in built.node}
    assert {own.data_type for own in built.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    assert sorted(own.name for own in graph.parent.iterdir() if own.suffix == ".onnx") == ["net.onnx"]


def test_a_file_that_has_no_fp16_baseline_has_its_engine(
    world: World, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.load(graph)
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    model.graph.node.append(onnx.helper.make_node("Cast", [first.output[0]], ["seen"], to=TensorProto.FLOAT))
    onnx.save(model, graph)
    done = call("build", graph, "--json")
    assert [row["engine"] for row in json.loads(done.stdout)] == [str(graph.with_suffix(".engine"))]
    assert f"{graph} has no FP16 baseline: the integers of" in caplog.text


@pytest.mark.slow
def test_a_file_is_timed_and_evaluated_with_the_engines_that_were_built_from_it(
    world: World, graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "TensorRTRunner", functools.partial(engine.TensorRTRunner, device="cpu"))
    world.input_shape, world.classes = (-1, 1, 32, 32), 10
    assert call("build", graph).exit_code == 0
    graph.with_name("other.onnx").write_bytes(graph.read_bytes())
    assert call("build", graph.with_name("other.onnx")).exit_code == 0
    engines = [str(graph.with_suffix(suffix)) for suffix in sorted(BOTH)]

    timed = json.loads(call("benchmark", graph, "--batches", "2", "--threads", "1", "--json").stdout)
    cpu = ("onnxruntime-cpu", str(graph), 1)
    assert [(row["runtime"], row["graph"], row.get("threads")) for row in timed] == [
        cpu,
        *[("tensorrt", own, None) for own in engines],
    ]
    assert all(f"--loadEngine={row['graph']}" in row["trtexec"] for row in timed[1:])
    assert "onnxruntime-cuda is left out: " in caplog.text  # torch believes in a GPU, ONNX Runtime does not
    alone = json.loads(call("benchmark", engines[0], "--batches", "2", "--json").stdout)
    assert [row["graph"] for row in alone] == engines[:1]

    own = str(graph.with_suffix(".engine"))
    found = json.loads(call("evaluate", graph, "--limit", "60", "--json").stdout)
    assert [(row["runtime"], row["graph"]) for row in found] == [("onnxruntime-cpu", str(graph)), ("tensorrt", own)]
    assert all(row["images"] == 60 for row in found)
    assert found[0]["top1"] > 95 > found[1]["top1"]  # the double knows no digits
    assert json.loads(call("evaluate", own, "--limit", "60", "--json").stdout) == found[1:]

    graph.write_bytes(graph.read_bytes() + b"\x0a\x00")  # an unknown field: the same graph, another file
    assert call("evaluate", own).exit_code == 2
    caplog.clear()
    timed = json.loads(call("benchmark", graph, "--batches", "2", "--threads", "1", "--json").stdout)
    assert [row["runtime"] for row in timed] == ["onnxruntime-cpu"]
    assert f"{own} was built from an earlier net.onnx; build it again" in caplog.text


def test_an_engine_that_cannot_be_measured_is_left_out_of_its_graphs_measurements(
    world: World, graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "TensorRTRunner", functools.partial(engine.TensorRTRunner, device="cpu"))
    world.input_shape = (-1, 1, 32, 32)
    assert call("build", graph, "--batch", "1:1:1").exit_code == 0
    graph.with_name("foreign.engine").write_bytes(b"of another tool")
    timed = call("benchmark", graph, "--batches", "2", "--threads", "1", "--json")
    assert [row["runtime"] for row in json.loads(timed.stdout)] == ["onnxruntime-cpu"]
    assert "foreign.engine is left out: cannot read" in caplog.text
    assert f"{graph.with_suffix('.engine')} is left out: batch is 2; the engine takes 1 to 1 images" in caplog.text
    assert call("benchmark", graph.with_suffix(".engine"), "--batches", "2").exit_code == 2


def test_the_baseline_does_not_take_the_place_of_another_engine(
    world: World, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = graph.with_name("net.fp16.onnx")
    other.write_bytes(graph.read_bytes())
    assert call("build", other).exit_code == 0
    done = call("build", graph, "--json")
    assert [row["engine"] for row in json.loads(done.stdout)] == [str(graph.with_suffix(".engine"))]
    assert "net.fp16.engine was built from net.fp16.onnx, and stays; move it away" in caplog.text
    assert call("evaluate", graph.with_name("net.fp16.fp16.engine")).exit_code == 2


def test_a_graph_that_fixes_its_batch_is_timed_at_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", [4, 3, 2, 2]), ("logits", [4, 12]))
    ]
    node = onnx.helper.make_node("Flatten", ["images"], ["logits"])
    made = onnx.helper.make_graph([node], "foreign", ends[:1], ends[1:])
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    (row,) = json.loads(call("benchmark", path, "--json").stdout)
    assert row["batch"] == 4
    assert f"{path} fixes the batch at 4, which alone is timed" in caplog.text


def test_batch_sizes_do_not_count_for_a_graph_that_fixes_its_batch(
    world: World, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.input_shape = (4, 3, 4, 4)
    assert call("build", graph, "--batch", "1:2:16").exit_code == 0
    assert f"{graph} fixes the batch at 4; the batch sizes (1, 2, 16) do not count" in caplog.text
    assert engine.read_sidecar(graph.with_suffix(".engine")).options.batch == (4, 4, 4)
    assert world.profiles == {}
    caplog.clear()
    assert call("build", graph).exit_code == 0
    assert "fixes the batch" not in caplog.text


def test_options_become_the_configuration(world: World, graph: Path, tmp_path: Path) -> None:
    options = ["--batch", "2:4:16", "--workspace", "512MiB", "--optimization-level", "4", "--hardware-compatible"]
    done = call("build", graph, *options, "--version-compatible", "--timing-cache", tmp_path / "t.cache")
    assert done.exit_code == 0, done.output
    assert engine.read_sidecar(graph.with_suffix(".engine")).options == engine.BuildConfig(
        batch=(2, 4, 16),
        workspace_bytes=512 * 2**20,
        optimization_level=4,
        timing_cache=tmp_path / "t.cache",
        version_compatible=True,
        hardware_compatible=True,
    )
    assert (tmp_path / "t.cache").is_file()


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4GiB", 2**32), ("2gib", 2**31), ("512MiB", 2**29), ("512", 2**29), ("64 KiB", 2**16)],
)
def test_sizes(world: World, graph: Path, size: str, expected: int) -> None:
    assert call("build", graph, "--workspace", size, "--timing-cache", "none").exit_code == 0
    assert world.options._workspace == expected
    assert make_config({"model": "digits", "build": {"workspace_bytes": size}}).build.workspace_bytes == expected
    assert list(world.caches.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workspace", "4GB", "'4GB' is no size such as 4GiB, 512MiB or 512, in MiB"),
        ("--workspace", "0", "is no size"),
        ("--batch", "8", "'8' is no smallest, tuned-for and largest batch such as 1:8:32"),
        ("--batch", "1:x:3", "is no smallest"),
        ("--batch", "8:4:32", "'8:4:32' does not ascend"),
        ("--batch", "0:4:32", "does not ascend from 1 or more"),
        ("--optimization-level", "6", "0<=x<=5"),
    ],
)
def test_wrong_options_end_in_one_line(world: World, graph: Path, option: str, value: str, message: str) -> None:
    done = call("build", graph, option, value)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not graph.with_suffix(".engine").exists()


def test_a_failure_ends_in_one_line(world: World, graph: Path) -> None:
    world.build_error = "Error Code 10: Internal Error (Could not find any\n implementation for node conv1.)"
    done = call("build", graph)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "it has no kernel for the layer conv1: raise --workspace" in done.stderr


@pytest.mark.slow
def test_a_run_builds_fp32_and_fp16_beside_the_variants_and_compares_with_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, out = tmp_path / "small.toml", tmp_path / "out"
    small = {**SMALL, "finetune": {"steps": 0}, "limit": 60, "device": "cpu", "bits": ["w8a8"]}
    settings.write_text(tomli_w.dumps(small))
    steps = [call("synthesize", "digits", "--config", settings, "--out", out)]
    steps += [call(verb, out) for verb in ("quantize", "export")]
    monkeypatch.setattr(engine, "TensorRTRunner", functools.partial(engine.TensorRTRunner, device="cpu"))
    world = install(monkeypatch)  # from here on torch believes in a GPU
    world.input_shape, world.classes = (-1, 1, 32, 32), 10
    built = call("build", out, "--batch", "4:8:16", "--json")
    steps += [built, call("evaluate", out), call("benchmark", out)]
    assert [s.exit_code for s in steps] == [0] * 6, [s.stderr for s in steps]

    engines = ["fp32/model.engine", "fp32/model.fp16.engine", "w8a8/model.engine"]
    assert [row["engine"] for row in json.loads(built.stdout)] == engines
    sidecars = [engine.read_sidecar(out / name) for name in engines]
    assert [own.source for own in sidecars] == ["model.onnx", "model.fp16.onnx", "model.trt.onnx"]
    assert all(own.options.batch == (1, 8, 16) for own in sidecars)  # batches of 1 and 2 are timed
    assert tomllib.loads((out / "run.toml").read_text())["build"]["batch"] == [4, 8, 16]

    before = [(out / name).stat().st_mtime_ns for name in engines]
    assert call("build", out, "--timing-cache", "none").exit_code == 0  # decides nothing about the engines
    assert [(out / name).stat().st_mtime_ns for name in engines] == before

    report = json.loads(call("report", out, "--json").stdout)
    fp32, w8a8 = report["variants"]
    assert [(a["path"], a["target"], a["fp16"]) for a in fp32["artifacts"]] == [
        ("fp32/model.onnx", "onnxruntime", False),
        ("fp32/model.fp16.onnx", "tensorrt", True),
        ("fp32/model.engine", "tensorrt", False),
        ("fp32/model.fp16.engine", "tensorrt", True),
    ]
    assert [a["graph"] for a in fp32["accuracy"]] == [None, "fp32/model.onnx", *engines[:2]]
    assert [entry["graph"] for entry in fp32["latency"]][2:] == [engines[0]] * 2 + [engines[1]] * 2
    assert not any(a["fp16"] for a in w8a8["artifacts"])
    shown = call("report", out).stdout
    assert "over fp16" in shown
    assert "1.00x" in shown  # the double takes the same time for every engine
    assert "On tensorrt no difference in speed from fp32 was measured for" in (out / "report.md").read_text()
