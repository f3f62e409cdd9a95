"""Images and quantized variants: synthesis, sensitivities, scales and fine-tuning."""

import io
import logging
from dataclasses import asdict

import torch
from pydantic import TypeAdapter

from calib.calibration_set import CalibrationSet
from calib.leaves import with_leaves
from calib.support.checkpoint import Checkpoint
from calib.synthesis import Synthesis, synthesize
from clusterq_deploy.oom import in_memory
from clusterq_deploy.quantize import (
    BitWidths,
    Initialization,
    PrecisionPlan,
    Sensitivity,
    Student,
    Tuning,
    finetune,
    fit_full_range_biases,
    histograms,
    initialize,
    judged_views,
    make_student,
    plan_precision,
    sensitivities,
)
from clusterq_deploy.quantize.student import FORMAT
from clusterq_deploy.run.manifest import Result, StageRecord
from clusterq_deploy.run.run import IMAGES, PREVIEW, Run, student_file

logger = logging.getLogger(__name__)


def make_images(run: Run) -> StageRecord:
    """Make the calibration set."""
    settings, spec = run.config.synthesis, run.model.input
    inputs = {"settings": settings.model_dump(mode="json")}

    def images(divisor: int) -> Synthesis:
        return synthesize(
            run.model.module,
            classes=run.model.classes,
            size=spec.size,
            mean=spec.mean,
            std=spec.std,
            config=settings.with_smaller_batches(divisor),
            device=run.device,
            rng=run.rng("synthesize"),
            progress=run.progress,
            checkpoint=run.checkpoint("synthesize", inputs, divisor),
        )

    def work() -> tuple[Result, list[str]]:
        made, divisor = in_memory(images, "synthesis")
        provenance = run.provenance("calibration", synthesis=settings.model_dump(mode="json"))
        calibration = CalibrationSet(made.calibration.images, made.calibration.labels, provenance)
        preview = io.BytesIO()
        calibration.preview(spec.mean, spec.std).save(preview, "PNG")
        names = [
            run.directory.write(IMAGES, calibration.to_bytes()),
            run.directory.write(PREVIEW, preview.getvalue()),
        ]
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

    return run.perform("synthesize", inputs, work)


def measure_sensitivity(run: Run, bits: BitWidths) -> StageRecord:
    """Measure what the quantization of each layer alone costs, on synthetic images."""
    run.done("synthesize")
    batch_size = run.config.finetune.batch_size
    share = run.config.finetune.procedural
    inputs = {"bits": str(bits), "batch_size": batch_size, "procedural": share, **_widths(run)}

    def costs(divisor: int) -> list[Sensitivity]:
        rng = run.rng(f"sensitivity/{bits}")
        return sensitivities(
            make_student(run.model.module, bits, **_widths(run)),
            _shown(run),
            judged=_judged_views(run, rng),
            batch_size=max(1, batch_size // divisor),
            rng=rng,
            progress=run.progress,
            checkpoint=run.checkpoint(f"sensitivity/{bits}", inputs, divisor, upstream=["synthesize"]),
        )

    def work() -> tuple[Result, list[str]]:
        found, _ = in_memory(costs, f"sensitivities of {bits}")
        return {"layers": [asdict(own) for own in found]}, []

    return run.perform(f"sensitivity/{bits}", inputs, work, upstream=["synthesize"])


def make_variant(run: Run, bits: BitWidths) -> StageRecord:
    """Make one variant: quantizers, scales, fine-tuning."""
    source, settings = run.done("synthesize"), run.config.finetune.scaled_to(bits)
    max_drop = run.config.max_drop

    inputs = {
        "format": FORMAT,
        "settings": settings.model_dump(mode="json"),
        "bits": str(bits),
        "max_drop": max_drop,
        **_widths(run),
    }

    def tuned(divisor: int) -> tuple[PrecisionPlan | None, Student, Initialization, Tuning]:
        calibration, rng = run.calibration, run.rng(f"quantize/{bits}")
        batch_size = max(1, settings.batch_size // divisor)
        checkpoint = run.checkpoint(f"quantize/{bits}", inputs, divisor, upstream=["synthesize"])
        plan, student, started = _initialized(run, bits, batch_size, rng, checkpoint)
        tuning = finetune(
            student,
            started.reference,
            calibration,
            config=settings.model_copy(update={"batch_size": batch_size}),
            flip=bool(source.result["flip"]),
            rng=rng,
            progress=run.progress,
            checkpoint=checkpoint,
        )
        fit_full_range_biases(student, calibration.images)
        return plan, student, started, tuning

    def work() -> tuple[Result, list[str]]:
        (plan, student, started, tuning), divisor = in_memory(tuned, f"fine-tuning {bits}")
        if plan is not None and max_drop is not None and plan.estimate.expected_drop > max_drop:
            logger.warning("%s: no widths are expected to keep the drop within %g points", bits, max_drop)
        seen = histograms(
            student,
            started.reference,
            run.calibration.images,
            batch_size=max(1, settings.batch_size // divisor),
            rng=run.rng(f"histograms/{bits}"),
        )
        provenance = run.provenance(
            str(bits), finetune=settings.model_dump(mode="json"), calibration=source.files[IMAGES]
        )
        result = {
            "format": FORMAT,
            "cpu": student.target_cpu,
            "losses": tuning.losses,
            "kept_step": tuning.kept_step,
            "equalized": [asdict(pair) for pair in started.equalized],
            "reconstruction_errors": started.errors,
            "bias_shifts": started.shifts,
            "batch_divisor": divisor,
            "keep": student.keep,
            "expected_drop": None if plan is None else plan.estimate.expected_drop,
            "max_drop": None if plan is None else max_drop,
            "quantized_layers": len(student.placement.weights),
            "skipped_layers": [{"layer": k, "reason": v} for k, v in student.placement.skipped.items()],
            "histograms": [asdict(own) for own in seen],
        }
        return result, [run.directory.write(student_file(bits), student.to_bytes(provenance))]

    return run.perform(f"quantize/{bits}", inputs, work, upstream=["synthesize"])


def _initialized(
    run: Run, bits: BitWidths, batch_size: int, rng: torch.Generator, checkpoint: Checkpoint
) -> tuple[PrecisionPlan | None, Student, Initialization]:
    """A student as fine-tuning begins with it, and the layers' widths in it if they are planned."""
    max_drop, widths = run.config.max_drop, _widths(run)
    kept = checkpoint.load("initialized")
    plan = None
    if kept is not None and kept["plan"] is not None:
        plan = TypeAdapter(PrecisionPlan).validate_python(kept["plan"])
    elif max_drop is not None and bits != BitWidths(8, 8):
        plan = _plan(run, bits, max_drop, batch_size, checkpoint)
    if plan is not None:
        widths["keep"] = plan.keep
    student = make_student(run.model.module, bits, **widths)
    if kept is not None:
        started = Initialization.from_state(student, kept["state"])
        rng.set_state(kept["rng"])
        return plan, student, started
    started = initialize(
        student, _shown(run), batch_size=batch_size, rng=rng, progress=run.progress, checkpoint=checkpoint
    )
    checkpoint.save(
        "initialized",
        lambda: {
            "plan": None if plan is None else asdict(plan),
            "state": started.state_dict(student),
            "rng": rng.get_state(),
        },
        at_once=True,
    )
    return plan, student, started


def _shown(run: Run) -> torch.Tensor:
    """The images that a student is initialized on, the same for all variants."""
    return with_leaves(run.calibration.images, run.config.finetune.procedural, run.rng("leaves"))


def _judged_views(run: Run, rng: torch.Generator) -> torch.Tensor:
    """The views of the calibration images on which costs are estimated."""
    flip = bool(run.done("synthesize").result["flip"])
    return judged_views(run.calibration.images, flip=flip, rng=rng)


def _widths(run: Run) -> Result:
    """What `make_student` is to know beside a variant's bits."""
    return {"first_last": run.config.first_last, "keep": run.config.keep, "cpu": run.config.cpu}


def _plan(run: Run, bits: BitWidths, max_drop: float, batch_size: int, checkpoint: Checkpoint) -> PrecisionPlan:
    """The layers that have to be raised for a variant to lose no more."""
    costs, rng = measure_sensitivity(run, bits).result["layers"], run.rng(f"precision/{bits}")
    return plan_precision(
        run.model.module,
        bits,
        **_widths(run),
        costs=TypeAdapter(list[Sensitivity]).validate_python(costs),
        max_drop=max_drop,
        images=_shown(run),
        judged=_judged_views(run, rng),
        batch_size=batch_size,
        rng=rng,
        progress=run.progress,
        checkpoint=checkpoint,
    )
