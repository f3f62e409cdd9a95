"""The stages, strung together over one run directory."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from pydantic import TypeAdapter

from calib.calibration_set import CalibrationSet
from calib.cost import pass_cost
from calib.progress import SILENT, Progress
from calib.synthesis import synthesize
from clusterq_deploy import engine, export
from clusterq_deploy.config import RunConfig
from clusterq_deploy.data import EvaluationSet, load_evaluation
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ConfigError, FeatureError, RunDirectoryError
from clusterq_deploy.export.integers import SiteComparison
from clusterq_deploy.features import compare_features
from clusterq_deploy.files import fingerprint
from clusterq_deploy.measure import Predictions, benchmark, predictions, score, summarize
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.quantize import (
    BitWidths,
    PrecisionPlan,
    Sensitivity,
    Student,
    finetune,
    initialize,
    judged_views,
    load_student,
    make_student,
    plan_precision,
    sensitivities,
)
from clusterq_deploy.quantize.graph import folded_teacher
from clusterq_deploy.report.assemble import assemble
from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.report.schema import Accuracy, Artifact, Report, Skipped
from clusterq_deploy.rundir import Result, RunDirectory, StageRecord, digest
from clusterq_deploy.runners import OnnxRunner, Runner, TorchRunner
from clusterq_deploy.version import __version__

logger = logging.getLogger(__name__)

IMAGES, PREVIEW = "calibration/images.safetensors", "calibration/preview.png"
FP32 = "fp32"
_EVALUATION_BATCH = 50


def resolve_device(name: str) -> torch.device:
    """The torch device of `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` is asked for and torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no NVIDIA GPU; use --device cpu, or check the driver with nvidia-smi")
    return torch.device(name)


class Pipeline:
    """One run: its configuration, its directory, and the stages that fill it.

    Every stage is done at most once for the same inputs; a stage that needs another one's files asks for them.

    Attributes:
        asked: the configuration as it was given; `config` is what is done, less for a large model on a CPU.

    Args:
        config: what to do.
        out: the run directory.
        progress: shows how far things are.
        command: the command line, for the report.

    Raises:
        ClusterQError: the model cannot be loaded, or the directory cannot be used.
    """

    def __init__(
        self, config: RunConfig, out: Path, *, progress: Progress = SILENT, command: list[str] | None = None
    ) -> None:
        self.config, self.progress, self.command = config, progress, command or []
        self.device = resolve_device(config.device)
        self.model: LoadedModel = load_model(
            config.model,
            weights=config.weights,
            input_size=config.input_size,
            mean=config.mean,
            std=config.std,
            device=self.device,
        )
        self.asked = config
        if self.device.type == "cpu":
            self.config = config.scaled_to(pass_cost(self.model.module, self.model.input.size))
        identity = {"name": self.model.slug, "weights_sha256": self.model.weights_sha256}
        self.directory = RunDirectory(out, identity)
        self._identity = {
            **identity,
            "code_sha256": self.model.code_sha256,
            "input": self.model.input.model_dump(mode="json"),
            "version": __version__,
        }

    def begin(self) -> None:
        """Make the run directory this run's; what can be found wrong with model or data is found here.

        Raises:
            GraphError: the model cannot be traced.
            DataError: the evaluation data does not fit.
        """
        folded_teacher(self.model.module)
        if self._has_own_data:
            _ = self.evaluation
        self.directory.begin(self.asked.to_toml())

    # ---- stages ----

    def synthesize(self) -> StageRecord:
        """Make the calibration set."""
        settings = self.config.synthesis

        def work() -> tuple[Result, list[str]]:
            spec = self.model.input
            made = synthesize(
                self.model.module,
                classes=self.model.classes,
                size=spec.size,
                mean=spec.mean,
                std=spec.std,
                config=settings,
                device=self.device,
                rng=self._rng("synthesize"),
                progress=self.progress,
            )
            provenance = self._provenance("calibration", synthesis=settings.model_dump(mode="json"))
            calibration = CalibrationSet(made.calibration.images, made.calibration.labels, provenance)
            preview = io.BytesIO()
            calibration.preview(spec.mean, spec.std).save(preview, "PNG")
            names = [
                self.directory.write(IMAGES, calibration.to_bytes()),
                self.directory.write(PREVIEW, preview.getvalue()),
            ]
            result = {
                "images": len(calibration),
                "teacher_top1": made.teacher_top1,
                "within_class_diversity": made.within_class_diversity,
                "flip": made.flip,
                "recipe": settings.recipe,
                "losses": made.losses,
            }
            return result, names

        return self._perform("synthesize", {"settings": settings.model_dump(mode="json")}, work)

    def sensitivity(self, bits: BitWidths) -> StageRecord:
        """Measure what the quantization of each layer alone costs, on synthetic images."""
        self._done("synthesize")
        batch_size = self.config.finetune.batch_size

        def work() -> tuple[Result, list[str]]:
            rng = self._rng(f"sensitivity/{bits}")
            found = sensitivities(
                make_student(self.model.module, bits, **self._widths),
                self.calibration.images,
                judged=self._judged_views(rng),
                batch_size=batch_size,
                rng=rng,
                progress=self.progress,
            )
            return {"layers": [asdict(own) for own in found]}, []

        inputs = {"bits": str(bits), "batch_size": batch_size, **self._widths}
        return self._perform(f"sensitivity/{bits}", inputs, work, upstream=["synthesize"])

    def _judged_views(self, rng: torch.Generator) -> torch.Tensor:
        """The views of the calibration images on which costs are estimated."""
        flip = bool(self._done("synthesize").result["flip"])
        return judged_views(self.calibration.images, flip=flip, rng=rng)

    @property
    def _widths(self) -> Result:
        """What `make_student` is to know beside a variant's bits."""
        return {"first_last": self.config.first_last, "keep": self.config.keep}

    def _plan(self, bits: BitWidths, max_drop: float) -> PrecisionPlan:
        """The layers that have to be raised for a variant to lose no more."""
        costs, rng = self.sensitivity(bits).result["layers"], self._rng(f"precision/{bits}")
        return plan_precision(
            self.model.module,
            bits,
            **self._widths,
            costs=TypeAdapter(list[Sensitivity]).validate_python(costs),
            max_drop=max_drop,
            images=self.calibration.images,
            judged=self._judged_views(rng),
            batch_size=self.config.finetune.batch_size,
            rng=rng,
            progress=self.progress,
        )

    def quantize(self, bits: BitWidths) -> StageRecord:
        """Make one variant: quantizers, scales, fine-tuning."""
        source, settings = self._done("synthesize"), self.config.finetune.scaled_to(bits)
        max_drop = self.config.max_drop

        def work() -> tuple[Result, list[str]]:
            calibration, rng = self.calibration, self._rng(f"quantize/{bits}")
            plan = None if max_drop is None or bits == BitWidths(8, 8) else self._plan(bits, max_drop)
            widths = self._widths if plan is None else {**self._widths, "keep": plan.keep}
            student = make_student(self.model.module, bits, **widths)
            started = initialize(
                student, calibration.images, batch_size=settings.batch_size, rng=rng, progress=self.progress
            )
            tuning = finetune(
                student,
                started.reference,
                calibration,
                config=settings,
                flip=bool(source.result["flip"]),
                rng=rng,
                progress=self.progress,
            )
            provenance = self._provenance(
                str(bits), finetune=settings.model_dump(mode="json"), calibration=source.files[IMAGES]
            )
            result = {
                "losses": tuning.losses,
                "kept_step": tuning.kept_step,
                "equalized": [asdict(pair) for pair in started.equalized],
                "reconstruction_errors": started.errors,
                "bias_shifts": started.shifts,
                "keep": student.keep,
                "expected_drop": None if plan is None else plan.estimate.expected_drop,
                "quantized_layers": len(student.placement.weights),
                "skipped_layers": [{"layer": k, "reason": v} for k, v in student.placement.skipped.items()],
            }
            return result, [self.directory.write(_student_file(bits), student.to_bytes(provenance))]

        inputs = {
            "settings": settings.model_dump(mode="json"),
            "bits": str(bits),
            "max_drop": max_drop,
            **self._widths,
        }
        return self._perform(f"quantize/{bits}", inputs, work, upstream=["synthesize"])

    def export(self, variant: str) -> StageRecord:
        """Write a variant's graphs, each verified against torch first."""
        size = self.model.input.size

        def write(graph: onnx.ModelProto, name: str, target: export.Spelling, notes: Iterable[str] = ()) -> Result:
            annotated = export.annotate(
                graph,
                model=self.model.slug,
                source=self.model.source,
                variant=variant,
                inputs=self.model.input,
                provenance=self._provenance(variant, target=target),
            )
            data = annotated.SerializeToString()
            path = self.directory.write(f"{variant}/{name}", data)
            made = Artifact(kind="onnx", target=target, path=path, size_bytes=len(data), notes=list(notes))
            return made.model_dump(mode="json")

        def work_float() -> tuple[Result, list[str]]:
            graph = export.float_graph(self.model.module, size, seed=self.config.seed, name=f"{FP32}/model.onnx")
            artifact = write(graph, "model.onnx", "onnxruntime")
            return {"artifacts": [artifact]}, [artifact["path"]]

        def work() -> tuple[Result, list[str]]:
            student = self.student(BitWidths.parse(variant))
            images = self.calibration.images[: export.VERIFIED_IMAGES].numpy()
            made = export.student_graphs(student, images, size=size, name=variant, fp16=self.config.fp16)
            artifacts, checks = [], {}
            for own in made:
                checks[own.file] = own.checks
                artifacts.append(write(own.graph, own.file, own.spelling, own.notes))
            return {"artifacts": artifacts, "verification": checks}, [a["path"] for a in artifacts]

        if variant == FP32:
            return self._perform("export/fp32", {}, work_float)
        self._done(f"quantize/{variant}")
        settings = {"fp16": self.config.fp16}
        return self._perform(f"export/{variant}", settings, work, upstream=["synthesize", f"quantize/{variant}"])

    def compare_graphs(self, variant: str, images: int) -> Iterator[tuple[str, float, list[SiteComparison]]]:
        """Hold a variant's graphs against torch on up to so many synthetic images.

        Gives each graph's path, the percentage of images with torch's top-1 as ONNX Runtime executes the graph (that
        of TensorRT with optimizations off), and the integers at every quantizer.
        """
        student, batch = self.student(BitWidths.parse(variant)), self.calibration.images[:images].numpy()
        for artifact in self._done(f"export/{variant}").result["artifacts"]:
            path, spelling = self.directory.path / artifact["path"], artifact["target"]
            with self._runner(artifact) as own:
                same = export.agreement(own, student, batch, spelling=spelling, batch_size=_EVALUATION_BATCH)
            found = export.compare_integers(onnx.load(path), student, batch, spelling=spelling)
            yield artifact["path"], same, found

    def build(self, variant: str) -> StageRecord | None:
        """Build a variant's TensorRT engine; None where that cannot be done."""
        if engine.unavailable_reason() is not None:
            return None
        source, settings = self._done(f"export/{variant}"), self._build_config
        graph = _graph_for(source, "tensorrt") or _graph_for(source, "onnxruntime")

        def work() -> tuple[Result, list[str]]:
            path = self.directory.path / variant / "model.engine"
            info = engine.build_engine(self.directory.path / str(graph), path, settings, self.progress)
            name = f"{variant}/model.engine"
            artifact = Artifact(kind="engine", target="tensorrt", path=name, size_bytes=info.size_bytes)
            return {"artifacts": [artifact.model_dump(mode="json")]}, [name, f"{variant}/model.engine.json"]

        inputs = {"settings": settings.model_dump(mode="json")}
        return self._perform(f"build/{variant}", inputs, work, upstream=[f"export/{variant}"])

    def evaluate(self, variant: str) -> StageRecord:
        """Measure a variant's accuracy in torch and as each runtime executes its graphs."""
        source = self._done(f"export/{variant}")
        built, data = self._built(variant), self.evaluation

        def work() -> tuple[Result, list[str]]:
            teacher = self._teacher_predictions
            found: list[Accuracy] = []
            if variant == FP32:
                found.append(score("torch", teacher, teacher, data))
            else:
                with TorchRunner(self.student(BitWidths.parse(variant))) as runner:
                    found.append(self._accuracy(runner, None))
            for artifact in [*source.result["artifacts"], *(built.result["artifacts"] if built else [])]:
                with self._runner(artifact) as runner:
                    found.append(self._accuracy(runner, artifact["path"]))
            return {"accuracy": [a.model_dump(mode="json") for a in found]}, []

        upstream = [f"export/{variant}", *([] if self._has_own_data else ["synthesize"])]
        upstream += _engine_stage(variant, built)
        return self._perform(f"evaluate/{variant}", self._data_inputs, work, upstream=upstream)

    def features(self) -> StageRecord:
        """Lay the teacher's features of the synthetic images beside those of real ones; the report alone reads it."""
        self._done("synthesize")
        inputs = self._data_inputs

        def work() -> tuple[Result, list[str]]:
            made = self.calibration
            synthetic = EvaluationSet.from_images("synthetic images", made.images.numpy(), made.labels.numpy())
            try:
                found = compare_features(
                    self.model.module,
                    synthetic,
                    self.evaluation if self._has_own_data else None,
                    classes=self.model.classes,
                    seed=self.config.seed,
                    progress=self.progress,
                )
            except FeatureError as error:
                return {"inputs": inputs, "skipped": str(error)}, []
            return {"inputs": inputs, "features": found.model_dump(mode="json")}, []

        return self._perform("features", inputs, work, upstream=["synthesize"])

    def benchmark(self) -> StageRecord:
        """Time FP32 and every exported variant in turn, each as its target executes it."""
        self._done(f"export/{FP32}")
        variants = [v for v in (FP32, *self.config.bits) if self.directory.finished(f"export/{v}")]
        sources = {v: self._done(f"export/{v}") for v in variants}
        built = {v: self._built(v) for v in variants}
        environment = collect_environment(self.device).model_dump(mode="json")
        settings, size = self.config.benchmark, self.model.input.size

        def work() -> tuple[Result, list[str]]:
            runners: dict[str, Runner] = {}
            owners: dict[str, str] = {}
            for variant, source in sources.items():
                name = str(_graph_for(source, "onnxruntime"))
                path = self.directory.path / name
                runners[name], owners[name] = OnnxRunner(path, threads=settings.cpu_threads), variant
            if self.device.type == "cuda":
                runners["torch"], owners["torch"] = TorchRunner(self.model.module), FP32
            latency: dict[str, list[Result]] = {v: [] for v in variants}
            for name, records in benchmark(runners, size, settings, self.progress).items():
                is_graph = name != "torch"
                more = {"graph": name if is_graph else None, "threads": settings.cpu_threads if is_graph else None}
                latency[owners[name]] += [{**r.model_dump(mode="json"), **more} for r in records]
            for variant, record in built.items():
                if record:
                    latency[variant] += self._time_engine(record.result["artifacts"][0]["path"])
            return {"latency": latency, "environment": environment}, []

        upstream = [stage for v in variants for stage in (f"export/{v}", *_engine_stage(v, built[v]))]
        inputs = {"settings": settings.model_dump(mode="json"), "environment": environment}
        return self._perform("benchmark", inputs, work, upstream=upstream)

    def report(self) -> Report:
        """Write report.json, report.md and report.html from what the stages measured."""
        records = {name: r for name in self._stage_names() if (r := self.directory.finished(name)) is not None}
        compared = records.get("features")
        if compared and compared.result["inputs"] != self._data_inputs:
            del records["features"]  # it shows other images than those that this report is on
        report = assemble(
            records,
            config=self.config,
            model=self.model,
            data=self.evaluation,
            device=self.device,
            command=self.command,
            skipped=self._skipped(records),
        )
        preview = self.directory.path / PREVIEW
        self.directory.write("report.json", report.to_json())
        self.directory.write("report.md", to_markdown(report))
        self.directory.write("report.html", to_html(report, preview.read_bytes() if preview.is_file() else None))
        return report

    def run(self) -> Report:
        """Every stage in order."""
        self.begin()
        variants = [FP32, *self.config.bits]
        self.export(FP32)  # a model that cannot be exported is found before the work, not after it
        self.synthesize()
        for bits in self.config.widths:
            self.quantize(bits)
        for variant in self.config.bits:
            self.export(variant)
        for variant in variants:
            self.build(variant)
        for variant in variants:
            self.evaluate(variant)
        self.features()
        self.benchmark()
        return self.report()

    # ---- what stages share ----

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The calibration set of this run."""
        return CalibrationSet.load(self.directory.path / IMAGES)

    @cached_property
    def evaluation(self) -> EvaluationSet:
        """The images that accuracy is measured on; nothing but `evaluate`, `features` and `report` reads them."""
        if self._has_own_data:
            return load_evaluation(self.config.data, self.model, self.config.limit)
        self._done("synthesize")
        _, held_out = self.calibration.split(self.config.finetune.held_out)
        return EvaluationSet.from_images("held-out synthetic images", held_out.images.numpy())

    @property
    def _has_own_data(self) -> bool:
        return self.config.data is not None or self.model.source == "bundled"

    @cached_property
    def _data_inputs(self) -> Result:
        """Tells one choice of evaluation images from another; a changed file counts as another one."""
        path = self.config.data
        return {"data": fingerprint(path) if path else self.evaluation.name, "limit": self.config.limit}

    @cached_property
    def _teacher_predictions(self) -> Predictions:
        with TorchRunner(self.model.module) as runner:
            return predictions(runner, self.evaluation, _EVALUATION_BATCH, self.progress)

    def student(self, bits: BitWidths) -> Student:
        """A variant as the quantize stage left it."""
        return load_student(self.directory.path / _student_file(bits), self.model.module)[0].to(self.device)

    def _accuracy(self, runner: Runner, graph: str | None) -> Accuracy:
        own = predictions(runner, self.evaluation, _EVALUATION_BATCH, self.progress)
        return score(runner.runtime, own, self._teacher_predictions, self.evaluation, graph)

    def _runner(self, artifact: Result) -> Runner:
        path = self.directory.path / artifact["path"]
        if artifact["kind"] == "engine":
            return engine.TensorRTRunner(path)
        return OnnxRunner(path, optimized=artifact["target"] != "tensorrt")

    def _time_engine(self, name: str) -> list[Result]:
        settings = self.config.benchmark
        found = []
        with engine.TensorRTRunner(self.directory.path / name) as runner:
            for batch in settings.batches:
                times = runner.measure(
                    batch,
                    warmup_ms=settings.warmup_ms,
                    min_runs=settings.min_runs,
                    min_seconds=settings.min_seconds,
                    cuda_graph=True,
                )
                found.append({**summarize(runner.runtime, batch, times).model_dump(mode="json"), "graph": name})
        return found

    def _perform(
        self,
        stage: str,
        inputs: Result,
        work: Callable[[], tuple[Result, list[str]]],
        upstream: Iterable[str] = (),
    ) -> StageRecord:
        logger.info("stage %s", stage)
        own = {**inputs, "model": self._identity, "seed": self.config.seed, "device": self.device.type}
        # TF32 keeps ten bits of a float: torch's student would not be the one that is exported
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.directory.perform(stage, own, work, upstream)

    def _done(self, stage: str) -> StageRecord:
        record = self.directory.finished(stage)
        if record is None:
            verb, _, variant = stage.partition("/")
            wanted = f" --bits {variant}" if variant and variant != FP32 else ""
            raise RunDirectoryError(
                f"{self.directory.path} has no finished {stage} stage; run clusterq {verb}{wanted} first"
            )
        return record

    def _rng(self, stage: str) -> torch.Generator:
        """A generator of its own for each stage, so that one more draw in a stage moves no other."""
        seed = int(digest([self.config.seed, stage])[:15], 16)
        return torch.Generator(self.device).manual_seed(seed)

    def _provenance(self, variant: str, **more: Any) -> Result:
        return {
            "variant": variant,
            "seed": self.config.seed,
            "torch": torch.__version__,
            **self._identity,
            **more,
        }

    def _built(self, variant: str) -> StageRecord | None:
        """The finished build stage of a variant, where its engine can run."""
        return None if engine.unavailable_reason() else self.directory.finished(f"build/{variant}")

    @property
    def _build_config(self) -> engine.BuildConfig:
        """The build settings, with a profile that holds the batches to be timed."""
        settings = self.config.build
        low, best, high = settings.batch
        return settings.model_copy(update={"batch": (low, best, max(high, *self.config.benchmark.batches))})

    def _stage_names(self) -> list[str]:
        variants = [FP32, *self.config.bits]
        return ["synthesize", "features", "benchmark"] + [
            f"{stage}/{v}" for v in variants for stage in ("sensitivity", "quantize", "export", "build", "evaluate")
        ]

    def _skipped(self, records: dict[str, StageRecord]) -> list[Skipped]:
        skipped = []
        reason = engine.unavailable_reason()
        if reason or not any(name.startswith("build/") for name in records):
            reason = reason or "not asked for"
            skipped.append(Skipped(stage="build", reason=reason))
        if "features" in records and "skipped" in records["features"].result:
            skipped.append(Skipped(stage="features", reason=records["features"].result["skipped"]))
        return skipped


def _student_file(bits: BitWidths) -> str:
    return f"{bits}/quantized.safetensors"


def _graph_for(record: StageRecord, target: str) -> str | None:
    """The path of a finished export's graph for a target."""
    return next((str(a["path"]) for a in record.result["artifacts"] if a["target"] == target), None)


def _engine_stage(variant: str, built: StageRecord | None) -> list[str]:
    """The build stage, for the stages that use its engine."""
    return [f"build/{variant}"] if built else []
