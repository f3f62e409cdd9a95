"""How features lie: apart by class, spread within one, over one another, and on a page."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from calib.bn_statistics import within_class_diversity
from clusterq_deploy.evaluation.data import Labels
from clusterq_deploy.runtimes.runners import Array

Indices = npt.NDArray[np.int64]

NEIGHBOURS = 5
"""k of density and coverage, as in arXiv 2002.09797."""
_PERPLEXITY = 30.0
_STEPS = 500  # half of the usual: of 950 features of digits, a divergence of 0.47 for 0.45, in half of the time
_FEWEST_POINTS = 4
_SAME = 1e-6  # features whose spread is below this share of their size differ by rounding alone


def most_frequent(labels: Labels, limit: int) -> Labels:
    """At most `limit` classes, those with the most images: (K,) int64, ascending.

    Of classes with equally many images, as many as there is room for are taken, evenly spread.
    """
    present, counts = np.unique(labels, return_counts=True)
    if len(present) <= limit:
        return present
    least = np.sort(counts)[-limit]
    chosen, tied = present[counts > least], present[counts == least]
    room = limit - len(chosen)
    return np.sort(np.concatenate([chosen, tied[np.arange(room) * len(tied) // room]]))


def evenly(labels: Labels, classes: Labels, limit: int) -> Indices:
    """Indices (M,) int64, ascending, of at most `limit` images of the given classes, evenly over the classes."""
    own = np.flatnonzero(np.isin(labels, classes))
    kept = min(limit, len(own))
    by_class = own[np.argsort(labels[own], kind="stable")]
    return np.sort(by_class[np.arange(kept) * len(own) // max(kept, 1)])


@dataclass(frozen=True, slots=True)
class Separation:
    """How features lie by class.

    Attributes:
        silhouette: mean silhouette coefficient (Rousseeuw 1987), in [-1, 1]: 1 where every image lies far nearer
            to its own class than to the next one, 0 where it lies between the two.
        within_class_diversity: share of the variance that lies within classes, in [0, 1].
        reason: why the two are None, where they are.
    """

    silhouette: float | None
    within_class_diversity: float | None
    reason: str | None = None


def separation(features: Array, labels: Labels) -> Separation:
    """Silhouette and diversity of features by class.

    A class of a single image has no distance within: it counts in neither.

    Args:
        features: (N, F) float32, finite.
        labels: (N,) int64.
    """
    from sklearn.metrics import silhouette_score  # scikit-learn takes more than a second to import

    _, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if (counts >= 2).sum() < 2:
        return Separation(None, None, "fewer than two classes have two images or more")
    kept = counts[own] >= 2
    features, labels = features[kept], labels[kept]
    if _same(features):
        return Separation(None, None, "the features of all images are the same")
    diversity = within_class_diversity(torch.from_numpy(features), torch.from_numpy(labels))
    return Separation(float(silhouette_score(features, labels)), diversity)


def density_and_coverage(real: Array, synthetic: Array) -> tuple[float, float] | None:
    """Density and coverage of synthetic features by Naeem et al., arXiv 2002.09797, with k = 5.

    A real image's ball reaches to its fifth nearest real neighbour. Density is how many balls a synthetic image lies
    in, on average, over k: about 1 where both sets are alike. Coverage is the share of balls in which a synthetic
    image lies, in [0, 1].

    Args:
        real: (N, F) float32.
        synthetic: (M, F) float32.

    Returns:
        None where there are not more than five real images.
    """
    from sklearn.metrics import pairwise_distances

    if len(real) <= NEIGHBOURS:
        return None
    radius = np.partition(pairwise_distances(real), NEIGHBOURS, axis=1)[:, NEIGHBOURS]  # its own place is the first
    inside = pairwise_distances(real, synthetic) < radius[:, None]
    return float(inside.sum(0).mean() / NEIGHBOURS), float(inside.any(1).mean())


def project(features: Array, seed: int) -> tuple[Array, dict[str, float | int | str]] | None:
    """Places in the plane by t-SNE (van der Maaten and Hinton 2008), which start from the principal components.

    Computed in one thread: with more, sums come in another order and the picture turns out otherwise.

    Args:
        features: (N, F) float32, finite.
        seed: the source of what is random.

    Returns:
        Places (N, 2) float32, and the parameters. None for fewer than 4 images, for fewer than 2 features, and where
        all images have the same features.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count, width = features.shape
    if count < _FEWEST_POINTS or width < 2 or _same(features):
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


def _same(features: Array) -> bool:
    """Whether nothing but rounding tells the rows apart."""
    return float(np.ptp(features, axis=0).max()) <= _SAME * float(np.abs(features).max())
