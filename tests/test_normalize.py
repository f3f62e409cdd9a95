"""Normalized parameters: another way to write the same layers."""

import pytest
import torch
from nets import NETS, calibrated, images, make_net
from torch import nn

from clusterq_deploy.quantization.qat.parametrize import normalized


class Paddings(nn.Module):
    """A convolution padded by name, a strided and dilated one in groups, one without a bias, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4)
        self.plain = nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(self.grouped(self.same(x).relu()).relu() + 3).relu()
        y: torch.Tensor = self.last(x.mean((2, 3)))
        return y


def nets() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Paddings().eval(), *map(make_net, NETS)]


@pytest.mark.parametrize("net", nets(), ids=["paddings", *NETS])
def test_normalized_keeps_outputs_and_restores_layers(net: nn.Module) -> None:
    student = calibrated(net)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    kinds = {name: type(layer) for name, layer in student.layers().items()}
    with torch.no_grad():
        expected = student(images(8))
        with normalized(student, images()) as parameters:
            torch.testing.assert_close(student(images(8)), expected, rtol=1e-4, atol=1e-4)
            assert len(parameters.rows) == len(kinds)
            learned = [*parameters.rows, *parameters.biases, *parameters.log_scales]
            assert {id(p) for p in learned} <= {id(p) for p in student.parameters()}
    assert {name: type(layer) for name, layer in student.layers().items()} == kinds
    assert set(student.state_dict()) == set(before)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)


def test_normalized_steps_keep_output_means() -> None:
    torch.manual_seed(0)
    student = calibrated(Paddings().eval(), "w4a8")
    layer, x = student.layers()["grouped"], images()
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, y: seen.append(y.mean((0, 2, 3))))
    try:
        with torch.no_grad(), normalized(student, x) as parameters:
            student(x)
            spread = seen[0].std()
            parameters.rows[1].add_(3 * torch.rand(parameters.rows[1].shape))
            layer.weight_quantizer.log_scale.add_(0.5)
            student(x)
    finally:
        handle.remove()
    moved = (seen[1] - seen[0]).abs().max()
    assert float(moved) < 0.05 * float(spread)  # the inputs' quantization is what is left


def test_normalized_restores_layers_after_error() -> None:
    student = calibrated(make_net("residual"))
    names = set(student.state_dict())
    with pytest.raises(ZeroDivisionError), normalized(student, images(8)):
        raise ZeroDivisionError
    assert set(student.state_dict()) == names


def test_normalized_gradients_reach_all_parameters() -> None:
    student = calibrated(make_net("residual"))
    with normalized(student, images(8)) as parameters:
        student(images(8)).square().sum().backward()
        for group in (parameters.rows, parameters.biases, parameters.log_scales):
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in group)
        row = parameters.rows[2]
        assert float(row.grad.abs().max()) > 0
