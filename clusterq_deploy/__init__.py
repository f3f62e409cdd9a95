"""Data-free INT8 and INT4 deployment of BatchNorm CNNs.

`synthesize`, `quantize` and `export` are three calls for any module. `Pipeline` does a resumable run with a report:

    from pathlib import Path
    from clusterq_deploy import Pipeline, RunConfig

    report = Pipeline(RunConfig(model="digits"), Path("runs/digits")).run()
"""

from calib.calibration_set import CalibrationSet
from calib.synthesis import SynthesisConfig
from clusterq_deploy.api import export, quantize, synthesize
from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.models import InputSpec, LoadedModel, load_model
from clusterq_deploy.pipeline import Pipeline
from clusterq_deploy.quantization import BitWidths, FinetuneConfig, Student, make_student
from clusterq_deploy.report import Report, read_report
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner
from clusterq_deploy.version import __version__

__all__ = [
    "BitWidths",
    "CalibrationSet",
    "ClusterQError",
    "FinetuneConfig",
    "InputSpec",
    "LoadedModel",
    "OnnxRunner",
    "Pipeline",
    "Report",
    "RunConfig",
    "Student",
    "SynthesisConfig",
    "TorchRunner",
    "__version__",
    "export",
    "load_model",
    "make_student",
    "quantize",
    "read_report",
    "synthesize",
]
