"""Make the calibration set: the model goes in, images and a preview of them come out."""

import io
import math

from calib.calibration_set import CalibrationSet
from calib.synthesis import Synthesis
from calib.synthesis import synthesize as make_images
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import IMAGES, PREVIEW, Run
from clusterq_deploy.run.stage import Needs

NAME = "synthesize"


def needs(_: Run, __: str) -> Needs:
    """Nothing: it is the first one."""
    return Needs()


def inputs(run: Run, _: str) -> Result:
    """The settings of synthesis."""
    return {"settings": run.config.synthesis.model_dump(mode="json")}


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Make the images in batches that fit the memory."""
    settings, spec = run.config.synthesis, run.model.input

    def images(divisor: int) -> Synthesis:
        return make_images(
            run.model.module,
            classes=run.model.classes,
            size=spec.size,
            mean=spec.mean,
            std=spec.std,
            config=settings.with_smaller_batches(divisor),
            device=run.device,
            rng=run.rng(NAME),
            progress=run.progress,
            checkpoint=run.checkpoint(NAME, inputs(run, variant), divisor),
        )

    made, divisor = retry_on_oom(images, "synthesis")
    provenance = run.provenance("calibration", synthesis=settings.model_dump(mode="json"))
    calibration = CalibrationSet(made.calibration.images, made.calibration.labels, provenance)
    preview = io.BytesIO()
    calibration.preview(spec.mean, spec.std).save(preview, "PNG")
    names = [run.directory.write(IMAGES, calibration.to_bytes()), run.directory.write(PREVIEW, preview.getvalue())]
    result = {
        "images": len(calibration),
        "teacher_top1": made.teacher_top1,
        "within_class_diversity": made.within_class_diversity,
        "flip": made.flip,
        "recipe": settings.recipe,
        "losses": made.losses,
        "batch_divisor": divisor,
    }
    return result, names


def describe(run: Run, _: str) -> str:
    """Count the steps and the images."""
    synthesis = run.config.synthesis
    generator, refine = synthesis.generator, synthesis.refine
    batches = math.ceil(synthesis.images / refine.batch_size)
    return (
        f"{generator.steps:,} steps of {generator.batch_size}, then {synthesis.images:,} images: "
        f"{refine.steps:,} steps for each of {batches} batches"
    )
