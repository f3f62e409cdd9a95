"""Load a model of any source into one checked form."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from calib.support.errors import NoBatchNormError
from clusterq_deploy.errors import ModelError, UnknownModelError, WeightsError
from clusterq_deploy.files import sha256_file
from clusterq_deploy.models import digits, sources
from clusterq_deploy.models.capture import capture, device_of, probabilities_of
from clusterq_deploy.models.checkpoints import read_weights
from clusterq_deploy.models.inputs import InputSpec, input_spec, label_names
from clusterq_deploy.models.registry import BUNDLED, torchvision_names
from clusterq_deploy.models.weights import digest, expected_tensors, first_line, fit_state

logger = logging.getLogger(__name__)

_TIMM = "timm:"
_RANDOM = "none"
_RANDOM_SEED = 0


@dataclass(frozen=True)
class LoadedModel:
    """A classifier that is ready to be a teacher, by the name that the user gave.

    Attributes:
        original: images (N, C, H, W) -> logits (N, classes); in eval mode, float32, its parameters frozen.
        source: "bundled", "torchvision", "timm" or "file".
        weights: a description of its weights.
        weights_sha256: digest over the tensors of its state_dict; empty if these have only shapes.
        code_sha256: digest of a user's file, None for models of a package.
        class_names: one per class, or empty if they are not known.
    """

    name: str
    original: nn.Module
    input: InputSpec
    classes: int
    source: str
    weights: str
    weights_sha256: str
    code_sha256: str | None = None
    class_names: tuple[str, ...] = ()

    @cached_property
    def module(self) -> fx.GraphModule:
        """The same network with the same parameters as a graph, captured when it is first needed.

        Raises:
            GraphError: it cannot be captured, or BatchNorm normalizes by the batch.
        """
        with _isolated():
            graph = capture(self.original, self.input.size)
        if end := probabilities_of(graph):
            logger.warning(
                "%s ends in a %s: images are made and students tuned by the logits in front of it; graphs answer with "
                "probabilities, as the model does",
                self.name,
                end,
            )
        return graph

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(parameter.numel() for parameter in self.original.parameters())

    def class_label(self, index: int) -> str:
        """Return a class by its number, and by its name if that is known and says more."""
        name = self.class_names[index] if self.class_names else ""
        return f"{index} {name}" if name not in ("", str(index)) else str(index)

    @property
    def slug(self) -> str:
        """Its name for a file: the factory of `path/to/module.py:factory`, the NAME of `timm:NAME`."""
        return self.name.rpartition(":")[2]


def load_model(
    name: str,
    *,
    weights: str | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device,
    bars: bool = False,
    shapes_only: bool = False,
) -> LoadedModel:
    """Load a model and check that ClusterQ can work on it, without a change to the process's global state.

    Args:
        name: `digits`, a torchvision classifier, `timm:NAME`, `path/to/module.py:factory`, or a `.pt2` file of
            `torch.export.save`.
        weights: None for the model's own; "none" for random ones, the same every time; else a file, or
            `FILE:KEY` for one of several that it holds.
        input_size, mean, std: how the input is made, if the model does not say or says otherwise:
            (channels, height, width), and values per channel for pixels in [0, 1].
        bars: whether to show the progress of downloading a torchvision model's weights on stderr.
        shapes_only: whether shapes are enough: a torchvision model without a file of weights then stays on the meta
            device, and nothing is downloaded, initialized or computed. Others are loaded as usual.

    Raises:
        UnknownModelError: nothing has that name.
        WeightsError: the weights cannot be read, do not fit, or are not finite.
        NoBatchNormError: the model has no BatchNorm statistics.
        ModelError: the model cannot be made, run, or fed.
        GraphError: it has no BatchNorm modules and cannot be captured as a graph.
    """
    with _isolated():
        draft = _make_draft(name, weights, bars, shapes_only and weights in (None, _RANDOM))
    module = draft.module.eval().float().requires_grad_(False)
    if has_norms := draft.source == "torchvision" or any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        require_batchnorm(name, draft.source, module)  # before weights are fetched
    description = _fill(name, draft, weights)
    has_values = device_of(module).type != "meta"
    if has_values:
        _require_finite(name, module, description)
    spec = input_spec(name, draft.cfg, input_size=input_size, mean=mean, std=std)
    sha256 = digest(module) if has_values else ""
    module = module.to(device) if has_values else module
    with _isolated():
        classes = count_classes(name, module, spec)
    path = Path(name if name.endswith(".pt2") else name.rpartition(":")[0])
    code = sha256_file(path) if draft.source == "file" else None
    same_classes = weights is None or (draft.source == "file" and weights != _RANDOM)  # a weights file may have others
    names = label_names(draft.cfg, classes) if same_classes else ()
    model = LoadedModel(name, module, spec, classes, draft.source, description, sha256, code, names)
    if not has_norms:  # it may call them as functions
        require_batchnorm(name, draft.source, model.module)
    return model


@contextmanager
def _isolated() -> Iterator[None]:
    """Seed what a model's code draws, and undo what it does to the process's globals."""
    path, dtype = list(sys.path), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_RANDOM_SEED)
        try:
            yield
        finally:
            sys.path[:] = path
            torch.set_default_dtype(dtype)


def _make_draft(name: str, weights: str | None, bars: bool, shapes_only: bool) -> sources.Draft:
    path, _, factory = name.rpartition(":")
    if name.startswith(_TIMM):
        return sources.timm_model(name.removeprefix(_TIMM), pretrained=weights is None)
    if name.endswith(".pt2"):
        if weights is not None:
            raise ModelError(f"model {name!r} has its weights: drop --weights")
        return sources.exported_model(Path(name))
    if path.endswith(".py"):
        if weights == _RANDOM:
            raise ModelError(f"model {name!r} makes its own weights: drop --weights none")
        return sources.user_model(Path(path), factory)
    if name == BUNDLED:
        net = digits.digits() if weights is None else digits.DigitsNet()
        return sources.Draft(net, digits.PRETRAINED_CFG, "bundled", digits.WEIGHTS.name)
    names = torchvision_names()
    if name in names:
        return sources.torchvision_model(name, bars=bars, shapes_only=shapes_only)
    near = sources.did_you_mean(get_close_matches(name.lower(), [BUNDLED, *names]))
    raise UnknownModelError(
        f"unknown model {name!r}; {near}expected {BUNDLED}, a torchvision classifier, timm:NAME, "
        "path/to/module.py:factory or path/to/program.pt2"
    )


def _fill(name: str, draft: sources.Draft, weights: str | None) -> str:
    """Copy weights into the draft's module and return what they are."""
    if weights == _RANDOM:
        return f"random (seed {_RANDOM_SEED})"
    rename = sources.rename_torchvision if draft.source == "torchvision" else dict
    if weights is not None:
        state, origin = read_weights(weights, expected_tensors(draft.module), rename)
    elif draft.pretrained is not None:
        state, origin = rename(draft.pretrained()), draft.weights
    else:
        return draft.weights
    fit_state(draft.module, state, name=name, origin=origin)
    return origin


def require_batchnorm(name: str, source: str, module: nn.Module) -> None:
    """Raise NoBatchNormError if a module has no BatchNorm statistics; `name` and `source` are for its message."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if any(layer.running_mean is not None for layer in layers):
        return
    lacking = f"{len(layers)} BatchNorm layers without running statistics" if layers else "no BatchNorm layer"
    raise NoBatchNormError(
        f"model {name!r} ({source}, {type(module).__name__}) has {lacking}: ClusterQ aligns "
        "synthetic images to BatchNorm's running statistics; choose a model that has them, such as resnet18"
    )


def _require_finite(name: str, module: nn.Module, origin: str) -> None:
    for key, value in module.state_dict().items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise WeightsError(
                f"the weights of model {name!r} ({origin}) hold values that are not finite, such as in {key}; "
                "expected the weights of a trained model"
            )


def count_classes(name: str, module: nn.Module, spec: InputSpec) -> int:
    """Return the width of the logits, by a forward pass of one zero image on the module's device."""
    shape = (1, *spec.size)
    try:
        with torch.no_grad():
            logits: object = module(torch.zeros(shape, device=device_of(module)))
    except (Exception, SystemExit) as error:  # it may be the user's code
        raise ModelError(
            f"model {name!r} fails on an input of shape {shape} ({first_line(error)}); check --input-size"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1 or logits.shape[1] < 1:
        kind = f"tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"model {name!r} returns a {kind} for one image; expected logits of shape (1, classes)")
    return logits.shape[1]
