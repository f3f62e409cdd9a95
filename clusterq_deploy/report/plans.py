"""The part of the report on what TensorRT-RTX's compiler made of the graphs: kernels and bytes, never a time."""

from collections.abc import Iterator

from clusterq_deploy.report.analysis import BASELINE, FLOAT, HALF, SPEED_TIE, name_of
from clusterq_deploy.report.formats import ABSENT, TIMES
from clusterq_deploy.report.tables import Table
from clusterq_deploy.results.engines import EnginePlan
from clusterq_deploy.results.report import Report

RUNTIME = "tensorrt-rtx"


def plans(report: Report) -> list[tuple[str, EnginePlan]]:
    """Return each plan that could be read, with its variant: `fp32`, `fp16` or the name of a bit-width setting."""
    every = [(name_of(variant, plan.engine), plan) for variant in report.variants for plan in variant.plans]
    return [(name, plan) for name, plan in every if plan.kernels]


def plan_tables(report: Report) -> list[Table]:
    """Return a row per plan: kernels, convolutions, and the activations that are read and written per image."""
    reference = _reference(report)
    rows = [
        (
            name,
            str(plan.kernels),
            f"{plan.convolutions_int8} of {plan.convolutions}",
            ", ".join(plan.convolutions_write) or ABSENT,
            str(plan.requantizations),
            f"{plan.padded_channels:,}",
            megabytes(plan.bytes_in),
            megabytes(plan.bytes_out),
            megabytes(plan.bytes_stored),
            f"{plan.bytes_moved / reference[1].bytes_moved:.2f}{TIMES}" if reference else ABSENT,
        )
        for name, plan in plans(report)
    ]
    counts = ("Kernels", "INT8 convolutions", "They write", "Requantizations", "Padded channels")
    moved = ("Read, MB", "Written, MB", "Stored, MB", f"Bytes of {reference[0]}" if reference else "Bytes")
    title = "What TensorRT-RTX's compiler made of the graphs, per image"
    return [Table(title, ("Variant", *counts, *moved), rows, 1)] if rows else []


def plan_sentences(report: Report) -> list[str]:
    """Return what the plan of each variant suggests on RTX GPUs; nothing if engines were timed on one."""
    timed = any(latency.runtime == RUNTIME for variant in report.variants for latency in variant.latency)
    reference = _reference(report)
    if timed or reference is None:
        return []
    name, base = reference
    sentences = []
    for variant, plan in plans(report):
        if variant not in FLOAT:
            ratio = plan.bytes_moved / base.bytes_moved
            with_weights = (plan.bytes_moved + plan.bytes_stored) / (base.bytes_moved + base.bytes_stored)
            sentences.append(
                f"On RTX GPUs {variant} moves {ratio:.1f} times the bytes of {name}, in {plan.kernels} kernels against "
                f"{base.kernels}: {_expectation(ratio, with_weights)}."
            )
    return sentences


def _expectation(activations: float, with_weights: float) -> str:
    """Return what to expect of a variant by the bytes that it moves, relative to the float model's.

    Weights are read once per call: they count at batch 1.
    """
    if activations <= 1 - SPEED_TIE:
        return "it may be faster: measure it there"
    if with_weights <= 1 - SPEED_TIE:
        at_one = f"with the weights, at batch 1, it moves {with_weights:.2f} times the bytes"
        return f"expect no gain at large batches; {at_one}"
    return "expect no gain"


def plan_notes(report: Report) -> Iterator[str]:
    """Yield how to read the plans, and what is missing."""
    if shown := plans(report):
        built = {(plan.release, ", ".join(plan.targets)) for _, plan in shown}
        of = "; ".join(f"TensorRT-RTX {release} for {targets}" for release, targets in sorted(built))
        yield (
            f"A plan is the compiler's own table of the kernels ({of}): nothing was run and nothing was timed. A "
            "requantization is a separate kernel that makes INT8 again of what an INT8 convolution wrote in float. "
            "Bytes are those of activations, as each kernel reads and writes them; weights and other constants are "
            "stored, and read once per call. Padded channels are those that convolutions read and write and the graph "
            "does not have."
        )
    for variant in report.variants:
        yield from (f"{plan.engine}: {note}" for plan in variant.plans for note in plan.notes)


def megabytes(size_bytes: int) -> str:
    """Return bytes in MB, with three digits or more: 0.314, 14.0."""
    return f"{size_bytes / 1e6:.{3 if size_bytes < 1e6 else 2 if size_bytes < 1e7 else 1}f}"


def _reference(report: Report) -> tuple[str, EnginePlan] | None:
    """Return the plan that others are compared with: that of the float model in FP16, else in FP32."""
    found = dict(plans(report))
    return next(((name, found[name]) for name in (HALF, BASELINE) if name in found), None)
