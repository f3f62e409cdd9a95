"""Feature matching: what the student's quantizers read is held against what the teacher has there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from clusterq_deploy.quantization.fake_quant import Quantizer, inner_product, like_layout
from clusterq_deploy.quantization.graph.placement import TARGETS
from clusterq_deploy.quantization.reference import ChannelAffine, FloatTwin
from clusterq_deploy.quantization.student import Student


def feature_sites(student: Student) -> list[str]:
    """The quantizers that every target has, by calls in order of execution, without the narrow ones behind another."""
    wanted = {site.name for site in student.placement.activations if site.targets == TARGETS and not site.readers}
    calls = (student.net.get_submodule(str(n.target)) for n in student.net.graph.nodes if n.op == "call_module")
    executed = [module.site for module in calls if isinstance(module, Quantizer)]
    return [site for site in executed if site in wanted]


@contextmanager
def tap_features(student: Student) -> Iterator[list[Tensor]]:
    """What reaches the quantizers of `feature_sites`; each forward pass starts anew."""
    found: list[Tensor] = []
    quantizers = student.quantizers()
    with ExitStack() as hooks:
        hooks.enter_context(student.register_forward_pre_hook(lambda *_: found.clear()))
        for name in dict.fromkeys(feature_sites(student)):
            hooks.enter_context(quantizers[name].register_forward_pre_hook(lambda _, args: found.append(args[0])))
        yield found


class _SquaredError(torch.autograd.Function):
    """Mean squared difference, () float32, of two tensors of any float type, in two passes over them each way."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor) -> Tensor:
        difference = own - like_layout(other, own)
        ctx.save_for_backward(difference)
        return inner_product(difference, difference) / difference.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grads[0] / difference.numel()), None


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Squared error of the student's features relative to the variance of the teacher's, a mean over tensors, ().

    Args:
        student, teacher: float tensors of equal shapes, from `tap_features`.
        variances: of the teacher's features, () each.
    """
    parts = [
        cast(Tensor, _SquaredError.apply(own, other)) / variance
        for own, other, variance in zip(student, teacher, variances, strict=True)
    ]
    return torch.stack(parts).mean()


@torch.no_grad()
def _mapped(features: Sequence[Tensor], maps: Sequence[ChannelAffine | None]) -> list[Tensor]:
    """The teacher's features in the student's channels."""
    return [f if own is None else own(f) for f, own in zip(features, maps, strict=True)]


@contextmanager
def matched_features(student: Student, reference: FloatTwin, images: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Give the `feature_loss` of the last forward passes of a student and of the teacher.

    Args:
        student: whose features gradients reach.
        reference: the teacher; it runs `in_float` before each call of what is given.
        images: (N, C, H, W) float32, normalized, on the models' device, for the variances.
    """
    by_site = {own.site: own for own in reference.maps.values()}
    maps = [by_site.get(name) for name in feature_sites(student)]
    with tap_features(student) as own, tap_features(reference.graph) as exact:
        with torch.no_grad(), reference.graph.in_float():
            reference.graph(images)
        variances = [feature.var().clamp_min(1e-8) for feature in _mapped(exact, maps)]
        yield lambda: feature_loss(own, _mapped(exact, maps), variances)
