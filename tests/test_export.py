"""Exported graphs compute what torch computes, in the operators that their targets need."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import (
    GRAPH_FORMATS,
    SIZE,
    exported,
    graph_of,
    infer,
    initializers,
    optimized_operators,
    producers,
    reference,
    stored,
    with_stored,
)
from nets import NETS, calibrated, images, make_net
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from clusterq_deploy.errors import ExportError, VerificationError
from clusterq_deploy.lowering import (
    GraphFormat,
    annotate,
    check_tensorrt,
    compare_integers,
    export_graph,
    float_graphs,
    fp16_baseline,
    lower,
    require_same_integers,
    student_graphs,
    target_of,
    to_fp16,
    to_tensorrt_rtx,
    verify,
)
from clusterq_deploy.lowering.graphs import _float_layers
from clusterq_deploy.lowering.verify import integer_layers
from clusterq_deploy.models import InputSpec
from clusterq_deploy.runtimes.runners import OnnxRunner

BATCH = images(64, seed=7)


def types(graph: onnx.ModelProto) -> Counter[int]:
    return Counter(tensor.data_type for tensor in graph.graph.initializer)


def types_at_ends(graph: onnx.ModelProto) -> list[int]:
    return [value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)]


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a5"])
def test_lower_keeps_torchs_logits_and_integers(name: str, graph_format: GraphFormat, bits: str) -> None:
    student, graph = graph_of(name, graph_format, bits)
    expected, target = reference(student, graph_format, BATCH), target_of(graph_format)
    result = verify(graph, BATCH.numpy(), expected, name=name, optimized=target == "onnxruntime")
    assert result.agreement == 1
    assert result.close > 0.8  # the others have a value on a rounding boundary
    sites = compare_integers(graph, student, BATCH[:32].numpy(), graph_format=graph_format)
    require_same_integers(sites, name=name)
    assert {site.site for site in sites} == {s.name for s in student.placement.activations if target in s.targets}
    assert sum(site.ties for site in sites) <= 1e-3 * sum(site.values for site in sites)
    assert all(quantizer.enabled for quantizer in student.quantizers().values())


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@pytest.mark.parametrize("name", [name for name in NETS if name != "enlarging"])  # its ConvTranspose in groups is wrong
def test_lower_agrees_with_onnxs_reference_evaluator(name: str, graph_format: GraphFormat) -> None:
    _, graph = graph_of(name, graph_format)
    batch = BATCH[:4].numpy()
    (logits,) = ReferenceEvaluator(graph).run(None, {"images": batch})
    expected = infer(graph, batch)
    assert np.median(np.abs(logits - expected)) <= 1e-4 * expected.std()  # except an image with a value at a tie


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
def test_compare_integers_blames_the_layer_of_a_changed_weight(graph_format: GraphFormat) -> None:
    student, graph = graph_of("residual", graph_format, "w8a8")
    integers = stored(graph, "b1.0.weight.integers")
    integers.flat[5] += 9
    changed = with_stored(graph, "b1.0.weight.integers", integers)
    sites = compare_integers(changed, student, images(8).numpy(), graph_format=graph_format)
    (differing,) = (site for site in sites if site.differing)  # what is behind is computed from the graph's integers
    assert differing.largest >= 1
    assert [s.layer for s in student.placement.weights if s.input_site == differing.site] == ["b2.0"]
    blamed = re.escape(repr(differing.site))
    with pytest.raises(VerificationError, match=rf"changed differs from torch at the quantizer {blamed}"):
        require_same_integers(sites, name="changed")


def test_compare_integers_tells_a_tie_from_an_error() -> None:
    """Values near a rounding boundary that ONNX Runtime rounds to one neighbour and exact division to the other."""
    student, graph = graph_of("residual", "onnxruntime", "w8a8")
    first = student.placement.weights[0].input_site
    scale = np.float32(student.quantizers()[first].scale.item())
    boundaries = ((np.arange(100) + 0.5) * np.float64(scale)).astype(np.float32)
    near = np.concatenate([boundaries, *(np.nextafter(boundaries, np.float32(end)) for end in (-1e9, 1e9))])
    torn = near[np.rint(near / scale) != np.rint(near.astype(np.float64) / np.float64(scale))]
    assert len(torn) > 3
    ties = np.resize(torn, (1, *SIZE))
    sites = compare_integers(graph, student, ties, graph_format="onnxruntime")
    require_same_integers(sites, name="boundary")
    assert (sites[0].site, sites[0].ties, sites[0].differing) == (first, sites[0].values, 0)
    moved = with_stored(graph, f"{first}.scale", np.float32(1.02) * stored(graph, f"{first}.scale"))
    sites = compare_integers(moved, student, ties, graph_format="onnxruntime")
    assert sites[0].differing > 0  # a fiftieth of 100 steps is no tie
    with pytest.raises(VerificationError, match=f"at the quantizer '{first}'"):
        require_same_integers(sites, name="moved")


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
def test_export_graph_names_modules_and_no_source_files(graph_format: GraphFormat) -> None:
    _, quantized = graph_of("residual", graph_format)
    fp32 = export_graph(make_net("residual"), SIZE)
    for graph, convolution in ((quantized, "b1.0 (QuantizedConv2d)"), (fp32, "b1.1 (BatchNorm2d)")):  # folded into it
        convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
        docs = {node.doc_string for node in convolutions}
        assert convolution in docs
        assert len(docs) == len(convolutions)
        for trace in ("site-packages", str(Path(__file__).parents[1])):
            assert trace.encode() not in graph.SerializeToString()


@pytest.mark.parametrize("convert", [to_fp16, to_tensorrt_rtx])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETS)
def test_to_fp16_converts_what_is_not_quantized(
    name: str, bits: str, convert: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    student, graph = graph_of(name, "tensorrt", bits)
    fp16 = convert(graph)
    assert check_tensorrt(fp16) == []
    assert types(fp16)[TensorProto.FLOAT] == 0
    assert types(fp16)[TensorProto.INT8] == types(graph)[TensorProto.INT8]
    assert types_at_ends(fp16) == [TensorProto.FLOAT] * 2
    verify(fp16, BATCH.numpy(), reference(student, "tensorrt", BATCH), name=name, optimized=False)
    sites = compare_integers(fp16, student, BATCH[:16].numpy(), graph_format="tensorrt")
    require_same_integers(sites, name=name)
    assert sum(site.ties for site in sites) <= 0.05 * sum(site.values for site in sites)
    if convert is to_tensorrt_rtx:
        makers, shapes = producers(fp16), {tensor.name: len(tensor.dims) for tensor in fp16.graph.initializer}
        convolutions = [node for node in fp16.graph.node if node.op_type == "Conv"]
        assert {(len(node.input), shapes[makers[node.input[1]].input[1]]) for node in convolutions} == {(2, 0)}


def test_to_tensorrt_rtx_keeps_sums_within_fp16() -> None:
    """A channel with a large step next to one with large sums: the whole weight's step is what the sums allow."""
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0].weight[0] = 1.0
        net[0].weight[1] = 0.0
        net[0].weight[1, 0, 0, 0] = 1e4
    student = calibrated(net, "w8a8")
    graph = lower(export_graph(student, SIZE), student, "tensorrt")
    spelled = to_tensorrt_rtx(graph)
    expected, logits = (infer(g, images(4).numpy()) for g in (graph, spelled))
    np.testing.assert_allclose(logits, expected, rtol=0.01)  # ONNX Runtime's CPU provider does not round to FP16
    step, read, rows = (stored(spelled, name) for name in ("conv2d.step", "input_1.scale", "0.weight.integers"))
    widest = float(step) * float(read) * 128 * np.abs(rows.astype(float)).sum((1, 2, 3)).max()
    assert widest == pytest.approx(np.finfo(np.float16).max, rel=2e-3)


@pytest.mark.parametrize("name", NETS)
def test_float_graphs_are_the_teacher(name: str) -> None:
    net = make_net(name)
    graphs = float_graphs(net, SIZE, seed=0, name=name)
    assert (graphs.fp32.ir_version, graphs.fp32.opset_import[0].version) == (10, 21)
    for count in (1, 5):  # the batch dimension is dynamic
        batch = images(count)
        logits = infer(graphs.fp32, batch.numpy(), optimized=True)
        np.testing.assert_allclose(logits, net(batch).numpy(), rtol=1e-3, atol=1e-4)
    assert graphs.no_fp16 is None
    assert TensorProto.FLOAT not in types(graphs.fp16)
    assert types_at_ends(graphs.fp16) == [TensorProto.FLOAT] * 2
    np.testing.assert_allclose(infer(graphs.fp16, BATCH.numpy()), net(BATCH).numpy(), atol=0.03)


@pytest.mark.parametrize(("graph_format", "fp16"), [*((f, False) for f in GRAPH_FORMATS), ("tensorrt", True)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_fp16_baseline_is_the_network_without_quantizers(name: str, graph_format: GraphFormat, fp16: bool) -> None:
    _, graph = graph_of(name, graph_format, "w8a8")
    baseline = fp16_baseline(to_fp16(graph) if fp16 else graph)
    onnx.checker.check_model(baseline)
    operators, quantized = (Counter(node.op_type for node in model.graph.node) for model in (baseline, graph))
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators)
    assert operators["Conv"] == quantized["Conv"]
    assert TensorProto.FLOAT not in types(baseline)
    expected = make_net(name)(BATCH).numpy()
    difference = np.abs(infer(baseline, BATCH.numpy()) - expected)
    assert difference.mean() <= 0.05 * expected.std()  # its weights are on the grid of 8 bits
    assert fp16_baseline(baseline) is None


def foreign(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Return a graph of another exporter, `images` (1, 3, 8, 8) to `logits`, with a float weight."""
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "weight")
    convolution = onnx.helper.make_node("Conv", ["images", "weight"], ["map"])
    source = onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([convolution, *nodes], "net", [source], [logits], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def test_fp16_baseline_converts_constant_nodes_to_the_types_that_readers_need() -> None:
    node = onnx.helper.make_node
    model = foreign(
        node("Constant", [], ["factors"], value_floats=[1.0, 1.0, 2.0, 2.0]),
        node("Resize", ["map", "", "factors"], ["larger"], mode="nearest"),
        node("Constant", [], ["two"], value_float=2.0),
        node("Mul", ["larger", "two"], ["logits"]),
    )
    baseline = fp16_baseline(model)
    batch = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(infer(baseline, batch), infer(model, batch), atol=0.02)
    kinds = {name: tensor.data_type for name, tensor in initializers(baseline).items()}
    assert kinds == {"weight": TensorProto.FLOAT16, "two": TensorProto.FLOAT16, "factors": TensorProto.FLOAT}


def test_fp16_baseline_refuses_mixed_types_and_integers_that_go_elsewhere() -> None:
    zeros = onnx.helper.make_node("ConstantOfShape", ["sides"], ["zeros"])  # in float32, by its default
    model = foreign(zeros, onnx.helper.make_node("Add", ["map", "zeros"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 8, 8]), "sides"))
    with pytest.raises(ExportError, match="do not fit together in FP16"):
        fp16_baseline(model)
    _, graph = graph_of("residual", "tensorrt", "w8a8")
    first = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    graph.graph.node.append(onnx.helper.make_node("Cast", [first.output[0]], ["seen"], to=TensorProto.FLOAT))
    graph.graph.output.append(onnx.ValueInfoProto(name="seen"))
    with pytest.raises(ExportError, match="go on into other operators than DequantizeLinear"):
        fp16_baseline(graph)


def test_verify_accepts_ties_in_most_images_if_no_integer_differs_otherwise() -> None:
    net = make_net("residual")
    graph = export_graph(net, SIZE)
    exact = net(BATCH).numpy()
    shift = 0.1 * exact.std()  # of all classes alike
    most, every = exact.copy(), exact + shift
    most[2:] += shift
    for expected, same_integers in ((most, False), (every, True)):
        with pytest.raises(VerificationError, match=r"its logits differ by 0\.1 standard"):
            verify(graph, BATCH.numpy(), expected, name="g", optimized=False, same_integers=same_integers)
    assert verify(graph, BATCH.numpy(), most, name="g", optimized=False, same_integers=True).typical > 0.05


def test_verify_refuses_an_fp16_graph_of_another_model() -> None:
    net = make_net("residual")
    graph = to_fp16(export_graph(net, SIZE))
    wrong = with_stored(graph, "a2.0.weight", stored(graph, "a2.0.weight")[::-1].copy())
    with pytest.raises(VerificationError, match=r"logits differ by .* \(expected at most 0\.1\)"):
        verify(wrong, BATCH.numpy(), net(BATCH).numpy(), name="wrong", optimized=False)


def test_verify_refuses_a_graph_that_computes_something_else_or_is_invalid() -> None:
    student, graph = graph_of("residual", "onnxruntime")
    expected = reference(student, "onnxruntime", BATCH)
    broken = with_stored(graph, "relu_2.scale", 3 * stored(graph, "relu_2.scale"))
    with pytest.raises(VerificationError, match="the file is not written"):
        verify(broken, BATCH.numpy(), expected, name="broken", optimized=True)
    del broken.graph.node[3]
    with pytest.raises(VerificationError, match="no valid ONNX"):
        verify(broken, BATCH.numpy(), expected, name="broken", optimized=True)


def test_float_graphs_without_fp16_say_why() -> None:
    net = make_net("residual")
    net.fc.weight *= 1e6
    graphs = float_graphs(net, SIZE, seed=0, name="fp32")
    assert graphs.fp16 is None
    assert re.fullmatch(r"fc\.weight holds \S+, more than FP16 can", graphs.no_fp16 or "")


def test_to_fp16_refuses_what_fp16_cannot_hold() -> None:
    _, graph = graph_of("residual", "tensorrt", "w8a8")
    for ending, value, message in (
        ("fc.bias", 1e5, r"holds 1e\+05, more than FP16 can"),
        ("fc.weight.scale", 1e-7, "is 1e-07, too small for FP16"),
    ):
        name = next(name for name in initializers(graph) if name.endswith(ending))
        values = stored(graph, name)
        values[2] = value
        changed = with_stored(graph, name, values)
        with pytest.raises(ExportError, match=message):
            to_fp16(changed)
    # the scale of a channel that has nothing but zeros may be any
    integers = stored(changed, "fc.weight.integers")
    integers[2] = 0
    assert stored(to_fp16(with_stored(changed, "fc.weight.integers", integers)), "fc.weight.scale")[2] > 0


@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_runs_every_quantized_layer_on_integers(name: str, tmp_path: Path) -> None:
    student, graph = graph_of(name, "onnxruntime")
    layers = [type(layer).__name__ for layer in student.layers().values()]
    assert integer_layers(graph) == (layers.count("QuantizedConv2d"), layers.count("QuantizedLinear"))
    operators = optimized_operators(graph, tmp_path)
    assert operators["Conv"] == operators["FusedConv"] == 0
    assert operators["ConvTranspose"] == (4 if name == "enlarging" else 0)  # it has no integer kernel for them
    makers = producers(graph)
    for node in graph.graph.node:
        if node.op_type in {"Conv", "Gemm"}:
            assert initializers(graph)[makers[node.input[2]].input[0]].data_type == TensorProto.INT32


@pytest.mark.parametrize(
    ("activation", "gates"), [(nn.SiLU(), {"QLinearSigmoid": 2}), (nn.Hardswish(), {"Sigmoid": 0})]
)
def test_gated_activations_multiply_integers(activation: nn.Module, gates: dict[str, int], tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3), activation, nn.Conv2d(8, 4, 3)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    student = calibrated(net, "w4a8")
    with torch.no_grad(), student.in_float():
        torch.testing.assert_close(student(images()), net(images()), atol=1e-3, rtol=0)  # biases are rounded
    graph = lower(export_graph(student, SIZE), student, "onnxruntime")
    verify(graph, images().numpy(), reference(student, "onnxruntime", images()), name="gated", optimized=True)
    operators = optimized_operators(graph, tmp_path)
    assert (operators["QLinearMul"], operators["Mul"]) == (2, 0)
    assert {operator: operators[operator] for operator in gates} == gates
    assert {"Sigmoid", "HardSigmoid"} & quantized_operators(graph)
    tensorrt = lower(export_graph(student, SIZE), student, "tensorrt")
    assert not {"Sigmoid", "HardSigmoid"} & quantized_operators(tensorrt)  # it fuses an activation whole


def quantized_operators(graph: onnx.ModelProto) -> set[str]:
    """Return the operators whose outputs are quantized."""
    quantized = [node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    return {producers(graph)[tensor].op_type for tensor in quantized if tensor in producers(graph)}


def test_means_over_height_and_width_are_integer_pools(tmp_path: Path) -> None:
    """ONNX Runtime has an integer kernel for GlobalAveragePool, none for ReduceMean: EfficientNet-B0 took 1.2 times."""
    student, graph = graph_of("mobile", "onnxruntime", "w8a8")
    operators = optimized_operators(graph, tmp_path)
    assert operators["QLinearGlobalAveragePool"] == 1  # the squeeze; nothing quantizes what the last pool reads
    require_same_integers(
        compare_integers(graph, student, BATCH[:16].numpy(), graph_format="onnxruntime"), name="mobile"
    )
    assert "GlobalAveragePool" not in {node.op_type for node in graph_of("mobile", "tensorrt", "w8a8")[1].graph.node}


def test_student_graphs_note_what_onnxruntime_runs_in_float() -> None:
    student, _ = exported("residual")
    graphs = {g.graph_format: g for g in student_graphs(student, BATCH.numpy(), size=SIZE, name="w4a4")}
    assert [g.file for g in graphs.values()] == ["model.ort.onnx", "model.trt.onnx", "model.int4.onnx"]
    assert all(g.notes == [] for g in graphs.values())
    graph = graphs["onnxruntime"].graph
    layer = next(node for node in graph.graph.node if node.op_type == "Conv")
    quantizer = next(node for node in graph.graph.node if layer.output[0] in node.input)
    quantizer.input[list(quantizer.input).index(layer.output[0])] = "absolute"
    between = onnx.helper.make_node("Abs", [layer.output[0]], ["absolute"])
    graph.graph.node.insert(list(graph.graph.node).index(quantizer), between)
    count = sum(isinstance(layer, nn.Conv2d) for layer in student.layers().values())
    assert integer_layers(graph)[0] == count - 1
    assert _float_layers(graph, student) == [
        f"1 of {count} quantized convolutions run in float in ONNX Runtime: they gain no speed there"
    ]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETS)
def test_tensorrt_graphs_are_symmetric_int8(name: str, bits: str) -> None:
    _, graph = graph_of(name, "tensorrt", bits)
    tensors, makers = initializers(graph), producers(graph)
    quantizers = [node for node in graph.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert quantizers
    for node in quantizers:
        scale, zero = (stored(graph, name) for name in node.input[1:])
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        if scale.ndim:
            assert tensors[node.input[0]].data_type == TensorProto.INT8  # only weights have a scale per channel
            (reader,) = (layer for layer in graph.graph.node if node.output[0] in layer.input)
            axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
            assert axis == [1 if reader.op_type == "ConvTranspose" else 0]
    layers = [node for node in graph.graph.node if node.op_type in {"Conv", "ConvTranspose", "Gemm"}]
    grouped = [node for node in layers if any(a.name == "group" and a.i == 8 for a in node.attribute)]
    assert len(grouped) == (name == "enlarging")  # it stays in float
    for node in graph.graph.node:
        if node in layers and node not in grouped:
            assert makers[node.input[0]].op_type == makers[node.input[1]].op_type == "DequantizeLinear"
            assert tensors[node.input[2]].data_type == TensorProto.FLOAT
        if node.op_type == "Add":  # one branch comes directly from its convolution, the other is quantized
            assert {makers[tensor].op_type for tensor in node.input} == {"Conv", "DequantizeLinear"}


def test_int4_graphs_store_two_weights_to_a_byte() -> None:
    student, graph = graph_of("residual", "int4")
    kinds = {name: initializers(graph)[f"{name}.weight.integers"].data_type for name in student.layers()}
    assert kinds["stem.0"] == kinds["fc"] == TensorProto.INT8
    assert {kind for name, kind in kinds.items() if name not in {"stem.0", "fc"}} == {TensorProto.INT4}
    assert len(initializers(graph)["a1.0.weight.integers"].raw_data) == 8 * 8 * 9 // 2
    layer = student.layers()["a1.0"]
    expected = layer.weight_quantizer.integers(layer.weight).numpy()
    assert (stored(graph, "a1.0.weight.integers").astype(np.int8) == expected).all()


def test_relu6_costs_no_operator() -> None:
    _, graph = graph_of("mobile", "onnxruntime")
    assert not [n for n in graph.graph.node if n.op_type == "Clip" and "bounded" not in n.output[0]]
    _, graph = graph_of("mobile", "tensorrt")
    clips = [node for node in graph.graph.node if node.op_type == "Clip"]
    assert clips
    assert not [clip for clip in clips if producers(graph)[clip.input[0]].op_type in {"Clip", "Relu"}]


class MixedBranches(nn.Module):
    """One scale over a branch that ends at 6 and one that does not; a BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.norm, self.conv, self.fc = nn.BatchNorm2d(8), nn.Conv2d(16, 8, 3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = nn.functional.relu6(4 * self.norm(self.a(x)))
        right = nn.functional.relu(9 * self.norm(self.b(x)))
        return self.fc(self.conv(torch.cat([left, right], 1)).mean((2, 3)))


@pytest.mark.parametrize("graph_format", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_lower_keeps_a_relu6_whose_scale_is_shared(graph_format: GraphFormat, bits: str) -> None:
    student = calibrated(MixedBranches().eval(), bits)
    graph = lower(export_graph(student, SIZE), student, graph_format)
    expected = reference(student, graph_format, BATCH)
    assert verify(graph, BATCH.numpy(), expected, name="mixed", optimized=graph_format == "onnxruntime").close > 0.8


def test_annotate_says_how_to_feed_a_graph(tmp_path: Path) -> None:
    _, graph = graph_of("residual", "onnxruntime")
    spec = InputSpec(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    annotate(graph, model="residual", source="file", variant="w4a4", inputs=spec, provenance={"seed": 1})
    onnx.save(graph, tmp_path / "model.onnx")
    with OnnxRunner(tmp_path / "model.onnx") as runner:
        assert InputSpec.model_validate_json(runner.metadata()["clusterq.input"]) == spec
        assert json.loads(runner.metadata()["clusterq.provenance"]) == {"seed": 1}
        assert runner.classes == 10
