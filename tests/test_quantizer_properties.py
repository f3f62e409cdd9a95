"""Quantizers hold, value for value, what ONNX Runtime makes of QuantizeLinear and DequantizeLinear."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets import captured
from numpy.typing import NDArray
from torch import nn

from clusterq_deploy.lowering import GraphFormat, export_graph, lower, target_of
from clusterq_deploy.lowering.lower import bounded_name, offset_of, quantized_name
from clusterq_deploy.quantization import BitWidths, Grid, Student, make_student
from clusterq_deploy.quantization.fake_quant import Quantizer
from clusterq_deploy.quantization.ptq.calibrate import activation_scale, weight_scales
from clusterq_deploy.runtimes.runners import OnnxRunner

Floats = NDArray[np.float32]

GRAPH_FORMATS: tuple[GraphFormat, ...] = ("onnxruntime", "tensorrt", "int4")
SIDE, CHANNELS = 6, 3
SIZE = SIDE * SIDE
EDGES = (0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38)

grids = st.builds(Grid, bits=st.integers(2, 8), signed=st.booleans())
scales = st.floats(-26, 60).map(lambda power: 2.0**power)  # from the smallest that a quantizer takes
floats = st.floats(width=32, allow_nan=False, allow_infinity=True)


@st.composite
def beside(draw: st.DrawFn, scale: float) -> Floats:
    """Values (SIZE,): any, edges, and halves of a grid's step with their neighbours in float32."""
    halves = draw(st.lists(st.integers(-600, 600), min_size=SIZE // 2, max_size=SIZE // 2))
    ties = np.array(halves, np.float32) / 2 * np.float32(scale)
    moved = draw(st.sampled_from((-np.inf, 0.0, np.inf)))
    ties = np.nextafter(ties, np.float32(moved)) if moved else ties
    others = draw(st.lists(st.sampled_from(EDGES) | floats, min_size=SIZE - len(ties), max_size=SIZE - len(ties)))
    return np.concatenate([ties, np.array(others, np.float32)])


@cache
def lone_layer(bits: int) -> tuple[Student, onnx.ModelProto, str]:
    """Return a net of one layer, its graph with markers, and the site in front of the layer."""
    net = nn.Sequential(nn.Conv2d(1, CHANNELS, SIDE, bias=False), nn.Flatten()).eval()
    student = make_student(captured(net, (1, SIDE, SIDE)), BitWidths(bits, 8), quantize_first_last=True)
    return student, export_graph(student, (1, SIDE, SIDE)), student.placement.weights[0].input_site


def tapped(graph: onnx.ModelProto, images: Floats) -> dict[str, np.ndarray]:
    """Return what ONNX Runtime computes at every node."""
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for node in graph.graph.node for name in node.output)
    unique = {value.name: value for value in graph.graph.output}
    del graph.graph.output[:]
    graph.graph.output.extend(unique.values())
    with OnnxRunner(graph.SerializeToString(), threads=1, optimized=False) as runner:
        return runner.outputs(images)


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@settings(max_examples=60, deadline=None)
@given(grid=grids, scale=scales, data=st.data())
def test_quantizer_matches_runtime_activations(
    graph_format: GraphFormat, grid: Grid, scale: float, data: st.DataObject
) -> None:
    student, marked, site = lone_layer(8)
    quantizer = Quantizer(site, grid)
    quantizer.set_scale(torch.tensor(scale))
    student.net.set_submodule(f"quantizers.{site}", quantizer)
    x = data.draw(beside(float(quantizer.scale.detach()))).reshape(1, 1, SIDE, SIDE)
    if graph_format == "tensorrt" and not grid.signed and grid.bits >= 7:
        x = np.maximum(x, 0)  # no clip there: an unsigned grid is given to tensors alone that are never negative
    made = tapped(lower(marked, student, graph_format), x)
    integers = made.get(bounded_name(site), made[quantized_name(site)]).astype(np.int32)
    given_x = torch.from_numpy(x)
    with student.for_target(target_of(graph_format)):
        np.testing.assert_array_equal(integers - offset_of(grid, graph_format), quantizer.integers(given_x).numpy())
        np.testing.assert_array_equal(made[f"{site}.dequantized"], quantizer(given_x).detach().numpy())


@pytest.mark.parametrize("graph_format", GRAPH_FORMATS)
@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), data=st.data())
def test_quantizer_matches_runtime_weights(graph_format: GraphFormat, bits: int, data: st.DataObject) -> None:
    student, marked, _ = lone_layer(bits)
    ((name, layer),) = student.layers().items()
    quantizer = layer.weight_quantizer
    quantizer.set_scale(torch.tensor([data.draw(scales) for _ in range(CHANNELS)]))
    rows = [data.draw(beside(step)) for step in quantizer.scale.tolist()]
    weight = np.where(np.isfinite(rows), rows, 0).reshape(layer.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    made = tapped(lower(marked, student, graph_format), np.zeros((1, 1, SIDE, SIDE), np.float32))
    with student.for_target(target_of(graph_format)):
        expected = quantizer(layer.weight).detach().numpy()
    np.testing.assert_array_equal(made[f"{name}.weight.dequantized"], expected)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=arrays(np.float32, (3, 12), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    dead=st.lists(st.integers(0, 2), max_size=3),
)
@example(bits=8, rows=np.ones((3, 12), np.float32), dead=[0, 1, 2])
def test_weight_scales_are_positive_and_beat_full_range(bits: int, rows: Floats, dead: list[int]) -> None:
    rows[dead] = 0
    weight, grid = torch.from_numpy(rows), Grid(bits, signed=True)
    found = weight_scales(weight, grid)
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())
    floor = found.min()  # a channel far below its layer's largest one has a step that is no finer
    whole = (weight.abs().amax(1) / grid.high).clamp_min(float(floor))
    live = found > floor
    known = 1e-3 * lost(weight, whole, grid) + 1e-9 * weight.double().square().sum(1)  # the search is in float32
    assert bool((lost(weight, found, grid) <= lost(weight, whole, grid) + known)[live].all())


@settings(max_examples=100, deadline=None)
@given(
    grid=grids,
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1e-45]), min_size=1, max_size=40),
)
@example(grid=Grid(8, signed=False), values=[0.0] * 10)
def test_activation_scale_fits_quantizer(grid: Grid, values: list[float]) -> None:
    sample = torch.tensor(values)
    quantizer = Quantizer("site", grid)
    found = activation_scale(sample, grid)
    quantizer.set_scale(found)
    assert all(0 < float(scale) < float("inf") for scale in (found, quantizer.scale.detach()))
    assert bool(quantizer(sample).isfinite().all())


def lost(rows: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Squared error of each row, float64."""
    step = scale.double()[:, None]
    return (((rows.double() / step).round().clamp(grid.low, grid.high) * step) - rows.double()).square().sum(1)
