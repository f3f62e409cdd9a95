"""What layers cost, and mixed precision: by hand, and as few layers as a bound allows."""

from functools import cache
from pathlib import Path

import pytest
import torch
from nets import calibrated, captured, digits, images, make_net
from onnx import TensorProto
from support import error_line, json_of, output_of, seeded
from torch import Tensor

from clusterq_deploy import read_report
from clusterq_deploy.errors import GraphError
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.lowering import check_tensorrt, export_graph, lower, target_of, verify
from clusterq_deploy.quantization import (
    BitWidths,
    PrecisionPlan,
    load_student,
    make_student,
    plan_precision,
    sensitivities,
)
from clusterq_deploy.quantization.sensitivity import compare
from clusterq_deploy.results.stages import Sensitivity
from clusterq_deploy.runtimes.runners import TorchRunner

NARROW = BitWidths(2, 3)


@cache
def batch() -> Tensor:
    """Return 96 images that the bundled model answers for."""
    data = load_evaluation(None, digits(), 96)
    return torch.cat([torch.as_tensor(images) for images, _ in data.batches(96)])


@cache
def costs(bits: BitWidths = NARROW) -> list[Sensitivity]:
    student = make_student(digits().module, bits)
    found = sensitivities(student, batch(), judged=batch(), batch_size=48, rng=seeded())
    assert all(quantizer.enabled for quantizer in student.quantizers().values())
    return found


def plan(max_drop: float, keep: dict[str, int] | None = None) -> PrecisionPlan:
    return plan_precision(
        digits().module,
        NARROW,
        costs=costs(),
        max_drop=max_drop,
        quantize_first_last=False,
        layer_bits=keep or {},
        images=batch(),
        judged=(batch() + batch().flip(0)) / 2,  # of two digits at once the model is unsure
        batch_size=48,
        rng=seeded(),
    )


def test_layer_bits_apply_to_weight_and_input() -> None:
    student = make_student(captured("residual"), BitWidths(4, 4), layer_bits={"a2.0": 8, "b1.0": 6})
    grids = {site.layer: (site.grid.bits, site.input_site) for site in student.placement.weights}
    read = {site.name: site.grid.bits for site in student.placement.activations}
    assert {name: bits for name, (bits, _) in grids.items() if bits != 4} == {
        "stem.0": 8,
        "a2.0": 8,
        "b1.0": 6,
        "fc": 8,
    }
    assert read[grids["a2.0"][1]] == 8
    assert read[grids["b1.0"][1]] == 6
    assert read[grids["c2.0"][1]] == 4


def test_layer_bits_refuse_unknown_layer_with_near_match() -> None:
    with pytest.raises(GraphError, match=r"no quantized layer 'a1'; did you mean 'a1\.0'"):
        make_student(captured("residual"), BitWidths(4, 4), layer_bits={"a1": 8})


def test_layer_bits_survive_export_and_file(tmp_path: Path) -> None:
    teacher = make_net("residual")
    student = calibrated(teacher, "w4a4", layer_bits={"a1.0": 8})
    path = tmp_path / "quantized.safetensors"
    path.write_bytes(student.to_bytes({}))
    again = load_student(path, captured(teacher))[0]
    assert again.layer_bits == {"a1.0": 8}
    marked = export_graph(again, (3, 16, 16))
    batch = images(64, seed=7)
    for graph_format in ("onnxruntime", "tensorrt", "int4"):
        graph = lower(marked, again, graph_format)
        with again.for_target(target_of(graph_format)):
            expected = TorchRunner(again).infer(batch.numpy())
        verify(graph, batch.numpy(), expected, name=graph_format, optimized=graph_format != "tensorrt")
        if graph_format == "tensorrt":
            assert check_tensorrt(graph) == []
        if graph_format == "int4":
            kinds = {i.name: i.data_type for i in graph.graph.initializer}
            assert kinds["a1.0.weight.integers"] == TensorProto.INT8
            assert kinds["a2.0.weight.integers"] == TensorProto.INT4


def test_compare_by_hand() -> None:
    teacher = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5]]).log()
    same = compare(teacher, teacher)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert (same.agreement, same.expected_drop) == (100, 0)
    other = compare(teacher.flip(1), teacher)
    assert other.kl == pytest.approx((0.6 * torch.tensor(4.0).log() + 0.2 * torch.tensor(1.5).log()).item() / 3)
    assert other.agreement == pytest.approx(100 / 3)  # the tie
    assert other.expected_drop == pytest.approx(100 * (0.6 + 0.2 + 0) / 3)


def test_sensitivities_grow_with_fewer_bits() -> None:
    narrow, wide = costs(), costs(BitWidths(8, 8))
    assert [c.layer for c in narrow] == [c.layer for c in wide]
    assert {c.bits for c in wide} == {"w8a8"}
    raised = [(n, w) for n, w in zip(narrow, wide, strict=True) if n.bits != "w8a8"]
    assert len(raised) == len(narrow) - 2  # all but the first and the last
    assert all(n.cost.kl > w.cost.kl for n, w in raised)


@pytest.mark.slow
def test_plan_precision_raises_as_few_layers_as_needed() -> None:
    none, every = plan(100), plan(1e-9)
    ranked = [c.layer for c in sorted(costs(), key=lambda c: -c.cost.kl) if c.bits != "w8a8"]
    assert none.layer_bits == {}
    assert set(every.layer_bits) == set(ranked)
    bound = 0.9 * none.estimate.expected_drop + 0.1 * every.estimate.expected_drop
    some = plan(bound)
    assert some.estimate.expected_drop <= bound
    assert 0 < len(some.layer_bits) < len(ranked)
    assert list(some.layer_bits) == ranked[: len(some.layer_bits)]
    assert plan(bound) == some


@pytest.mark.slow
def test_plan_precision_keeps_given_layer_bits() -> None:
    layer = costs()[1].layer
    assert plan(100, {layer: 3}).layer_bits == {layer: 3}
    assert plan(1e-9, {layer: 3}).layer_bits[layer] == 3


@pytest.mark.slow
def test_commands_raise_layers_and_report_shows_them(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output_of("run", "digits", "--config", settings, "--out", out, "--bits", "w2a8", "--max-drop", "1e-6")
    report = read_report(out / "report.json")
    variant = report.variants[1]
    assert len(variant.sensitivities) == variant.quantized_layers
    ranked = [own.layer for own in sorted(variant.sensitivities, key=lambda own: -own.kl) if own.bits != "w8a8"]
    assert variant.keep
    assert set(variant.keep) == set(ranked[: len(variant.keep)])
    assert variant.expected_drop is not None
    page = (out / "report.html").read_text()
    assert "Sensitivity of layers" in page
    assert "layers with other bits, for an expected drop" in page
    assert "## Sensitivity of layers" in (out / "report.md").read_text()
    rows = json_of("sensitivity", out, "--bits", "w2a8")
    assert [row["layer"] for row in rows] == [own.layer for own in variant.sensitivities]
    layer = next(iter(variant.keep))
    assert json_of("quantize", out, "--bits", "w4a4", "--keep", f"{layer}=8")[0]["layers_of_other_bits"] >= 1
    assert "no quantized layer" in error_line("quantize", out, "--keep", "nothing=8")
    assert "is not of the form layer=bits" in error_line("quantize", out, "--keep", "stem")
    assert "less than or equal to 8" in error_line("quantize", out, "--keep", f"{layer}=9")
