"""Data-free synthesis of labelled images from a pretrained classifier's BatchNorm statistics.

The method is ClusterQ (arXiv 2205.00179). The package is independent of quantization.
"""

from calib.calibration_set import CalibrationSet
from calib.refine import RefineConfig
from calib.support.errors import ClusterQError, NoBatchNormError, SynthesisError
from calib.support.progress import SILENT, Progress
from calib.synthesis import Synthesis, SynthesisConfig, synthesize
from calib.training import GeneratorConfig

__all__ = [
    "SILENT",
    "CalibrationSet",
    "ClusterQError",
    "GeneratorConfig",
    "NoBatchNormError",
    "Progress",
    "RefineConfig",
    "Synthesis",
    "SynthesisConfig",
    "SynthesisError",
    "synthesize",
]
