"""The speed of ONNX Runtime's graphs on this CPU, relative to FP32 and to graphs of its own `quantize_static`.

All graphs of a net are timed in one process, in turn, and only ratios of such times are compared.

    python benchmarks/latency.py                  # all, resumable; results in benchmarks/results/latency.json
    python benchmarks/latency.py --model resnet18
    python benchmarks/coverage.py --table         # docs/coverage.md
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from harness import code_digest
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from random_nets import CALIBRATED, MODELS, calibrated, settled
from store import write
from tables import table

from clusterq_deploy.environment import collect_environment
from clusterq_deploy.evaluation.latency import BenchmarkConfig, benchmark
from clusterq_deploy.lowering import export_graph, lower
from clusterq_deploy.lowering.torch_export import INPUT
from clusterq_deploy.lowering.verify import integer_layers
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.runtimes.runners import Array, OnnxRunner

RESULTS = Path(__file__).parent / "results" / "latency.json"
BITS = ("w8a8", "w4a4")
_THREADS = 2
_FP32, _THEIRS = "fp32", "quantize_static"
_RATIOS = {
    "W8A8, times as fast": (_FP32, "w8a8"),
    "quantize_static, times as fast": (_FP32, _THEIRS),
    "time of W8A8 / of quantize_static": ("w8a8", _THEIRS),
    "time of W4A4 / of W8A8": ("w4a4", "w8a8"),
}
_INTRODUCTION = f"""## Latency

By `python benchmarks/latency.py`: {_THREADS} threads, medians of calls that take turns, at batch 1 / 32.
*quantize_static* is ONNX Runtime's own quantizer (U8S8, per channel, MinMax). *Integer layers* are those that ONNX
Runtime's CPU provider runs on integers in W8A8's graph, of those that were quantized.
"""


class _Images:
    """A CalibrationDataReader of ONNX Runtime: returns one batch after another."""

    def __init__(self, images: Array) -> None:
        self._batches = iter(np.array_split(images, max(1, len(images) // 8)))

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def statically_quantized(graph: onnx.ModelProto, images: Array, *, for_tensorrt: bool = False) -> onnx.ModelProto:
    """Quantize a float graph by ONNX Runtime's own quantizer, with images (N, C, H, W) to calibrate on.

    `for_tensorrt` gives symmetric INT8 activations and float biases, which its parser requires.
    """
    kind = QuantType.QInt8 if for_tensorrt else QuantType.QUInt8
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if for_tensorrt else {}
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(graph, prepared)
        quantize_static(
            prepared,
            quantized,
            _Images(images),
            per_channel=True,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
        return onnx.load(quantized)


def measure(name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Time a model's graphs, in milliseconds, and count the layers that run on integers."""
    model, seen = settled(name, CALIBRATED)
    size = model.input.size
    graphs = {_FP32: export_graph(model.module, size)}
    graphs[_THEIRS] = statically_quantized(graphs[_FP32], seen.numpy())
    quantized = 0
    for bits in BITS:
        student = calibrated(model, BitWidths.parse(bits), seen)
        quantized = len(student.placement.weights)
        graphs[bits] = lower(export_graph(student, size), student, "onnxruntime")
    with ExitStack() as stack:
        runners = {
            kind: stack.enter_context(OnnxRunner(graph.SerializeToString(), threads=config.cpu_threads))
            for kind, graph in graphs.items()
        }
        records = benchmark(runners, size, config).latencies
    return {
        "threads": config.cpu_threads,
        "quantized_layers": quantized,
        "integer_layers": {kind: sum(integer_layers(graphs[kind])) for kind in (_THEIRS, *BITS)},
        "median_ms": {kind: {str(r.batch): r.median_ms for r in batches} for kind, batches in records.items()},
        "variation": {
            kind: {str(r.batch): r.coefficient_of_variation for r in batches} for kind, batches in records.items()
        },
    }


def section() -> str:
    """Return the part of docs/coverage.md."""
    if not RESULTS.is_file():
        return ""
    results = json.loads(RESULTS.read_text())
    rows = []
    for name, record in results["models"].items():
        median = record["median_ms"]
        ratios = [
            " / ".join(f"{median[above][batch] / median[below][batch]:.2f}" for batch in median[above])
            for above, below in _RATIOS.values()
        ]
        layers = f"{record['integer_layers']['w8a8']} of {record['quantized_layers']}"
        rows.append([name, " / ".join(f"{ms:.1f}" for ms in median[_FP32].values()), *ratios, layers])
    machine = results["environment"]
    versions = f"{machine['cpu']}, torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}.\n"
    return "\n".join([_INTRODUCTION, table(["model", "FP32, ms", *_RATIOS, "integer layers"], rows), versions])


@click.command()
@click.option("--model", "models", multiple=True, help="Which ones; all of coverage.py by default.")
@click.option("--seconds", default=3.0, show_default=True, help="At least, per graph and batch size.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(models: tuple[str, ...], seconds: float, out: Path) -> None:
    """Time the models without results of these sources, and save their records."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    config = BenchmarkConfig(threads=_THREADS, min_seconds=seconds)
    code = code_digest()
    for name in models or MODELS:
        if results["models"].get(name, {}).get("code") == code:
            print(f"already measured: {name}")
            continue
        results["models"][name] = {**measure(name, config), "code": code}
        results["environment"] = collect_environment(torch.device("cpu")).model_dump(mode="json")
        write(out, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results['models'][name]['median_ms']}", flush=True)


if __name__ == "__main__":
    main()
