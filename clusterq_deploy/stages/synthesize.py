"""Make the calibration set: the model goes in, images and a preview of them come out."""

import io
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from calib.bn_statistics import never_trained
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.progress import Progress
from calib.synthesis import Synthesis, SynthesisConfig
from calib.synthesis import synthesize as make_images
from clusterq_deploy.lowering import VERIFIED_IMAGES
from clusterq_deploy.models import InputSpec
from clusterq_deploy.models.capture import logits_only, probabilities_of, require_same
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.report.text import statistics_warning
from clusterq_deploy.results.stages import SynthesisResult
from clusterq_deploy.run.run import IMAGES, PREVIEW, Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs

logger = logging.getLogger(__name__)

NAME, RESULT = "synthesize", SynthesisResult


def needs(_: Run, __: AnyStage) -> Needs:
    """Require nothing."""
    return Needs()


def inputs(run: Run, _: AnyStage) -> Json:
    """Return the settings of synthesis."""
    return {"settings": run.config.synthesis.model_dump(mode="json")}


def work(run: Run, stage: AnyStage) -> tuple[SynthesisResult, list[str]]:
    """Make the images in batches that fit the memory."""
    settings, spec = run.config.synthesis, run.model.input
    is_trained = run.config.weights != "none"
    new = never_trained(run.model.module)
    if is_trained and new:
        logger.warning("%s: %s", run.model.name, statistics_warning(None, new=True))
    synthesis, divisor = synthesize_in_memory(
        run.model.module,
        spec,
        run.model.classes,
        settings,
        rng=lambda: run.rng(stage.name),
        progress=run.progress,
        checkpoint=lambda divisor: run.checkpoint(stage, divisor),
    )
    distance = synthesis.statistics_distance
    if is_trained and not new and (warning := statistics_warning(distance, new=False)):
        logger.warning("%s: %s", run.model.name, warning)
    provenance = run.provenance("calibration", synthesis=settings.model_dump(mode="json"))
    calibration = replace(synthesis.calibration, provenance=provenance)
    sample = calibration.images[:VERIFIED_IMAGES].to(run.device)
    require_same(run.model.original, run.model.module, sample, "the captured graph")
    preview = io.BytesIO()
    calibration.preview(spec.mean, spec.std).save(preview, "PNG")
    files = [run.directory.write(IMAGES, calibration.to_bytes()), run.directory.write(PREVIEW, preview.getvalue())]
    result = SynthesisResult(
        images=len(calibration),
        teacher_top1=synthesis.teacher_top1,
        within_class_diversity=synthesis.within_class_diversity,
        flip=synthesis.flip,
        recipe=settings.recipe,
        losses=synthesis.losses,
        batch_divisor=divisor,
        statistics_distance=distance,
        new_statistics=new,
        probabilities=probabilities_of(run.model.module),
    )
    return result, files


def describe(run: Run, _: AnyStage) -> str:
    """Count the steps and the images."""
    synthesis = run.config.synthesis
    generator, refine = synthesis.generator, synthesis.refine
    batches = math.ceil(synthesis.images / refine.batch_size)
    return (
        f"{generator.steps:,} steps of {generator.batch_size}, then {synthesis.images:,} images: "
        f"{refine.steps:,} steps for each of {batches} batches"
    )


def synthesize_in_memory(
    model: nn.Module,
    spec: InputSpec,
    classes: int,
    config: SynthesisConfig,
    *,
    rng: Callable[[], torch.Generator],
    progress: Progress,
    checkpoint: Callable[[int], Checkpoint] = lambda _: NOWHERE,
) -> tuple[Synthesis, int]:
    """Make images in batches that fit the memory; return them and the divisor of the batch sizes in `config`.

    `rng` returns a new generator on the model's device for each attempt, `checkpoint` the checkpoint of a divisor; for
    the rest, and other errors, see `calib.synthesis.synthesize`.

    Raises:
        OutOfMemoryError: the smallest batches do not fit the memory.
    """

    def attempt(divisor: int) -> Synthesis:
        source = rng()
        return make_images(
            model,
            classes=classes,
            **spec.model_dump(include={"size", "mean", "std"}),
            config=config.with_smaller_batches(divisor),
            device=source.device,
            rng=source,
            progress=progress,
            checkpoint=checkpoint(divisor),
        )

    with logits_only(model):
        return retry_on_oom(attempt, "synthesis")
