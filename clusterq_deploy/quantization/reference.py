"""The teacher next to the student: the same graph in float, and how the student's tensors differ from its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from clusterq_deploy.quantization.fake_quant import QuantizedLayer, QuantizedLinear, Quantizer
from clusterq_deploy.quantization.student import Student

AT_ONCE = 64  # images that a layer or quantizer computes together, in a pass that has all images in memory


@dataclass(frozen=True)
class ChannelAffine:
    """A student's channels from the teacher's: scale * x - shift, both (C,) float32, scale positive.

    `site` is that of the quantizer behind the layer that has them: nothing but the next layer reads it.
    """

    scale: Tensor
    shift: Tensor
    site: str

    def __call__(self, x: Tensor, channel: int = 1) -> Tensor:
        """Return the student's values for the teacher's x, whose dimension `channel` has k values per channel."""
        shape = [1] * x.dim()
        shape[channel] = -1
        k = x.shape[channel] // len(self.scale)
        scale, shift = (v.repeat_interleave(k).view(shape) for v in (self.scale, self.shift))
        # in float32: half precision would lose what is left of two numbers that are nearly the same
        return torch.addcmul(-shift, x.float(), scale).to(x.dtype)

    @property
    def is_identity(self) -> bool:
        """Whether the student's channels are the teacher's."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())


@dataclass(frozen=True)
class FloatTwin:
    """What a student is compared with.

    Attributes:
        graph: the teacher with the student's graph and sites; it is used `in_float` only.
        maps: for each layer whose outputs have other channels in the student, how; see `equalize`.
    """

    graph: Student
    maps: Mapping[str, ChannelAffine] = field(default_factory=dict)


def apply_in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), computed for a few images of x at a time to save memory."""
    first, *others = x.split(AT_ONCE)
    answer = function(first)
    result = answer.new_empty((len(x), *answer.shape[1:]))
    result[: len(answer)] = answer
    for place, part in zip(result.split(AT_ONCE)[1:], others, strict=True):
        place.copy_(function(part))
    return result


Visit = Callable[[str, QuantizedLayer, Tensor, Tensor], Tensor]
"""Returns a layer's outputs from its name, the layer, its quantized input, and its target: the teacher's outputs."""


def visit_layers(student: Student, reference: FloatTwin, images: Tensor, visit: Visit) -> None:
    """Pass images (N, C, H, W) through the teacher and the student, and let `visit` compute the student's layers.

    They are visited in order of execution. Targets are in the student's channels.
    """
    interpreter = _TwinInterpreter(student, reference, visit)
    image = next(node for node in student.net.graph.nodes if node.op == "placeholder")
    with reference.graph.in_float():
        interpreter.run(initial_env={image: torch.cat([images, images])})  # as an argument it would live to the end


class _TwinInterpreter(fx.Interpreter):
    """Runs a student's graph on a batch whose first half passes through the teacher, its second half quantized."""

    def __init__(self, student: Student, reference: FloatTwin, visit: Visit) -> None:
        super().__init__(student.net)
        self._twins, self._maps, self._visit = reference.graph.layers(), reference.maps, visit

    def call_module(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target)
        module = self.fetch_attr(name)
        if not isinstance(module, Quantizer | QuantizedLayer):
            return super().call_module(target, args, kwargs)
        exact, rounded = args[0].chunk(2)
        if isinstance(module, Quantizer):
            return torch.cat([exact, apply_in_parts(module, rounded)])
        outputs = apply_in_parts(self._twins[name], exact)
        affine = self._maps.get(name)
        expected = outputs if affine is None else affine(outputs, -1 if isinstance(module, QuantizedLinear) else 1)
        answer = self._visit(name, module, rounded, expected)
        del expected  # up to a gigabyte, and the next line needs two
        return torch.cat([outputs, answer])
