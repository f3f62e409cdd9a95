"""The teacher's penultimate features: of synthetic images beside real ones, for the report alone."""

from clusterq_deploy.evaluation.features.capture import capture, penultimate
from clusterq_deploy.evaluation.features.compare import compare_features
from clusterq_deploy.evaluation.features.geometry import (
    Separation,
    density_and_coverage,
    evenly,
    most_frequent,
    project,
    separation,
)

__all__ = [
    "Separation",
    "capture",
    "compare_features",
    "density_and_coverage",
    "evenly",
    "most_frequent",
    "penultimate",
    "project",
    "separation",
]
