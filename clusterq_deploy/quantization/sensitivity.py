"""What each layer's quantization costs, and which layers to raise to eight bits: mixed precision without data."""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calib.support.checkpoint import NOWHERE, Checkpoint, ScopedCheckpoint
from calib.support.progress import SILENT, Advance, Progress
from clusterq_deploy.models.capture import logits_only
from clusterq_deploy.quantization.grid import BitWidths, Cpu
from clusterq_deploy.quantization.ptq.ptq import (
    equalize_and_calibrate,
    post_training_quantize,
    reconstruct_or_correct_bias,
)
from clusterq_deploy.quantization.qat.augment import AugmentConfig, Augmenter
from clusterq_deploy.quantization.student import Student, make_student
from clusterq_deploy.results import Record
from clusterq_deploy.results.stages import Divergence, Sensitivity

RAISED = 8
_AT_ONCE = 64  # images that are augmented together, to save memory

_JUDGED = AugmentConfig(zoom=0.06, rotation=0.08, translation=0.03, jitter=0.08, cutmix=0.0)
"""A quarter of what fine-tuning sees. On synthetic images themselves a teacher is so sure that nothing ever costs an
answer; on the views of fine-tuning it is less sure than on photographs. On these it is about as sure: `docs/method.md`
has the figures."""


class PrecisionPlan(Record):
    """Widths of single layers, and how far the student is expected to be from the teacher before fine-tuning."""

    layer_bits: dict[str, int]
    estimate: Divergence


def judged_views(images: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
    """Return views of synthetic images (N, C, H, W) on which costs are estimated."""
    view = Augmenter(_JUDGED, images, flip=flip, rng=rng)
    return torch.cat([view(part) for part in images.split(_AT_ONCE)])


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the logits (N, classes) float32, on the CPU, of images (N, C, H, W)."""
    device = next(model.parameters()).device
    with logits_only(model):
        return torch.cat([model(part.to(device)).float().cpu() for part in images.split(batch_size)])


def compare(student: Tensor, teacher: Tensor) -> Divergence:
    """Return how far a student's logits (N, classes) are from the teacher's for the same images."""
    target, chosen = teacher.softmax(1), student.argmax(1)
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    lost = target.amax(1) - target.gather(1, chosen[:, None]).squeeze(1)
    agreement = 100 * float((chosen == teacher.argmax(1)).float().mean())
    return Divergence(kl=max(0.0, float(kl)), agreement=agreement, expected_drop=100 * float(lost.mean()))


def sensitivities(
    student: Student,
    images: Tensor,
    *,
    judged: Tensor,
    batch_size: int,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> list[Sensitivity]:
    """Quantize one layer at a time, and see how far the answers move.

    Args:
        student: fresh from `make_student`; it is quantized here, and a layer is judged with the weight and the bias
            that this gave it.
        images: (N, C, H, W) float32, normalized, that set the scales.
        judged: (M, C, H, W), such as `judged_views`, on which the answers are compared.
        checkpoint: a resumed call needs the same student as the first one.

    Returns:
        One per quantized layer, in order of execution.
    """
    start = equalize_and_calibrate(
        student, images, batch_size=batch_size, rng=rng, progress=progress, checkpoint=checkpoint
    )
    layers, quantizers = student.layers(), student.quantizers()
    plain = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    if (saved := checkpoint.load("quantized")) is None:
        reconstruct_or_correct_bias(student, images, start, rng=rng, progress=progress, checkpoint=checkpoint)
        checkpoint.save("quantized", lambda: {"student": student.state_dict()}, at_once=True)
    else:
        student.load_state_dict(saved["student"])
    quantized = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.load_state_dict(plain[name])
    with student.in_float():
        teacher = answers(student, judged, batch_size)
    saved = checkpoint.load("costs") or {"costs": []}
    costs = [Sensitivity.model_validate(cost) for cost in saved["costs"]]
    with progress.task(f"Sensitivity {student.bits}", len(student.placement.weights)) as advance:
        advance(len(costs))
        for site in student.placement.weights[len(costs) :]:
            layers[site.layer].load_state_dict(quantized[site.layer])
            with student.quantized_at(site.name, site.input_site):
                divergence = compare(answers(student, judged, batch_size), teacher)
            layers[site.layer].load_state_dict(plain[site.layer])
            bits = BitWidths(site.grid.bits, quantizers[site.input_site].grid.bits)
            costs.append(Sensitivity(layer=site.layer, bits=str(bits), cost=divergence))
            advance(1, kl=divergence.kl)
            checkpoint.save("costs", lambda: {"costs": [cost.model_dump() for cost in costs]})
    return costs


def plan_precision(
    teacher: fx.GraphModule,
    bits: BitWidths,
    *,
    costs: Sequence[Sensitivity],
    max_drop: float,
    quantize_first_last: bool,
    layer_bits: Mapping[str, int],
    cpu: Cpu = "any",
    images: Tensor,
    judged: Tensor,
    batch_size: int,
    rng: torch.Generator,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = NOWHERE,
) -> PrecisionPlan:
    """Raise the most sensitive layers to eight bits, as few as keep the expected drop within a bound.

    How many is found by bisection, each count judged by a student after all of post-training quantization; fine-tuning,
    which comes later, lowers the drop further. If even all layers at eight bits are not enough, all are raised.

    Args:
        teacher: from `models.capture.capture`; it is copied, not changed.
        bits, quantize_first_last, cpu: as for `make_student`.
        costs: from `sensitivities`.
        max_drop: the bound of `Divergence.expected_drop`, in points.
        layer_bits: widths that are set already, and stay.
        images, judged, batch_size, rng: as for `sensitivities`.
    """
    ranked = sorted(costs, key=lambda cost: -cost.cost.kl)
    order = [cost.layer for cost in ranked if cost.layer not in layer_bits and cost.bits != "w8a8"]
    state = rng.get_state()
    saved = checkpoint.load("precision") or {"exact": None, "estimates": {}}
    exact = answers(teacher, judged, batch_size) if saved["exact"] is None else saved["exact"]
    estimates = {count: Divergence(**estimate) for count, estimate in saved["estimates"].items()}

    def raised(count: int) -> dict[str, int]:
        return {**layer_bits, **dict.fromkeys(order[:count], RAISED)}

    def within(count: int, advance: Advance) -> bool:
        if count not in estimates:
            student = make_student(
                teacher, bits, quantize_first_last=quantize_first_last, layer_bits=raised(count), cpu=cpu
            )
            rng.set_state(state)  # counts differ in their layers only
            scope = ScopedCheckpoint(checkpoint, "precision", count)
            post_training_quantize(student, images, batch_size=batch_size, rng=rng, progress=progress, checkpoint=scope)
            estimates[count] = compare(answers(student, judged, batch_size), exact)
            results = {"exact": exact, "estimates": {n: estimate.model_dump() for n, estimate in estimates.items()}}
            checkpoint.save("precision", lambda: results, at_once=True)
        advance(1, expected_drop=estimates[count].expected_drop)
        return estimates[count].expected_drop <= max_drop

    most_students = 2 + max(0, len(order) - 1).bit_length()  # without a raised layer, by bisection, with all raised
    with progress.task(f"Precision {bits}", most_students) as advance:
        # `low` is too few; `high` is enough, or all there are
        low, high = (-1, 0) if within(0, advance) else (0, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if within(middle, advance) else (middle, high)
        if high not in estimates:
            within(high, advance)
        advance(most_students - len(estimates))
    return PrecisionPlan(layer_bits=raised(high), estimate=estimates[high])
