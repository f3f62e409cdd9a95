"""Bias correction: what quantization adds to the mean of a layer's outputs is taken from its bias."""

import torch
from torch import Tensor

from calib.support.progress import SILENT, Advance, Progress
from clusterq_deploy.quantization.fake_quant import QuantizedLayer, by_channel, pooled_dims
from clusterq_deploy.quantization.qat.parametrize import layer_statistics
from clusterq_deploy.quantization.reference import FloatTwin, TwinInterpreter
from clusterq_deploy.quantization.student import Student

_IMAGES = 128


@torch.no_grad()
def correct_bias(
    student: Student,
    images: Tensor,
    *,
    reference: FloatTwin | None = None,
    count: int = _IMAGES,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Subtract each layer's mean shift from its bias, in place, in order of execution.

    Nagel et al., arXiv 1906.04721, section 4.2 and appendix D: E[y] is that of the float model on the same images,
    E[y~] that of the student, whose layers in front are quantized and corrected already. One pass of the graph
    does all layers, with the float and the quantized values side by side in one batch.

    Args:
        student: calibrated. Its biases are changed, and stay on the grid of their accumulator.
        images: (N, C, H, W) float32, normalized; the first `count` are used.
        reference: what the layers ought to compute; None for what the student's own do in float.
        count: how many images.
        progress: shows how far it is.

    Returns:
        The mean shift of each corrected layer, relative to its outputs' mean deviation. A layer without a bias
        stays as it is.
    """
    device = next(student.parameters()).device
    batch = images[:count].to(device)
    with progress.task("Bias correction", len(student.placement.weights)) as advance:
        corrector = _Corrector(student, reference, advance)
        corrector.compare(batch)
    return corrector.shifts


@torch.no_grad()
def fit_full_range_biases(student: Student, images: Tensor, *, count: int = _IMAGES) -> None:
    """Give the weights of full range, which TensorRT's graph has, biases of their own, in place.

    A bias makes up for the mean of what its weight's rounding adds to the outputs. Weights that are limited in pairs
    are rounded otherwise than those of full range, so their means differ: by the difference of the two times the mean
    patch that the layer reads.

    Args:
        student: tuned; only `Quantizer.bias_shift` of its weights is changed.
        images: (N, C, H, W) float32, normalized; the first `count` are used.
        count: how many images.
    """
    device = next(student.parameters()).device
    with student.on_int8_grids():
        statistics = layer_statistics(student, images[:count].to(device))
    layers = {name: own for name, own in student.layers().items() if own.weight_quantizer.pair_limit is not None}
    limited = {name: layer.weight_quantizer(layer.weight) for name, layer in layers.items()}
    with student.without_pair_limits():
        for name, layer in layers.items():
            difference = limited[name] - layer.weight_quantizer(layer.weight)
            layer.weight_quantizer.bias_shift.copy_((difference * statistics[name][0]).flatten(1).sum(1))


class _Corrector(TwinInterpreter):
    def __init__(self, student: Student, reference: FloatTwin | None, advance: Advance) -> None:
        super().__init__(student, reference)
        self._advance = advance
        self._steps = student.accumulator_steps()
        self.shifts: dict[str, float] = {}

    def layer(self, name: str, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> Tensor:
        """The layer's answer after its bias was corrected."""
        answer: Tensor = layer(x)
        self._advance()
        if layer.bias is None:
            return answer
        dims = pooled_dims(layer, wanted)
        step = self._steps[name]  # the bias stays on its accumulator's grid, as `round_biases_to_accumulator` wants it
        shift = ((answer - wanted).mean(dims) / step).round() * step
        layer.bias.sub_(shift)
        spread = wanted.std(dims).mean().clamp_min(1e-12)
        self.shifts[name] = float(shift.abs().mean() / spread)
        return answer - by_channel(shift, layer, wanted)
