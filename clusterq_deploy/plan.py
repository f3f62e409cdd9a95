"""What a run would do, and roughly how long: by the model's forward passes, at the speed of one layer here."""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from calib.support.amp import has_fast_bfloat16, mixed_precision
from calib.support.flops import pass_cost
from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.pipeline import stages, unavailable
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.quantization.ptq.reconstruct import images_read
from clusterq_deploy.run.manifest import MANIFEST
from clusterq_deploy.run.run import FP32, Run
from clusterq_deploy.run.stage import AnyStage

State = Literal["finished", "to do", "skipped"]

UNCERTAIN = 3.0
"""The factor by which an estimate may be wrong; the synthesis for a depthwise model takes longer."""

# forward passes of one image that one image of a step costs
_GENERATOR_STEP, _REFINE_STEP, _TUNING_STEP = 8.0, 6.0, 4.0
_CALIBRATION = 3000.0  # passes of one image, for the search of scales
_RECONSTRUCTION = 25.0  # passes of each image, for weights of fewer than eight bits
_GEOMETRY = 4.0  # seconds of a comparison of features, for t-SNE
_TENSORS_OF_RECONSTRUCTION = 5  # of the widest layer's values, in memory at a time
_COPIES_OF_IMAGES = 2  # before and after refinement
_GRADIENTS = 1.5  # memory of a backward pass, relative to what the forward pass saved for it
_CHANNELS, _SIDE, _IMAGES = 64, 28, 8  # of the timed layer
_MIN_RUNS, _MIN_SECONDS = 3, 0.3  # of it; the fastest run counts

_AMOUNTS = (
    "synthesis.images",
    "synthesis.generator.steps",
    "synthesis.generator.warmup_steps",
    "synthesis.generator.batch_size",
    "synthesis.refine.steps",
    "synthesis.refine.batch_size",
    "finetune.steps",
    "finetune.batch_size",
)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the run.

    Attributes:
        stage: its name, such as quantize/w8a8.
        state: `finished` stages are not done again; `skipped` ones cannot be done here.
        work: what it does, or why it is skipped.
        seconds: a rough estimate; None if there is none, 0 if nothing is done.
    """

    stage: str
    state: State
    work: str
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        settings: those that determine the amount of work, as the run would use them.
        scaled: the requested values of settings that are reduced because of the model's size on a CPU.
        stages: in order.
        seconds: of all stages with an estimate.
        memory_bytes: a rough estimate of the peak memory; None if nothing is to be done.
    """

    model: str
    device: str
    settings: dict[str, int]
    scaled: dict[str, int]
    stages: list[PlannedStage]
    seconds: float
    memory_bytes: int | None


def plan(config: RunConfig, out: Path, *, progress: Progress = SILENT) -> Plan:
    """Determine the state of every stage, and estimate the time of those that are to be done.

    It takes seconds, and writes nothing. If there is no run yet, a model without a file of weights is loaded as shapes.

    Raises:
        GraphError: the model cannot be captured.
        DataError: the evaluation data does not fit.
    """
    run = Run(config, out, progress=progress, shapes_only=not (out / MANIFEST).exists())
    run.check()
    states = _states(run)
    to_do = {stage.name for stage, state in states.items() if state == "to do"}
    times = time_steps(run) if to_do else None
    planned = [
        PlannedStage(
            stage.name,
            state,
            str(unavailable(stage)) if state == "skipped" else stage.kind.describe(run, stage),
            times.seconds(stage.name, run.config, run.evaluated) if times and state == "to do" else 0.0,
        )
        for stage, state in states.items()
    ]
    requested, settings = amounts(config), amounts(run.config)
    return Plan(
        model=run.model.name,
        device=run.device.type,
        settings=settings,
        scaled={name: number for name, number in requested.items() if number != settings[name]},
        stages=planned,
        seconds=sum(stage.seconds or 0.0 for stage in planned),
        memory_bytes=peak_memory(run, [b for b in run.config.widths if f"quantize/{b}" in to_do]) if to_do else None,
    )


def _states(run: Run) -> dict[AnyStage, State]:
    """Return the state of each stage; one that reads a stage that is to be done is to be done too."""
    states: dict[AnyStage, State] = {}
    to_do: set[str] = set()
    for stage in stages(run.config):
        needs = stage.kind.needs(run, stage)
        if unavailable(stage):
            states[stage] = "skipped"
        elif to_do.intersection(needs.required + needs.optional) or not run.is_finished(stage):
            states[stage] = "to do"
            to_do.add(stage.name)
        else:
            states[stage] = "finished"
    return states


def amounts(config: RunConfig) -> dict[str, int]:
    """Return the settings that determine the amount of work, by their place in `run.toml`."""
    return {name: attrgetter(name)(config) for name in _AMOUNTS}


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one image's forward pass through the model.

    Attributes:
        forward: in float32.
        forward_mixed: in the precision that synthesis and the tuning of narrow widths compute in.
    """

    forward: float
    forward_mixed: float

    def seconds(self, stage: str, config: RunConfig, evaluated: int) -> float | None:
        """Return an estimate of a stage's time on `evaluated` images; None for exports and engines, which have none."""
        kind, _, variant = stage.partition("/")
        synthesis, tuning, timing = config.synthesis, config.finetune, config.benchmark
        if kind == "synthesize":
            drawn = synthesis.generator.steps * synthesis.generator.batch_size
            refined = synthesis.images * synthesis.refine.steps
            return self.forward_mixed * (drawn * _GENERATOR_STEP + refined * _REFINE_STEP)
        if kind == "quantize":
            bits = BitWidths.parse(variant)
            steps = tuning.scaled_to(bits).steps * tuning.batch_size
            calibration = _CALIBRATION + (synthesis.images * _RECONSTRUCTION if bits.weights < 8 else 0)
            forward = self.forward_mixed if max(bits.weights, bits.activations) < 8 else self.forward
            return self.forward * calibration + forward * steps * _TUNING_STEP
        if kind == "evaluate":
            graphs = 1 if variant == FP32 else 2 + (BitWidths.parse(variant).weights <= 4)
            return evaluated * (1 + graphs) * self.forward  # in torch, too
        if kind == "features":
            return _GEOMETRY + (synthesis.images + evaluated) * self.forward
        if kind == "benchmark":
            calls = [max(timing.min_seconds, timing.min_runs * batch * self.forward) for batch in timing.batches]
            return (1 + len(config.bits)) * sum(timing.warmup_ms / 1000 + seconds for seconds in calls)
        return None


def time_steps(run: Run) -> StepTimes:
    """Return the times of the run's model on its device, by timing one layer there for at most a second."""
    forward = _seconds_per_operation(run.device, nullcontext()) * run.pass_cost
    if not has_fast_bfloat16(run.device):
        return StepTimes(forward, forward)
    return StepTimes(forward, _seconds_per_operation(run.device, mixed_precision(run.device)) * run.pass_cost)


def _seconds_per_operation(device: torch.device, precision: AbstractContextManager[object]) -> float:
    """Return the seconds of a multiply-add of `pass_cost`, in a convolution with its BatchNorm and ReLU."""
    shape = (_CHANNELS, _SIDE, _SIDE)
    layer = nn.Sequential(nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1), nn.BatchNorm2d(_CHANNELS), nn.ReLU())
    layer = layer.eval().to(device).to(memory_format=torch.channels_last)
    images = torch.zeros(_IMAGES, *shape, device=device).to(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.no_grad(), precision:
        while len(times) < _MIN_RUNS or sum(times) < _MIN_SECONDS:
            start = time.perf_counter()
            layer(images).float().sum().item()  # waits for a GPU, too
            times.append(time.perf_counter() - start)
    return min(times) / (_IMAGES * pass_cost(layer, shape))


def peak_memory(run: Run, variants: Sequence[BitWidths]) -> int:
    """Return the expected peak memory of the process, or of the GPU, in bytes.

    It is that of the calibration set and the larger of a pass with its gradient and a reconstructed layer. On a CPU the
    memory that the process has already counts too: most of it is libraries.

    Args:
        run: its model may have shapes only. A torchvision model is moved to the meta device. Other models may hold
            tensors that are not registered and would stay behind: two images are passed through them.
        variants: those to be quantized.
    """
    synthesis, tuning = run.config.synthesis, run.config.finetune
    module, size = run.model.original, run.model.input.size
    if run.model.source == "torchvision":
        module = copy.deepcopy(module).to("meta")
    saved, widest = _pass_memory(module, size)
    held = _GRADIENTS * saved * max(synthesis.generator.batch_size, synthesis.refine.batch_size, tuning.batch_size)
    if any(bits.weights < 8 for bits in variants):
        held = max(held, 4 * _TENSORS_OF_RECONSTRUCTION * min(synthesis.images, images_read(widest)) * widest)
    process = psutil.Process().memory_info().rss if run.device.type == "cpu" else 0
    images = _COPIES_OF_IMAGES * synthesis.images
    return int(process + held + 4 * images * math.prod(size))


def _pass_memory(module: nn.Module, size: tuple[int, int, int]) -> tuple[float, int]:
    """Return the bytes that a float32 pass of one image saves for its gradient, and the values of the widest layer."""
    images = torch.zeros(2, *size, device=next(module.buffers()).device, requires_grad=True)
    saved: dict[int, torch.UntypedStorage] = {}
    values = [1]

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no other one has its address
        return tensor

    weights = {tensor.untyped_storage()._cdata for tensor in module.state_dict().values()}
    with ExitStack() as hooks:
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor))
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                hooks.enter_context(
                    layer.register_forward_hook(lambda _, __, y: values.append(y.numel() // len(images)))
                )
        logits = module(images)  # held, as the saved tensors are freed with it
    del logits
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights) / len(images), max(values)
