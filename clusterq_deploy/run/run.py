"""The state that the stages of a run share."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
from pydantic import ValidationError

from calib.calibration_set import CalibrationSet
from calib.support.amp import has_fast_bfloat16
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.flops import pass_cost
from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ConfigError, RunDirectoryError
from clusterq_deploy.evaluation.accuracy import Predictions, predictions, predictions_state
from clusterq_deploy.evaluation.data import EvaluationSet, load_evaluation
from clusterq_deploy.files import fingerprint
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.quantization import BitWidths, Student, load_student
from clusterq_deploy.quantization.graph.fold import folded_teacher
from clusterq_deploy.quantization.graph.placement import place
from clusterq_deploy.quantization.student import FORMAT
from clusterq_deploy.results.report import Environment
from clusterq_deploy.results.stages import StageResult
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.run.manifest import StageRecord, broken_manifest, digest
from clusterq_deploy.run.stage import AnyStage, Finished, Json, Needs, Stage
from clusterq_deploy.runtimes.runners import Runner, TorchRunner
from clusterq_deploy.runtimes.tensorrt import TURING, build_problem, require
from clusterq_deploy.version import __version__

logger = logging.getLogger(__name__)

_R = TypeVar("_R", bound=StageResult)

IMAGES, PREVIEW = "calibration/images.safetensors", "calibration/preview.png"
FP32 = "fp32"
EVALUATION_BATCH = 50


def resolve_device(name: str) -> torch.device:
    """Return the torch device of `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: `cuda` was requested and torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("torch sees no NVIDIA GPU; use --device cpu, or check the driver with nvidia-smi")
    return torch.device(("cuda" if available else "cpu") if name == "auto" else name)


class Run:
    """One run: its configuration, its model, its directory, and what several stages read.

    Attributes:
        requested_config: the given configuration; `config` is the one in use, reduced for a large model on a CPU.

    Args:
        config: the given configuration.
        out: the run directory.
        command: the command line, for the report.
        shapes_only: see `load_model`; for a run that is only planned.

    Raises:
        ClusterQError: the model cannot be loaded, or the directory cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        progress: Progress = SILENT,
        command: list[str] | None = None,
        shapes_only: bool = False,
    ) -> None:
        self.config, self.progress, self.command = config, progress, command or []
        self.device = resolve_device(config.device)
        self.model: LoadedModel = load_model(
            config.model,
            **config.model_dump(include={"weights", "input_size", "mean", "std"}),
            device=self.device,
            bars=progress is not SILENT,
            shapes_only=shapes_only,
        )
        self.requested_config = config
        self._teacher_predictions: Predictions | None = None
        if self.device.type == "cpu":
            self.config = config.scaled_to(self.pass_cost)
        identity = {"name": self.model.slug, "weights_sha256": self.model.weights_sha256}
        self.directory = RunDirectory(out, identity, self.command, _is_outdated)
        if outdated := " and ".join(self.directory.outdated):
            reason = "is of an earlier version, whose graphs saturate on CPUs without VNNI"
            logger.warning("%s in %s %s: it counts as not done, like the stages that read it", outdated, out, reason)
        spec = self.model.input.model_dump(mode="json")
        self._identity = {**identity, "code_sha256": self.model.code_sha256, "input": spec, "version": __version__}

    @cached_property
    def pass_cost(self) -> float:
        """The cost of a forward pass of one image (`calib.support.flops.pass_cost`)."""
        return pass_cost(self.model.original, self.model.input.size)

    def check(self) -> None:
        """Check the model, the data and what engines require before any work.

        Raises:
            TensorRTMissing, ConfigError: see `check_rtx`.
            GraphError: BatchNorm cannot be folded, or the model has no layer of a name in `keep`.
            DataError: the evaluation data does not fit.
        """
        if self.config.build.rtx:
            self.check_rtx()
        folded = folded_teacher(self.model.module)
        for bits in self.config.widths:
            place(folded, bits, quantize_first_last=self.config.first_last, layer_bits=self.config.keep)
        if self.has_own_data:
            _ = self.evaluation

    def check_rtx(self) -> None:
        """Check that engines of TensorRT-RTX can be built here.

        Raises:
            TensorRTMissing: it is not installed.
            ConfigError: they are for Turing, and the graphs are not in FP16.
        """
        require(build_problem("tensorrt_rtx"))
        if TURING in self.config.build.rtx and not self.config.fp16:
            raise ConfigError(
                f"--rtx {TURING} (Turing) multiplies no float32 matrices: export the graphs with --fp16, or leave it "
                "out"
            )

    def write_config(self) -> None:
        """Write the configuration to the run directory, after `check`."""
        self.check()
        self.directory.write_config(self.requested_config.to_toml())

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The calibration set of this run."""
        return CalibrationSet.load(self.directory.path / IMAGES)

    @cached_property
    def evaluation(self) -> EvaluationSet:
        """The images that accuracy is measured on; only `evaluate`, `features` and `report` read them."""
        if self.has_own_data:
            return load_evaluation(self.config.data, self.model, self.config.limit)
        self._require("synthesize")
        _, held_out = self.calibration.split(self.config.finetune.held_out)
        return EvaluationSet.from_images("held-out synthetic images", held_out.images.numpy())

    @property
    def has_own_data(self) -> bool:
        """Whether there are real images to measure on, the user's or the bundled model's."""
        return self.config.data is not None or self.model.source == "bundled"

    @property
    def evaluated(self) -> int:
        """The number of images that accuracy is measured on: real ones, or the held-out synthetic ones."""
        if self.has_own_data:
            return len(self.evaluation)
        return max(1, round(self.config.synthesis.images * self.config.finetune.held_out))

    @cached_property
    def data_inputs(self) -> dict[str, str | int | None]:
        """What identifies the evaluation images, with the content of their file."""
        path, name = self.config.data, self.evaluation.name  # read first, for its error messages
        labels = {"labels": sha256} if (sha256 := self.evaluation.label_digest) else {}
        return {"data": fingerprint(path) if path else name, "limit": self.config.limit, **labels}

    @cached_property
    def environment(self) -> Environment:
        """The machine and the versions of the measurements."""
        return collect_environment(self.device)

    def teacher_predictions(self, checkpoint: Checkpoint = NOWHERE) -> Predictions:
        """Return the FP32 model's `predictions`, computed once for all stages, and save them in `checkpoint`."""
        if (computed := self._teacher_predictions) is not None:
            checkpoint.save("teacher", lambda: predictions_state(computed, self.evaluation), at_once=True)
            return computed
        with TorchRunner(self.model.original) as runner:
            self._teacher_predictions = self.predictions(runner, checkpoint, "teacher")
        return self._teacher_predictions

    def predictions(self, runner: Runner, checkpoint: Checkpoint = NOWHERE, phase: str = "predictions") -> Predictions:
        """Return a runner's predictions on the evaluation images, (N, 5) int64; see `accuracy.predictions`."""
        return predictions(runner, self.evaluation, EVALUATION_BATCH, self.progress, checkpoint, phase)

    def student(self, bits: BitWidths) -> Student:
        """Return the student that the quantize stage wrote."""
        return load_student(self.directory.path / student_file(bits), self.model.module)[0].to(self.device)

    def do(self, stage: Stage[_R]) -> Finished[_R]:
        """Do a stage unless it is finished with the same inputs, model, seed and kind of device; return its result.

        Raises:
            RunDirectoryError: a stage that it needs is not finished.
        """
        needs = stage.kind.needs(self, stage)
        for name in needs.required:
            self._require(name)
        logger.info("stage %s", stage.name)

        def work() -> tuple[Json, list[str]]:
            result, files = stage.kind.work(self, stage)
            return result.model_dump(mode="json"), files

        # TF32 has ten bits of a float's mantissa: torch would not compute what the exported graphs compute
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self._finished(
                stage, self.directory.perform(stage.name, self._inputs(stage), work, self._upstream(needs))
            )

    def is_finished(self, stage: AnyStage) -> bool:
        """Return whether `do` would do nothing; the stages that it requires have to be finished."""
        upstream = self._upstream(stage.kind.needs(self, stage))
        return self.directory.look_up(stage.name, self._inputs(stage), upstream) is not None

    def finished(self, stage: Stage[_R]) -> Finished[_R] | None:
        """Return the result of a stage that is finished with any inputs, or None; raise as `require_finished` does."""
        record = self.directory.finished(stage.name)
        return None if record is None else self._finished(stage, record)

    def require_finished(self, stage: Stage[_R]) -> Finished[_R]:
        """Return the result of a stage that another one reads.

        Raises:
            RunDirectoryError: it is not finished, its files have changed, or its result in the manifest is invalid.
        """
        return self._finished(stage, self._require(stage.name))

    def _finished(self, stage: Stage[_R], record: StageRecord) -> Finished[_R]:
        try:
            result = stage.kind.RESULT.model_validate(record.result)
        except ValidationError as error:
            raise broken_manifest(self.directory.path, error, "stages", stage.name, "result") from error
        return Finished(result, record.files, record.seconds)

    def _require(self, stage: str) -> StageRecord:
        record = self.directory.finished(stage)
        if record is None:
            verb, _, variant = stage.partition("/")
            option = f" --bits {variant}" if variant and variant != FP32 else ""
            raise RunDirectoryError(
                f"{self.directory.path} has no finished {stage} stage; run clusterq {verb}{option} first"
            )
        return record

    def _upstream(self, needs: Needs) -> list[str]:
        """Return the stages that a stage reads: the required ones, and the finished optional ones."""
        return [*needs.required, *(name for name in needs.optional if self.directory.finished(name))]

    def _inputs(self, stage: AnyStage) -> Json:
        """Return a stage's inputs, and those of every stage."""
        common = {"model": self._identity, "seed": self.config.seed, "device": self.device.type}
        return {**stage.kind.inputs(self, stage), **common}

    def checkpoint(self, stage: AnyStage, divisor: int = 1, **more: Any) -> FileCheckpoint:
        """Return the checkpoint of a stage in batches divided by `divisor`; `more` are further inputs, JSON values."""
        libraries = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
        inputs = {**self._inputs(stage), **libraries, "bfloat16": has_fast_bfloat16(self.device), **more}
        return self.directory.checkpoint(
            stage.name, f"batches-by-{divisor}", inputs, self._upstream(stage.kind.needs(self, stage))
        )

    def rng(self, stage: str) -> torch.Generator:
        """Return a stage's own generator, so that its draws do not depend on other stages."""
        return torch.Generator(self.device).manual_seed(int(digest([self.config.seed, stage])[:15], 16))

    def provenance(self, variant: str, **more: Any) -> Json:
        """Return the origin of a variant's file, for its metadata, and `more`."""
        common = {"variant": variant, "seed": self.config.seed, "torch": torch.__version__}
        return {**common, **self._identity, **more}


def _is_outdated(stage: str, record: StageRecord) -> bool:
    """Return whether a stage made a student of another format."""
    return stage.startswith("quantize/") and record.result.get("format") != FORMAT


def student_file(bits: BitWidths) -> str:
    """Return the path of a variant's student in a run directory."""
    return f"{bits}/quantized.safetensors"
