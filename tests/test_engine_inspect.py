"""What TensorRT's engine inspector says, in the shapes of its releases, and what is concluded from it."""

import json
from pathlib import Path

import onnx
import onnx.parser
import pytest
from tensorrt_double import World, build, open_engine

from clusterq_deploy.errors import EngineError
from clusterq_deploy.results.engines import EngineInspection
from clusterq_deploy.runtimes.tensorrt import summarize_layers
from clusterq_deploy.runtimes.tensorrt.inspect import Layer, parse_layers, type_in
from clusterq_deploy.stages.benchmark import inspect_engine

INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FP16 = "Channel major FP16 format where channel % 8 == 0"
FP32 = "Row major linear FP32"
DYNAMIC = "N/A due to dynamic shapes"


def entry(name: str, kind: str, source: str, target: str, nodes: str = "", **more: object) -> dict[str, object]:
    """Return a layer as the inspector of TensorRT 8 to 10 writes it, with the types of its input and output."""
    inputs, outputs = (
        [{"Name": tensor, "Location": "Device", "Dimensions": [8, 16], "Format/Datatype": datatype}]
        for tensor, datatype in (("x", source), ("y", target))
    )
    metadata = {"Metadata": nodes} if nodes else {}
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, **metadata, **more}


# TensorRT 10, detailed: a quantizer, two fused convolutions, a layout change, one compiled layer, a float layer.
DETAILED = {
    "Layers": [
        entry(
            "images_QuantizeLinear",
            "Reformat",
            FP32,
            "Row major Int8 format",
            "[ONNX Layer: images_QuantizeLinear]",
            ParameterType="Reformat",
            Origin="QDQ",
            StreamId=0,
        ),
        entry(
            "stem.weight_DequantizeLinear + node_conv2d + node_relu",
            "CaskConvolution",
            INT8,
            INT8,
            "[ONNX Layer: node_conv2d]\x1f[ONNX Layer: node_relu | block (Block)]",
            Weights={"Type": "Int8", "Count": 432},
            Bias={"Type": "Float", "Count": 16},
        ),
        entry("Reformatting CopyNode for Input Tensor 0 to node_conv2d_1", "Reformat", INT8, FP16, Origin="REFORMAT"),
        entry(
            "node_conv2d_1",
            "CaskConvolution",
            FP16,
            FP16,
            "[ONNX Layer: node_conv2d_1]",
            Weights={"Type": "Half", "Count": 4608},
        ),
        entry("__myl_MeanCast_myl0_1", "kgen", "Half", "Float", "[ONNX Layer: node_mean]\x1e[ONNX Layer: node_cast]"),
        entry("node_linear", "gemm", "Float", "Float", "[ONNX Layer: node_linear]"),
        entry("fc.bias", "Constant", FP32, FP32, Inputs=[]),
    ],
    "Bindings": ["images", "logits"],
}
# TensorRT 8.4: no metadata; before the shapes of a dynamic batch are set there are no formats either.
FUSED = "stem.weight + stem_q + node_conv2d + node_relu || node_conv2d_1"
WITHOUT_METADATA = {
    "Layers": [
        entry(FUSED, "CaskConvolution", DYNAMIC, DYNAMIC, Weights={"Type": "Int8", "Count": 432}),
        entry("node_softmax", "SoftMax", DYNAMIC, DYNAMIC),
    ]
}
NAMES = {"Layers": ["images_q", "node_conv2d + node_relu", "node_linear"], "Bindings": ["images", "logits"]}


def read(content: object) -> tuple[Layer, ...]:
    return parse_layers(json.dumps(content))


def summary(
    layers: tuple[Layer, ...], times_ms: dict[str, float] | None = None, quantized: dict[str, str] | None = None
) -> EngineInspection:
    return summarize_layers(layers, times_ms or {}, quantized or {}, engine="w8a8/model.engine", batch=8)


def test_parse_layers_reads_kind_type_and_nodes() -> None:
    layers = read(DETAILED)
    assert [(layer.kind, layer.precision) for layer in layers] == [
        ("Reformat", "FP32"),
        ("CaskConvolution", "INT8"),
        ("Reformat", "INT8"),
        ("CaskConvolution", "FP16"),
        ("kgen", "FP16"),
        ("gemm", "FP32"),
        ("Constant", "FP32"),
    ]
    assert {"node_conv2d", "node_relu"} <= layers[1].nodes
    assert {"node_mean", "node_cast"} <= layers[4].nodes
    assert [layer.is_quantizer for layer in layers].index(True) == 0
    assert [layer.is_reformat for layer in layers].index(True) == 2
    assert [layer.computes for layer in layers] == [False, True, False, True, True, True, False]


def test_parse_layers_reads_types_in_a_separate_field_of_tensorrt_11() -> None:
    layers = [
        {
            "Name": layer["Name"],
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format": "Linear", "DataType": kind}],
            "Outputs": [],
        }
        for layer, kind in zip(DETAILED["Layers"], ("Int8", "Half", "Float"), strict=False)
    ]
    assert [layer.precision for layer in read({"Layers": layers})] == ["INT8", "FP16", "FP32"]


def test_parse_layers_reads_raw_control_characters_in_metadata() -> None:
    text = json.dumps(DETAILED).replace("\\u001f", "\x1f").replace("\\u001e", "\x1e")
    assert "\x1f" in text
    assert parse_layers(text) == read(DETAILED)


def test_parse_layers_without_metadata_uses_names_and_weights() -> None:
    convolution, softmax = read(WITHOUT_METADATA)
    assert {"node_conv2d", "node_relu", "node_conv2d_1"} <= convolution.nodes
    assert (convolution.precision, softmax.precision) == ("INT8", None)


def test_parse_layers_accepts_names_only() -> None:
    layers = read(NAMES)
    assert [layer.name for layer in layers] == NAMES["Layers"]
    assert layers[1].nodes == {"node_conv2d", "node_relu"}
    assert {(layer.kind, layer.precision) for layer in layers} == {(None, None)}


@pytest.mark.parametrize("text", ["", "\n", '{"Layers": []}'])
def test_parse_layers_accepts_an_engine_that_tells_nothing(text: str) -> None:
    assert parse_layers(text) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Layers:", "returned invalid JSON"),
        ('["a"]', "expected an object"),
        ('{"Layers": "none"}', "expected an object"),
    ],
)
def test_parse_layers_refuses_anything_else(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        parse_layers(text)


@pytest.mark.parametrize(
    ("description", "kind"),
    [
        ("Row major linear BFloat16 format", "BF16"),
        ("Channel major FP32 format", "FP32"),
        ("Channel major INT8 format where channel == 4 and column stride % 32 == 0", "INT8"),
        ("Row major linear UInt8 format", "UINT8"),
        ("Row major linear FP8 format", "FP8"),
        ("Half", "FP16"),
        ("Float", "FP32"),
        ("Bool", "BOOL"),
        ("FloatComplex", None),
        ("Unknown format", None),
        (DYNAMIC, None),
    ],
)
def test_type_in_a_format(description: str, kind: str | None) -> None:
    assert type_in(description) == kind


def test_summarize_layers_counts_types_and_names_what_missed_int8() -> None:
    layers = read(DETAILED)
    times = dict(zip((layer.name for layer in layers), (0.02, 0.1, 0.04, 0.2, 0.03, 0.01, 0.0), strict=True))
    nodes = {"node_conv2d": "stem", "node_conv2d_1": "block.conv", "node_linear": "fc", "node_gone": "gone"}
    inspection = summary(layers, times, nodes)
    assert (inspection.layers, inspection.reformats, inspection.quantizers) == (7, 1, 1)
    assert inspection.precisions == {"FP16": 2, "INT8": 1, "FP32": 1}
    assert (inspection.total_ms, inspection.reformat_ms) == (pytest.approx(0.4), 0.04)
    assert [(layer.name, layer.precision) for layer in inspection.slowest[:2]] == [
        ("node_conv2d_1", "FP16"),
        ("stem.weight_DequantizeLinear + node_conv2d + node_relu", "INT8"),
    ]
    assert inspection.slowest[0].share == pytest.approx(0.5)
    assert {missed.layer: missed.reason for missed in inspection.missed} == {
        "node_conv2d_1": "reads FP16 in node_conv2d_1 (CaskConvolution)",
        "node_linear": "reads FP32 in node_linear (gemm)",
        "node_gone": "is named by no layer of the engine",
    }
    assert [missed.weight for missed in inspection.missed] == ["block.conv", "fc", "gone"]
    assert (inspection.quantized_layers, inspection.notes) == (4, [])


def test_summarize_layers_lists_the_ten_slowest() -> None:
    slowest = summary(read(NAMES), {f"layer{index}": float(index) for index in range(25)}).slowest
    assert [layer.name for layer in slowest] == [f"layer{index}" for index in range(24, 14, -1)]
    assert slowest[0].share == pytest.approx(24 / 300)


def test_summarize_layers_notes_an_unknown_type_instead_of_a_miss() -> None:
    layer = {"Name": "node_conv2d", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x"}], "Outputs": []}
    inspection = summary(read({"Layers": [layer]}), {}, {"node_conv2d": "conv.weight"})
    assert inspection.missed == []
    assert inspection.notes == ["The engine does not report the type of these layers: node_conv2d."]


def test_summarize_layers_notes_that_only_names_are_known() -> None:
    inspection = summary(read(NAMES), {"node_linear": 0.5}, {"node_conv2d": "stem"})
    assert (inspection.precisions, inspection.missed, inspection.quantized_layers) == ({}, [], 1)
    assert inspection.slowest[0].kind is None
    (note,) = inspection.notes
    assert note.startswith("The engine has only the names of its layers: build it with detailed profiling verbosity")
    (note,) = summary(parse_layers("")).notes
    assert "has no information about its layers" in note


HALF_QUANTIZED = """
<ir_version: 10, opset_import: ["" : 21]>
half_quantized (float[batch, 3, 4, 4] images) => (float[batch, 1, 4, 4] logits)
<int8 zero = {0}, float scale = {0.1}, int8[3, 3, 1, 1] integers = {1, 1, 1, 1, 1, 1, 1, 1, 1},
 float[1, 3, 1, 1] floats = {1, 1, 1}>
{
    q = QuantizeLinear(images, scale, zero)
    dq = DequantizeLinear(q, scale, zero)
    w = DequantizeLinear(integers, scale, zero)
    [node_conv2d] middle = Conv(dq, w)
    [node_conv2d_1] logits = Conv(middle, floats)
}
"""
LAYERS = {
    "Layers": [
        {"Name": "node_conv2d", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8"}]},
        {"Name": "node_conv2d_1", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}]},
    ]
}


@pytest.fixture
def engine(world: World, tmp_path: Path) -> Path:
    """Return an engine next to its graph: two convolutions, of which the first is quantized."""
    world.inspected = json.dumps(LAYERS)
    world.layer_ms = {"node_conv2d": 0.25, "node_conv2d_1": 0.5}
    onnx.save(onnx.parser.parse_model(HALF_QUANTIZED), tmp_path / "model.trt.onnx")
    return build(tmp_path / "model.trt.onnx", batch=(1, 2, 8))


def inspect(engine: Path) -> tuple[EngineInspection, str]:
    with open_engine(engine) as runner:
        return inspect_engine(runner, "w8a8/model.engine", engine, batch=4)


def test_layer_times_are_of_a_warm_engine_in_a_context_of_their_own(world: World, engine: Path) -> None:
    with open_engine(engine) as runner:
        assert runner.layer_times(4, runs=20) == world.layer_ms
        assert world.batches == [4] * 30
        runner.measure(4, warmup_ms=0, min_runs=3, min_seconds=0)
        assert world.profiled_runs == 30  # what is measured is not slowed down by a profiler


@pytest.mark.parametrize(
    ("kind", "reasons"), [("Int8", {}), ("Float", {"integers": "reads FP32 in node_conv2d (CaskConvolution)"})]
)
def test_inspect_engine_names_what_is_quantized_and_reads_a_float(
    world: World, engine: Path, kind: str, reasons: dict[str, str]
) -> None:
    world.inspected = world.inspected.replace("Int8", kind)
    inspection, text = inspect(engine)
    assert text == world.inspected
    assert world.inspected_batch == 4  # formats are known once shapes are set
    assert (inspection.engine, inspection.batch, inspection.detailed) == ("w8a8/model.engine", 4, True)
    assert (inspection.layers, inspection.quantized_layers) == (2, 1)
    assert {missed.weight: missed.reason for missed in inspection.missed} == reasons
    assert [layer.name for layer in inspection.slowest] == ["node_conv2d_1", "node_conv2d"]


def test_inspect_engine_has_the_memory_of_weights_where_the_release_tells(world: World, engine: Path) -> None:
    assert inspect(engine)[0].weights_bytes is None
    world.weights_bytes = 4096
    assert inspect(engine)[0].weights_bytes == 4096


def test_inspect_engine_needs_no_graph(engine: Path) -> None:
    engine.with_name("model.trt.onnx").unlink()
    inspection, _ = inspect(engine)
    assert (inspection.quantized_layers, inspection.layers) == (0, 2)


def test_inspect_engine_notes_what_cannot_be_inspected(world: World, engine: Path) -> None:
    world.inspected = "not available"
    inspection, text = inspect(engine)
    assert text == "not available"
    assert inspection.notes == [
        "The engine could not be inspected: the engine inspector returned invalid JSON: "
        "Expecting value: line 1 column 1 (char 0)."
    ]
