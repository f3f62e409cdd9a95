"""The sentences of a report: what to deploy, how to read the numbers, and warnings."""

import re
from collections.abc import Iterator

from clusterq_deploy.report.analysis import (
    BASELINE,
    HALF,
    MAX_DISAGREEMENT,
    MAX_DROP,
    SPEED_TIE,
    UNSTEADY,
    Verdict,
    allowed_cost,
    latency_rows,
    verdicts,
)
from clusterq_deploy.report.formats import ABSENT, TIMES, duration, milliseconds, number, percent, speedup, with_error
from clusterq_deploy.results.report import FeatureSet, Histogram, LabelCheck, LayerHistograms, Report, Variant

_RECOGNIZED = 50.0  # percent of the images
_FOREIGN = 0.5
"""Standard deviations between images and the statistics that they were made for: the median layer of models with their
own statistics has 0.05 to 0.31, even after a dozen steps; of those with reset, shuffled or foreign ones 0.8 or more."""
_BITS = re.compile(r"w(\d+)a(\d+)(?:\W.*)?")  # the weight and activation bits in a name such as `w4a8`

_ERROR = "± is one standard error, sqrt(p (1 - p) / n), with half an image added to both counts."
SENSITIVITY_NOTE = (
    "One layer at a time is quantized, its weight and its input; all others stay in float. KL is the divergence from "
    "the fp32 model on views of the synthetic images, in nats; the expected drop is the loss of top-1, in points, if "
    "the model's own probabilities were correct: it ranks layers, and is not a measured drop."
)


def model_name(report: Report) -> str:
    """Return the model's name; for a factory in a file only the name of the factory."""
    path, colon, factory = report.model.name.rpartition(":")
    return factory if colon and path.endswith(".py") else report.model.name


def summary(report: Report) -> str:
    """Return what was done, in one sentence."""
    names = [variant.name for variant in report.variants if variant.name != BASELINE]
    widths = f"to {_listed(names)} " if names else ""
    scored = f"compared with its fp32 teacher on {report.evaluation.images:,} held-out synthetic images"
    if report.evaluation.labelled:
        scored = f"scored on {report.evaluation.images:,} labelled images of {report.evaluation.dataset}"
    return (
        f"{model_name(report)} was quantized {widths}without any of its training data, "
        f"from {report.calibration.images:,} synthetic images, and {scored}."
    )


# What to deploy


def headline(verdict: Verdict) -> str:
    """Return what to do in one runtime, in a few words."""
    variant = verdict.choice.variant if verdict.choice else ""
    words = {
        "deploy": f"Deploy {variant}",
        "unsure": f"Perhaps {variant}",
        "same": "No difference in speed",
        "unmeasured": "Not measurable here",
        "unknown": "No suggestion",
    }
    return words.get(verdict.outcome, f"Keep {BASELINE}")


def verdict_figures(verdict: Verdict, labelled: bool) -> list[tuple[str, str]]:
    """Return label and value of the numbers behind a suggestion; none if nothing is suggested."""
    choice = verdict.choice
    if choice is None or verdict.outcome not in ("deploy", "unsure"):
        return []
    pace = ("~" if choice.unsteady else "") + speedup(choice.latency.speedup)
    figures = [(f"speed of {BASELINE} at batch {choice.latency.batch}", pace)]
    if choice.latency.over_half is not None:
        figures.append(("speed of fp16", speedup(choice.latency.over_half)))
    if labelled:
        figures.append(("points of top-1 lost", with_error(choice.cost, choice.cost_error)))
    else:
        figures.append((f"agreement with {BASELINE}", f"{with_error(choice.accuracy.agreement, choice.cost_error)} %"))
    if choice.size_share is not None:
        figures.append(("of its size", percent(choice.size_share)))
    return figures


def sentence(verdict: Verdict, labelled: bool) -> str:
    """Return what to deploy in one runtime, with its cost, speed and size."""
    choice, where = verdict.choice, f"On {verdict.runtime}"
    if choice is None or choice.cost is None or choice.interval is None:
        return f"{where} nothing can be suggested: no variant could be compared with fp32."
    cost = _cost(choice.cost, choice.cost_error, labelled)
    if verdict.outcome == "inaccurate":
        limit = _limit(labelled)
        return f"{where} keep fp32: no variant is within {limit}; the closest, {choice.variant}, {cost}."
    interval = f"{choice.interval[0]:.2f} to {choice.interval[1]:.2f}{TIMES}"
    space = "" if choice.size_share is None else f"in {percent(choice.size_share)} of the size"
    if verdict.outcome in ("same", "unmeasured"):
        interval = f"({interval} at batch {choice.latency.batch})"
        speed = f"no difference in speed from fp32 was measured for {choice.variant} {interval}"
        if verdict.outcome == "unmeasured":
            speed = f"the speed of {choice.variant} is not measurable here {interval}: the machine was busy"
        return f"{where} {speed}{f'; it is stored {space}' if space else ''}; it {cost}."
    measured = choice.latency.speedup_low is not None
    pace = "about " if choice.unsteady and not measured else ""
    pace += speedup(choice.latency.speedup) + (f" ({interval})" if measured else "") + " the speed of fp32"
    pace += "" if choice.latency.over_half is None else f" and {speedup(choice.latency.over_half)} that of fp16"
    pace += f" at batch {choice.latency.batch}"
    if verdict.baseline is not None:
        times = (milliseconds(point.latency.median_ms) for point in (choice, verdict.baseline))
        pace += " ({} ms against {} ms)".format(*times)
    pace += f", {space}" if space else ""
    if verdict.outcome == "slow":
        return f"{where} keep fp32: {choice.variant} runs at {pace}; it {cost}."
    file = f" ({choice.accuracy.graph})" if choice.accuracy.graph else ""
    advice = "deploy" if verdict.outcome == "deploy" else "consider"
    return f"{where} {advice} {choice.variant}{file}: {pace}; it {cost}."


def caveats(report: Report) -> list[str]:
    """Return what makes the suggestions uncertain, in sentences, the most important first."""
    labelled, top1 = report.evaluation.labelled, report.calibration.teacher_top1
    errors = [verdict.choice.cost_error or 0.0 for verdict in verdicts(report) if verdict.choice]
    sentences = []
    if report.model.random:
        sentences.append(
            "The weights are random: the numbers show that the model can be processed, and at what cost; they say "
            "nothing about the accuracy of a trained model."
        )
    calibration = report.calibration
    if not report.model.random and (
        warning := statistics_warning(calibration.statistics_distance, new=calibration.new_statistics)
    ):
        sentences.append(f"{warning[0].upper()}{warning[1:]}.")
    check = None if report.model.random else report.evaluation.label_check
    if check and (warning := label_warning(check, BASELINE)):
        sentences.append(f"{warning[0].upper()}{warning[1:]}.")
    if any(error > allowed_cost(report) for error in errors):
        sentences.append(
            f"{report.evaluation.images:,} images are too few to tell whether a variant is within {_limit(labelled)}: "
            "evaluate on more."
        )
    if not labelled and report.calibration.images and top1 < _RECOGNIZED:
        sentences.append(
            f"The teacher predicts the intended label for only {top1:.0f} % of the synthetic images: agreement on such "
            "images says little about real ones. Evaluate on labelled images with --data."
        )
    return sentences


def statistics_warning(distance: float | None, *, new: bool) -> str | None:
    """Return why the images hardly imitate the training data, if that is so; `distance` and `new` of a report."""
    if new:
        return (
            "the BatchNorm statistics are those of new layers (mean 0, variance 1): nothing was learned from data, and "
            "the images imitate nothing; are these the trained weights?"
        )
    if distance is None or distance <= _FOREIGN:
        return None
    return (
        f"the BatchNorm statistics hardly belong to the weights: half of the layers are {distance:.2g} standard "
        "deviations or more away from them on the images that were made to match (0.1 is usual), so that the images "
        "imitate little; are statistics and weights of one checkpoint?"
    )


def label_warning(check: LabelCheck, model: str) -> str | None:
    """Return what the tests show if labels and classes hardly belong together; else None."""
    if not check.at_chance and not check.renaming_helps:
        return None
    verdict = f"labels and classes hardly belong together: {model} has a top-1 of {number(check.top1)} %"
    tests = f"with the labels in random order it is {number(check.permuted)} % (as high or higher in "
    tests += f"{percent(check.reaching)} of {check.permutations} permutations)"
    if check.renamed is None:
        return f"{verdict}; {tests}"
    tests += f", with the classes renamed one-to-one to fit best {number(check.renamed)} % "
    tests += f"({number(check.renamed_permuted)} % in random order)"
    if not check.renaming_helps or check.renamed < _RECOGNIZED:
        advice = "no renaming fits well: the images may not be as the model expects (contents, pixels, orientation)"
        return f"{verdict}; {tests}; {advice}"
    if check.shift is None or check.shifted is None:
        return f"{verdict}; {tests}: the classes seem to be in another order"
    return f"{verdict}; {tests}, with {check.shift:+d} added to every label {number(check.shifted)} %"


def _limit(labelled: bool) -> str:
    return f"{MAX_DROP:g} point of top-1" if labelled else f"{MAX_DISAGREEMENT:g} % disagreement"


def _cost(points: float, error: float | None, labelled: bool) -> str:
    if not labelled:
        return f"agrees with the teacher on {with_error(100 - points, error)} % of the images"
    if round(points, 2) == 0:
        return "keeps the top-1 of fp32" + ("" if error is None else f" (± {number(error)} points)")
    return f"{'loses' if points > 0 else 'gains'} {with_error(abs(points), error)} points of top-1"


# How to read the numbers


def notes(report: Report) -> Iterator[str]:
    """Yield how to read the numbers."""
    rows = latency_rows(report)
    runtimes = {row.runtime for row in rows}
    yield from _accuracy_notes(report)
    if report.model.probabilities:
        yield (
            f"The model ends in a {report.model.probabilities}: images were made and students tuned by the logits in "
            "front of it; the graphs answer with probabilities, as the model does."
        )
    if unreadable := unreadable_note(report):
        yield unreadable
    for note in report.evaluation.notes:
        yield f"{report.evaluation.dataset}: {note}."
    yield from _grid_notes(report)
    if rows:
        yield (
            "Latency is the time of one call of a whole batch. Speed-up is over fp32 in the same runtime, at the same "
            "batch and threads: if the two were timed in alternation, the median ratio of a round's first quartiles "
            "with its 95 % interval, else the ratio of medians. Images per second include slow calls."
        )
    yield from _tuning_notes(report)
    if any(row.variant == HALF for row in rows):
        yield _half_note(report)
    if any(row.unsteady for row in rows):
        yield (
            f"~ marks a latency whose standard deviation exceeds {100 * UNSTEADY:g} % of its mean: "
            "the machine was busy."
        )
    if "onnxruntime-cpu" in runtimes and report.environment.cpu_int8 == []:
        yield (
            "This CPU has no instructions for INT8 dot products (VNNI, AMX): INT8 gains little on it, and "
            "more on a CPU with them."
        )
    yield (
        f"The suggestion is the fastest variant within {_limit(report.evaluation.labelled)}, in each runtime; of those "
        f"within {100 * SPEED_TIE:g} % of its time, the one with the smallest loss; and only if the whole interval of "
        "its speed-up is above 1."
    )
    if "onnxruntime-cuda" in runtimes:
        yield (
            "ONNX Runtime's CUDA provider has no INT8 convolutions: it dequantizes and convolves in float, so that "
            "quantized models are not faster."
        )
    if "onnxruntime-tensorrt" in runtimes:
        yield (
            "ONNX Runtime's TensorRT provider builds its own engine of the graph for TensorRT; its latency is from "
            "host to host, as for ONNX Runtime's other providers."
        )


def unreadable_note(report: Report) -> str | None:
    """Return the number and names of images that could not be read; None if there are none."""
    evaluation = report.evaluation
    if not evaluation.unreadable:
        return None
    images = [f"{image.file} ({image.reason})" for image in evaluation.unreadable_files]
    if images and (more := evaluation.unreadable - len(images)) > 0:
        images.append(f"{more:,} more")
    total, listed = evaluation.images + evaluation.unreadable, f": {'; '.join(images)}" if images else ""
    images_of = f"{evaluation.unreadable:,} of {total:,} images of {evaluation.dataset}"
    return f"{images_of} could not be read and are not counted{listed}."


def file_notes(report: Report) -> list[tuple[str, str]]:
    """Return path and notes of each file that has any."""
    artifacts = [artifact for variant in report.variants for artifact in variant.artifacts]
    return [(artifact.path, "; ".join(artifact.notes)) for artifact in artifacts if artifact.notes]


def _accuracy_notes(report: Report) -> Iterator[str]:
    images, dataset = f"{report.evaluation.images:,}", report.evaluation.dataset
    if not report.evaluation.labelled:
        yield (
            f"No labelled images were given, so accuracy was not measured. Agreement is the percentage of {images} "
            "held-out synthetic images on which a variant and the fp32 teacher predict the same class; it may differ "
            f"on real images. {_ERROR}"
        )
        return
    yield (
        f"Top-1 and top-5 are percentages of {images} images of {dataset}; agreement is the percentage on which a "
        f"variant and the fp32 teacher predict the same class. {_ERROR}"
    )
    yield (
        "Drop is fp32's top-1 in the same runtime minus the variant's, in points. Both are measured on the same "
        "images, so its ± is that of a paired difference: an upper bound, from the number of different predictions."
    )
    if any(a.runtime == "torch" for v in report.variants if v.name != BASELINE for a in v.accuracy):
        yield "In torch a variant is simulated in float: it shows the cost of the grid, and is not deployable."


def _grid_notes(report: Report) -> Iterator[str]:
    bits = {v.name: min(map(int, match.groups())) for v in report.variants if (match := _BITS.fullmatch(v.name))}
    if coarse := [name for name in bits if bits[name] < 8]:
        grids = _listed(sorted({f"{bits[name]}-bit" for name in coarse}))
        yield (
            f"{_listed(coarse)}: neither TensorRT nor ONNX Runtime has INT4 convolutions. Both run such a network in "
            f"INT8 with values on a {grids} grid: INT4 saves storage, at the speed of INT8."
        )
    if names := [variant.name for variant in report.variants if variant.cpu == "any"]:
        yield (
            f"{_listed(names)}: the graph for ONNX Runtime computes the same on every CPU, with and without VNNI: no "
            "sum of two integer products of an output channel exceeds 16 bits."
        )
    if names := [variant.name for variant in report.variants if variant.cpu == "vnni"]:
        yield (
            f"{_listed(names)}: the graph for ONNX Runtime was requested with --cpu vnni. On x86 CPUs without VNNI its "
            "sums saturate at 16 bits, and its results differ."
        )
        if not {"avx_vnni", "avx512_vnni"}.intersection(report.environment.cpu_int8 or []):
            yield "This CPU has no VNNI: the accuracy of these graphs here is not the accuracy on CPUs with it."
    for variant in report.variants:
        if variant.keep:
            layers = _listed([f"{layer} ({width})" for layer, width in variant.keep.items()])
            yield f"{variant.name}: layers with other bits{_expected_drop(variant)}: {layers}."
    if any(artifact.target == "int4" for variant in report.variants for artifact in variant.artifacts):
        yield (
            "The int4 files have two weights per byte, for storage; ONNX Runtime dequantizes them and convolves in "
            "float, so they are not faster than fp32."
        )


def _expected_drop(variant: Variant) -> str:
    """Return the expected drop that the widths of single layers were chosen for, as a clause."""
    drop = variant.expected_drop
    if drop is None:
        return ""
    missed = f", more than the requested {variant.max_drop:g}" if drop > (variant.max_drop or drop) else ""
    return f", for an expected drop before fine-tuning of {number(drop)} points{missed}"


def _tuning_notes(report: Report) -> Iterator[str]:
    """Yield the stages in smaller batches than requested, and the variants that fine-tuning did not improve."""
    divisors = {"Synthesis": report.calibration.batch_divisor}
    divisors |= {f"Fine-tuning of {variant.name}": variant.batch_divisor for variant in report.variants}
    for stage, divisor in divisors.items():
        if divisor > 1:
            yield f"{stage} used batches of 1/{divisor} of the configured size: there was not enough memory."
    for variant in report.variants:
        if variant.kept_step == 0:
            yield (
                f"{variant.name}: no step of fine-tuning improved it on the held-out synthetic images; its weights are "
                "those before fine-tuning."
            )


def _half_note(report: Report) -> str:
    """Return what fp16 is, and which engines could use it."""
    names = [
        variant.name
        for variant in report.variants
        if variant.name != BASELINE and any(file.kind == "engine" and not file.fp16 for file in variant.artifacts)
    ]
    advice = f" Layers that are not quantized compute in float32 in {_listed(names)}; --fp16 changes that."
    return (
        "fp16 is the float model with all layers in FP16, at almost no loss: an INT8 engine is useful only if it is "
        f"faster than that, not only than fp32.{advice if names else ''}"
    )


# Calibration set, features, layers, machine


def calibration_facts(report: Report) -> list[tuple[str, str]]:
    """Return labels and values of the calibration set."""
    calibration = report.calibration
    facts = {
        "Synthetic images": f"{calibration.images:,}",
        "Recipe": calibration.recipe,
        "Time": duration(calibration.seconds),
        "Teacher predicts the intended label": f"{calibration.teacher_top1:.2f} %",
        "Diversity within a class, at the last BatchNorm": number(calibration.within_class_diversity, 3),
        "Separability of the classes (silhouette), before the classifier": number(calibration.silhouette, 3),
    }
    return [(label, value) for label, value in facts.items() if value != ABSENT]


def environment_facts(report: Report) -> list[tuple[str, str]]:
    """Return labels and values of the machine, without unknown ones."""
    environment, int8 = report.environment, report.environment.cpu_int8
    facts = {
        "GPU": environment.gpu or "none used",
        "NVIDIA driver": environment.driver,
        "CUDA": environment.cuda,
        "CPU": environment.cpu,
        "CPU INT8 instructions": None if int8 is None else ", ".join(int8) or "none",
        "Cores": str(environment.cores),
        "Memory": f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else None,
        "Platform": environment.platform,
        "Python": environment.python,
        **{name: getattr(environment, name) for name in ("torch", "torchvision", "onnx", "onnxruntime")},
        "TensorRT": environment.tensorrt or "not installed",
    }
    return [(label, value) for label, value in facts.items() if value]


def feature_sentence(report: Report) -> str | None:
    """Return the comparison of the teacher's features of synthetic and real images; None if there is none."""
    features = report.features
    if features is None:
        return None
    text = f"In front of the classifier ({features.width:,} features), "
    text += _separation(features.synthetic, "synthetic images")
    if features.real is not None:
        text += f", {_separation(features.real, f'real ones ({features.real.dataset})')}"
    if features.coverage is not None:
        text += f"; the synthetic ones cover {percent(features.coverage)} of the real ones"
        text += f" (density {number(features.density)})"
    return text + "."


def _separation(features: FeatureSet, name: str) -> str:
    images = f"{features.images:,} {name} of {features.classes:,} classes"
    if features.silhouette is None:
        return f"{images} have no silhouette"
    silhouette, diversity = number(features.silhouette, 3), number(features.within_class_diversity, 3)
    return f"{images} have a silhouette of {silhouette} and a within-class diversity of {diversity}"


def histogram_line(layer: LayerHistograms) -> str:
    """Return the bits of a layer's weight and input, and their clipped shares."""
    return "; ".join(
        f"{name} {(values.high - values.low).bit_length()} bits, {_clipped(values)} clipped"
        for name, values in (("weight", layer.weight), ("input", layer.activation))
    )


def histogram_caption(values: Histogram) -> str:
    """Return the steps of a histogram's grid, and its clipped share."""
    steps = [f"{step:.3g}" for step in dict.fromkeys(values.steps)]
    words = f"step {steps[0]}" if len(steps) == 1 else f"steps of {steps[0]} to {steps[-1]}"
    return f"{words}, {_clipped(values)} of {sum(values.counts):,} clipped"


def _clipped(values: Histogram) -> str:
    """Return the clipped share as a percentage, never rounded to 0."""
    share = values.clipped
    return "none" if share == 0 else "under 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
