"""The teacher beside the student: the same graph in float, and how the student's tensors differ from its own."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from clusterq_deploy.quantization.fake_quant import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Quantizer
from clusterq_deploy.quantization.student import Student

AT_ONCE = 64  # images that a layer or quantizer is given, where a pass has all images in memory


@dataclass(frozen=True)
class ChannelAffine:
    """A student's channels from the teacher's: scale * x - shift, both (C,) float32, scale positive.

    `site` is that of the quantizer behind the layer that has them: nothing but the next layer reads it.
    """

    scale: Tensor
    shift: Tensor
    site: str

    def __call__(self, x: Tensor, channel: int = 1) -> Tensor:
        """The student's values for the teacher's x, whose dimension `channel` has C * k values, k a channel."""
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
    """What a student is held against.

    Attributes:
        graph: the teacher with the student's graph and sites; it is used `in_float` alone.
        maps: for each layer whose outputs have other channels in the student, how; see `equalize`.
    """

    graph: Student
    maps: Mapping[str, ChannelAffine] = field(default_factory=dict)


def by_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of images x, of which some are given to it at a time: what it needs beside its result stays small."""
    first, *others = x.split(AT_ONCE)
    answer = function(first)
    whole = answer.new_empty((len(x), *answer.shape[1:]))
    whole[: len(answer)] = answer
    for place, part in zip(whole.split(AT_ONCE)[1:], others, strict=True):
        place.copy_(function(part))
    return whole


class TwinInterpreter(fx.Interpreter):
    """Runs a student's graph on a batch whose first half passes through the teacher, its second half quantized.

    Subclasses say in `layer` what is done at each quantized layer. Without a reference the teacher is what the student
    computes in float as it is now.
    """

    def __init__(self, student: Student, reference: FloatTwin | None) -> None:
        super().__init__(student.net)
        self._reference = reference or FloatTwin(copy.deepcopy(student))
        self._exact, self._maps = self._reference.graph.layers(), self._reference.maps

    def compare(self, images: Tensor) -> None:
        """Pass images (N, C, H, W) through both."""
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        with self._reference.graph.in_float():
            self.run(initial_env={image: torch.cat([images, images])})  # as an argument it would live to the end

    def call_module(self, target: fx.node.Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if not isinstance(module, Quantizer | QuantizedConv2d | QuantizedLinear):
            return super().call_module(target, args, kwargs)
        (x,) = args
        exact, rounded = x.chunk(2)
        if isinstance(module, Quantizer):
            return torch.cat([exact, by_parts(module, rounded)])
        outputs = by_parts(self._exact[str(target)], exact)
        own = self._maps.get(str(target))
        wanted = outputs if own is None else own(outputs, 1 if isinstance(module, QuantizedConv2d) else -1)
        answer = self.layer(str(target), module, rounded, wanted)
        del wanted  # up to a gigabyte, and the next line needs two
        return torch.cat([outputs, answer])

    def layer(self, name: str, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> Tensor:
        """The layer's answer to its quantized input x, where the teacher's, in the student's channels, is `wanted`."""
        raise NotImplementedError
