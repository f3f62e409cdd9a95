"""The words for the teacher's features of synthetic and real images."""

from clusterq_deploy.report.formats import number, percent
from clusterq_deploy.results.features import FeatureInfo, FeatureSet
from clusterq_deploy.results.report import Report


def sentence(report: Report) -> str | None:
    """What the teacher's penultimate features of synthetic and real images are like, in numbers."""
    found = report.features
    if found is None:
        return None
    text = f"In front of the classifier ({found.width:,} features), {_separation(found.synthetic, 'synthetic images')}"
    if found.real is not None:
        text += f", {_separation(found.real, f'real ones ({found.real.dataset})')}"
    if found.coverage is not None:
        text += f"; the synthetic ones cover {percent(found.coverage)} of the real ones"
        text += f" (density {number(found.density)})"
    return text + "."


def notes(report: Report) -> list[str]:
    """How to read the numbers and the picture of the features, and what is missing in them."""
    found = report.features
    if found is None:
        return []
    said = []
    if found.projection is not None:
        both = " Both panels are one projection, with the same axes." if found.real is not None else ""
        said.append(
            f"A dot is an image{_shown(found)}; its colour, and the number, is the class: the one that a synthetic "
            f"image was made for, the true one of a real image.{both} Images that lie close together look alike to the "
            "model; how far apart two groups are, and in which direction, means nothing "
            f"({found.projection.method})."
        )
    if found.synthetic.silhouette is not None:
        said.append(
            "Silhouette: 1 where the classes lie far apart, 0 where they touch. Diversity is the share of the "
            "variance within classes: 0 where all images of a class are the same. Synthetic images should come near "
            "the real ones in both."
        )
    if found.coverage is not None:
        said.append(
            "Coverage is the share of real images that have a synthetic one among their neighbours; density is how "
            "many neighbourhoods of real images a synthetic one lies in, about 1 where both sets are alike "
            "(arXiv 2002.09797, k = 5)."
        )
    return said + found.notes


def _shown(found: FeatureInfo) -> str:
    """Of how many classes there are dots, where that is not all."""
    shown = len({*found.synthetic.points.labels, *(found.real.points.labels if found.real else ())})
    return f", of {shown} of the {found.synthetic.classes:,} classes" if shown < found.synthetic.classes else ""


def _separation(found: FeatureSet, name: str) -> str:
    images = f"{found.images:,} {name} of {found.classes:,} classes"
    if found.silhouette is None:
        return f"{images} give no silhouette"
    diversity = number(found.within_class_diversity, 3)
    return f"{images} have a silhouette of {number(found.silhouette, 3)} and a within-class diversity of {diversity}"
