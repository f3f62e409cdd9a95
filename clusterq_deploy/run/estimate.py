"""How long a run takes on this machine, roughly: what a pass through the model costs, at the speed of one layer."""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from calib.support.amp import has_fast_bfloat16, mixed_precision
from calib.support.flops import pass_cost
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.quantization.ptq.reconstruct import images_read
from clusterq_deploy.run.run import FP32, Run

UNCERTAIN = 3.0
"""By what factor an estimate may be off; of a depthwise model the synthesis takes more."""

# of the time of a forward pass of one image, for one image of a step
_GENERATOR_STEP, _REFINE_STEP, _TUNING_STEP = 8.0, 6.0, 4.0
_CALIBRATION = 3000.0  # passes of one image, for the search of scales
_RECONSTRUCTION = 25.0  # passes of each image, where weights have fewer than eight bits
_GEOMETRY = 4.0  # seconds of a comparison of features, for t-SNE
_TENSORS_OF_RECONSTRUCTION = 5  # of the widest layer's values, alive at a time
_COPIES_OF_IMAGES = 2  # before and after refinement
_GRADIENTS = 1.5  # what a backward pass holds, over what the forward pass kept for it
_CHANNELS, _SIDE, _IMAGES = 64, 28, 8  # of the layer that is timed
_TIMED, _FEWEST, _MOST = 0.3, 3, 200  # for so many seconds, and how often; the fastest time counts


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        forward: seconds of an image's pass through the model in float32.
        forward_mixed: the same in the precision that synthesis and the tuning of narrow widths compute in.
        memory_bytes: the most that the process, or the GPU, is expected to hold.
    """

    forward: float
    forward_mixed: float
    memory_bytes: int

    def seconds(self, stage: str, config: RunConfig, evaluated: int) -> float | None:
        """How long a stage takes; None where that is not estimated: exports, engines.

        Args:
            stage: its name, such as quantize/w8a8.
            config: the run's, as it is done.
            evaluated: images that accuracy is measured on.
        """
        kind, _, variant = stage.partition("/")
        synthesis, tuning, timing = config.synthesis, config.finetune, config.benchmark
        if kind == "synthesize":
            drawn = synthesis.generator.steps * synthesis.generator.batch_size
            refined = synthesis.images * synthesis.refine.steps
            return self.forward_mixed * (drawn * _GENERATOR_STEP + refined * _REFINE_STEP)
        if kind == "quantize":
            bits = BitWidths.parse(variant)
            own = tuning.scaled_to(bits)
            before = _CALIBRATION + (synthesis.images * _RECONSTRUCTION if bits.weights < 8 else 0)
            forward = self.forward_mixed if max(bits.weights, bits.activations) < 8 else self.forward
            return self.forward * before + forward * own.steps * own.batch_size * _TUNING_STEP
        if kind == "evaluate":
            graphs = 1 if variant == FP32 else 2 + (BitWidths.parse(variant).weights <= 4)
            return evaluated * (1 + graphs) * self.forward  # in torch, too
        if kind == "features":
            return _GEOMETRY + (synthesis.images + evaluated) * self.forward
        if kind == "benchmark":
            calls = [max(timing.min_seconds, timing.min_runs * batch * self.forward) for batch in timing.batches]
            return (1 + len(config.bits)) * sum(timing.warmup_ms / 1000 + own for own in calls)
        return None


def estimate(run: Run, variants: Sequence[BitWidths]) -> Estimate:
    """Estimate what a run takes, in a second: of a torchvision model no pass is computed, of others a few of one image.

    Others may hold tensors that are not registered, which do not go to the meta device with the module.

    Args:
        run: its model (shapes are enough), device and settings.
        variants: those to be quantized.
    """
    shapes = run.model.module
    if run.model.source == "torchvision":
        shapes = copy.deepcopy(shapes).to("meta")
    exact = _seconds_per_operation(run.device, nullcontext()) * run.pass_cost
    mixed = exact
    if has_fast_bfloat16(run.device):
        mixed = _seconds_per_operation(run.device, mixed_precision(run.device)) * run.pass_cost
    return Estimate(exact, mixed, _memory(run, shapes, variants))


def _seconds_per_operation(device: torch.device, precision: AbstractContextManager[object]) -> float:
    """Seconds for a multiply-add of `pass_cost`, by a convolution with its BatchNorm and ReLU on a device."""
    shape = (_CHANNELS, _SIDE, _SIDE)
    layer = nn.Sequential(nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1), nn.BatchNorm2d(_CHANNELS), nn.ReLU())
    layer = layer.eval().to(device).to(memory_format=torch.channels_last)
    images = torch.zeros(_IMAGES, *shape, device=device).to(memory_format=torch.channels_last)
    seconds: list[float] = []
    with torch.no_grad(), precision:
        while len(seconds) < _FEWEST or (sum(seconds) < _TIMED and len(seconds) < _MOST):
            start = time.perf_counter()
            layer(images).float().sum().item()  # waits for a GPU, too
            seconds.append(time.perf_counter() - start)
    return min(seconds) / (_IMAGES * pass_cost(layer, shape))


def _memory(run: Run, shapes: nn.Module, variants: Sequence[BitWidths]) -> int:
    """Bytes of the calibration set and of the larger of a pass with its gradient and a reconstructed layer.

    On a CPU what the process holds already is counted too: most of it are libraries.
    """
    synthesis, tuning, size = run.config.synthesis, run.config.finetune, run.model.input.size
    largest = max(synthesis.generator.batch_size, synthesis.refine.batch_size, tuning.batch_size)
    saved, widest = _pass_memory(shapes, size)
    held = largest * saved * _GRADIENTS
    if any(bits.weights < 8 for bits in variants):
        held = max(held, 4 * _TENSORS_OF_RECONSTRUCTION * min(synthesis.images, images_read(widest)) * widest)
    process = psutil.Process().memory_info().rss if run.device.type == "cpu" else 0
    return int(process + held + 4 * _COPIES_OF_IMAGES * synthesis.images * math.prod(size))


def _pass_memory(shapes: nn.Module, size: tuple[int, int, int]) -> tuple[float, int]:
    """Of an image's pass in float32: the bytes kept for the gradient of its pixels, and the most values of a layer."""
    images = torch.zeros(2, *size, device=next(shapes.buffers()).device, requires_grad=True)
    kept: dict[int, torch.UntypedStorage] = {}
    made = [1]

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other one takes its place
        return tensor

    weights = {tensor.untyped_storage()._cdata for tensor in shapes.state_dict().values()}
    with ExitStack() as hooks:
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        for layer in shapes.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                hooks.enter_context(layer.register_forward_hook(lambda _, __, y: made.append(y.numel() // len(images))))
        logits = shapes(images)  # held, for with it goes what was kept
    del logits
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights) / len(images), max(made)
