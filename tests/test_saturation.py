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
from graphs import SIZE, graph_of, infer, reference, stored, with_stored
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, calibrated, captured, images, make_net
from onnx import TensorProto, helper, numpy_helper
from support import call, error_line, seeded

from calib.calibration_set import CalibrationSet
from clusterq_deploy.environment import adds_in_32_bits
from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering import check_saturation, export_graph, lower, pair_sums, require_no_saturation, verify
from clusterq_deploy.quantization import (
    BitWidths,
    finetune,
    fit_full_range_biases,
    load_student,
    make_student,
    post_training_quantize,
)
from clusterq_deploy.quantization.fake_quant import pooled_dims, row_bounds, second_extremes
from clusterq_deploy.quantization.grid import Grid, pair_limit
from clusterq_deploy.quantization.qat.finetune import FinetuneConfig
from clusterq_deploy.runtimes.runners import OnnxRunner

Integers = npt.NDArray[np.int64]
Array = npt.NDArray[np.generic]


def integer_rows(graph: onnx.ModelProto, weight: str) -> Integers:
    """Return a weight's integers by output channel, (O, K)."""
    integers = stored(graph, f"{weight}.integers").astype(np.int64)
    return integers.reshape(len(integers), -1)


def added_in_pairs(x: Integers, weight: Integers) -> Integers:
    """Compute what `vpmaddubsw` and `vpmaddwd` make of x (n, K) and a weight (O, K): pairs saturate at 16 bits."""
    if x.shape[1] % 2:
        x, weight = (np.pad(rows, ((0, 0), (0, 1))) for rows in (x, weight))
    products = x[:, None] * weight[None]
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(-1)


def quantized_layer(
    weight: Array, *, operator: str = "Conv", kind: type = np.uint8, high: int | None = None, **attributes: int
) -> onnx.ModelProto:
    """Return a graph of one quantized layer, its input UINT8 or INT8, bounded to `high` if that is given."""
    by_column = operator != "Conv" and not attributes.get("transB")
    inputs = weight.shape[0] if by_column else weight.shape[1] * attributes.get("group", 1)
    shape = [1, inputs, 8, 8] if operator == "Conv" else [1, inputs]
    constants = {
        "step": np.float32(1),
        "wide": np.float32(2.0**14),
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
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * len(shape))
    return model(nodes, x, out, constants)


def model(
    nodes: list[onnx.NodeProto], x: onnx.ValueInfoProto, y: onnx.ValueInfoProto, constants: dict[str, object]
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "graph", [x], [y], tensors), opset_imports=opsets, ir_version=10)


HEAVY = np.full((8, 8, 3, 3), 100, np.int8)
LAYERS = {
    "conv": (quantized_layer(HEAVY), True),
    "grouped": (quantized_layer(HEAVY[:, :4], group=2), True),
    "signed": (quantized_layer(HEAVY, kind=np.int8), True),
    "gemm": (quantized_layer(HEAVY[..., 0, 0], operator="Gemm"), True),
    "matmul": (quantized_layer(HEAVY[..., 0, 0], operator="MatMul"), True),
    "light": (quantized_layer(HEAVY // 2), False),
    "unsigned": (quantized_layer(np.full((8, 8, 3, 3), 228, np.uint8)), False),
    "depthwise": (quantized_layer(HEAVY[:, :1], group=8), False),
}
"""Graphs of one layer, and whether it saturates without VNNI."""


def behind(operator: str, graph: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Put a node between a tensor and what reads it; a Clip bounds it to 15."""
    for node in graph.graph.node:
        node.input[:] = ["changed" if name == tensor else name for name in node.input]
    bounds = ["least", "most"] if operator == "Clip" else []
    values = zip(["least", "most"], [0, 15], strict=True)
    graph.graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in values)
    place = next((i + 1 for i, node in enumerate(graph.graph.node) if tensor in node.output), 0)
    graph.graph.node.insert(place, helper.make_node(operator, [tensor, *bounds], ["changed"]))
    return graph


FULL = np.full((8, 8, 3, 3), 127, np.int8)
BOUNDED = {
    "conv": behind("Clip", quantized_layer(FULL, kind=np.int8), "x"),
    "gemm": behind("Clip", quantized_layer(FULL[..., 0, 0], operator="Gemm", kind=np.int8), "x"),
    "matmul": behind("Clip", quantized_layer(FULL[..., 0, 0], operator="MatMul", kind=np.int8), "x"),
}
"""Graphs of one layer whose data, INT8 of a type that the file does not state, is 0 to 15: 128 to 143 in the kernel."""

IN_FLOAT = {
    "Relu": behind("Relu", quantized_layer(HEAVY, kind=np.int8), "y"),
    "Sigmoid": behind("Sigmoid", quantized_layer(HEAVY), "y"),
}
"""Graphs of a convolution that ONNX Runtime computes in float, as its quantizer cannot follow directly."""


def test_pair_limit_by_hand() -> None:
    eight, seven, four = (Grid(bits, signed=True) for bits in (8, 7, 4))
    assert pair_limit(eight, Grid(8, signed=False)) == 128  # 128 * 255 = 32,640
    assert pair_limit(eight, eight) == 128  # stored with zero-point 128: up to 255
    assert pair_limit(eight, Grid(4, signed=True)) == 242  # up to 135; 242 * 135 = 32,670
    assert pair_limit(eight, Grid(7, signed=False)) is None  # 256 * 127 = 32,512
    assert pair_limit(eight, Grid(4, signed=False)) is None
    assert pair_limit(seven, Grid(8, signed=False)) is None
    assert pair_limit(four, eight) is None


def test_row_bounds_by_hand() -> None:
    rows = torch.tensor([[100.0, 20.0, -5.0], [90.0, 80.0, -128.0], [60.0, 61.0, -3.0], [-127.0, -126.0, 127.0]])
    low, high = row_bounds(second_extremes(rows), torch.ones(4), Grid(8, signed=True), 128)
    assert high.tolist() == [108, 64, 68, 127]  # next to 20, 80, 60, and nothing positive
    assert low.tolist() == [-128, -128, -128, -64]


@given(
    st.lists(st.lists(st.floats(-300, 300, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from([128, 129, 242]),
)
@settings(max_examples=200, deadline=None)
def test_row_bounds_keep_any_two_integers_within_the_limit(rows: list[list[float]], limit: int) -> None:
    weight, grid = torch.tensor(rows), Grid(8, signed=True)
    low, high = row_bounds(second_extremes(weight), torch.ones(len(rows)), grid, limit)
    nearest = weight.round().clamp(grid.low, grid.high)
    integers = nearest.clamp(low[:, None], high[:, None])
    for sign in (1, -1):
        assert (sign * integers).clamp_min(0).topk(2, 1).values.sum(1).max() <= limit
        fits = (sign * nearest).clamp_min(0).topk(2, 1).values.sum(1) <= limit
        inside = (nearest * sign <= 0) | (nearest == integers)
        assert bool(inside[fits].all())  # what fits is left alone


def test_row_bounds_keep_the_range_of_a_row_of_one_value() -> None:
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
def test_pair_sums_of_a_row_by_hand(weight: list[list[int]], options: dict[str, object], largest: int) -> None:
    for operator, shape, more in (("Conv", (1, 4, 1, 1), {}), ("MatMul", (4, 1), {}), ("Gemm", (1, 4), {"transB": 1})):
        values = np.array(weight, np.int8).reshape(shape)
        (pair,) = pair_sums(quantized_layer(values, operator=operator, **options, **more))  # type: ignore[arg-type]
        assert abs(pair.largest) == abs(largest)
        assert (pair.node, pair.weight, pair.channel) == ("layer", "w", 0)
        assert pair.fits == (abs(largest) <= 32767)


@pytest.mark.parametrize("name", LAYERS)
def test_check_saturation_names_the_layers_that_can_saturate(name: str, tmp_path: Path) -> None:
    graph, saturates = LAYERS[name]
    warnings = check_saturation(graph)
    assert [warning.node for warning in warnings] == (["layer"] if saturates else [])
    onnx.save(graph, tmp_path / "layer.onnx")
    result = call("check", tmp_path / "layer.onnx", "--json")
    rows = [row for row in json.loads(result.stdout) if row["rule"] == "saturation"]
    assert [row["severity"] for row in rows] == (["warning"] if saturates else [])
    assert all("VNNI" in row["message"] and "51,000" in row["message"] for row in rows)  # 2 * 100 * 255
    assert [pair.depthwise for pair in pair_sums(graph)] == ([] if name == "unsigned" else [name == "depthwise"])


@pytest.mark.parametrize(
    ("operator", "inputs", "domain"),
    [
        ("QLinearConv", "x s z w s zw s z", ""),
        ("QLinearMatMul", "x s z w s zw s z", ""),
        ("MatMulInteger", "x w z zw", ""),
        ("QGemm", "x s z w s zw", "com.microsoft"),
    ],
)
def test_pair_sums_of_integer_operators(operator: str, inputs: str, domain: str) -> None:
    weight, shape = ((4, 8, 1, 1), [1, 8, 2, 2]) if operator == "QLinearConv" else ((8, 4), [1, 8])
    constants = {"s": np.float32(1), "z": np.uint8(0), "zw": np.int8(0), "w": np.full(weight, 90, np.int8)}
    node = helper.make_node(operator, inputs.split(), ["y"], name="layer", domain=domain)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, shape)
    (pair,) = pair_sums(model([node], x, helper.make_empty_tensor_value_info("y"), constants))
    assert pair.largest == 2 * 90 * 255


@pytest.mark.parametrize("name", BOUNDED)
def test_pair_sums_of_bounded_int8_have_the_kernels_offset(name: str) -> None:
    (pair,) = pair_sums(BOUNDED[name])
    assert pair.largest == 2 * 127 * (128 + 15)
    assert [warning.node for warning in check_saturation(BOUNDED[name])] == ["layer"]


@pytest.mark.parametrize("name", IN_FLOAT)
def test_check_saturation_leaves_out_convolutions_in_float(name: str) -> None:
    assert not pair_sums(IN_FLOAT[name])[0].fits
    assert check_saturation(IN_FLOAT[name]) == []


def test_pair_sums_read_weights_that_are_stored_in_float() -> None:
    graph = quantized_layer(HEAVY)
    graph.graph.initializer.append(numpy_helper.from_array(HEAVY.astype(np.float32), "floats"))
    place = next(i for i, node in enumerate(graph.graph.node) if "w" in node.input)
    graph.graph.node[place].input[0] = "wq"
    graph.graph.node.insert(place, helper.make_node("QuantizeLinear", ["floats", "step", "wz"], ["wq"]))
    (pair,) = pair_sums(graph)
    assert (pair.weight, pair.largest) == ("floats", 2 * 100 * 255)


def test_pair_sums_keep_bounds_through_what_only_moves_values() -> None:
    """A 4-bit grid stays one behind a max-pool and a quantizer of the same scale, and not behind another scale."""
    graph = quantized_layer(np.full((4, 8, 1, 1), 100, np.int8), high=15)
    pooled = [
        helper.make_node("MaxPool", ["d"], ["pooled"], kernel_shape=[2, 2]),
        helper.make_node("QuantizeLinear", ["pooled", "step", "zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "step", "zero"], ["d2"]),
    ]
    layer = next(index for index, node in enumerate(graph.graph.node) if node.op_type == "Conv")
    graph.graph.node[layer].input[0] = "d2"
    for node in reversed(pooled):
        graph.graph.node.insert(layer, node)
    assert pair_sums(graph)[0].largest == 15 * 200
    for node in graph.graph.node:
        if node.output[0] in {"q2", "d2"}:
            node.input[1] = "wide"
    assert pair_sums(graph)[0].largest == 255 * 200


@pytest.mark.parametrize(("name", "bits"), [*((name, "w8a8") for name in NETS), ("mobile", "w4a4"), ("mobile", "w8a4")])
def test_require_no_saturation_accepts_the_projects_graphs_however_paired(name: str, bits: str) -> None:
    _, graph = graph_of(name, "onnxruntime", bits)
    assert require_no_saturation(graph, name=name) <= 32767
    rng, pairs = np.random.default_rng(0), pair_sums(graph)
    for pair in pairs:
        rows = integer_rows(graph, pair.weight)
        top = 255 if bits == "w8a8" else 15  # which layers read a narrow grid is not known here
        for x in (np.where(rows > 0, top, 0), np.where(rows < 0, top, 0), rng.integers(0, top + 1, rows.shape)):
            order = rng.permutation(rows.shape[1])
            assert (added_in_pairs(x[:, order], rows[:, order]) == x @ rows.T).all(), pair
    assert len(pairs) == sum(node.op_type in {"Conv", "Gemm"} for node in graph.graph.node)


def test_verify_refuses_a_graph_of_full_range() -> None:
    _, graph = graph_of("residual", "onnxruntime", "w8a8", "vnni")
    pair = next(pair for pair in pair_sums(graph) if not pair.fits)
    rows = integer_rows(graph, pair.weight)
    x, order = np.where(rows > 0, 255, 0), np.argsort(-rows[pair.channel])
    assert (added_in_pairs(x[:, order], rows[:, order]) != x @ rows.T).any()
    with pytest.raises(VerificationError, match=rf"graph saturates at {pair.node}: two products of output channel"):
        require_no_saturation(graph, name="graph")
    with pytest.raises(VerificationError, match="saturates"):
        verify(graph, images(1).numpy(), np.zeros((1, 10), np.float32), name="graph", optimized=True)


def test_for_target_tensorrt_keeps_eight_bits() -> None:
    student, full = (calibrated("residual", "w8a8", cpu=cpu) for cpu in ("any", "vnni"))
    with student.for_target("tensorrt"):
        for name, layer in student.layers().items():
            wide = full.layers()[name]
            assert torch.equal(layer.weight, wide.weight)
            integers = layer.weight_quantizer.integers(layer.weight)
            assert torch.equal(integers, wide.weight_quantizer.integers(wide.weight))
            assert int(integers.abs().max()) > 100
    for name, layer in student.layers().items():  # outside of it, the graph for any CPU
        integers = layer.weight_quantizer.integers(layer.weight).flatten(1)
        assert int(integers.clamp_min(0).topk(2, 1).values.sum(1).max()) <= 128, name
        assert bool((layer.weight_quantizer.widening >= 1).all())


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_fit_full_range_biases_keeps_the_mean_of_outputs(name: str) -> None:
    """Layer by layer the mean of the outputs is the same, whichever way the weight is rounded, on one input."""
    student, data = calibrated(name, "w8a8"), images(64)
    fit_full_range_biases(student, data)
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, student.on_int8_grids(), torch.no_grad():
        for name_, layer in student.layers().items():
            hook = layer.register_forward_hook(lambda _, args, __, name=name_: inputs.update({name: args[0]}))
            hooks.enter_context(hook)
        student(data)
    compared = 0
    for layer_name, layer in student.layers().items():
        if layer.bias is None or layer.weight_quantizer.pair_limit is None:
            continue
        x = inputs[layer_name]
        dims = pooled_dims(layer, layer(x))
        limited = layer(x).mean(dims)
        with student.without_pair_limits():
            full = layer(x).mean(dims)
        unshifted = (full - layer.weight_quantizer.bias_shift).detach()
        torch.testing.assert_close(full, limited, atol=1e-4, rtol=1e-4)
        compared += bool((unshifted - limited).abs().max() > 1e-3)
    assert compared > 2  # without them the means differ
    graph = lower(export_graph(student, SIZE), student, "tensorrt")
    verify(graph, data.numpy(), reference(student, "tensorrt", data), name=name, optimized=False)


def test_finetune_keeps_the_limit_and_load_student_the_graph(tmp_path: Path) -> None:
    net, data = make_net("mobile"), images(32)
    student, rng = make_student(captured(net), BitWidths(8, 8)), seeded(0)
    started = post_training_quantize(student, data, batch_size=16, rng=rng)
    config = FinetuneConfig(steps=6, batch_size=8, checkpoints=2, learning_rate=0.5)
    labels = torch.zeros(len(data), dtype=torch.int64)
    finetune(student, started.reference, CalibrationSet(data, labels), config=config, flip=False, rng=rng)
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(student.to_bytes({}))
    loaded, _ = load_student(path, captured(net))
    assert loaded.target_cpu == "any"
    graph, again = (lower(export_graph(s, SIZE), s, "onnxruntime") for s in (student, loaded))
    assert require_no_saturation(graph, name="graph") > 20_000
    assert again.SerializeToString() == graph.SerializeToString()


@pytest.mark.parametrize("word", ["vnii", "VNNI2", "avx2"])
def test_run_refuses_an_unknown_cpu(word: str, tmp_path: Path) -> None:
    said = error_line("run", "digits", "--cpu", word, "--out", tmp_path / "run")
    assert ("did you mean 'vnni'?" in said) == (word != "avx2")
    assert "'any', 'vnni'" in said
    config = tmp_path / "run.toml"
    config.write_text(f'model = "digits"\ncpu = "{word}"\n')
    assert "cpu in" in error_line("run", "--config", config, "--out", tmp_path / "run")


def test_onnx_runner_sets_no_option_that_changes_results() -> None:
    _, graph = graph_of("residual", "onnxruntime", "w8a8")
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
    """Return the environment of a process whose CPU has no VNNI: this machine's own, or one that hides it."""
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
    """Return the answers of a plain session in a process of its own."""
    names = [folder / name for name in ("graph.onnx", "x.npy", "y.npy")]
    onnx.save(graph, names[0])
    np.save(names[1], batch)
    command = [sys.executable, "-c", _RUN, *map(str, names)]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=120)
    answers: Array = np.load(names[2])
    return answers


@pytest.mark.parametrize("name", NETS)
def test_plain_session_without_vnni_computes_the_graph(name: str, avx2: dict[str, str], tmp_path: Path) -> None:
    (_, graph), batch = graph_of(name, "onnxruntime", "w8a8"), 3 * images(32, seed=7).numpy()
    exact = infer(graph, batch)
    apart = np.abs(executed(graph, batch, avx2, tmp_path) - exact).max(1)
    assert np.median(apart) <= 1e-5 * exact.std()
    assert (apart <= 0.1 * exact.std()).all()  # a value at a tie


@pytest.mark.parametrize("graph", [*BOUNDED.values(), *IN_FLOAT.values()], ids=[*BOUNDED, *IN_FLOAT])
def test_kernels_without_vnni_saturate_behind_a_clip_and_not_in_float(
    graph: onnx.ModelProto, avx2: dict[str, str], tmp_path: Path
) -> None:
    shape = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim]
    batch = np.full(shape, 127, np.float32)
    fine = with_stored(graph, "wide", np.array(256, np.float32))  # steps that show the lost part of a sum
    same = bool((executed(fine, batch, avx2, tmp_path) == infer(fine, batch)).all())
    assert same == (not check_saturation(graph))


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_without_vnni_saturate_as_check_saturation_says(
    name: str, avx2: dict[str, str], tmp_path: Path
) -> None:
    graph, saturates = LAYERS[name]
    shape = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim]
    batch = np.full(shape, 127 if name == "signed" else 255, np.float32)
    same = bool((executed(graph, batch, avx2, tmp_path) == infer(graph, batch)).all())
    assert same != saturates
