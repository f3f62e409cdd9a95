"""Classifiers by name: bundled, torchvision's, timm's, or a user's own."""

from clusterq_deploy.models.inputs import InputSpec
from clusterq_deploy.models.loading import LoadedModel, load_model
from clusterq_deploy.models.registry import ModelEntry, available_models

__all__ = ["InputSpec", "LoadedModel", "ModelEntry", "available_models", "load_model"]
