"""Opening and running engines: the flow of control, driven through a double of TensorRT."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorrt_double import World, build, open_engine

from clusterq_deploy.errors import EngineError
from clusterq_deploy.runtimes.tensorrt import sidecar_path


@pytest.mark.parametrize(("images", "calls"), [(1, [2]), (2, [2]), (4, [4]), (5, [4, 2]), (11, [4, 4, 3]), (0, [])])
def test_infer_splits_and_pads_batches(world: World, graph: Path, images: int, calls: list[int]) -> None:
    batch = np.random.default_rng(0).normal(size=(images, 3, 4, 4)).astype(np.float32)
    batch.flags.writeable = False
    with open_engine(build(graph, batch=(2, 2, 4))) as runner:
        logits = runner.infer(batch)
    expected = batch.mean(axis=(1, 2, 3))[:, None] * np.arange(1, 6)
    assert (logits.dtype, logits.shape) == (np.float32, (images, 5))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert world.batches == calls


def test_infer_pads_to_a_fixed_batch(world: World, graph: Path) -> None:
    world.input_shape = (8, 3, 4, 4)
    with open_engine(build(graph)) as runner:
        assert runner.batch_range == (8, 8)
        assert runner.infer(np.zeros((3, 3, 4, 4), np.float32)).shape == (3, 5)
    assert (world.batches, world.profiles) == ([8], {})


def test_runner_refuses_other_images_other_batches_and_any_once_closed(world: World, graph: Path) -> None:
    with open_engine(build(graph)) as runner:
        with pytest.raises(EngineError, match=r"\(1, 3, 8, 8\); the engine accepts \(N, 3, 4, 4\)"):
            runner.infer(np.zeros((1, 3, 8, 8), np.float32))
        for method in (runner.measure, runner.layer_information, runner.layer_times):
            with pytest.raises(EngineError, match="batch is 33; the engine accepts 1 to 32"):
                method(33)
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
def test_runner_refuses_an_engine_of_another_machine(
    world: World, graph: Path, change: dict[str, object], message: str
) -> None:
    engine = build(graph)
    world.move(**change)
    world.load_error = "Serialization assertion failed"  # it is refused before TensorRT sees it
    with pytest.raises(EngineError, match=f"cannot run here: {message}; build it again here"):
        open_engine(engine)


@pytest.mark.parametrize(
    ("options", "change", "fits"),
    [
        ({"hardware_compatible": True}, {"gpu": "Other", "capability": (8, 0)}, True),
        ({"hardware_compatible": True}, {"gpu": "Other", "capability": (7, 5)}, False),
        ({"same_capability": True}, {"gpu": "Other"}, True),
        ({"same_capability": True}, {"capability": (8, 0)}, False),
        ({"version_compatible": True}, {"version": "10.16.1"}, True),
        ({"version_compatible": True}, {"version": "11.0.0"}, True),
        ({"version_compatible": True}, {"version": "10.3.0"}, False),
        ({"version_compatible": True}, {"version": "12.0.0"}, False),
    ],
)
def test_runner_loads_a_compatible_engine_where_it_fits(
    world: World, graph: Path, options: dict[str, object], change: dict[str, object], fits: bool
) -> None:
    engine = build(graph, **options)
    world.move(**change)
    if fits:
        open_engine(engine)
        assert world.host_code_allowed is bool(options.get("version_compatible"))
    else:
        with pytest.raises(EngineError, match="cannot run here"):
            open_engine(engine)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda engine: engine.write_bytes(b"something else"), "not the file that its sidecar describes"),
        (lambda engine: engine.unlink(), "cannot read .*engine: No such file"),
        (lambda engine: sidecar_path(engine).unlink(), "needs its sidecar"),
        (lambda engine: sidecar_path(engine).write_text("{"), "not a sidecar: the file"),
        (lambda engine: sidecar_path(engine).write_text('{"built_on": {}}'), r"not a sidecar: built_on\.tensorrt"),
        (lambda _: None, r"cannot load .*; Serialization assertion failed"),
    ],
)
def test_runner_refuses_a_damaged_engine(
    world: World, graph: Path, spoil: Callable[[Path], object], message: str
) -> None:
    engine = build(graph)
    world.load_error = "Serialization assertion failed"
    spoil(engine)
    with pytest.raises(EngineError, match=message):
        open_engine(engine)


@pytest.mark.parametrize("name", ["int8_calibrator", "set_calibration_profile", "no_such_name"])
def test_double_refuses_names_that_a_release_lacks(world: World, graph: Path, name: str) -> None:
    build(graph)
    with pytest.raises(AssertionError, match="not in every release"):
        getattr(world.options, name)
    with pytest.raises(AssertionError, match="not in every release"):
        setattr(world.options, name, None)
