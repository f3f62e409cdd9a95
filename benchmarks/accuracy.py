"""The table of accuracies, model x bits x recipe x seed, and docs/accuracy.md from it.

Cells with results are not measured again, so that the same command continues after an interruption.

    python benchmarks/accuracy.py --models-file models.py --data-dir data
    python benchmarks/accuracy.py --table
"""

from pathlib import Path
from typing import Any

import ablation
import click
import tables
from cells import ROOT, Cell, Model
from harness import Options, add_options, carry_out, parse_seeds
from published import PUBLISHED
from store import Results, write

RESULTS = ROOT / "benchmarks/results/accuracy.json"
PAGE = ROOT / "docs/accuracy.md"

MODELS = (
    Model("digits", "digits, the bundled model"),
    Model("resnet20_cifar10", "ResNet-20, CIFAR-10", "cifar10_test.npz"),
    Model("resnetsmall20_cifar100", "ResNet-20 (no ReLU after the add inside a stage), CIFAR-100", "cifar100_test.npz"),
    Model("mobilenet_v1_025", "MobileNetV1 0.25, ImageNet", "imagenet_val"),
    Model("resnet18_pqf", "ResNet-18 (product-quantized weights), ImageNet", "imagenet_val"),
)
# model -> (bits with first and last layers at 8 bits, bits of all layers)
MATRIX: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "digits": (("w8a8", "w4a8", "w4a4"), ()),
    "resnet20_cifar10": (("w8a8", "w4a8", "w4a4"), ("w5a5", "w4a4", "w3a3")),
    "resnetsmall20_cifar100": (("w8a8", "w4a8", "w4a4"), ("w5a5", "w4a4")),
    "mobilenet_v1_025": (("w8a8", "w4a8", "w4a4"), ()),
    "resnet18_pqf": (("w8a8", "w4a8", "w4a4"), ()),
}
SEEDS = {("resnet20_cifar10", "w4a4"): (0, 1, 2), ("resnetsmall20_cifar100", "w4a4"): (0, 1, 2)}
"""Seeds of a model's bits; all others by seed 0."""

_INTRO = """\
# Accuracy

Made by `python benchmarks/accuracy.py` from [`benchmarks/results/`](../benchmarks/results): do not edit.

How to read the tables:

- **top-1** is that of `model.ort.onnx` as ONNX Runtime executes it, **TensorRT's graph** that of `model.trt.onnx`,
  executed in ONNX Runtime without optimization. **Drop** is FP32 less that, in points; **agreement** the share of
  images on which both predict the same.
- **±** is the standard deviation over seeds, if there is more than one. It says nothing about the choice of test
  images, as the **standard error** of one seed's drop on this many images does, in points. That is an upper bound,
  the square root of (share of disagreement - drop²) / images, and more seeds do not lessen it.
- **time** is synthesis and only that variant: scales, fine-tuning, export. **Commands** is the wall time of the two
  processes that did it, with loading, evaluation and a short latency measurement. **Peak memory** is the larger of
  the two processes' resident memory. One synthesis serves all variants of a seed; each row counts it in full.
- **First and last 8 bits** is the default: the weights of both layers, what they read, and what the first one writes,
  as in BRECQ and Genie; **all layers** is `--first-last`, the setting of most papers.

What is comparable with the published numbers: never the top-1 itself, because the FP32 checkpoints differ. A drop is,
if the table says that the setting is the same, with four differences in mind. The images: 5,000 and 2,500 of the 10,000
test images of CIFAR-10 and CIFAR-100; 650 of the 50,000 of ImageNet, an easy subset on which models score 8 to 15
points above their published top-1. The grid: the papers' is asymmetric, with a zero-point in weights and activations,
in fake quantization; here zero-points are 0 and weights symmetric per channel, which is what integer kernels run.
Additions: what they read has 8 bits here, and in most of the papers the width of the layers. The schedule: the papers
train for far longer, on GPUs.

"""
_ABLATION = """\
## Ablation of the paper's method

By `python benchmarks/ablation.py`: the recipe `paper`, images straight from the generator, one part of the method left
out at a time. The recipe's schedule is 6,400 steps, 800 of them warm-up; the column says how many were made here.
Quantization and fine-tuning are this project's own, not the paper's, and the same in every row.

"""


def planned(
    names: tuple[str, ...] = (),
    bits: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    recipe: str = "default",
    effort: str | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Cell]:
    """Return the cells of the matrix, in the order of the tables; an empty argument is no restriction."""
    return [
        Cell(model, width, first_last, recipe, effort, seed, settings=settings or {})
        for model, kinds in MATRIX.items()
        if not names or model in names
        for first_last, widths in zip((False, True), kinds, strict=True)
        for width in widths
        if not bits or width in [text.lower() for text in bits]
        for seed in seeds or SEEDS.get((model, width), (0,))
    ]


def page(results: Results, ablated: Results) -> str:
    """Return the text of docs/accuracy.md."""
    parts = [tables.model_section(model, planned(), results.cells, results.failed, PUBLISHED) for model in MODELS]
    return _INTRO + "\n".join([*parts, _ABLATION + ablation.section(ablated)])


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(list(MATRIX)), help="Only these.  [default: all]")
@click.option("--bits", multiple=True, metavar="wXaY", help="Only these.  [default: all]")
@click.option("--seeds", type=parse_seeds, metavar="n,n,...", help="For every cell, in place of the matrix's.")
@click.option("--recipe", type=click.Choice(["default", "paper"]), default="default", show_default=True)
@click.option("--table", is_flag=True, help="Measure nothing: write the page from the results.")
@click.option("--page", "page_file", type=click.Path(path_type=Path), default=PAGE, help="The page to write.")
@add_options(RESULTS)
def main(
    names: tuple[str, ...],
    bits: tuple[str, ...],
    seeds: tuple[int, ...] | None,
    recipe: str,
    table: bool,
    page_file: Path,
    options: Options,
) -> None:
    """Measure the cells without results, and write the page; exit code 1 if a cell failed."""
    failures = 0
    if not table:
        cells = planned(names, bits, seeds or (), recipe, options.effort, options.settings)
        if not cells:
            raise click.UsageError("no cell of the matrix has that model and those bits")
        failures = carry_out(MODELS, cells, options)
    write(page_file, page(options.results, Results(ablation.RESULTS)))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
