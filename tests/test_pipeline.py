"""The stages over one run directory: what they leave, and what is done again."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calib.support.flops import pass_cost
from clusterq_deploy import Pipeline, RunConfig, read_report
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.config.toml import read_settings
from clusterq_deploy.errors import ConfigError, DataError, GraphError, RunDirectoryError
from clusterq_deploy.files import sha256_file
from clusterq_deploy.models.digits import HELD_OUT
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.report import Artifact
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.run.run import resolve_device
from clusterq_deploy.runtimes.tensorrt import unavailable_reason

SMALL = {
    "synthesis": {
        "images": 80,
        "generator": {"steps": 12, "warmup_steps": 6, "batch_size": 40, "samples_per_class": 4, "width": 8},
        "refine": {"steps": 12, "batch_size": 80},
    },
    "finetune": {"steps": 12, "batch_size": 16, "checkpoints": 2},
    "benchmark": {"batches": [1, 2], "min_seconds": 0.03, "min_runs": 3, "warmup_ms": 0},
}


def config(**more: object) -> RunConfig:
    return make_config({"model": "digits", "limit": 100, **SMALL, **more})


class Recorder:
    """A progress that remembers which tasks were opened."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[object]:
        assert total > 0
        self.tasks.append(description)
        yield lambda n=1, **figures: None


def run(out: Path, **more: object) -> list[str]:
    recorder = Recorder()
    Pipeline(config(**more), out, progress=recorder, command=["clusterq", "run"]).run()  # type: ignore[arg-type]
    return recorder.tasks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    run(out)
    return out


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    graphs = {f"w4a4/model.{kind}.onnx" for kind in ("ort", "trt", "int4")}
    graphs |= {f"w8a8/model.{kind}.onnx" for kind in ("ort", "trt")}
    assert files == graphs | {
        ".lock", "run.toml", "manifest.json", "report.json", "report.md", "report.html", "fp32/model.onnx",
        "fp32/model.fp16.onnx",
        "calibration/images.safetensors", "calibration/preview.png",
        "w8a8/quantized.safetensors", "w4a4/quantized.safetensors",
    }  # fmt: skip


def test_the_report_holds_measurements_of_every_graph(finished: Path) -> None:
    report = read_report(finished / "report.json")
    assert (report.model.name, report.model.classes, report.evaluation.images) == ("digits", 10, 100)
    assert [v.name for v in report.variants] == ["fp32", "w8a8", "w4a4"]
    for variant in report.variants:
        executed = {a.graph for a in variant.accuracy}
        baseline = {"fp32/model.fp16.onnx"}  # measured as an engine alone
        assert executed == {None} | {a.path for a in variant.artifacts} - baseline
        assert [a.runtime for a in variant.accuracy][:2] == ["torch", "onnxruntime-cpu"]
        assert {entry.batch for entry in variant.latency} == {1, 2}
        for artifact in variant.artifacts:
            assert (finished / artifact.path).stat().st_size == artifact.size_bytes
    fp32, w8a8, _ = report.variants
    assert fp32.accuracy[0].agreement == 100
    assert fp32.accuracy[1].top1 == fp32.accuracy[0].top1
    assert w8a8.accuracy[1].agreement > 97
    skipped = [own.stage for own in report.skipped]
    assert ("build" in skipped) == (unavailable_reason() is not None)
    assert [own.stage for own in report.skipped if own.stage == "sensitivity"] == ["sensitivity"]
    assert report.calibration.preview_classes == [str(digit) for digit in range(10)]
    raw = json.loads((finished / "report.json").read_text())
    assert raw["schema"] == 1
    assert raw["calibration"].keys() >= {"images", "seconds", "teacher_top1"}


def test_students_of_an_earlier_version_are_made_again(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose file has another form, as before sums were limited: the images stay, and what was made from it goes."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    manifest = json.loads((out / "manifest.json").read_text())
    record = manifest["stages"]["quantize/w4a4"]
    assert (record["result"].pop("format"), record["result"]["cpu"]) == (3, "any")
    record["result_sha256"] = None
    (out / "manifest.json").write_text(json.dumps(manifest))
    directory = Pipeline(config(), out).directory
    assert "quantize/w4a4 in" in caplog.text
    assert "made by an earlier version" in caplog.text
    left = {name for name in manifest["stages"] if directory.finished(name)}
    assert set(manifest["stages"]) - left == {"quantize/w4a4", "export/w4a4", "evaluate/w4a4", "benchmark"}
    assert {task for task in run(out) if task.startswith(("Calibration", "Generator"))} == {"Calibration"}
    assert read_report(out / "report.json").variants[2].cpu == "any"


def test_the_report_has_histograms_of_every_quantized_layer(finished: Path) -> None:
    report, pipeline = read_report(finished / "report.json"), Pipeline(config(), finished)
    layers = pipeline.student(BitWidths(4, 4)).layers()
    fp32, *variants = report.variants
    assert fp32.histograms == []
    for variant, narrow in zip(variants, (8, 4), strict=True):
        assert [own.layer for own in variant.histograms] == list(layers)
        for own in variant.histograms:
            assert sum(own.weight.counts) == layers[own.layer].weight.numel()
            assert own.weight.low in {-(1 << narrow - 1), -128}
            assert 0 <= own.activation.clipped < 0.05
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert text.count('<details class="layer">') == 2 * len(layers)


def test_a_run_from_before_the_histograms_has_a_report_without_them(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    for name, stage in manifest["stages"].items():
        if name.startswith("quantize/"):
            del stage["result"]["histograms"], stage["result_sha256"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert [v.histograms for v in Pipeline(config(), out).report().variants] == [[], [], []]
    assert 'id="histograms"' not in (out / "report.html").read_text(encoding="utf-8")


def test_a_finished_run_is_not_done_again(finished: Path) -> None:
    before = (finished / "w4a4/model.ort.onnx").stat().st_mtime_ns
    assert run(finished) == ["Report"]
    assert (finished / "w4a4/model.ort.onnx").stat().st_mtime_ns == before


def test_fp16_is_written_into_the_graph_for_tensorrt_alone(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "out")
    pipeline = Pipeline(config(fp16=True), out)
    before = {name: (out / name).read_bytes() for name in ("w4a4/model.ort.onnx", "w4a4/model.trt.onnx")}
    checks = pipeline.export("w4a4").result["verification"]
    assert checks["model.trt.onnx"]["half"]["agreement"] > 0.9
    assert (out / "w4a4/model.ort.onnx").read_bytes() == before["w4a4/model.ort.onnx"]
    halved = onnx.load(out / "w4a4/model.trt.onnx")
    kinds = {i.data_type for i in halved.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    accuracy = pipeline.evaluate("w4a4").result["accuracy"]
    assert next(a for a in accuracy if a["graph"] == "w4a4/model.trt.onnx")["agreement"] > 90


def test_run_toml_repeats_the_run(finished: Path) -> None:
    settings = read_settings(finished / "run.toml")
    assert make_config(settings) == config()


def copied(source: Path, target: Path) -> Path:
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return target


@pytest.mark.slow
def test_a_changed_option_redoes_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    images = (out / "calibration/images.safetensors").read_bytes()
    tasks = run(out, bits=["w4a4", "w3a3"])
    assert "Generator" not in tasks
    assert "Fine-tuning w3a3" in tasks
    assert "Fine-tuning w4a4" not in tasks
    assert (out / "calibration/images.safetensors").read_bytes() == images


def test_an_altered_file_is_made_again_and_comes_out_the_same(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    path = out / "w4a4/quantized.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    tasks = run(out)
    assert "Generator" not in tasks
    assert path.read_bytes() == content


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    first, again = (read_report(p / "report.json") for p in (finished, tmp_path / "again"))
    assert first.calibration.teacher_top1 == again.calibration.teacher_top1
    assert first.calibration.losses == again.calibration.losses
    assert first.features == again.features
    for a, b in zip(first.variants, again.variants, strict=True):
        assert (a.accuracy, a.losses, a.histograms) == (b.accuracy, b.losses, b.histograms)
        assert [f.sha256 for f in a.artifacts] == [f.sha256 for f in b.artifacts]


def test_a_stage_made_anew_takes_what_built_on_it_out_of_the_report(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    pipeline = Pipeline(config(seed=7), out)
    pipeline.synthesize()
    report = pipeline.report()
    assert [v.name for v in report.variants] == ["fp32"]
    with pytest.raises(RunDirectoryError, match="no finished quantize/w4a4"):
        pipeline.export("w4a4")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    class Interrupting(Recorder):
        @contextmanager
        def task(self, description: str, total: int) -> Iterator[object]:
            if description == "Refinement":
                raise KeyboardInterrupt
            yield lambda n=1, **figures: None

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Pipeline(config(bits=["w8a8"]), out, progress=Interrupting()).run()  # type: ignore[arg-type]
    run(out, bits=["w8a8"])
    assert (out / "report.html").is_file()


def test_an_engine_is_left_out_where_none_can_run(finished: Path, tmp_path: Path) -> None:
    if unavailable_reason() is None:
        pytest.skip("TensorRT and a GPU are there")
    out = copied(finished, tmp_path / "run")
    engine = Artifact(kind="engine", target="tensorrt", path="w4a4/model.engine", size_bytes=3)

    def build() -> tuple[dict[str, object], list[str]]:
        (out / engine.path).write_bytes(b"abc")
        return {"artifacts": [engine.model_dump(mode="json")]}, [engine.path]

    pipeline = Pipeline(config(), out)
    pipeline.directory.perform("build/w4a4", {}, build, upstream=["export/w4a4"])
    report = Pipeline(config(), out).run()
    assert report.skipped[0].stage == "build"
    assert all(a.runtime != "tensorrt" for v in report.variants for a in v.accuracy)


def test_an_untraceable_model_is_refused_before_any_work(tmp_path: Path) -> None:
    module = tmp_path / "net.py"
    module.write_text(
        "from clusterq_deploy.models.digits import DigitsNet, PRETRAINED_CFG\n\n\n"
        "class Net(DigitsNet):\n    def forward(s, x):\n"
        "        return super().forward(x) if x.sum() > -1e9 else x\n\n\n"
        "def net():\n    made = Net()\n    made.pretrained_cfg = PRETRAINED_CFG\n    return made\n"
    )
    with pytest.raises(GraphError, match=r"Net\.forward, .*net\.py:6"):
        run(tmp_path / "out", model=f"{module}:net")
    assert not (tmp_path / "out").exists()


def test_a_layer_to_keep_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"did you mean .*layer1\.0\.conv1"):
        run(tmp_path / "out", keep={"layer1.0.cnv1": 8})
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_what_it_says(tmp_path: Path) -> None:
    paper = make_config({"model": "digits", "synthesis": {"recipe": "paper", "generator": {"steps": 900}}}).synthesis
    assert (paper.generator.icv_noise, paper.generator.lambda_std, paper.generator.steps) == ("class", 1.0, 900)
    assert paper.refine.steps == 0
    assert make_config({"model": "digits"}).synthesis.refine.steps > 0
    again = make_config({"model": "digits", "synthesis": paper.model_dump(mode="json")}).synthesis
    assert again == paper


def test_another_models_folder_is_refused_and_left_alone(finished: Path) -> None:
    before = sorted(p.name for p in finished.iterdir())
    with pytest.raises(RunDirectoryError, match=r"holds a run of digits .*choose another folder"):
        Pipeline(config(weights="none"), finished)
    assert sorted(p.name for p in finished.iterdir()) == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds files that are no run's"):
        Pipeline(config(), tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"is no manifest of a run \(schema: Field required\)"):
        RunDirectory(tmp_path, {})


def test_wrong_data_is_found_before_any_work(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.array([0, 1, 2, 99]))
    with pytest.raises(DataError, match="labels up to 99"):
        run(tmp_path / "out", data=tmp_path / "data.npz")
    assert not (tmp_path / "out").exists()


def noise(path: Path) -> Path:
    """Evaluation data that has nothing to do with digits."""
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 255, (50, 8, 8, 1), np.uint8), labels=rng.integers(0, 10, 50))
    return path


def made(out: Path) -> dict[str, str]:
    """Digests of the files that each stage recorded, after a look that they are the files there, and all of them."""
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    files = {name: digest for stage in stages.values() for name, digest in stage["files"].items()}
    assert files == {name: sha256_file(out / name) for name in files}
    others = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - files.keys()
    assert others == {".lock", "run.toml", "manifest.json", "report.json", "report.md", "report.html"}
    return files


def test_evaluation_data_reaches_nothing_but_the_evaluation(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    tasks = run(out, data=noise(tmp_path / "noise.npz"))
    measured = {"Evaluating on torch", "Evaluating on onnxruntime-cpu", "Features", "Geometry of features", "Report"}
    assert set(tasks) == measured
    assert made(out) == made(finished)
    assert read_report(out / "report.json").variants[0].accuracy[0].top1 != 100


@pytest.mark.slow
def test_artifacts_made_anew_beside_other_data_or_labels_have_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    with np.load(HELD_OUT) as archive:
        permuted = np.random.default_rng(0).permutation(archive["labels"])
        np.savez(tmp_path / "permuted.npz", images=archive["images"], labels=permuted)
    run(tmp_path / "noise", bits=["w4a4"], data=noise(tmp_path / "noise.npz"))
    run(tmp_path / "permuted", bits=["w8a8"], data=tmp_path / "permuted.npz")
    expected, beside_noise, beside_permuted = made(finished), made(tmp_path / "noise"), made(tmp_path / "permuted")
    assert {name.partition("/")[0] for name in expected} == {"calibration", "fp32", "w8a8", "w4a4"}
    assert beside_noise == {name: sha256 for name, sha256 in expected.items() if not name.startswith("w8a8")}
    assert beside_permuted == {name: sha256 for name, sha256 in expected.items() if not name.startswith("w4a4")}
    reports = [read_report(out / "report.json") for out in (finished, tmp_path / "noise", tmp_path / "permuted")]
    assert len({report.variants[0].accuracy[0].top1 for report in reports}) == 3
    assert len({report.features.real.silhouette for report in reports if report.features and report.features.real}) == 3
    assert len({report.calibration.silhouette for report in reports}) == 1


def test_the_report_lays_synthetic_features_beside_real_ones(finished: Path) -> None:
    report = read_report(finished / "report.json")
    found = report.features
    assert found is not None
    assert found.real is not None
    assert (found.width, found.synthetic.images, found.real.images) == (96, 80, 100)
    assert found.real.dataset == "digits, held out"
    assert report.calibration.silhouette == found.synthetic.silhouette
    assert report.calibration.within_class_diversity is not None
    assert 0.5 < (found.real.silhouette or 0) < 0.9  # a model that is right on all of them
    assert 0 < (found.real.within_class_diversity or 0) < 0.2
    assert found.coverage is not None
    assert found.projection is not None
    assert found.projection.parameters["random_state"] == 0
    assert len(found.synthetic.points.x) == 80
    assert sorted(set(found.real.points.labels)) == list(range(10))
    page = (finished / "report.html").read_text()
    assert "<figcaption>Real images: digits, held out</figcaption>" in page
    assert "have a silhouette of" in (finished / "report.md").read_text()


def test_a_run_from_before_the_fp16_baseline_goes_on_and_gets_it(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    name = "fp32/model.fp16.onnx"
    (out / name).unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    old = manifest["stages"]["export/fp32"]
    old["inputs"], old["result_sha256"] = "of a version before", None
    old["result"] = {"artifacts": [{k: v for k, v in a.items() if k != "fp16"} for a in old["result"]["artifacts"][:1]]}
    del old["files"][name]
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = Pipeline(config(), out).report().variants[0]
    assert (before.name, before.accuracy, len(before.artifacts)) == ("fp32", [], 1)  # scored on another export
    assert run(out) == ["Export fp32", "Report"]  # alone is done again, and what stood on its like counts again
    assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_model_that_does_not_fit_fp16_goes_without_the_baseline(tmp_path: Path) -> None:
    module = tmp_path / "net.py"
    module.write_text(
        "from clusterq_deploy.models.digits import digits\n\n\ndef large():\n    made = digits()\n"
        "    made.fc.weight.data *= 1e6\n    return made\n"
    )
    pipeline = Pipeline(config(model=f"{module}:large", data=HELD_OUT), tmp_path / "out")
    pipeline.begin()
    record = pipeline.export("fp32")
    assert list(record.files) == ["fp32/model.onnx"]
    (skipped,) = (own for own in pipeline.report().skipped if own.stage == "fp16 baseline")
    assert "fc.weight holds" in skipped.reason


def test_features_that_are_missing_or_of_other_data_stay_out_of_the_report(finished: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "run")
    other = Pipeline(config(data=noise(tmp_path / "noise.npz")), out)
    assert other.report().features is None
    other.features()
    shown = other.report().features
    assert shown is not None
    assert shown.real is not None
    assert shown.real.dataset == "noise.npz"
    assert Pipeline(config(), out).report().features is None
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["stages"]["features"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    report = Pipeline(config(), out).report()
    assert (report.features, report.calibration.silhouette) == (None, None)
    assert [skipped.stage for skipped in report.skipped if skipped.stage == "features"] == []


def test_a_model_whose_features_cannot_be_taken_is_reported_without_them(tmp_path: Path) -> None:
    module = tmp_path / "net.py"
    module.write_text(
        "import torch\nfrom clusterq_deploy.models.digits import DigitsNet, PRETRAINED_CFG\n\n\n"
        "class Net(DigitsNet):\n    def forward(s, x):\n        return super().forward(x) @ torch.eye(10)\n\n\n"
        "def net():\n    made = Net()\n    made.pretrained_cfg = PRETRAINED_CFG\n    return made\n"
    )
    small = {"synthesis": {**SMALL["synthesis"], "images": 20}}
    pipeline = Pipeline(config(model=f"{module}:net", **small), tmp_path / "out")
    pipeline.begin()
    pipeline.synthesize()
    pipeline.features()
    report = pipeline.report()
    assert report.features is None
    (skipped,) = (skipped for skipped in report.skipped if skipped.stage == "features")
    assert "last layer of Net is <built-in" in skipped.reason


@pytest.mark.slow
def test_without_data_agreement_on_held_out_synthetic_images_is_reported(tmp_path: Path) -> None:
    module = tmp_path / "net.py"
    module.write_text("from clusterq_deploy.models.digits import digits\n\n\ndef mine():\n    return digits()\n")
    run(tmp_path / "out", model=f"{module}:mine", bits=["w8a8"])
    report = read_report(tmp_path / "out/report.json")
    assert not report.evaluation.labelled
    assert "synthetic" in report.evaluation.dataset
    assert report.evaluation.images == 10
    assert report.features is not None
    assert report.features.real is None
    assert len(report.features.synthetic.points.x) == 80
    assert "No labelled images were given" in (tmp_path / "out/report.html").read_text()
    assert all(a.top1 is None and a.agreement is not None for v in report.variants for a in v.accuracy)


def test_stages_alone_say_what_they_need(tmp_path: Path) -> None:
    pipeline = Pipeline(config(), tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="no finished synthesize stage; run clusterq synthesize"):
        pipeline.quantize(pipeline.config.widths[0])
    with pytest.raises(RunDirectoryError, match="no finished synthesize stage"):
        pipeline.features()
    with pytest.raises(RunDirectoryError, match="run clusterq quantize --bits w4a4 first"):
        pipeline.export("w4a4")


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        resolve_device("cuda")


def test_unknown_and_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'synthesis.imges'.*did you mean 'images'"):
        make_config({"model": "digits", "synthesis": {"imges": 3}})
    with pytest.raises(ConfigError, match=r"finetune.steps in the options"):
        make_config({"model": "digits", "finetune": {"steps": -1}})
    with pytest.raises(ConfigError, match="from 2 to 8"):
        make_config({"model": "digits", "bits": ["w9a4"]})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
def test_a_run_on_the_gpu(tmp_path: Path) -> None:
    run(tmp_path / "out", device="cuda")
    report = read_report(tmp_path / "out/report.json")
    assert report.environment.gpu
    fp32, w8a8, _ = report.variants
    assert "torch" in {entry.runtime for entry in fp32.latency}
    assert w8a8.accuracy[0].agreement == pytest.approx(w8a8.accuracy[1].agreement, abs=2)


def test_effort_and_recipe_fill_in_what_was_not_given() -> None:
    fast = make_config({"model": "digits", "effort": "fast", "synthesis": {"images": 300}})
    assert (fast.finetune.steps, fast.synthesis.images, fast.synthesis.generator.steps) == (0, 300, 60)
    thorough = make_config({"model": "digits", "effort": "thorough"})
    assert thorough.synthesis.refine.steps > make_config({"model": "digits"}).synthesis.refine.steps
    paper = make_config({"model": "digits", "synthesis": {"recipe": "paper", "images": 640}})
    assert (paper.synthesis.generator.steps, paper.synthesis.generator.warmup_steps) == (4000, 500)
    assert (paper.finetune.ce_weight, paper.finetune.temperature) == (1.0, 1.0)
    with pytest.raises(ConfigError, match="takes no effort, got 'thorough'"):
        make_config({"model": "digits", "effort": "thorough", "synthesis": {"recipe": "paper"}})


def test_another_effort_replaces_what_the_first_one_filled_in_and_keeps_what_was_given() -> None:
    first = make_config({"model": "digits", "effort": "fast", "finetune": {"batch_size": 16}})
    settings = tomllib.loads(first.to_toml())
    again = make_config({**settings, "effort": "standard"})
    assert again == make_config({"model": "digits", "finetune": {"batch_size": 16}})


def test_large_models_get_less_work_on_a_cpu_but_for_what_was_given() -> None:
    asked = make_config({"model": "resnet18", "finetune": {"steps": 777}})
    small, large = asked.scaled_to(1e8), asked.scaled_to(4e8)
    assert small == asked
    assert (large.synthesis.images, large.synthesis.generator.steps, large.finetune.steps) == (512, 75, 777)
    assert asked.scaled_to(1e12).synthesis.images == asked.synthesis.images / 4
    assert large.scaled_to(4e8) == large
    paper = make_config({"model": "resnet18", "synthesis": {"recipe": "paper"}})
    assert paper.scaled_to(1e12) == paper


def test_the_cost_of_a_pass_counts_products_and_written_values() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 10))
    products = 8 * 16 * 27 + 8 * 16 * 10
    assert pass_cost(net, (3, 4, 4)) == products + 100 * (8 * 16 + 10)


def test_a_preview_that_was_altered_is_not_shown(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "calibration/preview.png").write_bytes(b"no picture")
    Pipeline(config(), out).report()
    assert "Contact sheet" not in (out / "report.html").read_text()
