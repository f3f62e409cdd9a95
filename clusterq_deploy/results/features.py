"""What `report.json` holds of the teacher's features of synthetic and real images."""

from typing import Self

from pydantic import Field, model_validator

from clusterq_deploy.results.base import Finite, Record


class Points(Record):
    """Projected images: image i of class `labels[i]` is at (`x[i]`, `y[i]`), rounded to two decimals."""

    x: list[Finite] = Field(default_factory=list)
    y: list[Finite] = Field(default_factory=list)
    labels: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if not len(self.x) == len(self.y) == len(self.labels):
            raise ValueError(f"{len(self.x)} x, {len(self.y)} y and {len(self.labels)} labels do not fit")
        return self


class FeatureSet(Record):
    """The teacher's penultimate features of `images` images of `classes` classes of a set.

    `silhouette` is the mean silhouette coefficient by class, in [-1, 1]; `within_class_diversity` the share of the
    variance that is within classes, in [0, 1]; None if they are not defined.
    """

    dataset: str
    images: int
    classes: int
    silhouette: float | None = None
    within_class_diversity: float | None = None
    points: Points = Points()


class Projection(Record):
    """How features of width F became two coordinates."""

    method: str
    parameters: dict[str, float | int | str] = Field(default_factory=dict)


class FeatureInfo(Record):
    """Synthetic images and real ones, compared by the teacher's penultimate features, `width` of them.

    `real` is None if there were no labelled images; both sets are in one `projection`. `density` and `coverage`
    (arXiv 2002.09797, k = 5) say how the synthetic features cover the real ones. `notes` are whole sentences that
    say what could not be computed, and why.
    """

    width: int
    synthetic: FeatureSet
    real: FeatureSet | None = None
    density: float | None = None
    coverage: float | None = None
    projection: Projection | None = None
    notes: list[str] = Field(default_factory=list)
