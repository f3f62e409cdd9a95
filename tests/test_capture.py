"""Networks become graphs that compute the same, whatever their code does."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import captured, conv_bn, images
from support import seeded
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

from clusterq_deploy.errors import GraphError, ModelError
from clusterq_deploy.models.capture import capture, logits_only, relative_difference, require_same
from clusterq_deploy.models.exported import load_exported
from clusterq_deploy.quantization import BitWidths, make_student
from clusterq_deploy.quantization.graph import fold
from clusterq_deploy.quantization.graph.fold import folded_teacher


class Net(nn.Module):
    """A stem with BatchNorm, the layers of `body`, and a classifier of the mean over space."""

    def __init__(self, body: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.fc = body or nn.ReLU(), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.norm(self.stem(x))).mean((2, 3)))


def trained(net: nn.Module) -> nn.Module:
    """Return a net in eval mode with statistics and factors that no BatchNorm has from the start."""
    rng = seeded(5)
    for module in net.modules():
        for name, low, high in (
            ("running_mean", -1, 1),
            ("running_var", 0.3, 2),
            ("weight", 0.5, 1.5),
            ("bias", -1, 1),
        ):
            tensor = getattr(module, name, None)
            if isinstance(module, _BatchNorm | Frozen) and tensor is not None:
                tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=rng))
    return net.eval().requires_grad_(False)


class Frozen(nn.Module):
    """BatchNorm as a function of buffers, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class NormAct(nn.BatchNorm2d):
    """BatchNorm with an activation inside, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(y)


class Tokens(nn.Module):
    """A Linear over tokens, and BatchNorm over all tokens of all images, as LeViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(2).transpose(1, 2))
        return self.norm(y.flatten(0, 1)).reshape_as(y).transpose(1, 2).unflatten(2, x.shape[2:])


class InPlace(nn.Module):
    """A ReLU in place that rectifies the shortcut too, and an addition to a part of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(x, inplace=True)) + x
        y[:, :3] += x[:, 2:5]
        F.leaky_relu_(y)
        return y


class Flags(nn.Module):
    """A branch on an argument that has a default, and checks of the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        if x.shape[1] != 8 or x.size(2) % 2:
            raise ValueError("8 channels of an even height are needed")
        return self.conv(x) * scale if mask is None else x * mask


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(F.relu(self.first(self.conv(x)))))


class CountedBatch(nn.Module):
    """Sizes with the batch as a Python number, which torch.export then fixes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(int(x.shape[0]), 8, -1).softmax(2).view(len(x), 8, 16, 16)


class Mixed(nn.Module):
    """Convolutions of several sizes side by side, and one BatchNorm behind them, as MixNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.norm = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(5, 5, 3, padding=1, groups=5),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        small, large = x.split([3, 5], 1)
        return self.norm(torch.cat([self.small(small), self.large(large)], 1))


class Doubled(nn.Module):
    """A concatenation of a map with itself, which BatchNorm scales by two sets of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(self.norm(torch.cat([y, y], 1)))


class Branches(nn.Module):
    """Convolutions of one tensor, and perhaps its BatchNorm, that are added: a block of RepVGG as it is trained."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return F.relu(sum(branch(x) for branch in self.branches))


MERGED: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "block": (lambda: [conv_bn(8, 8), conv_bn(8, 8, 1), nn.BatchNorm2d(8)], 1),
    "norm first": (lambda: [nn.BatchNorm2d(8), conv_bn(8, 8), conv_bn(8, 8)], 1),
    "stride and groups": (lambda: [conv_bn(8, 8, 1, 2, 4), conv_bn(8, 8, 5, 2, 4), conv_bn(8, 8, 3, 2, 4)], 1),
    "depthwise": (lambda: [conv_bn(8, 8, groups=8), nn.BatchNorm2d(8)], 1),
    "bars": (lambda: [nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)], 1),
    "dilated": (lambda: [nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=1)], 2),
    "other groups": (lambda: [conv_bn(8, 8), conv_bn(8, 8, 1, groups=2)], 2),
    "beside the middle": (lambda: [nn.Conv2d(8, 8, 3, 4), nn.Conv2d(8, 8, 1, 4)], 2),
    "norms only": (lambda: [nn.BatchNorm2d(8), nn.BatchNorm2d(8)], 0),
}


@pytest.mark.parametrize("name", MERGED)
@torch.no_grad()
def test_branches_become_one_convolution_at_eight_bits(name: str) -> None:
    branches, layers = MERGED[name]
    net = trained(Net(Branches(*branches())))
    graph, x = captured(net), images(5)
    assert relative_difference(folded_teacher(graph, merge=True)(x), net(x)) < 1e-5
    count = {bits: len(make_student(graph, BitWidths.parse(bits)).layers()) - 2 for bits in ("w8a8", "w4a8")}
    assert count == {"w8a8": layers, "w4a8": sum(isinstance(m, nn.Conv2d) for m in net.body.modules())}


def pruned() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


BODIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "frozen": (Frozen, 0),
    "activation inside": (lambda: NormAct(8), 0),
    "synchronized": (lambda: nn.SyncBatchNorm(8), 0),
    "without affine": (lambda: nn.BatchNorm2d(8, affine=False), 0),
    "two in a row": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), 0),
    "two without a layer": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()), 1),
    "before a convolution": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4)), 0),
    "before a padded one": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)), 1),
    "before the classifier": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), 0),
    "behind a transposed one": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.BatchNorm2d(8)), 0),
    "tokens": (Tokens, 0),
    "in place": (InPlace, 0),
    "flags": (Flags, 0),
    "called twice": (Twice, 0),
    "counted batch": (CountedBatch, 0),
    "mixed": (Mixed, 0),
    "one map twice": (Doubled, 0),
    "pruned": (pruned, 0),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), 0),
    "lowest padding": (lambda: nn.Sequential(nn.ConstantPad2d(1, -torch.inf), nn.MaxPool2d(3)), 0),
}


@pytest.mark.parametrize("name", BODIES)
@torch.no_grad()
def test_capture_is_exact_and_folds(name: str) -> None:
    body, left = BODIES[name]
    net = trained(Net(body()))
    graph, x = captured(net), images(5)
    assert torch.equal(graph(x), net(x))
    folded = folded_teacher(graph)
    assert relative_difference(folded(x), net(x)) < 1e-5
    norms = [module for module in folded.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == left
    student = make_student(graph, BitWidths(8, 8))
    reasons = [reason for reason in student.placement.skipped.values() if reason.startswith("BatchNorm")]
    assert len(reasons) == left
    assert all(" behind it" in reason for reason in reasons)


class Amplifying(nn.Module):
    """A net whose rounding errors are large: it subtracts numbers that are almost equal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.norm(self.stem(x)) - self.norm.bias[:, None, None]).mean((2, 3)))


@torch.no_grad()
def test_folding_tells_rounding_that_a_net_amplifies_from_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Amplifying().eval(), images(3)
    net.norm.bias.fill_(1e5)
    graph = captured(net)
    assert relative_difference(folded_teacher(graph)(x), net(x)) > 1e-3
    affine_of = fold.affine_of
    monkeypatch.setattr(fold, "affine_of", lambda norm: (1.01 * affine_of(norm)[0], affine_of(norm)[1]))
    with pytest.raises(GraphError, match="the folded graph of Amplifying is another function"):
        folded_teacher(graph)


def test_calls_of_one_layer_have_quantizers_each() -> None:
    student = make_student(captured(trained(Net(Twice()))), BitWidths(4, 4))
    assert [site.layer for site in student.placement.weights] == ["stem", "body.conv", "body.conv@2", "fc"]
    assert len({site.input_site for site in student.placement.weights}) == 4
    assert not student.placement.skipped


class Ends(nn.Module):
    """A net that normalizes its own image, classifies by a convolution, and answers with probabilities."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.norm, self.head, self.end = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1), end
        self.middle = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.middle(F.relu(self.norm(self.stem((x - 0.45) / 0.22)))))
        return self.end(self.head(y).mean((2, 3)))


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()], ids=str)
@torch.no_grad()
def test_first_and_last_layers_are_found_by_the_flow_of_data(end: nn.Module) -> None:
    net, x = trained(Ends(end)), images(5)
    graph = captured(net)
    placement = make_student(graph, BitWidths(4, 4)).placement
    assert {site.layer: site.grid.bits for site in placement.weights} == {"stem": 8, "middle": 4, "head": 8}
    assert torch.equal(graph(x), net(x))
    with logits_only(graph):
        logits = graph(x)
    torch.testing.assert_close(end(logits), net(x))
    assert torch.equal(logits.argmax(1), net(x).argmax(1))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: Net(Branching()), r"Net cannot be captured: .*data-dep.* in Branching\.forward, .*capture\.py:\d+"),
        (lambda: Net(nn.BatchNorm2d(8, track_running_stats=False)), "^body normalizes by the batch at inference"),
    ],
)  # fmt: skip
def test_capture_refuses_in_one_line(
    net: Callable[[], nn.Module], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        captured(trained(net()))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_require_same_names_the_first_layer_that_differs() -> None:
    net = trained(Net(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())))
    graph = captured(net)
    graph.set_submodule("body.1", nn.Conv2d(8, 8, 1))
    with pytest.raises(GraphError, match=r"the graph of Net is another function: .*, first in body\.1;"):
        require_same(net, graph, images(3), "the graph")


# ---- programs of torch.export.save ----


def save(net: nn.Module, path: Path, batch: int | None = None) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    program = torch.export.export(net, (images(batch or 2),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("batch", [None, 1, 4])
@torch.no_grad()
def test_load_exported_is_the_model_for_any_batch(batch: int | None, tmp_path: Path) -> None:
    net, x = trained(Net(nn.Sequential(nn.ReLU(), nn.Flatten(2), nn.Unflatten(2, (16, 16))))), images(5)
    module, size = load_exported(save(net, tmp_path / "net.pt2", batch))
    assert size == (3, 16, 16)
    graph = capture(module, size)
    assert torch.equal(graph(x), net(x))
    assert graph.get_submodule("stem").weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"torch.ops.aten.relu.default"', '"torch.manual_seed"', "a call of torch.manual_seed"),
        ("Symbol('s", "print('s", 'a size "print'),
        ('"use_pickle": false', '"use_pickle": true', "pickled objects"),
        ("archive_version", "data/aotinductor/model.so", "an entry 'net/data/aotinductor/model.so'"),
    ],
)
def test_load_exported_refuses_what_could_run_code(old: str, new: str, message: str, tmp_path: Path) -> None:
    source, path = save(trained(Net()), tmp_path / "net.pt2"), tmp_path / "changed.pt2"
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(path, "w") as written:
        for name in read.namelist():
            content = read.read(name)
            if name.endswith(".json"):
                content = json.dumps(json.loads(content)).replace(old, new).encode()
            written.writestr(name.replace(old, new), content)
    with pytest.raises(ModelError, match="refused to load") as caught:
        load_exported(path)
    assert message in str(caught.value)


def test_load_exported_says_what_a_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        load_exported(tmp_path / "net.pt2")
    (tmp_path / "net.pt2").write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"cannot read .* expected a file of torch\.export\.save"):
        load_exported(tmp_path / "net.pt2")
