"""Scales with the smallest error: a search over candidate steps by mean squared error."""

from collections.abc import Callable

import torch
from torch import Tensor

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import GraphError
from clusterq_deploy.quantization.fake_quant import Quantizer, random_places, row_bounds, second_extremes
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.student import Student

_SAMPLES_PER_SITE = 1 << 18
_CANDIDATES = 100
_DEAD = 1e-4  # a channel's scale is at least this share of its layer's largest


def _best_scale(grid: Grid, largest: Tensor, error_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the candidate with the smallest error, elementwise over `largest`, from 1 to 1/100 of the range."""
    reach = grid.high  # the largest value may be positive, and then this is as far as the grid goes
    best, best_error = largest / reach, torch.full_like(largest, torch.inf)
    for share in torch.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES).tolist():
        scale = (largest * (share / reach)).clamp_min(1e-30)
        error = error_of(scale)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def weight_scales(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, pair_limit: int | None = None
) -> Tensor:
    """Return the step of each output channel of a weight (O, ...), (O,) float32, positive even for zeros.

    Args:
        importance: (O, K), weights of the squared errors of a channel's K values; None for equal ones.
        pair_limit: the largest sum of two integers of a channel, see `grid.pair_limit`; None for no limit.
    """
    rows = weight.detach().flatten(1)
    largest, second = rows.abs().amax(1), second_extremes(rows)

    def error_of(scale: Tensor) -> Tensor:
        step, integers = scale[:, None], rows / scale[:, None]
        if pair_limit is None:
            integers = integers.round_().clamp_(grid.low, grid.high)
        else:
            low, high = row_bounds(second, scale, grid, pair_limit)
            integers = integers.round_().clamp_(low[:, None], high[:, None])
        error = integers.mul_(step).sub_(rows).square_()
        return (error if importance is None else error.mul_(importance)).sum(1)

    # two values as large as the largest have half of the limit each
    widest = largest if pair_limit is None else largest * (grid.high / (pair_limit // 2))
    scale = _best_scale(grid, widest, error_of)
    return scale.clamp_min(float((scale.max() * _DEAD).clamp_min(1e-8)))


@torch.no_grad()
def set_weight_scale(quantizer: Quantizer, weight: Tensor, importance: Tensor | None = None) -> None:
    """Set the step of a weight's quantizer, and how much wider it is if sums of two integers are limited.

    Args:
        quantizer: of the weight; it is changed.
        weight, importance: as for `weight_scales`.
    """
    scale = weight_scales(weight, quantizer.grid, importance)
    if quantizer.pair_limit is not None:
        limited = weight_scales(weight, quantizer.grid, importance, quantizer.pair_limit)
        quantizer.widening.copy_((limited / scale).clamp_min(1))
        scale = scale * (quantizer.widening if quantizer.limit_pairs else 1)
    quantizer.set_scale(scale)


def activation_scale(values: Tensor, grid: Grid) -> Tensor:
    """Return the step of a tensor, () float32, from a sample (n,) of its values and its grid."""
    largest = values.abs().max()
    if not bool(largest > 0):
        return values.new_tensor(1.0)  # only zeros: any step will do

    def error_of(scale: Tensor) -> Tensor:
        return ((values / scale).round_().clamp_(grid.low, grid.high).mul_(scale) - values).square_().mean()

    return _best_scale(grid, largest, error_of)


@torch.no_grad()
def calibrate(
    student: Student, images: Tensor, *, batch_size: int, rng: torch.Generator, progress: Progress = SILENT
) -> None:
    """Set all scales of a student: of weights from themselves, of activations from a sample of their float values.

    Args:
        student: its scales are overwritten.
        images: (N, C, H, W) float32, normalized.
        rng: samples the values, about 262,144 per site.

    Raises:
        GraphError: the model computes values from the images that are not finite.
    """
    for layer in student.layers().values():
        quantizer = layer.weight_quantizer
        quantizer.floor.fill_(0)
        set_weight_scale(quantizer, layer.weight)
        quantizer.floor.copy_((quantizer.log_scale.exp().max() * _DEAD).clamp_min(1e-8))
    producers = {site.name: len(site.producers) for site in student.placement.activations}
    quantizers = {name: quantizer for name, quantizer in student.quantizers().items() if name in producers}
    batches = images.split(batch_size)

    def select(name: str, x: Tensor) -> Tensor:
        values = x[random_places(x, max(1, _SAMPLES_PER_SITE // (len(batches) * producers[name])), rng)]
        if not bool(values.isfinite().all()):
            raise GraphError(
                f"the model computes values that are not finite at {name!r}, which have no scale; "
                "check its weights, and that its input is normalized as it was trained"
            )
        return values

    with progress.task("Calibration", len(batches)) as advance:
        samples = student.collect_inputs(quantizers, batches, select, advance)
    for name, values in samples.items():
        quantizers[name].set_scale(activation_scale(values, quantizers[name].grid))
    student.round_biases_to_accumulator()
