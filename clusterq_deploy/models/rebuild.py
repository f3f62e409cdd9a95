"""Write a program of torch.export as a graph of torch.nn's layers, with ATen operations between them."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

aten = torch.ops.aten

Shape = tuple[int | None, ...]
"""Sizes of a tensor, None for one that depends on the number of images."""
NORM = aten._native_batch_norm_legit_no_training.default
_END = 2**62  # of a slice without an end
_PROBABILITIES = {aten.softmax.int, aten._softmax.default, aten.sigmoid.default}
_IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh_copy.default,
}


class Probabilities(nn.Module):
    """A softmax or sigmoid at the end of a classifier; `logits_only` leaves it out."""

    def __init__(self, operation: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.operation, self.arguments, self.enabled = operation, arguments, True

    @property
    def function(self) -> Literal["softmax", "sigmoid"]:
        """The function that makes the probabilities."""
        return "sigmoid" if self.operation is aten.sigmoid.default else "softmax"

    def forward(self, logits: Tensor) -> Tensor:
        """Return probabilities for logits (N, classes), or the logits themselves."""
        result: Tensor = self.operation(logits, *self.arguments) if self.enabled else logits
        return result


class Rebuild:
    """Writes one program as a graph of modules and ATen operations, from its inputs to its outputs.

    Args:
        name: of the model's class.
        program: functional, with one input, images (N, C, H, W).
        size: (channels, height, width) of an image.
    """

    def __init__(self, name: str, program: ExportedProgram, size: tuple[int, int, int]) -> None:
        self.name, self.size = name, size
        self.source = program.module(check_guards=False)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[Any, Any] = {}  # new nodes and constants, by the program's nodes
        self.constants: set[fx.Node] = set()
        self.attributes: dict[int, fx.Node] = {}
        (images,) = (node for node in self.source.graph.nodes if node.op == "placeholder")
        batch = images.meta["val"].shape[0]
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.batch_size: fx.Node | None = None
        self.layers = {
            aten.conv2d.default: self._convolution,
            aten.conv2d.padding: self._convolution,
            aten.conv_transpose2d.input: self._convolution,
            aten.linear.default: self._linear,
            aten.mm.default: self._linear,
            aten.matmul.default: self._linear,
            aten.addmm.default: self._linear,
            NORM: self._norm,
        }

    def run(self) -> fx.GraphModule:
        """Return the graph; its `meta["size"]` is the size of an image."""
        needed = _needed(self.source.graph)
        for node in self.source.graph.nodes:
            if node in needed:
                self.values[node] = self._value(node)
        self._name_probabilities()
        graph = fx.GraphModule(self.root, self.graph, self.name)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        graph.meta["size"] = self.size
        return graph.eval()

    def _name_probabilities(self) -> None:
        """Make the softmax or sigmoid that the graph ends in a module."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        end = output.args[0]
        if end.target in _PROBABILITIES and len(end.meta["shape"]) == 2:
            name = self._free_name("probabilities")
            self.root.add_module(name, Probabilities(end.target, end.args[1:]))
            with self.graph.inserting_before(output):
                called = self.graph.call_module(name, end.args[:1])
            called.meta = dict(end.meta)
            output.args = (called,)

    def _value(self, node: fx.Node) -> Any:
        """Return a new node that computes what a node of the program does, or its value if that is constant."""
        if node.op == "placeholder":
            return self._described(self.graph.placeholder(node.name), node)
        if node.op == "output":
            answer: Any = node.args[0]
            return self.graph.output(self._argument(answer[0] if isinstance(answer, tuple | list) else answer))
        if node.op == "get_attr":
            self.constants.add(node)
            owner, _, last = str(node.target).rpartition(".")
            return getattr(self.source.get_submodule(owner), last)
        target: Any = node.target
        tags = getattr(target, "tags", ())
        if self.constants.issuperset(node.all_input_nodes) and torch.Tag.nondeterministic_seeded not in tags:
            self.constants.add(node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
            with torch.no_grad():
                return target(*args, **kwargs)
        unchanged = self._unchanged(node)
        if unchanged is not None:
            return unchanged
        layer = self.layers[target](node) if target in self.layers else None
        return layer or self._operation(node)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """Return the value that a node only hands on, or None if it does something to it."""
        target, (source, *others) = node.target, _arguments(node)
        x = self.values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(x, fx.Node):
            return None
        if target is operator.getitem:
            return x if source.target is NORM else None
        if target is aten.copy.default:
            return self._argument(others[0]) if _shape(node) == _shape(others[0]) else None
        if target is aten.slice_scatter.default:
            return self._scattered(node, x)
        same = (
            target in _IDENTITIES
            or (target is aten._to_copy.default and node.meta["val"].dtype == source.meta["val"].dtype)
            or (target is aten.expand.default and _shape(node) == _shape(source))
            or (target is aten.slice.Tensor and _is_whole(node, 1))
            or (target is aten.add.Tensor and _is_number(others[0], 0))  # where Python's sum() starts
        )
        return x if same else None

    def _scattered(self, node: fx.Node, x: fx.Node) -> fx.Node | None:
        """Return a tensor of which a part is written over, as a concatenation; None if the part is not contiguous."""
        written = self._argument(node.args[1])
        if _is_whole(node, 2):
            return cast(fx.Node, written)
        dim, bounds = _slice_dim(node, 2), _slice(node, 2)
        if bounds is None:
            return None
        if written.target is aten.slice.Tensor and written.args[:4] == (x, dim, *bounds):
            return x  # written back where it was read
        size = _arguments(node)[0].meta["val"].shape[dim]
        before, after = (self._part(x, dim, *ends) for ends in ((0, bounds[0]), (bounds[1], size)))
        parts = [part for part in (before, written, after) if part is not None]
        return self._described(self._call_function(aten.cat.default, parts, dim), node)

    def _part(self, x: fx.Node, dim: int, start: int, end: int) -> fx.Node | None:
        if start >= end:
            return None
        part = self._call_function(aten.slice.Tensor, x, dim, start, end)
        shape = list(x.meta["shape"])
        shape[dim] = end - start
        part.meta = {**x.meta, "shape": tuple(shape)}
        return part

    def _are_constants(self, *values: Any) -> bool:
        return all(value is None or value in self.constants for value in values)

    def _constant(self, value: Any) -> Any:
        return None if value is None else self.values[value]

    def _convolution(self, node: fx.Node) -> fx.Node | None:
        x, weight, bias, stride, padding, *rest = _arguments(node)
        if not self._are_constants(weight, bias) or x in self.constants or len(_shape(x)) != 4:
            return None
        w, b, source = self._constant(weight), self._constant(bias), self.values[x]
        layer: nn.Module
        geometry: dict[str, Any] = {
            "kernel_size": tuple(w.shape[2:]),
            "stride": _pair(stride),
            "bias": b is not None,
            "device": "meta",
        }
        if node.target is aten.conv_transpose2d.input:
            output_padding, groups, dilation = rest
            geometry |= {"padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
            geometry["output_padding"] = _pair(output_padding)
            layer = nn.ConvTranspose2d(len(w), w.shape[1] * groups, **geometry)
        else:
            dilation, groups = rest
            reach = [d * (k - 1) for d, k in zip(_pair(dilation), w.shape[2:], strict=True)]
            if isinstance(padding, str):
                padding = [total // 2 if padding == "same" else 0 for total in reach]
                if any(total != 2 * low for total, low in zip(reach, padding, strict=True)) and any(padding):
                    source, padding = self._padded(source, reach), [0, 0]
            geometry |= {"padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
            layer = nn.Conv2d(w.shape[1] * groups, len(w), **geometry)
        return self._call(node, weight, layer, source, weight=w, bias=b)

    def _padded(self, x: fx.Node, reach: Sequence[int]) -> fx.Node:
        """Return x with `reach` zeros around height and width, one more behind than in front if that is odd."""
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in reach)
        padded = self._call_function(aten.constant_pad_nd.default, x, [left, right, top, bottom], 0.0)
        *outer, height, width = x.meta["shape"]
        padded.meta = {**x.meta, "shape": (*outer, height + top + bottom, width + left + right)}
        return padded

    def _linear(self, node: fx.Node) -> fx.Node | None:
        arguments = _arguments(node)
        bias, x, weight = arguments if node.target is aten.addmm.default else (None, *arguments[:2])
        if node.target is aten.linear.default:
            bias = arguments[2]
        if not self._are_constants(weight, bias) or x in self.constants or len(_shape(weight)) != 2 or node.kwargs:
            return None
        w, b = self._constant(weight), self._constant(bias)
        if b is not None and b.dim() != 1:
            return None
        w = w if node.target is aten.linear.default else w.T.contiguous()
        layer = nn.Linear(w.shape[1], len(w), bias=b is not None, device="meta")
        return self._call(node, weight, layer, self.values[x], weight=w, bias=b)

    def _norm(self, node: fx.Node) -> fx.Node | None:
        x, *parameters, momentum, eps = _arguments(node)
        if not self._are_constants(*parameters) or x in self.constants:
            return None
        weight, bias, mean, var = map(self._constant, parameters)
        kind: type[_BatchNorm] = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(_shape(x)), nn.BatchNorm1d)
        if (weight is None) != (bias is None):  # layers of torch have both or none
            weight = torch.ones_like(mean) if weight is None else weight
            bias = torch.zeros_like(mean) if bias is None else bias
        layer = kind(len(mean), eps=eps, momentum=momentum, affine=weight is not None, device="meta")
        tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        tensors["num_batches_tracked"] = mean.new_zeros((), dtype=torch.long)  # torch's loading would add it
        called = self._call(node, parameters[2], layer, self.values[x], **tensors)
        called.meta["shape"] = self._shape(x)
        return called

    def _call(self, node: fx.Node, named: fx.Node, layer: nn.Module, x: fx.Node, **tensors: Tensor | None) -> fx.Node:
        """Return a call of a layer with these tensors, under the name that it has in the model."""
        for key, value in tensors.items():
            if key in layer._buffers:
                layer._buffers[key] = value
            elif value is not None:
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
                setattr(layer, key, parameter)
        name = self._layer_name(node, named)
        self._add_module(name, layer.eval())
        called = self.graph.create_node("call_module", name, (x,), name=name.replace(".", "_"))
        return self._described(called, node)

    def _layer_name(self, node: fx.Node, named: fx.Node) -> str:
        """Return a free name for a layer: of its weight in the model, or of the module that computes it."""
        owner, _, last = str(named.target).rpartition(".") if named.op == "get_attr" else ("", "", "")
        name = owner if last in {"weight", "running_mean"} else f"{owner}.{last}".strip(".")
        return self._free_name(name or module_path(node)[0] or node.name)

    def _free_name(self, name: str) -> str:
        """Return a dotted name, with the number of the call if it is taken."""
        free, call = name, 1
        while _occupied(self.root, free):
            call += 1
            free = f"{name}@{call}"
        return free

    def _add_module(self, name: str, module: nn.Module) -> None:
        owner, _, last = name.rpartition(".")
        self._owner(owner).add_module(last, module)

    def _owner(self, name: str) -> nn.Module:
        """Return the module of a dotted name, made with all that lead to it if it is not there."""
        owner = self.root
        for part in name.split(".") if name else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner

    def _call_function(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.create_node("call_function", target, args, name=_plain_name(target))

    def _operation(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        if target in {aten.view.default, aten._unsafe_view.default}:
            target = aten.reshape.default  # a view of a channels-last map need not exist
        args: Any = fx.map_arg(node.args, self._argument)
        kwargs: Any = fx.map_arg(dict(node.kwargs), self._argument)
        if self.fixed_batch is not None:
            args = tuple(self._freed(value) for value in args)
        if target is aten.reshape.default and -1 not in args[1] and sum(isinstance(d, fx.Node) for d in args[1]) == 1:
            args = (args[0], [-1 if isinstance(d, fx.Node) else d for d in args[1]])
        path, kind = module_path(node)
        name = path.replace(".", "_") if path and hasattr(nn, kind) else _plain_name(target)
        return self._described(self.graph.create_node("call_function", target, args, kwargs, name=name), node)

    def _freed(self, value: Any) -> Any:
        """Return an argument, in a list of sizes with the batch's size for the number that it was exported with."""
        batch = self.fixed_batch
        if batch is None or not isinstance(value, list | tuple):
            return value

        def free(size: Any, place: int) -> Any:
            if type(size) is not int or size <= 0 or size % batch:
                return size
            leading = place == 0 and (batch > 1 or size == 1)
            return self._batch(size // batch) if leading or size == batch > 1 else size

        return [free(size, place) for place, size in enumerate(value)]

    def _batch(self, times: int) -> fx.Node:
        """Return a node for a multiple of the batch's size."""
        if self.batch_size is None:
            images = next(node for node in self.graph.nodes if node.op == "placeholder")
            with self.graph.inserting_after(images):
                self.batch_size = self.graph.call_function(aten.sym_size.int, (images, 0))
        return self.batch_size if times == 1 else self.graph.call_function(operator.mul, (self.batch_size, times))

    def _argument(self, value: Any) -> Any:
        """Return what a new node reads for an argument of an old one."""
        if not isinstance(value, fx.Node):
            return value
        constant = self.values[value]
        return self._stored(value, constant) if value in self.constants and isinstance(constant, Tensor) else constant

    def _stored(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        """Return a node that reads a constant tensor of the graph, under its name in the model if it has one."""
        if id(tensor) not in self.attributes:
            name = self._free_name(str(node.target) if node.op == "get_attr" else f"constants.{node.name}")
            owner, _, last = name.rpartition(".")
            if isinstance(tensor, nn.Parameter):
                self._owner(owner).register_parameter(last, tensor)
            else:
                self._owner(owner).register_buffer(last, tensor)
            read = self.graph.get_attr(name)
            read.meta["shape"], read.meta["module"] = tuple(tensor.shape), module_path(node)
            self.attributes[id(tensor)] = read
        return self.attributes[id(tensor)]

    def _described(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """Return a new node with its shape, and with the module that the program has it from."""
        new.meta["shape"], new.meta["module"] = self._shape(node), module_path(node)
        return new

    def _shape(self, node: fx.Node) -> Shape:
        shape = _shape(node)
        return (None, *shape[1:]) if self.fixed_batch and shape and shape[0] == self.fixed_batch else shape


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the output is computed from, and the inputs."""
    stack = [node for node in graph.nodes if node.op in {"output", "placeholder"}]
    needed: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return needed


def _occupied(root: nn.Module, name: str) -> bool:
    """Return whether something has a dotted name."""
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is not None


def _shape(node: fx.Node) -> Shape:
    """Return the sizes of a program's node's output, None for one that is not fixed; () if it is not a tensor."""
    value = node.meta.get("val")
    return tuple(d if isinstance(d, int) else None for d in value.shape) if isinstance(value, Tensor) else ()


def _plain_name(target: Any) -> str:
    """Return the name of an operation without its overload."""
    return str(getattr(target, "overloadpacket", target).__name__)


def _is_number(value: Any, number: float) -> bool:
    """Return whether an argument is a constant of this value, and not a node or a tensor."""
    return isinstance(value, int | float) and value == number


def _pair(value: Any) -> tuple[int, ...]:
    """Return a setting for height and width, given as one number, one in a list, or two."""
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(numbers * 2 if len(numbers) == 1 else numbers)


def _arguments(node: fx.Node) -> list[Any]:
    """Return the arguments of a call in the order of its schema, with defaults; those given, for a Python function."""
    schema: Any = getattr(node.target, "_schema", None)
    rest = schema.arguments[len(node.args) :] if schema else ()
    return [*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest)]


def _slice_dim(node: fx.Node, place: int) -> int:
    """Return the dimension of a slice whose arguments from `place` on are dim, start, end and step."""
    source, dim = _arguments(node)[0], _arguments(node)[place]
    return int(dim) % len(_shape(source))


def _slice(node: fx.Node, place: int) -> tuple[int, int] | None:
    """Return where a slice starts and ends, or None if that depends on the image or it leaves values out."""
    source, (start, end, step) = _arguments(node)[0], _arguments(node)[place + 1 : place + 4]
    size = _shape(source)[_slice_dim(node, place)]
    if size is None or step != 1 or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        return None
    low, high, _ = slice(start, end).indices(size)
    return low, high


def _is_whole(node: fx.Node, place: int) -> bool:
    """Return whether a slice is the whole tensor, whose size along it may be that of the batch."""
    source, (start, end, step) = _arguments(node)[0], _arguments(node)[place + 1 : place + 4]
    size = _shape(source)[_slice_dim(node, place)]
    if size is None:
        return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= _END))
    return _slice(node, place) == (0, size)


def module_path(node: fx.Node) -> tuple[str, str]:
    """Return the name and class of the module that a node of a program is from; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    name, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return name.partition("@")[0], kind.rpartition(".")[2]
