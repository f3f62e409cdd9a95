"""What TensorRT's engine inspector tells, in the shapes of its releases, and what is concluded from it."""

import json

import pytest

from clusterq_deploy.errors import EngineError
from clusterq_deploy.runtimes.tensorrt import summarize_layers
from clusterq_deploy.runtimes.tensorrt.layers import EngineLayers, parse_layers, type_in


def tensor(name: str, kind: str, *shape: int) -> dict[str, object]:
    return {"Name": name, "Location": "Device", "Dimensions": list(shape), "Format/Datatype": kind}


INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FP16 = "Channel major FP16 format where channel % 8 == 0"
FP32 = "Row major linear FP32"

# TensorRT 10, detailed: a quantizer, two fused convolutions, a layout change, one compiled layer, a float layer.
DETAILED = {
    "Layers": [
        {
            "Name": "images_QuantizeLinear",
            "LayerType": "Reformat",
            "Inputs": [tensor("images", FP32, 8, 3, 32, 32)],
            "Outputs": [tensor("images_q", "Row major Int8 format", 8, 3, 32, 32)],
            "ParameterType": "Reformat",
            "Origin": "QDQ",
            "TacticValue": "0x00000000000003e8",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: images_QuantizeLinear]",
        },
        {
            "Name": "stem.weight_DequantizeLinear + node_conv2d + node_relu",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("images_q", INT8, 8, 3, 32, 32)],
            "Outputs": [tensor("relu_q", INT8, 8, 16, 32, 32)],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Int8", "Count": 432},
            "Bias": {"Type": "Float", "Count": 16},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw",
            "Metadata": "[ONNX Layer: node_conv2d]\x1f[ONNX Layer: node_relu | block (Block)]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to node_conv2d_1",
            "LayerType": "Reformat",
            "Inputs": [tensor("relu_q", INT8, 8, 16, 32, 32)],
            "Outputs": [tensor("relu_half", FP16, 8, 16, 32, 32)],
            "Origin": "REFORMAT",
            "Metadata": "",
        },
        {
            "Name": "node_conv2d_1",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("relu_half", FP16, 8, 16, 32, 32)],
            "Outputs": [tensor("out", FP16, 8, 32, 32, 32)],
            "Weights": {"Type": "Half", "Count": 4608},
            "Metadata": "[ONNX Layer: node_conv2d_1]",
        },
        {
            "Name": "__myl_MeanCast_myl0_1",
            "LayerType": "kgen",
            "Inputs": [tensor("out", "Half", 8, 32, 32, 32)],
            "Outputs": [tensor("pooled", "Float", 8, 32)],
            "TacticName": "__myl_MeanCast_0x1c9a",
            "Metadata": "[ONNX Layer: node_mean]\x1e[ONNX Layer: node_cast]",
        },
        {
            "Name": "node_linear",
            "LayerType": "gemm",
            "Inputs": [tensor("pooled", "Float", 8, 32)],
            "Outputs": [tensor("logits", "Float", 8, 10)],
            "Metadata": "[ONNX Layer: node_linear]",
        },
        {"Name": "fc.bias", "LayerType": "Constant", "Inputs": [], "Outputs": [tensor("b", FP32, 10)]},
    ],
    "Bindings": ["images", "logits"],
}
# TensorRT 8.4: no metadata; before the shapes of a dynamic batch are set there are no formats either.
WITHOUT_METADATA = {
    "Layers": [
        {
            "Name": "stem.weight + stem_q + node_conv2d + node_relu || node_conv2d_1",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("images", "N/A due to dynamic shapes", -1, 3, 32, 32)],
            "Outputs": [tensor("out", "N/A due to dynamic shapes", -1, 16, 32, 32)],
            "Weights": {"Type": "Int8", "Count": 432},
        },
        {
            "Name": "node_softmax",
            "LayerType": "SoftMax",
            "Inputs": [tensor("out", "N/A due to dynamic shapes", -1, 16)],
            "Outputs": [tensor("logits", "N/A due to dynamic shapes", -1, 16)],
        },
    ]
}
NAMES = {"Layers": ["images_q", "node_conv2d + node_relu", "node_linear"], "Bindings": ["images", "logits"]}


def read(content: object) -> EngineLayers:
    return parse_layers(json.dumps(content))


def test_types_in_a_field_of_their_own_are_read() -> None:
    """As TensorRT 11 tells of tensors."""

    def apart(own: dict[str, object]) -> dict[str, object]:
        return {
            "Name": own["Name"],
            "Format": "Linear",
            "DataType": {INT8: "Int8", FP32: "Float", FP16: "Half"}[own["Format/Datatype"]],
        }

    layers = [
        {**own, "Inputs": [apart(i) for i in own["Inputs"]], "Outputs": []}
        for own in DETAILED["Layers"]
        if own["LayerType"] == "CaskConvolution"
    ]
    assert [own.precision for own in read({"Layers": layers}).layers] == ["INT8", "FP16"]


def test_a_type_that_the_engine_does_not_tell_is_a_note_and_no_miss() -> None:
    silent = {"Name": "node_conv2d", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x"}], "Outputs": []}
    found = summarize_layers(
        read({"Layers": [silent]}), {}, {"node_conv2d": "conv.weight"}, engine="model.engine", batch=1
    )
    assert found.missed == []
    assert found.notes == ["Of which type these layers are the engine does not tell: node_conv2d."]


def test_detailed_layers_have_kind_type_and_nodes() -> None:
    found = read(DETAILED)
    assert found.detailed
    assert [(layer.kind, layer.precision) for layer in found.layers] == [
        ("Reformat", "FP32"),
        ("CaskConvolution", "INT8"),
        ("Reformat", "INT8"),
        ("CaskConvolution", "FP16"),
        ("kgen", "FP16"),
        ("gemm", "FP32"),
        ("Constant", "FP32"),
    ]
    assert {"node_conv2d", "node_relu"} <= found.layers[1].nodes
    assert {"node_mean", "node_cast"} <= found.layers[4].nodes
    assert [layer.is_quantizer for layer in found.layers].index(True) == 0
    assert [layer.is_reformat for layer in found.layers].index(True) == 2
    assert [layer.computes for layer in found.layers] == [False, True, False, True, True, True, False]


def test_raw_control_characters_in_metadata_are_read() -> None:
    text = json.dumps(DETAILED).replace("\\u001f", "\x1f").replace("\\u001e", "\x1e")
    assert "\x1f" in text
    assert parse_layers(text) == read(DETAILED)


def test_without_metadata_names_tell_the_nodes_and_weights_the_type() -> None:
    convolution, softmax = read(WITHOUT_METADATA).layers
    assert {"node_conv2d", "node_relu", "node_conv2d_1"} <= convolution.nodes
    assert (convolution.precision, softmax.precision) == ("INT8", None)


def test_names_alone_are_layers_without_detail() -> None:
    found = read(NAMES)
    assert not found.detailed
    assert [layer.name for layer in found.layers] == NAMES["Layers"]
    assert found.layers[1].nodes == {"node_conv2d", "node_relu"}
    assert {layer.precision for layer in found.layers} == {None}


@pytest.mark.parametrize("text", ["", "\n", '{"Layers": []}'])
def test_an_engine_that_tells_nothing_has_no_layers(text: str) -> None:
    assert parse_layers(text) == EngineLayers((), detailed=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("Layers:", "gave no JSON"), ('["a"]', "expected an object"), ('{"Layers": "none"}', "expected an object")],
)
def test_anything_else_is_an_error(text: str, message: str) -> None:
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
        ("FloatComplex", None),
        ("Unknown format", None),
        ("N/A due to dynamic shapes", None),
    ],
)
def test_the_type_in_a_format(description: str, kind: str | None) -> None:
    assert type_in(description) == kind


def test_the_summary_counts_types_and_names_what_missed_int8() -> None:
    found = read(DETAILED)
    times = dict(zip((layer.name for layer in found.layers), (0.02, 0.1, 0.04, 0.2, 0.03, 0.01, 0.0), strict=True))
    nodes = {"node_conv2d": "stem", "node_conv2d_1": "block.conv", "node_linear": "fc", "node_gone": "gone"}
    summary = summarize_layers(found, times, nodes, engine="w8a8/model.engine", batch=8)
    assert (summary.layers, summary.reformats, summary.quantizers) == (7, 1, 1)
    assert summary.precisions == {"FP16": 2, "INT8": 1, "FP32": 1}
    assert (summary.total_ms, summary.reformat_ms) == (pytest.approx(0.4), 0.04)
    assert [(layer.name, layer.precision) for layer in summary.slowest[:2]] == [
        ("node_conv2d_1", "FP16"),
        ("stem.weight_DequantizeLinear + node_conv2d + node_relu", "INT8"),
    ]
    assert summary.slowest[0].share == pytest.approx(0.5)
    assert {missed.layer: missed.reason for missed in summary.missed} == {
        "node_conv2d_1": "reads FP16 in node_conv2d_1 (CaskConvolution)",
        "node_linear": "reads FP32 in node_linear (gemm)",
        "node_gone": "is named by no layer of the engine",
    }
    assert [missed.weight for missed in summary.missed] == ["block.conv", "fc", "gone"]
    assert (summary.quantized_layers, summary.notes) == (4, [])


def test_the_ten_slowest_layers_are_listed() -> None:
    times = {f"layer{index}": float(index) for index in range(25)}
    summary = summarize_layers(EngineLayers((), detailed=False), times, {}, engine="e", batch=1)
    assert [layer.name for layer in summary.slowest] == [f"layer{index}" for index in range(24, 14, -1)]
    assert summary.slowest[0].share == pytest.approx(24 / 300)


def test_names_alone_say_so_instead_of_blaming_layers() -> None:
    summary = summarize_layers(read(NAMES), {"node_linear": 0.5}, {"node_conv2d": "stem"}, engine="e", batch=1)
    assert (summary.precisions, summary.missed, summary.quantized_layers) == ({}, [], 1)
    assert summary.slowest[0].kind is None
    (note,) = summary.notes
    assert note.startswith("The engine tells only the names of its layers: build it with detailed profiling verbosity")
    (note,) = summarize_layers(parse_layers(""), {}, {}, engine="e", batch=1).notes
    assert "tells nothing of its layers" in note
