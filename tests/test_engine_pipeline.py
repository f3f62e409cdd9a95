"""Engines in a run, from the build to the report, with a double in the place of TensorRT and of torch's CUDA."""

import json
from pathlib import Path

import pytest
from support import small_config
from tensorrt_double import World, install, open_engine

from clusterq_deploy import Pipeline
from clusterq_deploy.errors import EngineError
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.runtimes import tensorrt as engine

SETTINGS = {"limit": 40, "bits": ["w8a8"], "device": "cpu"}


def begin(folder: Path) -> Pipeline:
    """Return a run that has exported the float model."""
    pipeline = Pipeline(small_config(**SETTINGS), folder)
    pipeline.write_config()
    pipeline.export("fp32")
    return pipeline


def install_for(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> World:
    """Install the double, with engines of the run's model; from here on torch believes in a GPU."""
    world = install(monkeypatch)
    world.input_shape, world.classes = (-1, *pipeline.model.input.size), pipeline.model.classes
    monkeypatch.setattr(engine, "TensorRTRunner", open_engine)
    return world


@pytest.mark.slow
def test_run_measures_and_inspects_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = begin(tmp_path / "run")
    pipeline.synthesize()
    pipeline.quantize(BitWidths.parse("w8a8"))
    pipeline.export("w8a8")
    world = install_for(pipeline, monkeypatch)
    world.inspected = json.dumps({"Layers": ["node_conv2d"]})
    world.layer_ms = {"node_conv2d": 0.5}
    for variant in ("fp32", "w8a8"):
        assert pipeline.build(variant) is not None
        pipeline.evaluate(variant)
    pipeline.benchmark()
    report = pipeline.report()

    assert report.environment.gpu == world.gpu  # the run is on the CPU, its engines are not
    for variant in report.variants:
        engines = [artifact.path for artifact in variant.artifacts if artifact.kind == "engine"]
        assert engines[0] == f"{variant.name}/model.engine"
        assert [a.graph for a in variant.accuracy if a.runtime == "tensorrt"] == engines
        latencies = [record for record in variant.latency if record.runtime == "tensorrt"]
        assert [(r.graph, r.batch) for r in latencies] == [(path, batch) for path in engines for batch in (1, 2)]
        assert all(record.compute and record.cuda_graph and record.trtexec and record.gpu for record in latencies)
        assert [inspection.engine for inspection in variant.inspections] == engines
        for inspection in variant.inspections:
            assert (tmp_path / "run" / f"{inspection.engine}.layers.json").read_text() == world.inspected
            assert (inspection.batch, inspection.layers) == (1, 1)
            assert inspection.slowest[0].mean_ms == pytest.approx(0.5)
    fp32, w8a8 = report.variants
    assert fp32.inspections[0].quantized_layers == 0
    assert w8a8.inspections[0].quantized_layers == w8a8.quantized_layers
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="engines"' in page
    assert "trtexec --loadEngine=w8a8/model.engine --shapes=" in page


def test_build_is_done_again_for_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = begin(tmp_path / "run")
    world = install_for(pipeline, monkeypatch)
    first, again = (pipeline.build("fp32") for _ in range(2))
    assert first is not None
    assert again == first
    world.move(version="10.16.1")
    assert pipeline.build("fp32") != first
    assert engine.read_sidecar(tmp_path / "run/fp32/model.engine").built_on.tensorrt == "10.16.1"


def test_benchmark_leaves_out_an_engine_that_does_not_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = begin(tmp_path / "run")
    world = install_for(pipeline, monkeypatch)
    assert pipeline.build("fp32") is not None
    world.load_error = "Error Code 1: Cuda Runtime (out of memory)"
    result = pipeline.benchmark().result
    assert {record.runtime for record in result.latency["fp32"]} == {"onnxruntime-cpu"}
    reasons = [entry.reason for entry in result.skipped if entry.stage == "benchmark"]
    assert [reason.split(":")[0] for reason in reasons] == ["fp32/model.engine", "fp32/model.fp16.engine"]
    assert all("the GPU's memory ran out" in reason for reason in reasons)
    world.load_error = "Serialization assertion failed"
    with pytest.raises(EngineError, match="Serialization assertion failed"):
        Pipeline(small_config(**SETTINGS, benchmark={"batches": [2]}), tmp_path / "run").benchmark()
