"""The sidecar of an engine, `model.engine.json`: where, from what and how it was built."""

import logging
import re
from datetime import datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from clusterq_deploy.environment import driver_version
from clusterq_deploy.errors import EngineError
from clusterq_deploy.runtimes.tensorrt.config import BuildConfig

logger = logging.getLogger(__name__)

AMPERE = (8, 0)


class Machine(BaseModel):
    """What an engine is bound to. `cuda` is what torch is built for; `driver` is None if unknown."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    compute_capability: str
    driver: str | None
    cuda: str | None
    tensorrt: str

    def binding(self, config: BuildConfig) -> dict[str, str]:
        """What an engine that is built so cannot do without, by the name of the field."""
        wanted = {"gpu", "compute_capability"} if not config.hardware_compatible else set()
        return self.model_dump(include=wanted | ({"tensorrt"} if not config.version_compatible else set()))


class EngineInfo(BaseModel):
    """Content of the sidecar. Digests are SHA-256.

    `source` is the file name of the ONNX graph; where `derived` says so, of the one that the engine's was made of.
    """

    model_config = ConfigDict(frozen=True)

    built_on: Machine
    source: str
    source_sha256: str
    derived: bool = False
    engine_sha256: str
    size_bytes: int
    options: BuildConfig
    seconds: float
    created: datetime


def this_machine() -> Machine:
    """Describe the current CUDA device and what drives it."""
    import tensorrt as trt

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(
        gpu=gpu.name,
        compute_capability=f"{gpu.major}.{gpu.minor}",
        driver=driver_version(),
        cuda=torch.version.cuda,
        tensorrt=trt.__version__,
    )


def require_compatible(machine: Machine, config: BuildConfig) -> None:
    """Return if a machine can build what is asked for.

    Raises:
        EngineError: an engine for other GPUs is asked of one that is older than they.
    """
    if config.hardware_compatible and _numbers(machine.compute_capability) < AMPERE:
        raise EngineError(
            f"{machine.gpu} has compute capability {machine.compute_capability}; --hardware-compatible engines are for "
            "8.0 (Ampere) and later, and built there: leave it away"
        )


def sidecar_path(engine_path: Path) -> Path:
    """`model.engine.json` for `model.engine`."""
    return engine_path.with_name(f"{engine_path.name}.json")


def read_sidecar(engine_path: Path) -> EngineInfo:
    """Read the sidecar of the engine at `engine_path`.

    Raises:
        EngineError: the sidecar is missing, or is not one that this version of the library can read.
    """
    path = sidecar_path(engine_path)
    try:
        return EngineInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(
            f"cannot read {path}: {error.strerror}; an engine needs its sidecar beside it: build it again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise EngineError(f"{path} is no sidecar: {where}: {first['msg']}; build the engine again") from error


def check_machine(engine_path: Path, info: EngineInfo, here: Machine) -> None:
    """Return if the engine that `info` describes can run on `here`. Another driver or CUDA is a warning.

    Raises:
        EngineError: it cannot; the message names everything that differs.
    """
    built = info.built_on
    differences = [
        f"{what} is {value_here}, the engine is built for {value_built}"
        for what, value_built, value_here, fits in (
            ("GPU", built.gpu, here.gpu, info.options.hardware_compatible or built.gpu == here.gpu),
            (
                "compute capability",
                built.compute_capability,
                here.compute_capability,
                _same_architecture(info, here),
            ),
            ("TensorRT", built.tensorrt, here.tensorrt, _version_fits(info, here)),
        )
        if not fits
    ]
    if differences:
        raise EngineError(f"{engine_path} cannot run here: {'; '.join(differences)}; build it again here")
    for what, value_built, value_here in (("driver", built.driver, here.driver), ("CUDA", built.cuda, here.cuda)):
        if value_built != value_here:
            logger.warning("%s was built with %s %s, here it is %s", engine_path, what, value_built, value_here)


def _same_architecture(info: EngineInfo, here: Machine) -> bool:
    if info.options.hardware_compatible:
        return _numbers(here.compute_capability) >= AMPERE
    return info.built_on.compute_capability == here.compute_capability


def _version_fits(info: EngineInfo, here: Machine) -> bool:
    if not info.options.version_compatible:
        return info.built_on.tensorrt == here.tensorrt
    built, running = _numbers(info.built_on.tensorrt), _numbers(here.tensorrt)
    # NVIDIA supports later releases of the same major version, and of the next one.
    return running >= built and running[0] <= built[0] + 1


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
