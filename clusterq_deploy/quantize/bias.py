"""Bias correction: what quantization adds to the mean of a layer's outputs is taken from its bias."""

from typing import Any

import torch
from torch import Tensor, fx

from clusterq_deploy.quantize.quantizer import QuantizedConv2d, QuantizedLinear, Quantizer, by_channel, pooled_dims
from clusterq_deploy.quantize.student import Student

_IMAGES = 128


@torch.no_grad()
def correct_bias(student: Student, images: Tensor, *, count: int = _IMAGES) -> dict[str, float]:
    """Subtract each layer's mean shift from its bias, in place, in order of execution.

    Nagel et al., arXiv 1906.04721, section 4.2 and appendix D: E[y] is that of the float model on the same images,
    E[y~] that of the student, whose layers in front are quantized and corrected already. One pass of the graph
    does all layers, with the float and the quantized values side by side in one batch.

    Args:
        student: calibrated, not tuned yet: its float weights must still be the teacher's, for they say what the
            layers ought to compute. Its biases are changed, and stay on the grid of their accumulator.
        images: (N, C, H, W) float32, normalized; the first `count` are used.
        count: how many images.

    Returns:
        The mean shift of each corrected layer, relative to its outputs' mean deviation. A layer without a bias
        stays as it is.
    """
    device = next(student.parameters()).device
    batch = images[:count].to(device)
    corrector = _Corrector(student.net, student.accumulator_steps())
    corrector.run(torch.cat([batch, batch]))
    return corrector.shifts


class _Corrector(fx.Interpreter):
    """Runs a graph on a batch whose first half stays in float and whose second half is quantized."""

    def __init__(self, net: fx.GraphModule, steps: dict[str, Tensor]) -> None:
        super().__init__(net)
        self._steps = steps
        self.shifts: dict[str, float] = {}

    def call_module(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if not isinstance(module, Quantizer | QuantizedConv2d | QuantizedLinear):
            return super().call_module(target, args, kwargs)
        (x,) = args
        if not isinstance(x, Tensor):
            raise TypeError(f"{target} was called with {type(x).__name__}, expected one tensor")
        exact, rounded = x.chunk(2)
        if isinstance(module, Quantizer):
            return torch.cat([exact, module(rounded)])
        module.weight_quantizer.enabled = False
        exact = module(exact)
        module.weight_quantizer.enabled = True
        rounded = module(rounded)
        if module.bias is not None:
            dims = pooled_dims(module, exact)
            step = self._steps[str(target)]  # the bias stays on its accumulator's grid, as `settle` wants it
            shift = ((rounded - exact).mean(dims) / step).round() * step
            module.bias.sub_(shift)
            rounded = rounded - by_channel(shift, module, exact)
            spread = exact.std(dims).mean().clamp_min(1e-12)
            self.shifts[str(target)] = float(shift.abs().mean() / spread)
        return torch.cat([exact, rounded])
