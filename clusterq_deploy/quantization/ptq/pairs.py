"""Pairs of layers whose common tensor's channels can be scaled and shifted: found in a student's graph."""

from dataclasses import dataclass

from torch import fx, nn

from clusterq_deploy.quantization.fake_quant import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Quantizer
from clusterq_deploy.quantization.graph.ops import Homogeneity, homogeneity, is_rectifier, moves_values
from clusterq_deploy.quantization.grid import Grid
from clusterq_deploy.quantization.student import Student


@dataclass(frozen=True)
class LayerPair:
    """Two layers between which only homogeneous operations stand.

    Attributes:
        producer, consumer, names: the layers, and the teacher's names for them.
        node: the consumer's call.
        clip: a ReLU6 between them.
        made: where a shift shows: the rectified tensor in front of pads and pools; None without one.
        site, grid: of the quantizer that the consumer reads.
    """

    producer: QuantizedLayer
    consumer: QuantizedLayer
    names: tuple[str, str]
    node: fx.Node
    clip: fx.Node | None
    made: fx.Node | None
    site: str
    grid: Grid


def find_pairs(student: Student) -> list[LayerPair]:
    """Every layer whose input comes from one other layer, through homogeneous operations and to no other reader."""
    quantizers, net = student.quantizers(), student.net
    layers = student.layers()
    pairs = []
    for site in student.placement.weights:
        node = next(n for n in net.graph.nodes if n.op == "call_module" and n.target == site.layer)
        if (found := _source(net, node)) is None:
            continue
        source, clip, made = found
        producer, consumer = layers.get(str(source.target)), layers[site.layer]
        if producer is not None:
            names, grid = (str(source.target), site.layer), quantizers[site.input_site].grid
            pairs.append(LayerPair(producer, consumer, names, node, clip, made, site.input_site, grid))
    return pairs


def _source(net: fx.GraphModule, consumer: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None] | None:
    """The layer that makes a layer's input, the ReLU6 between them, and the tensor that a shift would show in.

    None where the two are no pair.
    """
    linear = isinstance(net.get_submodule(str(consumer.target)), nn.Linear)
    clip, made, flat, spatial, shiftable = None, None, False, False, True
    at = consumer.all_input_nodes[0]
    while len(at.users) == 1:
        if at.op == "call_module" and isinstance(net.get_submodule(str(at.target)), QuantizedConv2d | QuantizedLinear):
            from_linear = isinstance(net.get_submodule(str(at.target)), nn.Linear)
            fits = linear and not flat and not spatial if from_linear else linear == flat
            return (at, clip, made if shiftable else None) if fits else None
        kind = Homogeneity.ELEMENTWISE if _is_quantizer(net, at) else homogeneity(net, at)
        if kind is None or (kind is Homogeneity.CLIPPED and clip is not None):
            return None
        flat, spatial = flat or kind is Homogeneity.FLATTENING, spatial or kind is Homogeneity.SPATIAL
        clip = at if kind is Homogeneity.CLIPPED else clip
        if is_rectifier(net, at):
            made = made or at
        elif kind is Homogeneity.ELEMENTWISE and not _is_quantizer(net, at) and not moves_values(net, at):
            shiftable = False  # a slope or a sign would be another one after a shift
        at = at.all_input_nodes[0]
    return None


def _is_quantizer(net: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(net.get_submodule(str(node.target)), Quantizer)
