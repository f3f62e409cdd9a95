"""The time of a step of each stage, relative to a bare pass of the same nets over a batch of the same size.

Bare is what no implementation can do without: a generator step is the generator, the model and back; a refinement step
the model and back to the pixels; a tuning step the model, the student in float and back; an evaluation the runner's
session alone. Both are timed in turn, in one process.

    python benchmarks/speed.py resnet20_cifar10 --models-file models.py
    python benchmarks/speed.py digits --out benchmarks/results/speed.json
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from diversity import make_trainer, write_results
from torch import Tensor

from calib.calibration_set import CalibrationSet
from calib.refine import RefineConfig, natural_noise, refine
from calib.support.amp import has_fast_bfloat16, mixed_precision
from calib.support.progress import Advance
from calib.training import GeneratorConfig
from clusterq_deploy.evaluation.accuracy import predictions
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.lowering import export_graph, lower
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.quantization import BitWidths, FinetuneConfig, Student, finetune, make_student
from clusterq_deploy.quantization.ptq.ptq import equalize_and_calibrate
from clusterq_deploy.quantization.reference import FloatTwin
from clusterq_deploy.run.run import resolve_device
from clusterq_deploy.runtimes.runners import OnnxRunner

TARGETS = {"generator": 1.5, "refinement": 1.5, "tuning": 1.6, "evaluation": 1.1}
"""The largest ratio that is wanted of each stage."""
_ROUNDS, _BARE, _WARMUP = 3, 4, 3
_IMAGES = 256


class Clock:
    """A progress that keeps the time between two advances, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.steps = device, list[float]()

    @contextmanager
    def task(self, _: str, __: int) -> Iterator[Advance]:
        """Time the steps of a task."""
        last = now(self._device)

        def advance(n: int = 1, **_: object) -> None:
            nonlocal last
            present = now(self._device)
            if n:  # 0 says where a resumed task starts
                self.steps.append(present - last)
            last = present

        yield advance


def now(device: torch.device) -> float:
    """Return the time in milliseconds at which the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def times(work: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return how long each of so many calls takes, in milliseconds."""
    clock = Clock(device)
    with clock.task("", count) as advance:
        for _ in range(count):
            work()
            advance()
    return clock.steps


def ratio(bare: Callable[[], object], steps: Callable[[], list[float]], device: torch.device) -> dict[str, float]:
    """Time a bare pass and steps in turn; return the medians in milliseconds, and their ratio."""
    bare_ms, step_ms = list[float](), list[float]()
    for _ in range(_WARMUP):
        bare()
    for _ in range(_ROUNDS):
        bare_ms += times(bare, _BARE, device)
        step_ms += steps()
    of = {"bare_ms": statistics.median(bare_ms), "step_ms": statistics.median(step_ms)}
    return {**of, "ratio": of["step_ms"] / of["bare_ms"]}


def generator(model: LoadedModel, device: torch.device, steps: int) -> dict[str, float]:
    """Time the generator's training."""
    trainer = make_trainer(model, GeneratorConfig(), device, seed=0)
    trainer.initialize_centroids()

    def bare() -> None:
        labels = trainer.batch_labels()
        with mixed_precision(device):
            logits = model.module(trainer.generator(trainer.latents(len(labels)), labels))
        trainer.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()

    return ratio(bare, lambda: times(lambda: trainer.step(warmup=False), steps, device), device)


def refinement(model: LoadedModel, images: Tensor, device: torch.device, steps: int) -> dict[str, float]:
    """Time the refinement of a batch of images (N, C, H, W)."""
    teacher, batch = model.module.to(memory_format=torch.channels_last), images[: RefineConfig().batch_size]
    labels = torch.zeros(len(batch), dtype=torch.long, device=device)
    config = RefineConfig(steps=steps + _WARMUP, longer=1)

    def bare() -> None:
        pixels = batch.clone().requires_grad_()
        with mixed_precision(device):
            logits = teacher(pixels.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels).backward()

    def timed() -> list[float]:
        clock, rng, ends = Clock(device), torch.Generator(device).manual_seed(0), (batch.amin(), batch.amax())
        limits = (ends[0].view(1, 1, 1, 1), ends[1].view(1, 1, 1, 1))
        refine(teacher, batch, labels, config=config, limits=limits, flip=True, rng=rng, progress=clock)
        return clock.steps[_WARMUP:]

    return ratio(bare, timed, device)


def tuning(
    student: Student, reference: FloatTwin, images: Tensor, device: torch.device, steps: int
) -> dict[str, float]:
    """Time the fine-tuning of a calibrated student."""
    twin = copy.deepcopy(student).to(memory_format=torch.channels_last)
    config = FinetuneConfig(steps=10 * (steps + _WARMUP), checkpoints=1)  # of a student near the teacher a tenth
    calibration = CalibrationSet(images.cpu(), torch.zeros(len(images), dtype=torch.long))
    batch = images[: config.batch_size].contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        with mixed_precision(device):
            with torch.no_grad(), reference.graph.in_float():
                target = reference.graph(batch)
            with twin.in_float():
                logits = twin(batch)
        F.mse_loss(logits.float(), target.float()).backward()

    def timed() -> list[float]:
        clock, rng = Clock(device), torch.Generator(device).manual_seed(0)
        trained = copy.deepcopy(student)
        finetune(trained, reference, calibration, config=config, flip=True, rng=rng, progress=clock)
        return clock.steps[_WARMUP : _WARMUP + 4 * steps]

    return ratio(bare, timed, device)


def evaluation(student: Student, images: Tensor, threads: int) -> dict[str, float]:
    """Time the evaluation of a graph in ONNX Runtime on images (N, C, H, W), per batch."""
    device, batch_size = torch.device("cpu"), FinetuneConfig().batch_size
    channels, height, width = images.shape[1:]
    graph = lower(export_graph(student, (channels, height, width)), student, "onnxruntime")
    data = EvaluationSet.from_images("noise", images.cpu().numpy())
    batch = next(data.batches(batch_size))[0]
    with OnnxRunner(graph.SerializeToString(), threads=threads) as runner:

        def timed() -> list[float]:
            clock = Clock(device)
            predictions(runner, data, batch_size, clock)
            return clock.steps

        return ratio(lambda: runner.infer(batch), timed, device)


def measure(name: str, weights: str | None, steps: int, device: torch.device) -> dict[str, Any]:
    """Return the times of all stages of a model."""
    model = load_model(name, weights=weights, device=device)
    images = natural_noise(torch.Size((_IMAGES, *model.input.size)), torch.Generator(device).manual_seed(0))
    stages = {"generator": generator(model, device, steps), "refinement": refinement(model, images, device, steps)}
    student = make_student(model.module, BitWidths(4, 4))
    rng = torch.Generator(device).manual_seed(0)
    reference = equalize_and_calibrate(student, images, batch_size=FinetuneConfig().batch_size, rng=rng).reference
    stages["tuning"] = tuning(student, reference, images, device, steps)
    stages["evaluation"] = evaluation(student.cpu(), images, torch.get_num_threads())
    return {
        "model": name.rpartition(":")[2],
        "input_size": model.input.size,
        "precision": "bfloat16" if has_fast_bfloat16(device) else "float32",
        "threads": torch.get_num_threads(),
        "stages": stages,
    }


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--models-file", type=click.Path(path_type=Path), help="MODELS are its factories.")
@click.option("--weights", help="As for clusterq run.")
@click.option("--steps", default=10, show_default=True, help="Timed steps in a round, of which there are three.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    models: tuple[str, ...], models_file: Path | None, weights: str | None, steps: int, device: str, out: Path | None
) -> None:
    """Time MODELS, print a line for each stage, and write the results."""
    chosen, rows = resolve_device(device), []
    for name in models:
        rows.append(measure(f"{models_file}:{name}" if models_file else name, weights, steps, chosen))
        for stage, of in rows[-1]["stages"].items():
            print("{}, {}: bare {bare_ms:.1f} ms, step {step_ms:.1f} ms, ratio {ratio:.2f}".format(name, stage, **of))
    if out:
        write_results(out, chosen, {"wanted": TARGETS, "rows": rows})


if __name__ == "__main__":
    main()
