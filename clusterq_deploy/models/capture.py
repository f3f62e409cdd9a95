"""Capture a network exactly, as one graph of plain layers: by torch.export, whatever its Python code looks like.

The graph computes what the module computes, side effects of operations in place included. What torch.nn has a layer
for is that layer again, under the name that its weight has in the user's module, so that BatchNorm statistics can be
tapped, folded and matched; everything else is an ATen operation.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from clusterq_deploy.errors import GraphError
from clusterq_deploy.models.rebuild import Probabilities, Rebuild, aten, module_path

EXACT = 1e-4
"""The largest difference of two graphs' logits that rounding explains, over the logits' standard deviation."""
_SEED = 0
_BATCH = 3
_FIXED_BATCH = 37  # for a program whose batch torch.export cannot leave free: a prime that few layers have as a width


@contextmanager
def logits_only(*graphs: nn.Module) -> Iterator[None]:
    """Compute logits with captured graphs that end in probabilities: a loss needs them, the classes are the same."""
    ends = [end for graph in graphs for end in _ends(graph)]
    for end in ends:
        end.enabled = False
    try:
        yield
    finally:
        for end in ends:
            end.enabled = True


def probabilities_of(graph: nn.Module) -> Literal["softmax", "sigmoid"] | None:
    """Return the function at the end of a captured graph that makes probabilities of logits; None if there is none."""
    return next((end.function for end in _ends(graph)), None)


def _ends(graph: nn.Module) -> list[Probabilities]:
    return [module for module in graph.modules() if isinstance(module, Probabilities)]


def capture(model: nn.Module, size: tuple[int, int, int]) -> fx.GraphModule:
    """Return the graph of a network, images (N, C, H, W) float32 to logits, N free; it shares the model's weights.

    The graph's layers are Conv2d, ConvTranspose2d, Linear and BatchNorm modules; a layer that is called several times
    is one module per call, `name` and `name@2`, with the same parameters. Weights that the model computes from others
    (parametrizations, masks of pruning) are computed once. The nodes' `meta["shape"]` has their outputs' sizes, None
    for one that depends on N.

    Args:
        model: in eval mode; it is not changed. A graph that this function returned is returned as it is.
        size: (channels, height, width) of an image.

    Raises:
        GraphError: torch.export cannot capture it, its answers depend on the other images of a batch, or the graph
            computes something else.
    """
    if isinstance(model, fx.GraphModule) and "size" in model.meta:
        return model
    device = device_of(model)
    graph = Rebuild(type(model).__name__, _program(model, size, device), size).run()
    require_same(model, graph, random_images(size, device), "the captured graph")
    return graph


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters and buffers are; the CPU if it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def random_images(size: tuple[int, int, int], device: torch.device, count: int = _BATCH) -> Tensor:
    """Return standard normal images (count, C, H, W) float32, always the same."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(_SEED)).to(device)


@torch.no_grad()
def require_same(model: nn.Module, graph: fx.GraphModule, images: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Require that a graph computes what a model computes.

    Args:
        model: the user's module, or the graph that this one was made from; one that has only shapes is let through.
        images: (N, C, H, W) float32.
        what: the graph, in the message.
        tolerance: the largest difference, over the logits' standard deviation.

    Raises:
        GraphError: the answers differ by more than the tolerance; the message names the first layer that differs.
    """
    if images.is_meta:
        return
    difference = relative_difference(graph(images), _answers(model, images))
    if difference > tolerance:
        first = _first_difference(model, graph, images, tolerance)
        raise GraphError(
            f"{what} of {type(model).__name__} is another function: its answers differ by {difference:.2g} standard "
            f"deviations{first}; please report this with the model's code"
        )


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's logits, of one image at a time if it accepts no other number."""
    try:
        answers: Tensor = model(images)
    except RuntimeError:
        return torch.cat([model(image[None]) for image in images])
    return answers


def relative_difference(answers: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors over the standard deviation of the second one; NaN is infinite."""
    deviation = float(expected.double().std()) if expected.numel() > 1 else 0.0
    scale = max(deviation, 1e-3 * float(expected.abs().max()), 1e-30)
    difference = float((answers.double() - expected.double()).abs().max()) / scale
    both = torch.equal(answers.isfinite(), expected.isfinite())
    return difference if math.isfinite(difference) else (0.0 if both else math.inf)


def _first_difference(model: nn.Module, graph: fx.GraphModule, images: Tensor, tolerance: float) -> str:
    """Return the first layer of a graph whose outputs are not the model's, in words; empty if none can be compared."""
    expected = _outputs(model, images)
    for name, output in _outputs(graph, images).items():
        same_shape = name in expected and output.shape == expected[name].shape
        if name and same_shape and relative_difference(output, expected[name]) > tolerance:
            return f", first in {name}"
    return ""


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of a model's modules by their names, each of its first call, in order of execution."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor):
                    outputs.setdefault(name, output.detach().clone())

            hooks.callback(module.register_forward_hook(keep).remove)
        _answers(model, images)
    return outputs


def _program(model: nn.Module, size: tuple[int, int, int], device: torch.device) -> ExportedProgram:
    """Return the exported program, with a free batch if torch.export can leave it free."""
    try:
        program = _export(model, torch.zeros(2, *size, device=device), free=True)
    except Exception as free_error:  # torch raises many kinds, and so does a user's forward
        batch = model.meta.get("batch") if isinstance(model, fx.GraphModule) else None
        try:
            program = _export(model, torch.zeros(batch or _FIXED_BATCH, *size, device=device), free=False)
        except Exception as error:
            raise GraphError(f"{type(model).__name__} cannot be captured: {_blame(error)}") from free_error
    for node in program.graph.nodes:
        if node.target == aten.batch_norm.default and (node.args[5] or node.args[3] is None):
            raise GraphError(
                f"{module_path(node)[0] or node.name} normalizes by the batch at inference too (track_running_stats="
                "False, or left in training mode): an image's answer depends on the other images, and there are no "
                "statistics to align to"
            )
    functional: ExportedProgram = program.run_decompositions({})  # what was done in place is data flow
    return functional


def _export(model: nn.Module, images: Tensor, *, free: bool) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=1)},) if free else None
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stderr(io.StringIO()):  # it prints half a graph there
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
            return program
    finally:
        logger.setLevel(level)


def _blame(error: BaseException) -> str:
    """Return what went wrong, and the innermost line outside torch that raised it."""
    place, trace_back = "", error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename not in {__file__, "<string>"}:
            place = f" in {code.co_qualname}, {code.co_filename}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    text = re.sub(r"\s+", " ", str(error).strip().split("\n\n")[0]) or type(error).__name__
    hint = "; the forward must not branch on the values of tensors" if "data-dependent" in text else ""
    return f"{text[:300]}{place}{hint}"
