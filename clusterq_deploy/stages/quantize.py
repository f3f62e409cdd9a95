"""Make a variant: the model and its images go in, a student with quantizers, scales and tuned weights comes out."""

import logging
from dataclasses import asdict

import torch
from pydantic import TypeAdapter

from calib.support.checkpoint import Checkpoint
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    PrecisionPlan,
    PTQResult,
    Sensitivity,
    Student,
    Tuning,
    finetune,
    fit_full_range_biases,
    histograms,
    make_student,
    plan_precision,
    post_training_quantize,
)
from clusterq_deploy.quantization.student import FORMAT
from clusterq_deploy.run.manifest import Result
from clusterq_deploy.run.run import IMAGES, Run, student_file
from clusterq_deploy.run.stage import Needs, Stage
from clusterq_deploy.stages import sensitivity
from clusterq_deploy.stages.sensitivity import placement, student_options, views

logger = logging.getLogger(__name__)

NAME = "quantize"


def needs(_: Run, __: str) -> Needs:
    """The images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, variant: str) -> Result:
    """The widths and the settings of fine-tuning."""
    return {
        "format": FORMAT,
        "settings": _recorded(run.config.finetune.scaled_to(BitWidths.parse(variant))),
        "bits": variant,
        "max_drop": run.config.max_drop,
        **placement(run),
    }


def work(run: Run, variant: str) -> tuple[Result, list[str]]:
    """Place quantizers, search scales and tune, in batches that fit the memory."""
    bits, source, max_drop = BitWidths.parse(variant), run.finished("synthesize"), run.config.max_drop
    settings = run.config.finetune.scaled_to(bits)

    def tuned(divisor: int) -> tuple[PrecisionPlan | None, Student, PTQResult, Tuning]:
        calibration, rng = run.calibration, run.rng(f"quantize/{bits}")
        batch_size = max(1, settings.batch_size // divisor)
        checkpoint = run.checkpoint(f"quantize/{bits}", inputs(run, variant), divisor, ["synthesize"])
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

    (plan, student, started, tuning), divisor = retry_on_oom(tuned, f"fine-tuning {bits}")
    if plan is not None and max_drop is not None and plan.estimate.expected_drop > max_drop:
        logger.warning("%s: no widths are expected to keep the drop within %g points", bits, max_drop)
    seen = histograms(
        student,
        started.reference,
        run.calibration.images,
        batch_size=max(1, settings.batch_size // divisor),
        rng=run.rng(f"histograms/{bits}"),
    )
    provenance = run.provenance(str(bits), finetune=_recorded(settings), calibration=source.files[IMAGES])
    result = {
        "format": FORMAT,
        "cpu": student.target_cpu,
        "losses": tuning.losses,
        "kept_step": tuning.best_step,
        "equalized": [asdict(pair) for pair in started.equalized],
        "reconstruction_errors": started.errors,
        "bias_shifts": started.shifts,
        "batch_divisor": divisor,
        "keep": student.layer_bits,
        "expected_drop": None if plan is None else plan.estimate.expected_drop,
        "max_drop": None if plan is None else max_drop,
        "quantized_layers": len(student.placement.weights),
        "skipped_layers": [{"layer": k, "reason": v} for k, v in student.placement.skipped.items()],
        "histograms": [asdict(own) for own in seen],
    }
    return result, [run.directory.write(student_file(bits), student.to_bytes(provenance))]


def describe(run: Run, variant: str) -> str:
    """Count the steps."""
    tuning = run.config.finetune.scaled_to(BitWidths.parse(variant))
    raised = ", sensitivities first" if run.config.max_drop is not None and variant != "w8a8" else ""
    return f"at most {tuning.steps:,} steps of {tuning.batch_size}{raised}"


def _recorded(settings: FinetuneConfig) -> Result:
    """Return the settings with `procedural`, which was one once: with its default, what was done before stays done."""
    return {**settings.model_dump(mode="json"), "procedural": 0.0}


def _initialized(
    run: Run, bits: BitWidths, batch_size: int, rng: torch.Generator, checkpoint: Checkpoint
) -> tuple[PrecisionPlan | None, Student, PTQResult]:
    """A student as fine-tuning begins with it, and the layers' widths in it if they are planned."""
    max_drop, widths = run.config.max_drop, student_options(run)
    kept = checkpoint.load("ptq")
    plan = None
    if kept is not None and kept["plan"] is not None:
        plan = TypeAdapter(PrecisionPlan).validate_python(kept["plan"])
    elif max_drop is not None and bits != BitWidths(8, 8):
        plan = _plan(run, bits, max_drop, batch_size, checkpoint)
    if plan is not None:
        widths["layer_bits"] = plan.layer_bits
    student = make_student(run.model.module, bits, **widths)
    if kept is not None:
        started = PTQResult.from_state(student, kept["state"])
        rng.set_state(kept["rng"])
        return plan, student, started
    started = post_training_quantize(
        student, run.calibration.images, batch_size=batch_size, rng=rng, progress=run.progress, checkpoint=checkpoint
    )
    checkpoint.save(
        "ptq",
        lambda: {
            "plan": None if plan is None else asdict(plan),
            "state": started.state_dict(student),
            "rng": rng.get_state(),
        },
        at_once=True,
    )
    return plan, student, started


def _plan(run: Run, bits: BitWidths, max_drop: float, batch_size: int, checkpoint: Checkpoint) -> PrecisionPlan:
    """The layers that have to be raised for a variant to lose no more."""
    costs, rng = run.do(Stage(sensitivity, str(bits))).result["layers"], run.rng(f"precision/{bits}")
    return plan_precision(
        run.model.module,
        bits,
        **student_options(run),
        costs=TypeAdapter(list[Sensitivity]).validate_python(costs),
        max_drop=max_drop,
        images=run.calibration.images,
        judged=views(run, rng),
        batch_size=batch_size,
        rng=rng,
        progress=run.progress,
        checkpoint=checkpoint,
    )
