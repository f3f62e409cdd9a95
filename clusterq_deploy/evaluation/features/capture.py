"""What the teacher's classifier reads of an image: the input of its last layer."""

import operator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calib.support.progress import SILENT, Progress
from clusterq_deploy.errors import FeatureError
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.quantization.graph.trace import module_of, trace
from clusterq_deploy.runtimes.runners import Array, TorchRunner

BATCH = 50
_PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm"}


def penultimate(teacher: nn.Module, classes: int) -> fx.GraphModule:
    """A copy of the teacher that ends in front of its classifier.

    The classifier is the last Linear or Conv2d of the traced graph, and as wide as the logits.

    Args:
        teacher: images (N, C, H, W) to logits (N, classes); it is copied, not changed.
        classes: the width of the logits.

    Returns:
        Images (N, C, H, W) float32 to features (N, F) float32; what has an extent in space is averaged over it.

    Raises:
        GraphError: the teacher cannot be traced.
        FeatureError: its classifier is neither a Linear nor a Conv2d.
    """
    traced = trace(teacher)
    weighted = [node for node in traced.graph.nodes if _multiplies(traced, node)]
    layer = module_of(traced, weighted[-1]) if weighted else None
    if isinstance(layer, nn.Linear) and layer.out_features == classes:
        pool = _over_positions
    elif isinstance(layer, nn.Conv2d) and layer.out_channels == classes:
        pool = _over_space
    else:
        found = str(layer or weighted[-1].target) if weighted else "none"
        raise FeatureError(
            f"the last layer of {type(teacher).__name__} is {found}; "
            f"features are taken in front of a Linear or Conv2d of {classes} outputs"
        )
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    with traced.graph.inserting_before(weighted[-1]):
        output.args = (traced.graph.call_function(pool, (weighted[-1].all_input_nodes[0],)),)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


def _multiplies(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node could be a classifier: a layer, or a product that the forward writes out."""
    if node.op == "call_module":
        return isinstance(module_of(traced, node), nn.Linear | nn.Conv2d)
    return node.op in ("call_function", "call_method") and node.target in _PRODUCTS


def _over_positions(x: Tensor) -> Tensor:
    """(N, ..., F), as a Linear reads it, to (N, F)."""
    return x if x.dim() == 2 else x.flatten(1, -2).mean(1)


def _over_space(x: Tensor) -> Tensor:
    """(N, F, H, W), as a Conv2d reads it, to (N, F)."""
    return x.mean((2, 3))


def capture(network: nn.Module, data: EvaluationSet, *, batch_size: int = BATCH, progress: Progress = SILENT) -> Array:
    """Features (N, F) float32 of all images of a set that can be read, in its order.

    Args:
        network: as `penultimate` gives it.
        data: the images.
        batch_size: images a forward pass.
        progress: shows how far it is.

    Raises:
        FeatureError: there are values that are not finite, or no image can be read.
        DataError: more images cannot be read than the set allows.
    """
    found = []
    with TorchRunner(network) as runner, progress.task("Features", len(data)) as advance:
        for images, _ in data.batches(batch_size):
            found.append(runner.infer(images))
            advance(len(images))
    if not found:
        raise FeatureError(f"none of the {len(data)} images of {data.name} that are compared can be read")
    features = np.concatenate(found)
    if not np.isfinite(features).all():
        raise FeatureError(f"the teacher's features of {data.name} hold values that are not finite")
    return features
