"""The teacher as a torch.fx graph: traced, BatchNorm folded, in-place operations made plain."""

import copy
import operator
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
    """Keeps whole what a quantizer or a fold wants to see: subclasses too, if their forward is torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d):
            if isinstance(m, kind) and type(m).forward is kind.forward:
                return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a copy of an eval-mode model; the model itself is left alone.

    Raises:
        GraphError: control flow depends on the values of tensors; the message names the line where that is.
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
    for node in graph.nodes:
        if node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # a view of a channels-last map need not exist
        if node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    for node in list(graph.nodes):
        called = module_of(traced, node)
        gate = _GATED.get(node.target if called is None else type(called))
        if gate is not None:
            _split(node, gate)
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _split(node: fx.Node, gate: Callable[[Tensor], Tensor]) -> None:
    """Make two nodes of x * gate(x): runtimes have integer kernels for the product, none for the whole."""
    source = node.args[0]
    with node.graph.inserting_before(node):
        share = node.graph.call_function(gate, (source,))
        product = node.graph.call_function(operator.mul, (source, share))
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _blame(error: BaseException) -> str:
    """What went wrong, and the innermost line outside torch where it did."""
    place, trace_back = "", error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename not in {__file__, "<string>"}:
            place = f" in {code.co_qualname}, {code.co_filename}:{trace_back.tb_lineno}"
        trace_back = trace_back.tb_next
    return f"{str(error).splitlines()[0]}{place}; the forward must not branch on the values of tensors"


def fold_batchnorm(traced: fx.GraphModule) -> list[str]:
    """Fold every BatchNorm that directly follows a Conv2d or Linear into it, in place; gives the folded names.

    A BatchNorm behind anything else (DenseNet's pre-activation) stays, in float.
    """
    modules = dict(traced.named_modules())
    calls = _calls(traced)
    folded = []
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        name = str(source.target)
        layer, norm = modules[name], modules[node.target]
        if calls[name] != 1 or norm.running_mean is None:
            continue
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        traced.set_submodule(name, fused)
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
        folded.append(str(node.target))
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return folded


def _calls(traced: fx.GraphModule) -> dict[str, int]:
    """How often each submodule is called."""
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    return calls


def folded_teacher(model: nn.Module) -> fx.GraphModule:
    """The teacher traced and folded, parameters free to be tuned: what a student starts from.

    Raises:
        GraphError: see `trace`.
    """
    traced = trace(model)
    fold_batchnorm(traced)
    for parameter in traced.parameters():
        parameter.requires_grad_(True)
    return traced.eval()


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The submodule that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in order of its arguments."""
    return list(node.all_input_nodes)
