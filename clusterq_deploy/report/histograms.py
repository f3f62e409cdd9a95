"""How a layer's values lie on their grids, as `report.json` has it."""

from clusterq_deploy.report.record import Record


class Histogram(Record):
    """Values in steps of their grid, so that the grid's are the integers from `low` to `high`.

    `steps` are the smallest and the largest step of an output channel, equal where the tensor has one step. Bin i of
    `counts` begins at `start` + i * `width`, in steps; the outermost two hold what lies beyond, too. `clipped` is the
    share of the values, in [0, 1], that the grid cuts off.
    """

    low: int
    high: int
    steps: tuple[float, float]
    start: float
    width: float
    counts: list[int]
    clipped: float


class LayerHistograms(Record):
    """The weight of a quantized layer, and the activation that it reads: the FP32 model's, in a variant's channels."""

    layer: str
    weight: Histogram
    activation: Histogram
