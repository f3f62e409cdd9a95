"""Sums of two products in 16 bits: found in any graph, none in the project's own, and what kernels make of them."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, images, make_net
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from calib.calibration_set import CalibrationSet
from cli.main import main
from clusterq_deploy.environment import adds_in_32_bits
from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering import check_saturation, export_graph, lower, pair_sums, require_no_saturation, verify
from clusterq_deploy.quantization import (
    BitWidths,
    Student,
    calibrate,
    finetune,
    fit_full_range_biases,
    load_student,
    make_student,
    post_training_quantize,
)
from clusterq_deploy.quantization.fake_quant import pooled_dims, row_bounds, second_extremes
from clusterq_deploy.quantization.grid import Cpu, Grid, pair_limit
from clusterq_deploy.quantization.qat.finetune import FinetuneConfig
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner

Integers = npt.NDArray[np.int64]
Array = npt.NDArray[np.generic]


def calibrated(net: nn.Module, bits: str = "w8a8", cpu: Cpu = "any", **widths: object) -> Student:
    student = make_student(net, BitWidths.parse(bits), cpu=cpu, **widths)  # type: ignore[arg-type]
    calibrate(student, images(), batch_size=16, rng=torch.Generator().manual_seed(0))
    return student


def graph_of(student: Student) -> onnx.ModelProto:
    return lower(export_graph(student, (3, 16, 16)), student, "onnxruntime")


def added_in_pairs(x: Integers, weight: Integers) -> Integers:
    """What `vpmaddubsw` and `vpmaddwd` make of x (n, K) and a weight (O, K): pairs saturate at 16 bits."""
    if x.shape[1] % 2:
        x, weight = (np.pad(own, ((0, 0), (0, 1))) for own in (x, weight))
    products = x[:, None] * weight[None]
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(-1)


def quantized_layer(
    weight: Array, *, operator: str = "Conv", kind: type = np.uint8, high: int | None = None, **attributes: int
) -> onnx.ModelProto:
    """A graph of one quantized layer, its input UINT8 or INT8, bounded to `high` where that is given."""
    inputs = weight.shape[1] * attributes.get("group", 1) if operator == "Conv" else weight.shape[0]
    if attributes.get("transB"):
        inputs = weight.shape[1]
    shape = [1, inputs, 8, 8] if operator == "Conv" else [1, inputs]
    constants = {
        "step": np.float32(1),
        "zero": kind(0),
        "top": kind(high or 0),
        "low": kind(0),
        "w": weight,
        "wz": weight.dtype.type(0 if weight.dtype == np.int8 else 128),
    }
    q = "bounded" if high is not None else "q"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        *([helper.make_node("Clip", ["q", "low", "top"], ["bounded"])] if high is not None else []),
        helper.make_node("DequantizeLinear", [q, "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "step", "wz"], ["dw"]),
        helper.make_node(operator, ["d", "dw"], ["y"], name="layer", **attributes),
        helper.make_node("QuantizeLinear", ["y", "wide", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "wide", "zero"], ["out"]),
    ]
    constants["wide"] = np.float32(2.0**14)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * len(shape)),
    )
    opsets = [helper.make_opsetid("", 21)]
    graph = helper.make_graph(nodes, "graph", [ends[0]], [ends[1]], stored)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_the_limit_of_a_pair_of_weights_by_hand() -> None:
    eight, seven, four = (Grid(bits, signed=True) for bits in (8, 7, 4))
    assert pair_limit(eight, Grid(8, signed=False)) == 128  # 128 * 255 = 32,640
    assert pair_limit(eight, eight) == 128  # stored with zero-point 128: up to 255
    assert pair_limit(eight, Grid(4, signed=True)) == 242  # up to 135; 242 * 135 = 32,670
    assert pair_limit(eight, Grid(7, signed=False)) is None  # 256 * 127 = 32,512
    assert pair_limit(eight, Grid(4, signed=False)) is None
    assert pair_limit(seven, Grid(8, signed=False)) is None
    assert pair_limit(four, eight) is None


def test_the_ends_of_a_row_by_hand() -> None:
    rows = torch.tensor([[100.0, 20.0, -5.0], [90.0, 80.0, -128.0], [60.0, 61.0, -3.0], [-127.0, -126.0, 127.0]])
    low, high = row_bounds(second_extremes(rows), torch.ones(4), Grid(8, signed=True), 128)
    assert high.tolist() == [108, 64, 68, 127]  # beside 20, 80, 60, and nothing positive
    assert low.tolist() == [-128, -128, -128, -64]


@given(
    st.lists(st.lists(st.floats(-300, 300, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from([128, 129, 242]),
)
@settings(max_examples=200, deadline=None)
def test_no_two_integers_of_a_row_pass_the_limit(rows: list[list[float]], limit: int) -> None:
    weight, grid = torch.tensor(rows), Grid(8, signed=True)
    low, high = row_bounds(second_extremes(weight), torch.ones(len(rows)), grid, limit)
    nearest = weight.round().clamp(grid.low, grid.high)
    integers = nearest.clamp(low[:, None], high[:, None])
    for sign in (1, -1):
        assert (sign * integers).clamp_min(0).topk(2, 1).values.sum(1).max() <= limit
        fits = (sign * nearest).clamp_min(0).topk(2, 1).values.sum(1) <= limit
        inside = (nearest * sign <= 0) | (nearest == integers)
        assert bool(inside[fits].all())  # what fits is left alone


def test_a_row_of_one_value_keeps_its_range() -> None:
    weight = torch.tensor([[127.0], [-128.0]])
    low, high = row_bounds(second_extremes(weight), torch.ones(2), Grid(8, signed=True), 128)
    assert (low.tolist(), high.tolist()) == ([-128, -128], [127, 127])


@pytest.mark.parametrize(
    ("weight", "options", "largest"),
    [
        ([[100, 30, -90, -40]], {}, 255 * -130 - 0),
        ([[100, 28, -90, -38]], {}, 255 * 128),
        ([[127, -128, 0, 0]], {}, 255 * -128),  # one of each sign: never added up
        ([[100, 30, -90, -40]], {"high": 15}, 15 * -130),
        ([[100, 30, -90, -40]], {"kind": np.int8}, 255 * -130),  # the kernels add 128
    ],
)
def test_the_largest_sum_of_a_row_by_hand(weight: list[list[int]], options: dict[str, object], largest: int) -> None:
    for operator, shape, more in (("Conv", (1, 4, 1, 1), {}), ("MatMul", (4, 1), {}), ("Gemm", (1, 4), {"transB": 1})):
        values = np.array(weight, np.int8)
        values = values.T if operator == "MatMul" else values
        graph = quantized_layer(values.reshape(shape), operator=operator, **options, **more)  # type: ignore[arg-type]
        (found,) = pair_sums(graph)
        assert abs(found.largest) == abs(largest)
        assert (found.node, found.weight, found.channel) == ("layer", "w", 0)
        assert found.fits == (abs(largest) <= 32767)


def test_the_layers_of_a_file_that_can_saturate_are_named(tmp_path: Path) -> None:
    heavy = np.full((4, 8, 3, 3), 100, np.int8)
    unsigned = np.full((4, 8, 3, 3), 228, np.uint8)
    depthwise = np.full((8, 1, 3, 3), 100, np.int8)
    cases = {
        "heavy": (quantized_layer(heavy), True),
        "grouped": (quantized_layer(np.full((8, 4, 3, 3), 100, np.int8), group=2), True),
        "signed": (quantized_layer(heavy // 2 + 15, kind=np.int8), True),
        "light": (quantized_layer(heavy // 2), False),
        "unsigned": (quantized_layer(unsigned), False),
        "depthwise": (quantized_layer(depthwise, group=8), False),
        "gemm": (quantized_layer(np.full((8, 4), 100, np.int8), operator="Gemm"), True),
    }
    for name, (graph, saturates) in cases.items():
        found = check_saturation(graph)
        assert [own.node for own in found] == (["layer"] if saturates else []), name
        onnx.save(graph, tmp_path / f"{name}.onnx")
        result = CliRunner().invoke(main, ["check", str(tmp_path / f"{name}.onnx"), "--json"])
        rows = [own for own in json.loads(result.stdout) if own["rule"] == "saturation"]
        assert [own["severity"] for own in rows] == (["warning"] if saturates else []), name
        if saturates:
            assert "VNNI" in rows[0]["message"]
    assert "51,000" in check_saturation(cases["heavy"][0])[0].message  # 2 * 100 * 255
    assert pair_sums(cases["depthwise"][0])[0].depthwise


def test_integer_operators_of_other_exporters_are_read() -> None:
    def graph(operator: str, inputs: list[str], domain: str = "") -> onnx.ModelProto:
        stored = {"s": np.float32(1), "z": np.uint8(0), "zw": np.int8(0), "w": np.full((8, 4), 90, np.int8)}
        if operator == "QLinearConv":
            stored["w"] = np.full((4, 8, 1, 1), 90, np.int8)
        node = helper.make_node(operator, inputs, ["y"], name="layer", domain=domain)
        x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 8, 2, 2] if "Conv" in operator else [1, 8])
        tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
        body = helper.make_graph([node], "graph", [x], [helper.make_empty_tensor_value_info("y")], tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(body, opset_imports=opsets, ir_version=10)

    full = ["x", "s", "z", "w", "s", "zw", "s", "z"]
    for operator, inputs, domain in (
        ("QLinearConv", full, ""),
        ("QLinearMatMul", full, ""),
        ("MatMulInteger", ["x", "w", "z", "zw"], ""),
        ("QGemm", ["x", "s", "z", "w", "s", "zw"], "com.microsoft"),
    ):
        (found,) = pair_sums(graph(operator, inputs, domain))
        assert found.largest == 2 * 90 * 255, operator


def test_bounds_hold_through_what_only_moves_values() -> None:
    """A 4-bit grid stays one behind a max-pool and a quantizer of the same scale, and not behind another scale."""
    graph = quantized_layer(np.full((4, 8, 1, 1), 100, np.int8), high=15)
    pool = helper.make_node("MaxPool", ["d"], ["pooled"], kernel_shape=[2, 2])
    again = [
        helper.make_node("QuantizeLinear", ["pooled", "step", "zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "step", "zero"], ["d2"]),
    ]
    nodes = list(graph.graph.node)
    layer = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    nodes[layer].input[0] = "d2"
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes[:layer], pool, *again, *nodes[layer:]])
    assert pair_sums(graph)[0].largest == 15 * 200
    for node in graph.graph.node:
        if node.output[0] in {"q2", "d2"}:
            node.input[1] = "wide"
    assert pair_sums(graph)[0].largest == 255 * 200


@pytest.mark.parametrize(("name", "bits"), [*((name, "w8a8") for name in NETS), ("mobile", "w4a4"), ("mobile", "w8a4")])
def test_no_layer_of_the_projects_graphs_saturates_whatever_is_paired(name: str, bits: str) -> None:
    graph = graph_of(calibrated(make_net(name), bits))
    assert require_no_saturation(graph, name=name) <= 32767
    stored = {own.name: numpy_helper.to_array(own) for own in graph.graph.initializer}
    rng, found = np.random.default_rng(0), pair_sums(graph)
    for own in found:
        weight = stored[f"{own.weight}.integers"].astype(np.int64)
        rows = weight.reshape(len(weight), -1)
        top = 255 if bits == "w8a8" else 15  # which layers read a narrow grid is not told here
        for x in (np.where(rows > 0, top, 0), np.where(rows < 0, top, 0), rng.integers(0, top + 1, rows.shape)):
            order = rng.permutation(rows.shape[1])
            assert (added_in_pairs(x[:, order], rows[:, order]) == x @ rows.T).all(), own
    assert len(found) == sum(node.op_type in {"Conv", "Gemm"} for node in graph.graph.node)


def test_a_graph_of_full_range_saturates_and_its_export_ends(tmp_path: Path) -> None:
    graph = graph_of(calibrated(make_net("residual"), cpu="vnni"))
    found = [own for own in pair_sums(graph) if not own.fits]
    assert found
    stored = {own.name: numpy_helper.to_array(own) for own in graph.graph.initializer}
    rows = stored[f"{found[0].weight}.integers"].astype(np.int64)
    rows = rows.reshape(len(rows), -1)
    x = np.where(rows > 0, 255, 0)
    order = np.argsort(-rows[found[0].channel])
    assert (added_in_pairs(x[:, order], rows[:, order]) != x @ rows.T).any()
    with pytest.raises(VerificationError, match=rf"graph saturates at {found[0].node}: two products of output channel"):
        require_no_saturation(graph, name="graph")
    logits = np.zeros((1, 10), np.float32)
    with pytest.raises(VerificationError, match="saturates"):
        verify(graph, images(1).numpy(), logits, name="graph", optimized=True)


def test_tensorrts_graph_keeps_eight_bits() -> None:
    limited, full = (calibrated(make_net("residual"), cpu=cpu) for cpu in ("any", "vnni"))
    layers = limited.layers(), full.layers()
    with limited.for_target("tensorrt"):
        for name, layer in layers[0].items():
            wide = layers[1][name]
            assert torch.equal(layer.weight, wide.weight)
            mine, theirs = (own.weight_quantizer.integers(own.weight) for own in (layer, wide))
            assert torch.equal(mine, theirs)
            assert int(mine.abs().max()) > 100
    for name, layer in layers[0].items():  # outside of it, the graph for any CPU
        integers = layer.weight_quantizer.integers(layer.weight).flatten(1)
        assert int(integers.clamp_min(0).topk(2, 1).values.sum(1).max()) <= 128, name
        assert bool((layer.weight_quantizer.widening >= 1).all())


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_biases_of_full_range_make_up_for_the_other_rounding(name: str) -> None:
    """Layer by layer the mean of the outputs is the same, whichever way the weight is rounded, on one input."""
    student, data = calibrated(make_net(name)), images(64)
    fit_full_range_biases(student, data)
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, student.on_int8_grids(), torch.no_grad():
        for own, layer in student.layers().items():
            hook = layer.register_forward_hook(lambda _, args, __, own=own: inputs.update({own: args[0]}))
            hooks.enter_context(hook)
        student(data)
    compared = 0
    for own, layer in student.layers().items():
        if layer.bias is None or layer.weight_quantizer.pair_limit is None:
            continue
        dims = pooled_dims(layer, layer(inputs[own]))
        limited = layer(inputs[own]).mean(dims)
        with student.without_pair_limits():
            full = layer(inputs[own]).mean(dims)
            other = (layer(inputs[own]).mean(dims) - layer.weight_quantizer.bias_shift).detach()
        torch.testing.assert_close(full, limited, atol=1e-4, rtol=1e-4)
        compared += bool((other - limited).abs().max() > 1e-3)
    assert compared > 2  # without them the means differ
    graph = lower(export_graph(student, (3, 16, 16)), student, "tensorrt")
    with student.for_target("tensorrt"):
        expected = TorchRunner(student).infer(data.numpy())
    verify(graph, data.numpy(), expected, name=name, optimized=False)


def test_tuning_keeps_the_limit_and_a_student_comes_back_from_its_file(tmp_path: Path) -> None:

    net, data = make_net("mobile"), images(32)
    student, rng = make_student(net, BitWidths(8, 8)), torch.Generator().manual_seed(0)
    started = post_training_quantize(student, data, batch_size=16, rng=rng)
    config = FinetuneConfig(steps=6, batch_size=8, checkpoints=2, learning_rate=0.5)
    labels = torch.zeros(len(data), dtype=torch.int64)
    finetune(student, started.reference, CalibrationSet(data, labels), config=config, flip=False, rng=rng)
    graph = graph_of(student)
    assert require_no_saturation(graph, name="graph") > 20_000
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(student.to_bytes({}))
    again, _ = load_student(path, net)
    assert again.target_cpu == "any"
    assert graph_of(again).SerializeToString() == graph.SerializeToString()


@pytest.mark.parametrize("word", ["vnii", "VNNI2", "avx2"])
def test_another_word_for_cpu_is_wrong_input(word: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "digits", "--cpu", word, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert ("did you mean 'vnni'?" in result.stderr) == (word != "avx2")
    assert "'any', 'vnni'" in result.stderr
    config = tmp_path / "run.toml"
    config.write_text(f'model = "digits"\ncpu = "{word}"\n')
    result = CliRunner().invoke(main, ["run", "--config", str(config), "--out", str(tmp_path / "run")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "cpu in" in result.stderr


def test_sessions_have_no_option_that_changes_results() -> None:
    graph = graph_of(calibrated(make_net("residual")))
    with OnnxRunner(graph.SerializeToString()) as runner:
        options = runner._session.get_session_options()
        with pytest.raises(RuntimeError):  # what was never set has no value
            options.get_session_config_entry("session.x64quantprecision")


# --- the kernels themselves ---

_SHIM = Path(__file__).with_name("avx2_only.c")
_RUN = """
import sys, numpy as np, onnxruntime
data = np.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: data})[0])
"""


@pytest.fixture(scope="module")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose CPU has no VNNI: this machine's own, or one that hides it."""
    if not adds_in_32_bits():
        return {}
    if "cpuid_fault" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        pytest.skip("this CPU has VNNI and cannot hide it (no cpuid_fault)")
    library = tmp_path_factory.mktemp("avx2") / "avx2_only.so"
    try:
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, _SHIM], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler for what hides VNNI: {error}")
    return {"LD_PRELOAD": str(library)}


def executed(graph: onnx.ModelProto, batch: Array, environment: dict[str, str], folder: Path) -> Array:
    """The answers of a plain session in a process of its own."""
    names = [folder / name for name in ("graph.onnx", "x.npy", "y.npy")]
    onnx.save(graph, names[0])
    np.save(names[1], batch)
    command = [sys.executable, "-c", _RUN, *map(str, names)]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=120)
    answers: Array = np.load(names[2])
    return answers


@pytest.mark.parametrize("name", ["residual", "mobile", "branches"])
def test_a_plain_session_without_vnni_computes_the_graph(name: str, avx2: dict[str, str], tmp_path: Path) -> None:
    graph, batch = graph_of(calibrated(make_net(name))), 3 * images(32, seed=7).numpy()
    with OnnxRunner(graph.SerializeToString(), optimized=False) as runner:
        exact = runner.infer(batch)
    apart = np.abs(executed(graph, batch, avx2, tmp_path) - exact).max(1)
    assert np.median(apart) <= 1e-5 * exact.std()
    assert (apart <= 0.1 * exact.std()).all()  # a value at a tie


def test_kernels_without_vnni_saturate_where_they_are_said_to(avx2: dict[str, str], tmp_path: Path) -> None:
    heavy = np.full((8, 8, 3, 3), 100, np.int8)
    cases = {
        "conv": quantized_layer(heavy),
        "signed": quantized_layer(heavy, kind=np.int8),
        "unsigned": quantized_layer(np.full((8, 8, 3, 3), 228, np.uint8)),
        "depthwise": quantized_layer(np.full((8, 1, 3, 3), 100, np.int8), group=8),
        "gemm": quantized_layer(np.full((8, 4), 100, np.int8), operator="Gemm"),
        "matmul": quantized_layer(np.full((8, 4), 100, np.int8), operator="MatMul"),
        "light": quantized_layer(np.full((8, 8, 3, 3), 60, np.int8)),
    }
    for name, graph in cases.items():
        shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
        top = 127.0 if name == "signed" else 255.0
        batch = np.full(shape, top, np.float32)
        with OnnxRunner(graph.SerializeToString(), optimized=False) as runner:
            exact = runner.infer(batch)
        same = bool((executed(graph, batch, avx2, tmp_path) == exact).all())
        assert same == (not check_saturation(graph)), name
