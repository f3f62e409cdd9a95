"""What aligning costs: one synthesis step against a plain forward and backward of the teacher and the generator.

Both in one process, in turn, on the same batch size, at the same precision; medians and their ratio.

    python benchmarks/synthesis_step.py resnet18 --weights none --steps 15 --out benchmarks/results/synthesis_step.json
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

from calib.support.amp import has_fast_bfloat16, mixed_precision
from calib.training import GeneratorConfig, GeneratorTrainer
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.models import load_model
from clusterq_deploy.run.run import resolve_device


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
    on = resolve_device(device)
    rows = [measure(name, weights, batch_size, steps, on) for name in models]
    for row in rows:
        print(f"{row['model']}: plain {row['plain_ms']:.1f} ms, step {row['step_ms']:.1f} ms, ratio {row['ratio']:.2f}")
    if out:
        environment = collect_environment(on).model_dump(mode="json")
        out.write_text(json.dumps({"rows": rows, "environment": environment}, indent=2) + "\n")


def measure(name: str, weights: str | None, batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Medians in milliseconds of the two, taken in turn, and their ratio."""
    model = load_model(name, weights=weights, device=device)
    trainer = GeneratorTrainer(
        model.module,
        classes=model.classes,
        size=model.input.size,
        mean=model.input.mean,
        std=model.input.std,
        config=GeneratorConfig(batch_size=batch_size),
        device=device,
        rng=torch.Generator(device).manual_seed(0),
    )
    trainer.initialize_centroids()

    def plain() -> None:
        labels = trainer.batch_labels()
        with mixed_precision(device):
            logits = model.module(trainer.generator(trainer.latents(len(labels)), labels))
        trainer.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    def timed(work: Any) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    times: dict[str, list[float]] = {"plain": [], "step": []}
    for index in range(steps + 3):
        pair = {"plain": timed(plain), "step": timed(lambda: trainer.step(warmup=False))}
        if index >= 3:  # the first ones warm up
            for kind, value in pair.items():
                times[kind].append(value)
    plain_ms, step_ms = (statistics.median(times[kind]) for kind in ("plain", "step"))
    ratios = [b / a for a, b in zip(times["plain"], times["step"], strict=True)]
    return {
        "model": name.rpartition(":")[2],
        "batch_size": batch_size,
        "input_size": model.input.size,
        "precision": "bfloat16" if has_fast_bfloat16(device) else "float32",
        "threads": torch.get_num_threads(),
        "plain_ms": plain_ms,
        "step_ms": step_ms,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
