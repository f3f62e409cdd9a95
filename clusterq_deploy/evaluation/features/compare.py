"""Synthetic images beside real ones, as the teacher's features have them."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import EvaluationSet, Labels
from clusterq_deploy.evaluation.features.capture import BATCH, capture, penultimate
from clusterq_deploy.evaluation.features.geometry import (
    NEIGHBOURS,
    density_and_coverage,
    evenly,
    most_frequent,
    project,
    separation,
)
from clusterq_deploy.results.features import FeatureInfo, FeatureSet, Points, Projection
from clusterq_deploy.runtimes.runners import Array

_MOST_IMAGES, _MOST_CLASSES = 2000, 100
_SHOWN_IMAGES, _SHOWN_CLASSES = 1000, 10
_ROOM = 2**28  # bytes that the comparison of so many images takes, about


def compare_features(
    teacher: nn.Module,
    synthetic: EvaluationSet,
    real: EvaluationSet | None,
    *,
    classes: int,
    seed: int,
    batch_size: int = BATCH,
    progress: Progress = SILENT,
) -> FeatureInfo:
    """Measure and project the teacher's penultimate features of two sets of images.

    At most 2,000 images of each count, of the 100 classes with the most synthetic ones; 1,000 images of 10 classes are
    projected. Which they are depends on the labels alone. What is not defined is None, and `notes` says why.

    Args:
        teacher: in eval mode; images (N, C, H, W) to logits (N, classes).
        synthetic: images with the labels that they were made for.
        real: images with their true labels, or None where there are none.
        classes: the width of the logits.
        seed: of the projection.
        batch_size: images a forward pass.
        progress: shows how far it is.

    Raises:
        FeatureError: the teacher's features cannot be taken.
        MemoryError: the memory does not suffice.
        DataError: too many images cannot be read, or a set has no labels.
    """
    np.empty(_ROOM, np.uint8)  # and given back: OpenBLAS waits without an end for memory that it does not get
    network = penultimate(teacher, classes)
    compared = most_frequent(_labels(synthetic), _MOST_CLASSES)
    capturing = partial(_captured, network, compared, batch_size, progress)
    captured, notes = {"synthetic": capturing(synthetic)}, []
    if real is None:
        notes.append("No labelled images were given: there are no real ones to compare with.")
    elif not np.isin(_labels(real), compared).any():
        notes.append(f"No image of {real.name} is of a class that is compared.")
    else:
        captured["real"] = capturing(real)
    parts, overlap = {}, None
    with progress.task("Geometry of features", len(captured) + 2) as advance:  # overlap and projection
        for name, own in captured.items():
            parts[name] = separation(own.features, own.labels)
            advance()
        if "real" in captured:
            overlap = density_and_coverage(captured["real"].features, captured["synthetic"].features)
        advance()
        projection, places = _projected(list(captured.values()), seed)
        advance()
    notes += [f"No silhouette and no diversity of {name} images: {p.reason}." for name, p in parts.items() if p.reason]
    if "real" in captured and overlap is None:
        notes.append(f"No density and no coverage: they need more than {NEIGHBOURS} real images.")
    if projection is None:
        notes.append("No projection: there are too few images, or all have the same features.")
    found = {
        name: FeatureSet(
            dataset=own.dataset,
            images=len(own.labels),
            classes=len(np.unique(own.labels)),
            silhouette=parts[name].silhouette,
            within_class_diversity=parts[name].within_class_diversity,
            points=points,
        )
        for (name, own), points in zip(captured.items(), places, strict=True)
    }
    return FeatureInfo(
        width=captured["synthetic"].features.shape[1],
        synthetic=found["synthetic"],
        real=found.get("real"),
        density=overlap[0] if overlap else None,
        coverage=overlap[1] if overlap else None,
        projection=projection,
        notes=notes,
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Captured:
    """The images of one set that count: labels (N,) int64 and features (N, F) float32."""

    dataset: str
    labels: Labels
    features: Array


def _captured(
    network: nn.Module, classes: Labels, batch_size: int, progress: Progress, data: EvaluationSet
) -> _Captured:
    chosen = data.subset(evenly(_labels(data), classes, _MOST_IMAGES))
    features = capture(network, chosen, batch_size=batch_size, progress=progress)
    return _Captured(data.name, _labels(chosen)[chosen.kept], features)


def _labels(data: EvaluationSet) -> Labels:
    if data.labels is None:
        raise DataError(f"{data.name} has no labels; features are compared by class")
    return data.labels


def _projected(sets: list[_Captured], seed: int) -> tuple[Projection | None, list[Points]]:
    """One projection of all sets, and of each the places of the images that are shown."""
    shown = most_frequent(np.concatenate([own.labels for own in sets]), _SHOWN_CLASSES)
    chosen = [evenly(own.labels, shown, _SHOWN_IMAGES // len(sets)) for own in sets]
    made = project(np.concatenate([own.features[rows] for own, rows in zip(sets, chosen, strict=True)]), seed)
    if made is None:
        return None, [Points() for _ in sets]
    places = np.split(made[0], np.cumsum([len(rows) for rows in chosen])[:-1])
    points = []
    for place, own, rows in zip(places, sets, chosen, strict=True):
        x, y = ([round(float(value), 2) for value in column] for column in place.T)
        points.append(Points(x=x, y=y, labels=own.labels[rows].tolist()))
    return Projection(method="t-SNE", parameters=made[1]), points
