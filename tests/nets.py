"""Small seeded nets, each with a shape of graph that quantizers must get right."""

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from support import seeded
from torch import Tensor, fx, nn

from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.synthesis import Synthesis, SynthesisConfig, synthesize
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.models.capture import capture
from clusterq_deploy.quantization import BitWidths, FloatTwin, Student, calibrate, make_student


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias, and its BatchNorm."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class Residual(nn.Module):
    """Max-pool, a residual block with an identity, one with a downsample, one with a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 8), nn.MaxPool2d(2)
        self.a1, self.a2 = conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2, self.down = conv_bn(8, 16, stride=2), conv_bn(16, 16), conv_bn(8, 16, 1, stride=2)
        self.c1, self.c2 = conv_bn(16, 32, stride=2), conv_bn(32, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.down(x))
        x = F.relu(self.c2(F.relu(self.c1(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mobile(nn.Module):
    """ReLU6, depthwise, a linear bottleneck with a residual add, squeeze-excite, hard-swish, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8), nn.ReLU6(inplace=True))
        self.expand = nn.Sequential(conv_bn(8, 16, 1), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(conv_bn(16, 16, groups=16), nn.ReLU6(inplace=True))
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = conv_bn(16, 8, 1)
        self.head = nn.Sequential(conv_bn(8, 16, 1), nn.Hardswish(inplace=True))
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        return self.last(self.head(x))


class Branches(nn.Module):
    """Concatenation, channel shuffle and split, LeakyReLU, a BatchNorm that cannot be folded, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = conv_bn(3, 8), nn.LeakyReLU(0.1)
        self.left, self.right = conv_bn(8, 8, 1), conv_bn(8, 8)
        self.second = conv_bn(8, 8)
        self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(self.second(b))], 1)
        x = F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)
        return self.fc(x.mean((2, 3)))


class Enlarging(nn.Module):
    """Transposed convolutions: without overlap, in front of an addition, dilated with padding, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.act = conv_bn(3, 8, stride=2), conv_bn(8, 12), nn.PReLU(8, 0.2)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.BatchNorm2d(6))
        self.down = conv_bn(6, 8, stride=2)
        self.wide = nn.Sequential(nn.ConvTranspose2d(8, 12, (3, 2), 1, 1, dilation=(1, 2)), nn.BatchNorm2d(12))
        self.odd = nn.Sequential(nn.ConvTranspose2d(12, 8, 3, (2, 3), 1, (1, 2), bias=False), nn.BatchNorm2d(8))
        self.grouped = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=8, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = F.relu(self.down(F.relu(self.up(x))))
        x = F.relu(self.wide(x) + self.side(x))
        x = F.relu(self.grouped(F.relu(self.odd(x))))
        return self.fc(x.mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "mobile": Mobile,
    "branches": Branches,
    "enlarging": Enlarging,
}


def make_net(name: str) -> nn.Module:
    """Return a net with seeded weights and BatchNorm statistics of what passes through it, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETS[name]()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.5)
                module.momentum = None
        with torch.no_grad():
            for _ in range(4):
                net(torch.randn(32, 3, 16, 16))
    return net.eval().requires_grad_(False)


def captured(net: nn.Module | str, size: tuple[int, int, int] = (3, 16, 16)) -> fx.GraphModule:
    """Return the graph of a net, or of one of `NETS`."""
    return _captured(net) if isinstance(net, str) else capture(net, size)


@cache
def _captured(name: str) -> fx.GraphModule:
    return capture(make_net(name), (3, 16, 16))


def calibrated(net: nn.Module | str, bits: str = "w4a4", **options: Any) -> Student:
    """Return a student of a net, or of one of `NETS`, with its scales set and nothing else."""
    student = make_student(captured(net), BitWidths.parse(bits), **options)
    calibrate(student, images(), batch_size=16, rng=seeded())
    return student


def twin(student: Student) -> FloatTwin:
    """Return what a student whose channels are the teacher's is compared with."""
    return FloatTwin(copy.deepcopy(student))


def images(count: int = 32, seed: int = 1) -> Tensor:
    """Return standard normal images (count, 3, 16, 16) float32."""
    return torch.randn(count, 3, 16, 16, generator=seeded(seed))


def distance(student: Student, teacher: nn.Module, data: Tensor) -> float:
    """Return the squared error of the logits as a share of their variance."""
    with torch.no_grad():
        expected = teacher(data)
        return float((student(data) - expected).square().mean() / expected.var())


def require_same(student: Student, teacher: nn.Module, data: Tensor, atol: float = 1e-4) -> None:
    """Require that a student computes in float what the teacher does."""
    with torch.no_grad(), student.in_float():
        torch.testing.assert_close(student(data), teacher(data), rtol=1e-4, atol=atol)


@cache
def digits() -> LoadedModel:
    """Return the bundled model, not to be changed."""
    return load_model("digits", device=torch.device("cpu"))


def synthesis(settings: dict[str, object], checkpoint: Checkpoint = NOWHERE, net: nn.Module | None = None) -> Synthesis:
    """Synthesize images of 16 x 16 pixels for a net, or for that with residuals, always with the same seed."""
    return synthesize(
        net or make_net("residual"),
        classes=10,
        size=(3, 16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        config=SynthesisConfig.model_validate(settings),
        device=torch.device("cpu"),
        rng=seeded(3),
        checkpoint=checkpoint,
    )
