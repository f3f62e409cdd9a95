"""Markdown of the tables in docs/, from the records of the results."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cells import Cell, Model, Record
from published import Published

_DASH = "\N{EN DASH}"
_UNMEASURED = "not yet measured"


def mean_and_std(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean ± the standard deviation of a sample; only the value if there is one."""
    mean = f"{statistics.mean(values):z.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def standard_error(drop: float, agreement: float, images: int) -> float:
    """Return an upper bound of the standard error of a drop on some images, in points.

    An image adds -1, 0 or 1 to the drop, and 0 if both models agree, so that its variance is at most the share of
    disagreement less the square of the drop. `agreement` is the percentage of images with the same prediction.
    """
    variance = (1 - agreement / 100) - (drop / 100) ** 2
    return 100 * math.sqrt(max(0.0, variance) / images)


def duration(seconds: float) -> str:
    """Write a duration such as 45 s, 2 min 5 s or 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(size_bytes: float) -> str:
    """Write a size in decimal gigabytes or megabytes."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table; in a cell's text only bars are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def _setting(bits: str, first_last: bool) -> str:
    return f"{bits.upper()}, {'all layers' if first_last else 'first and last 8 bits'}"


def _recipe(record: Record) -> str:
    settings = "own settings" if record["settings"] and not record["label"] else None
    return ", ".join(part for part in (record["recipe"], record["effort"], settings) if part)


def _group(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Group records by the values of these fields, in their order."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _mean_error(seeds: Sequence[Record]) -> str:
    return f"{statistics.mean(standard_error(r['drop'], r['agreement'], r['images']) for r in seeds):.2f}"


# of the seeds of one setting
_FIGURES: dict[str, Callable[[Sequence[Record]], str]] = {
    "seeds": lambda seeds: str(len(seeds)),
    "FP32 %": lambda seeds: mean_and_std([seeds[0]["fp32_top1"]]),
    "top-1 %": lambda seeds: mean_and_std([r["top1"] for r in seeds]),
    "drop": lambda seeds: mean_and_std([r["drop"] for r in seeds]),
    "standard error": _mean_error,
    "agreement %": lambda seeds: mean_and_std([r["agreement"] for r in seeds]),
    "top-1 %, TensorRT's graph": lambda seeds: mean_and_std([r["top1_tensorrt_graph"] for r in seeds]),
    "time": lambda seeds: duration(statistics.mean(r["synthesis_seconds"] + r["quantize_seconds"] for r in seeds)),
    "commands": lambda seeds: duration(statistics.mean(r["wall_seconds"] for r in seeds)),
    "peak memory": lambda seeds: memory(max(r["peak_memory_bytes"] for r in seeds)),
}
_ABLATION_FIGURES = list(_FIGURES)[:5]
_ABLATION_HEAD = ("images from", "model", "steps (warm-up)", *_ABLATION_FIGURES, "within-class diversity %",
                  "FP32 % on synthetic images")  # fmt: skip


def model_section(
    model: Model,
    planned: Sequence[Cell],
    cells: Sequence[Record],
    failed: Sequence[Record],
    published: Sequence[Published],
) -> str:
    """Write a model's heading, its measured and planned rows, and published numbers."""
    measured = [cell for cell in cells if cell["model"] == model.name]
    settings = [(cell.first_last, cell.bits) for cell in planned if cell.model == model.name]
    settings += [(cell["first_last"], cell["bits"]) for cell in measured]
    rows = []
    for first_last, bits in dict.fromkeys(settings):
        same = [c for c in measured if (c["first_last"], c["bits"]) == (first_last, bits)]
        for seeds in _group(same, "recipe", "effort", "label", "code", "config_digest").values():
            origin = _recipe(seeds[0]) + _by_commit(seeds[0], same)
            rows.append([_setting(bits, first_last), origin, *(figure(seeds) for figure in _FIGURES.values())])
        if not same:
            rows.append([_setting(bits, first_last), _UNMEASURED, *[_DASH] * len(_FIGURES)])
    parts = [f"## {model.title}\n", _measured_on(measured), table(["setting", "recipe", *_FIGURES], rows)]
    parts.append(_failures([record for record in failed if record["model"] == model.name]))
    if rows := [_published_row(entry) for entry in published if entry.model == model.name]:
        head = ["setting", "method and source", "FP32 → quantized", "drop", "comparable?"]
        parts += ["Published:\n", table(head, rows)]
    return "\n".join(part for part in parts if part)


def ablation_section(planned: Sequence[Cell], cells: Sequence[Record], failed: Sequence[Record]) -> str:
    """Write the rows of the ablation, by the length of their training."""
    rows = []
    for label in dict.fromkeys([*(cell.label for cell in planned), *(cell["label"] for cell in cells)]):
        same = [cell for cell in cells if cell["label"] == label]
        for seeds in _group(same, "model", "bits", "first_last", "effort", "code", "config_digest").values():
            first, steps = seeds[0], seeds[0]["settings"]["synthesis"]["generator"]
            shares = [100 * r["within_class_diversity"] for r in seeds if r["within_class_diversity"] is not None]
            row = [label + _by_commit(first, same), f"{first['model']}, {_setting(first['bits'], first['first_last'])}"]
            row += [f"{steps['steps']:,} ({steps['warmup_steps']:,})"]
            row += [_FIGURES[name](seeds) for name in _ABLATION_FIGURES]
            row += [mean_and_std(shares, 1) if shares else _DASH, mean_and_std([r["teacher_top1"] for r in seeds], 1)]
            rows.append(row)
        if not same:
            rows.append([label, _UNMEASURED, *[_DASH] * (len(_ABLATION_HEAD) - 2)])
    parts = [_measured_on(cells), table(_ABLATION_HEAD, rows), _failures(failed)]
    return "\n".join(part for part in parts if part)


def _failures(failed: Sequence[Record]) -> str:
    """Write a list of the cells whose last attempt failed."""
    items = []
    for record in failed:
        label = f" {record['label']}" if record["label"] else ""
        cell = f"{_setting(record['bits'], record['first_last'])}{label}, {_recipe(record)}, seed {record['seed']}"
        items.append(f"- failed: {cell}: `{record['error']}`\n")
    return "".join(items)


def _by_commit(record: Record, others: Iterable[Record]) -> str:
    """Write a record's commit in parentheses, if others of the same setting are by another one."""
    return f" (commit {record['commit']})" if len({other["code"] for other in others}) > 1 else ""


def _measured_on(cells: Sequence[Record]) -> str:
    """Write the images, versions and machines of some records, in a sentence each; empty without records."""
    sentences = []
    for (dataset, images), group in _group(cells, "dataset", "images").items():
        machines = dict.fromkeys(_machine(record) for record in group)
        commits = dict.fromkeys(f"`{record['commit']}`" for record in group if record["commit"])
        by = f", commit {' and '.join(commits)}" if commits else ""
        sentences.append(f"{images:,} images of {dataset}; {'; '.join(machines)}{by}.")
    return " ".join(sentences) + "\n" if sentences else ""


def _machine(record: Record) -> str:
    machine, threads = record["environment"], record["omp_num_threads"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''} of {machine['cpu']}"
    cores += f", {threads} of them used" if threads and int(threads) < machine["cores"] else ""
    cores += f", {machine['gpu']}" if machine["gpu"] else ""
    versions = f"torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}, clusterq-deploy {record['version']}"
    return f"{cores}, {versions}"


def _published_row(entry: Published) -> list[str]:
    """Write a published number as a row; unpublished values are dashes."""
    fp32, top1, drop = (_DASH if value is None else f"{value:.2f}" for value in (entry.fp32, entry.top1, entry.drop))
    accuracy = _DASH if entry.top1 is None and entry.fp32 is None else f"{fp32} → {top1}"
    network = f"{entry.network} {_setting(entry.bits, entry.first_last)}"
    return [network, entry.source, accuracy, drop, entry.comparable]
