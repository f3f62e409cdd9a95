"""The words beside the histograms of layers."""

from clusterq_deploy.results.report import Histogram, LayerHistograms


def layer_line(layer: LayerHistograms) -> str:
    """Widths of a layer's weight and input, and how much of each is clipped."""
    parts = (("weight", layer.weight), ("input", layer.activation))
    return "; ".join(f"{name} {_bits(own)} bits, {_share(own.clipped)} clipped" for name, own in parts)


def caption(values: Histogram) -> str:
    """The steps of a histogram's grid, and how many of its values are clipped."""
    steps = [f"{step:.3g}" for step in dict.fromkeys(values.steps)]
    spelled = f"step {steps[0]}" if len(steps) == 1 else f"steps of {steps[0]} to {steps[-1]}"
    return f"{spelled}, {_share(values.clipped)} of {sum(values.counts):,} clipped"


def notes() -> list[str]:
    """How to read the histograms of layers."""
    return [
        "What fp32 has at each quantized layer, in the variant's channels where these were equalized: its weight, each "
        "output channel in steps of its own, and what it reads when up to 64 synthetic images pass through the model.",
        "Vertical lines are values of the grid (of every eighth one with 8 bits); what lies more than half a step past "
        "the outer two is clipped. Heights are logarithmic. The outermost bins hold what lies beyond the picture, too.",
    ]


def _bits(values: Histogram) -> int:
    return (values.high - values.low).bit_length()


def _share(share: float) -> str:
    """A small share as a percentage that is 0 only where nothing is there."""
    return "none" if share == 0 else "under 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"
