"""`clusterq build` through a double of TensorRT: what its options become, and what a run's engines are."""

import functools
import tomllib
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch
from nets import digits
from onnx import TensorProto
from support import call, error_line, json_of, output_of, seeded
from tensorrt_double import World

from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.lowering import annotate, export_graph, lower
from clusterq_deploy.quantization import BitWidths, calibrate, make_student
from clusterq_deploy.runtimes import tensorrt as engine

BOTH = (".engine", ".fp16.engine")


@pytest.fixture(scope="module")
def exported() -> bytes:
    """Return the bundled model in W8A8, lowered for TensorRT, as a file's content."""
    model = digits()
    student = make_student(model.module, BitWidths(8, 8))
    images = torch.randn(32, *model.input.size, generator=seeded())
    calibrate(student, images, batch_size=16, rng=seeded())
    graph = lower(export_graph(student, model.input.size), student, "tensorrt")
    named = {"model": model.slug, "source": model.source, "variant": "w8a8", "inputs": model.input}
    return annotate(graph, **named, provenance={}).SerializeToString()


@pytest.fixture
def graph(exported: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported)
    return path


@pytest.fixture
def runs_on_cpu(monkeypatch: pytest.MonkeyPatch, world: World) -> World:
    """Let the runner of engines hand its double the memory of a CPU, and answer for the bundled model."""
    monkeypatch.setattr(engine, "TensorRTRunner", functools.partial(engine.TensorRTRunner, device="cpu"))
    world.input_shape, world.classes = (-1, 1, 32, 32), 10
    return world


def test_build_writes_engines_of_a_file_and_of_its_fp16_baseline_next_to_it(world: World, graph: Path) -> None:
    rows = json_of("build", graph)
    engines = [graph.with_suffix(suffix) for suffix in BOTH]
    assert [row["engine"] for row in rows] == [str(path) for path in engines]
    assert rows[0]["size_bytes"] == engines[0].stat().st_size
    quantized, baseline = (engine.read_sidecar(path) for path in engines)
    assert quantized.options == engine.BuildConfig()
    assert (baseline.source, baseline.source_sha256) == (quantized.source, quantized.source_sha256)
    assert (quantized.derived, baseline.derived) == (False, True)
    assert world.parsed[0] == graph.read_bytes()
    built = onnx.load_model_from_string(world.parsed[1]).graph
    assert "QuantizeLinear" not in {node.op_type for node in built.node}
    assert {initializer.data_type for initializer in built.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    assert [path.name for path in graph.parent.glob("*.onnx")] == ["net.onnx"]


@pytest.mark.usefixtures("world")
def test_build_of_a_file_without_an_fp16_baseline_writes_its_engine(
    graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.load(graph)
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    model.graph.node.append(onnx.helper.make_node("Cast", [first.output[0]], ["seen"], to=TensorProto.FLOAT))
    model.graph.output.append(onnx.ValueInfoProto(name="seen"))
    onnx.save(model, graph)
    assert [row["engine"] for row in json_of("build", graph)] == [str(graph.with_suffix(".engine"))]
    assert f"{graph} has no FP16 baseline: the integers of" in caplog.text


@pytest.mark.usefixtures("world")
def test_build_keeps_another_files_engine_that_has_the_baselines_name(
    graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = graph.with_name("net.fp16.onnx")
    other.write_bytes(graph.read_bytes())
    output_of("build", other)
    assert [row["engine"] for row in json_of("build", graph)] == [str(graph.with_suffix(".engine"))]
    assert "net.fp16.engine was built from net.fp16.onnx and is kept; move it away" in caplog.text
    error_line("evaluate", graph.with_name("net.fp16.fp16.engine"))


@pytest.mark.slow
@pytest.mark.usefixtures("runs_on_cpu")
def test_benchmark_and_evaluate_of_a_file_include_the_engines_built_from_it(
    graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_of("build", graph)
    graph.with_name("other.onnx").write_bytes(graph.read_bytes())
    output_of("build", graph.with_name("other.onnx"))
    engines = [str(graph.with_suffix(suffix)) for suffix in sorted(BOTH)]

    timed = json_of("benchmark", graph, "--batches", "2", "--threads", "1")
    assert [(row["runtime"], row["graph"], row.get("threads")) for row in timed] == [
        ("onnxruntime-cpu", str(graph), 1),
        *[("tensorrt", path, None) for path in engines],
    ]
    assert all(f"--loadEngine={row['graph']}" in row["trtexec"] for row in timed[1:])
    assert "onnxruntime-cuda is skipped: " in caplog.text  # torch believes in a GPU, ONNX Runtime does not
    assert [row["graph"] for row in json_of("benchmark", engines[0], "--batches", "2")] == engines[:1]

    path = str(graph.with_suffix(".engine"))
    scored = json_of("evaluate", graph, "--limit", "60")
    assert [(row["runtime"], row["graph"]) for row in scored] == [("onnxruntime-cpu", str(graph)), ("tensorrt", path)]
    assert all(row["images"] == 60 for row in scored)
    assert scored[0]["top1"] > 95 > scored[1]["top1"]  # the double knows no digits
    assert json_of("evaluate", path, "--limit", "60") == scored[1:]

    graph.write_bytes(graph.read_bytes() + b"\x0a\x00")  # an unknown field: the same graph, another file
    error_line("evaluate", path)
    caplog.clear()
    timed = json_of("benchmark", graph, "--batches", "2", "--threads", "1")
    assert [row["runtime"] for row in timed] == ["onnxruntime-cpu"]
    assert f"{path} was built from an earlier net.onnx; build it again" in caplog.text


@pytest.mark.usefixtures("runs_on_cpu")
def test_benchmark_of_a_file_leaves_out_engines_that_cannot_be_measured(
    graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_of("build", graph, "--batch", "1:1:1")
    graph.with_name("foreign.engine").write_bytes(b"of another tool")
    timed = json_of("benchmark", graph, "--batches", "2", "--threads", "1")
    assert [row["runtime"] for row in timed] == ["onnxruntime-cpu"]
    assert "foreign.engine is skipped: cannot read" in caplog.text
    assert f"{graph.with_suffix('.engine')} is skipped: batch is 2; the engine accepts 1 to 1 images" in caplog.text
    assert call("benchmark", graph.with_suffix(".engine"), "--batches", "2").exit_code == 2


def test_benchmark_times_a_graph_that_fixes_its_batch_at_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shapes = "(float[4, 3, 2, 2] images) => (float[4, 12] logits)"
    text = f'<ir_version: 10, opset_import: ["" : 21]> foreign {shapes} {{ logits = Flatten(images) }}'
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    (row,) = json_of("benchmark", path)
    assert row["batch"] == 4
    assert f"{path} has a fixed batch size: only 4 is timed" in caplog.text


def test_build_ignores_batch_sizes_for_a_graph_that_fixes_its_batch(
    world: World, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.input_shape = (4, 3, 4, 4)
    output_of("build", graph, "--batch", "1:2:16")
    assert f"{graph} fixes the batch at 4; the batch sizes (1, 2, 16) are ignored" in caplog.text
    assert engine.read_sidecar(graph.with_suffix(".engine")).options.batch == (4, 4, 4)
    assert world.profiles == {}
    caplog.clear()
    output_of("build", graph)
    assert "fixes the batch" not in caplog.text


@pytest.mark.usefixtures("world")
def test_build_options_become_its_configuration(graph: Path, tmp_path: Path) -> None:
    options = ["--batch", "2:4:16", "--workspace", "512MiB", "--optimization-level", "4", "--hardware-compatible"]
    output_of("build", graph, *options, "--version-compatible", "--timing-cache", tmp_path / "t.cache")
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
def test_build_reads_sizes_with_units(world: World, graph: Path, size: str, expected: int) -> None:
    output_of("build", graph, "--workspace", size, "--timing-cache", "none")
    assert world.options._workspace == expected
    assert make_config({"model": "digits", "build": {"workspace_bytes": size}}).build.workspace_bytes == expected
    assert list(world.caches.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workspace", "4GB", "'4GB' is not a size such as 4GiB, 512MiB or 512, in MiB"),
        ("--workspace", "0", "is not a size"),
        ("--batch", "8", "'8' is not of the form min:opt:max, such as 1:8:32"),
        ("--batch", "1:x:3", "is not of the form min:opt:max"),
        ("--batch", "8:4:32", "batch is (8, 4, 32); expected (min, opt, max) with min <= opt <= max"),
        ("--batch", "0:4:32", "--batch: Input should be greater than 0"),
        ("--optimization-level", "6", "0<=x<=5"),
    ],
)
@pytest.mark.usefixtures("world")
def test_build_refuses_wrong_options_in_one_line(graph: Path, option: str, value: str, message: str) -> None:
    assert message in error_line("build", graph, option, value)
    assert not graph.with_suffix(".engine").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("runs_on_cpu")
def test_build_of_a_run_adds_fp32_and_fp16_and_the_report_compares_with_both(run_copy: Path) -> None:
    settings = run_copy / "run.toml"
    settings.write_text('device = "cpu"\n' + settings.read_text())  # torch believes in a GPU
    engines = ["fp32/model.engine", "fp32/model.fp16.engine", "w8a8/model.engine", "w4a4/model.engine"]
    assert [row["engine"] for row in json_of("build", run_copy, "--batch", "4:8:16")] == engines
    for stage in ("evaluate", "benchmark"):
        output_of(stage, run_copy)
    sidecars = [engine.read_sidecar(run_copy / name) for name in engines]
    assert [sidecar.source for sidecar in sidecars] == ["model.onnx", "model.fp16.onnx", *["model.trt.onnx"] * 2]
    assert all(sidecar.options.batch == (1, 8, 16) for sidecar in sidecars)  # batches of 1 and 2 are timed
    assert tomllib.loads(settings.read_text())["build"]["batch"] == [4, 8, 16]

    before = [(run_copy / name).stat().st_mtime_ns for name in engines]
    output_of("build", run_copy, "--timing-cache", "none")  # decides nothing about the engines
    assert [(run_copy / name).stat().st_mtime_ns for name in engines] == before

    fp32, *quantized = json_of("report", run_copy)["variants"]
    assert [(a["path"], a["target"], a["fp16"]) for a in fp32["artifacts"]] == [
        ("fp32/model.onnx", "onnxruntime", False),
        ("fp32/model.fp16.onnx", "tensorrt", True),
        ("fp32/model.engine", "tensorrt", False),
        ("fp32/model.fp16.engine", "tensorrt", True),
    ]
    assert [entry["graph"] for entry in fp32["accuracy"]] == [None, "fp32/model.onnx", *engines[:2]]
    assert [entry["graph"] for entry in fp32["latency"]][2:] == [engines[0]] * 2 + [engines[1]] * 2
    assert not any(artifact["fp16"] for variant in quantized for artifact in variant["artifacts"])
    shown = output_of("report", run_copy)
    assert "over fp16" in shown
    assert "1.00\N{MULTIPLICATION SIGN}" in shown  # the double takes the same time for every engine
    assert "On tensorrt no difference in speed from fp32 was measured for" in (run_copy / "report.md").read_text()
