"""Fixtures of several test modules."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support import read_files, small_config, write_settings
from tensorrt_double import World, install

from clusterq_deploy import Pipeline
from clusterq_deploy.models import LoadedModel, load_model


def pytest_configure() -> None:
    """Give each worker of pytest-xdist its share of the cores, and so the processes that its tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the draws that have no generator of their own, so that a test alone draws the same."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a finished run of `small_config()`, made once for all modules and workers, to be read only."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own in it
    out = folder / "finished_run"
    with FileLock(folder / "finished_run.lock"):
        if not (out / "report.html").is_file():  # what a run writes last
            Pipeline(small_config(), out, command=["clusterq", "run"]).run()
    files = read_files(out)
    yield out
    assert read_files(out) == files, "a test changed the run that all share; use run_copy"


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that the test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Return the settings of the finished run as a file."""
    return write_settings(tmp_path / "small.toml")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Install the doubles of TensorRT and of torch's CUDA."""
    return install(monkeypatch)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Return a file that the double of TensorRT accepts as a graph."""
    path = tmp_path / "model.trt.onnx"
    path.write_bytes(b"a graph")
    return path


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Return a model of RGB images with three classes."""
    file = tmp_path_factory.mktemp("colour") / "net.py"
    file.write_text(
        "from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Flatten, Sequential\n"
        "def make():\n"
        "    return Sequential(Conv2d(3, 3, 1), BatchNorm2d(3), AdaptiveAvgPool2d(1), Flatten())\n"
    )
    size, mean, std = (3, 16, 16), (0.0,) * 3, (1.0,) * 3
    return load_model(f"{file}:make", input_size=size, mean=mean, std=std, device=torch.device("cpu"))
