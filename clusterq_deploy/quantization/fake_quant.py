"""Fake quantization with a learned step, and the layers that apply it to their weights."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterq_deploy.quantization.grid import Grid

MARKER = "FakeQuantize"
MARKER_DOMAIN = "clusterq"
"""Operator and domain that stand for a quantizer in an exported graph until it is lowered for a target."""


_TINY = 1e-30  # the bounds of the grid belong to it

Bound = Any
"""An end of a grid: an int, or a tensor (O, 1, ...) of one for each row; torch's stubs have no clamp for both."""


def row_bounds(second: tuple[Tensor, Tensor], scale: Tensor, grid: Grid, limit: int) -> tuple[Tensor, Tensor]:
    """Return the ends of each row's grid, (O,) float32 each, so that no two integers of one sign add up to more.

    All values but the outermost keep the grid as far as half of the limit; the outermost has what the next one leaves
    of the limit. `vpmaddubsw` then never saturates, whichever two products of a row it adds; see `pair_limit`.

    Args:
        second: from `second_extremes`.
        scale: step of each row, (O,) float32.
        grid: the grid without the limit.
        limit: the largest sum of two integers of a row that are both positive, or both negative.
    """
    lowest, highest = (extreme.div(scale).round_() for extreme in second)
    high = (limit - highest.clamp(0, grid.high)).clamp(limit // 2, grid.high)
    low = (-limit - lowest.clamp(grid.low, 0)).clamp(grid.low, -(limit // 2))
    return low, high


def second_extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second-smallest and the second-largest value of each row of a weight (O, ...), (O,) each.

    0 where a row has one value only: nothing can be added to it.
    """
    rows = weight.flatten(1)
    if rows.shape[1] < 2:
        return rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    return rows.topk(2, largest=False).values[:, 1], rows.topk(2).values[:, 1]


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid; the gradient passes where the value is on it, and the step's is that of LSQ.

    Esser et al., Learned Step Size Quantization, arXiv 1902.08153, equations (1) to (3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        # divide and round half to even, as QuantizeLinear does
        rounded = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, rounded, scale)
        ctx.range = (low, high)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, rounded, scale = ctx.saved_tensors
        grad = like_layout(grads[0], x)
        low, high = ctx.range
        # large maps are bound by memory: as few passes as can be, and no tensor kept that is not kept anyway
        if scale.dim() == 0 and x.device.type == "cpu":
            step = float(scale)
            grad_x = torch.ops.aten.hardtanh_backward(grad, x, low * step - _TINY, high * step + _TINY)
        else:
            grad_x = grad * ((x >= low * scale) & (x <= high * scale))
        # inside the grid the step's slope is round(v) - v, outside it is the bound: grad * rounded - grad_x * x
        if scale.dim() == 0:
            slope = inner_product(grad, rounded) - inner_product(grad_x, x)
        else:
            slope = (grad * rounded - grad_x * x).flatten(1).float().sum(1).view_as(scale)
        return grad_x, slope / scale, None, None


def like_layout(x: Tensor, other: Tensor) -> Tensor:
    """X in the memory layout of a tensor of the same shape: elementwise work on mixed layouts is ten times as slow."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The inner product, () float32, of two tensors of one shape, of any float type."""
    channels_last = a.dim() == 4 and not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last)
    if channels_last and a.stride() == b.stride():  # as they lie in memory: no copy in another order
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


class Quantizer(nn.Module):
    """Rounds a tensor to `grid`, with a learned positive scale.

    Args:
        site: the quantizer's name, unique in its model.
        grid: the integers.
        channels: length of the scale: one for each index of dimension 0 (weights), or None for one in all.
        limit: the largest value that the tensor can have (6 behind a ReLU6); the scale is kept so that
            `high * scale` does not pass it, which makes the clip in front of the quantizer redundant.
        pair_limit: of a weight, the largest sum of two integers of a row, see `grid.pair_limit`; None for no limit.

    Attributes:
        log_scale: () or (channels,) float32; its logarithm is learned, so the scale stays positive.
        enabled: False lets the tensor pass untouched.
        reduce_range: True rounds to `Grid.reduced`, where there is one.
        limit_pairs: False leaves `pair_limit` out of account, as targets do that add in 32 bits.
        floor: the smallest scale that `project` leaves.
        widening: (channels,) float32, at least 1: how much larger the scale is where `pair_limit` counts.
        bias_shift: (channels,) float32: how much larger the layer's bias is where it does not; see
            `fit_full_range_biases`.
    """

    def __init__(
        self,
        site: str,
        grid: Grid,
        channels: int | None = None,
        limit: float = math.inf,
        pair_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.site, self.limit, self.enabled, self.reduce_range = site, limit, True, False
        self.pair_limit, self.limit_pairs = pair_limit, True
        self._grid = grid
        self.log_scale = nn.Parameter(torch.zeros(() if channels is None else (channels,)))
        self.register_buffer("floor", torch.tensor(1e-8))
        if pair_limit is not None:
            self.register_buffer("widening", torch.ones_like(self.log_scale))
            self.register_buffer("bias_shift", torch.zeros_like(self.log_scale))

    floor: Tensor
    widening: Tensor
    bias_shift: Tensor

    @property
    def _halved(self) -> Grid | None:
        return self._grid.reduced if self.reduce_range else None

    @property
    def grid(self) -> Grid:
        """The integers that the tensor is rounded to."""
        return self._halved or self._grid

    @property
    def _limited(self) -> bool:
        return self.pair_limit is not None and self.limit_pairs

    @property
    def scale(self) -> Tensor:
        """The step between neighbouring values, () or (channels,) float32, positive."""
        return self.log_scale.exp() * self._factor

    @property
    def _factor(self) -> float | Tensor:
        """What the step of the finest grid is multiplied by."""
        if self._limited:
            return self.widening
        return 2.0 if self._halved else 1.0

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Set the step; values under the floor or over the limit are moved there."""
        step = scale / self._factor
        self.log_scale.copy_(step.to(self.log_scale).clamp_min(1e-30).log())
        self.project()

    def bounds(self, x: Tensor, *, in_steps: bool = False) -> tuple[Bound, Bound]:
        """Return the smallest and largest integer of x; for each row of a weight (O, ...) whose sums are limited.

        Args:
            x: the tensor, or what it is in steps of its scale.
            in_steps: which of the two.
        """
        if self.pair_limit is None or not self.limit_pairs:
            return self.grid.low, self.grid.high
        scale = torch.ones_like(self.log_scale) if in_steps else self.scale
        low, high = row_bounds(second_extremes(x.detach()), scale.detach(), self.grid, self.pair_limit)
        shape = (-1, *[1] * (x.dim() - 1))
        return low.view(shape), high.view(shape)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the scale back between its floor and its limit; to be called after each optimizer step."""
        # a relative ulp below the limit: log and exp round, and the limit must hold exactly
        highest = math.log(self.limit / self._grid.high) - 1e-6 if math.isfinite(self.limit) else math.inf
        self.log_scale.clamp_(min=float(self.floor.log()), max=highest)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias (O,) that goes with the weight as it is rounded now; None of a layer without one."""
        if bias is None or self.pair_limit is None or self.limit_pairs:
            return bias
        return bias + self.bias_shift

    def integers(self, x: Tensor) -> Tensor:
        """The grid's integers for x, int16, of x's shape."""
        return (x / self._spread(x)).round().clamp(*self.bounds(x)).to(torch.int16)

    def _spread(self, x: Tensor) -> Tensor:
        scale = self.scale
        return scale if scale.dim() == 0 else scale.view(-1, *[1] * (x.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if torch.compiler.is_exporting():
            marker: Tensor = torch.onnx.ops.symbolic(
                f"{MARKER_DOMAIN}::{MARKER}",
                (x,),
                {"site": self.site},
                dtype=x.dtype,
                shape=x.shape,
                version=1,
            )
            return marker
        result: Tensor = _FakeQuantize.apply(x, self._spread(x), *self.bounds(x))
        return result

    def extra_repr(self) -> str:
        return f"{self.site!r}, {self.grid}"


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weight passes a quantizer."""

    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        output: Tensor = self._conv_forward(input, quantizer(self.weight), quantizer.bias(self.bias))
        return output


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight passes a quantizer."""

    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.weight_quantizer.bias(self.bias))


QuantizedLayer = QuantizedConv2d | QuantizedLinear


def with_weight_quantizer(layer: nn.Conv2d | nn.Linear, quantizer: Quantizer) -> QuantizedLayer:
    """The layer with the same parameters and a quantizer on its weight."""
    kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    quantized = cast(QuantizedLayer, kind.__new__(kind))
    quantized.__dict__.update(layer.__dict__)
    quantized._modules = dict(layer._modules)
    quantized.weight_quantizer = quantizer
    return quantized


def pooled_dims(layer: nn.Module, y: Tensor) -> list[int]:
    """All dimensions but the channels' of a layer's outputs y, (N, C, H, W) of a convolution, else (..., C)."""
    channel = 1 if isinstance(layer, nn.Conv2d) else y.dim() - 1
    return [d for d in range(y.dim()) if d != channel]


def by_channel(values: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
    """Values (C,) in a shape that broadcasts to a layer's outputs y."""
    pooled = pooled_dims(layer, y)
    return values.view([1 if d in pooled else -1 for d in range(y.dim())])


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution's input (N, C, H, W) with the layer's padding of zeros around it."""
    widths = list(layer._reversed_padding_repeated_twice)
    return F.pad(x, widths) if any(widths) else x
