"""Fake quantization with a learned step, and the layers that apply it to their weights."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterq_deploy.quantization.grid import Grid

MARKER = "FakeQuantize"
MARKER_DOMAIN = "clusterq"
"""Operator and domain that mark a quantizer in an exported graph until it is lowered for a target."""

Bound = Any
"""An end of a grid: an int, or a tensor (O, 1, ...) with one per row; torch's stubs have no clamp for both."""
_TINY = 1e-30  # widens the grid, so that values on its bounds are inside


def row_bounds(second: tuple[Tensor, Tensor], scale: Tensor, grid: Grid, limit: int) -> tuple[Tensor, Tensor]:
    """Return the ends of each row's grid, (O,) float32 each, so that no two integers of one sign add up to more.

    All values but the outermost keep the grid up to half of the limit; the outermost has what the next one leaves
    of the limit. `vpmaddubsw` then never saturates, whichever two products of a row it adds; see `pair_limit`.

    Args:
        second: from `second_extremes`.
        scale: step of each row, (O,) float32.
        grid: without the limit.
        limit: the largest sum of two integers of a row that are both positive, or both negative.
    """
    lowest, highest = (extreme.div(scale).round_() for extreme in second)
    high = (limit - highest.clamp(0, grid.high)).clamp(limit // 2, grid.high)
    low = (-limit - lowest.clamp(grid.low, 0)).clamp(grid.low, -(limit // 2))
    return low, high


def second_extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second-smallest and the second-largest value of each row of a weight (O, ...), (O,) each.

    They are 0 for a row of one value: nothing can be added to it.
    """
    rows = weight.flatten(1)
    if rows.shape[1] < 2:
        return rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    return rows.topk(2, largest=False).values[:, 1], rows.topk(2).values[:, 1]


class _FakeQuantize(torch.autograd.Function):
    """Rounds to the grid; the gradient passes for values on the grid, and the step's is that of LSQ.

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
        # large maps are bound by memory: as few passes as possible, and no further tensor saved
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
    """Return x in the memory layout of a tensor of the same shape: mixed layouts are ten times as slow elementwise."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, () float32, of two tensors of one shape, of any float type."""
    channels_last = a.dim() == 4 and not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last)
    if channels_last and a.stride() == b.stride():  # in the order of memory: no copy in another one
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


class Quantizer(nn.Module):
    """Rounds a tensor to `grid`, with a learned positive scale.

    Args:
        site: the quantizer's name, unique in its model.
        grid: the integers.
        channels: length of the scale: one per index of dimension 0 (weights), or None for a single one.
        limit: the largest value that the tensor can have (6 behind a ReLU6); the scale is kept so that
            `high * scale` does not pass it, which makes the clip in front of the quantizer redundant.
        pair_limit: of a weight, the largest sum of two integers of a row, see `grid.pair_limit`; None for no limit.

    Attributes:
        log_scale: () or (channels,) float32; its logarithm is learned, so the scale stays positive.
        enabled: False lets the tensor pass untouched.
        reduce_range: True rounds to `Grid.reduced`, if there is one.
        limit_pairs: False ignores `pair_limit`, as targets do that add in 32 bits.
        floor: the smallest scale that `project` leaves.
        widening: (channels,) float32, at least 1: how much larger the scale is while `pair_limit` counts.
        bias_shift: (channels,) float32: how much larger the layer's bias is while it does not; see
            `fit_full_range_biases`.
    """

    floor: Tensor
    widening: Tensor
    bias_shift: Tensor

    def __init__(
        self, site: str, grid: Grid, channels: int | None = None, limit: float = math.inf, pair_limit: int | None = None
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

    @property
    def grid(self) -> Grid:
        """The integers that the tensor is rounded to."""
        return (self._grid.reduced if self.reduce_range else None) or self._grid

    @property
    def _active_limit(self) -> int | None:
        """`pair_limit` while it counts."""
        return self.pair_limit if self.limit_pairs else None

    @property
    def scale(self) -> Tensor:
        """The step between neighbouring values, () or (channels,) float32, positive."""
        return self.log_scale.exp() * self._factor

    @property
    def _factor(self) -> float | Tensor:
        """What the step of the finest grid is multiplied by."""
        if self._active_limit is not None:
            return self.widening
        return 1.0 if self.grid == self._grid else 2.0

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Set the step, moved to the floor or the limit if it is beyond."""
        self.log_scale.copy_((scale / self._factor).to(self.log_scale).clamp_min(1e-30).log())
        self.project()

    def bounds(self, x: Tensor, *, in_steps: bool = False) -> tuple[Bound, Bound]:
        """Return the smallest and largest integer of x; per row of a weight (O, ...) if its sums are limited.

        `in_steps` says that x is given in steps of its scale.
        """
        if (limit := self._active_limit) is None:
            return self.grid.low, self.grid.high
        scale = torch.ones_like(self.log_scale) if in_steps else self.scale
        low, high = row_bounds(second_extremes(x.detach()), scale.detach(), self.grid, limit)
        return per_row(low, x), per_row(high, x)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the scale back between its floor and its limit; call it after each optimizer step."""
        # a relative ulp below the limit: log and exp round, and the limit must hold exactly
        highest = math.log(self.limit / self._grid.high) - 1e-6 if math.isfinite(self.limit) else math.inf
        self.log_scale.clamp_(min=float(self.floor.log()), max=highest)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias (O,) that belongs to the weight as it is rounded now; None for a layer without one."""
        return bias if bias is None or self.pair_limit is None or self.limit_pairs else bias + self.bias_shift

    def integers(self, x: Tensor) -> Tensor:
        """Return the grid's integers for x, int16, of x's shape."""
        return (x / self._step(x)).round().clamp(*self.bounds(x)).to(torch.int16)

    def _step(self, x: Tensor) -> Tensor:
        """Return the scale in a shape that broadcasts to x."""
        scale = self.scale
        return scale if scale.dim() == 0 else per_row(scale, x)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if torch.compiler.is_exporting():
            name = f"{MARKER_DOMAIN}::{MARKER}"
            return torch.onnx.ops.symbolic(name, (x,), {"site": self.site}, dtype=x.dtype, shape=x.shape, version=1)
        return cast(Tensor, _FakeQuantize.apply(x, self._step(x), *self.bounds(x)))

    def extra_repr(self) -> str:
        return f"{self.site!r}, {self.grid}"


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weight passes a quantizer."""

    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        return self.compute(input, quantizer(self.weight), quantizer.bias(self.bias))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer computes with another weight and bias."""
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of one group whose weight passes a quantizer.

    The weight is stored with its outputs first, (O, I, kH, kW), as that of other layers is: a row is an output channel.
    """

    weight_quantizer: Quantizer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        quantizer = self.weight_quantizer
        return self.compute(input, quantizer(self.weight), quantizer.bias(self.bias))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer computes with another weight (O, I, kH, kW) and bias."""
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.output_padding, 1, self.dilation)
        return F.conv_transpose2d(x, weight.transpose(0, 1), bias, *geometry)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight passes a quantizer."""

    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.weight_quantizer(self.weight), self.weight_quantizer.bias(self.bias))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer computes with another weight and bias."""
        return F.linear(x, weight, bias)


QuantizedConvolution = QuantizedConv2d | QuantizedConvTranspose2d
QuantizedLayer = QuantizedConvolution | QuantizedLinear
QUANTIZABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
}
"""Layers by the class of their quantized form."""


def with_weight_quantizer(layer: nn.Module, site: str, grid: Grid, pair_limit: int | None) -> QuantizedLayer:
    """Return a layer of `QUANTIZABLE` with the same parameters and a quantizer per output channel on its weight."""
    kind = QUANTIZABLE[type(layer)]
    quantized = cast(QuantizedLayer, kind.__new__(kind))
    quantized.__dict__.update(layer.__dict__)
    quantized._parameters, quantized._modules = dict(layer._parameters), dict(layer._modules)
    if isinstance(quantized, QuantizedConvTranspose2d):
        quantized.weight = nn.Parameter(quantized.weight.detach().transpose(0, 1).contiguous())
    quantized.weight_quantizer = Quantizer(site, grid, channels=len(quantized.weight), pair_limit=pair_limit)
    return quantized


def per_row(values: Tensor, weight: Tensor) -> Tensor:
    """Return values (O,) in a shape that broadcasts to a weight (O, ...)."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def group_count(layer: nn.Module) -> int:
    """Return the number of groups of a layer; 1 for a linear one."""
    return 1 if isinstance(layer, nn.Linear) else cast(int, layer.groups)


def pooled_dims(layer: nn.Module, y: Tensor) -> list[int]:
    """Return all dimensions of a layer's outputs y but that of the channels: (N, C, H, W) or (..., C)."""
    channel = y.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return [d for d in range(y.dim()) if d != channel]


def per_channel(values: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
    """Return values (C,) in a shape that broadcasts to a layer's outputs y."""
    pooled = pooled_dims(layer, y)
    return values.view([1 if d in pooled else -1 for d in range(y.dim())])


def padded(layer: QuantizedConvolution, x: Tensor) -> Tensor:
    """Return a convolution's input (N, C, H, W) with the layer's padding of zeros around it.

    A transposed one reads, at a stride of 1 and with its kernel turned round, what has zeros between the values too.
    """
    if isinstance(layer, nn.Conv2d):
        widths = list(layer._reversed_padding_repeated_twice)
        return F.pad(x, widths) if any(widths) else x
    (up, across), (height, width) = layer.stride, x.shape[2:]
    spread = x.new_zeros(*x.shape[:2], (height - 1) * up + 1, (width - 1) * across + 1)
    spread[:, :, ::up, ::across] = x
    reach = [layer.dilation[axis] * (layer.kernel_size[axis] - 1) - int(layer.padding[axis]) for axis in (0, 1)]
    bottom, right = (reach[axis] + layer.output_padding[axis] for axis in (0, 1))
    return F.pad(spread, [reach[1], right, reach[0], bottom])


def window_step(layer: QuantizedConvolution) -> tuple[int, int]:
    """Return how far a convolution's window moves over its `padded` input, in rows and columns."""
    return cast(tuple[int, int], layer.stride) if isinstance(layer, nn.Conv2d) else (1, 1)


def patches_of(layer: QuantizedConvolution, x: Tensor) -> Tensor:
    """Return the patches of an input (N, C, H, W) for a convolution's rows, (N, C * kH * kW, places)."""
    patches = F.unfold(padded(layer, x), layer.kernel_size, layer.dilation, 0, window_step(layer))
    if isinstance(layer, nn.Conv2d):
        return patches
    turned: Tensor = patches.unflatten(1, (x.shape[1], -1)).flip(2).flatten(1, 2)
    return turned


def random_places(x: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, ...]:
    """Return indices of all values of a tensor, or of `count` random ones if it has more; one tensor per dimension.

    They index the dimensions, not the flat tensor, which in another memory layout would be a copy.
    """
    if x.numel() <= count:
        flat = torch.arange(x.numel(), device=x.device)
    else:
        flat = torch.randint(x.numel(), (count,), generator=rng, device=rng.device).to(x.device)
    return tuple(torch.unravel_index(flat, x.shape))
