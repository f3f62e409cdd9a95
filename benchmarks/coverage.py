"""Which classifiers can be quantized and exported, and whether every graph computes what torch computes.

python benchmarks/coverage.py                   # all, resumable; results in benchmarks/results/coverage.json
python benchmarks/coverage.py --model vgg16_bn  # one
python benchmarks/coverage.py --timm            # a model of each family of timm's, which has to be installed
python benchmarks/latency.py                    # how fast they are, on a machine that does nothing else
python benchmarks/coverage.py --table           # docs/coverage.md from the results of both
"""

import copy
import importlib.util
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import latency
import onnx
import torch
from harness import code_digest
from random_nets import CALIBRATED, FAMILIES, MODELS, SEED, calibrated, settled
from store import write
from tables import table
from torch import Tensor

from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.lowering import GraphFormat, agreement, check_tensorrt, compare_integers, export_graph, lower
from clusterq_deploy.models.capture import relative_difference
from clusterq_deploy.quantization import BitWidths, Student
from clusterq_deploy.quantization.graph.fold import folded_teacher
from clusterq_deploy.quantization.sensitivity import answers, compare
from clusterq_deploy.runtimes.runners import OnnxRunner

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
GRAPH_FORMATS: tuple[GraphFormat, ...] = ("onnxruntime", "tensorrt", "int4")
_IMAGES, _COMPARED, _BATCH = 256, 16, 16
_NUMBERED = re.compile(r"[\w.@]*\d[\w.@]*")  # the name of a layer or an operation in a reason
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
_TIMM = "1.0.31"
_FAMILY_IMAGES = 4
_FAMILY_INTRODUCTION = f"""## Families of timm

One model of each family of architectures with BatchNorm in timm {_TIMM}, in the same way, by
`python benchmarks/coverage.py --timm`, on {_FAMILY_IMAGES} images of 96 x 96 pixels, or of a size that a model
needs. *Captured* is the difference of the captured graph from timm's own module, *folded* that of the graph without
BatchNorm from it, in float64: the largest one of the logits, over their standard deviation.
"""
_FAMILY_HEAD = ("model", "captured / folded", "quantized layers", "left in float", "integers", "ties / others")


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
    logits, target, own = (answers(net, seen[:CALIBRATED], _BATCH) for net in (student, model.module, model.original))
    exact = copy.deepcopy(model.module).double()
    with torch.no_grad():
        in_double = [net(seen[:_FAMILY_IMAGES].double()) for net in (folded_teacher(exact), exact)]
    return {
        "input_size": list(size),
        "captured_difference": relative_difference(target, own),
        "folded_difference": relative_difference(*in_double),
        "quantized_layers": len(student.placement.weights),
        "skipped_layers": student.placement.skipped,
        "teacher_agreement": compare(logits, target).agreement,
        "images": images,
        "fp32_size_bytes": None if name in FAMILIES else export_graph(model.module, size).ByteSize(),
        "graphs": {s: graph_record(lower(marked, student, s), student, seen, s) for s in GRAPH_FORMATS},
        "seconds": time.perf_counter() - start,
    }


def _reasons(skipped: dict[str, str]) -> str:
    """Return the reasons why layers stay in float, each with its first layer and the number of others."""
    layers: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        layers.setdefault(_NUMBERED.sub("", reason), []).append(layer)
    reasons = [
        f"`{first}`{f' and {len(more)} more' if more else ''}: {skipped[first]}" for first, *more in layers.values()
    ]
    return "; ".join(reasons) or "none"


def _compared(record: dict[str, Any]) -> list[str]:
    """Return the numbers of integers, of ties and of others in a model's graphs."""
    graphs = [record["graphs"][graph_format] for graph_format in GRAPH_FORMATS]
    integers, ties = (sum(graph[key] for graph in graphs) for key in ("integers", "ties"))
    others = sum(site["differing"] for graph in graphs for site in graph["parts_at"])
    return [f"{integers:,}", f"{ties:,} / {others}"]


def _row(name: str, record: dict[str, Any]) -> list[object]:
    """Return the row of a model of torchvision."""
    if "error" in record:
        return [name, record["error"], *[""] * 4]
    sizes = " / ".join(f"{record['graphs'][f]['size_bytes'] / record['fp32_size_bytes']:.3f}" for f in GRAPH_FORMATS)
    return [name, record["quantized_layers"], _reasons(record["skipped_layers"]), *_compared(record), sizes]


def _family_row(name: str, record: dict[str, Any]) -> list[object]:
    """Return the row of a model of timm."""
    if "error" in record:
        return [name, record["error"], *[""] * 4]
    differences = f"{record['captured_difference']:.0e} / {record['folded_difference']:.0e}"
    return [name, differences, record["quantized_layers"], _reasons(record["skipped_layers"]), *_compared(record)]


def _versions(records: dict[str, dict[str, Any]]) -> str:
    """Return on what machines the models were measured."""
    machines: dict[str, list[str]] = {}
    for name, record in records.items():
        machine = record["environment"]
        versions = f"{machine['cpu']}, torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}"
        machines.setdefault(versions, []).append(name)
    (usual, _), *exceptions = sorted(machines.items(), key=lambda machine: -len(machine[1]))
    return "; ".join([usual, *(f"{', '.join(names)}: {machine}" for machine, names in exceptions)])


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/coverage.md."""
    families = {name.removeprefix("timm:"): r for name, r in results["models"].items() if name.startswith("timm:")}
    models = {name: record for name, record in results["models"].items() if not name.startswith("timm:")}
    parts = [_INTRODUCTION, table(_HEAD, [_row(*item) for item in models.items()])]
    parts.append(f"{_versions(models)}; seed {SEED}.\n")
    if families:
        parts += [_FAMILY_INTRODUCTION, table(_FAMILY_HEAD, [_family_row(*item) for item in sorted(families.items())])]
        parts.append(f"{_versions(families)}; seed {SEED}.\n")
    return "\n".join([*parts, latency.section()])


def _require_timm() -> None:
    if importlib.util.find_spec("timm") is None:
        raise click.ClickException(
            f"timm is not installed, and this project does not need it: pip install timm=={_TIMM}"
        )


@click.command()
@click.option("--model", "models", multiple=True, help="Only these; all of torchvision by default.")
@click.option("--timm", is_flag=True, help="A model of each family of timm.")
@click.option("--bits", default="w4a8", show_default=True)
@click.option("--images", type=int, help=f"On which answers are compared; 256, or {_FAMILY_IMAGES} of timm's models.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--table", "write_table", is_flag=True, help="Write docs/coverage.md and measure nothing.")
def main(models: tuple[str, ...], timm: bool, bits: str, images: int | None, out: Path, write_table: bool) -> None:
    """Measure the models without results of these sources, and save their records."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    if write_table:
        write(PAGE, page(results))
        return
    models = models or (FAMILIES if timm else MODELS)
    if any(name.startswith("timm:") for name in models):
        _require_timm()
    code = code_digest()
    for name in models:
        count = images or (_FAMILY_IMAGES if name in FAMILIES else _IMAGES)
        record = results["models"].get(name, {})
        if (record.get("code"), record.get("bits"), record.get("images")) == (code, bits, count):
            print(f"already measured: {name}")
            continue
        try:
            record = measure(name, BitWidths.parse(bits), count)
        except ClusterQError as error:
            record = {"error": str(error), "images": count}
        environment = collect_environment(torch.device("cpu")).model_dump(mode="json")
        results["models"][name] = {**record, "bits": bits, "code": code, "environment": environment}
        write(out, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {record.get('error') or {s: g['agreement'] for s, g in record['graphs'].items()}}", flush=True)


if __name__ == "__main__":
    main()
