"""Running engines: the flow of control, driven through a double of TensorRT."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorrt_double import World

from calib.support.progress import SILENT
from clusterq_deploy.errors import EngineError, TensorRTMissing
from clusterq_deploy.runtimes.tensorrt import (
    BuildConfig,
    TensorRTRunner,
    build_engine,
    sidecar_path,
    unavailable_reason,
)


def build(graph: Path, **options: object) -> Path:
    engine = graph.with_name("model.engine")
    build_engine(graph, engine, BuildConfig.model_validate(options), SILENT)
    return engine


def move(world: World, change: dict[str, object]) -> None:
    """Go to another machine."""
    world.__dict__.update(change)
    sys.modules["tensorrt"].__dict__["__version__"] = world.version


class TestRun:
    @pytest.mark.parametrize(("images", "calls"), [(1, [2]), (2, [2]), (4, [4]), (5, [4, 2]), (11, [4, 4, 3]), (0, [])])
    def test_splits_and_pads_batches(self, world: World, graph: Path, images: int, calls: list[int]) -> None:
        batch = np.random.default_rng(0).normal(size=(images, 3, 4, 4)).astype(np.float32)
        batch.flags.writeable = False
        with TensorRTRunner(build(graph, batch=(2, 2, 4)), device="cpu") as runner:
            logits = runner.infer(batch)
        expected = batch.mean(axis=(1, 2, 3))[:, None] * np.arange(1, 6)
        assert (logits.dtype, logits.shape) == (np.float32, (images, 5))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        assert world.batches == calls

    def test_a_fixed_batch_is_padded_to(self, world: World, graph: Path) -> None:
        world.input_shape = (8, 3, 4, 4)
        with TensorRTRunner(build(graph), device="cpu") as runner:
            assert runner.batch_range == (8, 8)
            assert runner.infer(np.zeros((3, 3, 4, 4), np.float32)).shape == (3, 5)

    def test_refuses_images_of_another_size(self, world: World, graph: Path) -> None:
        with (
            TensorRTRunner(build(graph), device="cpu") as runner,
            pytest.raises(EngineError, match=r"\(1, 3, 8, 8\); the engine takes \(N, 3, 4, 4\)"),
        ):
            runner.infer(np.zeros((1, 3, 8, 8), np.float32))

    def test_is_closed_after_its_context(self, world: World, graph: Path) -> None:
        with TensorRTRunner(build(graph), device="cpu") as runner:
            pass
        with pytest.raises(EngineError, match="closed"):
            runner.infer(np.zeros((1, 3, 4, 4), np.float32))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gpu": "NVIDIA Other"}, "GPU is NVIDIA Other, the engine is built for NVIDIA Test 100"),
            ({"capability": (8, 9)}, "compute capability is 8.9, the engine is built for 9.0"),
            ({"version": "10.3.0"}, "TensorRT is 10.3.0, the engine is built for 10.9.0"),
            ({"version": "10.10.0"}, "TensorRT is 10.10.0, the engine is built for 10.9.0"),
        ],
    )
    def test_an_engine_of_another_machine_is_not_loaded(
        self,
        world: World,
        graph: Path,
        change: dict[str, object],
        message: str,
    ) -> None:
        engine = build(graph)
        move(world, change)
        world.load_error = "Serialization assertion failed"  # it is refused before TensorRT sees it
        with pytest.raises(EngineError, match=f"cannot run here: {message}; build it again here"):
            TensorRTRunner(engine, device="cpu")

    @pytest.mark.parametrize(
        ("options", "change", "fits"),
        [
            ({"hardware_compatible": True}, {"gpu": "Other", "capability": (8, 0)}, True),
            ({"hardware_compatible": True}, {"gpu": "Other", "capability": (7, 5)}, False),
            ({"version_compatible": True}, {"version": "10.16.1"}, True),
            ({"version_compatible": True}, {"version": "11.0.0"}, True),
            ({"version_compatible": True}, {"version": "10.3.0"}, False),
            ({"version_compatible": True}, {"version": "12.0.0"}, False),
        ],
    )
    def test_a_compatible_engine_runs_elsewhere(
        self,
        world: World,
        graph: Path,
        options: dict[str, object],
        change: dict[str, object],
        fits: bool,
    ) -> None:
        engine = build(graph, **options)
        move(world, change)
        if fits:
            TensorRTRunner(engine, device="cpu")
            assert world.host_code_allowed is bool(options.get("version_compatible"))
        else:
            with pytest.raises(EngineError, match="cannot run here"):
                TensorRTRunner(engine, device="cpu")

    def test_says_why_an_engine_does_not_load(self, world: World, graph: Path) -> None:
        engine = build(graph)
        world.load_error = "Serialization assertion failed"
        with pytest.raises(EngineError, match=r"cannot load .*; Serialization assertion failed"):
            TensorRTRunner(engine, device="cpu")

    def test_a_file_that_is_not_the_sidecars_is_refused(self, world: World, graph: Path) -> None:
        engine = build(graph)
        engine.write_bytes(b"something else")
        with pytest.raises(EngineError, match="not the file that its sidecar describes"):
            TensorRTRunner(engine, device="cpu")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "needs its sidecar"),
            ("{", "no sidecar: the file"),
            ('{"built_on": {}}', r"no sidecar: built_on\.gpu"),
        ],
    )
    def test_a_sidecar_is_needed(self, world: World, graph: Path, content: str | None, message: str) -> None:
        engine = build(graph)
        if content is None:
            sidecar_path(engine).unlink()
        else:
            sidecar_path(engine).write_text(content)
        with pytest.raises(EngineError, match=message):
            TensorRTRunner(engine, device="cpu")

    @pytest.mark.parametrize("captures", [True, False])
    def test_a_cuda_graph_is_replayed_where_it_can_be_captured(
        self, world: World, graph: Path, captures: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.captures = captures
        with TensorRTRunner(build(graph), device="cpu") as runner:
            times = runner.measure(1, warmup_ms=0, min_runs=4, min_seconds=0, cuda_graph=True)
        assert (len(times.calls), times.cuda_graph) == (4, captures)
        assert world.replays == (4 if captures else 0)
        assert ("no CUDA graph can be captured" in caplog.text) is not captures

    def test_refuses_to_measure_a_batch_outside_the_profile(self, world: World, graph: Path) -> None:
        with (
            TensorRTRunner(build(graph), device="cpu") as runner,
            pytest.raises(EngineError, match="batch is 33; the engine takes 1 to 32"),
        ):
            runner.measure(33)


@pytest.mark.parametrize("name", ["int8_calibrator", "set_calibration_profile", "no_such_name"])
def test_the_double_refuses_names_that_a_release_lacks(world: World, graph: Path, name: str) -> None:
    build(graph)
    with pytest.raises(AssertionError, match="not in every release"):
        getattr(world.options, name)
    with pytest.raises(AssertionError, match="not in every release"):
        setattr(world.options, name, None)


class TestAvailability:
    def test_everything_is_there(self, world: World) -> None:
        assert unavailable_reason() is None

    def test_says_all_that_is_missing(self, monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)  # the import system's own mark of a module not there
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reason = unavailable_reason()
        assert reason is not None
        assert "\n" not in reason
        assert "GPU" in reason or "without CUDA" in reason
        assert "pip install 'clusterq-deploy[tensorrt]'" in reason
        with pytest.raises(TensorRTMissing, match="tensorrt is not installed"):
            build(graph)

    def test_tells_a_broken_installation_from_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open\\n object file')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        reason = unavailable_reason()
        assert reason is not None
        assert reason.endswith("cannot be imported: libnvinfer.so.10: cannot open object file")
