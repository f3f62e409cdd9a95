"""What rounding does to layers, fixed one by one: quantized weights are fitted, or only the biases corrected.

A layer is a linear map of patches, so the best weight for inputs that are quantized already is a least-squares
solution, and its rounding can be made to compensate for itself column by column: Frantar et al., Optimal Brain
Compression, arXiv 2208.11580, and GPTQ, arXiv 2210.17323. No gradient descent: seconds, where tuning takes minutes.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.fake_quant import (
    Bound,
    QuantizedLayer,
    group_count,
    patches_of,
    per_channel,
    pooled_dims,
)
from clusterq_deploy.quantization.ptq.calibrate import set_weight_scale
from clusterq_deploy.quantization.qat.parametrize import layer_statistics
from clusterq_deploy.quantization.reference import AT_ONCE, FloatTwin, apply_in_parts, visit_layers
from clusterq_deploy.quantization.student import Student

_CORRECTED_ON = 128  # images that biases are corrected on
_IMAGES, _FEWEST = 1024, 64  # that weights are fitted on, at most and at least
_VALUES = 1 << 28  # of a layer's outputs for all images together, to save memory: about five such tensors are alive
_DAMPING = 0.03  # of the inputs' mean variance: 0.01 follows synthetic images too closely at four-bit activations
_SHARE = 0.5  # of the way from the teacher's weight to the fitted one
_PATCHES = 1 << 17  # sampled per layer
_UNFOLDED = 1 << 24  # values of patches at a time
_WIDEST = 8192  # columns of a row; the second moments of more (VGG's first Linear has 25,088) take gigabytes
_BLOCK = 128  # columns that are rounded before the others are updated
_WITHIN = 0.49  # of a step: how far a weight may stay from the integer that it is rounded to


@torch.no_grad()
def correct_bias(
    student: Student, reference: FloatTwin, images: Tensor, *, progress: Progress = SILENT
) -> dict[str, float]:
    """Subtract each layer's mean shift from its bias, in place, in order of execution.

    Nagel et al., arXiv 1906.04721, section 4.2 and appendix D: E[y] is that of the float model on the same images,
    E[y~] that of the student, whose earlier layers are quantized and corrected already. One pass of the graph does all
    layers, with the float and the quantized values next to each other in one batch.

    Args:
        student: calibrated. Its biases are changed, and stay on the grid of their accumulator.
        reference: what the layers ought to compute.
        images: (N, C, H, W) float32, normalized; the first 128 are used.

    Returns:
        The mean shift of each corrected layer, relative to the standard deviation of its outputs. A layer without a
        bias stays as it is.
    """
    steps, shifts = student.accumulator_steps(), dict[str, float]()
    with progress.task("Bias correction", len(student.placement.weights)) as advance:

        def correct(name: str, layer: QuantizedLayer, x: Tensor, target: Tensor) -> Tensor:
            outputs: Tensor = layer(x)
            advance()
            if layer.bias is None:
                return outputs
            dims, step = pooled_dims(layer, target), steps[name]  # the step is that of `round_biases_to_accumulator`
            shift = ((outputs - target).mean(dims) / step).round() * step
            layer.bias.sub_(shift)
            shifts[name] = float(shift.abs().mean() / target.std(dims).mean().clamp_min(1e-12))
            return outputs - per_channel(shift, layer, target)

        visit_layers(student, reference, images[:_CORRECTED_ON].to(student.device), correct)
    return shifts


@torch.no_grad()
def fit_full_range_biases(student: Student, images: Tensor) -> None:
    """Fit separate biases for the weights of full range, which TensorRT's graph has, in place.

    A bias makes up for the mean of what its weight's rounding adds to the outputs. Weights that are limited in pairs
    are rounded differently from those of full range, so the means differ: by the difference of the two weights times
    the mean patch that the layer reads.

    Args:
        student: tuned; only `Quantizer.bias_shift` of its weights is changed.
        images: (N, C, H, W) float32, normalized; the first 128 are used.
    """
    with student.on_int8_grids():
        statistics = layer_statistics(student, images[:_CORRECTED_ON].to(student.device))
    layers = {n: layer for n, layer in student.layers().items() if layer.weight_quantizer.pair_limit is not None}
    limited = {name: layer.weight_quantizer(layer.weight) for name, layer in layers.items()}
    with student.without_pair_limits():
        for name, layer in layers.items():
            difference = limited[name] - layer.weight_quantizer(layer.weight)
            layer.weight_quantizer.bias_shift.copy_((difference * statistics[name][0]).flatten(1).sum(1))


@torch.no_grad()
def reconstruct(
    student: Student,
    reference: FloatTwin,
    images: Tensor,
    *,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> dict[str, tuple[float, float]]:
    """Fit weights, their scales and biases of a calibrated student, layer by layer in order of execution, in place.

    Each layer is given the inputs that the student in front of it makes, quantized, and the outputs that the float
    model has on the same images. Its weight goes half of the way from the teacher's to the least-squares fit, which
    stays near the teacher's if the inputs hardly vary: a full fit shrinks the outputs, because the inputs have rounding
    errors, and a net of such layers is unsure of everything. Its rounding is (3) of arXiv 2208.11580 in GPTQ's order;
    its bias removes the mean shift (arXiv 1906.04721, section 4.2). One pass through the graph fits all layers. A layer
    whose rows have more than 8,192 columns keeps its rounding to nearest; only its bias is corrected.

    Args:
        student: calibrated, not tuned yet: its weights must still be the reference's, except for `FloatTwin.maps`.
            They, biases and weight scales are changed, so that afterwards `in_float` is no longer the teacher.
        reference: what the layers ought to compute.
        images: (N, C, H, W) float32, normalized; the first 1,024 are used, fewer if they are large.
        rng: samples patches.
        checkpoint: keeps the fitted layers; a resumed call needs the same student as the first one.

    Returns:
        For each layer the squared error of its outputs relative to their variance, with plain rounding and after.
    """
    count = images_read(_widest_layer(student, images[:1].to(student.device)))
    fitted: dict[str, _Fitted] = {}
    if (saved := checkpoint.load("reconstruction")) is not None:
        student.load_state_dict(saved["student"])
        rng.set_state(saved["rng"])
        fitted = {name: _Fitted(**layer) for name, layer in saved["fitted"].items()}

    def state() -> State:
        layers = {name: vars(layer) for name, layer in fitted.items()}
        return {"student": student.state_dict(), "rng": rng.get_state(), "fitted": layers}

    with progress.task("Reconstruction", len(student.placement.weights)) as advance:

        def fit(name: str, layer: QuantizedLayer, x: Tensor, target: Tensor) -> Tensor:
            if (done := fitted.get(name)) is None:
                outputs, fitted[name] = _fit_layer(layer, x, target, rng)
                checkpoint.save("reconstruction", state)
            else:
                if done.bias is not None and layer.bias is not None:
                    layer.bias.copy_(done.bias)
                outputs = apply_in_parts(layer, x)
                _subtract(layer, outputs, done.shift)
            advance(1)
            return outputs

        visit_layers(student, reference, images[:count].to(student.device), fit)
    student.round_biases_to_accumulator()
    return {name: layer.errors for name, layer in fitted.items()}


def images_read(widest: int) -> int:
    """Return how many images reconstruction reads at most, if the widest layer makes `widest` values of one.

    It holds about five times what that layer makes of all of them, in float32.
    """
    return min(_IMAGES, max(_FEWEST, _VALUES // widest))


def _widest_layer(student: Student, image: Tensor) -> int:
    """Return the most values that a layer makes of one image (1, C, H, W)."""
    sizes = [1]
    with ExitStack() as hooks:
        for layer in student.layers().values():
            hooks.enter_context(layer.register_forward_hook(lambda _, __, y: sizes.append(y.numel())))
        student(image)
    return max(sizes)


@dataclass(frozen=True)
class _Fitted:
    """What was done to one layer."""

    errors: tuple[float, float]  # before and after
    bias: Tensor | None  # (O,), before it was corrected; None without one
    shift: Tensor | None  # (O,), what was subtracted from it then


def _fit_layer(layer: QuantizedLayer, x: Tensor, target: Tensor, rng: torch.Generator) -> tuple[Tensor, _Fitted]:
    """Fit a layer to its inputs and target, and return its outputs then."""
    before, bias, shift = _distance(apply_in_parts(layer, x), target, layer), None, None
    if layer.weight[0].numel() <= _WIDEST:
        _fit_weight(layer, x, target, rng)
    outputs = apply_in_parts(layer, x)
    if layer.bias is not None:
        dims = pooled_dims(layer, outputs)
        bias, shift = layer.bias.clone(), outputs.mean(dims) - target.mean(dims)
    _subtract(layer, outputs, shift)
    return outputs, _Fitted((before, _distance(outputs, target, layer)), bias, shift)


def _subtract(layer: QuantizedLayer, outputs: Tensor, shift: Tensor | None) -> None:
    """Subtract a shift (O,) from a layer's bias, and from its outputs, in place."""
    if layer.bias is not None and shift is not None:
        shift = shift.to(outputs.device)
        layer.bias.sub_(shift)
        outputs.sub_(per_channel(shift, layer, outputs))


def _distance(outputs: Tensor, target: Tensor, layer: QuantizedLayer) -> float:
    """Return the squared error of a layer's outputs relative to the target's variance, a mean over channels."""
    dims, pieces = pooled_dims(layer, target), zip(outputs.split(AT_ONCE), target.split(AT_ONCE), strict=True)
    squares = torch.stack([(a - b).square().mean(dims) * len(a) for a, b in pieces]).sum(0) / len(outputs)
    return float((squares / target.var(dims).clamp_min(1e-12)).mean())


def _fit_weight(layer: QuantizedLayer, x: Tensor, target: Tensor, rng: torch.Generator) -> None:
    """Fit a layer's weight and its scales, in place."""
    groups = group_count(layer)
    weight = layer.weight.view(groups, len(layer.weight) // groups, -1)  # (G, O, K)
    columns, rows = weight.shape[2], weight.shape[1]
    second = weight.new_zeros(groups, columns, columns)
    cross = weight.new_zeros(groups, rows, columns)
    mean, residual_mean, seen = weight.new_zeros(groups, columns, 1), weight.new_zeros(groups, rows, 1), 0
    for sampled, values in _sample_patches(layer, x, target, rng):
        remaining = values - weight @ sampled
        if seen == 0:  # moments are taken around these: around zero, inputs that hardly vary lose all digits
            pivot, residual_pivot = sampled.mean(2, keepdim=True), remaining.mean(2, keepdim=True)
        patches, residual = sampled - pivot, remaining - residual_pivot
        second += patches @ patches.mT
        cross += residual @ patches.mT
        mean += patches.sum(2, keepdim=True)
        residual_mean += residual.sum(2, keepdim=True)
        seen += patches.shape[2]
    mean, residual_mean = mean / seen, residual_mean / seen
    hessian = second / seen - mean @ mean.mT  # centred: the mean is the bias's
    slope = cross / seen - residual_mean @ mean.mT
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    floor = (_DAMPING * diagonal.mean(1)).clamp_min(1e-10)
    hessian = hessian + torch.diag_embed(floor[:, None].expand(-1, columns))
    fitted = weight + _SHARE * torch.linalg.solve(hessian, slope.mT).mT
    quantizer = layer.weight_quantizer
    importance = hessian.diagonal(dim1=1, dim2=2)[:, None].expand_as(fitted).reshape(len(layer.weight), -1)
    fitted_weight = fitted.reshape(layer.weight.shape)
    set_weight_scale(quantizer, fitted_weight, importance)
    scale = quantizer.scale.view(groups, rows)
    # the ends that rounding to nearest would have; compensation hardly moves a row's second-largest value
    ends = [end if isinstance(end, int) else end.view(groups, rows) for end in quantizer.bounds(fitted_weight)]
    layer.weight.copy_(_round_compensated(fitted, hessian, scale, *ends).view_as(layer.weight))


def _sample_patches(
    layer: QuantizedLayer, x: Tensor, target: Tensor, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield patches (G, K, n) that a layer reads, with the target (G, O, n) for them without its bias."""
    bias: Tensor | float = 0.0 if layer.bias is None else per_channel(layer.bias, layer, target)
    if isinstance(layer, nn.Linear):
        yield x.flatten(0, -2).mT[None], (target - bias).flatten(0, -2).mT[None]
        return
    places = target.shape[2] * target.shape[3]
    share = max(1, _PATCHES // len(x))
    size = max(1, _UNFOLDED // (x.shape[1] * layer.kernel_size[0] * layer.kernel_size[1] * places))
    for part, answers in zip(x.split(size), target.split(size), strict=True):
        patches = patches_of(layer, part)
        values = (answers - bias).flatten(2)
        if share < places:
            picked = torch.randperm(places, generator=rng, device=rng.device)[:share].to(x.device)
            patches, values = patches[..., picked], values[..., picked]
        yield _grouped(patches, layer.groups), _grouped(values, layer.groups)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """Return values (N, G * K, L) as (G, K, N * L)."""
    return values.transpose(0, 1).reshape(groups, values.shape[1] // groups, -1)


def _round_compensated(weight: Tensor, hessian: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """Return a weight (G, O, K) for the grid of steps and ends (G, O); later columns make up for each one's error.

    Columns whose inputs vary most come first; it is algorithm 1 of arXiv 2210.17323. What is returned rounds to its
    integers, but keeps how near it was to the next ones, so that fine-tuning can tell which weights to move over.
    """
    order = hessian.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    weight = weight.gather(2, order[:, None].expand_as(weight)).clone()
    hessian = hessian.gather(1, order[..., None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    columns = weight.shape[2]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros_like(weight[..., start:end])
        for column in range(start, end):
            values = weight[..., column] / scale
            fixed = values.round().clamp(low, high)
            kept = (fixed + (values - fixed).clamp(-_WITHIN, _WITHIN)).clamp(low, high)
            error = (values - fixed) * scale / factor[:, column, column, None]
            weight[..., column:end] -= error[..., None] * factor[:, None, column, column:end]
            weight[..., column] = kept * scale
            errors[..., column - start] = error
        weight[..., end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(weight).scatter_(2, order[:, None].expand_as(weight), weight)
