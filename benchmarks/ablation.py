"""The effect of each part of ClusterQ: the recipe `paper` without one part at a time, over seeds.

The recipe's schedule is the published one, 400 epochs, each of 1,024 images in batches of 64. Five rows by three seeds
take most of a day on a CPU: `--scale` shortens them, with the warm-up in proportion.

    python benchmarks/ablation.py --models-file models.py --data-dir data --scale 0.125
    python benchmarks/accuracy.py --table
"""

from typing import Any

import click
import tables
from cells import ROOT, Cell, Model, merged
from harness import Options, add_options, carry_out, parse_seeds
from store import Results

RESULTS = ROOT / "benchmarks/results/ablation.json"
SEEDS = (0, 1, 2)
SCALE = 0.125
STEPS, WARMUP_STEPS = 400 * 16, 50 * 16  # of the recipe, at scale 1

MODELS = (
    Model("resnet20_cifar10", "ResNet-20, CIFAR-10", "cifar10_test.npz"),
    Model("digits", "digits, the bundled model"),
)
ROWS: dict[str, dict[str, float]] = {
    "ClusterQ, whole": {},
    "without EMA (5)": {"ema_beta": 0.0},
    "without intra-class variance (6)": {"icv_weight": 0.0},
    "without both": {"ema_beta": 0.0, "icv_weight": 0.0},
    "without class alignment (4), (6)": {"sfda_weight": 0.0, "icv_weight": 0.0},
}


def cells(
    model: str = MODELS[0].name,
    bits: str = "w4a4",
    seeds: tuple[int, ...] = SEEDS,
    scale: float = SCALE,
    effort: str | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Cell]:
    """Return every row for every seed, with `settings`; all layers have the same bits, as in the paper."""
    steps = max(2, round(scale * STEPS))
    schedule = {"steps": steps, "warmup_steps": min(steps - 1, max(1, round(scale * WARMUP_STEPS)))}
    return [
        Cell(
            model,
            bits,
            first_last=True,
            recipe="paper",
            effort=effort,
            seed=seed,
            label=label,
            settings=merged({"synthesis": {"generator": {**schedule, **changed}}}, settings or {}),
        )
        for label, changed in ROWS.items()
        for seed in seeds
    ]


def section(results: Results) -> str:
    """Return the part of docs/accuracy.md."""
    return tables.ablation_section(cells(), results.cells, results.failed)


@click.command()
@click.option("--model", default=MODELS[0].name, show_default=True, type=click.Choice([m.name for m in MODELS]))
@click.option("--bits", default="w4a4", show_default=True, help="Bits of all layers, the first and last too.")
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, type=parse_seeds, metavar="n,n,...")
@click.option("--scale", default=SCALE, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="Share of the published schedule.")  # fmt: skip
@add_options(RESULTS)
def main(model: str, bits: str, seeds: tuple[int, ...], scale: float, options: Options) -> None:
    """Measure the cells without results, and print the table; exit code 1 if a cell failed."""
    failures = carry_out(MODELS, cells(model, bits, seeds, scale, options.effort, options.settings), options)
    print(section(options.results))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
