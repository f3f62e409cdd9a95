"""Train the bundled `digits` model and write its weights and held-out images.

    python examples/train_digits.py --out clusterq_deploy/assets

The held-out images are fixed by their own seed, are never trained on, and select nothing: training runs for a fixed
number of epochs and keeps the last one. It takes a few minutes on one core.
"""

import math
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from clusterq_deploy.models.digits import ASSETS, HELD_OUT, PRETRAINED_CFG, WEIGHTS, DigitsNet
from clusterq_deploy.models.inputs import InputSpec, input_spec

HELD_OUT_IMAGES = 450
SPLIT_SEED = 0
BATCH = 64


def load_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, 8, 8, 1) uint8 and labels (N,) int64 to train on, then the held-out ones."""
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    images, held_out, labels, held_out_labels = train_test_split(
        images, labels, test_size=HELD_OUT_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    return images, labels, held_out, held_out_labels


def preprocess(images: np.ndarray, spec: InputSpec) -> Tensor:
    """Return images (N, 8, 8, 1) uint8 as (N, 1, 32, 32) float32, normalized, exactly as evaluation does it."""
    return torch.from_numpy(np.stack([spec.preprocess(Image.fromarray(image[..., 0])) for image in images]))


def augment(images: Tensor, background: float, generator: torch.Generator) -> Tensor:
    """Turn (at most 12 degrees), scale (12%) and shift (2 of 32 pixels) images (N, 1, 32, 32)."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.12)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = uniform(2 * 2 / 32), uniform(2 * 2 / 32)  # the grid is 2 wide
    affine = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int, background: float) -> DigitsNet:
    """Train from scratch with SGD and one learning-rate cycle. Return the model of the last epoch, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the initial weights
    net = DigitsNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        losses = []
        for batch in order.split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(net(augment(images[batch], background, generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1:3d} of {epochs}: loss {np.mean(losses):.4f}", flush=True)
    return net.eval()


@torch.no_grad()
def top1(net: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (net(images).argmax(1) == labels).float().mean().item()


def as_stored(value: Tensor) -> Tensor:
    """Return a weight or statistic as the file has it: in half precision."""
    return value.half() if value.is_floating_point() else value


@click.command(help=__doc__.splitlines()[0])
@click.option("--epochs", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--seed", default=0, show_default=True, help="For initial weights, order and augmentation.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=ASSETS,
    help="Folder to write to; by default the package's own assets.",
)
def main(epochs: int, seed: int, out: Path) -> None:
    spec = input_spec("digits", PRETRAINED_CFG)
    images, labels, held_out, held_out_labels = load_split()
    background = -spec.mean[0] / spec.std[0]  # a black pixel, normalized
    net = train(preprocess(images, spec), torch.from_numpy(labels), epochs=epochs, seed=seed, background=background)
    out.mkdir(parents=True, exist_ok=True)
    net.load_state_dict({name: as_stored(value) for name, value in net.state_dict().items()})  # what is scored below
    save_file({name: as_stored(value) for name, value in net.state_dict().items()}, out / WEIGHTS.name)
    np.savez_compressed(out / HELD_OUT.name, images=held_out, labels=held_out_labels)
    accuracy = top1(net, preprocess(held_out, spec), torch.from_numpy(held_out_labels))
    print(f"held-out top-1: {accuracy:.2f}% of {len(held_out)} images")


if __name__ == "__main__":
    main()
