"""Which classifiers can be quantized and exported, and whether every graph computes what torch computes.

python benchmarks/coverage.py                   # all, resumable; results in benchmarks/results/coverage.json
python benchmarks/coverage.py --model vgg16_bn  # one
python benchmarks/latency.py                    # how fast they are, on a machine that does nothing else
python benchmarks/coverage.py --table           # docs/coverage.md from the results of both
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import latency
import onnx
import torch
from harness import code_digest
from random_nets import CALIBRATED, MODELS, SEED, calibrated, settled
from store import write
from tables import table
from torch import Tensor

from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.lowering import GraphFormat, agreement, check_tensorrt, compare_integers, export_graph, lower
from clusterq_deploy.quantization import BitWidths, Student
from clusterq_deploy.quantization.sensitivity import answers, compare
from clusterq_deploy.runtimes.runners import OnnxRunner

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
GRAPH_FORMATS: tuple[GraphFormat, ...] = ("onnxruntime", "tensorrt", "int4")
_COMPARED, _BATCH = 16, 16
_INTRODUCTION = """# Coverage

torchvision's classifiers at W4A8, first and last layer at 8 bits, exported in the three graph formats and compared with
torch by `python benchmarks/coverage.py`. Integers are compared at every quantizer, on 16 images, each from the graph's
own integers in front of it: ties are on a rounding boundary, others would be an error. Sizes are relative to the FP32
file: ONNX Runtime's graph, TensorRT's, INT4. Every TensorRT graph keeps the rules of `clusterq check`. How fast
ONNX Runtime's graphs are is below, for the models that were timed.

The weights are random, so this shows that graphs are right, and nothing about accuracy: at four bits most of these nets
no longer answer as they did, and a single tie can change an answer.
"""
_HEAD = ("model", "quantized layers", "left in float", "integers", "ties / others", "size")


def graph_record(graph: onnx.ModelProto, student: Student, images: Tensor, graph_format: GraphFormat) -> dict[str, Any]:
    """Measure one graph."""
    onnx.checker.check_model(graph, full_check=True)
    batch = images.numpy()
    with OnnxRunner(graph.SerializeToString(), optimized=graph_format != "tensorrt") as runner:
        same = agreement(runner, student, batch, graph_format=graph_format, batch_size=_BATCH)
    sites = compare_integers(graph, student, batch[:_COMPARED], graph_format=graph_format)
    return {
        "agreement": same,
        "integers": sum(site.values for site in sites),
        "ties": sum(site.ties for site in sites),
        "parts_at": [asdict(site) for site in sites if site.differing],
        "rules": [asdict(violation) for violation in check_tensorrt(graph)] if graph_format == "tensorrt" else [],
        "size_bytes": graph.ByteSize(),
    }


def measure(name: str, bits: BitWidths, images: int) -> dict[str, Any]:
    """Quantize, export and compare one model."""
    start = time.perf_counter()
    model, seen = settled(name, images)
    size, student = model.input.size, calibrated(model, bits, seen)
    marked = export_graph(student, size)
    logits, target = (answers(net, seen[:CALIBRATED], _BATCH) for net in (student, model.module))
    return {
        "input_size": list(size),
        "quantized_layers": len(student.placement.weights),
        "skipped_layers": student.placement.skipped,
        "teacher_agreement": compare(logits, target).agreement,
        "images": images,
        "fp32_size_bytes": export_graph(model.module, size).ByteSize(),
        "graphs": {s: graph_record(lower(marked, student, s), student, seen, s) for s in GRAPH_FORMATS},
        "seconds": time.perf_counter() - start,
    }


def _reasons(skipped: dict[str, str]) -> list[str]:
    """Return the reasons why layers stay in float, each with its first layer and the number of others."""
    layers: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        layers.setdefault(reason, []).append(layer)
    return [
        f"`{first}`{f' and {len(more)} more' if more else ''}: {reason}" for reason, (first, *more) in layers.items()
    ]


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/coverage.md."""
    rows: list[list[object]] = []
    machines: dict[str, list[str]] = {}
    for name, record in results["models"].items():
        machine = record["environment"]
        versions = f"{machine['cpu']}, torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}"
        machines.setdefault(versions, []).append(name)
        if "error" in record:
            rows.append([name, record["error"], *[""] * 4])
            continue
        graphs = [record["graphs"][graph_format] for graph_format in GRAPH_FORMATS]
        integers, ties = (sum(graph[key] for graph in graphs) for key in ("integers", "ties"))
        others = sum(site["differing"] for graph in graphs for site in graph["parts_at"])
        sizes = " / ".join(f"{graph['size_bytes'] / record['fp32_size_bytes']:.3f}" for graph in graphs)
        skipped = "; ".join(_reasons(record["skipped_layers"])) or "none"
        rows.append([name, record["quantized_layers"], skipped, f"{integers:,}", f"{ties:,} / {others}", sizes])
    (usual, _), *exceptions = sorted(machines.items(), key=lambda machine: -len(machine[1]))
    versions = "; ".join([usual, *(f"{', '.join(names)}: {machine}" for machine, names in exceptions)])
    return "\n".join([_INTRODUCTION, table(_HEAD, rows), f"{versions}; seed {SEED}.\n", latency.section()])


@click.command()
@click.option("--model", "models", multiple=True, default=MODELS, help="Only these; all by default.")
@click.option("--bits", default="w4a8", show_default=True)
@click.option("--images", default=256, show_default=True, help="On which answers are compared.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--table", "write_table", is_flag=True, help="Write docs/coverage.md and measure nothing.")
def main(models: tuple[str, ...], bits: str, images: int, out: Path, write_table: bool) -> None:
    """Measure the models without results of these sources, and save their records."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    if write_table:
        write(PAGE, page(results))
        return
    code = code_digest()
    for name in models:
        record = results["models"].get(name, {})
        if (record.get("code"), record.get("bits"), record.get("images")) == (code, bits, images):
            print(f"already measured: {name}")
            continue
        try:
            record = measure(name, BitWidths.parse(bits), images)
        except ClusterQError as error:
            record = {"error": str(error), "images": images}
        environment = collect_environment(torch.device("cpu")).model_dump(mode="json")
        results["models"][name] = {**record, "bits": bits, "code": code, "environment": environment}
        write(out, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {record.get('error') or {s: g['agreement'] for s, g in record['graphs'].items()}}", flush=True)


if __name__ == "__main__":
    main()
