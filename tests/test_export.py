"""Exported graphs compute what torch computes, in the operators that their targets want."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import NETS, images, make_net
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
    verify,
)
from clusterq_deploy.lowering.graphs import _float_layers
from clusterq_deploy.lowering.verify import integer_layers
from clusterq_deploy.models import InputSpec
from clusterq_deploy.quantization import BitWidths, Student, calibrate, make_student
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner

GRAPH_FORMATS: tuple[GraphFormat, ...] = ("onnxruntime", "tensorrt", "int4")


@cache
def exported(name: str, bits: str = "w4a4") -> tuple[Student, onnx.ModelProto]:
    student = make_student(make_net(name), BitWidths.parse(bits))
    calibrate(student, images(), batch_size=16, rng=torch.Generator().manual_seed(0))
    return student, export_graph(student, (3, 16, 16))


def graph_of(name: str, graph_format: GraphFormat, bits: str = "w4a4") -> tuple[Student, onnx.ModelProto]:
    student, marked = exported(name, bits)
    return student, lower(marked, student, graph_format)


def reference(student: Student, graph_format: GraphFormat, batch: torch.Tensor) -> np.ndarray:
    with student.for_target(target_of(graph_format)):
        return TorchRunner(student).infer(batch.numpy())


def initializers(graph: onnx.ModelProto) -> dict[str, TensorProto]:
    return {i.name: i for i in graph.graph.initializer}


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a5"])
def test_graphs_compute_what_torch_computes(name: str, graph_format: GraphFormat, bits: str) -> None:
    student, graph = graph_of(name, graph_format, bits)
    batch = images(64, seed=7)
    expected = reference(student, graph_format, batch)
    found = verify(graph, batch.numpy(), expected, name=name, optimized=graph_format != "tensorrt")
    assert found.agreement == 1
    assert found.close > 0.8  # the others have a value on a rounding boundary


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a5"])
def test_the_integers_at_every_quantizer_are_torchs(name: str, graph_format: GraphFormat, bits: str) -> None:
    student, graph = graph_of(name, graph_format, bits)
    found = compare_integers(graph, student, images(32, seed=7).numpy(), graph_format=graph_format)
    require_same_integers(found, name=name)
    target = target_of(graph_format)
    assert {own.site for own in found} == {s.name for s in student.placement.activations if target in s.targets}
    assert sum(own.ties for own in found) <= 1e-3 * sum(own.values for own in found)
    assert all(quantizer.enabled for quantizer in student.quantizers().values())


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@pytest.mark.parametrize("name", NETS)
def test_onnxs_reference_evaluator_computes_the_same(name: str, graph_format: GraphFormat) -> None:
    _, graph = graph_of(name, graph_format)
    batch = images(4, seed=7).numpy()
    (logits,) = ReferenceEvaluator(graph).run(None, {"images": batch})
    with OnnxRunner(graph.SerializeToString(), optimized=False) as runner:
        expected = runner.infer(batch)
    assert np.median(np.abs(logits - expected)) <= 1e-4 * expected.std()  # but for an image with a value at a tie


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
def test_a_graph_that_computes_something_else_is_blamed_at_its_layer(graph_format: GraphFormat) -> None:
    student, graph = graph_of("residual", graph_format, "w8a8")
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    weight = initializers(changed)["b1.0.weight.integers"]
    integers = numpy_helper.to_array(weight).copy()
    integers.flat[5] += 9
    weight.CopyFrom(numpy_helper.from_array(integers, weight.name))
    found = compare_integers(changed, student, images(8).numpy(), graph_format=graph_format)
    parted = [own for own in found if own.differing]
    assert len(parted) == 1  # what comes behind is computed from the graph's own integers
    assert parted[0].largest >= 1
    blamed = re.escape(repr(parted[0].site))
    with pytest.raises(VerificationError, match=rf"changed differs from torch at the quantizer {blamed}"):
        require_same_integers(found, name="changed")
    owner = next(s for s in student.placement.activations if s.name == parted[0].site)
    readers = [s.layer for s in student.placement.weights if s.input_site == owner.name]
    assert readers == ["b2.0"]


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
def test_a_nodes_doc_string_is_the_module_that_it_is_of(graph_format: GraphFormat) -> None:
    _, quantized = graph_of("residual", graph_format)
    single = export_graph(make_net("residual"), (3, 16, 16))
    for graph, convolution in ((quantized, "b1.0 (QuantizedConv2d)"), (single, "b1.1 (BatchNorm2d)")):  # folded into it
        docs = {node.doc_string for node in graph.graph.node if node.op_type == "Conv"}
        assert convolution in docs
        assert len(docs) == sum(node.op_type == "Conv" for node in graph.graph.node)
        assert "site-packages" not in str(graph)
        assert str(Path(__file__).parents[1]) not in str(graph)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETS)
def test_fp16_is_what_is_not_quantized(name: str, bits: str) -> None:
    student, graph = graph_of(name, "tensorrt", bits)
    half = to_fp16(graph)
    assert check_tensorrt(half) == []
    kinds = Counter(own.data_type for own in half.graph.initializer)
    assert kinds[TensorProto.FLOAT] == 0
    assert kinds[TensorProto.INT8] == Counter(own.data_type for own in graph.graph.initializer)[TensorProto.INT8]
    ends = [own.type.tensor_type.elem_type for own in (*half.graph.input, *half.graph.output)]
    assert ends == [TensorProto.FLOAT] * 2
    batch = images(64, seed=7)
    expected = reference(student, "tensorrt", batch)
    verify(half, batch.numpy(), expected, name=name, optimized=False)
    found = compare_integers(half, student, batch[:16].numpy(), graph_format="tensorrt")
    require_same_integers(found, name=name)
    assert sum(own.ties for own in found) <= 0.05 * sum(own.values for own in found)


@pytest.mark.parametrize("name", NETS)
def test_the_float_model_in_fp16_is_the_teacher(name: str) -> None:
    made = float_graphs(make_net(name), (3, 16, 16), seed=0, name=name)
    assert made.no_fp16 is None
    assert made.fp16 is not None
    assert TensorProto.FLOAT not in {own.data_type for own in made.fp16.graph.initializer}
    ends = [own.type.tensor_type.elem_type for own in (*made.fp16.graph.input, *made.fp16.graph.output)]
    assert ends == [TensorProto.FLOAT] * 2
    batch = images(64, seed=7)
    with OnnxRunner(made.fp16.SerializeToString(), optimized=False) as runner:
        np.testing.assert_allclose(runner.infer(batch.numpy()), make_net(name)(batch).numpy(), atol=0.03)


@pytest.mark.parametrize(
    ("graph_format", "fp16"), [*((own, False) for own in GRAPH_FORMATS), ("tensorrt", True)], ids=str
)
@pytest.mark.parametrize("name", NETS)
def test_the_fp16_baseline_of_a_quantized_graph_is_the_same_network_without_quantizers(
    name: str, graph_format: GraphFormat, fp16: bool
) -> None:
    _, graph = graph_of(name, graph_format, "w8a8")
    baseline = fp16_baseline(to_fp16(graph) if fp16 else graph)
    assert baseline is not None
    onnx.checker.check_model(baseline)
    operators = [own.op_type for own in baseline.graph.node]
    assert not {"QuantizeLinear", "DequantizeLinear"}.intersection(operators)
    count = Counter(own.op_type for own in graph.graph.node)
    assert operators.count("Conv") == count["Conv"]
    assert TensorProto.FLOAT not in {own.data_type for own in baseline.graph.initializer}
    batch = images(64, seed=7)
    with OnnxRunner(baseline.SerializeToString(), optimized=False) as runner:
        found = runner.infer(batch.numpy())
    expected = make_net(name)(batch).numpy()
    assert np.abs(found - expected).mean() <= 0.05 * expected.std()  # its weights are on the grid of 8 bits
    assert fp16_baseline(baseline) is None


def foreign(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A graph of another exporter, `images` (1, 3, 8, 8) to `logits`, with a float weight of its own."""
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "weight")
    convolution = onnx.helper.make_node("Conv", ["images", "weight"], ["map"])
    ends = [onnx.helper.make_tensor_value_info(own, TensorProto.FLOAT, None) for own in ("images", "logits")]
    ends[0] = onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = onnx.helper.make_graph([convolution, *nodes], "net", ends[:1], ends[1:], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def test_numbers_in_constant_nodes_are_halved_as_their_readers_want_them() -> None:
    node = onnx.helper.make_node
    model = foreign(
        node("Constant", [], ["factors"], value_floats=[1.0, 1.0, 2.0, 2.0]),
        node("Resize", ["map", "", "factors"], ["larger"], mode="nearest"),
        node("Constant", [], ["two"], value_float=2.0),
        node("Mul", ["larger", "two"], ["logits"]),
    )
    baseline = fp16_baseline(model)
    assert baseline is not None
    batch = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    answers = []
    for graph in (model, baseline):
        with OnnxRunner(graph.SerializeToString(), optimized=False) as runner:
            answers.append(runner.infer(batch))
    np.testing.assert_allclose(answers[1], answers[0], atol=0.02)
    kinds = {name: own.data_type for name, own in initializers(baseline).items()}
    assert kinds == {"weight": TensorProto.FLOAT16, "two": TensorProto.FLOAT16, "factors": TensorProto.FLOAT}


def test_a_graph_that_mixes_types_has_no_fp16_baseline() -> None:
    zeros = onnx.helper.make_node("ConstantOfShape", ["sides"], ["zeros"])  # in float32, by its default
    model = foreign(zeros, onnx.helper.make_node("Add", ["map", "zeros"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 8, 8]), "sides"))
    with pytest.raises(ExportError, match="do not fit together in FP16"):
        fp16_baseline(model)


def test_integers_that_go_elsewhere_have_no_fp16_baseline() -> None:
    _, graph = graph_of("residual", "tensorrt", "w8a8")
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    first = next(own for own in changed.graph.node if own.op_type == "QuantizeLinear")
    changed.graph.node.append(onnx.helper.make_node("Cast", [first.output[0]], ["seen"], to=TensorProto.FLOAT))
    changed.graph.output.append(onnx.ValueInfoProto(name="seen"))
    with pytest.raises(ExportError, match="go on into other operators than DequantizeLinear"):
        fp16_baseline(changed)


def test_an_fp16_graph_of_another_model_is_refused() -> None:
    batch, net = images(64), make_net("residual")
    wrong = to_fp16(export_graph(net, (3, 16, 16)))
    weight = next(own for own in wrong.graph.initializer if own.name == "a2.0.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    with pytest.raises(VerificationError, match=r"logits differ by .* \(expected at most 0\.1\)"):
        verify(wrong, batch.numpy(), net(batch).numpy(), name="wrong", optimized=False)


def test_a_model_that_fp16_cannot_hold_has_no_graph_in_fp16() -> None:
    net = make_net("residual")
    net.fc.weight *= 1e6
    made = float_graphs(net, (3, 16, 16), seed=0, name="fp32")
    assert made.fp16 is None
    assert re.fullmatch(r"fc\.weight holds \S+, more than FP16 can", made.no_fp16 or "")


def test_what_fp16_cannot_hold_is_refused() -> None:
    _, graph = graph_of("residual", "tensorrt", "w8a8")
    for name, value, said in (
        ("fc.bias", 1e5, r"holds 1e\+05, more than FP16 can"),
        ("fc.weight.scale", 1e-7, "is 1e-07, too small for FP16"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(graph)
        tensor = next(i for own, i in initializers(changed).items() if own.endswith(name))
        values = numpy_helper.to_array(tensor).copy()
        values[2] = value
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        with pytest.raises(ExportError, match=said):
            to_fp16(changed)
    # the scale of a channel that has nothing but zeros may be any
    weight = initializers(changed)["fc.weight.integers"]
    integers = numpy_helper.to_array(weight).copy()
    integers[2] = 0
    weight.CopyFrom(numpy_helper.from_array(integers, weight.name))
    assert numpy_helper.to_array(initializers(to_fp16(changed))["fc.weight.scale"])[2] > 0


def test_a_tie_is_told_from_an_error() -> None:
    """Values beside a rounding boundary that ONNX Runtime rounds to one neighbour and exact division to the other."""
    student, graph = graph_of("residual", "onnxruntime", "w8a8")
    first = student.placement.weights[0].input_site
    scale = np.float32(student.quantizers()[first].scale.item())
    boundaries = ((np.arange(100) + 0.5) * np.float64(scale)).astype(np.float32)
    beside = np.concatenate([boundaries, *(np.nextafter(boundaries, np.float32(end)) for end in (-1e9, 1e9))])
    torn = beside[np.rint(beside / scale) != np.rint(beside.astype(np.float64) / np.float64(scale))]
    assert len(torn) > 3
    images_of_ties = np.resize(torn, (1, 3, 16, 16))
    found = compare_integers(graph, student, images_of_ties, graph_format="onnxruntime")
    require_same_integers(found, name="boundary")
    assert (found[0].site, found[0].ties, found[0].differing) == (first, found[0].values, 0)
    moved = onnx.ModelProto()
    moved.CopyFrom(graph)
    stored = initializers(moved)[f"{first}.scale"]
    stored.CopyFrom(numpy_helper.from_array(np.float32(1.02) * numpy_helper.to_array(stored), stored.name))
    found = compare_integers(moved, student, images_of_ties, graph_format="onnxruntime")
    assert found[0].differing > 0  # a fiftieth of 100 steps is no tie
    with pytest.raises(VerificationError, match=f"at the quantizer '{first}'"):
        require_same_integers(found, name="moved")


@pytest.mark.parametrize("name", NETS)
def test_the_float_graph_is_the_teacher(name: str) -> None:
    net = make_net(name)
    graph = export_graph(net, (3, 16, 16))
    with OnnxRunner(graph.SerializeToString()) as runner:
        for count in (1, 5):  # the batch dimension is dynamic
            batch = images(count)
            np.testing.assert_allclose(runner.infer(batch.numpy()), net(batch).numpy(), rtol=1e-3, atol=1e-4)
    assert (graph.ir_version, graph.opset_import[0].version) == (10, 21)


@pytest.mark.parametrize("name", NETS)
def test_every_quantized_layer_runs_as_integers(name: str, tmp_path: Path) -> None:
    student, graph = graph_of(name, "onnxruntime")
    layers = [type(layer).__name__ for layer in student.layers().values()]
    assert integer_layers(graph) == (layers.count("QuantizedConv2d"), layers.count("QuantizedLinear"))
    path = tmp_path / "optimized.onnx"
    with OnnxRunner(graph.SerializeToString(), write_optimized=path):
        operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["Conv"] == operators["FusedConv"] == 0


@pytest.mark.parametrize(
    ("activation", "gates"), [(nn.SiLU(), {"QLinearSigmoid": 2}), (nn.Hardswish(), {"Sigmoid": 0})]
)
def test_gated_activations_multiply_integers(activation: nn.Module, gates: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3), activation, nn.Conv2d(8, 4, 3)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    student = make_student(net, BitWidths(4, 8))
    calibrate(student, images(), batch_size=16, rng=torch.Generator().manual_seed(0))
    with torch.no_grad(), student.in_float():
        torch.testing.assert_close(student(images()), net(images()), atol=1e-3, rtol=0)  # biases are settled
    graph = lower(export_graph(student, (3, 16, 16)), student, "onnxruntime")
    verify(graph, images().numpy(), reference(student, "onnxruntime", images()), name="gated", optimized=True)
    with OnnxRunner(graph.SerializeToString(), write_optimized=tmp_path / "optimized.onnx"):
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearMul"] == 2
    assert kinds["Mul"] == 0
    assert {kind: kinds[kind] for kind in gates} == gates
    assert {"Sigmoid", "HardSigmoid"} & sources_of_quantizers(graph)
    tensorrt = lower(export_graph(student, (3, 16, 16)), student, "tensorrt")
    assert not {"Sigmoid", "HardSigmoid"} & sources_of_quantizers(tensorrt)  # it fuses an activation whole


def sources_of_quantizers(graph: onnx.ModelProto) -> set[str]:
    """The operators whose outputs are quantized."""
    makers = {output: node.op_type for node in graph.graph.node for output in node.output}
    return {makers.get(n.input[0], "input") for n in graph.graph.node if n.op_type == "QuantizeLinear"}


def test_what_onnxruntime_runs_in_float_is_noted() -> None:
    student, _ = exported("residual")
    batch = images(64, seed=7).numpy()
    made = {own.graph_format: own for own in student_graphs(student, batch, size=(3, 16, 16), name="w4a4")}
    assert [own.file for own in made.values()] == ["model.ort.onnx", "model.trt.onnx", "model.int4.onnx"]
    assert all(own.notes == [] for own in made.values())
    graph = made["onnxruntime"].graph
    layer = next(node for node in graph.graph.node if node.op_type == "Conv")
    quantizer = next(node for node in graph.graph.node if layer.output[0] in node.input)
    between = onnx.helper.make_node("Abs", [layer.output[0]], ["absolute"])
    quantizer.input[list(quantizer.input).index(layer.output[0])] = "absolute"
    graph.graph.node.insert(list(graph.graph.node).index(quantizer), between)
    convolutions = sum(isinstance(own, nn.Conv2d) for own in student.layers().values())
    assert integer_layers(graph)[0] == convolutions - 1
    assert _float_layers(graph, student) == [
        f"1 of {convolutions} quantized convolutions run in float in ONNX Runtime: they gain no speed there"
    ]


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETS)
def test_tensorrt_graphs_are_symmetric_int8(name: str, bits: str) -> None:
    _, graph = graph_of(name, "tensorrt", bits)
    stored = initializers(graph)
    pairs = [n for n in graph.graph.node if n.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert pairs
    for node in pairs:
        zero, scale = (numpy_helper.to_array(stored[node.input[i]]) for i in (2, 1))
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        if scale.ndim:
            assert stored[node.input[0]].data_type == TensorProto.INT8  # only weights have a scale a channel
            assert [a.i for a in node.attribute if a.name == "axis"] == [0]
    producers = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        if node.op_type in {"Conv", "Gemm"}:
            assert producers[node.input[0]].op_type == "DequantizeLinear"
            assert producers[node.input[1]].op_type == "DequantizeLinear"
            assert stored[node.input[2]].data_type == TensorProto.FLOAT
        if node.op_type == "Add":  # one branch comes straight from its convolution, the other is quantized
            assert {producers[i].op_type for i in node.input} == {"Conv", "DequantizeLinear"}


def test_int4_graphs_store_two_weights_a_byte() -> None:
    student, graph = graph_of("residual", "int4")
    stored = initializers(graph)
    kinds = {name: stored[f"{name}.weight.integers"].data_type for name in student.layers()}
    assert kinds["stem.0"] == kinds["fc"] == TensorProto.INT8
    assert {kind for name, kind in kinds.items() if name not in {"stem.0", "fc"}} == {TensorProto.INT4}
    weight = stored["a1.0.weight.integers"]
    assert len(weight.raw_data) == 8 * 8 * 9 // 2
    layer = student.layers()["a1.0"]
    expected = layer.weight_quantizer.integers(layer.weight).numpy()
    assert (numpy_helper.to_array(weight).astype(np.int8) == expected).all()


def test_a_relu6_costs_nothing() -> None:
    _, graph = graph_of("mobile", "onnxruntime")
    floats = [n for n in graph.graph.node if n.op_type == "Clip" and "bounded" not in n.output[0]]
    assert not floats
    _, graph = graph_of("mobile", "tensorrt")
    producers = {output: node for node in graph.graph.node for output in node.output}
    clips = [n for n in graph.graph.node if n.op_type == "Clip"]
    assert clips
    assert not [n for n in clips if producers[n.input[0]].op_type in {"Clip", "Relu"}]


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
def test_a_bound_of_one_branch_is_kept_where_the_scale_is_shared(graph_format: GraphFormat, bits: str) -> None:
    torch.manual_seed(0)
    student = make_student(MixedBranches().eval(), BitWidths.parse(bits))
    calibrate(student, images(), batch_size=16, rng=torch.Generator().manual_seed(0))
    graph, batch = lower(export_graph(student, (3, 16, 16)), student, graph_format), images(64, seed=7)
    expected = reference(student, graph_format, batch)
    assert verify(graph, batch.numpy(), expected, name="mixed", optimized=graph_format == "onnxruntime").close > 0.8


def test_biases_are_integers_for_onnx_runtime() -> None:
    _, graph = graph_of("residual", "onnxruntime")
    stored = initializers(graph)
    producers = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        if node.op_type in {"Conv", "Gemm"}:
            assert stored[producers[node.input[2]].input[0]].data_type == TensorProto.INT32


def test_no_trace_of_the_source_is_left() -> None:
    student, marked = exported("residual")
    here = str(Path(__file__).parent)
    for graph in [marked, *(lower(marked, student, s) for s in GRAPH_FORMATS)]:
        assert here.encode() not in graph.SerializeToString()
        assert b"site-packages" not in graph.SerializeToString()


def test_graphs_say_how_to_feed_them(tmp_path: Path) -> None:
    _, graph = graph_of("residual", "onnxruntime")
    spec = InputSpec(size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    annotate(graph, model="residual", source="file", variant="w4a4", inputs=spec, provenance={"seed": 1})
    onnx.save(graph, tmp_path / "model.onnx")
    with OnnxRunner(tmp_path / "model.onnx") as runner:
        assert InputSpec.model_validate_json(runner.metadata()["clusterq.input"]) == spec
        assert json.loads(runner.metadata()["clusterq.provenance"]) == {"seed": 1}
        assert runner.classes == 10


def test_a_graph_that_computes_something_else_is_refused() -> None:
    student, graph = graph_of("residual", "onnxruntime")
    batch = images(64, seed=7)
    expected = reference(student, "onnxruntime", batch)
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    scale = next(i for i in broken.graph.initializer if i.name == "relu_2.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 3, scale.name))
    with pytest.raises(VerificationError, match="the file is not written"):
        verify(broken, batch.numpy(), expected, name="broken", optimized=True)
    del broken.graph.node[3]
    with pytest.raises(VerificationError, match="no valid ONNX"):
        verify(broken, batch.numpy(), expected, name="broken", optimized=True)
