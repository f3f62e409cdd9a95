"""The words that the Markdown and the HTML report share: units, verdicts, and how to read the numbers."""

from clusterq_deploy.report.findings import BASELINE, SPEED_TIE, UNSTEADY, grid_bits, half_was_timed, latency_rows
from clusterq_deploy.report.formats import duration, number
from clusterq_deploy.report.verdict_wording import limit_words
from clusterq_deploy.results.report import Environment, Report, Variant

_ERROR = (
    "± is one standard error, sqrt(p (1 - p) / n), with half an image added to both kinds: that all of a few images "
    "agree does not mean that all do."
)

_TERMS = {
    "generator.ce": "cross-entropy of the teacher's answers with the intended labels (8)",
    "generator.bns": "distance to the statistics in BatchNorm's buffers (9)",
    "generator.sfda": "distance of each class's features to its centroid (4), from the end of the warm-up on",
    "generator.icv": "distance to the diversity that is wanted within a class (6), from then on too",
    "refine.bns": "the same as generator.bns, of the images themselves",
    "refine.ce": "cross-entropy of those images that the teacher is not sure of",
    "refine.spread": "what the spread between images lacks",
    "refine.variation": "total variation of the images",
    "distillation": "divergence of the variant's answers from the teacher's, on the batches it is tuned on",
    "features": "distance of its features from the teacher's",
    "held_out_kl": "divergence on held-out synthetic images, by which the kept step is chosen",
}
"""The training curves by name, and what they are of."""


def model_name(report: Report) -> str:
    """The model's name; of a factory in a file the factory's alone."""
    path, colon, factory = report.model.name.rpartition(":")
    return factory if colon and path.endswith(".py") else report.model.name


def summary(report: Report) -> str:
    """What was done, in one sentence."""
    names = [variant.name for variant in report.variants if variant.name != BASELINE]
    made = f"to {_listed(names)} " if names else ""
    if report.evaluation.labelled:
        scored = f"scored on {report.evaluation.images:,} labelled images of {report.evaluation.dataset}"
    else:
        scored = f"compared with its fp32 teacher on {report.evaluation.images:,} held-out synthetic images"
    return (
        f"{model_name(report)} was quantized {made}without any of its training data, "
        f"from {report.calibration.images:,} synthetic images, and {scored}."
    )


def notes(report: Report) -> list[str]:
    """How to read the numbers, and what they do not say."""
    lost = unreadable_note(report)
    found = [*_accuracy_notes(report), *([lost] if lost else []), *_grid_notes(report)]
    rows = latency_rows(report)
    if rows:
        found.append(
            "Latency is the time of one call of a whole batch. Speed-up is over fp32 at the same runtime, batch and "
            "threads: where both took turns, the median ratio of a turn's first quartiles, with its interval of 95 %, "
            "else the ratio of medians. Images per second are those of all calls together, so that a few slow ones "
            "lower them and leave the median."
        )
    found += _memory_notes(report) + _tuning_notes(report)
    if half_was_timed(report):
        found.append(_half_note(report))
    if any(row.unsteady for row in rows):
        found.append(
            f"~ marks a latency whose standard deviation exceeds {100 * UNSTEADY:g} % of its mean: "
            "the machine was not quiet."
        )
    on_cpu = any(row.latency.runtime == "onnxruntime-cpu" for row in rows)
    if on_cpu and report.environment.cpu_int8 == []:
        found.append(
            "This CPU has no instructions for INT8 dot products (VNNI, AMX): INT8 gains little on it, "
            "and more on one that has them."
        )
    found.append(
        f"The suggestion is the fastest variant within {limit_words(report.evaluation.labelled)}, in each "
        f"runtime; of those within {100 * SPEED_TIE:g} % of its time, the one that loses least. "
        "It is suggested where the whole interval of its speed-up lies above 1."
    )
    return found


def unreadable_note(report: Report) -> str | None:
    """How many images could not be read, and which; None where all could."""
    evaluation = report.evaluation
    if not evaluation.unreadable:
        return None
    total = evaluation.images + evaluation.unreadable
    named = [f"{own.file} ({own.reason})" for own in evaluation.unreadable_files]
    more = evaluation.unreadable - len(named)
    listed = "; ".join([*named, *([f"{more:,} more"] if named and more > 0 else [])])
    return (
        f"{evaluation.unreadable:,} of {total:,} images of {evaluation.dataset} could not be read and count nowhere"
        + (f": {listed}." if listed else ".")
    )


def environment_facts(environment: Environment) -> list[tuple[str, str]]:
    """Label and value of everything that is known of the machine."""
    int8 = environment.cpu_int8
    facts = [
        ("GPU", environment.gpu or "none used"),
        ("NVIDIA driver", environment.driver),
        ("CUDA", environment.cuda),
        ("CPU", environment.cpu),
        ("CPU INT8 instructions", None if int8 is None else ", ".join(int8) or "none"),
        ("Cores", str(environment.cores)),
        ("Memory", f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else None),
        ("Platform", environment.platform),
        ("Python", environment.python),
        ("torch", environment.torch),
        ("torchvision", environment.torchvision),
        ("onnx", environment.onnx),
        ("onnxruntime", environment.onnxruntime),
        ("TensorRT", environment.tensorrt or "not installed"),
    ]
    return [(label, value) for label, value in facts if value]


def calibration_facts(report: Report) -> list[tuple[str, str]]:
    """Label and value of everything that is known of the calibration set."""
    calibration = report.calibration
    diversity, silhouette = calibration.within_class_diversity, calibration.silhouette
    facts = [
        ("Synthetic images", f"{calibration.images:,}"),
        ("Recipe", calibration.recipe),
        ("Time", duration(calibration.seconds)),
        ("Teacher gives the intended label", f"{calibration.teacher_top1:.2f} %"),
        ("Diversity within a class, at the last BatchNorm", None if diversity is None else f"{diversity:.3f}"),
        (
            "Separability of the classes (silhouette), before the classifier",
            None if silhouette is None else number(silhouette, 3),
        ),
    ]
    return [(label, value) for label, value in facts if value]


def preview_caption(report: Report) -> str:
    """What the contact sheet of synthetic images shows."""
    shown, classes = report.calibration.preview_classes, report.model.classes
    text = "Synthetic images, made from the model alone"
    if not shown:  # a report from before they were noted
        return f"{text}."
    named = "number and name" if any(" " in own for own in shown) else "number"
    of = (
        f"{len(shown)} of the {classes:,} classes"
        if len(shown) < classes
        else f"all {classes:,} classes"
        if classes > 1
        else "its only class"
    )
    return f"{text}: a class a column, under its {named}; {of}."


def _accuracy_notes(report: Report) -> list[str]:
    images, dataset = f"{report.evaluation.images:,}", report.evaluation.dataset
    if not report.evaluation.labelled:
        return [
            "Accuracy was not measured, for no labelled images were given. Agreement is the percentage of "
            f"{images} held-out synthetic images on which a variant predicts the class that the fp32 teacher "
            "predicts: it says how closely the variant follows the teacher on such images, not how it "
            f"does on real ones. {_ERROR}"
        ]
    found = [
        f"Top-1 and top-5 are percentages of {images} images of {dataset}; agreement is the percentage "
        f"on which a variant predicts the class that the fp32 teacher predicts. {_ERROR}",
        "Drop is fp32's top-1 in the same runtime less the variant's, in points. Both saw the same images, "
        "so its ± is that of a paired difference: an upper bound, from how many predictions differ.",
    ]
    if any(a.runtime == "torch" for v in report.variants if v.name != BASELINE for a in v.accuracy):
        found.append("In torch a variant is simulated in float: it shows what the grid costs, and deploys nothing.")
    return found


def _half_note(report: Report) -> str:
    """What fp16 is, and which engines could gain by it."""
    text = (
        "fp16 is the same float model with everything in FP16, which loses next to nothing: an INT8 engine is worth "
        "its loss where it beats that, not fp32 alone."
    )
    single = [
        variant.name
        for variant in report.variants
        if variant.name != BASELINE and any(a.kind == "engine" and not a.fp16 for a in variant.artifacts)
    ]
    if single:
        computes = "compute" if len(single) > 1 else "computes"
        text += f" {_listed(single)} {computes} in float32 what is not quantized; --fp16 makes that FP16."
    return text


def _grid_notes(report: Report) -> list[str]:
    bits = {variant.name: grid_bits(variant.name) for variant in report.variants}
    coarse = {name: count for name, count in bits.items() if count is not None and count < 8}
    found = []
    if coarse:
        grid = _listed(sorted({f"{count}-bit" for count in coarse.values()}))
        found.append(
            f"{_listed(list(coarse))}: neither TensorRT nor ONNX Runtime convolves in INT4. Both run "
            f"such a network as INT8 whose values lie on a {grid} grid: INT4 saves storage, the speed is "
            "INT8's."
        )
    found += _cpu_notes(report)
    for variant in report.variants:
        if variant.keep:
            found.append(f"{variant.name}: {_kept(variant)}")
    if any(artifact.target == "int4" for variant in report.variants for artifact in variant.artifacts):
        found.append(
            "The int4 files hold two weights in a byte and are the smallest to store and ship; ONNX Runtime "
            "dequantizes them and convolves in float, so they are no faster than fp32."
        )
    return found


def _cpu_notes(report: Report) -> list[str]:
    """Which CPUs the graphs for ONNX Runtime compute the same on."""
    found = []
    by_cpu = {cpu: [own.name for own in report.variants if own.cpu == cpu] for cpu in ("any", "vnni")}
    if by_cpu["any"]:
        found.append(
            f"{_listed(by_cpu['any'])}: the graph for ONNX Runtime computes the same on every CPU, with VNNI and "
            "without. No two integer products of an output channel add up to more than 16 bits hold."
        )
    if by_cpu["vnni"]:
        found.append(
            f"{_listed(by_cpu['vnni'])}: the graph for ONNX Runtime was asked for with --cpu vnni. On x86 CPUs without "
            "VNNI its sums saturate at 16 bits, and it computes something else there."
        )
        if not {"avx_vnni", "avx512_vnni"}.intersection(report.environment.cpu_int8 or []):
            found.append("This CPU has no VNNI: what was measured here of these graphs is not what they do with it.")
    return found


def _memory_notes(report: Report) -> list[str]:
    """What was done in smaller batches than the settings say."""
    reduced = {"Synthesis": report.calibration.batch_divisor}
    reduced |= {f"Fine-tuning of {variant.name}": variant.batch_divisor for variant in report.variants}
    return [
        f"{what} took batches of 1/{divisor} of the size in the configuration: the memory did not suffice for more."
        for what, divisor in reduced.items()
        if divisor > 1
    ]


def _tuning_notes(report: Report) -> list[str]:
    """Which variants fine-tuning did not improve."""
    return [
        f"{variant.name}: no step of fine-tuning brought it nearer to the teacher on the held-out synthetic images; "
        "its weights are those it was initialized with."
        for variant in report.variants
        if variant.kept_step == 0
    ]


def _kept(variant: Variant) -> str:
    """Which layers have bits of their own, and why."""
    layers = _listed([f"{layer} ({bits})" for layer, bits in variant.keep.items()])
    why = ""
    if (expected := variant.expected_drop) is not None:
        missed = f", more than the {variant.max_drop:g} asked for" if expected > (variant.max_drop or expected) else ""
        why = f", for an expected drop before fine-tuning of {number(expected)} points{missed}"
    count = "one layer has" if len(variant.keep) == 1 else f"{len(variant.keep)} layers have"
    return f"{count} bits of {'its' if len(variant.keep) == 1 else 'their'} own{why}: {layers}."


def sensitivity_notes() -> list[str]:
    """How to read the sensitivities of layers."""
    return [
        "Each layer is quantized alone, its weight and what it reads, on views of the synthetic images; all others "
        "stay in float. KL is the divergence from the fp32 model in nats, the expected drop what top-1 would lose, in "
        "points, if the model's own probabilities were the truth: it ranks layers, and is no measured drop.",
    ]


def curve_notes(report: Report) -> list[str]:
    """What the training curves show, for those that the report has."""
    stages = (report.calibration.losses, *(variant.losses for variant in report.variants))
    shown = {name for losses in stages for name, values in losses.items() if values}
    found = [f"{name}: {text}." for name, text in _TERMS.items() if name in shown]
    return [*found, "Numbers in brackets are equations of ClusterQ (arXiv 2205.00179)."] if found else []


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
