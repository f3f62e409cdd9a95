"""Measure what the quantization of each layer alone costs: the model and images go in, a cost per layer comes out."""

from dataclasses import asdict
from typing import Any

import torch

from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization import BitWidths, Sensitivity, judged_views, make_student, sensitivities
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import Run
from clusterq_deploy.run.stage import Needs

NAME = "sensitivity"


def needs(_: Run, __: str) -> Needs:
    """The images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, variant: str) -> Result:
    """The widths, and what decides which images are shown how."""
    # `procedural` was a setting once: with its default, what was done before stays done
    return {"bits": variant, "batch_size": run.config.finetune.batch_size, "procedural": 0.0, **placement(run)}


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Quantize each layer alone, in batches that fit the memory."""
    bits = BitWidths.parse(variant)

    def costs(divisor: int) -> list[Sensitivity]:
        rng = run.rng(f"sensitivity/{variant}")
        return sensitivities(
            make_student(run.model.module, bits, **student_options(run)),
            run.calibration.images,
            judged=views(run, rng),
            batch_size=max(1, run.config.finetune.batch_size // divisor),
            rng=rng,
            progress=run.progress,
            checkpoint=run.checkpoint(
                f"sensitivity/{variant}", inputs(run, variant), divisor, needs(run, variant).required
            ),
        )

    found, _ = retry_on_oom(costs, f"sensitivities of {variant}")
    return {"layers": [asdict(own) for own in found]}, []


def describe(_: Run, variant: str) -> str:
    """Say which widths."""
    return f"every layer at {variant} alone"


def views(run: Run, rng: torch.Generator) -> torch.Tensor:
    """Return the views of the calibration images on which costs are estimated."""
    flip = bool(run.finished("synthesize").result["flip"])
    return judged_views(run.calibration.images, flip=flip, rng=rng)


def placement(run: Run) -> dict[str, Any]:
    """Return what decides on a variant's quantizers next to its bits, as the manifest hashes it."""
    return {"first_last": run.config.first_last, "keep": run.config.keep, "cpu": run.config.cpu}


def student_options(run: Run) -> dict[str, Any]:
    """Return what `make_student` needs to know next to a variant's bits."""
    return {"quantize_first_last": run.config.first_last, "layer_bits": run.config.keep, "cpu": run.config.cpu}
