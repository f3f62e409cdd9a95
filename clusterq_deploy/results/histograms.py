"""How a layer's values lie on their grids, as `report.json` has it."""

from typing import Annotated

from pydantic import Field

from clusterq_deploy.results.base import Count, Finite, Record

_Step = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Histogram(Record):
    """Values in steps of their grid, so that the grid's are the integers from `low` to `high`.

    `steps` are the smallest and the largest step of an output channel, equal where the tensor has one step. Bin i of
    `counts` begins at `start` + i * `width`, in steps; the outermost two hold what lies beyond, too. `clipped` is the
    share of the values, in [0, 1], that the grid cuts off.
    """

    low: int = Field(ge=-128, le=0)
    high: int = Field(ge=1, le=255)
    steps: tuple[_Step, _Step]
    start: Finite = Field(ge=-1024, le=1024)
    width: _Step = Field(le=1024)
    counts: list[Count] = Field(min_length=1, max_length=1024)
    clipped: float = Field(ge=0, le=1)


class LayerHistograms(Record):
    """The weight of a quantized layer, and the activation that it reads: the FP32 model's, in a variant's channels."""

    layer: str
    weight: Histogram
    activation: Histogram
