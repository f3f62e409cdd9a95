"""Measuring a single ONNX file that this project exported, away from its run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.progress import SILENT, Progress
from clusterq_deploy.data import load_evaluation
from clusterq_deploy.errors import DataError, ExportError
from clusterq_deploy.measure import BenchmarkConfig, benchmark, predictions, score
from clusterq_deploy.models import InputSpec
from clusterq_deploy.runners import OnnxRunner

_BATCH = 50


@dataclass(frozen=True)
class Graph:
    """What an exported file says of itself, as evaluation data wants to know it."""

    name: str
    source: str
    input: InputSpec
    classes: int


def describe(runner: OnnxRunner, path: Path) -> Graph:
    """Read the model, the input and the number of classes from a graph's metadata.

    Raises:
        ExportError: the file is of another exporter.
    """
    metadata = runner.metadata()
    try:
        return Graph(
            metadata["clusterq.model"],
            metadata["clusterq.source"],
            InputSpec.model_validate_json(metadata["clusterq.input"]),
            runner.classes,
        )
    except (KeyError, ValueError) as error:
        raise ExportError(f"{path} does not say how its input is made; only graphs of clusterq export do") from error


def evaluate_file(path: Path, data: Path | None, limit: int | None, progress: Progress = SILENT) -> dict[str, Any]:
    """Top-1 and top-5 (percent) of an ONNX file on evaluation data, as ONNX Runtime executes it.

    Raises:
        DataError: there is no data, or it does not fit.
        ExportError: the file cannot be run.
    """
    with OnnxRunner(path) as runner:
        graph = describe(runner, path)
        if data is None and graph.source != "bundled":
            raise DataError(f"{path} was exported from {graph.name}; give the images to evaluate it on with --data")
        images = load_evaluation(data, graph, limit)
        own = predictions(runner, images, _BATCH, progress)
        found = score(runner.runtime, own, own, images, str(path))
    return found.model_dump(mode="json", exclude={"agreement"}) | {
        "images": len(images.kept),
        "unreadable": len(images.unreadable),
    }


def benchmark_file(path: Path, config: BenchmarkConfig, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Latency records of an ONNX file in ONNX Runtime.

    Raises:
        ExportError: the file cannot be run.
    """
    with OnnxRunner(path, threads=config.cpu_threads) as runner:
        size = describe(runner, path).input.size
        records = benchmark({str(path): runner}, size, config, progress)[str(path)]
    more = {"threads": config.cpu_threads, "graph": str(path)}
    return [{**record.model_dump(mode="json", exclude_none=True), **more} for record in records]
