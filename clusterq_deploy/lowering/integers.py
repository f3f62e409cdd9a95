"""Graph and torch integer by integer: at every quantizer, from the graph's own integers in front of it."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering.fp16 import computes_in_half
from clusterq_deploy.lowering.lower import GraphFormat, bounded_name, offset_of, quantized_name, target_of
from clusterq_deploy.oom import split_on_oom
from clusterq_deploy.quantization.fake_quant import Quantizer
from clusterq_deploy.quantization.student import Student
from clusterq_deploy.runtimes.runners import Array, OnnxRunner

_TIE = 1e-2
"""How far from a rounding boundary, in steps, a value may lie for its two neighbours to be the same to float32: sums of
some thousand products are exact to about a thousandth of a step, of large ones that cancel to less."""

_HALF_TIE = 0.5
"""The same to FP16, whose eleven bits are half a step of the largest integers, and of a bias that is larger."""


@dataclass(frozen=True)
class SiteComparison:
    """The integers of one quantizer, in a graph and in torch, from the same integers in front of it.

    Attributes:
        site: the quantizer; the layer whose output it quantizes is named so, or `layer.narrow`.
        values: how many were compared.
        ties: how many differ by one, since they lie on a rounding boundary, or near one where the graph is FP16.
        differing: how many differ otherwise.
        largest: the largest difference.
    """

    site: str
    values: int
    ties: int
    differing: int
    largest: int

    def beside(self, other: "SiteComparison | None") -> "SiteComparison":
        """This comparison and another one of the same quantizer as one."""
        if other is None:
            return self
        return SiteComparison(
            self.site,
            self.values + other.values,
            self.ties + other.ties,
            self.differing + other.differing,
            max(self.largest, other.largest),
        )


def compare_integers(
    graph: onnx.ModelProto,
    student: Student,
    images: Array,
    *,
    graph_format: GraphFormat,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> list[SiteComparison]:
    """Compare the integers at every quantizer of activations, in order of execution.

    The graph runs in ONNX Runtime, optimizations off, and gives the integers of all quantizers. torch computes each of
    them anew from the graph's integers in front of it, so that a tie in one layer moves none behind it, and a layer
    that computes something else is seen by itself.

    Args:
        graph: a graph of the student.
        student: calibrated, on any device.
        images: (N, C, H, W) float32, normalized.
        graph_format: which one `graph` is.
        batch_size: images a pass.
        progress: shows how far it is.
    """
    runner = OnnxRunner(_tapped(graph, student).SerializeToString(), optimized=False)
    follower = _Follower(student, graph_format, _HALF_TIE if computes_in_half(graph) else _TIE)
    follow = split_on_oom(lambda part: follower.follow(part, runner.outputs(part)), "integers")
    found: dict[str, SiteComparison] = {}
    with runner, student.for_target(target_of(graph_format)), progress.task("Integers", len(images)) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            for own in chain.from_iterable(follow(batch)):
                found[own.site] = own.beside(found.get(own.site))
            advance(len(batch))
    return list(found.values())


def require_same_integers(found: Sequence[SiteComparison], *, name: str) -> None:
    """Accept a comparison that has ties alone.

    Raises:
        VerificationError: graph and torch part; the message names the first quantizer where they do.
    """
    parted = next((site for site in found if site.differing), None)
    if parted is not None:
        raise VerificationError(
            f"{name} parts from torch at the quantizer {parted.site!r}: {parted.differing} of {parted.values} integers "
            f"differ, by up to {parted.largest}, and lie on no rounding boundary"
        )


def _tapped(graph: onnx.ModelProto, student: Student) -> onnx.ModelProto:
    """A copy of a graph that gives the integers of its quantizers too."""
    sites = {site.name: len(site.producers) for site in student.placement.activations}
    labels = [name if index == 1 else f"{name}.{index}" for name, n in sites.items() for index in range(1, n + 1)]
    wanted = {spelled(label) for label in labels for spelled in (quantized_name, bounded_name)}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    made = [name for node in graph.graph.node for name in node.output if name in wanted]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    return tapped


class _Follower:
    """Runs a student with a graph's integers in the place of its own, and counts a batch's differences."""

    def __init__(self, student: Student, graph_format: GraphFormat, tie: float) -> None:
        self._student, self._graph_format, self._tie = student, graph_format, tie
        self._device = next(student.parameters()).device
        self._counts: dict[str, SiteComparison] = {}
        self._calls: Counter[str] = Counter()
        self._theirs: dict[str, Any] = {}

    @torch.no_grad()
    def follow(self, images: Array, integers: dict[str, Any]) -> list[SiteComparison]:
        """Compare one batch, (N, C, H, W) float32, with the graph's integers of it by their names."""
        self._theirs = integers
        self._calls.clear()
        self._counts.clear()
        weights = {layer.weight_quantizer for layer in self._student.layers().values()}
        with ExitStack() as hooks:
            for quantizer in self._student.quantizers().values():
                if quantizer not in weights:
                    hooks.enter_context(quantizer.register_forward_hook(self._replace))
            self._student(torch.from_numpy(images).to(self._device))
        return list(self._counts.values())

    def _replace(self, quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not quantizer.enabled:
            return output
        site = quantizer.site
        self._calls[site] += 1
        label = site if self._calls[site] == 1 else f"{site}.{self._calls[site]}"
        name = next(n for n in (bounded_name(label), quantized_name(label)) if n in self._theirs)
        theirs = self._theirs[name].astype(np.int32) - offset_of(quantizer.grid, self._graph_format)
        given = torch.from_numpy(theirs).to(self._device)
        exact = args[0].double() / quantizer.scale.double()
        own = exact.round().clamp(quantizer.grid.low, quantizer.grid.high).to(torch.int32)
        apart = (own - given).abs()
        tie = (apart == 1) & ((exact - (own + given).double() / 2).abs() <= self._tie)
        differing = int(((apart > 0) & ~tie).sum())
        counted = SiteComparison(site, apart.numel(), int(tie.sum()), differing, int(apart.max()))
        self._counts[site] = counted.beside(self._counts.get(site))
        return given.to(output.dtype) * quantizer.scale
