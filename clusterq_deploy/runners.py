"""One way to run a model, whatever executes it: images in, logits out."""

from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Runner(Protocol):
    """Executes one model. Runners are context managers; leaving the context frees what they hold."""

    runtime: str
    """The runtime's name in the report: torch, onnxruntime-cpu, onnxruntime-cuda or tensorrt."""

    def infer(self, images: Array) -> Array:
        """Logits (N, classes) float32 of images (N, C, H, W) float32, normalized."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
