"""The settings of a build, and an engine's sidecar `model.engine.json`: where, from what and how it was built."""

import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from calib.support.config import StageConfig
from clusterq_deploy.environment import driver_version
from clusterq_deploy.errors import EngineError
from clusterq_deploy.results.engines import EnginePlan
from clusterq_deploy.runtimes.tensorrt.library import TITLES, Library, RtxTarget, trt

logger = logging.getLogger(__name__)

_UNITS = {"": 2**20, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def memory_size(value: object) -> object:
    """Return the bytes of a text such as `4GiB`, `512MiB` or `512`, which is in MiB; a number is unchanged.

    Raises:
        ValueError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([1-9]\d*)\s*([KMG]iB)?", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size such as 4GiB, 512MiB or 512, in MiB")
    return int(match[1]) * _UNITS[(match[2] or "").lower()]


class BuildConfig(StageConfig):
    """Settings of the build stage.

    Raises:
        pydantic.ValidationError: a value is out of range, or the batch sizes are not in ascending order.
    """

    batch: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 8, 32)
    """Smallest, optimal and largest batch size of a graph with a dynamic batch dimension."""

    workspace_bytes: Annotated[int, Field(ge=2**10, strict=True), BeforeValidator(memory_size)] = 4 * 2**30
    """The largest scratch memory of a layer on the GPU: a number of bytes, at least 1,024, or a `memory_size`."""

    optimization_level: int = Field(default=3, ge=0, le=5)
    """How long the builder searches: 0 uses the first implementation that works, 5 compares the most of them."""

    timing_cache: Literal["none"] | Path | None = None
    """File of the builder's measurements for later builds; created if it does not exist.

    None is one file per GPU and release of TensorRT in the user's cache directory, `none` is no file. Level 0 has none.
    """

    version_compatible: bool = False
    """Let later TensorRT releases run the engine, at some cost in speed."""

    hardware_compatible: bool = False
    """Let every GPU of compute capability 8.0 (Ampere) or later run the engine, at some cost in speed."""

    same_capability: bool = False
    """Let every GPU of the same compute capability run the engine, at some cost in speed; TensorRT 10.9 has it."""

    build_route: str | None = None
    """Settings of TensorRT's compiler, `-name=value ...`, as TensorRT 11.4 and later accept them; for experts."""

    rtx: tuple[RtxTarget, ...] = ()
    """Families of GPUs that TensorRT-RTX builds for, ahead of time; empty for TensorRT's engines, for the GPU here."""

    @property
    def library(self) -> Library:
        """The library that builds the engine."""
        return "tensorrt_rtx" if self.rtx else "tensorrt"

    @property
    def is_portable(self) -> bool:
        """Whether an engine runs on other GPUs than the one that it was built on."""
        return self.hardware_compatible or self.same_capability or bool(self.rtx)

    def recorded(self, *without: str) -> dict[str, Any]:
        """Return the settings that a run's results depend on, as JSON; those that older versions lack only if set."""
        later = {name for name in ("same_capability", "build_route") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude={*without, *later})

    def for_rtx(self) -> "BuildConfig":
        """Return the settings without those that TensorRT-RTX does not have."""
        return BuildConfig(**self.model_dump(include={"batch", "workspace_bytes", "rtx"}))

    @field_validator("rtx")
    @classmethod
    def _each_once(cls, rtx: tuple[RtxTarget, ...]) -> tuple[RtxTarget, ...]:
        return tuple(dict.fromkeys(rtx))

    @model_validator(mode="after")
    def _batch_ascends(self) -> Self:
        if list(self.batch) != sorted(self.batch):
            raise ValueError(f"batch is {self.batch}; expected (min, opt, max) with min <= opt <= max")
        return self

    @model_validator(mode="after")
    def _one_compatibility(self) -> Self:
        if self.hardware_compatible and self.same_capability:
            raise ValueError("hardware_compatible and same_capability exclude each other: the first is for more GPUs")
        return self


class Machine(BaseModel):
    """The machine that an engine is for. `cuda` is torch's release of it; `driver` is None if unknown.

    An engine of TensorRT-RTX has only the release of that in `tensorrt`: it is not for the machine that built it.
    """

    model_config = ConfigDict(frozen=True)

    gpu: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    tensorrt: str

    @property
    def is_ampere_or_later(self) -> bool:
        """Whether hardware-compatible engines run here."""
        return _numbers(self.compute_capability or "") >= (8, 0)

    def binding(self, config: BuildConfig) -> dict[str, str]:
        """Return what an engine built with `config` requires of a machine, by field name."""
        fields = set() if config.hardware_compatible or config.rtx else {"compute_capability"}
        fields |= set() if config.is_portable else {"gpu"}
        return self.model_dump(include=fields | ({"tensorrt"} if not config.version_compatible else set()))


class EngineInfo(BaseModel):
    """Content of the sidecar. `source` is the ONNX file, or if `derived` the one that its graph was made from.

    `plan` has the kernels of an engine of TensorRT-RTX.
    """

    model_config = ConfigDict(frozen=True)

    built_on: Machine
    source: str
    source_sha256: str
    derived: bool = False
    engine_sha256: str
    size_bytes: int
    options: BuildConfig
    plan: EnginePlan | None = None
    seconds: float
    created: datetime


def this_machine() -> Machine:
    """Describe the current CUDA device and what drives it."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(
        gpu=gpu.name,
        compute_capability=f"{gpu.major}.{gpu.minor}",
        driver=driver_version(),
        cuda=torch.version.cuda,
        tensorrt=trt.__version__,
    )


def built_machine(config: BuildConfig) -> Machine:
    """Describe the machine that an engine built here is for, with the library in use."""
    return Machine(tensorrt=trt.__version__) if config.rtx else this_machine()


def sidecar_path(engine_path: Path) -> Path:
    """Return `model.engine.json` for `model.engine`."""
    return engine_path.with_name(f"{engine_path.name}.json")


def read_sidecar(engine_path: Path) -> EngineInfo:
    """Read the sidecar of the engine at `engine_path`.

    Raises:
        EngineError: the sidecar is missing, or is invalid for this version of the library.
    """
    path = sidecar_path(engine_path)
    try:
        return EngineInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(
            f"cannot read {path}: {error.strerror}; an engine needs its sidecar next to it: build it again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise EngineError(f"{path} is not a sidecar: {place}: {first['msg']}; build the engine again") from error


def check_machine(engine_path: Path, info: EngineInfo, here: Machine) -> None:
    """Raise an EngineError if an engine cannot run on `here`; log a warning about another driver or CUDA."""
    built, options = info.built_on, info.options
    target = f"sm{(here.compute_capability or '').replace('.', '')}"
    ahead = target in options.rtx
    ampere = options.hardware_compatible and here.is_ampere_or_later
    capability = ", ".join(options.rtx) or built.compute_capability
    later = options.version_compatible and _is_supported_later(built.tensorrt, here.tensorrt)
    differences = [
        f"{what} is {running}, the engine is built for {expected}"
        for what, expected, running, compatible in (
            ("GPU", built.gpu, here.gpu, options.is_portable),
            ("compute capability", capability, here.compute_capability, ampere or ahead),
            (TITLES[options.library], built.tensorrt, here.tensorrt, later),
        )
        if running != expected and not compatible
    ]
    if differences:
        raise EngineError(f"{engine_path} cannot run here: {'; '.join(differences)}; build it again here")
    for what, expected, running in (("driver", built.driver, here.driver), ("CUDA", built.cuda, here.cuda)):
        if running != expected and not options.rtx:
            logger.warning("%s was built with %s %s, here it is %s", engine_path, what, expected, running)


def _is_supported_later(built: str, running: str) -> bool:
    """Return whether NVIDIA supports an engine of one release in another: a later one, up to the next major one."""
    return _numbers(running) >= _numbers(built) and _numbers(running)[0] <= _numbers(built)[0] + 1


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
