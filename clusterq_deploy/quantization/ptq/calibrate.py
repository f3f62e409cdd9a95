"""Scales that lose least: a search over candidate steps by mean squared error."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import GraphError
from clusterq_deploy.quantization.fake_quant import Quantizer, row_bounds, second_extremes
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.student import Student

_SAMPLES_A_SITE = 1 << 18
_CANDIDATES = 100
_DEAD = 1e-4  # a channel's scale is at least this share of its layer's largest


def _best_scale(grid: Grid, largest: Tensor, error_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The candidate with the smallest error, elementwise over `largest`, from 1 to 1/100 of the whole range."""
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
    """Step of each output channel of a weight (O, ...), (O,) float32, positive also for a channel of zeros.

    Args:
        weight: the weight.
        grid: the integers.
        importance: (O, K), weighs the squared errors of a channel's K values; all weigh the same without it.
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
    """Set the step of a weight's quantizer, and how much wider it is where sums of two integers are limited.

    Args:
        quantizer: of the weight; it is changed.
        weight: (O, ...) float32.
        importance: as for `weight_scales`.
    """
    scale = weight_scales(weight, quantizer.grid, importance)
    if quantizer.pair_limit is not None:
        limited = weight_scales(weight, quantizer.grid, importance, quantizer.pair_limit)
        quantizer.widening.copy_((limited / scale).clamp_min(1))
        scale = scale * (quantizer.widening if quantizer.limit_pairs else 1)
    quantizer.set_scale(scale)


def activation_scale(values: Tensor, grid: Grid) -> Tensor:
    """Step of a tensor, () float32, from a sample (n,) of its values and its grid."""
    largest = values.abs().max()
    if not bool(largest > 0):
        return values.new_tensor(1.0)  # nothing was ever seen here: any step will do

    def error_of(scale: Tensor) -> Tensor:
        return ((values / scale).round_().clamp_(grid.low, grid.high).mul_(scale) - values).square_().mean()

    return _best_scale(grid, largest, error_of)


@torch.no_grad()
def calibrate(
    student: Student, images: Tensor, *, batch_size: int, rng: torch.Generator, progress: Progress = SILENT
) -> None:
    """Set all scales of a student: weights by themselves, activations by what the images make of the float graph.

    Args:
        student: its scales are overwritten.
        images: (N, C, H, W) float32, normalized.
        batch_size: images a forward pass.
        rng: chooses the values that are looked at.

    Raises:
        GraphError: the model computes values from the images that are not finite.
    """
    for layer in student.layers().values():
        quantizer = layer.weight_quantizer
        quantizer.floor.fill_(0)
        set_weight_scale(quantizer, layer.weight)
        quantizer.floor.copy_((quantizer.log_scale.exp().max() * _DEAD).clamp_min(1e-8))
    seen = _activations(student, images, batch_size, rng, progress)
    for name, quantizer in student.quantizers().items():
        if name in seen:
            quantizer.set_scale(activation_scale(seen[name], quantizer.grid))
    student.round_biases_to_accumulator()


def _activations(
    student: Student, images: Tensor, batch_size: int, rng: torch.Generator, progress: Progress
) -> dict[str, Tensor]:
    """A random sample of the float values at each activation quantizer, about 262,144 a site."""
    device = next(student.parameters()).device
    sites = {site.name: len(site.producers) for site in student.placement.activations}
    quantizers = {name: q for name, q in student.quantizers().items() if name in sites}
    batches = images.split(batch_size)
    seen: dict[str, list[Tensor]] = {name: [] for name in quantizers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        share = max(1, _SAMPLES_A_SITE // (len(batches) * sites[name]))

        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].flatten()
            if len(values) > share:
                picked = torch.randint(len(values), (share,), generator=rng, device=rng.device)
                values = values[picked.to(values.device)]
            if not bool(values.isfinite().all()):
                raise GraphError(
                    f"the model computes values that are not finite at {name!r}, which have no scale; "
                    "check its weights, and that its input is normalized as it was trained"
                )
            seen[name].append(values)

        return record

    with ExitStack() as hooks, student.in_float(), progress.task("Calibration", len(batches)) as advance:
        for name, quantizer in quantizers.items():
            hooks.enter_context(quantizer.register_forward_pre_hook(hook(name)))
        for batch in batches:
            student(batch.to(device))
            advance(1)
    return {name: torch.cat(values) for name, values in seen.items()}
