"""The cost of a pass through a model, independent of the machine."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_OPERATIONS_PER_VALUE = 100  # multiply-adds that take as long on a CPU as writing, normalizing and reading a value


def pass_cost(model: nn.Module, size: tuple[int, int, int]) -> float:
    """Return the cost of a forward pass of one image, in multiply-adds.

    It counts those of convolutions and matrix products, and 100 for each value that such a layer writes, since layers
    with few channels are bound by memory. `size` is (channels, height, width) of an image.
    """
    written = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal written
        written += output.numel() if isinstance(output, Tensor) else 0

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    image = torch.zeros(1, *size, device=next(model.parameters()).device)
    with ExitStack() as hooks, torch.no_grad(), FlopCounterMode(display=False) as counter:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(count))
        model(image)
    return float(counter.get_total_flops()) / 2 + _OPERATIONS_PER_VALUE * written
