"""The words of a report: what to deploy, how to read the numbers, and what to distrust in them."""

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
    engine_latencies,
    inspections,
    latency_rows,
    verdicts,
)
from clusterq_deploy.report.formats import (
    TIMES,
    duration,
    file_name,
    milliseconds,
    number,
    percent,
    speedup,
    with_error,
)
from clusterq_deploy.results.features import FeatureSet
from clusterq_deploy.results.histograms import Histogram, LayerHistograms
from clusterq_deploy.results.report import Latency, Report, Variant

ENQUEUE_BOUND = 0.8
"""Enqueue time over compute time above which the host may hold the GPU back; trtexec warns at the same share."""
HOST_BOUND = 1.2
"""Time between calls over their longest part on the GPU above which the throughput is that of the host."""
_RECOGNIZED = 50.0  # percent of the synthetic images
_LISTED = 10  # layers in a sentence
_BITS = re.compile(r"w(\d+)a(\d+)(?:\W.*)?")  # the weight and activation bits in a name such as `w4a8`

_ERROR = (
    "± is one standard error, sqrt(p (1 - p) / n), with half an image added to both kinds: that all of a few images "
    "agree does not mean that all do."
)
SENSITIVITY_NOTE = (
    "Each layer is quantized alone, its weight and what it reads, on views of the synthetic images; all others "
    "stay in float. KL is the divergence from the fp32 model in nats, the expected drop what top-1 would lose, in "
    "points, if the model's own probabilities were the truth: it ranks layers, and is no measured drop."
)
HISTOGRAM_NOTES = (
    "What fp32 has at each quantized layer, in the variant's channels if these were equalized: its weight, each "
    "output channel in steps of its own, and what it reads when up to 64 synthetic images pass through the model.",
    "Vertical lines are values of the grid (every eighth one with 8 bits); what is more than half a step past "
    "the outer two is clipped. Heights are logarithmic. The outermost bins also hold what is beyond the picture.",
)
_CURVES = {
    "generator.ce": "cross-entropy of the teacher's answers with the intended labels (8)",
    "generator.bns": "distance to the statistics in BatchNorm's buffers (9)",
    "generator.sfda": "distance of each class's features to its centroid (4), from the end of the warm-up on",
    "generator.icv": "distance to the diversity that is wanted within a class (6), from then on too",
    "refine.bns": "the same as generator.bns, of the images themselves",
    "refine.ce": "cross-entropy of those images that the teacher is not sure of",
    "refine.spread": "how far the spread between images falls short",
    "refine.variation": "total variation of the images",
    "distillation": "divergence of the variant's answers from the teacher's, on the batches it is tuned on",
    "features": "distance of its features from the teacher's",
    "held_out_kl": "divergence on held-out synthetic images, by which the best step is chosen",
}
"""What the training curves show, by name."""


def model_name(report: Report) -> str:
    """Return the model's name; for a factory in a file the name of the factory only."""
    path, colon, factory = report.model.name.rpartition(":")
    return factory if colon and path.endswith(".py") else report.model.name


def summary(report: Report) -> str:
    """Return what was done, in one sentence."""
    names = [variant.name for variant in report.variants if variant.name != BASELINE]
    widths = f"to {_listed(names)} " if names else ""
    if report.evaluation.labelled:
        scored = f"scored on {report.evaluation.images:,} labelled images of {report.evaluation.dataset}"
    else:
        scored = f"compared with its fp32 teacher on {report.evaluation.images:,} held-out synthetic images"
    return (
        f"{model_name(report)} was quantized {widths}without any of its training data, "
        f"from {report.calibration.images:,} synthetic images, and {scored}."
    )


# What to deploy


def headline(verdict: Verdict) -> str:
    """Return what to do in one runtime, in a few words."""
    if verdict.choice is None:
        return "No suggestion"
    words = {
        "deploy": f"Deploy {verdict.choice.variant}",
        "unsure": f"Perhaps {verdict.choice.variant}",
        "same": "No difference in speed",
        "unmeasured": "Not measurable here",
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
    """Return what to deploy in one runtime, what it costs and what it saves."""
    choice, where = verdict.choice, f"On {verdict.runtime}"
    if choice is None or choice.cost is None or choice.interval is None:
        return f"{where} nothing can be suggested: no variant could be compared with fp32 there."
    cost = _cost(choice.cost, choice.cost_error, labelled)
    if verdict.outcome == "inaccurate":
        limit = _limit(labelled)
        return f"{where} keep fp32: no variant stays within {limit}; the nearest, {choice.variant}, {cost}."
    interval = f"{choice.interval[0]:.2f} to {choice.interval[1]:.2f}{TIMES}"
    space = "" if choice.size_share is None else f"in {percent(choice.size_share)} of the size"
    if verdict.outcome in ("same", "unmeasured"):
        interval = f"({interval} at batch {choice.latency.batch})"
        speed = (
            f"no difference in speed from fp32 was measured for {choice.variant} {interval}"
            if verdict.outcome == "same"
            else f"the speed of {choice.variant} is not measurable here {interval}: the machine was busy"
        )
        return f"{where} {speed}{f'; it comes {space}' if space else ''}; it {cost}."
    measured = choice.latency.speedup_low is not None  # an interval says more than "about"
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
    """Return what keeps the suggestions from being certain, in whole sentences; most important first."""
    labelled, top1 = report.evaluation.labelled, report.calibration.teacher_top1
    errors = [verdict.choice.cost_error or 0.0 for verdict in verdicts(report) if verdict.choice]
    sentences = []
    if report.model.random:
        sentences.append(
            "The weights are random: what is measured here shows that the model can be processed, and at what expense; "
            "it says nothing about the accuracy of a trained one."
        )
    if any(error > allowed_cost(report) for error in errors):
        sentences.append(
            f"{report.evaluation.images:,} images are too few to tell whether a variant stays within "
            f"{_limit(labelled)}: evaluate on more."
        )
    if not labelled and report.calibration.images and top1 < _RECOGNIZED:
        sentences.append(
            f"The teacher predicts the intended label for only {top1:.0f} % of the synthetic images: agreement on such "
            "images says little about real ones. Evaluate on labelled images with --data."
        )
    return sentences


def _limit(labelled: bool) -> str:
    return f"{MAX_DROP:g} point of top-1" if labelled else f"{MAX_DISAGREEMENT:g} % disagreement"


def _cost(points: float, error: float | None, labelled: bool) -> str:
    if not labelled:
        return f"agrees with the teacher on {with_error(100 - points, error)} % of the images"
    if round(points, 2) == 0:
        return "keeps the top-1 of fp32" + ("" if error is None else f" (± {number(error)} points)")
    return f"{'loses' if points > 0 else 'gains'} {with_error(abs(points), error)} points of top-1"


# How to read the numbers


def notes(report: Report) -> list[str]:
    """Return how to read the numbers, and what they do not say."""
    rows, unreadable = latency_rows(report), unreadable_note(report)
    runtimes = {row.runtime for row in rows}
    return [
        *_accuracy_notes(report),
        *_when(unreadable, unreadable or ""),
        *_grid_notes(report),
        *_when(
            rows,
            "Latency is the time of one call of a whole batch. Speed-up is over fp32 at the same runtime, batch and "
            "threads: if both took turns, the median ratio of a turn's first quartiles, with its interval of 95 %, "
            "else the ratio of medians. Images per second are those of all calls together, so that a few slow ones "
            "lower them and leave the median.",
        ),
        *_tuning_notes(report),
        *_when(any(row.variant == HALF for row in rows), _half_note(report)),
        *_when(
            any(row.unsteady for row in rows),
            f"~ marks a latency whose standard deviation exceeds {100 * UNSTEADY:g} % of its mean: "
            "the machine was not quiet.",
        ),
        *_when(
            "onnxruntime-cpu" in runtimes and report.environment.cpu_int8 == [],
            "This CPU has no instructions for INT8 dot products (VNNI, AMX): INT8 gains little on it, "
            "and more on one that has them.",
        ),
        f"The suggestion is the fastest variant within {_limit(report.evaluation.labelled)}, in each "
        f"runtime; of those within {100 * SPEED_TIE:g} % of its time, the one that loses least. "
        "It is suggested if the whole interval of its speed-up is above 1.",
        *_when(
            "onnxruntime-cuda" in runtimes,
            "ONNX Runtime's CUDA provider has no INT8 convolutions: it dequantizes and convolves in float, and a "
            "quantized model is no faster there.",
        ),
        *_when(
            "onnxruntime-tensorrt" in runtimes,
            "ONNX Runtime's TensorRT provider builds its own engine of the graph for TensorRT; its latency is "
            "from host to host, as ONNX Runtime's others are.",
        ),
    ]


def unreadable_note(report: Report) -> str | None:
    """Return how many images could not be read, and which; None if all could."""
    evaluation = report.evaluation
    if not evaluation.unreadable:
        return None
    images = [f"{image.file} ({image.reason})" for image in evaluation.unreadable_files]
    more = evaluation.unreadable - len(images)
    listed = "; ".join([*images, *_when(images and more > 0, f"{more:,} more")])
    return (
        f"{evaluation.unreadable:,} of {evaluation.images + evaluation.unreadable:,} images of {evaluation.dataset} "
        f"could not be read and count nowhere{f': {listed}' if listed else ''}."
    )


def file_notes(report: Report) -> list[tuple[str, str]]:
    """Return path and notes of each file that has any."""
    artifacts = [artifact for variant in report.variants for artifact in variant.artifacts]
    return [(artifact.path, "; ".join(artifact.notes)) for artifact in artifacts if artifact.notes]


def curve_notes(report: Report) -> list[str]:
    """Return what the training curves of the report show."""
    stages = (report.calibration.losses, *(variant.losses for variant in report.variants))
    shown = {name for losses in stages for name, values in losses.items() if values}
    curves = [f"{name}: {text}." for name, text in _CURVES.items() if name in shown]
    return [*curves, *_when(curves, "Numbers in brackets are equations of ClusterQ (arXiv 2205.00179).")]


def _accuracy_notes(report: Report) -> list[str]:
    images, dataset = f"{report.evaluation.images:,}", report.evaluation.dataset
    if not report.evaluation.labelled:
        return [
            "Accuracy was not measured, because no labelled images were given. Agreement is the percentage of "
            f"{images} held-out synthetic images on which a variant predicts the class that the fp32 teacher "
            "predicts: it says how closely the variant follows the teacher on such images, not how it "
            f"does on real ones. {_ERROR}"
        ]
    simulated = any(a.runtime == "torch" for v in report.variants if v.name != BASELINE for a in v.accuracy)
    return [
        f"Top-1 and top-5 are percentages of {images} images of {dataset}; agreement is the percentage "
        f"on which a variant predicts the class that the fp32 teacher predicts. {_ERROR}",
        "Drop is fp32's top-1 in the same runtime less the variant's, in points. Both saw the same images, "
        "so its ± is that of a paired difference: an upper bound, from how many predictions differ.",
        *_when(
            simulated, "In torch a variant is simulated in float: it shows what the grid costs, and deploys nothing."
        ),
    ]


def _grid_notes(report: Report) -> list[str]:
    widths = {v.name: min(map(int, m.groups())) for v in report.variants if (m := _BITS.fullmatch(v.name))}
    coarse = {name: bits for name, bits in widths.items() if bits < 8}
    any_cpu, vnni = ([v.name for v in report.variants if v.cpu == cpu] for cpu in ("any", "vnni"))
    has_vnni = not {"avx_vnni", "avx512_vnni"}.isdisjoint(report.environment.cpu_int8 or [])
    packed = any(artifact.target == "int4" for variant in report.variants for artifact in variant.artifacts)
    return [
        *_when(
            coarse,
            f"{_listed(list(coarse))}: neither TensorRT nor ONNX Runtime convolves in INT4. Both run such a network as "
            f"INT8 whose values lie on a {_listed(sorted({f'{bits}-bit' for bits in coarse.values()}))} grid: INT4 "
            "saves storage, the speed is INT8's.",
        ),
        *_when(
            any_cpu,
            f"{_listed(any_cpu)}: the graph for ONNX Runtime computes the same on every CPU, with VNNI and without. "
            "No two integer products of an output channel add up to more than 16 bits hold.",
        ),
        *_when(
            vnni,
            f"{_listed(vnni)}: the graph for ONNX Runtime was requested with --cpu vnni. On x86 CPUs without VNNI its "
            "sums saturate at 16 bits, and it computes something else there.",
        ),
        *_when(
            vnni and not has_vnni,
            "This CPU has no VNNI: what was measured here of these graphs is not what they do with it.",
        ),
        *(f"{variant.name}: {_mixed_widths(variant)}" for variant in report.variants if variant.keep),
        *_when(
            packed,
            "The int4 files hold two weights in a byte and are the smallest to store and ship; ONNX Runtime "
            "dequantizes them and convolves in float, so they are no faster than fp32.",
        ),
    ]


def _mixed_widths(variant: Variant) -> str:
    """Return which layers have bits of their own, and why."""
    layers = _listed([f"{layer} ({bits})" for layer, bits in variant.keep.items()])
    count = (
        "one layer has bits of its own"
        if len(variant.keep) == 1
        else f"{len(variant.keep)} layers have bits of their own"
    )
    why = ""
    if (drop := variant.expected_drop) is not None:
        missed = f", more than the {variant.max_drop:g} asked for" if drop > (variant.max_drop or drop) else ""
        why = f", for an expected drop before fine-tuning of {number(drop)} points{missed}"
    return f"{count}{why}: {layers}."


def _tuning_notes(report: Report) -> list[str]:
    """Return what was done in smaller batches than requested, and which variants fine-tuning did not improve."""
    divisors = {"Synthesis": report.calibration.batch_divisor}
    divisors |= {f"Fine-tuning of {variant.name}": variant.batch_divisor for variant in report.variants}
    return [
        *(
            f"{stage} took batches of 1/{divisor} of the size in the configuration: "
            "the memory did not suffice for more."
            for stage, divisor in divisors.items()
            if divisor > 1
        ),
        *(
            f"{variant.name}: no step of fine-tuning brought it nearer to the teacher on the held-out synthetic images; "
            "its weights are those it was initialized with."
            for variant in report.variants
            if variant.kept_step == 0
        ),
    ]


def _half_note(report: Report) -> str:
    """Return what fp16 is, and which engines could gain by it."""
    names = [
        variant.name
        for variant in report.variants
        if variant.name != BASELINE and any(file.kind == "engine" and not file.fp16 for file in variant.artifacts)
    ]
    computes = "compute" if len(names) > 1 else "computes"
    advice = f" {_listed(names)} {computes} in float32 what is not quantized; --fp16 makes that FP16."
    return (
        "fp16 is the same float model with everything in FP16, which loses next to nothing: an INT8 engine is worth "
        f"its loss only if it is faster than that, not than fp32.{advice if names else ''}"
    )


# TensorRT engines


def engine_notes(report: Report) -> list[str]:
    """Return how to read the numbers on engines, what to distrust in them, and what is missing."""
    timed = list(engine_latencies(report))
    no_telemetry = [latency.gpu.reason for _, latency in timed if latency.gpu and latency.gpu.reason]
    return [
        *_when(
            timed,
            "An engine's latency is defined as trtexec's: the sum of the copy to the GPU, the computation and the copy "
            "back, by CUDA events; the compute speed-up leaves the copies out. Copies run while another batch is "
            "computed, and throughput is by the time of the whole measurement.",
        ),
        *(
            f"{variant}, {file_name(latency.graph)}, batch {latency.batch}: {warning}"
            for variant, latency in timed
            for warning in _engine_warnings(latency)
        ),
        *(
            f"Clocks, power, temperature and throttling of the GPU are not known: {reason}."
            for reason in dict.fromkeys(no_telemetry)
        ),
        *_when(
            any(latency.gpu and latency.gpu.clocks == "steady" for _, latency in timed),
            "Steady clocks did not move while they were watched; whether they are locked (nvidia-smi -lgc) is not "
            "something that NVML reports.",
        ),
        *_inspection_notes(report),
        *_when(
            any(inspection.slowest for _, inspection in inspections(report)),
            "Layers are timed by TensorRT's profiler, one after the other: their sum is more than the time of a call. "
            "Their type is that of what they read; reformats only change a layout or a type, and cost time for it.",
        ),
    ]


def _inspection_notes(report: Report) -> Iterator[str]:
    for variant, inspection in inspections(report):
        where = f"{variant}, {file_name(inspection.engine)}"
        if inspection.missed:
            layers = [f"{layer.weight} ({layer.layer}) {layer.reason}" for layer in inspection.missed[:_LISTED]]
            if more := len(inspection.missed) - len(layers):
                layers.append(f"and {more} more (report.json has them)")
            yield f"{where}: quantized in the graph, and not in INT8 in the engine: {'; '.join(layers)}."
        yield from (f"{where}: {note}" for note in inspection.notes)


def _engine_warnings(latency: Latency) -> Iterator[str]:
    compute, enqueue, upload, gpu = latency.compute, latency.enqueue, latency.host_to_device, latency.gpu
    if compute is None:
        return
    if compute.coefficient_of_variation > UNSTEADY:
        clocks = " The GPU's clocks were floating." if gpu and gpu.clocks == "floating" else ""
        yield (
            f"the standard deviation of the computation is {percent(compute.coefficient_of_variation)} of its mean, "
            f"more than {100 * UNSTEADY:g} %.{clocks}"
        )
    if enqueue and enqueue.median_ms > ENQUEUE_BOUND * compute.median_ms:
        times = f"{milliseconds(enqueue.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        graph = "" if latency.cuda_graph else ", because no CUDA graph was replayed"
        yield f"enqueuing takes about as long as the computation ({times}): the host may hold the GPU back{graph}."
    if upload and upload.median_ms >= compute.median_ms:
        times = f"{milliseconds(upload.median_ms)} ms against {milliseconds(compute.median_ms)} ms"
        yield f"copying to the GPU takes longer than the computation ({times}), and limits the throughput."
    if latency.wall_seconds and upload and latency.device_to_host:
        between = 1000 * latency.wall_seconds / latency.runs
        longest = max(part.mean_ms for part in (upload, compute, latency.device_to_host))
        if between > HOST_BOUND * longest:
            yield (
                f"a call came every {milliseconds(between)} ms, though no part of it takes the GPU longer than "
                f"{milliseconds(longest)} ms: the host, which starts the calls, limits the throughput."
            )
    if gpu and gpu.throttling:
        listed = ", ".join(f"{reason} ({100 * share:.0f} % of the time)" for reason, share in gpu.throttling.items())
        yield f"the GPU lowered its clocks: {listed}."


# Calibration set, features, layers, machine


def calibration_facts(report: Report) -> list[tuple[str, str]]:
    """Return label and value of everything that is known of the calibration set."""
    calibration = report.calibration
    facts = {
        "Synthetic images": f"{calibration.images:,}",
        "Recipe": calibration.recipe,
        "Time": duration(calibration.seconds),
        "Teacher predicts the intended label": f"{calibration.teacher_top1:.2f} %",
    }
    if calibration.within_class_diversity is not None:
        facts["Diversity within a class, at the last BatchNorm"] = f"{calibration.within_class_diversity:.3f}"
    if calibration.silhouette is not None:
        facts["Separability of the classes (silhouette), before the classifier"] = number(calibration.silhouette, 3)
    return list(facts.items())


def environment_facts(report: Report) -> list[tuple[str, str]]:
    """Return label and value of everything that is known of the machine."""
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
        "torch": environment.torch,
        "torchvision": environment.torchvision,
        "onnx": environment.onnx,
        "onnxruntime": environment.onnxruntime,
        "TensorRT": environment.tensorrt or "not installed",
    }
    return [(label, value) for label, value in facts.items() if value]


def preview_caption(report: Report) -> str:
    """Return what the contact sheet of synthetic images shows."""
    shown, classes = report.calibration.preview_classes, report.model.classes
    text = "Synthetic images, made from only the model"
    if not shown:  # a report from before they were noted
        return f"{text}."
    label = "number and name" if any(" " in name for name in shown) else "number"
    of = f"all {classes:,} classes" if classes > 1 else "its only class"
    if len(shown) < classes:
        of = f"{len(shown)} of the {classes:,} classes"
    return f"{text}: a class per column, under its {label}; {of}."


def feature_sentence(report: Report) -> str | None:
    """Return what the teacher's penultimate features of synthetic and real images are like, in numbers."""
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


def feature_notes(report: Report) -> list[str]:
    """Return how to read the numbers and the picture of the features, and what is missing in them."""
    features = report.features
    if features is None:
        return []
    sets = [features.synthetic, *([features.real] if features.real else [])]
    shown, classes = len({label for own in sets for label in own.points.labels}), features.synthetic.classes
    of = f", of {shown} of the {classes:,} classes" if shown < classes else ""
    both = " Both panels are one projection, with the same axes." if features.real is not None else ""
    return [
        *_when(
            features.projection,
            f"A dot is an image{of}; its colour, and the number, is the class: the one that a synthetic "
            f"image was made for, the true one of a real image.{both} Images that lie close together look alike to the "
            "model; how far apart two groups are, and in which direction, means nothing "
            f"({features.projection.method if features.projection else ''}).",
        ),
        *_when(
            features.synthetic.silhouette is not None,
            "Silhouette: 1 if the classes are far apart, 0 if they touch. Diversity is the share of the "
            "variance within classes: 0 if all images of a class are the same. Synthetic images should come near "
            "the real ones in both.",
        ),
        *_when(
            features.coverage is not None,
            "Coverage is the share of real images that have a synthetic one among their neighbours; density is how "
            "many neighbourhoods of real images a synthetic one lies in, about 1 if both sets are alike "
            "(arXiv 2002.09797, k = 5).",
        ),
        *features.notes,
    ]


def _separation(features: FeatureSet, name: str) -> str:
    images = f"{features.images:,} {name} of {features.classes:,} classes"
    if features.silhouette is None:
        return f"{images} have no silhouette"
    silhouette, diversity = number(features.silhouette, 3), number(features.within_class_diversity, 3)
    return f"{images} have a silhouette of {silhouette} and a within-class diversity of {diversity}"


def histogram_line(layer: LayerHistograms) -> str:
    """Return the widths of a layer's weight and input, and how much of each is clipped."""
    return "; ".join(
        f"{name} {(values.high - values.low).bit_length()} bits, {_clipped(values)} clipped"
        for name, values in (("weight", layer.weight), ("input", layer.activation))
    )


def histogram_caption(values: Histogram) -> str:
    """Return the steps of a histogram's grid, and how many of its values are clipped."""
    steps = [f"{step:.3g}" for step in dict.fromkeys(values.steps)]
    words = f"step {steps[0]}" if len(steps) == 1 else f"steps of {steps[0]} to {steps[-1]}"
    return f"{words}, {_clipped(values)} of {sum(values.counts):,} clipped"


def _clipped(values: Histogram) -> str:
    """Return the clipped share as a percentage that is 0 only if nothing is clipped."""
    share = values.clipped
    return "none" if share == 0 else "under 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _when(condition: object, text: str) -> list[str]:
    return [text] if condition else []
