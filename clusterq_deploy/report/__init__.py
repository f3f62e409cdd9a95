"""The report of a run: its schema, and the Markdown and HTML that people read."""

from clusterq_deploy.report.html import to_html
from clusterq_deploy.report.markdown import to_markdown
from clusterq_deploy.results.engines import (
    EngineInspection,
    EngineLayer,
    GpuTelemetry,
    LatencyStats,
    MissedLayer,
    Reading,
)
from clusterq_deploy.results.features import FeatureInfo, FeatureSet, Points, Projection
from clusterq_deploy.results.report import (
    Accuracy,
    Artifact,
    CalibrationInfo,
    Environment,
    EvaluationInfo,
    Histogram,
    ImageNote,
    Latency,
    LayerHistograms,
    LayerNote,
    ModelInfo,
    Report,
    Skipped,
    Variant,
    read_report,
)

__all__ = [
    "Accuracy",
    "Artifact",
    "CalibrationInfo",
    "EngineInspection",
    "EngineLayer",
    "Environment",
    "EvaluationInfo",
    "FeatureInfo",
    "FeatureSet",
    "GpuTelemetry",
    "Histogram",
    "ImageNote",
    "Latency",
    "LatencyStats",
    "LayerHistograms",
    "LayerNote",
    "MissedLayer",
    "ModelInfo",
    "Points",
    "Projection",
    "Reading",
    "Report",
    "Skipped",
    "Variant",
    "read_report",
    "to_html",
    "to_markdown",
]
