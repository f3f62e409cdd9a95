"""The teacher as a torch.fx graph: traced, BatchNorm folded, in-place operations made plain."""

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from clusterq_deploy.errors import GraphError

_GATED: dict[Any, Callable[[Tensor], Tensor]] = {
    nn.SiLU: torch.sigmoid, F.silu: torch.sigmoid, nn.Hardswish: F.hardsigmoid, F.hardswish: F.hardsigmoid,
}  # fmt: skip
"""Activations that are x * gate(x), by their gates."""


class _Tracer(fx.Tracer):
    """Keeps layers whole that are quantized or folded, subclasses too if their forward is torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d):
            if isinstance(m, kind) and type(m).forward is kind.forward:
                return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a copy of an eval-mode model; the model itself stays as it is.

    Raises:
        GraphError: control flow depends on the values of tensors; the message names the line.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010  (no class of torch declares it)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a user's forward raises when it is given proxies
        raise GraphError(f"{type(model).__name__} cannot be traced: {_blame(error)}") from error
    traced = fx.GraphModule(model, graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # a view of a channels-last map need not exist
        if node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        called = module_of(traced, node)
        gate = _GATED.get(node.target if called is None else type(called))
        if gate is not None:  # two nodes of x * gate(x): runtimes have integer kernels for the product only
            with graph.inserting_before(node):
                gated = graph.call_function(gate, (node.args[0],))
                product = graph.call_function(operator.mul, (node.args[0], gated))
            node.replace_all_uses_with(product)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _blame(error: BaseException) -> str:
    """Return what went wrong, and the innermost line outside torch that raised it."""
    place, trace_back = "", error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename not in {__file__, "<string>"}:
            place = f" in {code.co_qualname}, {code.co_filename}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    return f"{str(error).splitlines()[0]}{place}; the forward must not branch on the values of tensors"


def fold_batchnorm(traced: fx.GraphModule) -> None:
    """Fold every BatchNorm that directly follows a Conv2d or Linear into it, in place.

    A BatchNorm behind anything else (DenseNet's pre-activation) stays, in float.
    """
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        norm = module_of(traced, node)
        source = node.args[0] if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else None
        if not isinstance(source, fx.Node) or len(source.users) != 1 or calls[source.target] != 1:
            continue
        layer = module_of(traced, source)
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        traced.set_submodule(str(source.target), fused)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()


def folded_teacher(model: nn.Module) -> fx.GraphModule:
    """Return the teacher traced and folded, parameters free to be tuned: what a student starts from.

    Raises:
        GraphError: see `trace`.
    """
    traced = trace(model)
    fold_batchnorm(traced)
    for parameter in traced.parameters():
        parameter.requires_grad_(True)
    return traced.eval()


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the submodule that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
