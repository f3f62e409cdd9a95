"""TensorRT's rules: the project's graphs keep them all, and each break is found where it was made."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import graph_of, needs_compiler, stored
from nets import NETS
from onnx import TensorProto, helper, numpy_helper
from support import call, error_line, output_of

from calib.support.progress import SILENT
from clusterq_deploy.errors import EngineError, ExportError, GraphRefused, VerificationError
from clusterq_deploy.files import read_graph
from clusterq_deploy.lowering import RULES, check_saturation, check_tensorrt, require_tensorrt
from clusterq_deploy.runtimes.tensorrt import BuildConfig, build_engine

Mutation = Callable[[onnx.ModelProto], str]
"""Breaks one rule in a graph, and returns the name of the node that is to be blamed ("" for the whole file)."""


def first(graph: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(n for n in graph.graph.node if n.op_type == operator)


def producer(graph: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(n for n in graph.graph.node if tensor in n.output)


def name_of(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def store(graph: onnx.ModelProto, values: np.ndarray, name: str) -> str:
    graph.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def put(graph: onnx.ModelProto, node: onnx.NodeProto, inputs: dict[int, np.ndarray]) -> str:
    """Store other values for some inputs of a node, and return its name."""
    for index, values in inputs.items():
        node.input[index] = store(graph, values, f"{name_of(node)}.input{index}")
    return name_of(node)


def insert(graph: onnx.ModelProto, index: int, *nodes: onnx.NodeProto) -> None:
    for node in reversed(nodes):
        graph.graph.node.insert(index, node)


def quantizer(graph: onnx.ModelProto) -> onnx.NodeProto:
    """Return the QuantizeLinear of the image."""
    return first(graph, "QuantizeLinear")


def weight(graph: onnx.ModelProto) -> onnx.NodeProto:
    """Return the DequantizeLinear of the first layer's weight."""
    return producer(graph, first(graph, "Conv").input[1])


def _old_opset(graph: onnx.ModelProto) -> str:
    graph.opset_import[0].version = 11
    return ""


def _oldest_opset(graph: onnx.ModelProto) -> str:
    """Leave one node that opset 7 has: a graph of floats."""
    image = graph.graph.input[0].name
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.append(helper.make_node("Flatten", [image], [graph.graph.output[0].name]))
    graph.opset_import[0].version = 7
    return ""


def _new_ir(graph: onnx.ModelProto) -> str:
    graph.ir_version = 13
    return ""


def _unknown_ir(graph: onnx.ModelProto) -> str:
    graph.ir_version = onnx.IR_VERSION + 1
    return ""


def _foreign_operator(graph: onnx.ModelProto) -> str:
    graph.opset_import.append(helper.make_opsetid("com.example", 1))
    first(graph, "Relu").domain = "com.example"
    return ""


def _dead_scale(graph: onnx.ModelProto) -> str:
    scales = stored(graph, weight(graph).input[1])
    scales[3] = 0
    return put(graph, weight(graph), {1: scales})


def _computed_scale(graph: onnx.ModelProto) -> str:
    node = quantizer(graph)
    insert(graph, 0, helper.make_node("ReduceMax", [graph.graph.input[0].name], ["computed"], keepdims=0))
    node.input[1] = "computed"
    return name_of(node)


def _zero_point(graph: onnx.ModelProto) -> str:
    return put(graph, quantizer(graph), {2: np.array(3, np.int8)})


def _unsigned(graph: onnx.ModelProto) -> str:
    zero = {2: np.array(0, np.uint8)}
    put(graph, producer(graph, first(graph, "Conv").input[0]), zero)
    return put(graph, quantizer(graph), zero)


def _no_zero_point(graph: onnx.ModelProto) -> str:
    node = quantizer(graph)
    del node.input[2]
    del producer(graph, first(graph, "Conv").input[0]).input[2]
    return name_of(node)


def _four_bit_convolution(graph: onnx.ModelProto) -> str:
    node = weight(graph)
    integers = stored(graph, node.input[0]) // 16
    zeros = np.zeros(len(integers), np.int8)
    for name, values in (("int4", integers), ("zeros4", zeros)):
        graph.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, values.shape, values.flatten()))
    node.input[0], node.input[2] = "int4", "zeros4"
    return name_of(first(graph, "Conv"))


def _unsigned_weight(graph: onnx.ModelProto) -> str:
    node = weight(graph)
    return put(graph, node, {index: stored(graph, node.input[index]).astype(np.uint8) for index in (0, 2)})


def _unsigned_float_weight(graph: onnx.ModelProto) -> str:
    """Store a weight in float, with a QuantizeLinear to UINT8 in front of its DequantizeLinear."""
    node = weight(graph)
    zeros = store(graph, stored(graph, node.input[2]).astype(np.uint8), "zeros_u8")
    floats = store(graph, stored(graph, node.input[0]).astype(np.float32), "floats")
    quantize = helper.make_node("QuantizeLinear", [floats, node.input[1], zeros], ["integers"], "quantize", axis=0)
    insert(graph, 0, quantize)
    node.input[0], node.input[2] = "integers", zeros
    return "quantize"


def _scales_of_channels(graph: onnx.ModelProto) -> str:
    return put(graph, quantizer(graph), {1: np.full(3, 0.02, np.float32), 2: np.zeros(3, np.int8)})


def _input_channels(graph: onnx.ModelProto) -> str:
    node = weight(graph)
    count = stored(graph, node.input[0]).shape[1]
    put(graph, node, {1: np.full(count, 0.02, np.float32), 2: np.zeros(count, np.int8)})
    next(a for a in node.attribute if a.name == "axis").i = 1
    return name_of(first(graph, "Conv"))


def _too_few_scales(graph: onnx.ModelProto) -> str:
    return put(graph, weight(graph), {1: stored(graph, weight(graph).input[1])[:-1]})


def _no_scales(graph: onnx.ModelProto) -> str:
    return put(graph, weight(graph), {1: np.zeros(0, np.float32), 2: np.zeros(0, np.int8)})


def _no_such_axis(graph: onnx.ModelProto) -> str:
    node = weight(graph)
    next(a for a in node.attribute if a.name == "axis").i = 9
    return name_of(node)


def _scale_not_a_number(graph: onnx.ModelProto) -> str:
    return put(graph, quantizer(graph), {1: np.array(np.nan, np.float32)})


def _integer_scale(graph: onnx.ModelProto) -> str:
    return put(graph, quantizer(graph), {1: np.array(1, np.int64)})


def _scale_of_words(graph: onnx.ModelProto) -> str:
    return put(graph, quantizer(graph), {1: np.array("word", object)})


def _integer_bias(graph: onnx.ModelProto) -> str:
    layer = first(graph, "Conv")
    channels = len(stored(graph, layer.input[2]))
    bias = store(graph, np.zeros(channels, np.int32), "bias32")
    scale = store(graph, np.full(channels, 1e-3, np.float32), "bias_scale")
    insert(graph, 0, helper.make_node("DequantizeLinear", [bias, scale], ["bias_float"], axis=0))
    layer.input[2] = "bias_float"
    return name_of(layer)


def _float_input(graph: onnx.ModelProto) -> str:
    layer = first(graph, "Conv")
    layer.input[0] = graph.graph.input[0].name
    return name_of(layer)


def _float_weight(graph: onnx.ModelProto) -> str:
    integers = stored(graph, weight(graph).input[0])
    return put(graph, first(graph, "Conv"), {1: integers.astype(np.float32)})


def _both_branches(graph: onnx.ModelProto) -> str:
    addition = first(graph, "Add")
    index = next(i for i, tensor in enumerate(addition.input) if producer(graph, tensor).op_type == "Conv")
    other = producer(graph, producer(graph, addition.input[1 - index]).input[0])
    nodes = [
        helper.make_node("QuantizeLinear", [addition.input[index], *other.input[1:]], ["q8"]),
        helper.make_node("DequantizeLinear", ["q8", *other.input[1:]], ["dq8"]),
    ]
    addition.input[index] = "dq8"
    insert(graph, list(graph.graph.node).index(addition), *nodes)
    return name_of(first(graph, "Add"))


def _no_branch(graph: onnx.ModelProto) -> str:
    addition = first(graph, "Add")
    index = next(i for i, tensor in enumerate(addition.input) if producer(graph, tensor).op_type == "DequantizeLinear")
    addition.input[index] = producer(graph, producer(graph, addition.input[index]).input[0]).input[0]
    return name_of(addition)


def _branch_of_another_scale(graph: onnx.ModelProto) -> str:
    concat = first(graph, "Concat")
    node = producer(graph, concat.input[0])
    double = store(graph, 2 * stored(graph, node.input[1]), "double")
    node.input[1] = producer(graph, node.input[0]).input[1] = double
    return name_of(concat)


def _pool_of_another_scale(graph: onnx.ModelProto) -> str:
    pool = first(graph, "MaxPool")
    behind = next(n for n in graph.graph.node if n.op_type == "QuantizeLinear" and pool.output[0] in n.input)
    dequantize = next(n for n in graph.graph.node if behind.output[0] in n.input)
    behind.input[1] = dequantize.input[1] = store(graph, 2 * stored(graph, behind.input[1]), "double")
    return name_of(pool)


def _half_layer(graph: onnx.ModelProto) -> str:
    gemm = first(graph, "Gemm")
    place, output = list(graph.graph.node).index(gemm), gemm.output[0]
    names = [f"half{index}" for index in range(len(gemm.input))]
    casts = [
        helper.make_node("Cast", [tensor], [name], to=TensorProto.FLOAT16)
        for tensor, name in zip(gemm.input, names, strict=True)
    ]
    gemm.input[:], gemm.output[0] = names, "half_logits"
    insert(graph, place + 1, helper.make_node("Cast", ["half_logits"], [output], to=TensorProto.FLOAT))
    insert(graph, place, *casts)
    graph.graph.ClearField("value_info")
    return name_of(first(graph, "Gemm"))


def _integer_operator(graph: onnx.ModelProto) -> str:
    image = graph.graph.input[0].name
    insert(graph, 0, helper.make_node("DynamicQuantizeLinear", [image], ["q", "s", "z"], name="dynamic"))
    return "dynamic"


def _integer_operator_of_onnxruntime(graph: onnx.ModelProto) -> str:
    """Add integers in ONNX Runtime's own domain, which a warning names too."""
    node, scale = quantizer(graph), store(graph, np.array(0.1, np.float32), "sum_scale")
    zero = store(graph, np.array(0, np.int8), "sum_zero")
    side = [node.output[0], scale, zero]
    place = list(graph.graph.node).index(node) + 1
    domain = "com.microsoft"
    insert(graph, place, helper.make_node("QLinearAdd", [*side, *side, scale, zero], ["sum"], "sum", domain=domain))
    graph.opset_import.append(helper.make_opsetid(domain, 1))
    return "sum"


def _unsigned_in_a_branch(graph: onnx.ModelProto) -> str:
    image, scale = graph.graph.input[0].name, store(graph, np.array(0.1, np.float32), "hidden_scale")
    nodes = [
        helper.make_node("QuantizeLinear", [image, scale], ["then"], name="hidden"),
        helper.make_node("Cast", [image], ["else"], to=TensorProto.UINT8),
    ]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None) for node in nodes]
    branches = {
        f"{output.name}_branch": helper.make_graph([node], output.name, [], [output])
        for node, output in zip(nodes, outputs, strict=True)
    }
    condition = store(graph, np.array(True), "condition")
    insert(graph, 0, helper.make_node("If", [condition], ["either"], **branches))
    return "hidden"


MUTATIONS: list[tuple[str, Mutation]] = [
    ("opset", _old_opset),
    ("version", _new_ir),
    ("version", _unknown_ir),
    ("version", _oldest_opset),
    ("domain", _foreign_operator),
    ("operator", _integer_operator),
    ("operator", _integer_operator_of_onnxruntime),
    ("scale", _dead_scale),
    ("scale", _computed_scale),
    ("scale", _too_few_scales),
    ("scale", _no_scales),
    ("scale", _no_such_axis),
    ("scale", _scale_not_a_number),
    ("scale", _integer_scale),
    ("scale", _scale_of_words),
    ("zero-point", _zero_point),
    ("activation-type", _unsigned),
    ("activation-type", _no_zero_point),
    ("activation-type", _unsigned_in_a_branch),
    ("weight-type", _four_bit_convolution),
    ("weight-type", _unsigned_weight),
    ("weight-type", _unsigned_float_weight),
    ("activation-axis", _scales_of_channels),
    ("weight-axis", _input_channels),
    ("bias", _integer_bias),
    ("inputs", _float_input),
    ("inputs", _float_weight),
    ("residual", _both_branches),
    ("residual", _no_branch),
    ("concat", _branch_of_another_scale),
    ("pool", _pool_of_another_scale),
    ("fp16", _half_layer),
]


def graph_for_tensorrt(name: str = "residual", bits: str = "w8a8") -> onnx.ModelProto:
    return graph_of(name, "tensorrt", bits)[1]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETS)
def test_check_tensorrt_accepts_the_projects_graphs(name: str, bits: str) -> None:
    assert check_tensorrt(graph_for_tensorrt(name, bits)) == []


@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS, ids=[mutate.__name__[1:] for _, mutate in MUTATIONS])
def test_check_tensorrt_finds_a_break_where_it_is(rule: str, mutate: Mutation) -> None:
    graph = graph_for_tensorrt("branches" if rule == "concat" else "residual")
    blamed = mutate(graph)
    breaks = [b for b in check_tensorrt(graph) if b.rule != "domain" or rule == "domain"]
    assert {b.rule for b in breaks} == {rule}
    assert [b.node for b in breaks] == [blamed]
    assert breaks[0].severity == RULES[rule].severity


COMPILED = {
    "_old_opset": "quantizers with an axis, in opset 11",
    "_computed_scale": "a scale that is computed at run time",
    "_unsigned": "an activation in UINT8, zero-point 0",
    "_no_zero_point": "a QuantizeLinear without zero-point, which is UINT8",
    "_unsigned_in_a_branch": "UINT8 in a branch of an If",
    "_unsigned_float_weight": "a QuantizeLinear to UINT8 of a float weight",
    "_scales_of_channels": "a scale for each channel of an activation",
}
"""The mutations that a rule calls an error and TensorRT-RTX builds, as the documentation describes them."""


@needs_compiler
@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS, ids=[mutate.__name__[1:] for _, mutate in MUTATIONS])
def test_compiler_refuses_what_breaks_a_rule_except_what_the_documentation_lists(
    rule: str, mutate: Mutation, tmp_path: Path
) -> None:
    graph = graph_for_tensorrt("branches" if rule == "concat" else "residual")
    blamed = mutate(graph)
    onnx.save(graph, tmp_path / "net.onnx")
    config, engine = BuildConfig(rtx=("sm86",)), tmp_path / "net.rtx.engine"
    if RULES[rule].severity == "warning" or mutate.__name__ in COMPILED:
        plan = build_engine(tmp_path / "net.onnx", engine, config, SILENT).plan
        assert plan is not None
        assert plan.kernels
        return
    with pytest.raises(EngineError) as caught:
        build_engine(tmp_path / "net.onnx", engine, config, SILENT)
    if isinstance(caught.value, GraphRefused):
        (refusal,) = caught.value.refusals
        assert refusal.node in {blamed, "bias_float", ""}
        assert refusal.reason
    else:
        assert rule == "weight-type"  # INT4 parses, and does not compile
    assert "driver" not in str(caught.value)  # there is none, and none is needed


def test_documentation_lists_what_the_compiler_builds_although_a_rule_is_broken() -> None:
    rules = {mutate.__name__: rule for rule, mutate in MUTATIONS}
    text = (Path(__file__).parents[1] / "docs/graphs.md").read_text()
    for name, words in COMPILED.items():
        assert RULES[rules[name]].severity == "error"
        assert f"| `{rules[name]}` | {words} | builds" in text


def test_every_rule_has_a_mutation_and_a_row_in_the_documentation() -> None:
    assert {rule for rule, _ in MUTATIONS} == set(RULES)
    text = (Path(__file__).parents[1] / "docs/graphs.md").read_text()
    for rule in RULES.values():
        assert f"| `{rule.name}` | {rule.severity} | {rule.reason} |" in text


def test_require_tensorrt_raises_for_errors_and_returns_warnings() -> None:
    graph = graph_for_tensorrt()
    blamed = _dead_scale(graph)
    with pytest.raises(VerificationError, match=f"rule scale at {blamed}"):
        require_tensorrt(graph, name="w8a8/model.trt.onnx")
    graph = graph_for_tensorrt()
    _pool_of_another_scale(graph)
    assert [b.rule for b in require_tensorrt(graph, name="w8a8/model.trt.onnx")] == ["pool"]


def test_check_command_reports_breaks_of_any_file(tmp_path: Path) -> None:
    graph = graph_for_tensorrt()
    onnx.save(graph, tmp_path / "good.onnx")
    blamed = _dead_scale(graph)
    onnx.save(graph, tmp_path / "bad.onnx")
    good = output_of("check", tmp_path / "good.onnx")
    bad, machine = (call("check", tmp_path / "bad.onnx", *form) for form in ((), ("--json",)))
    assert (bad.exit_code, machine.exit_code) == (1, 1)
    assert "errors 0, warnings 0" in good
    assert "errors 1, warnings 0" in bad.stdout
    rows = [(b["rule"], b["node"]) for b in json.loads(machine.stdout)]
    assert [row for row in rows if row[0] != "saturation"] == [("scale", blamed)]
    assert "saturate in ONNX Runtime on CPUs without VNNI" in good  # INT8 by INT8 is for TensorRT


def _through_an_identity(graph: onnx.ModelProto) -> None:
    node = quantizer(graph)
    scale = node.input[1]
    for reader in graph.graph.node:
        reader.input[:] = ["same" if name == scale else name for name in reader.input]
    insert(graph, 0, helper.make_node("Identity", [scale], ["same"]))


def _initializers_as_inputs(graph: onnx.ModelProto) -> None:
    tensors = [(t.name, t.data_type, list(t.dims)) for t in graph.graph.initializer]
    graph.graph.input.extend(helper.make_tensor_value_info(*tensor) for tensor in tensors)
    graph.ir_version = 3


def _output_without_shape(graph: onnx.ModelProto) -> None:
    graph.graph.output[0].type.tensor_type.ClearField("shape")


def _scale_along_a_negative_axis(graph: onnx.ModelProto) -> None:
    next(a for a in weight(graph).attribute if a.name == "axis").i = -4


def _quantized_bias(graph: onnx.ModelProto) -> None:
    """Store a bias as INT8: NVIDIA's parser refuses INT32 only."""
    layer = first(graph, "Conv")
    scale = store(graph, np.array(1e-3, np.float32), "bias_scale")
    bias = store(graph, np.zeros(len(stored(graph, layer.input[2])), np.int8), "bias8")
    insert(graph, 0, helper.make_node("DequantizeLinear", [bias, scale], ["bias_float"]))
    layer.input[2] = "bias_float"


def _quantizers_in_a_function(graph: onnx.ModelProto) -> None:
    """Have a local function quantize the image: its scale is no constant inside of it."""
    node = quantizer(graph)
    names, opset = ["x", "s", "z"], helper.make_opsetid("", 21)
    body = helper.make_node("QuantizeLinear", names, ["q"], name="inside")
    graph.functions.append(helper.make_function("local", "quantize", names, ["q"], [body], [opset]))
    graph.opset_import.append(helper.make_opsetid("local", 1))
    node.domain, node.op_type = "local", "quantize"


def _transposed_weight(graph: onnx.ModelProto) -> None:
    """Multiply by a transposed weight, as torch exports a linear layer."""
    gemm = first(graph, "Gemm")
    next(a for a in gemm.attribute if a.name == "transB").i = 0
    node = helper.make_node("Transpose", [gemm.input[1]], ["transposed"], perm=[1, 0])
    insert(graph, list(graph.graph.node).index(gemm), node)
    first(graph, "Gemm").input[1] = "transposed"


@pytest.mark.parametrize(
    "change",
    [
        _through_an_identity,
        _initializers_as_inputs,
        _output_without_shape,
        _scale_along_a_negative_axis,
        _quantized_bias,
        _quantizers_in_a_function,
        _transposed_weight,
    ],
)
def test_check_tensorrt_accepts_what_other_exporters_write(change: Callable[[onnx.ModelProto], None]) -> None:
    graph = graph_for_tensorrt()
    change(graph)
    assert check_tensorrt(graph) == []


def one_layer(operator: str, axis: int, *, opset: int = 21, group: int = 1, zero: int = 0) -> onnx.ModelProto:
    """Return a graph of one quantized layer, the scales of its weight along an axis, or one if that is negative."""
    shape = (3, 6 // group, 3, 3) if operator == "ConvTranspose" else (6, 3 // group, 3, 3)
    scale = np.full(shape[axis] if axis >= 0 else (), 0.01, np.float32)
    options = {"axis": axis} if axis >= 0 else {}
    constants = {
        "w": np.ones(shape, np.float32),
        "s": np.float32(0.02),
        "z": np.int8(zero),
        "ws": scale,
        "wz": np.zeros(scale.shape, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], **options),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], **options),
        helper.make_node(operator, ["d", "wd"], ["y"], name="layer", group=group),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(helper.make_graph(nodes, "graph", [x], [y], tensors), opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(
    ("operator", "axis", "group", "rules"),
    [
        ("Conv", 0, 1, []),
        ("Conv", 1, 1, ["weight-axis"]),
        ("Conv", 3, 1, ["weight-axis"]),
        ("ConvTranspose", 0, 1, []),  # an axis for each of NVIDIA's answers
        ("ConvTranspose", 1, 1, []),
        ("ConvTranspose", 0, 3, []),
        ("ConvTranspose", 2, 1, ["weight-axis"]),
    ],
)
def test_scales_along_another_axis_are_a_warning(operator: str, axis: int, group: int, rules: list[str]) -> None:
    breaks = check_tensorrt(one_layer(operator, axis, group=group))
    assert [(b.rule, b.severity, b.node) for b in breaks] == [(rule, "warning", "layer") for rule in rules]


@pytest.mark.parametrize("opset", [10, 12, 13, 21])
def test_check_tensorrt_reads_scales_per_tensor_of_any_opset(opset: int) -> None:
    assert check_tensorrt(one_layer("Conv", -1, opset=opset)) == []
    breaks = check_tensorrt(one_layer("Conv", -1, opset=opset, zero=-128))
    assert [(b.rule, b.node) for b in breaks] == [("zero-point", "quantize")]  # once for a pair
    rules = [b.rule for b in check_tensorrt(one_layer("Conv", 0, opset=opset))]
    assert rules == (["opset"] if opset < 13 else [])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_check_command_is_quiet_about_numbers_that_are_none(value: float, tmp_path: Path) -> None:
    """In scales, weights and bounds: no exception, and no warning of numpy, which would be an error here."""
    graph = one_layer("Conv", 0)
    scales, weights = stored(graph, "ws"), stored(graph, "w")
    scales[2], weights[1, 1] = value, value
    for name, values in (("ws", scales), ("w", weights), ("s", np.array(value, np.float32))):
        tensor = next(t for t in graph.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    insert(graph, 0, helper.make_node("Clip", ["x", "s", "s"], ["bounded"]))
    graph.graph.node[1].input[0] = "bounded"
    onnx.save(graph, tmp_path / "file.onnx")
    result = call("check", tmp_path / "file.onnx", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert {row["rule"] for row in json.loads(result.stdout)} == {"scale"}


def damage(graph: onnx.GraphProto, rng: random.Random) -> None:
    """Change one thing in a graph of `one_layer`, so that it may be no valid ONNX."""
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    match rng.randrange(7):
        case 0:
            node.input[rng.randrange(len(node.input))] = rng.choice(["", *(t.name for t in graph.initializer)])
        case 1:
            node.input.pop()
        case 2:
            node.op_type = rng.choice(
                ["Clip", "Relu", "MaxPool", "Concat", "Gemm", "MatMul", "QLinearConv", "Identity"]
            )
        case 3:
            options = ["axis", "block_size", "transB", "group", "output_dtype"]
            node.attribute.append(helper.make_attribute(rng.choice(options), rng.choice([0, -9, 2, 1000])))
        case 4:
            tensor.data_type = rng.randrange(24)
        case 5:
            tensor.dims.append(rng.choice([0, 1, 2]))
        case 6:
            shape, value = rng.choice([(), (0,), (6,), (1, 1)]), rng.choice([0, np.nan, np.inf, -1, 1e-45, 1e30])
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, np.float32), tensor.name))


def test_checks_of_damaged_graphs_end_in_a_result_or_one_line() -> None:
    rng, refusals, checked = random.Random(0), [], 0
    for _ in range(2000):
        graph = one_layer(rng.choice(["Conv", "ConvTranspose"]), rng.randrange(-1, 4), opset=rng.choice([10, 13, 21]))
        for _ in range(rng.randrange(1, 3)):
            damage(graph.graph, rng)
        try:
            check_tensorrt(graph)
            check_saturation(graph)
            checked += 1
        except ExportError as error:
            refusals.append(str(error))
    assert min(len(refusals), checked) > 200
    assert all(len(line.splitlines()) == 1 for line in refusals)


def test_check_command_refuses_invalid_onnx_in_one_line(tmp_path: Path) -> None:
    graph = graph_for_tensorrt()
    del quantizer(graph).input[1:]
    with pytest.raises(ExportError, match=r"the graph is no valid ONNX: .*QuantizeLinear"):
        check_tensorrt(graph)
    onnx.save(graph, tmp_path / "file.onnx")
    assert "no valid ONNX" in error_line("check", tmp_path / "file.onnx")


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x0a"])
def test_read_graph_refuses_other_files_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="is not an ONNX file"):
        read_graph(path)
    assert "is not an ONNX file" in error_line("check", path)
    assert "cannot read" in error_line("check", tmp_path / "none.onnx")
