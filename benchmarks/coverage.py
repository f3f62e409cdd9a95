"""Which classifiers can be quantized and exported, and whether every graph computes what torch computes.

Weights are random (no network is needed, and no licence): BatchNorm statistics are those of natural noise, and the last
layer is fitted to tell groups of it apart, so that answers are as far from each other as a trained model's.

    python benchmarks/coverage.py                   # all, resumable; results in benchmarks/results/coverage.json
    python benchmarks/coverage.py --model vgg16_bn  # one
    python benchmarks/coverage.py --table           # docs/coverage.md from the results
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from harness import code_digest
from store import write
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from calib.refine import natural_noise
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.export import Spelling, agreement, check_tensorrt, compare_integers, export_graph, spell
from clusterq_deploy.models import load_model
from clusterq_deploy.quantize import BitWidths, Student, calibrate, make_student
from clusterq_deploy.quantize.sensitivity import answers, compare
from clusterq_deploy.runners import OnnxRunner

MODELS = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_y_400mf", "regnet_x_400mf", "googlenet", "inception_v3",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "coverage.json"
TABLE = Path(__file__).parents[1] / "docs" / "coverage.md"
SPELLINGS: tuple[Spelling, ...] = ("onnxruntime", "tensorrt", "int4")
_GROUPS, _FITTED, _CALIBRATED, _COMPARED, _BATCH = 20, 256, 32, 16, 16
_RIDGE = 0.3
_SEED = 0
_INTRODUCTION = """# Coverage

torchvision's classifiers at W4A8, first and last layer at 8 bits, exported in the three spellings and held against
torch by `python benchmarks/coverage.py`. Integers are compared at every quantizer, on 16 images, each from the graph's
own integers in front of it: ties lie on a rounding boundary, others would be an error. Sizes are relative to the FP32
file: ONNX Runtime's graph, TensorRT's, INT4. Every TensorRT graph keeps the rules of `clusterq check`.

The weights are random, so this says that graphs are right, and nothing of accuracy: at four bits most of these nets no
longer answer as they did, and a single tie can change an answer. What is not in the table was not measured yet.

| model | quantized layers | left in float | integers | ties / others | size |
|---|---|---|---|---|---|"""


def groups_of_noise(count: int, size: tuple[int, int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in groups that share most of their noise, and the groups (N,)."""
    centres = natural_noise(torch.Size((_GROUPS, *size)), torch.Generator().manual_seed(_SEED))
    labels = torch.arange(count) % _GROUPS
    return 0.97 * centres[labels] + 0.24 * natural_noise(torch.Size((count, *size)), rng), labels


def settle(model: nn.Module, size: tuple[int, int, int], rng: torch.Generator) -> None:
    """Give a random model statistics and a last layer that a trained one might have, in place."""
    images, labels = groups_of_noise(_FITTED, size, rng)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=rng)
        nn.init.normal_(norm.bias, 0, 0.3, generator=rng)
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    answers(model, images[:64], _BATCH)
    model.eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    inputs: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    answers(model, images, _BATCH)
    handle.remove()
    features = torch.cat(inputs)
    mean = features.mean(0)
    centred = (features - mean).double()
    wanted = 10 * torch.eye(len(last.weight), dtype=torch.float64)[labels]
    gram = centred.T @ centred
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    with torch.no_grad():
        last.weight.copy_(torch.linalg.solve(gram, centred.T @ wanted).T)
        if last.bias is not None:
            last.bias.copy_(wanted.mean(0) - last.weight.double() @ mean.double())


def graph_record(graph: onnx.ModelProto, student: Student, images: Tensor, spelling: Spelling) -> dict[str, Any]:
    """What is measured of one graph."""
    onnx.checker.check_model(graph, full_check=True)
    batch = images.numpy()
    with OnnxRunner(graph.SerializeToString(), optimized=spelling != "tensorrt") as runner:
        same = agreement(runner, student, batch, spelling=spelling, batch_size=_BATCH)
    sites = compare_integers(graph, student, batch[:_COMPARED], spelling=spelling)
    return {
        "agreement": same,
        "integers": sum(site.values for site in sites),
        "ties": sum(site.ties for site in sites),
        "parts_at": [asdict(site) for site in sites if site.differing],
        "rules": [asdict(own) for own in check_tensorrt(graph)] if spelling == "tensorrt" else [],
        "size_bytes": graph.ByteSize(),
    }


def measure(name: str, bits: BitWidths, images: int) -> dict[str, Any]:
    """Quantize, export and compare one model."""
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    model = load_model(name, weights="none", device=torch.device("cpu"))
    size = model.input.size
    settle(model.module, size, rng)
    student = make_student(model.module, bits)
    seen, _ = groups_of_noise(images, size, rng)
    calibrate(student, seen[:_CALIBRATED], batch_size=_BATCH, rng=rng)
    marked = export_graph(student, size)
    own, teacher = (answers(net, seen[:_CALIBRATED], _BATCH) for net in (student, model.module))
    return {
        "input_size": list(size),
        "quantized_layers": len(student.placement.weights),
        "skipped_layers": student.placement.skipped,
        "teacher_agreement": compare(own, teacher).agreement,
        "images": images,
        "fp32_size_bytes": export_graph(model.module, size).ByteSize(),
        "graphs": {s: graph_record(spell(marked, student, s), student, seen, s) for s in SPELLINGS},
        "seconds": time.perf_counter() - start,
    }


def table(results: dict[str, Any]) -> str:
    """The document."""
    lines = []
    for name, own in results["models"].items():
        if "error" in own:
            lines.append(f"| {name} | {own['error']} | | | | |")
            continue
        graphs = own["graphs"]
        skipped = "; ".join(f"`{layer}`: {reason}" for layer, reason in own["skipped_layers"].items()) or "none"
        integers = sum(graphs[s]["integers"] for s in SPELLINGS)
        ties = sum(graphs[s]["ties"] for s in SPELLINGS)
        parted = sum(site["differing"] for s in SPELLINGS for site in graphs[s]["parts_at"])
        sizes = " / ".join(f"{graphs[s]['size_bytes'] / own['fp32_size_bytes']:.3f}" for s in SPELLINGS)
        cells = (name, own["quantized_layers"], skipped, f"{integers:,}", f"{ties:,} / {parted}", sizes)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    found = results["environment"]
    versions = f"{found['cpu']}, torch {found['torch']}, ONNX Runtime {found['onnxruntime']}, seed {_SEED}."
    return "\n".join([_INTRODUCTION, *lines, "", versions, ""])


@click.command()
@click.option("--model", "models", multiple=True, default=MODELS, help="Which ones; all by default.")
@click.option("--bits", default="w4a8", show_default=True)
@click.option("--images", default=256, show_default=True, help="On which answers are compared.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--table", "write_table", is_flag=True, help="Write docs/coverage.md and measure nothing.")
def main(models: tuple[str, ...], bits: str, images: int, out: Path, write_table: bool) -> None:
    """Measure the models that have not been measured with these sources, and keep the results."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    if write_table:
        write(TABLE, table(results))
        return
    code = code_digest()
    for name in models:
        known = results["models"].get(name, {})
        if known.get("code") == code and known.get("bits") == bits and known.get("images") == images:
            print(f"there already: {name}")
            continue
        try:
            found = measure(name, BitWidths.parse(bits), images)
        except ClusterQError as error:
            found = {"error": str(error), "images": images}
        results["models"][name] = {**found, "bits": bits, "code": code}
        results["environment"] = collect_environment(torch.device("cpu")).model_dump(mode="json")
        write(out, json.dumps(results, indent=1) + "\n")
        print(f"{name}: {found.get('error') or {s: g['agreement'] for s, g in found['graphs'].items()}}", flush=True)


if __name__ == "__main__":
    main()
