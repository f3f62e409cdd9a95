"""A module of your own: trained, quantized without its data, and run as an INT8 graph in ONNX Runtime.

    python examples/custom_module.py --out runs/custom

The same by the command line, once there are weights:

    clusterq run examples/custom_module.py:net --weights runs/custom-weights.safetensors --bits w8a8

What makes a module of your own fit: BatchNorm with running statistics, a forward that torch.fx can trace, logits as its
answer, and a `pretrained_cfg` that says how its input is made (or --input-size, --mean and --std).
"""

from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

MEAN, STD = 0.305, 0.376  # of the pixels of scikit-learn's digits, in [0, 1]


class Net(nn.Module):
    """Images (N, 1, 8, 8) float32, normalized -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (MEAN,), "std": (STD,)}
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


def net() -> nn.Module:
    """The factory that `examples/custom_module.py:net` names: the architecture; --weights brings the values."""
    return Net().eval()


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32, normalized, and their labels (1797,) int64."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return (images - MEAN) / STD, torch.from_numpy(data.target)


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """A trained model, in eval mode."""
    torch.manual_seed(0)
    model = Net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def quantize(weights: Path, out: Path, **settings: object) -> Path:
    """The INT8 graph of the model with these weights; `settings` are those of a run.toml."""
    from clusterq_deploy import Pipeline, RunConfig

    asked = {"model": f"{__file__}:net", "weights": str(weights), "bits": ["w8a8"], "effort": "fast", **settings}
    pipeline = Pipeline(RunConfig.model_validate(asked), out)
    pipeline.begin()
    pipeline.synthesize()
    for bits in pipeline.config.widths:
        pipeline.quantize(bits)
    pipeline.export("w8a8")
    return out / "w8a8/model.ort.onnx"


def top1(graph: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in percent, as ONNX Runtime executes the graph."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return 100 * float((logits.argmax(1) == labels).mean())


@click.command(help=__doc__.splitlines()[0])
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/custom"), show_default=True)
def main(epochs: int, out: Path) -> None:
    images, labels = digits()
    held_out = torch.arange(len(images)) % 4 == 0
    model = train(images[~held_out], labels[~held_out], epochs)
    weights = out.with_name(f"{out.name}-weights.safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), weights)
    graph = quantize(weights, out)
    with torch.no_grad():
        in_float = 100 * (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    in_int8 = top1(graph, images[held_out].numpy(), labels[held_out].numpy())
    print(f"held-out top-1: {in_float:.2f} % in float, {in_int8:.2f} % in INT8: {graph}")


if __name__ == "__main__":
    main()
