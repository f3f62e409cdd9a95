"""Measure the cost of quantizing each layer: the model and images go in, a cost per layer comes out."""

from typing import Any

import torch

from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization import BitWidths, judged_views, make_student, sensitivities
from clusterq_deploy.results.stages import Sensitivity, SensitivityResult
from clusterq_deploy.run.run import Run
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.stages import synthesize

NAME, RESULT = "sensitivity", SensitivityResult
PLACEMENT = {"first_last", "keep", "cpu"}
"""The settings of a run that determine, together with its bits, the grids of a variant."""
FORMER_SETTINGS = {"procedural": 0.0}
"""A removed setting of fine-tuning with its default, still hashed so that earlier results stay valid."""


def needs(_: Run, __: AnyStage) -> Needs:
    """Require the images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, stage: AnyStage) -> Json:
    """Return the widths, the grids, and the batch size."""
    placement = run.config.model_dump(mode="json", include=PLACEMENT)
    return {"bits": stage.variant, "batch_size": run.config.finetune.batch_size, **FORMER_SETTINGS, **placement}


def work(run: Run, stage: AnyStage) -> tuple[SensitivityResult, list[str]]:
    """Quantize one layer at a time, in batches that fit the memory."""
    bits = BitWidths.parse(stage.variant)

    def costs(divisor: int) -> list[Sensitivity]:
        rng = run.rng(stage.name)
        return sensitivities(
            make_student(run.model.module, bits, **student_options(run)),
            run.calibration.images,
            judged=views(run, rng),
            batch_size=max(1, run.config.finetune.batch_size // divisor),
            rng=rng,
            progress=run.progress,
            checkpoint=run.checkpoint(stage, divisor),
        )

    layers, _ = retry_on_oom(costs, f"sensitivities of {bits}")
    return SensitivityResult(layers=layers), []


def describe(_: Run, stage: AnyStage) -> str:
    """State the widths."""
    return f"one layer at a time at {stage.variant}"


def views(run: Run, rng: torch.Generator) -> torch.Tensor:
    """Return the views of the calibration images on which costs are estimated."""
    flip = run.require_finished(Stage(synthesize)).result.flip
    return judged_views(run.calibration.images, flip=flip, rng=rng)


def student_options(run: Run) -> dict[str, Any]:
    """Return the arguments of `make_student` other than a variant's bits."""
    return {"quantize_first_last": run.config.first_last, "layer_bits": run.config.keep, "cpu": run.config.cpu}
