"""The bundled model: a small BatchNorm ResNet for handwritten digits, which needs no download and no GPU.

It is trained by `examples/train_digits.py`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).parents[1] / "assets"
WEIGHTS = ASSETS / "digits.safetensors"
HELD_OUT = ASSETS / "digits_test.npz"
"""The images that training never saw: `images` (N, 8, 8, 1) uint8 and `labels` (N,) int64."""

CLASSES = 10
TOP1 = 99.78
"""Accuracy on the held-out images, in percent."""
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": (1, 32, 32),
    "mean": (0.305,),
    "std": (0.325,),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
"""How the input is made, in timm's convention; mean and std are of pixels in [0, 1]."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, width_in, H, W) -> (N, width, H / stride, W / stride)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """A ResNet of 9 convolutions: images (N, 1, 32, 32) float32, normalized -> logits (N, 10).

    It is wide and of few pixels: integer kernels gain most if many channels are added up, and a step of synthesis
    costs half of what it does with a third of the channels at twice the resolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = PRETRAINED_CFG
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)  # 16x16
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(ResidualBlock(16, 96, 2))  # 8x8
        self.layer2 = nn.Sequential(ResidualBlock(96, 96, 2), ResidualBlock(96, 96, 1))  # 4x4
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


def digits() -> DigitsNet:
    """Return the trained model on the CPU, in eval mode, float32; its file is FP16."""
    net = DigitsNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()
