"""How an engine is built."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from calib.support.config import StageConfig

_UNITS = {"": 2**20, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def memory_size(value: object) -> object:
    """Bytes of a size in words, `4GiB`, `512MiB` or `512`, which is in MiB; a number is one of bytes.

    Raises:
        ValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([1-9]\d*)\s*([KMG]iB)?", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is no size such as 4GiB, 512MiB or 512, in MiB")
    return int(match[1]) * _UNITS[(match[2] or "").lower()]


class BuildConfig(StageConfig):
    """Settings of the build stage.

    Raises:
        pydantic.ValidationError: a value is out of range, or the batch sizes are not in ascending order.
    """

    batch: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 8, 32)
    """Smallest, tuned-for and largest batch size of a graph with a dynamic batch dimension."""

    workspace_bytes: Annotated[int, Field(ge=2**10, strict=True), BeforeValidator(memory_size)] = 4 * 2**30
    """Most scratch memory on the GPU that a layer may use: a number of bytes, 1,024 at least, or a size in words."""

    optimization_level: int = Field(default=3, ge=0, le=5)
    """How long the builder searches: 0 takes the first implementation that works, 5 compares the most."""

    timing_cache: Literal["none"] | Path | None = None
    """File that keeps the builder's measurements from one build to the next; made where it does not exist.

    None is a file for each GPU and release of TensorRT in the user's cache directory, `none` is no file. Level 0
    measures nothing and uses none.
    """

    version_compatible: bool = False
    """Let later TensorRT releases run the engine, at some cost in speed."""

    hardware_compatible: bool = False
    """Let every GPU of compute capability 8.0 (Ampere) or later run the engine, at some cost in speed."""

    @model_validator(mode="after")
    def _batch_ascends(self) -> Self:
        if list(self.batch) != sorted(self.batch):
            raise ValueError(f"batch is {self.batch}; expected (min, opt, max) with min <= opt <= max")
        return self
