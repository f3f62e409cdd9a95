"""Errors that the library raises on purpose.

    ClusterQError
    ├── ConfigError            an option or a configuration file is wrong
    ├── ModelError             the model cannot be loaded
    │   ├── UnknownModelError  no model has that name
    │   └── WeightsError       the weights cannot be read, or do not fit the model
    ├── NoBatchNormError       the model has no BatchNorm to align to
    ├── GraphError             the model cannot be captured or quantized
    ├── FeatureError           the model's penultimate features cannot be computed
    ├── DataError              the evaluation data cannot be used
    │   └── UnreadableImageError  one image of it cannot be read: it is left out
    ├── RunDirectoryError      the run directory cannot be used or written
    ├── ReportError            a report.json cannot be read
    ├── SynthesisError         synthesis made no usable calibration set
    ├── TuningError            fine-tuning diverges
    ├── OutOfMemoryError       there is not enough memory for the smallest batches
    ├── ExportError            a graph could not be written
    │   └── VerificationError  a graph does not compute what the torch model computes
    └── EngineError            a TensorRT engine cannot be built, loaded or run
        ├── GraphRefused       the parser refuses nodes of a graph
        └── TensorRTMissing    there is no TensorRT or no NVIDIA GPU

Each message is one line for a person: what was received, what was expected, what to do.
"""

from typing import TYPE_CHECKING

from calib.support.errors import ClusterQError, NoBatchNormError, SynthesisError

if TYPE_CHECKING:
    from clusterq_deploy.results.engines import Refusal

__all__ = [
    "ClusterQError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "FeatureError",
    "GraphError",
    "GraphRefused",
    "ModelError",
    "NoBatchNormError",
    "OutOfMemoryError",
    "ReportError",
    "RunDirectoryError",
    "SynthesisError",
    "TensorRTMissing",
    "TuningError",
    "UnknownModelError",
    "UnreadableImageError",
    "VerificationError",
    "WeightsError",
]


class ConfigError(ClusterQError, ValueError):
    """An option or a configuration file is wrong."""


class ModelError(ClusterQError):
    """The model cannot be loaded."""


class UnknownModelError(ModelError, LookupError):
    """No model has that name."""


class WeightsError(ModelError, ValueError):
    """The weights cannot be read, or do not fit the model."""


class GraphError(ClusterQError, ValueError):
    """The model cannot be captured as a graph, or quantized."""


class TuningError(ClusterQError):
    """Fine-tuning diverges: its loss or gradient stays without a finite value."""


class OutOfMemoryError(ClusterQError):
    """There is not enough memory for the smallest batches."""


class FeatureError(ClusterQError, ValueError):
    """The model's penultimate features cannot be computed."""


class DataError(ClusterQError, ValueError):
    """The evaluation data cannot be used."""


class UnreadableImageError(DataError):
    """One image of the evaluation data, `file`, cannot be read: it is left out and counted, up to a limit."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"cannot read {file!r} as an image ({reason}); replace it or leave it out")
        self.file, self.reason = file, reason


class RunDirectoryError(ClusterQError, OSError):
    """The run directory cannot be used or written."""


class ReportError(ClusterQError, ValueError):
    """A report.json cannot be read, or is not a report of a supported schema."""


class ExportError(ClusterQError, RuntimeError):
    """A graph could not be written."""


class VerificationError(ExportError):
    """A graph does not compute what the torch model computes."""


class EngineError(ClusterQError, RuntimeError):
    """A TensorRT engine cannot be built, loaded or run."""


class GraphRefused(EngineError):  # noqa: N818
    """The parser of TensorRT refuses nodes of a graph: `refusals` has each."""

    def __init__(self, message: str, refusals: "list[Refusal]") -> None:
        super().__init__(message)
        self.refusals = refusals


class TensorRTMissing(EngineError):  # noqa: N818
    """There is no TensorRT or no NVIDIA GPU."""
