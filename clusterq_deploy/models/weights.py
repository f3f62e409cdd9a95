"""Weights into a model, if every name and shape agrees."""

import hashlib
import textwrap
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clusterq_deploy.errors import WeightsError

State = Mapping[str, Tensor]

_COUNTER = "num_batches_tracked"
"""A BatchNorm buffer that older files lack and inference never reads."""
_IGNORED = ("total_ops", "total_params", "n_averaged", _COUNTER)
"""Buffers next to weights that count: thop's, those of torch's AveragedModel, and BatchNorm's."""
_SHOWN = 3


def expected_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state_dict, which are its own."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def is_required(key: str) -> bool:
    """Return whether weights without this tensor of the model do not fit."""
    return not key.endswith(_COUNTER)


def differences(target: State, state: State) -> list[str]:
    """Return in words how names and shapes of `state` differ from those of `target`; nothing if they fit."""
    found = {
        "missing": [key for key in target if key not in state and is_required(key)],
        "unexpected": [key for key in state if key not in target and key.rpartition(".")[2] not in _IGNORED],
        "of another shape": [
            f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in target.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    return [
        f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for kind, keys in found.items()
        if keys
    ]


def fit_state(model: nn.Module, state: State, *, name: str, origin: str) -> None:
    """Copy `state` into `model`, if every name and shape agrees; messages call them `origin` and `name`.

    Raises:
        WeightsError: the names or shapes do not agree; the model is then unchanged.
    """
    target = expected_tensors(model)
    if listed := differences(target, state):
        raise WeightsError(
            f"the weights in {origin!r} do not fit {name!r}: {printable(', '.join(listed))}; "
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


def printable(text: str) -> str:
    """Return text of a file as it may be shown: without line breaks and control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def first_line(error: BaseException) -> str:
    """Return the message of another library's error, short enough to quote."""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {textwrap.shorten(message, 160, placeholder=' ...')}"
