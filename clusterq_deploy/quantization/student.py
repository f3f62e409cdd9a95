"""The student: a teacher's folded graph with quantizers in it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx, nn

from clusterq_deploy.errors import WeightsError
from clusterq_deploy.quantization.fake_quant import QuantizedLayer, Quantizer, with_weight_quantizer
from clusterq_deploy.quantization.graph.fold import folded_teacher
from clusterq_deploy.quantization.graph.placement import Placement, Target, place
from clusterq_deploy.quantization.grid import BitWidths, Cpu

_LARGEST_BIAS = 2**29  # in steps of an INT8 accumulator; a UINT8 one has twice as many, and INT32 ends at 2**31
_MERGED_FROM = 8
"""Bits of weights from which branches become one convolution. The sum has a few large values in each row, those of the
branch without a kernel: on a RepVGG of nine blocks for digits it had 6 times the error at 8 bits (0.1 % of the logits'
variance, the same answers), 14 times at 6, and no answer at 4, at half of the layers."""
FORMAT = 3
"""Version of a student's file; it changes with what the stored scales mean."""
_OPTIONS = {"first_last": "quantize_first_last", "keep": "layer_bits", "cpu": "cpu"}
"""Options of `make_student` by their names in a student's file."""


class Student(nn.Module):
    """A quantized model: images (N, C, H, W) float32, normalized, to logits (N, classes).

    Attributes:
        net: the folded graph with a `Quantizer` at every site.
        bits: widths of weights and activations.
        quantize_first_last: whether the first and last layers have those widths too, not 8 bits.
        layer_bits: widths of single layers, by name.
        target_cpu: the CPUs that its graph for ONNX Runtime is for.
        placement: where the quantizers are, and which layers stay in float.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        bits: BitWidths,
        quantize_first_last: bool,
        layer_bits: Mapping[str, int],
        cpu: Cpu,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.net, self.bits, self.quantize_first_last, self.placement = net, bits, quantize_first_last, placement
        self.layer_bits, self.target_cpu = dict(layer_bits), cpu

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def quantizers(self) -> dict[str, Quantizer]:
        """Return all quantizers by the name of their site."""
        return {m.site: m for m in self.modules() if isinstance(m, Quantizer)}

    def layers(self) -> dict[str, QuantizedLayer]:
        """Return the quantized layers by the teacher's name for them, in order of execution."""
        layers = {site.layer: self.net.get_submodule(site.layer) for site in self.placement.weights}
        return {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}

    @contextmanager
    def for_target(self, target: Target) -> Iterator[None]:
        """Compute what `target`'s graph computes: without the quantizers that only the other one has, on its grids."""
        quantizers = self.quantizers()
        absent = [quantizers[s.name] for s in self.placement.activations if target not in s.targets]
        with ExitStack() as switches:
            switches.enter_context(_switched(absent, "enabled", False))
            if target == "tensorrt":
                switches.enter_context(self.without_pair_limits())
                switches.enter_context(self.on_int8_grids())
            yield

    @contextmanager
    def without_pair_limits(self) -> Iterator[None]:
        """Compute with weights whose sums of two are not limited."""
        with _switched([layer.weight_quantizer for layer in self.layers().values()], "limit_pairs", False):
            yield

    @contextmanager
    def on_int8_grids(self) -> Iterator[None]:
        """Compute on the grids that fit INT8, which are the coarser ones: what is tuned on them fits both targets."""
        quantizers = self.quantizers()
        both = [quantizers[s.name] for s in self.placement.activations if "tensorrt" in s.targets]
        with _switched(both, "reduce_range", True):
            yield

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """Compute what the folded teacher computes: without any quantizer."""
        with self.quantized_at():
            yield

    @contextmanager
    def quantized_at(self, *sites: str) -> Iterator[None]:
        """Compute with the quantizers of these sites only."""
        others = [quantizer for site, quantizer in self.quantizers().items() if site not in sites]
        with _switched(others, "enabled", False):
            yield

    @torch.no_grad()
    def collect_inputs(
        self,
        modules: Mapping[str, nn.Module],
        batches: Iterable[Tensor],
        select: Callable[[str, Tensor], Tensor],
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """Return values that reach modules of the student while it computes in float, (n,) each, by the modules' names.

        Args:
            modules: quantizers or layers, by any name.
            batches: images (N, C, H, W) float32, normalized.
            select: returns some values (m,) of a module's input, from its name and the input.
            advance: is called after each batch.
        """
        values: dict[str, list[Tensor]] = {name: [] for name in modules}
        with ExitStack() as hooks, self.in_float():
            for name, module in modules.items():
                hook = module.register_forward_pre_hook(
                    lambda _, args, name=name: values[name].append(select(name, args[0]))
                )
                hooks.enter_context(hook)
            for batch in batches:
                self(batch.to(self.device))
                advance(1)
        return {name: torch.cat(parts) for name, parts in values.items()}

    def project(self) -> None:
        """Bring every scale back into its bounds; call it after each optimizer step."""
        for quantizer in self.quantizers().values():
            quantizer.project()

    @torch.no_grad()
    def round_biases_to_accumulator(self) -> None:
        """Round every bias to its layer's accumulator, an INT32 whose step is input scale times weight scale.

        Integer kernels add the bias there; done here, the torch model and every graph add the same numbers. A channel
        whose bias would not fit has weights that hardly count next to it: their step is raised until it does.
        """
        layers = self.layers()
        for name, step in self.accumulator_steps().items():
            if (bias := layers[name].bias) is not None:
                quantizer = layers[name].weight_quantizer
                excess = (bias.abs() / (step * _LARGEST_BIAS)).clamp_min(1)
                if bool((excess > 1).any()):
                    quantizer.set_scale(quantizer.scale * excess)
                    step = step * excess  # noqa: PLW2901
                bias.copy_((bias / step).round() * step)

    def accumulator_steps(self) -> dict[str, Tensor]:
        """Return the step of each layer's accumulator, (O,) float32, by the teacher's name for the layer."""
        quantizers, layers = self.quantizers(), self.layers()
        return {
            site.layer: quantizers[site.input_site].scale * layers[site.layer].weight_quantizer.scale
            for site in self.placement.weights
        }

    def to_bytes(self, provenance: Mapping[str, Any]) -> bytes:
        """Return the student as a safetensors file: folded float weights and scales; settings in the metadata."""
        settings = {
            "format": FORMAT,
            "bits": str(self.bits),
            "first_last": self.quantize_first_last,
            "keep": self.layer_bits,
            "cpu": self.target_cpu,
            "provenance": dict(provenance),
        }
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        # one entry: safetensors writes several in no fixed order, and the same student must give the same bytes
        return save(state, metadata={"student": json.dumps(settings, sort_keys=True)})


@contextmanager
def _switched(quantizers: Iterable[Quantizer], switch: str, value: bool) -> Iterator[None]:
    """Set a switch of these quantizers while the context is open."""
    before = {quantizer: getattr(quantizer, switch) for quantizer in quantizers}
    for quantizer in before:
        setattr(quantizer, switch, value)
    try:
        yield
    finally:
        for quantizer, earlier in before.items():
            setattr(quantizer, switch, earlier)


def make_student(
    teacher: fx.GraphModule,
    bits: BitWidths,
    *,
    quantize_first_last: bool = False,
    layer_bits: Mapping[str, int] | None = None,
    cpu: Cpu = "any",
) -> Student:
    """Return a student with quantizers where the targets need them, all scales still to be set.

    Args:
        teacher: from `models.capture.capture`; it is copied, not changed.
        bits: widths of weights and activations.
        quantize_first_last, layer_bits, cpu: as for `place`.

    Raises:
        GraphError: the teacher has no such layer to quantize, or is not the same once BatchNorm is folded.
    """
    graph = folded_teacher(teacher, merge=bits.weights >= _MERGED_FROM)
    placement = place(graph, bits, quantize_first_last=quantize_first_last, layer_bits=layer_bits, cpu=cpu)
    device = next(graph.parameters()).device
    nodes = {node.name: node for node in graph.graph.nodes}
    for site in placement.weights:
        layer = graph.get_submodule(site.layer)
        graph.set_submodule(site.layer, with_weight_quantizer(layer, site.name, site.grid, site.pair_limit))
    sites = nn.ModuleDict()
    graph.add_submodule("quantizers", sites)
    for activation in placement.activations:
        key = activation.name.replace(".", "_")
        sites[key] = Quantizer(activation.name, activation.grid, limit=activation.limit)
        readers = [nodes[name] for name in activation.readers]
        for producer in activation.producers:
            node = readers[0].all_input_nodes[0] if readers else nodes[producer]  # behind the quantizer that is there
            with graph.graph.inserting_after(node):
                quantized = graph.graph.call_module(f"quantizers.{key}")
            node.replace_all_uses_with(quantized, delete_user_cb=lambda user, only=readers: not only or user in only)
            quantized.args, quantized.meta = (node,), dict(node.meta)
    graph.graph.lint()
    graph.recompile()
    return Student(graph, bits, quantize_first_last, layer_bits or {}, cpu, placement).to(device).eval()


def load_student(path: Path, teacher: fx.GraphModule) -> tuple[Student, dict[str, Any]]:
    """Read what `Student.to_bytes` wrote, with its provenance.

    Args:
        path: a `quantized.safetensors`.
        teacher: the model that it was made from.

    Raises:
        WeightsError: the file cannot be read, or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["student"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        bits, provenance = BitWidths.parse(settings["bits"]), dict(settings["provenance"])
        options = {option: settings[name] for name, option in _OPTIONS.items() if name in settings}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no quantized model: {error}") from error
    if settings.get("format") != FORMAT:
        raise WeightsError(f"{path} is of another version of this program; make it again with clusterq quantize")
    student = make_student(teacher, bits, **options)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{path} was made from another model: {str(error).splitlines()[1].strip()}") from error
    return student, provenance
