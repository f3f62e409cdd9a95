"""Make a variant: the model and its images go in, a quantized, fine-tuned student comes out."""

import logging
from dataclasses import asdict

import torch

from calib.calibration_set import CalibrationSet
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.progress import Progress
from clusterq_deploy.models.capture import logits_only
from clusterq_deploy.oom import retry_on_oom
from clusterq_deploy.quantization import (
    BitWidths,
    FinetuneConfig,
    PrecisionPlan,
    PTQResult,
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
from clusterq_deploy.results.report import LayerNote
from clusterq_deploy.results.stages import QuantizeResult
from clusterq_deploy.run.run import IMAGES, Run, student_file
from clusterq_deploy.run.stage import AnyStage, Json, Needs, Stage
from clusterq_deploy.stages import sensitivity, synthesize
from clusterq_deploy.stages.sensitivity import FORMER_SETTINGS, PLACEMENT, student_options, views

logger = logging.getLogger(__name__)

NAME, RESULT = "quantize", QuantizeResult


def needs(_: Run, __: AnyStage) -> Needs:
    """Require the images."""
    return Needs(required=("synthesize",))


def inputs(run: Run, stage: AnyStage) -> Json:
    """Return the widths and the settings of fine-tuning."""
    settings = run.config.finetune.scaled_to(BitWidths.parse(stage.variant))
    widths = run.config.model_dump(mode="json", include={"max_drop", *PLACEMENT})
    return {"format": FORMAT, "settings": _recorded(settings), "bits": stage.variant, **widths}


def work(run: Run, stage: AnyStage) -> tuple[QuantizeResult, list[str]]:
    """Place quantizers, search scales and tune, in batches that fit the memory."""
    bits, synthesis = BitWidths.parse(stage.variant), run.require_finished(Stage(synthesize))
    settings = run.config.finetune.scaled_to(bits)

    def attempt(divisor: int) -> tuple[PrecisionPlan | None, Student, PTQResult, Tuning]:
        config, checkpoint = in_smaller_batches(settings, divisor), run.checkpoint(stage, divisor)
        plan = _plan(run, bits, config.batch_size, checkpoint)
        options = student_options(run) if plan is None else {**student_options(run), "layer_bits": plan.layer_bits}
        student = make_student(run.model.module, bits, **options)
        ptq, tuning = tune(
            student,
            run.calibration,
            config=config,
            flip=synthesis.result.flip,
            rng=run.rng(stage.name),
            progress=run.progress,
            checkpoint=checkpoint,
        )
        return plan, student, ptq, tuning

    (plan, student, ptq, tuning), divisor = retry_on_oom(attempt, f"fine-tuning {bits}")
    expected_drop, max_drop = (plan.estimate.expected_drop, run.config.max_drop) if plan else (None, None)
    if expected_drop is not None and max_drop is not None and expected_drop > max_drop:
        logger.warning("%s: the expected drop exceeds %g points for all widths", bits, max_drop)
    batch_size, rng = in_smaller_batches(settings, divisor).batch_size, run.rng(f"histograms/{bits}")
    layers = histograms(student, ptq.reference, run.calibration.images, batch_size=batch_size, rng=rng)
    result = QuantizeResult(
        format=FORMAT,
        cpu=student.target_cpu,
        losses=tuning.losses,
        kept_step=tuning.best_step,
        trunks=[trunk.summary() for trunk in ptq.trunks],
        equalized=[asdict(pair) for pair in ptq.equalized],
        reconstruction_errors=ptq.errors,
        bias_shifts=ptq.shifts,
        batch_divisor=divisor,
        keep=student.layer_bits,
        expected_drop=expected_drop,
        max_drop=max_drop,
        quantized_layers=len(student.placement.weights),
        skipped_layers=[LayerNote(layer=k, reason=reason) for k, reason in student.placement.skipped.items()],
        histograms=layers,
    )
    provenance = run.provenance(str(bits), finetune=_recorded(settings), calibration=synthesis.files[IMAGES])
    return result, [run.directory.write(student_file(bits), student.to_bytes(provenance))]


def describe(run: Run, stage: AnyStage) -> str:
    """Count the steps."""
    tuning = run.config.finetune.scaled_to(BitWidths.parse(stage.variant))
    raised = ", sensitivities first" if run.config.max_drop is not None and stage.variant != "w8a8" else ""
    return f"at most {tuning.steps:,} steps of {tuning.batch_size}{raised}"


def in_smaller_batches(config: FinetuneConfig, divisor: int) -> FinetuneConfig:
    """Return the settings with the batch size divided, at least one image."""
    return config.model_copy(update={"batch_size": max(1, config.batch_size // divisor)})


def _recorded(settings: FinetuneConfig) -> Json:
    """Return the settings as they are hashed and written to files."""
    return {**settings.model_dump(mode="json"), **FORMER_SETTINGS}


def tune(
    student: Student,
    calibration: CalibrationSet,
    *,
    config: FinetuneConfig,
    flip: bool,
    rng: torch.Generator,
    progress: Progress,
    checkpoint: Checkpoint = NOWHERE,
) -> tuple[PTQResult, Tuning]:
    """Quantize a new student after training and fine-tune it, in place.

    `flip` says whether images keep their class when mirrored. To resume from `checkpoint`, the student must be the same
    as the first time.
    """
    if (saved := checkpoint.load("initialized")) is not None:
        ptq = PTQResult.from_state(student, saved["state"])
        rng.set_state(saved["rng"])
    else:
        ptq = post_training_quantize(
            student,
            calibration.images,
            batch_size=config.batch_size,
            rng=rng,
            progress=progress,
            checkpoint=checkpoint,
        )
        checkpoint.save("initialized", lambda: {"state": ptq.state_dict(student), "rng": rng.get_state()}, at_once=True)
    reference = ptq.reference
    with logits_only(student, reference.graph):
        tuning = finetune(
            student, reference, calibration, config=config, flip=flip, rng=rng, progress=progress, checkpoint=checkpoint
        )
    fit_full_range_biases(student, calibration.images)
    return ptq, tuning


def _plan(run: Run, bits: BitWidths, batch_size: int, checkpoint: Checkpoint) -> PrecisionPlan | None:
    """Choose the layers with 8 bits that keep the expected drop within `max_drop`; None without a bound."""
    max_drop = run.config.max_drop
    if max_drop is None or bits == BitWidths(8, 8):
        return None
    if (saved := checkpoint.load("plan")) is not None:
        return PrecisionPlan.model_validate(saved)
    costs, rng = run.do(Stage(sensitivity, str(bits))).result.layers, run.rng(f"precision/{bits}")
    plan = plan_precision(
        run.model.module,
        bits,
        **student_options(run),
        costs=costs,
        max_drop=max_drop,
        images=run.calibration.images,
        judged=views(run, rng),
        batch_size=batch_size,
        rng=rng,
        progress=run.progress,
        checkpoint=checkpoint,
    )
    checkpoint.save("plan", plan.model_dump, at_once=True)
    return plan
