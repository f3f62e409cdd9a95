"""The effect of the intra-class variance term (6) on the within-class diversity of the generator's images.

Trains a generator without the term, with the published noise (`class`) and with noise of each sample's latent
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
SAMPLES_PER_CLASS = 24


@click.command()
@click.argument("name", metavar="MODEL")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=160, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(name: str, seeds: int, steps: int, device_name: str, out: Path | None) -> None:
    """Measure MODEL, print a line for each setting, and write the results."""
    device = resolve_device(device_name)
    model = load_model(name, device=device)
    rows = []
    for setting, options in SETTINGS.items():
        config = GeneratorConfig(steps=steps, warmup_steps=steps * 3 // 8, **options)
        values = [measure(model, make_trainer(model, config, device, seed)) for seed in range(seeds)]
        rows.append({"setting": setting, "diversity": values, "mean": statistics.mean(values)})
        print(f"{setting}: {rows[-1]['mean']:.3f}  ({', '.join(f'{v:.3f}' for v in values)})")
    if out:
        write_results(out, device, {"model": model.slug, "steps": steps, "rows": rows})


def make_trainer(model: LoadedModel, config: GeneratorConfig, device: torch.device, seed: int) -> GeneratorTrainer:
    """Make a trainer of a generator for a model."""
    return GeneratorTrainer(
        model.module,
        classes=model.classes,
        size=model.input.size,
        mean=model.input.mean,
        std=model.input.std,
        config=config,
        device=device,
        rng=torch.Generator(device).manual_seed(seed),
    )


def write_results(path: Path, device: torch.device, results: dict[str, Any]) -> None:
    """Write results as JSON, with the machine and the versions."""
    environment = collect_environment(device).model_dump(mode="json")
    path.write_text(json.dumps({**results, "environment": environment}, indent=2) + "\n")


def measure(model: LoadedModel, trainer: GeneratorTrainer) -> float:
    """Train a generator, and return the diversity of its images, in [0, 1]."""
    trainer.train()
    labels = torch.arange(model.classes, device=trainer.device).repeat_interleave(SAMPLES_PER_CLASS)
    with torch.no_grad(), tap_batchnorm(model.module) as tap:
        model.module(trainer.sample(labels))
    return within_class_diversity(tap.moments[-1].mean, labels)


if __name__ == "__main__":
    main()
