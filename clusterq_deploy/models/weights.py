"""Weights from a file into a model, without running code from the file."""

import hashlib
import pickle
import re
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clusterq_deploy.errors import WeightsError

State = Mapping[str, Tensor]

_WRAPPERS = ("state_dict", "model")
_PARALLEL = "module."
"""What DataParallel puts before every key."""
_COUNTER = "num_batches_tracked"
"""A BatchNorm buffer that older files lack and inference never reads."""
_SHOWN = 3


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a torch file with `weights_only=True`, onto the CPU.

    A torch file may wrap its state_dict as {"state_dict": ...} or {"model": ...}, and may be from DataParallel.

    Raises:
        WeightsError: the file is missing, damaged, not a state_dict, or a pickle that would run code.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {str(path)!r}; expected a .safetensors or a torch file")
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the protocol of a pickle, which torch then refuses
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        request = re.search(r"GLOBAL (\S+)", str(error))
        what = f"its pickle asks for {request[1]}" if request else "it is not a plain torch file"
        raise WeightsError(
            f"refused to load {str(path)!r}: {what}, but only tensors are read; save the state_dict as safetensors"
        ) from error
    except Exception as error:  # damage shows wherever the parser meets it
        raise WeightsError(
            f"cannot read the weights in {str(path)!r} ({first_line(error)}); expected a .safetensors or a torch file"
        ) from error
    return _unwrap(loaded, path)


def fit_state(model: nn.Module, state: State, *, name: str, origin: str) -> None:
    """Copy `state` into `model`, if every name and shape agrees; messages call them `origin` and `name`.

    Raises:
        WeightsError: the names or shapes do not agree; the model is then unchanged.
    """
    target = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    differences = {
        "missing": [key for key in target if key not in state and not key.endswith(_COUNTER)],
        "unexpected": [key for key in state if key not in target],
        "of another shape": [
            f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in target.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    listed = [
        f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for kind, keys in differences.items()
        if keys
    ]
    if listed:
        raise WeightsError(
            f"the weights in {origin!r} do not fit {name!r}: {', '.join(listed)}; "
            "a changed architecture, such as another number of classes, loads as path/to/module.py:factory"
        )
    with torch.no_grad():
        for key, value in target.items():
            if key in state:
                value.copy_(state[key])


def digest(model: nn.Module) -> str:
    """Return SHA-256 over the names, types, shapes and values of a model's state_dict, in hexadecimal."""
    sha256 = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            sha256.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            sha256.update(value.detach().cpu().contiguous().reshape(-1).numpy().data)
    return sha256.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the message of another library's error, short enough to quote."""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {textwrap.shorten(message, 160, placeholder=' ...')}"


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
        if inner and all(isinstance(key, str) and isinstance(inner[key], Tensor) for key in inner):
            prefix = _PARALLEL if all(key.startswith(_PARALLEL) for key in inner) else ""
            return {key.removeprefix(prefix): value for key, value in inner.items()}
    raise WeightsError(
        f"{str(path)!r} holds a {type(loaded).__name__} that is no state_dict; "
        "expected names and tensors, plain or under 'state_dict' or 'model'"
    )
