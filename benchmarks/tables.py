"""Markdown of the tables in docs/accuracy.md, from the records of the results."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cells import Cell, Model
from published import Published

Record = dict[str, Any]

_DASH = "\N{EN DASH}"
_UNMEASURED = "not yet measured"


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean ± the standard deviation of a sample; the value alone where there is one."""
    mean = f"{statistics.mean(values):z.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def standard_error(drop: float, agreement: float, images: int) -> float:
    """At most how far a drop on so many images lies from that on all images, as one standard deviation, in points.

    An image adds -1, 0 or 1 to the drop, and 0 wherever both models agree, so that the variance of one image is at
    most the share of disagreement less the square of the drop.

    Args:
        drop: in points.
        agreement: percent of images with the same prediction.
        images: their number.
    """
    variance = (1 - agreement / 100) - (drop / 100) ** 2
    return 100 * math.sqrt(max(0.0, variance) / images)


def duration(seconds: float) -> str:
    """Such as 45 s, 2 min 5 s or 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(size_bytes: float) -> str:
    """In decimal gigabytes or megabytes."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def setting(bits: str, first_last: bool) -> str:
    """Such as `W4A4, all layers`."""
    return f"{bits.upper()}, {'all layers' if first_last else 'first and last 8 bits'}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; of a cell's text only bars are escaped."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of these fields, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def figures(records: Sequence[Record]) -> list[str]:
    """What the seeds of one setting have in common, and how far they spread."""
    own = [standard_error(r["drop"], r["agreement"], r["images"]) for r in records]
    return [
        str(len(records)),
        mean_and_spread([r["fp32_top1"] for r in records[:1]]),
        mean_and_spread([r["top1"] for r in records]),
        mean_and_spread([r["drop"] for r in records]),
        f"{statistics.mean(own):.2f}",
        mean_and_spread([r["agreement"] for r in records]),
        mean_and_spread([r["top1_tensorrt_graph"] for r in records]),
        duration(statistics.mean(r["synthesis_seconds"] + r["quantize_seconds"] for r in records)),
        duration(statistics.mean(r["wall_seconds"] for r in records)),
        memory(max(r["peak_memory_bytes"] for r in records)),
    ]


FIGURES = (
    "seeds", "FP32 %", "top-1 %", "drop", "standard error", "agreement %", "top-1 %, TensorRT's graph", "time",
    "commands", "peak memory",
)  # fmt: skip


def model_section(
    model: Model, planned: Sequence[Cell], cells: Sequence[Record], failed: Sequence[Record], known: Sequence[Published]
) -> str:
    """A model's heading, its measured and planned rows, and published numbers."""
    own = [cell for cell in cells if cell["model"] == model.name]
    wanted = dict.fromkeys((cell.first_last, cell.bits) for cell in planned if cell.model == model.name)
    extra = dict.fromkeys((cell["first_last"], cell["bits"]) for cell in own)
    rows = []
    for first_last, bits in {**wanted, **extra}:
        here = [c for c in own if (c["first_last"], c["bits"]) == (first_last, bits)]
        for group in grouped(here, "recipe", "effort", "label", "code", "config_digest").values():
            rows.append([setting(bits, first_last), recipe(group[0]) + by_commit(group[0], here), *figures(group)])
        if not here:
            rows.append([setting(bits, first_last), _UNMEASURED, *[_DASH] * len(FIGURES)])
    parts = [f"## {model.title}\n", measured_on(own), table(["setting", "recipe", *FIGURES], rows)]
    parts.append(failures([record for record in failed if record["model"] == model.name]))
    published = [entry for entry in known if entry.model == model.name]
    if published:
        parts.append("Published:\n")
        parts.append(table(["setting", "method and source", "FP32 → quantized", "drop", "comparable?"],
                           [published_row(entry) for entry in published]))  # fmt: skip
    return "\n".join(part for part in parts if part)


def failures(failed: Sequence[Record]) -> str:
    """What failed when it was last tried, an item each; empty where nothing did."""
    items = []
    for record in failed:
        label = f" {record['label']}" if record["label"] else ""
        what = f"{setting(record['bits'], record['first_last'])}{label}, {recipe(record)}, seed {record['seed']}"
        items.append(f"- failed: {what}: `{record['error']}`\n")
    return "".join(items)


def by_commit(record: Record, others: Iterable[Record]) -> str:
    """A clause that says by which commit a record is, where others of the same setting are by another."""
    return f" (commit {record['commit']})" if len({other["code"] for other in others}) > 1 else ""


def recipe(record: Record) -> str:
    """How the images were made, in the words of the command."""
    own = "own settings" if record["settings"] and not record["label"] else None
    return ", ".join(part for part in (record["recipe"], record["effort"], own) if part)


def measured_on(cells: Sequence[Record]) -> str:
    """The images, versions and machines of some records, in a sentence each; empty without records."""
    sentences = []
    for (dataset, images), group in grouped(cells, "dataset", "images").items():
        machines = dict.fromkeys(_machine(record) for record in group)
        commits = dict.fromkeys(f"`{record['commit']}`" for record in group if record["commit"])
        by = f", commit {' and '.join(commits)}" if commits else ""
        sentences.append(f"{images:,} images of {dataset}; {'; '.join(machines)}{by}.")
    return " ".join(sentences) + "\n" if sentences else ""


def _machine(record: Record) -> str:
    own = record["environment"]
    threads = record["omp_num_threads"]
    cores = f"{own['cores']} core{'s' if own['cores'] > 1 else ''} of {own['cpu']}"
    cores += f", {threads} of them used" if threads and int(threads) < own["cores"] else ""
    cores += f", {own['gpu']}" if own["gpu"] else ""
    return f"{cores}, torch {own['torch']}, ONNX Runtime {own['onnxruntime']}, clusterq-deploy {record['version']}"


def published_row(entry: Published) -> list[str]:
    """A published number as a row; what the paper does not state is a dash."""
    top1, fp32 = (_DASH if value is None else f"{value:.2f}" for value in (entry.top1, entry.fp32))
    drop = _DASH if entry.drop is None else f"{entry.drop:.2f}"
    accuracy = _DASH if entry.top1 is None and entry.fp32 is None else f"{fp32} → {top1}"
    return [
        f"{entry.network} {setting(entry.bits, entry.first_last)}",
        entry.source,
        accuracy,
        drop,
        entry.comparable,
    ]


def ablation_section(planned: Sequence[Cell], cells: Sequence[Record], failed: Sequence[Record]) -> str:
    """The rows of the ablation, by the length of their training."""
    rows = []
    labels = {**dict.fromkeys(cell.label for cell in planned), **dict.fromkeys(cell["label"] for cell in cells)}
    for label in labels:
        own = [cell for cell in cells if cell["label"] == label]
        for group in grouped(own, "model", "bits", "first_last", "effort", "code", "config_digest").values():
            first, steps = group[0], group[0]["settings"]["synthesis"]["generator"]
            shares = [100 * r["within_class_diversity"] for r in group if r["within_class_diversity"] is not None]
            row = [label + by_commit(first, own), f"{first['model']}, {setting(first['bits'], first['first_last'])}"]
            row += [f"{steps['steps']:,} ({steps['warmup_steps']:,})", *figures(group)[:5]]
            row += [mean_and_spread(shares, 1) if shares else _DASH]
            rows.append([*row, mean_and_spread([r["teacher_top1"] for r in group], 1)])
        if not own:
            rows.append([label, _UNMEASURED, *[_DASH] * (len(ABLATION) - 2)])
    parts = [measured_on(cells), table(ABLATION, rows), failures(failed)]
    return "\n".join(part for part in parts if part)


ABLATION = (
    "images from", "model", "steps (warm-up)", *FIGURES[:5], "within-class diversity %", "FP32 gives their label %",
)  # fmt: skip
