"""The teacher's penultimate features of synthetic and real images, measured and projected for the report."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from calib.bn_statistics import within_class_diversity
from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import DataError, FeatureError
from clusterq_deploy.evaluation.data import EvaluationSet, Labels, Rows
from clusterq_deploy.models.rebuild import aten
from clusterq_deploy.quantization.graph.fold import module_of
from clusterq_deploy.quantization.graph.ops import operation
from clusterq_deploy.results.report import FeatureInfo, FeatureSet, Points, Projection
from clusterq_deploy.runtimes.runners import Array, TorchRunner

NEIGHBOURS = 5
"""k of density and coverage, as in arXiv 2002.09797."""
_MAX_IMAGES, _MAX_CLASSES = 2000, 100
_SHOWN_IMAGES, _SHOWN_CLASSES = 1000, 10
_MAX_BYTES = 2**28  # that the comparison needs, roughly
_PERPLEXITY = 30.0
_STEPS = 500  # half of the default: for 950 features of digits a divergence of 0.47 instead of 0.45, in half the time
_MIN_POINTS = 4
_ROUNDING = 1e-6  # of the features' size: smaller differences are rounding
_PRODUCTS = {aten.linear, aten.conv2d, aten.matmul, aten.mm, aten.bmm, aten.addmm}


def compare_features(
    teacher: fx.GraphModule,
    synthetic: EvaluationSet,
    real: EvaluationSet | None,
    *,
    classes: int,
    seed: int,
    batch_size: int = 50,
    progress: Progress = SILENT,
) -> FeatureInfo:
    """Measure and project the teacher's penultimate features of two sets of images.

    At most 2,000 images of each are used, of the 100 classes with the most synthetic ones; 1,000 images of 10 classes
    are projected. The choice depends on the labels only. Undefined values are None, and `notes` has the reasons.

    Args:
        teacher: from `models.capture.capture`; images (N, C, H, W) to logits (N, classes).
        synthetic: images with the labels that they were generated for.
        real: images with their true labels, or None.
        classes: the width of the logits.
        seed: of the projection.

    Raises:
        FeatureError: the teacher's features cannot be computed.
        MemoryError: there is not enough memory.
        DataError: too many images cannot be read, or a set has no labels.
    """
    np.empty(_MAX_BYTES, np.uint8)  # and freed: OpenBLAS would wait forever for memory that it does not get
    network, compared = penultimate(teacher, classes), most_frequent(_labels(synthetic), _MAX_CLASSES)
    sets, notes = {"synthetic": synthetic}, []
    if real is None:
        notes.append("No labelled images were given: there are no real ones to compare with.")
    elif not np.isin(_labels(real), compared).any():
        notes.append(f"No image of {real.name} is of a compared class.")
    else:
        sets["real"] = real
    features, labels = {}, {}
    for name, data in sets.items():
        chosen = data.subset(evenly(_labels(data), compared, _MAX_IMAGES))
        features[name] = capture(network, chosen, batch_size=batch_size, progress=progress)
        labels[name] = _labels(chosen)[chosen.readable]
    separations, overlap = {}, None
    with progress.task("Geometry of features", len(sets) + 2) as advance:  # overlap and projection
        for name in sets:
            separations[name] = separation(features[name], labels[name])
            advance()
        if "real" in sets:
            overlap = density_and_coverage(features["real"], features["synthetic"])
        advance()
        projection, points = _project_together(list(features.values()), list(labels.values()), seed)
        advance()
    notes += [
        f"No silhouette and no diversity of {name} images: {result.reason}."
        for name, result in separations.items()
        if result.reason
    ]
    if "real" in sets and overlap is None:
        notes.append(f"No density and no coverage: they need more than {NEIGHBOURS} real images.")
    if projection is None:
        notes.append("No projection: there are too few images, or all have the same features.")
    density, coverage = overlap or (None, None)
    records = {
        name: FeatureSet(
            dataset=sets[name].name,
            images=len(labels[name]),
            classes=len(np.unique(labels[name])),
            silhouette=result.silhouette,
            within_class_diversity=result.within_class_diversity,
            points=shown,
        )
        for (name, result), shown in zip(separations.items(), points, strict=True)
    }
    return FeatureInfo(
        width=features["synthetic"].shape[1],
        synthetic=records["synthetic"],
        real=records.get("real"),
        density=density,
        coverage=coverage,
        projection=projection,
        notes=notes,
    )


def _labels(data: EvaluationSet) -> Labels:
    if data.labels is None:
        raise DataError(f"{data.name} has no labels; features are compared by class")
    return data.labels


def penultimate(teacher: fx.GraphModule, classes: int) -> fx.GraphModule:
    """Return a copy of the teacher without its classifier, with features (N, F) float32, averaged over positions.

    The classifier is the last Linear or Conv2d of the captured graph, and as wide as the logits (N, classes).

    Raises:
        FeatureError: its classifier is neither a Linear nor a Conv2d.
    """
    graph = copy.deepcopy(teacher)
    weighted = [node for node in graph.graph.nodes if _multiplies(graph, node)]
    layer = module_of(graph, weighted[-1]) if weighted else None
    if isinstance(layer, nn.Linear) and layer.out_features == classes:
        pool = _over_positions
    elif isinstance(layer, nn.Conv2d) and layer.out_channels == classes:
        pool = _over_space
    else:
        last = str(layer or weighted[-1].target) if weighted else "none"
        raise FeatureError(
            f"the last layer of {type(teacher).__name__} is {last}; "
            f"features are the input of a Linear or Conv2d of {classes} outputs"
        )
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(weighted[-1]):
        output.args = (graph.graph.call_function(pool, (weighted[-1].all_input_nodes[0],)),)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


def _multiplies(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node could be a classifier: a layer, or a product in the forward."""
    if node.op == "call_module":
        return isinstance(module_of(graph, node), nn.Linear | nn.Conv2d)
    return operation(node) in _PRODUCTS


def _over_positions(x: Tensor) -> Tensor:
    """Average (N, ..., F), as a Linear reads it, to (N, F)."""
    return x if x.dim() == 2 else x.flatten(1, -2).mean(1)


def _over_space(x: Tensor) -> Tensor:
    """Average (N, F, H, W), as a Conv2d reads it, to (N, F)."""
    return x.mean((2, 3))


def capture(network: nn.Module, data: EvaluationSet, *, batch_size: int = 50, progress: Progress = SILENT) -> Array:
    """Return features (N, F) float32 of all readable images, in order, by a network of `penultimate`.

    Raises:
        FeatureError: a value is not finite, or no image can be read.
        DataError: more images cannot be read than the set allows.
    """
    batches = []
    with TorchRunner(network) as runner, progress.task("Features", len(data)) as advance:
        for images, _ in data.batches(batch_size):
            batches.append(runner.infer(images))
            advance(len(images))
    if not batches:
        raise FeatureError(f"none of the {len(data)} compared images of {data.name} can be read")
    features = np.concatenate(batches)
    if not np.isfinite(features).all():
        raise FeatureError(f"the teacher's features of {data.name} have values that are not finite")
    return features


def most_frequent(labels: Labels, limit: int) -> Labels:
    """Return the at most `limit` classes with the most images, (K,) int64, ascending; ties are evenly spaced."""
    present, counts = np.unique(labels, return_counts=True)
    if len(present) <= limit:
        return present
    least = np.sort(counts)[-limit]
    chosen, tied = present[counts > least], present[counts == least]
    missing = limit - len(chosen)
    return np.sort(np.concatenate([chosen, tied[np.arange(missing) * len(tied) // missing]]))


def evenly(labels: Labels, classes: Labels, limit: int) -> Rows:
    """Return indices (M,) int64, ascending, of at most `limit` images of the classes, evenly over the classes."""
    members = np.flatnonzero(np.isin(labels, classes))
    count = min(limit, len(members))
    by_class = members[np.argsort(labels[members], kind="stable")]
    return np.sort(by_class[np.arange(count) * len(members) // max(count, 1)])


@dataclass(frozen=True, slots=True)
class Separation:
    """How features are separated by class; `reason` explains numbers that are None.

    Attributes:
        silhouette: mean silhouette coefficient (Rousseeuw 1987), in [-1, 1]: 1 if every image is far nearer to its
            class than to the next one, 0 if it is between the two.
        within_class_diversity: share of the variance that is within classes, in [0, 1].
    """

    silhouette: float | None
    within_class_diversity: float | None
    reason: str | None = None


def separation(features: Array, labels: Labels) -> Separation:
    """Return silhouette and diversity of features (N, F) float32, finite, labels (N,) int64, without single images."""
    from sklearn.metrics import silhouette_score  # scikit-learn takes more than a second to import

    _, class_index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if (counts >= 2).sum() < 2:
        return Separation(None, None, "fewer than two classes have two images or more")
    counted = counts[class_index] >= 2
    features, labels = features[counted], labels[counted]
    if _same(features):
        return Separation(None, None, "the features of all images are the same")
    diversity = within_class_diversity(torch.from_numpy(features), torch.from_numpy(labels))
    return Separation(float(silhouette_score(features, labels)), diversity)


def density_and_coverage(real: Array, synthetic: Array) -> tuple[float, float] | None:
    """Return density and coverage of synthetic features by Naeem et al., arXiv 2002.09797, with k = 5.

    A real image's ball extends to its fifth nearest real neighbour. Density is the mean number of balls that contain a
    synthetic image, over k: about 1 for similar sets. Coverage is the share of balls that contain one, in [0, 1].
    Features are (N, F) and (M, F) float32. Return None unless there are more than five real images.
    """
    from sklearn.metrics import pairwise_distances

    if len(real) <= NEIGHBOURS:
        return None
    radius = np.partition(pairwise_distances(real), NEIGHBOURS, axis=1)[:, NEIGHBOURS]  # the image itself is the first
    inside = pairwise_distances(real, synthetic) < radius[:, None]
    return float(inside.sum(0).mean() / NEIGHBOURS), float(inside.any(1).mean())


def project(features: Array, seed: int) -> tuple[Array, dict[str, float | int | str]] | None:
    """Return the places (N, 2) float32 of features (N, F) float32, finite, by t-SNE, and its parameters.

    Van der Maaten and Hinton 2008. It starts from the principal components, and runs in one thread to be reproducible.
    Return None for fewer than 4 images or 2 features, and if all images have the same features.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count, width = features.shape
    if count < _MIN_POINTS or width < 2 or _same(features):
        return None
    parameters: dict[str, float | int | str] = {
        "perplexity": min(_PERPLEXITY, (count - 1) / 3),
        "init": "pca",
        "random_state": seed % 2**32,
        "max_iter": _STEPS,
    }
    with threadpool_limits(1):
        places: Array = TSNE(n_components=2, **parameters).fit_transform(features)
    return places, parameters


def _project_together(features: list[Array], labels: list[Labels], seed: int) -> tuple[Projection | None, list[Points]]:
    """Return one projection of all sets, and the places of the shown images of each."""
    classes = most_frequent(np.concatenate(labels), _SHOWN_CLASSES)
    shown = [evenly(part, classes, _SHOWN_IMAGES // len(labels)) for part in labels]
    projected = project(np.concatenate([part[rows] for part, rows in zip(features, shown, strict=True)]), seed)
    if projected is None:
        return None, [Points() for _ in labels]
    places, points = np.split(projected[0], np.cumsum([len(rows) for rows in shown])[:-1]), []
    for place, part, rows in zip(places, labels, shown, strict=True):
        x, y = ([round(float(value), 2) for value in column] for column in place.T)
        points.append(Points(x=x, y=y, labels=part[rows].tolist()))
    return Projection(method="t-SNE", parameters=projected[1]), points


def _same(features: Array) -> bool:
    """Return whether the rows are equal up to rounding."""
    return float(np.ptp(features, axis=0).max()) <= _ROUNDING * float(np.abs(features).max())
