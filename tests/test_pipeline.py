"""The stages over one run directory: what they leave, and what is done again."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import SMALL, Counter, edited_stages, read_files, read_stages, redone, small_config
from torch import nn

from calib.support.flops import pass_cost
from clusterq_deploy import Pipeline, read_report
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.config.toml import read_settings
from clusterq_deploy.errors import ConfigError, DataError, GraphError, RunDirectoryError
from clusterq_deploy.files import sha256_file
from clusterq_deploy.models import load_model
from clusterq_deploy.models.digits import HELD_OUT
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.report import text
from clusterq_deploy.results.report import Artifact, Report
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.run.run import resolve_device
from clusterq_deploy.runtimes.tensorrt import unavailable_reason

RECORDS = {".lock", "run.toml", "manifest.json", "report.json", "report.md", "report.html"}
"""Files of a run that no stage lists."""


def run(out: Path, **settings: object) -> list[str]:
    """Return the tasks that a run shows."""
    counter = Counter()
    Pipeline(small_config(**settings), out, progress=counter, command=["clusterq", "run"]).run()
    return counter.names


def digits_module(folder: Path, body: str) -> str:
    """Write a module with a factory of the bundled net, changed by `body`; return its spec."""
    file = folder / "net.py"
    file.write_text(
        "import torch\nfrom clusterq_deploy.models.digits import DigitsNet, PRETRAINED_CFG, digits\n\n\n"
        f"class Net(DigitsNet):\n    pretrained_cfg = PRETRAINED_CFG\n\n{body}\n"
    )
    return f"{file}:make"


def noise(path: Path) -> Path:
    """Write evaluation data that has nothing to do with digits."""
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 255, (50, 8, 8, 1), np.uint8), labels=rng.integers(0, 10, 50))
    return path


def digests(out: Path) -> dict[str, str]:
    """Return the digests of the files that the stages recorded, which have to be those there, and all of them."""
    files = {name: digest for stage in read_stages(out).values() for name, digest in stage.files.items()}
    assert files == {name: sha256_file(out / name) for name in files}
    assert read_files(out).keys() - files.keys() == RECORDS
    return files


# ---- what a run leaves ----


def test_run_writes_the_documented_files(finished_run: Path) -> None:
    graphs = {f"w4a4/model.{kind}.onnx" for kind in ("ort", "trt", "int4")}
    graphs |= {f"w8a8/model.{kind}.onnx" for kind in ("ort", "trt")}
    assert digests(finished_run).keys() == graphs | {
        "fp32/model.onnx",
        "fp32/model.fp16.onnx",
        "calibration/images.safetensors",
        "calibration/preview.png",
        "w8a8/quantized.safetensors",
        "w4a4/quantized.safetensors",
    }
    assert make_config(read_settings(finished_run / "run.toml")) == small_config()


def test_report_has_measurements_of_every_graph(finished_run: Path) -> None:
    report = read_report(finished_run / "report.json")
    assert (report.model.name, report.model.classes, report.evaluation.images) == ("digits", 10, 100)
    assert [variant.name for variant in report.variants] == ["fp32", "w8a8", "w4a4"]
    for variant in report.variants:
        executed = {entry.graph for entry in variant.accuracy}
        baseline = {"fp32/model.fp16.onnx"}  # measured as an engine only
        assert executed == {None} | {artifact.path for artifact in variant.artifacts} - baseline
        assert [entry.runtime for entry in variant.accuracy][:2] == ["torch", "onnxruntime-cpu"]
        assert {entry.batch for entry in variant.latency} == {1, 2}
        for artifact in variant.artifacts:
            assert (finished_run / artifact.path).stat().st_size == artifact.size_bytes
    fp32, w8a8, _ = report.variants
    assert fp32.accuracy[0].agreement == 100
    assert fp32.accuracy[1].top1 == fp32.accuracy[0].top1
    assert w8a8.accuracy[1].agreement > 97
    skipped = [entry.stage for entry in report.skipped]
    assert ("build" in skipped) == (unavailable_reason() is not None)
    assert skipped.count("sensitivity") == 1
    assert report.calibration.preview_classes == [str(digit) for digit in range(10)]
    raw = json.loads((finished_run / "report.json").read_text())
    assert raw["schema"] == 1
    assert raw["calibration"].keys() >= {"images", "seconds", "teacher_top1"}


def test_report_has_histograms_of_every_quantized_layer(finished_run: Path) -> None:
    report, pipeline = read_report(finished_run / "report.json"), Pipeline(small_config(), finished_run)
    layers = pipeline.student(BitWidths(4, 4)).layers()
    fp32, *variants = report.variants
    assert fp32.histograms == []
    for variant, bits in zip(variants, (8, 4), strict=True):
        assert [entry.layer for entry in variant.histograms] == list(layers)
        for entry in variant.histograms:
            assert sum(entry.weight.counts) == layers[entry.layer].weight.numel()
            assert entry.weight.low in {-(1 << bits - 1), -128}
            assert 0 <= entry.activation.clipped < 0.05
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert text.count('<details class="layer">') == 2 * len(layers)


def test_report_compares_synthetic_features_with_real_ones(finished_run: Path) -> None:
    report = read_report(finished_run / "report.json")
    features = report.features
    assert (features.width, features.synthetic.images, features.real.images) == (96, 80, 100)
    assert features.real.dataset == "digits, held out"
    assert report.calibration.silhouette == features.synthetic.silhouette
    assert report.calibration.within_class_diversity is not None
    assert 0.5 < (features.real.silhouette or 0) < 0.9  # a model that is right on all of them
    assert 0 < (features.real.within_class_diversity or 0) < 0.2
    assert features.coverage is not None
    assert features.projection.parameters["random_state"] == 0
    assert len(features.synthetic.points.x) == 80
    assert sorted(set(features.real.points.labels)) == list(range(10))
    page = (finished_run / "report.html").read_text()
    assert "<figcaption>Real images: digits, held out</figcaption>" in page
    assert "have a silhouette of" in (finished_run / "report.md").read_text()


# ---- what is done again ----


def test_run_that_is_finished_writes_only_its_report(run_copy: Path) -> None:
    before = (run_copy / "w4a4/model.ort.onnx").stat().st_mtime_ns
    assert run(run_copy) == ["Report"]
    assert (run_copy / "w4a4/model.ort.onnx").stat().st_mtime_ns == before


@pytest.mark.slow
def test_run_with_other_bits_keeps_images_and_students(run_copy: Path) -> None:
    images = (run_copy / "calibration/images.safetensors").read_bytes()
    tasks = run(run_copy, bits=["w4a4", "w3a3"])
    assert "Generator" not in tasks
    assert "Fine-tuning w3a3" in tasks
    assert "Fine-tuning w4a4" not in tasks
    assert (run_copy / "calibration/images.safetensors").read_bytes() == images


def test_run_with_damaged_files_makes_the_same_files_again(finished_run: Path, run_copy: Path) -> None:
    student, image_file = run_copy / "w4a4/quantized.safetensors", run_copy / "calibration/images.safetensors"
    student.write_bytes(student.read_bytes()[:-100])
    content = image_file.read_bytes()
    image_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (run_copy / "fp32/model.onnx").unlink()
    before = read_stages(run_copy)
    run(run_copy)
    assert redone(before, read_stages(run_copy)) == {"synthesize", "quantize/w4a4", "export/fp32"}
    assert digests(run_copy) == digests(finished_run)


def test_students_of_an_earlier_version_are_made_again(run_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One whose file has another form, as before sums were limited: the images stay, and what was made from it goes."""
    with edited_stages(run_copy) as stages:
        record = stages["quantize/w4a4"]
        assert (record["result"].pop("format"), record["result"]["cpu"]) == (3, "any")
        record["result_sha256"] = None
    directory = Pipeline(small_config(), run_copy).directory
    assert "quantize/w4a4 in" in caplog.text
    assert "an earlier version" in caplog.text
    unfinished = {name for name in stages if not directory.finished(name)}
    assert unfinished == {"quantize/w4a4", "export/w4a4", "evaluate/w4a4", "benchmark"}
    assert {task for task in run(run_copy) if task.startswith(("Calibration", "Generator"))} == {"Calibration"}
    assert read_report(run_copy / "report.json").variants[2].cpu == "any"


def test_report_of_a_run_from_before_the_histograms_has_none(run_copy: Path) -> None:
    with edited_stages(run_copy) as stages:
        for name in ("quantize/w8a8", "quantize/w4a4"):
            del stages[name]["result"]["histograms"], stages[name]["result_sha256"]
    assert [variant.histograms for variant in Pipeline(small_config(), run_copy).report().variants] == [[], [], []]
    assert 'id="histograms"' not in (run_copy / "report.html").read_text(encoding="utf-8")


def test_run_from_before_the_fp16_baseline_gets_it(finished_run: Path, run_copy: Path) -> None:
    name = "fp32/model.fp16.onnx"
    (run_copy / name).unlink()
    with edited_stages(run_copy) as stages:
        old = stages["export/fp32"]
        old["inputs"], old["result_sha256"] = "of a version before", None
        (graph, *_) = old["result"]["artifacts"]
        old["result"] = {"artifacts": [{key: value for key, value in graph.items() if key != "fp16"}]}
        del old["files"][name]
    before = Pipeline(small_config(), run_copy).report().variants[0]
    assert (before.name, before.accuracy, len(before.artifacts)) == ("fp32", [], 1)  # scored on another export
    assert run(run_copy) == ["Export fp32", "Report"]  # the other stages count again: their graph is the same
    assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


def test_fp16_changes_only_the_graph_for_tensorrt(run_copy: Path) -> None:
    pipeline = Pipeline(small_config(fp16=True), run_copy)
    before = (run_copy / "w4a4/model.ort.onnx").read_bytes()
    checks = pipeline.export("w4a4").result.verification
    assert checks["model.trt.onnx"]["half"]["agreement"] > 0.9
    assert (run_copy / "w4a4/model.ort.onnx").read_bytes() == before
    graph = onnx.load(run_copy / "w4a4/model.trt.onnx").graph
    dtypes = {initializer.data_type for initializer in graph.initializer}
    assert onnx.TensorProto.FLOAT16 in dtypes
    assert onnx.TensorProto.FLOAT not in dtypes
    accuracy = pipeline.evaluate("w4a4").result.accuracy
    assert next(entry for entry in accuracy if entry.graph == "w4a4/model.trt.onnx").agreement > 90


def test_report_leaves_out_what_builds_on_a_stage_done_again(run_copy: Path) -> None:
    pipeline = Pipeline(small_config(seed=7), run_copy)
    pipeline.synthesize()
    assert [variant.name for variant in pipeline.report().variants] == ["fp32"]
    with pytest.raises(RunDirectoryError, match="no finished quantize/w4a4"):
        pipeline.export("w4a4")


def test_report_leaves_out_features_that_are_missing_or_of_other_data(run_copy: Path, tmp_path: Path) -> None:
    other = Pipeline(small_config(data=noise(tmp_path / "noise.npz")), run_copy)
    assert other.report().features is None
    other.features()
    features = other.report().features
    assert features.real.dataset == "noise.npz"
    assert Pipeline(small_config(), run_copy).report().features is None
    with edited_stages(run_copy) as stages:
        del stages["features"]
    report = Pipeline(small_config(), run_copy).report()
    assert (report.features, report.calibration.silhouette) == (None, None)
    assert "features" not in [entry.stage for entry in report.skipped]


def test_report_leaves_out_an_engine_that_cannot_run_here(run_copy: Path) -> None:
    if unavailable_reason() is None:
        pytest.skip("TensorRT and a GPU are there")
    engine = Artifact(kind="engine", target="tensorrt", path="w4a4/model.engine", size_bytes=3)

    def build() -> tuple[dict[str, object], list[str]]:
        (run_copy / engine.path).write_bytes(b"abc")
        return {"artifacts": [engine.model_dump(mode="json")]}, [engine.path]

    Pipeline(small_config(), run_copy).directory.perform("build/w4a4", {}, build, upstream=["export/w4a4"])
    report = Pipeline(small_config(), run_copy).run()
    assert report.skipped[0].stage == "build"
    assert all(entry.runtime != "tensorrt" for variant in report.variants for entry in variant.accuracy)


def test_report_leaves_out_an_altered_preview(run_copy: Path) -> None:
    (run_copy / "calibration/preview.png").write_bytes(b"no picture")
    Pipeline(small_config(), run_copy).report()
    assert "Contact sheet" not in (run_copy / "report.html").read_text()


# ---- evaluation data ----


def test_evaluation_data_changes_only_the_evaluation(finished_run: Path, run_copy: Path, tmp_path: Path) -> None:
    tasks = run(run_copy, data=noise(tmp_path / "noise.npz"))
    measured = {"Evaluating on torch", "Evaluating on onnxruntime-cpu", "Features", "Geometry of features", "Report"}
    assert set(tasks) == measured
    assert digests(run_copy) == digests(finished_run)
    assert read_report(run_copy / "report.json").variants[0].accuracy[0].top1 != 100


@pytest.mark.slow
def test_artifacts_made_with_other_data_or_labels_have_the_same_bytes(finished_run: Path, tmp_path: Path) -> None:
    with np.load(HELD_OUT) as archive:
        permuted = np.random.default_rng(0).permutation(archive["labels"])
        np.savez(tmp_path / "permuted.npz", images=archive["images"], labels=permuted)
    run(tmp_path / "noise", bits=["w4a4"], data=noise(tmp_path / "noise.npz"))
    run(tmp_path / "permuted", bits=["w8a8"], data=tmp_path / "permuted.npz")
    expected = digests(finished_run)
    assert {name.partition("/")[0] for name in expected} == {"calibration", "fp32", "w8a8", "w4a4"}
    for other, absent in (("noise", "w8a8"), ("permuted", "w4a4")):
        assert digests(tmp_path / other) == {
            name: sha256 for name, sha256 in expected.items() if not name.startswith(absent)
        }
    reports = [read_report(out / "report.json") for out in (finished_run, tmp_path / "noise", tmp_path / "permuted")]
    assert len({report.variants[0].accuracy[0].top1 for report in reports}) == 3
    assert len({report.features.real.silhouette for report in reports if report.features and report.features.real}) == 3
    assert len({report.calibration.silhouette for report in reports}) == 1
    assert reports[0].calibration.losses == reports[1].calibration.losses
    for variant, report in ((2, reports[1]), (1, reports[2])):
        assert report.variants[1].losses == reports[0].variants[variant].losses
        assert report.variants[1].histograms == reports[0].variants[variant].histograms


@pytest.mark.slow
def test_run_without_data_reports_agreement_on_held_out_synthetic_images(tmp_path: Path) -> None:
    run(tmp_path / "out", model=digits_module(tmp_path, "def make():\n    return digits()"), bits=["w8a8"])
    report = read_report(tmp_path / "out/report.json")
    assert not report.evaluation.labelled
    assert "synthetic" in report.evaluation.dataset
    assert report.evaluation.images == 10
    assert report.features.real is None
    assert len(report.features.synthetic.points.x) == 80
    assert "No labelled images were given" in (tmp_path / "out/report.html").read_text()
    scored = [entry for variant in report.variants for entry in variant.accuracy]
    assert all(entry.top1 is None and entry.agreement is not None for entry in scored)


# ---- what is refused, and what is left out ----


def synthesized(out: Path, **settings: object) -> Report:
    """Make images and return the report of that."""
    pipeline = Pipeline(small_config(**settings), out, command=["clusterq", "synthesize"])
    pipeline.synthesize()
    return pipeline.report()


def permuted(layer: nn.BatchNorm2d) -> None:
    """Give each channel of a layer the statistics of another one."""
    for statistic in (layer.running_mean, layer.running_var):
        statistic.copy_(statistic.roll(len(statistic) // 2))


def renewed(layer: nn.BatchNorm2d) -> None:
    """Give all channels of a layer the statistics of a new one."""
    layer.reset_running_stats()


def almost_renewed(layer: nn.BatchNorm2d) -> None:
    """Give all channels of a layer the statistics of a new one, except a few."""
    layer.reset_running_stats()
    layer.running_var[0] = 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, None),
        (permuted, "the BatchNorm statistics hardly belong to the weights: half of the layers are"),
        (almost_renewed, "the BatchNorm statistics hardly belong to the weights: half of the layers are"),
        (renewed, "the BatchNorm statistics are those of new layers"),
    ],
)
def test_synthesis_warns_once_of_statistics_that_are_not_those_of_the_weights(
    change: Callable[[nn.BatchNorm2d], None] | None,
    expected: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = load_model("digits", device=torch.device("cpu")).original
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and change:
            change(layer)
    weights = tmp_path / "net.pt"
    torch.save(net.state_dict(), weights)
    report = synthesized(tmp_path / "out", weights=str(weights))
    lines = [message for message in caplog.messages if "BatchNorm statistics" in message]
    assert [line.startswith(f"digits: {expected}") for line in lines] == [True] * (expected is not None)
    caveats = [sentence for sentence in text.caveats(report) if "BatchNorm" in sentence]
    assert [f"digits: t{caveat.removeprefix('T').removesuffix('.')}" for caveat in caveats] == lines


def test_run_says_that_the_model_answers_with_probabilities(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ending = "    def forward(self, x):\n        return super().forward(x).softmax(1)\n\n\n"
    make = "def make():\n    net = Net()\n    net.load_state_dict(digits().state_dict())\n    return net.eval()"
    model = digits_module(tmp_path, f"{ending}{make}")
    report = synthesized(tmp_path / "out", model=model)
    (line,) = [message for message in caplog.messages if "probabilities" in message]
    assert line.startswith(f"{model} ends in a softmax: ")
    assert report.model.probabilities == "softmax"
    assert report.calibration.teacher_top1 > 20  # by its logits, as the bundled model


def test_run_refuses_wrong_input_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.array([0, 1, 2, 99]))
    with pytest.raises(DataError, match="labels up to 99"):
        run(out, data=tmp_path / "data.npz")
    with pytest.raises(GraphError, match=r"did you mean .*layer1\.0\.conv1"):
        run(out, keep={"layer1.0.cnv1": 8})
    body = (
        "    def forward(self, x):\n        return super().forward(x) if x.sum() > -1e9 else x\n\n\n"
        "def make():\n    return Net()"
    )
    with pytest.raises(GraphError, match=r"Net\.forward, .*net\.py:9"):
        run(out, model=digits_module(tmp_path, body))
    assert not out.exists()


def test_pipeline_refuses_a_folder_of_another_model_or_of_other_files(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds a run of digits .*choose another folder"):
        Pipeline(small_config(weights="none"), finished_run)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds files of no run"):
        Pipeline(small_config(), tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"is not the manifest of a run \(schema: Field required\)"):
        RunDirectory(tmp_path, {})


def test_export_of_a_model_beyond_fp16_has_no_baseline(tmp_path: Path) -> None:
    body = "def make():\n    net = digits()\n    net.fc.weight.data *= 1e6\n    return net"
    pipeline = Pipeline(small_config(model=digits_module(tmp_path, body), data=HELD_OUT), tmp_path / "out")
    pipeline.write_config()
    assert list(pipeline.export("fp32").files) == ["fp32/model.onnx"]
    (skipped,) = (entry for entry in pipeline.report().skipped if entry.stage == "fp16 baseline")
    assert "fc.weight holds" in skipped.reason


def test_report_of_a_model_without_features_says_why(tmp_path: Path) -> None:
    body = (
        "    def forward(self, x):\n        y = super().forward(x)[:, :, None]\n"
        "        return (y @ y.transpose(1, 2)).mean(2)\n\n\n"
        "def make():\n    return Net()"
    )
    small = {"synthesis": {**SMALL["synthesis"], "images": 20}}
    pipeline = Pipeline(small_config(model=digits_module(tmp_path, body), **small), tmp_path / "out")
    pipeline.write_config()
    pipeline.synthesize()
    pipeline.features()
    report = pipeline.report()
    assert report.features is None
    (skipped,) = (entry for entry in report.skipped if entry.stage == "features")
    assert "last layer of Net is aten." in skipped.reason


def test_stages_name_the_stage_that_they_need(tmp_path: Path) -> None:
    pipeline = Pipeline(small_config(), tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="no finished synthesize stage; run clusterq synthesize"):
        pipeline.quantize(pipeline.config.widths[0])
    with pytest.raises(RunDirectoryError, match="no finished synthesize stage"):
        pipeline.features()
    with pytest.raises(RunDirectoryError, match="run clusterq quantize --bits w4a4 first"):
        pipeline.export("w4a4")


# ---- devices and settings ----


def test_resolve_device_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        resolve_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
def test_run_on_the_gpu(tmp_path: Path) -> None:
    run(tmp_path / "out", device="cuda")
    report = read_report(tmp_path / "out/report.json")
    assert report.environment.gpu
    fp32, w8a8, _ = report.variants
    assert "torch" in {entry.runtime for entry in fp32.latency}
    assert w8a8.accuracy[0].agreement == pytest.approx(w8a8.accuracy[1].agreement, abs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"synthesis": {"imges": 3}}, "unknown setting 'synthesis.imges'.*did you mean 'images'"),
        ({"finetune": {"steps": -1}}, "finetune.steps in the options"),
        ({"bits": ["w9a4"]}, "from 2 to 8"),
        ({"effort": "thorough", "synthesis": {"recipe": "paper"}}, "accepts no effort, got 'thorough'"),
    ],
)
def test_make_config_names_a_wrong_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"model": "digits", **settings})


def test_make_config_fills_in_what_effort_and_recipe_decide() -> None:
    standard = make_config({"model": "digits"})
    fast = make_config({"model": "digits", "effort": "fast", "synthesis": {"images": 300}})
    assert (fast.finetune.steps, fast.synthesis.images, fast.synthesis.generator.steps) == (0, 300, 60)
    thorough = make_config({"model": "digits", "effort": "thorough"})
    assert thorough.synthesis.refine.steps > standard.synthesis.refine.steps > 0
    paper = make_config({"model": "digits", "synthesis": {"recipe": "paper", "images": 640}})
    generator = paper.synthesis.generator
    assert (generator.steps, generator.warmup_steps) == (4000, 500)
    assert (generator.icv_noise, generator.lambda_std) == ("class", 1)
    assert (paper.synthesis.refine.steps, paper.finetune.ce_weight, paper.finetune.temperature) == (0, 1, 1)
    given = make_config({"model": "digits", "synthesis": {"recipe": "paper", "generator": {"steps": 900}}}).synthesis
    assert given.generator.steps == 900
    assert make_config({"model": "digits", "synthesis": given.model_dump(mode="json")}).synthesis == given


def test_to_toml_keeps_only_what_was_given() -> None:
    first = make_config({"model": "digits", "effort": "fast", "finetune": {"batch_size": 16}})
    settings = tomllib.loads(first.to_toml())
    again = make_config({**settings, "effort": "standard"})
    assert again == make_config({"model": "digits", "finetune": {"batch_size": 16}})


def test_scaled_to_reduces_the_work_of_large_models_except_what_was_given() -> None:
    requested = make_config({"model": "resnet18", "finetune": {"steps": 777}})
    small, large = requested.scaled_to(1e8), requested.scaled_to(4e8)
    assert small == requested
    assert (large.synthesis.images, large.synthesis.generator.steps, large.finetune.steps) == (512, 75, 777)
    assert requested.scaled_to(1e12).synthesis.images == requested.synthesis.images / 4
    assert large.scaled_to(4e8) == large
    paper = make_config({"model": "resnet18", "synthesis": {"recipe": "paper"}})
    assert paper.scaled_to(1e12) == paper


def test_pass_cost_counts_products_and_written_values() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10))
    products = 8 * 16 * 27 + 8 * 16 * 10
    assert pass_cost(net, (3, 4, 4)) == products + 100 * (8 * 16 + 10)
