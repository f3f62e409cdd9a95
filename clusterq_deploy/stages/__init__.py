"""The stages of a run, each a function of a `Run` that gives the record of what it did."""

from clusterq_deploy.stages.deployment import build_engine, compare_graphs, write_graphs
from clusterq_deploy.stages.measuring import measure_accuracy, measure_features, measure_latency, write_report
from clusterq_deploy.stages.quantization import make_images, make_variant, measure_sensitivity

__all__ = [
    "build_engine",
    "compare_graphs",
    "make_images",
    "make_variant",
    "measure_accuracy",
    "measure_features",
    "measure_latency",
    "measure_sensitivity",
    "write_graphs",
    "write_report",
]
