"""How long the steps of a run take on this machine: the real functions, timed for a few steps each.

Nothing is assumed of the machine. What is not rehearsed (export, engines) is not estimated, and what is extrapolated
(more images than were rehearsed with, fewer steps because a student starts near its teacher) makes the whole rough.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import psutil
import torch
from torch import Tensor

from calib.calibration_set import CalibrationSet
from calib.cost import pass_cost
from calib.precision import mixed_precision
from calib.progress import Advance
from calib.synthesis import SynthesisConfig, synthesize
from clusterq_deploy.config import RunConfig
from clusterq_deploy.quantize import BitWidths, finetune, initialize, make_student
from clusterq_deploy.quantize.reconstruct import images_read, widest_layer
from clusterq_deploy.run import FP32, Run

_LARGEST = 2e10  # multiply-adds of a rehearsed forward pass; larger batches are rehearsed in part
_FEWEST_IMAGES = 8
_GENERATOR_STEPS, _REFINE_STEPS, _TUNING_STEPS = 3, 3, 8  # a student near its teacher takes a quarter of its steps
_PASSES_OF_INITIALIZATION = 4  # over each image: equalisation, calibration, and both models side by side
_TENSORS_OF_RECONSTRUCTION = 5  # of the widest layer's values, alive at a time
_COPIES_OF_IMAGES = 2  # before and after refinement
_GRADIENTS = 1.5  # what a backward pass holds, over what the forward pass kept for it


@dataclass(frozen=True)
class VariantPace:
    """Seconds that a variant takes: before its first step of fine-tuning, and for each step."""

    initialization: float
    step: float


@dataclass(frozen=True)
class Pace:
    """What was measured.

    Attributes:
        generator_step, refine_step: seconds of a step of the configured batch size; None where synthesis was not asked.
        forward: seconds of an image's pass through the model.
        variants: by name.
        memory_bytes: the most that the process, or the GPU, is expected to hold.
    """

    generator_step: float | None
    refine_step: float | None
    forward: float
    variants: dict[str, VariantPace]
    memory_bytes: int

    def seconds(self, stage: str, config: RunConfig, evaluated: int) -> float | None:
        """How long a stage of a run takes, by the numbers of its steps and images; None where that is not estimated.

        Args:
            stage: its name, such as quantize/w8a8.
            config: the run's, as it is done.
            evaluated: images that accuracy is measured on.
        """
        kind, _, variant = stage.partition("/")
        if kind == "synthesize":
            return self._synthesis(config.synthesis)
        if kind == "quantize":
            own, steps = self.variants[variant], config.finetune.scaled_to(BitWidths.parse(variant)).steps
            return own.initialization + steps * own.step
        if kind == "evaluate":
            graphs = 1 if variant == FP32 else 2 + (BitWidths.parse(variant).weights <= 4)
            return evaluated * (1 + graphs) * self.forward  # in torch, too
        if kind == "features":
            return (config.synthesis.images + evaluated) * self.forward
        return self._benchmark(config) if kind == "benchmark" else None

    def _synthesis(self, config: SynthesisConfig) -> float | None:
        if self.generator_step is None or self.refine_step is None:
            return None
        batches = config.images / config.refine.batch_size
        return config.generator.steps * self.generator_step + batches * config.refine.steps * self.refine_step

    def _benchmark(self, config: RunConfig) -> float:
        timing, graphs = config.benchmark, 1 + len(config.bits)
        calls = [max(timing.min_seconds, timing.min_runs * batch * self.forward) for batch in timing.batches]
        return graphs * sum(timing.warmup_ms / 1000 + own for own in calls)


class _Stopwatch:
    """A `Progress` that notes when each task began and each of its steps was done."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        times = self.times.setdefault(description, [time.perf_counter()])
        yield lambda n=1, **figures: times.append(time.perf_counter())

    def step(self, description: str) -> float:
        """Seconds of a task's fastest step but for the first, which pays for what is made once."""
        times = self.times[description]
        steps = [after - before for before, after in pairwise(times)]
        return min(steps[1:] or steps)


def rehearse(run: Run, variants: Sequence[BitWidths], *, synthesis: bool) -> Pace:
    """Do a few steps of what a run would do, in memory alone.

    Args:
        run: its model, device and settings; its directory is not written.
        variants: those to rehearse quantization of.
        synthesis: whether to rehearse synthesis; without it the run's own images are taken, where there are any.
    """
    cost = pass_cost(run.model.module, run.model.input.size)
    most = max(_FEWEST_IMAGES, int(_LARGEST / cost))
    paces = None
    found: dict[str, VariantPace] = {}
    with run.progress.task("Rehearsal", 1 + len(variants)) as advance:
        if synthesis or not run.directory.finished("synthesize"):
            calibration, paces = _synthesis(run, most)
        else:
            images = run.calibration
            count = min(len(images), run.config.synthesis.refine.batch_size, most)
            calibration = CalibrationSet(images.images[:count], images.labels[:count])
        forward = _forward(run, calibration.images)
        advance(1)
        for bits in variants:
            found[str(bits)] = _variant(run, bits, calibration, most, forward)
            advance(1)
    generator, refine = paces if paces and synthesis else (None, None)
    return Pace(generator, refine, forward, found, _memory(run, variants))


def _synthesis(run: Run, most: int) -> tuple[CalibrationSet, tuple[float, float]]:
    """A few images, made in a few steps; seconds of a step of the generator and of refinement."""
    settings, spec, watch = run.config.synthesis, run.model.input, _Stopwatch()
    sizes = [min(part.batch_size, most) for part in (settings.generator, settings.refine)]
    generator = {"steps": _GENERATOR_STEPS, "warmup_steps": _GENERATOR_STEPS - 1, "batch_size": sizes[0]}
    refine = {"steps": min(_REFINE_STEPS, settings.refine.steps), "batch_size": sizes[1]}
    small = {
        "images": sizes[1],
        "generator": settings.generator.model_copy(update=generator),
        "refine": settings.refine.model_copy(update=refine),
    }
    made = synthesize(
        run.model.module,
        classes=run.model.classes,
        size=spec.size,
        mean=spec.mean,
        std=spec.std,
        config=settings.model_copy(update=small),
        device=run.device,
        rng=run.rng("rehearsal"),
        progress=watch,
    )
    generator_step = watch.step("Generator") * settings.generator.batch_size / sizes[0]
    refine_step = watch.step("Refinement") * settings.refine.batch_size / sizes[1] if settings.refine.steps else 0.0
    return made.calibration, (generator_step, refine_step)


@torch.no_grad()
def _forward(run: Run, images: Tensor) -> float:
    """Seconds of an image's forward pass, the second of two."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        float(run.model.module(images.to(run.device)).sum())  # waits for a GPU, too
        seconds = time.perf_counter() - start
    return seconds / len(images)


def _variant(run: Run, bits: BitWidths, calibration: CalibrationSet, most: int, forward: float) -> VariantPace:
    settings = run.config.finetune.scaled_to(bits)
    size = min(settings.batch_size, most)
    rng, watch = run.rng(f"rehearsal/{bits}"), _Stopwatch()
    start = time.perf_counter()
    student = make_student(run.model.module, bits, first_last=run.config.first_last, keep=run.config.keep)
    student = student.to(run.device)
    started = initialize(student, calibration.images, batch_size=size, rng=rng)
    more = max(0, _images_initialized(run) - len(calibration))
    initialization = time.perf_counter() - start + more * _PASSES_OF_INITIALIZATION * forward
    if not settings.steps:
        return VariantPace(initialization, 0.0)
    few = settings.model_copy(update={"steps": _TUNING_STEPS, "checkpoints": 1, "batch_size": size})
    finetune(student, started.reference, calibration, config=few, flip=False, rng=rng, progress=watch)
    return VariantPace(initialization, watch.step(f"Fine-tuning {bits}") * settings.batch_size / size)


def _images_initialized(run: Run) -> int:
    """How many images the scales and the reconstruction of a variant read."""
    return min(_images_shown(run), images_read(_widest(run)))


def _images_shown(run: Run) -> int:
    """The synthetic images and those of no class."""
    return round(run.config.synthesis.images / (1 - run.config.finetune.procedural))


def _widest(run: Run) -> int:
    student = make_student(run.model.module, BitWidths(8, 8))
    return widest_layer(student, torch.zeros(1, *run.model.input.size, device=run.device))


def _memory(run: Run, variants: Sequence[BitWidths]) -> int:
    """Bytes of the calibration set and of the larger of a pass with its gradient and a reconstructed layer.

    On a CPU what the process holds already is counted too: most of it are libraries.
    """
    synthesis, tuning = run.config.synthesis, run.config.finetune
    saved, values = _saved_for_gradients(run), math.prod(run.model.input.size)
    largest = max(synthesis.generator.batch_size, synthesis.refine.batch_size, tuning.batch_size)
    held = largest * saved * _GRADIENTS
    if any(bits.weights < 8 for bits in variants):
        held = max(held, 4 * _TENSORS_OF_RECONSTRUCTION * _images_initialized(run) * _widest(run))
    process = psutil.Process().memory_info().rss if run.device.type == "cpu" else 0
    images = _COPIES_OF_IMAGES * synthesis.images
    if tuning.procedural:  # all that a student is shown, before and after it is mixed, beside the synthetic ones
        images = synthesis.images + 2 * _images_shown(run)
    return int(process + held + 4 * images * values)


def _saved_for_gradients(run: Run) -> float:
    """Bytes that the model's forward pass keeps for the gradient of an image's pixels."""
    images = torch.zeros(2, *run.model.input.size, device=run.device, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {tensor.untyped_storage().data_ptr() for tensor in run.model.module.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed_precision(run.device):
        logits = run.model.module(images)  # held, for with it goes what was kept
    del logits
    return sum(size for place, size in kept.items() if place not in weights) / len(images)
