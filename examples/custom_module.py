"""A module of your own: trained, quantized without its data, and run as an INT8 graph in ONNX Runtime.

    python examples/custom_module.py --out runs/custom.onnx

It needs BatchNorm with running statistics, a forward that torch.fx can trace, and logits as its output. The command
line requires a factory, a function without arguments that returns the module in eval mode, and a `pretrained_cfg` on it
that says how its input is made (or --input-size, --mean and --std):

    clusterq run path/to/module.py:factory --weights weights.safetensors
"""

from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import clusterq_deploy

MEAN, STD = 0.305, 0.376  # of the pixels of scikit-learn's digits, in [0, 1]


class Net(nn.Module):
    """Images (N, 1, 8, 8) float32, normalized -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(widths)
            )
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 8, 8) float32, normalized, and their labels (1797,) int64."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return (images - MEAN) / STD, torch.from_numpy(data.target)


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Train a model, and return it in eval mode."""
    torch.manual_seed(0)
    model = Net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def quantize(model: nn.Module, graph: Path, **synthesis: object) -> Path:
    """Write the INT8 graph of a model, made without any of its training data."""
    spec = clusterq_deploy.InputSpec(size=(1, 8, 8), mean=(MEAN,), std=(STD,))
    images = clusterq_deploy.synthesize(model, spec, config=clusterq_deploy.SynthesisConfig.model_validate(synthesis))
    student = clusterq_deploy.quantize(model, images, "w8a8")
    graph.parent.mkdir(parents=True, exist_ok=True)
    return clusterq_deploy.export(student, graph, images)


def top1(graph: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy in percent, as ONNX Runtime executes the graph."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return 100 * float((logits.argmax(1) == labels).mean())


@click.command(help=__doc__.splitlines()[0])
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/custom.onnx"), show_default=True)
def main(epochs: int, out: Path) -> None:
    images, labels = digits()
    held_out = torch.arange(len(images)) % 4 == 0
    model = train(images[~held_out], labels[~held_out], epochs)
    graph = quantize(model, out, images=512)
    with torch.no_grad():
        float_top1 = 100 * (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    int8_top1 = top1(graph, images[held_out].numpy(), labels[held_out].numpy())
    print(f"held-out top-1: {float_top1:.2f} % in float, {int8_top1:.2f} % in INT8: {graph}")


if __name__ == "__main__":
    main()
