"""The cost of alignment: a synthesis step, relative to a plain pass of the generator and the teacher and back.

Both are timed in turn, with the same batch size and precision.

    python benchmarks/synthesis_step.py resnet18 --weights none --steps 15 --out benchmarks/results/synthesis_step.json
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from diversity import make_trainer, write_results

from calib.support.amp import has_fast_bfloat16, mixed_precision
from calib.training import GeneratorConfig
from clusterq_deploy.models import load_model
from clusterq_deploy.run.run import resolve_device

_WARMUP = 3


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--weights", help="As for clusterq run.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=15, show_default=True, help="Timed steps of each kind.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    models: tuple[str, ...], weights: str | None, batch_size: int, steps: int, device: str, out: Path | None
) -> None:
    """Time MODELS, print a line each, and write the results."""
    rows = [measure(name, weights, batch_size, steps, resolve_device(device)) for name in models]
    for row in rows:
        print("{model}: plain {plain_ms:.1f} ms, step {step_ms:.1f} ms, ratio {ratio:.2f}".format_map(row))
    if out:
        write_results(out, resolve_device(device), {"rows": rows})


def measure(name: str, weights: str | None, batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Return medians of a plain pass and of a synthesis step of one model, and the median and range of their ratio."""
    model = load_model(name, weights=weights, device=device)
    trainer = make_trainer(model, GeneratorConfig(batch_size=batch_size), device, seed=0)
    trainer.initialize_centroids()

    def plain() -> None:
        labels = trainer.batch_labels()
        with mixed_precision(device):
            logits = model.module(trainer.generator(trainer.latents(len(labels)), labels))
        trainer.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    def time_ms(work: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    times = [(time_ms(plain), time_ms(lambda: trainer.step(warmup=False))) for _ in range(steps + _WARMUP)][_WARMUP:]
    ratios = [step_ms / plain_ms for plain_ms, step_ms in times]
    plain_ms, step_ms = (statistics.median(kind) for kind in zip(*times, strict=True))
    return {
        "model": name.rpartition(":")[2],
        "batch_size": batch_size,
        "input_size": model.input.size,
        "precision": "bfloat16" if has_fast_bfloat16(device) else "float32",
        "threads": torch.get_num_threads(),
        "plain_ms": plain_ms,
        "step_ms": step_ms,
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
