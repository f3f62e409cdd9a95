"""Compare graph and torch integer by integer: each quantizer, given the graph's integers in front of it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import VerificationError
from clusterq_deploy.lowering.fp16 import computes_in_fp16
from clusterq_deploy.lowering.lower import GraphFormat, bounded_name, label_of, offset_of, quantized_name, target_of
from clusterq_deploy.oom import split_on_oom
from clusterq_deploy.quantization.fake_quant import Quantizer
from clusterq_deploy.quantization.student import Student
from clusterq_deploy.runtimes.runners import Array, OnnxRunner

_TIE = 1e-2
"""How far from a rounding boundary, in steps, a value may be for its two neighbours to be the same to float32: sums of
some thousand products are exact to about a thousandth of a step, of large ones that cancel to less."""

_FP16_TIE = 0.5
"""This distance for FP16, whose eleven bits are half a step of the largest integers, and of a bias that is larger."""


@dataclass(frozen=True)
class SiteComparison:
    """How many integers of one quantizer differ in a graph and in torch, from the same integers in front of it.

    Attributes:
        site: the quantizer, named after the layer whose output it quantizes, or `layer.narrow`.
        values: how many were compared.
        ties: how many differ by one because they are on a rounding boundary, or near one if the graph is FP16.
        differing: how many differ otherwise.
        largest: the largest difference.
    """

    site: str
    values: int
    ties: int
    differing: int
    largest: int


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

    The graph runs in ONNX Runtime, optimizations off, and returns the integers of all quantizers. torch computes each
    of them again from the graph's integers in front of it, so that a tie in one layer moves none behind it, and a
    layer that computes something else shows by itself.

    Args:
        graph: a graph of the student, of `graph_format`.
        student: calibrated, on any device.
        images: (N, C, H, W) float32, normalized.
    """
    runner = OnnxRunner(_with_integer_outputs(graph, student).SerializeToString(), optimized=False)
    tie = _FP16_TIE if computes_in_fp16(graph) else _TIE

    def compare(part: Array) -> list[SiteComparison]:
        return _compare_batch(student, part, runner.outputs(part), graph_format=graph_format, tie=tie)

    compare_split, by_site = split_on_oom(compare, "integers"), defaultdict[str, list[SiteComparison]](list)
    with runner, student.for_target(target_of(graph_format)), progress.task("Integers", len(images)) as advance:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            for comparison in chain.from_iterable(compare_split(batch)):
                by_site[comparison.site].append(comparison)
            advance(len(batch))
    return [
        SiteComparison(
            site,
            values=sum(c.values for c in comparisons),
            ties=sum(c.ties for c in comparisons),
            differing=sum(c.differing for c in comparisons),
            largest=max(c.largest for c in comparisons),
        )
        for site, comparisons in by_site.items()
    ]


def require_same_integers(comparisons: Sequence[SiteComparison], *, name: str) -> None:
    """Accept a comparison that has nothing but ties.

    Raises:
        VerificationError: graph and torch differ; the message names the first quantizer at which they do.
    """
    first = next((site for site in comparisons if site.differing), None)
    if first is not None:
        raise VerificationError(
            f"{name} differs from torch at the quantizer {first.site!r}: {first.differing} of {first.values} integers "
            f"differ, by up to {first.largest}, and are on no rounding boundary"
        )


def _with_integer_outputs(graph: onnx.ModelProto, student: Student) -> onnx.ModelProto:
    """Return a copy of a graph that outputs the integers of its quantizers too."""
    sites = {site.name: len(site.producers) for site in student.placement.activations}
    labels = [label_of(name, call) for name, count in sites.items() for call in range(1, count + 1)]
    names = {name_of(label) for label in labels for name_of in (quantized_name, bounded_name)}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    outputs = [name for node in graph.graph.node for name in node.output if name in names]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return tapped


@torch.no_grad()
def _compare_batch(
    student: Student, images: Array, integers: Mapping[str, npt.NDArray[Any]], *, graph_format: GraphFormat, tie: float
) -> list[SiteComparison]:
    """Run a student with the graph's integers, by tensor name, in place of its own, and count the differences."""
    device = next(student.parameters()).device
    calls: Counter[str] = Counter()
    comparisons: list[SiteComparison] = []

    def replace(quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not quantizer.enabled:
            return output
        site, grid = quantizer.site, quantizer.grid
        calls[site] += 1
        label = label_of(site, calls[site])
        stored = next(integers[name] for name in (bounded_name(label), quantized_name(label)) if name in integers)
        graph_integers = torch.from_numpy(stored.astype(np.int32) - offset_of(grid, graph_format)).to(device)
        exact = args[0].double() / quantizer.scale.double()
        torch_integers = exact.round().clamp(grid.low, grid.high).to(torch.int32)
        apart = (torch_integers - graph_integers).abs()
        middle = (torch_integers + graph_integers).double() / 2
        ties = (apart == 1) & ((exact - middle).abs() <= tie)
        differing = int(((apart > 0) & ~ties).sum())
        comparisons.append(SiteComparison(site, apart.numel(), int(ties.sum()), differing, int(apart.max())))
        return graph_integers.to(output.dtype) * quantizer.scale

    weights = {layer.weight_quantizer for layer in student.layers().values()}
    with ExitStack() as hooks:
        for quantizer in student.quantizers().values():
            if quantizer not in weights:
                hooks.enter_context(quantizer.register_forward_hook(replace))
        student(torch.from_numpy(images).to(device))
    return comparisons
