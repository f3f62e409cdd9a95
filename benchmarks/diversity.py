"""What the intra-class variance term (6) does: within-class diversity of the generator's images.

Trains a generator without the term, with its literal noise (`class`) and with noise that a sample can follow
(`latent`), and measures the within-class share of variance at the teacher's last BatchNorm input.

    python benchmarks/diversity.py digits --out benchmarks/results/diversity.json
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click
import torch

from calib.bn_statistics import tap_batchnorm, within_class_diversity
from calib.training import GeneratorConfig, GeneratorTrainer
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.run.run import resolve_device

SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"icv_weight": 0.0},
    "class": {"icv_noise": "class", "lambda_mean": 0.5, "lambda_std": 1.0},
    "latent": {},
}
SAMPLES_A_CLASS = 24


@click.command()
@click.argument("name", metavar="MODEL")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=160, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(name: str, seeds: int, steps: int, device: str, out: Path | None) -> None:
    """Measure MODEL, print a line for each setting, and write the results."""
    on = resolve_device(device)
    model = load_model(name, device=on)
    rows = []
    for setting, options in SETTINGS.items():
        values = [measure(model, steps, seed, on, options) for seed in range(seeds)]
        rows.append({"setting": setting, "diversity": values, "mean": statistics.mean(values)})
        print(f"{setting}: {rows[-1]['mean']:.3f}  ({', '.join(f'{v:.3f}' for v in values)})")
    if out:
        environment = collect_environment(on).model_dump(mode="json")
        result = {"model": model.slug, "steps": steps, "rows": rows, "environment": environment}
        out.write_text(json.dumps(result, indent=2) + "\n")


def measure(model: LoadedModel, steps: int, seed: int, device: torch.device, options: dict[str, Any]) -> float:
    """Diversity after training with these options, in [0, 1]."""
    config = GeneratorConfig(steps=steps, warmup_steps=steps * 3 // 8, **options)
    spec = model.input
    trainer = GeneratorTrainer(
        model.module,
        classes=model.classes,
        size=spec.size,
        mean=spec.mean,
        std=spec.std,
        config=config,
        device=device,
        rng=torch.Generator(device).manual_seed(seed),
    )
    trainer.train()
    labels = torch.arange(model.classes, device=device).repeat_interleave(SAMPLES_A_CLASS)
    with torch.no_grad(), tap_batchnorm(model.module) as tap:
        model.module(trainer.sample(labels))
    return within_class_diversity(tap.moments[-1].mean, labels)


if __name__ == "__main__":
    main()
