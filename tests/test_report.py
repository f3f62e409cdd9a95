"""The report: its schema, what it concludes, and the pages that people read."""

import base64
import io
import json
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_reports import (
    CPU,
    DASH,
    FEATURES,
    FP32,
    TENSORRT,
    TIMES,
    W4A4,
    W8A8,
    build,
    sensitivities,
    unlabelled,
    variant,
    with_half,
    with_latency,
)

from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ClusterQError, ReportError
from clusterq_deploy.report import read_report, text, to_html, to_markdown
from clusterq_deploy.report.analysis import accuracy_rows, latency_rows, points, standard_error, verdicts
from clusterq_deploy.results.report import (
    CalibrationInfo,
    FeatureInfo,
    FeatureSet,
    LabelCheck,
    Report,
    Skipped,
    Variant,
)

# The smallest PNG: one grey pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(build(), PNG)


def both(report: Report) -> tuple[str, str]:
    return to_markdown(report), to_html(report)


def outcomes(report: Report) -> list[str]:
    return [verdict.outcome for verdict in verdicts(report)]


# The schema


def test_report_round_trips_through_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(build().to_json(), encoding="utf-8")
    assert read_report(path) == build()


def test_json_has_the_documented_fields() -> None:
    content = json.loads(build().to_json())
    assert content["schema"] == 1
    assert content.keys() >= {
        "command", "seed", "environment", "model", "calibration", "evaluation", "variants", "skipped"
    }  # fmt: skip
    assert content["environment"].keys() >= {"torch", "onnxruntime", "tensorrt", "gpu", "cpu"}
    assert content["model"].keys() >= {"name", "parameters", "input_size", "classes"}
    assert content["calibration"].keys() >= {"images", "seconds", "teacher_top1"}
    assert content["evaluation"].keys() >= {"dataset", "images"}
    own = content["variants"][1]
    assert own.keys() >= {"name", "seconds", "accuracy", "artifacts", "latency"}
    assert own["accuracy"][0].keys() >= {"runtime", "top1", "top5", "agreement"}
    assert own["artifacts"][0].keys() >= {"kind", "target", "path", "size_bytes"}
    assert own["latency"][0].keys() >= {
        "runtime", "batch", "threads", "mean_ms", "median_ms", "p90_ms", "p99_ms", "images_per_second"
    }  # fmt: skip
    assert content["skipped"][0].keys() >= {"stage", "reason"}


def test_json_keeps_losses_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(build(calibration={"losses": {"ce": [1.0, math.nan, math.inf]}}).to_json(), encoding="utf-8")
    json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON itself has no NaN
    _, second, third = read_report(path).calibration.losses["ce"]
    assert math.isnan(second)
    assert math.isinf(third)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[]", "is not a report"),
        ('{"model": 1}', "is not a report"),
        ('{"schema": 2}', "has schema 2, this version reads schema 1"),
        ('{"schema": 1, "seed": "x"}', "is not a report of schema 1: command: "),
    ],
)
def test_read_report_raises_one_line_with_the_path(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportError, match=re.escape(message)) as raised:
        read_report(path)
    assert isinstance(raised.value, ClusterQError)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_reports_of_earlier_versions_are_read_and_shown(tmp_path: Path) -> None:
    content = json.loads(build().to_json())
    del content["features"], content["calibration"]["silhouette"]
    for own in content["variants"]:
        del own["histograms"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    old = read_report(path)
    assert (old.features, old.calibration.silhouette) == (None, None)
    markdown, html = both(old)
    assert "silhouette" not in markdown
    assert 'id="features"' not in html
    assert 'id="histograms"' not in html


@pytest.mark.parametrize("name", ["digits", "resnet20_cifar10"])
def test_published_reports_are_read_and_shown(name: str) -> None:
    published = read_report(Path(__file__).parents[1] / f"benchmarks/results/{name}.json")
    assert to_html(published).startswith("<!doctype html>")
    assert to_markdown(published).startswith("# ")


# What it concludes


def test_standard_error_of_a_share() -> None:
    assert standard_error(50.0, 100) == pytest.approx(5.0)
    assert standard_error(100.0, 300) == pytest.approx(100 * math.sqrt(300.5 * 0.5 / 301**2 / 300))
    assert standard_error(0.0, 300) == pytest.approx(standard_error(100.0, 300))  # that none was wrong is no certainty
    assert math.isnan(standard_error(50.0, 0))


def test_drop_is_against_fp32_in_the_same_runtime() -> None:
    row = next(r for r in accuracy_rows(build()) if (r.variant, r.runtime) == ("w8a8", TENSORRT))
    assert row.drop == pytest.approx(0.24)
    # 1.72 % and 0.02 % contradict the teacher, so w8a8 and fp32 differ on at most 1.74 %.
    assert row.drop_error == pytest.approx(100 * math.sqrt((87.5 / 5001 - 0.0024**2) / 5000))
    assert row.size_bytes == 13_024_000


def test_speedup_is_over_the_same_runtime_batch_and_threads() -> None:
    rows = {(r.variant, r.runtime, r.batch): r for r in latency_rows(build())}
    assert rows["fp32", CPU, 1].speedup is None
    assert rows["w8a8", CPU, 1].speedup == pytest.approx(15.104 / 4.604)
    assert rows["w8a8", CPU, 32].unsteady
    assert not rows["w8a8", CPU, 1].unsteady
    assert all(row.speedup is None for row in latency_rows(build(variants=[W8A8, W4A4])))


def test_verdict_is_fast_and_accurate() -> None:
    assert [(v.runtime, v.outcome, v.choice and v.choice.variant) for v in verdicts(build())] == [
        (CPU, "deploy", "w8a8"),
        (TENSORRT, "deploy", "w8a8"),  # w4a4 is a little faster there, and loses 3.58 points
    ]


def test_verdict_of_equally_fast_variants_loses_least() -> None:
    close = variant("w4a4", (69.40, 97.0), (4.50, 0.41), 11.8)
    on_cpu, _ = verdicts(build(variants=[FP32, W8A8, close]))
    assert on_cpu.choice.variant == "w8a8"


@pytest.mark.parametrize(
    ("candidate", "outcome", "sentence"),
    [
        (W4A4, "inaccurate", "keep fp32: no variant is within 1 point"),
        (variant("w8a8", (69.52, 98.3), (20.0, 1.5), 11.8), "slow", f"keep fp32: w8a8 runs at 0.76{TIMES} the speed"),
    ],
)
def test_verdict_keeps_fp32_if_nothing_is_better(candidate: Variant, outcome: str, sentence: str) -> None:
    report = build(variants=[FP32, candidate])
    assert outcomes(report)[0] == outcome
    assert sentence in to_markdown(report)
    assert "Keep fp32" in to_html(report)


@pytest.mark.parametrize(
    ("interval", "outcome", "headline", "sentence"),
    [
        ((1.31, 1.28, 1.34), "deploy", "Deploy w8a8", f"1.31{TIMES} (1.28 to 1.34{TIMES}) the speed of fp32"),
        ((1.04, 1.01, 1.08), "deploy", "Deploy w8a8", f"1.04{TIMES} (1.01 to 1.08{TIMES}) the speed of fp32"),
        ((0.92, 0.88, 0.97), "slow", "Keep fp32", f"w8a8 runs at 0.92{TIMES} (0.88 to 0.97{TIMES}) the speed of fp32"),
        (
            (1.01, 0.97, 1.05),
            "same",
            "No difference in speed",
            f"no difference in speed from fp32 was measured for w8a8 (0.97 to 1.05{TIMES} at batch 1); it is stored in "
            "25.2 % of the size; it keeps the top-1 of fp32",
        ),
        (
            (1.2, 0.8, 1.7),
            "unmeasured",
            "Not measurable here",
            f"the speed of w8a8 is not measurable here (0.80 to 1.70{TIMES} at batch 1): the machine was busy",
        ),
    ],
)
def test_verdict_follows_the_interval_of_the_speedup(
    interval: tuple[float, float, float], outcome: str, headline: str, sentence: str
) -> None:
    speedup, low, high = interval
    candidate = variant("w8a8", (69.76, 99.9), (14.9, 1.0), 11.8)
    candidate = with_latency(candidate, CPU, speedup=speedup, speedup_low=low, speedup_high=high)
    report = build(variants=[FP32, candidate])
    assert outcomes(report)[0] == outcome
    markdown, html = both(report)
    assert sentence in markdown
    assert headline in html
    for page in (markdown, html):
        assert f"{speedup:.2f}{TIMES} ({low:.2f}{DASH}{high:.2f})" in page


def test_verdict_without_interval_is_a_tie_of_medians() -> None:
    """Reports of earlier versions have no intervals, and engines have none since they take no turns."""
    report = build(variants=[FP32, variant("w8a8", (69.76, 99.9), (14.9, 1.0), 11.8)])
    assert outcomes(report) == ["same", "same"]
    assert "no difference in speed from fp32 was measured for w8a8 (0.96 to 1.07" in to_markdown(report)


def test_without_labels_only_agreement_counts() -> None:
    report = unlabelled()
    assert [v.choice and v.choice.variant for v in verdicts(report)] == ["w8a8", "w8a8"]
    assert [point.cost for point in points(report, CPU)] == [None, pytest.approx(1.74), pytest.approx(13.6)]
    for page in both(report):
        assert "accuracy was not measured" in page
        assert "5,000 held-out synthetic images" in page
        assert "98.26 ± 0.19" in page
        assert not re.search(r">top-1 %<|\btop-1 % \|", page)  # no columns of dashes
        assert "69.50" not in re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)


# What keeps a suggestion from being certain


def test_verdict_from_few_images_is_unsure() -> None:
    few = build(evaluation={"images": 90})
    assert text.caveats(build()) == []
    assert outcomes(few) == ["unsure", "unsure"]
    markdown, html = both(few)
    assert "Perhaps w8a8" in html
    for page in (markdown, html):
        assert "90 images are too few to tell whether a variant is within 1 point of top-1" in page
        assert "consider w8a8" in page
        assert "deploy w8a8" not in page
    worse = build(evaluation={"images": 90}, variants=[FP32, W4A4])  # too inaccurate, perhaps only by chance
    assert outcomes(worse) == ["inaccurate", "inaccurate"]
    assert text.caveats(worse) == text.caveats(few)


def test_caveats_name_random_weights_and_unrecognized_images() -> None:
    untrained = build(model={"weights": "random (seed 0)"})
    assert outcomes(untrained) == ["unsure", "unsure"]
    assert [caveat.partition(":")[0] for caveat in text.caveats(untrained)] == ["The weights are random"]
    assert "weights: random (seed 0)" in to_html(untrained)
    (caveat,) = text.caveats(unlabelled(calibration={"teacher_top1": 3.2}))
    assert "The teacher predicts the intended label for only 3 % of the synthetic images" in caveat
    assert text.caveats(unlabelled()) == []


def test_report_says_how_labels_were_read_and_that_they_hardly_belong_to_the_classes() -> None:
    check = {"top1": 0.1, "permutations": 200, "permuted": 0.1, "reaching": 0.5, "renamed": 70, "renamed_permuted": 20}
    wrong = build(evaluation={"notes": ["labels are numbered from 1"], "label_check": LabelCheck(**check)})
    for page in both(wrong):
        assert "imagenet-val: labels are numbered from 1." in page
        assert "Labels and classes hardly belong together: fp32 has a top-1 of 0.10 %" in page
        assert "(as high or higher in 50.0 % of 200 permutations)" in page
        assert "renamed one-to-one to fit best 70.00 % (20.00 % in random order)" in page
    untrained = wrong.model_copy(update={"model": wrong.model.model_copy(update={"weights": "random (seed 0)"})})
    assert not any("belong together" in caveat for caveat in text.caveats(untrained))


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ({"statistics_distance": 3.14159}, "half of the layers are 3.1 standard deviations or more away"),
        ({"statistics_distance": 0.9, "new_statistics": True}, "are those of new layers (mean 0, variance 1)"),
        ({"statistics_distance": 0.31}, None),
        ({}, None),  # an older report
    ],
)
def test_report_says_that_batchnorm_statistics_are_not_those_of_the_weights(
    calibration: dict[str, object], expected: str | None
) -> None:
    report = build(calibration=calibration)
    for page in both(report):
        assert ("The BatchNorm statistics" in page) == (expected is not None)
        assert expected is None or expected in page
    untrained = report.model_copy(update={"model": report.model.model_copy(update={"weights": "random (seed 0)"})})
    assert not any("BatchNorm" in caveat for caveat in text.caveats(untrained))


def test_report_says_that_the_model_answers_with_probabilities() -> None:
    assert not any("probabilities" in note for note in text.notes(build()))
    for page in both(build(model={"probabilities": "softmax"})):
        assert "The model ends in a softmax" in page


def test_suggested_speedup_is_marked_if_unsteady(page: str) -> None:
    unsteady = to_html(build(variants=[with_latency(FP32, coefficient_of_variation=0.2), W8A8, W4A4]))
    assert f"<dd>~3.28{TIMES}</dd>" in unsteady
    assert f"about 3.28{TIMES} the speed of fp32" in unsteady
    assert f"<dd>3.28{TIMES}</dd>" in page


def test_notes_name_variants_that_fine_tuning_did_not_improve() -> None:
    steps = {own.name: own.model_copy(update={"kept_step": step}) for own, step in ((W8A8, 0), (W4A4, 60))}
    notes = [note for note in text.notes(build(variants=[FP32, *steps.values()])) if "no step of fine-tuning" in note]
    assert [note.partition(":")[0] for note in notes] == ["w8a8"]


# Compared with the float model in FP16


def test_rows_of_fp16_are_its_own_and_compared_with_fp32() -> None:
    report = with_half(0.55)
    scored = {(r.variant, r.runtime): r for r in accuracy_rows(report)}
    assert scored["fp16", TENSORRT].drop == pytest.approx(0.03)
    assert scored["fp16", TENSORRT].size_bytes == 24_000_000
    assert scored["fp32", TENSORRT].drop is None
    assert scored["w8a8", TENSORRT].drop == pytest.approx(0.24)  # against fp32's engine, as without fp16
    timed = {(r.variant, r.runtime, r.batch): r for r in latency_rows(report)}
    assert timed["fp16", TENSORRT, 1].speedup == pytest.approx(1.021 / 0.55)
    assert timed["fp16", TENSORRT, 1].over_half is None
    assert timed["fp32", TENSORRT, 1].over_half is None
    assert timed["w8a8", TENSORRT, 1].speedup == pytest.approx(1.021 / 0.412)
    assert timed["w8a8", TENSORRT, 1].over_half == pytest.approx(0.55 / 0.412)
    assert timed["w8a8", TENSORRT, 32].over_half == pytest.approx(0.55 / 0.412)
    assert timed["w8a8", CPU, 1].over_half is None
    assert [p.variant for p in points(report, TENSORRT)] == ["fp32", "fp16", "w8a8", "w4a4"]


def test_pages_have_the_speedup_over_fp16() -> None:
    markdown, html = both(with_half(0.55))
    for page in (markdown, html):
        assert f"2.48{TIMES} the speed of fp32 and 1.33{TIMES} that of fp16 at batch 1" in page
        assert "Layers that are not quantized compute in float32 in w8a8 and w4a4; --fp16 changes that." in page
        assert "over fp16" in page
    assert "<dt>speed of fp16</dt><dd>1.33" in html
    assert "--fp16 makes" not in to_markdown(with_half(0.55, engine_fp16=True))
    for page in both(build()):
        assert "fp16" not in page


def test_verdict_is_fp16_if_no_integers_are_faster() -> None:
    report = with_half(0.405)  # as fast as w8a8 and w4a4 except for a tie, and loses less
    on_cpu, on_gpu = verdicts(report)
    assert (on_cpu.choice and on_cpu.choice.variant) == "w8a8"
    assert (on_gpu.outcome, on_gpu.choice.variant) == ("deploy", "fp16")
    assert "On tensorrt deploy fp16 (fp32/model.fp16.engine): 2.52" in to_markdown(report)
    assert "Deploy fp16" in to_html(report)


# The pages


@pytest.mark.parametrize("render", [to_markdown, to_html])
def test_pages_have_the_numbers(render: Callable[[Report], str]) -> None:
    shown = render(build())
    for value in (
        "69.50 ± 0.65",  # w8a8 top-1 in ONNX Runtime
        "0.24 ± 0.19",  # and its drop
        "98.26 ± 0.19",
        "89.00",  # top-5
        "4.604", "4.788", "5.295",  # median, p90, p99 at batch 1
        "~133.5",  # unsteady median at batch 32
        f"3.28{TIMES}",
        "11.8 MB", "25.3 %", "w4a4/model.int4.onnx", "6.1 MB", "opset 21",
        "1,024", "99.41 %", "13 min 35 s",
        "NVIDIA L4", "AMD EPYC 9354P", "580.65.06",
        "onnxruntime-cuda has no fast INT8 path of its own", "layer4.1.avgpool",
        "INT4 saves storage, at the speed of INT8",
        "512 features", "silhouette of 0.421", "diversity of 0.287", "0.306", "0.410", "83.5 %", "density 0.91",
    ):  # fmt: skip
        assert value in shown, value


def test_pages_have_the_commands(page: str) -> None:
    assert "\n    clusterq run resnet18 --data '/data/imagenet val'\n" in to_markdown(build())
    assert "clusterq run resnet18 --data &#39;/data/imagenet val&#39;</pre>" in page
    commands = [["clusterq", "run", "resnet18", "--seed", "7"], ["clusterq", "sensitivity", "a run"]]
    html = to_html(build(command=commands[-1], commands=commands))
    assert "clusterq run resnet18 --seed 7\nclusterq sensitivity &#39;a run&#39;" in html
    assert "<h2>Commands</h2>" in html


def test_pages_are_deterministic(page: str) -> None:
    assert to_html(build(), PNG) == page
    assert to_markdown(build()) == to_markdown(build())


def test_html_needs_no_other_file(page: str) -> None:
    assert re.findall(r"<(?:script|link|iframe|object|embed)\b", page) == []
    assert "@import" not in page
    for target in re.findall(r'\b(?:src|href|srcset)\s*=\s*"([^"]*)"', page):
        assert target.startswith(("data:image/png;base64,", "#")), target
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#"), target
    assert "default-src 'none'" in page


def test_html_ids_are_unique(page: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', page)) <= set(ids)


def test_pages_escape_names() -> None:
    evil = '<script>alert(1)</script>|`x` $y$ "z"'
    report = build(
        model={"name": evil},
        skipped=[Skipped(stage=evil, reason=evil)],
        command=["clusterq", "run", evil],
        variants=[FP32, W8A8, W4A4.model_copy(update={"name": evil, "sensitivities": sensitivities(0.1, prefix=evil)})],
        calibration={"losses": {evil: [2.0, 1.0]}},
    )
    markdown, html = both(report)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\\<script>alert(1)\\</script>\\|\\`x\\`" in markdown
    prose = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert all("<script" not in line.replace("\\<", "") for line in prose)


def test_markdown_tables_are_padded() -> None:
    blocks = [block for block in to_markdown(build()).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    assert all(len({len(line) for line in block.splitlines()}) == 1 for block in blocks)


def test_pages_of_a_run_that_measured_nothing() -> None:
    calibration = CalibrationInfo(images=64, seconds=2.0, teacher_top1=90.0, recipe="paper")
    bare = build(
        variants=[Variant(name="w8a8", seconds=1.0)], skipped=[], features=None, config={}, calibration=calibration
    )
    markdown, html = both(bare)
    assert "Not measured." in markdown
    assert "Nothing can be suggested" in html
    assert "<svg" not in html
    assert "<img" not in html


def test_large_preview_is_made_smaller() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 2258, 3), dtype=np.uint8)
    for width, expected in ((2258, ("webp", "WEBP", 1200)), (400, ("png", "PNG", 400))):
        file = io.BytesIO()
        Image.fromarray(pixels[:, :width]).save(file, "PNG")
        ((kind, content),) = re.findall(r'src="data:image/(\w+);base64,([^"]*)"', to_html(build(), file.getvalue()))
        with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
            assert (kind, shown.format, shown.width) == expected


def test_preview_names_the_class_of_each_column() -> None:
    def shown(names: list[str], classes: int = 1000) -> tuple[list[str], str]:
        html = to_html(build(calibration={"preview_classes": names}, model={"classes": classes}), PNG)
        (figure,) = re.findall(r'<figure class="preview">(.*?)</figure>', html, re.DOTALL)
        (caption,) = re.findall(r"<figcaption>(.*?)</figcaption>", figure)
        return re.findall(r"<li>(.*?)</li>", figure), caption

    names, caption = shown(["0 tench", "999 <b>paper</b>"])
    assert names == ["0 tench", "999 &lt;b&gt;paper&lt;/b&gt;"]
    assert caption.endswith("a class per column, under its number and name; 2 of the 1,000 classes.")
    assert shown(["0", "1"], classes=2)[1].endswith("under its number; all 2 classes.")
    assert shown([]) == ([], "Synthetic images, made from only the model.")  # of an earlier version


def test_sensitivities_and_curves_are_listed_and_explained() -> None:
    costly = W4A4.model_copy(update={"sensitivities": sensitivities(1e-3, 1e-1, 1e-2)})
    report = build(variants=[FP32, W8A8, costly], calibration={"losses": {"generator.icv": [2.0, 1.0]}})
    markdown, html = both(report)
    assert "generator.icv: distance to the intended diversity" in html
    assert "generator.ce:" not in html
    rows = re.findall(r"<code>(layer1\S*)</code></th><td>w4a4</td><td class=\"n\">([\d.e-]+)</td>", html)
    assert rows == [("layer1.1.conv2", "1.0e-01"), ("layer1.2.conv2", "1.0e-02"), ("layer1.0.conv2", "1.0e-03")]
    for page in (markdown, html):
        assert "0.0033" in page
        assert "One layer at a time is quantized" in page
    assert re.search(r"\| layer1\.0\.conv2 \| w4a4 \| +1\.0e-03 \|", markdown)


def test_features_without_real_images_say_why() -> None:
    reason = "No labelled images were given: there are no real ones to compare with."
    alone = FEATURES.model_copy(update={"real": None, "density": None, "coverage": None, "notes": [reason]})
    markdown, html = both(build(features=alone))
    assert "Both panels" not in html
    assert "Real images" not in html
    for page in (markdown, html):
        assert reason in page
        assert "real ones (" not in page
        assert "synthetic ones cover" not in page


def test_features_without_numbers_and_picture_say_so() -> None:
    features = FeatureSet(dataset="synthetic images", images=2, classes=2)
    markdown, html = both(build(features=FeatureInfo(width=3, synthetic=features, notes=["Too few of *them*."])))
    assert "Synthetic images</figcaption>" not in html
    assert "2 synthetic images of 2 classes have no silhouette." in html
    assert "Too few of *them*." in html
    assert "Too few of \\*them\\*." in markdown


# The environment


def test_environment_describes_this_machine() -> None:
    environment = collect_environment(torch.device("cpu"))
    assert environment.python == platform.python_version()
    assert environment.torch == torch.__version__
    assert environment.cores >= 1
    assert environment.memory_bytes > 2**20
    assert environment.cpu
    assert (environment.gpu is None) is not torch.cuda.is_available()
    assert (environment.cuda is None) is not torch.cuda.is_available()


def test_environment_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise ImportError

    def unknown_processor() -> None:
        raise Exception("py-cpuinfo does not know this processor")

    monkeypatch.setattr("clusterq_deploy.environment._KERNEL_CPUINFO", Path("nowhere"))
    monkeypatch.setattr("cpuinfo.get_cpu_info", unknown_processor)
    monkeypatch.setattr("importlib.import_module", absent)
    environment = collect_environment(torch.device("cpu"))
    assert (environment.torchvision, environment.tensorrt, environment.cpu_int8) == (None, None, None)
    assert environment.onnxruntime == "not installed"
    assert environment.cpu
