"""The losses of fine-tuning: how far a student's answers and features are from the teacher's."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterq_deploy.quantization.fake_quant import Quantizer, inner_product, like_layout
from clusterq_deploy.quantization.graph.placement import TARGETS
from clusterq_deploy.quantization.reference import FloatTwin
from clusterq_deploy.quantization.student import Student


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, ce_weight: float, kl_weight: float, temperature: float
) -> Tensor:
    """Return CE(Q(x), y) + gamma KL, weighted, from logits (N, classes) and labels (N,); (11) in arXiv 2205.00179.

    The divergence is that of the student from the teacher, KL(teacher || student), as in distillation: it asks the
    student to give weight wherever the teacher does. It is taken at a temperature T and multiplied by T squared,
    which keeps its gradient's size (Hinton et al., arXiv 1503.02531).
    """
    t = temperature
    kl = F.kl_div((student / t).log_softmax(1), (teacher / t).log_softmax(1), reduction="batchmean", log_target=True)
    loss = kl_weight * t * t * kl
    if not ce_weight:
        return loss
    return loss + ce_weight * F.cross_entropy(student, labels, reduction="sum") / len(labels)


class _SquaredError(torch.autograd.Function):
    """Mean squared difference, () float32, of two tensors of any float type, in two passes over them each way."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - like_layout(teacher, student)
        ctx.save_for_backward(difference)
        return inner_product(difference, difference) / difference.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grads[0] / difference.numel()), None


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Return the squared error of the student's features over the variance of the teacher's, a mean over tensors, ().

    Args:
        student, teacher: float tensors of equal shapes, from `tap_features`.
        variances: of the teacher's features, () each.
    """
    triples = zip(student, teacher, variances, strict=True)
    return torch.stack([cast(Tensor, _SquaredError.apply(x, y)) / variance for x, y, variance in triples]).mean()


def feature_sites(student: Student) -> list[str]:
    """Return the quantizers that every target has, in order of calls, without the narrow ones behind another."""
    sites = {site.name for site in student.placement.activations if site.targets == TARGETS and not site.readers}
    calls = (student.net.get_submodule(str(n.target)) for n in student.net.graph.nodes if n.op == "call_module")
    return [module.site for module in calls if isinstance(module, Quantizer) and module.site in sites]


@contextmanager
def tap_features(student: Student) -> Iterator[list[Tensor]]:
    """Yield a list of what reaches the quantizers of `feature_sites`; each forward pass fills it again."""
    features: list[Tensor] = []
    quantizers = student.quantizers()
    with ExitStack() as hooks:
        hooks.enter_context(student.register_forward_pre_hook(lambda *_: features.clear()))
        for name in dict.fromkeys(feature_sites(student)):
            hooks.enter_context(quantizers[name].register_forward_pre_hook(lambda _, args: features.append(args[0])))
        yield features


@contextmanager
def matched_features(student: Student, reference: FloatTwin, images: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that returns the `feature_loss` of the last forward passes of a student and of the teacher.

    Args:
        student: whose features gradients reach.
        reference: the teacher; it runs `in_float` before each call of the function.
        images: (N, C, H, W) float32, normalized, on the models' device, for the variances.
    """
    by_site = {affine.site: affine for affine in reference.maps.values()}
    maps = [by_site.get(name) for name in feature_sites(student)]
    with tap_features(student) as features, tap_features(reference.graph) as exact:

        @torch.no_grad()
        def targets() -> list[Tensor]:
            return [x if affine is None else affine(x) for x, affine in zip(exact, maps, strict=True)]

        with torch.no_grad(), reference.graph.in_float():
            reference.graph(images)
        variances = [target.var().clamp_min(1e-8) for target in targets()]
        yield lambda: feature_loss(features, targets(), variances)
