"""What the stages of a run share."""

import logging
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import fx

from calib.calibration_set import CalibrationSet
from calib.support.amp import has_fast_bfloat16
from calib.support.checkpoint import NOWHERE, Checkpoint
from calib.support.flops import pass_cost
from calib.support.progress import SILENT, Progress
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.environment import collect_environment
from clusterq_deploy.errors import ConfigError, RunDirectoryError
from clusterq_deploy.evaluation.data import EvaluationSet, load_evaluation
from clusterq_deploy.evaluation.measure import Predictions, predictions, reached
from clusterq_deploy.files import fingerprint
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.quantization import BitWidths, Student, load_student
from clusterq_deploy.quantization.graph.placement import place
from clusterq_deploy.quantization.graph.trace import folded_teacher
from clusterq_deploy.quantization.student import FORMAT
from clusterq_deploy.run.checkpoint import FileCheckpoint
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.run.manifest import Result, StageRecord, digest
from clusterq_deploy.run.stage import Needs, Stage
from clusterq_deploy.runtimes.runners import Runner, TorchRunner
from clusterq_deploy.version import __version__

logger = logging.getLogger(__name__)

IMAGES, PREVIEW = "calibration/images.safetensors", "calibration/preview.png"
FP32 = "fp32"
EVALUATION_BATCH = 50


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


class Run:
    """One run: its configuration, its model, its directory, and what several stages read.

    Attributes:
        asked: the configuration as it was given; `config` is what is done, less for a large model on a CPU.

    Args:
        config: what to do.
        out: the run directory.
        progress: shows how far things are.
        command: the command line, for the report.
        shapes_only: as for `load_model`, of a run that is planned and not done.

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
            weights=config.weights,
            input_size=config.input_size,
            mean=config.mean,
            std=config.std,
            device=self.device,
            bars=progress is not SILENT,
            shapes_only=shapes_only,
        )
        self.asked = config
        self._taught: Predictions | None = None
        if self.device.type == "cpu":
            self.config = config.scaled_to(self.pass_cost)
        identity = {"name": self.model.slug, "weights_sha256": self.model.weights_sha256}
        self.directory = RunDirectory(out, identity, self.command, _is_outdated)
        if outdated := self.directory.outdated:
            logger.warning(
                "%s in %s was made by an earlier version, whose graphs saturate on CPUs without VNNI: it counts as not "
                "done, and so does what was made from it",
                " and ".join(outdated),
                out,
            )
        self._identity = {
            **identity,
            "code_sha256": self.model.code_sha256,
            "input": self.model.input.model_dump(mode="json"),
            "version": __version__,
        }

    @cached_property
    def pass_cost(self) -> float:
        """What a forward pass of one image costs (`calib.support.flops.pass_cost`)."""
        return pass_cost(self.model.module, self.model.input.size)

    def check(self) -> fx.GraphModule:
        """Find what can be found wrong with model or data before any work; gives the folded model.

        Raises:
            GraphError: the model cannot be traced, or has no layer of a name that is to keep other bits.
            DataError: the evaluation data does not fit.
        """
        traced = folded_teacher(self.model.module)
        for bits in self.config.widths:
            place(traced, bits, quantize_first_last=self.config.first_last, layer_bits=self.config.keep)
        if self.has_own_data:
            _ = self.evaluation
        return traced

    def begin(self) -> None:
        """Make the run directory this run's, if `check` finds nothing wrong."""
        self.check()
        self.directory.begin(self.asked.to_toml())

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The calibration set of this run."""
        return CalibrationSet.load(self.directory.path / IMAGES)

    @cached_property
    def evaluation(self) -> EvaluationSet:
        """The images that accuracy is measured on; nothing but `evaluate`, `features` and `report` reads them."""
        if self.has_own_data:
            return load_evaluation(self.config.data, self.model, self.config.limit)
        self.finished("synthesize")
        _, held_out = self.calibration.split(self.config.finetune.held_out)
        return EvaluationSet.from_images("held-out synthetic images", held_out.images.numpy())

    @property
    def has_own_data(self) -> bool:
        """Whether there are real images to measure on, the user's or the bundled model's."""
        return self.config.data is not None or self.model.source == "bundled"

    @property
    def evaluated(self) -> int:
        """Images that accuracy is measured on: real ones, or those of the synthetic ones that are held out."""
        if self.has_own_data:
            return len(self.evaluation)
        return max(1, round(self.config.synthesis.images * self.config.finetune.held_out))

    @cached_property
    def data_inputs(self) -> Result:
        """Tells one choice of evaluation images from another; a changed file counts as another one."""
        path, name = self.config.data, self.evaluation.name  # read first, for it says what is wrong with the data
        return {"data": fingerprint(path) if path else name, "limit": self.config.limit}

    @cached_property
    def environment(self) -> Result:
        """What machine and what versions measure, as JSON values."""
        return collect_environment(self.device).model_dump(mode="json")

    def teacher_predictions(self, checkpoint: Checkpoint = NOWHERE) -> Predictions:
        """What the FP32 model answers on the evaluation images, (N, 5) int64; computed once, for all stages.

        Args:
            checkpoint: the asking stage's; it has the answers afterwards.
        """
        if (known := self._taught) is not None:
            checkpoint.save("teacher", lambda: reached(known, self.evaluation), at_once=True)
            return known
        with TorchRunner(self.model.module) as runner:
            self._taught = self.predictions(runner, checkpoint, "teacher")
        return self._taught

    def predictions(self, runner: Runner, checkpoint: Checkpoint = NOWHERE, phase: str = "predictions") -> Predictions:
        """What a runner answers on the evaluation images, (N, 5) int64.

        Args:
            runner: executes the model.
            checkpoint, phase: as for `measure.predictions`.
        """
        return predictions(runner, self.evaluation, EVALUATION_BATCH, self.progress, checkpoint, phase)

    def student(self, bits: BitWidths) -> Student:
        """A variant as the quantize stage left it."""
        return load_student(self.directory.path / student_file(bits), self.model.module)[0].to(self.device)

    def do(self, stage: Stage) -> StageRecord:
        """Do a stage unless it is finished with the same inputs, model, seed and kind of device; return its record.

        Raises:
            RunDirectoryError: a stage that it needs is not finished.
        """
        needs = stage.needs(self)
        for name in needs.required:
            self.finished(name)
        logger.info("stage %s", stage.name)
        # TF32 keeps ten bits of a float: torch's student would not be the one that is exported
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.directory.perform(
                stage.name,
                self.own_inputs(stage.inputs(self)),
                partial(stage.kind.work, self, stage.variant),
                self.upstream(needs),
            )

    def is_finished(self, stage: Stage) -> bool:
        """Return whether `do` would do nothing; what the stage requires has to be finished."""
        inputs = self.own_inputs(stage.inputs(self))
        return self.directory.look_up(stage.name, inputs, self.upstream(stage.needs(self))) is not None

    def upstream(self, needs: Needs) -> list[str]:
        """Return the stages that a stage reads: those that it requires, and the optional ones that are finished."""
        return [*needs.required, *(name for name in needs.optional if self.directory.finished(name))]

    def checkpoint(self, stage: str, inputs: Result, divisor: int, upstream: Iterable[str] = ()) -> FileCheckpoint:
        """Where the work of a stage keeps what it has reached.

        Args:
            stage: its name.
            inputs, upstream: what the work depends on, and the stages that it reads.
            divisor: of its batches.
        """
        libraries = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
        own = {**self.own_inputs(inputs), **libraries, "bfloat16": has_fast_bfloat16(self.device)}
        return self.directory.checkpoint(stage, f"batches-by-{divisor}", own, upstream)

    def own_inputs(self, inputs: Result) -> Result:
        """A stage's inputs with what every stage depends on."""
        return {**inputs, "model": self._identity, "seed": self.config.seed, "device": self.device.type}

    def finished(self, stage: str) -> StageRecord:
        """Return the record of a stage that another one builds on.

        Raises:
            RunDirectoryError: it is not finished, or its files have changed.
        """
        record = self.directory.finished(stage)
        if record is None:
            verb, _, variant = stage.partition("/")
            wanted = f" --bits {variant}" if variant and variant != FP32 else ""
            raise RunDirectoryError(
                f"{self.directory.path} has no finished {stage} stage; run clusterq {verb}{wanted} first"
            )
        return record

    def rng(self, stage: str) -> torch.Generator:
        """A generator of its own for each stage, so that one more draw in a stage moves no other."""
        seed = int(digest([self.config.seed, stage])[:15], 16)
        return torch.Generator(self.device).manual_seed(seed)

    def provenance(self, variant: str, **more: Any) -> Result:
        """What a file of a variant is to say of where it came from, and `more`."""
        return {
            "variant": variant,
            "seed": self.config.seed,
            "torch": torch.__version__,
            **self._identity,
            **more,
        }


def _is_outdated(stage: str, record: StageRecord) -> bool:
    """Whether a stage made a student of another form."""
    return stage.startswith("quantize/") and record.result.get("format") != FORMAT


def student_file(bits: BitWidths) -> str:
    """The path of a variant's student in a run directory."""
    return f"{bits}/quantized.safetensors"
