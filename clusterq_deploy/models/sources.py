"""Where models come from: each function here makes one, unchecked."""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from clusterq_deploy.errors import ModelError, UnknownModelError
from clusterq_deploy.models.capture import capture
from clusterq_deploy.models.exported import load_exported
from clusterq_deploy.models.inputs import entry
from clusterq_deploy.models.registry import torchvision_cfg
from clusterq_deploy.models.weights import State, first_line

_WITHOUT_DOWNLOAD = "pass --weights FILE, or --weights none for random ones"
_AUXILIARY = ("googlenet", "inception_v3")
"""Trained with auxiliary heads, which are in their weights and not used by inference."""
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""torchvision's DenseNet weights have the old names of its layers: norm.1 is norm1 now."""


@dataclass(frozen=True)
class Draft:
    """A model as its source makes it, with its `pretrained_cfg` or None.

    `pretrained` fetches its weights, None if it has them already; `weights` describes them.
    """

    module: nn.Module
    cfg: object
    source: str
    weights: str
    pretrained: Callable[[], State] | None = None


def torchvision_model(name: str, *, bars: bool, shapes_only: bool = False) -> Draft:
    """Make one of torchvision's classifiers; its pretrained weights come from torch's cache or the network.

    `bars` shows the progress of a download on stderr. With `shapes_only` the weights are on the meta device, and the
    draft has no `pretrained`.
    """
    from torchvision import models as tv

    auxiliary = {"transform_input": True, "aux_logits": False, "init_weights": True}
    default = tv.get_model_weights(name).DEFAULT

    def pretrained() -> State:
        try:
            state: State = default.get_state_dict(progress=bars, check_hash=True, weights_only=True)
        except Exception as error:  # the network or a damaged cache can fail in many ways
            raise ModelError(
                f"cannot get the weights of {name!r} from {default.url} ({first_line(error)}); {_WITHOUT_DOWNLOAD}"
            ) from error
        return state

    with _shapes_only() if shapes_only else nullcontext():
        module = tv.get_model(name, weights=None, **(auxiliary if name in _AUXILIARY else {}))
    return Draft(module, torchvision_cfg(name), "torchvision", str(default), None if shapes_only else pretrained)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Put what modules register on the meta device, before anything initializes it.

    In `torch.device("meta")` torchvision's RegNets cannot be made: they compute their widths with tensors.
    """

    def parameter(_: nn.Module, __: str, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    def buffer(_: nn.Module, __: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to("meta")

    # what a hook returns is registered in place of its argument; torch's stubs do not say so
    with (
        register_module_parameter_registration_hook(parameter),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(buffer),  # type: ignore[arg-type]
    ):
        yield


def rename_torchvision(state: State) -> State:
    """Return torchvision's weights as its models name them today, without auxiliary heads."""
    return {
        _OLD_DENSENET_KEY.sub(r"\1\2.", key): value
        for key, value in state.items()
        if not key.startswith(_AUXILIARY_HEADS)
    }


def timm_model(name: str, *, pretrained: bool) -> Draft:
    """Make one of timm's models.

    Raises:
        ModelError: timm is not installed, or cannot make the model.
        UnknownModelError: timm has no such model.
    """
    if importlib.util.find_spec("timm") is None:
        raise ModelError(f"model 'timm:{name}' needs timm, which is not installed: pip install timm")
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        raise UnknownModelError(f"timm has no model {name!r}; {did_you_mean(near)}see timm.list_models()")
    try:
        module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # a download can fail in any of its libraries' ways
        remedy = _WITHOUT_DOWNLOAD if pretrained else "try another model"
        raise ModelError(f"timm cannot make {name!r} ({first_line(error)}); {remedy}") from error
    tag = entry(module.pretrained_cfg, "tag")
    weights = f"timm {name}" + (f".{tag}" if tag and not name.endswith(tag) else "")
    return Draft(module, module.pretrained_cfg, "timm", weights)


def user_model(path: Path, factory: str) -> Draft:
    """Import a file and call a function of it that takes no argument and returns a model.

    Raises:
        ModelError: the file is missing or does not run; the factory is missing or makes no model. The file is not run
            if no factory is named.
    """
    spec = f"{path}:{factory}"
    if not path.is_file():
        raise ModelError(f"model {spec!r}: there is no such file; expected path/to/module.py:factory")
    if not factory.isidentifier():
        raise ModelError(
            f"model {spec!r}: {factory!r} names no function of the file; expected path/to/module.py:factory"
        )
    module = _import(path)
    make = getattr(module, factory, None)
    if not callable(make):
        functions = {n: f for n, f in vars(module).items() if callable(f) and n[0] != "_"}
        names = [n for n, f in functions.items() if getattr(f, "__module__", None) == module.__name__]
        near = did_you_mean(get_close_matches(factory, names) or names[:5])
        raise ModelError(f"model {spec!r}: the file has no {factory!r}; {near}expected a function of it")
    try:
        model = make()
    except (Exception, SystemExit) as error:  # it is the user's code
        raise ModelError(
            f"model {spec!r}: the factory, called without arguments, raised {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r}: the factory made a {type(model).__name__}; expected an nn.Module")
    return Draft(model, getattr(model, "pretrained_cfg", None), "file", "made by the factory")


def exported_model(path: Path) -> Draft:
    """Read a program of `torch.export.save` as a captured graph; its images have the size that it was exported with.

    Raises:
        ModelError: see `load_exported`.
        GraphError: see `capture`.
    """
    module, size = load_exported(path)
    return Draft(capture(module.eval(), size), {"input_size": size}, "file", "in the program")


def did_you_mean(near: list[str]) -> str:
    """Return a clause that offers these names, or nothing."""
    return f"did you mean {' or '.join(near)}? " if near else ""


def _import(path: Path) -> ModuleType:
    """Run a Python file as a module with a unique name; `__file__` is its absolute path."""
    path = path.resolve()
    unique = f"clusterq_user_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(path)!r} is not a Python file; expected path/to/module.py:factory")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(unique)
    sys.modules[unique] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is the user's code
        sys.modules.pop(unique)
        if before is not None:
            sys.modules[unique] = before
        advice = "; put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise ModelError(f"importing {str(path)!r} raised {first_line(error)}{advice}") from error
    return module
