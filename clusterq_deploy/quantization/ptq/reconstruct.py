"""Layer-wise reconstruction: each layer's quantized weight is fitted to what the layer computes in float.

A layer is a linear map of patches, so the best weight for inputs that are quantized already is a least-squares
solution, and its rounding can be made to compensate for itself column by column: Frantar et al., Optimal Brain
Compression, arXiv 2208.11580, and GPTQ, arXiv 2210.17323. No gradient descent: seconds, where tuning takes minutes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.support.checkpoint import NOWHERE, Checkpoint, State
from calib.support.progress import SILENT, Progress
from clusterq_deploy.quantization.fake_quant import Bound, QuantizedLayer, by_channel, padded, pooled_dims
from clusterq_deploy.quantization.ptq.calibrate import set_weight_scale
from clusterq_deploy.quantization.reference import AT_ONCE, FloatTwin, TwinInterpreter, by_parts
from clusterq_deploy.quantization.student import Student

_IMAGES = 1024
_VALUES = 1 << 28  # of a layer's outputs for all images together, for memory's sake; about five such tensors are alive
_FEWEST = 64
_DAMPING = 0.03  # of the inputs' mean variance: keeps to the teacher's weight where the images say little
_SHARE = 0.5  # of the way from the teacher's weight to the fitted one
_PATCHES = 1 << 17  # looked at in a layer
_UNFOLDED = 1 << 24  # values at a time
_WIDEST = 8192  # columns of a row; the second moments of more (VGG's first Linear has 25,088) take gigabytes
_BLOCK = 128  # columns that are rounded before the others hear of it


@torch.no_grad()
def reconstruct(
    student: Student,
    images: Tensor,
    *,
    rng: torch.Generator,
    reference: FloatTwin | None = None,
    count: int | None = None,
    damping: float = _DAMPING,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> dict[str, tuple[float, float]]:
    """Fit weights, their scales and biases of a calibrated student, layer by layer in order of execution, in place.

    Each layer is given the inputs that the student in front of it makes, quantized, and the outputs that the float
    model has on the same images. Its weight goes half of the way from the teacher's to the least-squares fit, which
    stays near the teacher's where the inputs hardly vary: the whole fit takes rounding errors of the inputs for a
    reason to answer less, and a net of such layers is too unsure of everything. Its rounding is (3) of arXiv 2208.11580
    in GPTQ's order; its bias takes the mean shift away (arXiv 1906.04721, section 4.2). One pass of the graph does all
    layers. A layer whose rows have more than 8,192 columns keeps its rounding to nearest, and has its bias corrected
    alone.

    Args:
        student: calibrated, not tuned yet: its weights must still be the reference's, but for `FloatTwin.maps`.
            They, biases and weight scales are changed, so that afterwards `in_float` is no longer the teacher.
        images: (N, C, H, W) float32, normalized; the first `count` are used.
        rng: chooses the patches that are looked at.
        reference: what the layers ought to compute; None for what the student's own do in float.
        count: how many images; None for 1,024, fewer if they are large.
        damping: how strongly a weight is held near the teacher's, as a share of the inputs' mean variance. Fitted
            freely (0.01) it follows synthetic images too closely where activations have four bits.
        checkpoint: keeps the layers that are fitted; the student must come as it came the first time.

    Returns:
        For each layer the squared error of its outputs relative to their variance, with plain rounding and after.
    """
    device = next(student.parameters()).device
    if count is None:
        count = images_read(widest_layer(student, images[:1].to(device)))
    batch = images[:count].to(device)
    with progress.task("Reconstruction", len(student.placement.weights)) as advance:
        pass_ = _Reconstructor(student, reference, rng, damping, advance, checkpoint)
        pass_.compare(batch)
    student.round_biases_to_accumulator()
    return {name: own.errors for name, own in pass_.fitted.items()}


def images_read(widest: int) -> int:
    """How many images reconstruction reads at most, for a student whose widest layer makes so many values of one.

    It holds about five times what that layer makes of all of them, in float32.
    """
    return min(_IMAGES, max(_FEWEST, _VALUES // widest))


def widest_layer(student: Student, image: Tensor) -> int:
    """The most values that a layer makes of one image (1, C, H, W)."""
    sizes = [1]
    with ExitStack() as hooks:
        for layer in student.layers().values():
            hooks.enter_context(layer.register_forward_hook(lambda _, __, y: sizes.append(y.numel())))
        student(image)
    return max(sizes)


@dataclass(frozen=True)
class _Fitted:
    """A layer that is done.

    Attributes:
        errors: before and after.
        bias, shift: the bias (O,) before it was corrected, and what was taken from it; None where it has no bias.
    """

    errors: tuple[float, float]
    bias: Tensor | None
    shift: Tensor | None


class _Reconstructor(TwinInterpreter):
    """Fits each layer on the way through the graph, but those that a checkpoint has."""

    def __init__(
        self,
        student: Student,
        reference: FloatTwin | None,
        rng: torch.Generator,
        damping: float,
        advance: Callable[..., None],
        checkpoint: Checkpoint,
    ) -> None:
        super().__init__(student, reference)
        self._student, self._rng, self._damping, self._advance = student, rng, damping, advance
        self._checkpoint = checkpoint
        self.fitted: dict[str, _Fitted] = {}
        if (kept := checkpoint.load("reconstruction")) is not None:
            student.load_state_dict(kept["student"])
            rng.set_state(kept["rng"])
            self.fitted = {name: _Fitted(**own) for name, own in kept["fitted"].items()}

    def layer(self, name: str, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> Tensor:
        """The layer's answer after it was fitted."""
        if (done := self.fitted.get(name)) is None:
            answer = self._fit(name, layer, x, wanted)
        else:
            if done.bias is not None and layer.bias is not None:
                layer.bias.copy_(done.bias)
            answer = by_parts(layer, x)
            _shift(layer, answer, done.shift)
        self._advance(1)
        if done is None:
            self._checkpoint.save("reconstruction", self._state)
        return answer

    def _fit(self, name: str, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> Tensor:
        before, bias, shift = _distance(by_parts(layer, x), wanted, layer), None, None
        if layer.weight[0].numel() <= _WIDEST:
            _fit(layer, x, wanted, self._damping, self._rng)
        answer = by_parts(layer, x)
        if layer.bias is not None:
            dims = pooled_dims(layer, answer)
            bias, shift = layer.bias.clone(), answer.mean(dims) - wanted.mean(dims)
        _shift(layer, answer, shift)
        self.fitted[name] = _Fitted((before, _distance(answer, wanted, layer)), bias, shift)
        return answer

    def _state(self) -> State:
        return {
            "student": self._student.state_dict(),
            "rng": self._rng.get_state(),
            "fitted": {name: vars(own) for name, own in self.fitted.items()},
        }


def _shift(layer: QuantizedLayer, answer: Tensor, shift: Tensor | None) -> None:
    """Take a shift (O,) from a layer's bias, and from its answer, in place."""
    if layer.bias is not None and shift is not None:
        shift = shift.to(answer.device)
        layer.bias.sub_(shift)
        answer.sub_(by_channel(shift, layer, answer))


def _distance(found: Tensor, wanted: Tensor, layer: QuantizedLayer) -> float:
    dims, pieces = pooled_dims(layer, wanted), zip(found.split(AT_ONCE), wanted.split(AT_ONCE), strict=True)
    squares = torch.stack([(a - b).square().mean(dims) * len(a) for a, b in pieces]).sum(0) / len(found)
    return float((squares / wanted.var(dims).clamp_min(1e-12)).mean())


def _fit(layer: QuantizedLayer, x: Tensor, wanted: Tensor, damping: float, rng: torch.Generator) -> None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight.view(groups, len(layer.weight) // groups, -1)  # (G, O, K)
    columns, rows = weight.shape[2], weight.shape[1]
    second = weight.new_zeros(groups, columns, columns)
    cross = weight.new_zeros(groups, rows, columns)
    first, target, seen = weight.new_zeros(groups, columns, 1), weight.new_zeros(groups, rows, 1), 0
    for patches, values in _samples(layer, x, wanted, groups, rng):
        second += patches @ patches.mT
        missing = values - weight @ patches
        cross += missing @ patches.mT
        first += patches.sum(2, keepdim=True)
        target += missing.sum(2, keepdim=True)
        seen += patches.shape[2]
    hessian = second / seen - (first / seen) @ (first / seen).mT  # centred: the mean is the bias's
    slope = cross / seen - (target / seen) @ (first / seen).mT
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    floor = (damping * diagonal.mean(1)).clamp_min(1e-10)
    hessian = hessian + torch.diag_embed(floor[:, None].expand(-1, columns))
    fitted = weight + _SHARE * torch.linalg.solve(hessian, slope.mT).mT
    quantizer = layer.weight_quantizer
    importance = hessian.diagonal(dim1=1, dim2=2)[:, None].expand_as(fitted).reshape(len(layer.weight), -1)
    whole = fitted.reshape(layer.weight.shape)
    set_weight_scale(quantizer, whole, importance)
    scale = quantizer.scale.view(groups, rows)
    # the ends that rounding to nearest would have; what is made up for moves a row's second-largest value but little
    ends = [e if isinstance(e, int) else e.view(groups, rows) for e in quantizer.bounds(whole)]
    layer.weight.copy_(_rounded(fitted, hessian, scale, *ends).view_as(layer.weight))


def _samples(
    layer: QuantizedLayer, x: Tensor, wanted: Tensor, groups: int, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches (G, K, n) that a layer reads, with the outputs (G, O, n) wanted for them, without its bias."""
    bias: Tensor | float = 0.0 if layer.bias is None else by_channel(layer.bias, layer, wanted)
    if isinstance(layer, nn.Linear):
        yield x.flatten(0, -2).mT[None], (wanted - bias).flatten(0, -2).mT[None]
        return
    places = wanted.shape[2] * wanted.shape[3]
    share = max(1, _PATCHES // len(x))
    size = max(1, _UNFOLDED // (x.shape[1] * layer.kernel_size[0] * layer.kernel_size[1] * places))
    for part, answers in zip(x.split(size), wanted.split(size), strict=True):
        patches = F.unfold(padded(layer, part), layer.kernel_size, layer.dilation, 0, layer.stride)
        values = (answers - bias).flatten(2)
        if share < places:
            picked = torch.randperm(places, generator=rng, device=rng.device)[:share].to(x.device)
            patches, values = patches[..., picked], values[..., picked]
        yield _grouped(patches, groups), _grouped(values, groups)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(N, G * K, L) as (G, K, N * L)."""
    return values.transpose(0, 1).reshape(groups, values.shape[1] // groups, -1)


def _rounded(weight: Tensor, hessian: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """The weight (G, O, K) on the grid of steps and ends (G, O); each column's error is made up for by those after it.

    Columns whose inputs vary most come first.  # algorithm 1 in arXiv 2210.17323
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
            own = weight[..., column]
            fixed = (own / scale).round().clamp(low, high) * scale
            error = (own - fixed) / factor[:, column, column, None]
            weight[..., column:end] -= error[..., None] * factor[:, None, column, column:end]
            weight[..., column] = fixed
            errors[..., column - start] = error
        weight[..., end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(weight).scatter_(2, order[:, None].expand_as(weight), weight)
