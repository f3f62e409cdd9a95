"""Engines of TensorRT-RTX that are built ahead of time, with the real parser and compiler, which need no GPU."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import graph_of, needs_compiler
from nets import digits
from onnx import TensorProto, helper, numpy_helper
from support import call, error_line, json_of, output_of
from tensorrt_double import World, open_engine

from calib.support.progress import SILENT, Advance
from cli.main import main
from clusterq_deploy.errors import EngineError, ExportError, RunDirectoryError, TensorRTMissing
from clusterq_deploy.files import sha256_file
from clusterq_deploy.lowering import float_graphs, to_fp16, to_tensorrt_rtx
from clusterq_deploy.results.engines import EnginePlan
from clusterq_deploy.runtimes.tensorrt import BuildConfig, build_engine, read_sidecar, unavailable_reason
from clusterq_deploy.runtimes.tensorrt.compile import compile_graph
from clusterq_deploy.runtimes.tensorrt.kernels import convolution_channels, plan_of
from clusterq_deploy.runtimes.tensorrt.library import RTX_DEFAULT, library_problem

AMPERE = BuildConfig(rtx=RTX_DEFAULT)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return graphs for TensorRT: the bundled model in FP32 and FP16, and a small residual net in W8A8."""
    folder, model = tmp_path_factory.mktemp("graphs"), digits()
    baselines = float_graphs(model.module, model.input.size, seed=0, name="fp32")
    made = {"fp32": baselines.fp32, "fp16": baselines.fp16, "w8a8": graph_of("residual", "tensorrt", "w8a8")[1]}
    for name, graph in made.items():
        onnx.save(graph, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in made}


def build(graph: Path, folder: Path, config: BuildConfig = AMPERE) -> EnginePlan:
    """Build an engine in a folder, and return its plan."""
    engine = folder / "model.rtx.engine"
    info = build_engine(graph, engine, config, SILENT)
    assert info == read_sidecar(engine)
    assert info.plan is not None
    return info.plan


def save_net(folder: Path, nodes: list[onnx.NodeProto], shape: list[int | str]) -> Path:
    """Write a net of these nodes from `x` to `y`, which have one shape, and return its file."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:])
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@needs_compiler
@pytest.mark.parametrize("name", ["fp32", "fp16", "w8a8"])
def test_build_engine_writes_an_engine_for_several_gpus_without_any(
    name: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    plan = build(graphs[name], tmp_path)
    info, content = read_sidecar(tmp_path / "model.rtx.engine"), onnx.load(graphs[name]).graph
    assert info.options.rtx == AMPERE.rtx
    assert info.built_on.tensorrt.startswith("1.")
    assert (info.built_on.gpu, info.source, info.source_sha256) == (None, f"{name}.onnx", sha256_file(graphs[name]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.rtx.engine", "model.rtx.engine.json"]
    convolutions = {node.name for node in content.node if node.op_type == "Conv"}
    assert plan.notes == []
    assert plan.convolutions == len(convolutions)
    assert convolutions <= {node for layer in plan.layers for node in layer.nodes}
    assert plan.convolutions_int8 == (len(convolutions) if name == "w8a8" else 0)
    assert plan.kernels == len(plan.layers)
    assert bool(plan.requantizations) == (name == "w8a8")
    assert plan.bytes_moved == sum(layer.bytes_in + layer.bytes_out for layer in plan.layers)


@needs_compiler
def test_plan_of_half_precision_moves_half_the_bytes(graphs: dict[str, Path], tmp_path: Path) -> None:
    single, half = (build(graphs[name], tmp_path) for name in ("fp32", "fp16"))
    assert set(single.convolutions_write) == {"FP32"}
    assert set(half.convolutions_write) == {"FP16"}
    assert half.bytes_moved < 0.6 * single.bytes_moved


@needs_compiler
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", ["residual", "mobile", "enlarging"])
def test_to_tensorrt_rtx_moves_fewer_bytes(name: str, fp16: bool, tmp_path: Path) -> None:
    """Convolutions write FP16 once their weights have one step each, in a graph with FP16 scales too."""
    graph = graph_of(name, "tensorrt", "w8a8")[1]
    plans = []
    for number, model in enumerate((graph, to_tensorrt_rtx(to_fp16(graph) if fp16 else graph))):
        onnx.save(model, path := tmp_path / f"{number}.onnx")
        plans.append(build(path, tmp_path))
    plain, spelled = plans
    assert spelled.convolutions_int8 == plain.convolutions_int8 > 0
    assert spelled.convolutions_write == {"FP16": spelled.convolutions}
    assert spelled.bytes_moved < 0.75 * plain.bytes_moved


@needs_compiler
def test_plan_counts_bytes_of_one_image_of_a_fixed_batch(tmp_path: Path) -> None:
    moved = []
    for batch in ("batch", 1, 4):
        path = save_net(tmp_path, [helper.make_node("Relu", ["x"], ["y"], "relu")], [batch, 8, 4, 4])
        moved.append(build(path, tmp_path).bytes_moved)
    assert moved == [2 * 4 * 8 * 4 * 4] * 3


@needs_compiler
def test_build_engine_names_what_the_parser_refuses(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Foo", ["x"], ["a"], "odd", doc_string="net.py(3):  f\n" + "x" * 200),
        helper.make_node("Bar", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"], "relu", doc_string="another node"),
    ]
    path = save_net(tmp_path, nodes, [1, 4])
    with pytest.raises(
        EngineError,
        match=r'^TensorRT-RTX cannot parse .*: odd \(Foo, "net\.py\(3\): f x+\.\.\."\): .*; unnamed node \(Bar\): .*; '
        r"an operator is neither .*: replace it in the model, or load its plugin",
    ) as caught:
        build(path, tmp_path)
    assert "another node" not in str(caught.value)
    path.write_bytes(b"hello\n")  # the parser reads it as an empty graph
    with pytest.raises(ExportError, match="is not an ONNX file"):
        build(path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


@needs_compiler
def test_build_engine_refuses_other_dynamic_sizes_than_the_batch(tmp_path: Path) -> None:
    path = save_net(tmp_path, [helper.make_node("Relu", ["x"], ["y"], "relu")], ["n", 3, "h", 4])
    with pytest.raises(EngineError, match=r"input x of \S+ has shape \(-1, 3, -1, 4\); only the first .*"):
        build(path, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"cannot read .*none\.onnx: No such file"):
        build(tmp_path / "none.onnx", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


@needs_compiler
def test_turing_builds_fp16_and_refuses_float32_in_one_line(graphs: dict[str, Path], tmp_path: Path) -> None:
    turing = BuildConfig(rtx=("sm75",))
    assert build(graphs["fp16"], tmp_path, turing).kernels
    with pytest.raises(EngineError, match=r"Turing \(sm75\) has no kernel for .*--fp16") as caught:
        build(graphs["fp32"], tmp_path, turing)
    assert "\n" not in str(caught.value)


class Interrupting:
    """A progress display that presses Ctrl-C as soon as the compiler reports a phase."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        if "Building" in description:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the main thread looks twice a second
        yield lambda n=1, **figures: None


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_cancels_the_compiler_and_leaves_nothing(graphs: dict[str, Path], tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(graphs["w8a8"], tmp_path / "model.rtx.engine", AMPERE, Interrupting())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []
    assert build(graphs["w8a8"], tmp_path).kernels  # in the same process


def test_build_engine_says_how_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)  # the import system's own mark of a module that is not there
    with pytest.raises(TensorRTMissing, match=r"tensorrt_rtx is not installed: pip install 'clusterq-deploy\[rtx\]'"):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.rtx.engine", AMPERE, SILENT)


def test_libraries_of_another_release_than_the_bindings_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx").mkdir()
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx/__init__.py").touch()
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_rtx.so.1.8.0").touch()
    (tmp_path / "tensorrt_rtx_bindings.py").write_text('__version__ = "1.7.1.116"')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", lambda _: None)
    for name in ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the stand-in is removed, whatever was there
        del sys.modules[name]
    assert "its bindings are 1.7.1.116, its libraries 1.8.0" in str(library_problem("tensorrt_rtx"))


def test_runner_runs_an_engine_on_one_of_its_gpus(world: World, graph: Path) -> None:
    engine = graph.with_name("model.rtx.engine")
    build_engine(graph, engine, BuildConfig(rtx=("sm86", "sm89")).for_rtx(), SILENT)
    assert world.targets == ["8.6", "8.9"]
    assert world.timing_caches_read == []
    assert len(read_sidecar(engine).plan.notes) == 1  # the double has no table
    world.move(gpu="NVIDIA RTX 3090", capability=(8, 6))
    with open_engine(engine) as runner:
        assert runner.runtime == "tensorrt-rtx"
    world.move(gpu="NVIDIA RTX 5090", capability=(12, 0))
    with pytest.raises(EngineError, match=r"compute capability is 12\.0, the engine is built for sm86, sm89"):
        open_engine(engine)
    world.move(gpu="NVIDIA H100", capability=(9, 0))
    assert "NVIDIA H100 has compute capability 9.0; TensorRT-RTX runs on sm75" in str(
        unavailable_reason("tensorrt_rtx")
    )
    assert unavailable_reason() is None


TABLE = """Layers:
Name: event, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: conv_myl0_1, LayerType: correlation, Inputs: [ { Name: x_q, Dimensions: [-1,4,8,8], Strides: [256,1,32,4], \
StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: \
[6,4,3,3], Strides: [36,1,12,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], \
Outputs: [ { Name: y, Dimensions: [-1,6,8,8], Strides: [384,1,48,6], StrideOrder: [3,0,2,1], Datatype: Float, Format: \
(NHWC) Channel major format }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: x.dequantized]
Name: requantize, LayerType: kgen, Inputs: [ { Name: y, Dimensions: [-1,6,8,8], Strides: [384,1,48,6], StrideOrder: \
[3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], Constants: [], Outputs: [ { Name: z, Dimensions: \
[-1,6,8,8], Strides: [384,1,48,6], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], \
TacticName: other, StreamId: 0, Metadata: [ONNX Layer: relu]

I/O Tensors:
 Name: images, IOMode: Input
"""


def test_plan_of_reads_the_table_of_the_log() -> None:
    plan = plan_of(TABLE, {"conv": (3, 6)}, engine="w8a8/model.rtx.engine")
    convolution, requantization = plan.layers
    assert (convolution.nodes, convolution.reads, convolution.writes) == (["conv", "x.dequantized"], ["INT8"], ["FP32"])
    assert (convolution.bytes_in, convolution.bytes_out) == (4 * 64, 4 * 6 * 64)
    assert requantization.nodes == ["relu"]
    assert (plan.kernels, plan.convolutions, plan.convolutions_int8, plan.convolutions_write) == (2, 1, 1, {"FP32": 1})
    assert (plan.requantizations, plan.padded_channels) == (1, 1)
    assert (plan.bytes_in, plan.bytes_out) == (4 * 64 + 4 * 6 * 64, 4 * 6 * 64 + 6 * 64)
    assert (convolution.bytes_stored, plan.bytes_stored) == (6 * 4 * 9, 6 * 4 * 9)


@pytest.mark.parametrize(
    "table",
    [
        "",
        "Layers:\n",
        TABLE.replace("Constants", "Weights"),
        TABLE.replace("Datatype: Float", "Datatype: Float128"),
        TABLE.replace("Datatype: Float", "Type: Float"),
        TABLE.replace("[-1,6,8,8]", "[-1,6,-1,8]"),
        TABLE.replace("[-1,6,8,8]", "unknown"),
    ],
)
def test_plan_of_raises_one_line_for_another_table(table: str) -> None:
    with pytest.raises(EngineError, match=r"^the plan is unknown: .*") as caught:
        plan_of(table, {}, engine="model.rtx.engine")
    assert "\n" not in str(caught.value)


def test_convolution_channels_are_those_of_the_graph() -> None:
    channels = convolution_channels(graph_of("residual", "tensorrt", "w8a8")[1])
    assert channels
    assert all(0 < number < 1000 for ends in channels.values() for number in ends)


@needs_compiler
def test_build_command_builds_a_file_and_its_baseline_ahead_of_time(graphs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(graphs["w8a8"].read_bytes())
    integers, half = json_of("build", path, "--rtx", "sm89")
    assert [Path(row["engine"]).name for row in (integers, half)] == ["net.rtx.engine", "net.fp16.rtx.engine"]
    assert integers["convolutions_int8"] > half["convolutions_int8"] == 0
    assert read_sidecar(Path(half["engine"])).options.rtx == ("sm89",)


@needs_compiler
def test_build_command_builds_a_runs_engines_once_and_the_report_has_their_plans(run_copy: Path) -> None:
    rows = json_of("build", run_copy, "--rtx", "sm86,sm89")
    engines = {row["engine"]: (run_copy / row["engine"]).stat().st_mtime_ns for row in rows}
    assert list(engines) == [
        "fp32/model.rtx.engine",
        "fp32/model.fp16.rtx.engine",
        "w8a8/model.rtx.engine",
        "w4a4/model.rtx.engine",
    ]
    assert tomllib.loads((run_copy / "run.toml").read_text())["build"]["rtx"] == ["sm86", "sm89"]

    (run_copy / "w8a8/model.rtx.engine").unlink()  # as if the build had been killed
    json_of("build", run_copy)
    redone = [name for name, time_ns in engines.items() if (run_copy / name).stat().st_mtime_ns != time_ns]
    assert redone == ["w8a8/model.rtx.engine"]

    report = json_of("report", run_copy)
    plans = {plan["engine"]: plan for variant in report["variants"] for plan in variant["plans"]}
    assert list(plans) == list(engines)
    convolutions, quantized = plans["fp32/model.rtx.engine"]["convolutions"], plans["w8a8/model.rtx.engine"]
    assert quantized["convolutions_int8"] == convolutions
    assert (quantized["respelled"], quantized["convolutions_write"]) == (True, {"FP16": convolutions})
    assert read_sidecar(run_copy / "w8a8/model.rtx.engine").source == "model.trt.onnx"
    built = [file for variant in report["variants"] for file in variant["artifacts"] if file["kind"] == "engine"]
    assert {(file["path"], file["target"]) for file in built} == {(name, "tensorrt_rtx") for name in engines}
    reasons = {entry["stage"]: entry["reason"] for entry in report["skipped"]}
    assert reasons["rtx"].startswith("built, not run: ") or not unavailable_reason("tensorrt_rtx")

    json_of("build", run_copy, "--rtx", "sm120")
    assert read_sidecar(run_copy / "w4a4/model.rtx.engine").options.rtx == ("sm120",)


@needs_compiler
def test_turing_needs_graphs_in_fp16(run_copy: Path) -> None:
    assert "--rtx sm75 (Turing) multiplies no float32 matrices" in error_line("build", run_copy, "--rtx", "sm75")
    json_of("export", run_copy, "--fp16")
    rows = json_of("build", run_copy, "--rtx", "sm75")
    names = ["fp32/model.fp16.rtx.engine", "w8a8/model.rtx.engine", "w4a4/model.rtx.engine"]
    assert [row["engine"] for row in rows] == names
    reasons = [entry["reason"] for entry in json_of("report", run_copy)["skipped"] if entry["stage"] == "rtx"]
    assert "fp32/model.onnx has no engine for sm75, which multiplies no float32 matrices" in reasons


@pytest.mark.parametrize("value", ["sm90", "ampere", "sm86,,sm89"])
def test_build_command_refuses_unknown_gpus_in_one_line(value: str, tmp_path: Path) -> None:
    line = error_line("build", tmp_path / "net.onnx", "--rtx", value)
    assert "sm86" in line
    assert value.partition(",")[0] in line


@needs_compiler
def test_check_command_asks_the_compiler(graphs: dict[str, Path], tmp_path: Path) -> None:
    good = output_of("check", graphs["w8a8"], "--compile")
    assert "builds it for sm80, sm86, sm89, sm120: " in good
    assert "convolutions in INT8, writing FP32" in good
    graph = onnx.load(graphs["w8a8"])
    zero = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    graph.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "three"))
    zero.input[2] = "three"
    onnx.save(graph, tmp_path / "bad.onnx")
    result = call("check", tmp_path / "bad.onnx", "--compile", "--json")
    assert result.exit_code == 1
    rows = {row["rule"]: row for row in json.loads(result.stdout) if row["severity"] == "error"}
    assert rows.keys() == {"zero-point", "compile"}
    assert rows["compile"]["node"] == rows["zero-point"]["node"] == zero.name
    assert "Non-zero zero point is not supported" in rows["compile"]["message"]
    assert rows["compile"]["message"].endswith("quantize symmetrically, around 0 (rule zero-point)")
    assert "TensorRT-RTX refuses it" in call("check", tmp_path / "bad.onnx", "--compile").stdout


@needs_compiler
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "the compiler crashes with signal 6 on this file"),
        ("import os; os.kill(os.getpid(), 9)", "the compiler crashes with signal 9 on this file"),
        ("import sys; sys.exit('no more')", "the compiler ends with code 1: no more"),
    ],
)
def test_compile_graph_survives_a_compiler_that_crashes(
    code: str, message: str, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run
    monkeypatch.setattr("subprocess.run", lambda command, **options: run([command[0], "-c", code], **options))
    (refusal,) = compile_graph(graphs["w8a8"]).refusals
    assert refusal.reason == message
    result = call("check", graphs["w8a8"], "--compile")
    assert result.exit_code == 1
    assert "TensorRT-RTX refuses it" in result.stdout


def test_check_command_says_how_to_install_the_compiler(
    graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'clusterq-deploy[rtx]'" in error_line("check", graphs["w8a8"], "--compile")


def test_option_without_a_value_names_the_default_gpus() -> None:
    (option,) = (param for param in main.commands["build"].params if param.name == "rtx")
    assert option.flag_value == ",".join(RTX_DEFAULT)
