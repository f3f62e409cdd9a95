"""Data-free INT8 and INT4 deployment of BatchNorm CNNs.

from pathlib import Path
from clusterq_deploy import Pipeline, RunConfig

report = Pipeline(RunConfig(model="digits"), Path("runs/digits")).run()
"""

from clusterq_deploy.config.run_config import RunConfig
from clusterq_deploy.errors import ClusterQError
from clusterq_deploy.models import LoadedModel, load_model
from clusterq_deploy.pipeline import Pipeline
from clusterq_deploy.quantize import BitWidths, Student, make_student
from clusterq_deploy.report import Report, read_report
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner
from clusterq_deploy.version import __version__

__all__ = [
    "BitWidths",
    "ClusterQError",
    "LoadedModel",
    "OnnxRunner",
    "Pipeline",
    "Report",
    "RunConfig",
    "Student",
    "TorchRunner",
    "__version__",
    "load_model",
    "make_student",
    "read_report",
]
