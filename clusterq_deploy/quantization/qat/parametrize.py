"""Parameters in which one learning rate fits every layer: what BatchNorm gave the teacher before it was folded.

A folded layer is badly conditioned. Its inputs have means that can be far larger than their deviations, so that a
step in a weight moves the mean of its outputs before all else; its rows differ in size by factors of ten; and the
scale of a row can only trade rounding errors, not the size of what the row computes. While a student is tuned its
layers therefore compute, with integers q = round(u) of a row's grid, step s, and the mean patch m of the inputs,

    y = s q * (x - m) + d b,

where u, the row in units of its grid, log s and b, in standard deviations d of the outputs, are what is learned. It is
the same layer: weight s u, bias d b - s q m. Its weight is rounded once per step, for both uses.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clusterq_deploy.quantization.fake_quant import (
    Bound,
    QuantizedConvolution,
    QuantizedLayer,
    QuantizedLinear,
    Quantizer,
    like_layout,
    padded,
    per_row,
    pooled_dims,
    window_step,
)
from clusterq_deploy.quantization.student import Student

_TIE = 1e-4  # of a step; widens the grid, so that values on its ends are inside


@dataclass(frozen=True)
class NormalizedParameters:
    """Leaf tensors to optimize: rows in grid units, biases in deviations of outputs, logarithms of all scales."""

    rows: list[Tensor]
    biases: list[Tensor]
    log_scales: list[Tensor]


@contextmanager
def normalized(student: Student, images: Tensor) -> Iterator[NormalizedParameters]:
    """Yield a student's layers in normalized parameters; afterwards they are plain layers again.

    Args:
        student: calibrated; inside the context its `state_dict` has other names for weights and biases.
        images: (N, C, H, W) float32, normalized, on the student's device, on which means of inputs and deviations of
            outputs are measured.
    """
    statistics = layer_statistics(student, images)
    layers = student.layers()
    rows, biases = list[Tensor](), list[Tensor]()
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", _Rounded(layer.weight_quantizer), unsafe=True)
        rows.append(layer.get_parameter("parametrizations.weight.original"))
        layer.weight_quantizer.enabled = False
        if layer.bias is not None:
            parametrize.register_parametrization(layer, "bias", _Centred(layer, *statistics[name]), unsafe=True)
            biases.append(layer.get_parameter("parametrizations.bias.original"))
    try:
        yield NormalizedParameters(rows, biases, [m.log_scale for m in student.modules() if isinstance(m, Quantizer)])
    finally:
        for layer in layers.values():
            if parametrize.is_parametrized(layer, "bias"):  # first, as it is computed with the weight
                parametrize.remove_parametrizations(layer, "bias")
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            with torch.no_grad():
                layer.weight.mul_(per_row(layer.weight_quantizer.scale, layer.weight))
            layer.weight_quantizer.enabled = True


def _row_sums(products: Tensor) -> Tensor:
    """Return the sum over each row of (O, ...), (O,), in any memory layout."""
    return products.sum(tuple(range(1, products.dim())))


class _RoundedRows(torch.autograd.Function):
    """The rounded weight (O, ...) of rows in grid units and of scales (O,).

    The gradient passes to values that are on the grid. The scale is the gain of its row, so its gradient is that of a
    factor: the further term of LSQ (arXiv 1902.08153) cancels with the weight's dependence on the scale.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        integers = rows.round().clamp_(low, high)
        ctx.save_for_backward(rows, integers, scale)
        ctx.range = (low - _TIE, high + _TIE)
        return integers * per_row(scale, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, integers, scale = ctx.saved_tensors
        grad = like_layout(grads[0], rows)
        low, high = ctx.range
        if isinstance(low, Tensor):  # one per row
            inside = grad * ((rows >= low) & (rows <= high))
        else:
            inside = torch.ops.aten.hardtanh_backward(grad, rows, low, high)
        return inside.mul_(per_row(scale, rows)), _row_sums(integers * grad), None, None


class _Rounded(nn.Module):
    """Weight (O, ...), rounded, from its rows in steps of their grids."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self._quantizer = (quantizer,)  # in a tuple: it is no part of this module

    def forward(self, rows: Tensor) -> Tensor:
        (quantizer,) = self._quantizer
        return cast(Tensor, _RoundedRows.apply(rows, quantizer.scale, *quantizer.bounds(rows, in_steps=True)))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / per_row(self._quantizer[0].scale, weight).detach()


class _Centred(nn.Module):
    """Bias (O,) from the outputs' mean, in their deviations (O,), and the rounded weight's share in it."""

    def __init__(self, layer: QuantizedLayer, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self._layer, self._mean, self._deviation = (layer,), mean, deviation

    def _weights_share(self) -> Tensor:
        return _row_sums(self._layer[0].weight * self._mean)

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs * self._deviation - self._weights_share()

    def right_inverse(self, bias: Tensor) -> Tensor:
        return (bias + self._weights_share().detach()) / self._deviation


@torch.no_grad()
def layer_statistics(student: Student, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each layer the mean patch that it reads, of its weight's shape, and its outputs' deviations (O,)."""
    statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str, layer: QuantizedLayer, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, QuantizedLinear):
            mean = x.flatten(0, -2).mean(0).expand_as(layer.weight)
        else:
            mean = _mean_patch(layer, padded(layer, x), (y.shape[2], y.shape[3]))
        statistics[name] = (mean, y.std(pooled_dims(layer, y)).clamp_min(1e-6))

    with ExitStack() as hooks:
        for name, layer in student.layers().items():
            hook = layer.register_forward_hook(lambda layer, args, y, name=name: measure(name, layer, args[0], y))
            hooks.enter_context(hook)
        student(images)
    return statistics


def _mean_patch(layer: QuantizedConvolution, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean of the patches that a convolution reads of x (N, C, H, W), padded already, in its weight's shape.

    Computed per place of the kernel: as the gradient of the weight it crashed in torch 2.14's oneDNN at some batch
    sizes.
    """

    def window(axis: int, place: int) -> slice:
        start, step = place * layer.dilation[axis], window_step(layer)[axis]
        return slice(start, start + (size[axis] - 1) * step + 1, step)

    rows, columns = layer.kernel_size
    means = [x[:, :, window(0, i), window(1, j)].mean((0, 2, 3)) for i in range(rows) for j in range(columns)]
    patch = torch.stack(means, 1).view(layer.groups, -1, rows, columns)
    patch = patch if isinstance(layer, nn.Conv2d) else patch.flip(2, 3)
    return patch.repeat_interleave(layer.out_channels // layer.groups, 0)
