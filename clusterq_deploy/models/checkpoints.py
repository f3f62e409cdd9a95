"""The weights of a model in a checkpoint, whatever they are called in it and whatever else it holds."""

import logging
import re
import shlex
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clusterq_deploy.errors import WeightsError
from clusterq_deploy.models.torch_files import Inert, read_file, refusal
from clusterq_deploy.models.weights import State, differences, is_required, printable

logger = logging.getLogger(__name__)

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DataParallel, torch.compile and others put into names, before them or in their middle."""
_AVERAGED = re.compile(r"(?<![a-z])(?<!exp_)(ema|swa|swag|avg|average|averaged|averager|polyak|shadow)(?![a-z])")
_OPTIMIZER = re.compile(r"(?:^|\.)state\.\d+\.")
"""Where optimizers keep their averages, which are of gradients."""
_COUNT = "n_averaged"
"""The buffer in which torch's AveragedModel counts what it has averaged."""
_TOP = "."
"""The key of tensors that are in no dictionary but the file's."""
_SHOWN = 4

Rename = Callable[[State], State]


class _Item(NamedTuple):
    """A tensor or inert object in a file; `name` is the dotted path to it, which starts with that to its container."""

    container: str
    name: str
    value: Tensor | Inert


@dataclass(frozen=True)
class _Candidate:
    """Tensors with the model's names behind a prefix, which starts with the path to their container.

    Attributes:
        key: what selects it in `FILE:KEY`.
        stripped: what was removed from its names, for people.
        items: the names in the file of the tensors that the model has.
        fits: whether the model's tensors are all there, in their shapes, and no others.
    """

    prefix: str
    key: str
    stripped: str
    items: frozenset[str]
    state: State
    averaged: bool
    fits: bool


def split_weights(weights: str) -> tuple[Path, str | None]:
    """Split `FILE` or `FILE:KEY`; a colon may be part of the name of a file that exists."""
    colons = [match.start() for match in re.finditer(":", weights)]
    for end in (len(weights), *reversed(colons)):
        if Path(weights[:end]).is_file():
            return Path(weights[:end]), weights[end + 1 :] or None
    return Path(weights), None


def read_weights(weights: str, target: State, rename: Rename = lambda state: state) -> tuple[State, str]:
    """Find the weights of a model in a file.

    Averaged weights are preferred to plain ones. Prefixes of all names, and what wrappers put into them, are removed.

    Args:
        weights: a file; or `FILE:KEY`, where KEY is the dotted path to one of several states that it holds.
        target: the tensors of the model's state_dict.
        rename: updates old names.

    Returns:
        The tensors by the model's names, if the file has those; and a description of where they are from.

    Raises:
        WeightsError: the file cannot be read or holds no tensors with names, or it has several states that fit and
            none is the only averaged one.
    """
    path, key = split_weights(weights)
    content, skipped = read_file(path)
    if isinstance(content, Inert):
        raise refusal(path, content)
    items = list(_items(content, rename))
    candidates = _candidates(items, target, rename)
    if key is not None:
        keys = [candidate.key for candidate in candidates if candidate.fits]
        candidates = [c for c in candidates if key == c.key or c.prefix.startswith(f"{key}.")]
        if not candidates:
            has = f"it has them under {_listed(keys)}" if keys else "nor under another key"
            raise WeightsError(printable(f"{str(path)!r} has no weights of this model under {key!r}; {has}"))
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return _nearest(candidates, items, path, content), str(path)
    chosen = _choose(fitting, path, None if key else _other_average(items, fitting))
    others = [c.key for c in fitting if c is not chosen]
    notes = (
        f"took {chosen.key}{f', not {_listed(others)}' if others else ''}" if others or chosen.key != _TOP else "",
        f"stripped {chosen.stripped}" if chosen.stripped else "",
        f"skipped {_listed(skipped)}" if skipped else "",
    )
    if note := printable("; ".join(filter(None, notes))):
        logger.warning("Weights in %s: %s", path, note)
        return chosen.state, f"{path} ({note})"
    return chosen.state, str(path)


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:_SHOWN])}{', ...' if len(words) > _SHOWN else ''}"


def _items(content: object, rename: Rename) -> Iterator[_Item]:
    """Yield the tensors and inert objects in nested dictionaries and lists, each of which is entered once."""
    waiting, seen = deque([("", content)]), set[int]()
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen or not isinstance(value, Mapping | list | tuple):
            continue
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            name = f"{path}{key}"
            if isinstance(item, Tensor):
                yield _Item(path, next(iter(rename({name: item})), name), item)
            elif isinstance(item, Inert):
                yield _Item(path, name, item)
            else:
                waiting.append((f"{name}.", item))


def _candidates(items: list[_Item], target: State, rename: Rename) -> list[_Candidate]:
    """Return each prefix behind which all of the model's names are; if there is none, the one with most of them."""
    wrappers = _WRAPPERS - {segment for key in target for segment in key.split(".")}
    states: defaultdict[str, dict[str, _Item]] = defaultdict(dict)
    for item in items:
        segments = item.name.split(".")
        for start, first in enumerate(segments):
            own_name = ".".join(segment for segment in segments[start:] if segment not in wrappers)
            if first not in wrappers and own_name in target and isinstance(item.value, Tensor):
                states["".join(f"{segment}." for segment in segments[:start])][own_name] = item
    counts = {prefix: sum(map(is_required, state)) for prefix, state in states.items()}
    required = sum(map(is_required, target))
    whole = [prefix for prefix, count in counts.items() if count == required]
    containers = Counter(_container(states[prefix]) for prefix in whole)
    candidates = []
    for prefix in whole or sorted(counts, key=lambda prefix: -counts[prefix])[:1]:
        found = states[prefix]
        container = _container(found)
        shared = containers[container] > 1 or not prefix.startswith(container)
        inside = {segment for item in found.values() for segment in item.name[len(prefix) :].split(".")} & wrappers
        stripped = ["" if shared else prefix.removeprefix(container), *(f"{segment}." for segment in sorted(inside))]
        nested = tuple(other for other in whole if other != prefix and other.startswith(prefix))
        names = frozenset(item.name for item in found.values())
        more = {
            item.name.removeprefix(prefix): item.value
            for item in items
            if isinstance(item.value, Tensor)
            and item.container == container
            and item.name.startswith(prefix)
            and item.name not in names
            and not item.name.startswith(nested)
        }
        state = rename({name: item.value for name, item in found.items() if isinstance(item.value, Tensor)} | more)
        candidates.append(
            _Candidate(
                prefix,
                key=(prefix if shared else container)[:-1] or _TOP,
                stripped=", ".join(filter(None, stripped)),
                items=names,
                state=state,
                averaged=_is_averaged(prefix, container, items),
                fits=not differences(target, state),
            )
        )
    return candidates


def _container(state: Mapping[str, _Item]) -> str:
    """Return the path to the dictionary that holds the first tensor of a state."""
    return next(iter(state.values())).container


def _has_average(name: str) -> bool:
    return _AVERAGED.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) is not None


def _is_averaged(prefix: str, container: str, items: list[_Item]) -> bool:
    """Return whether tensors behind a prefix are averaged weights, by a counter next to them or by the prefix."""
    for item in items:
        is_counter = item.container == container and item.name.endswith(_COUNT)
        if is_counter and isinstance(item.value, Tensor) and prefix.startswith(item.name.removesuffix(_COUNT)):
            return item.value.numel() == 1 and bool(item.value)
    return _has_average(prefix)


def _other_average(items: list[_Item], fitting: list[_Candidate]) -> str | None:
    """Return the name of something that is averaged weights, but in none of the states that fit; None without one."""
    known = frozenset[str]().union(*(candidate.items for candidate in fitting))
    for item in items:
        is_weight = item.value.is_module if isinstance(item.value, Inert) else item.value.ndim > 1
        if is_weight and item.name not in known and not _OPTIMIZER.search(item.name) and _has_average(item.name):
            return item.name
    return None


def _choose(fitting: list[_Candidate], path: Path, other_average: str | None) -> _Candidate:
    """Return the only averaged state of a file, or its only state.

    Raises:
        WeightsError: there are several, with other values; or the averaged weights are not among those that fit.
    """
    pool = [candidate for candidate in fitting if candidate.averaged] or fitting
    if other_average and not pool[0].averaged:
        problem = f"has averaged weights too, at {other_average}, but not in a form that fits"
    elif all(_is_equal(pool[0].state, other.state) for other in pool[1:]):
        return pool[0]
    else:
        problem = f"has several weights that fit, under {_listed([candidate.key for candidate in pool])}"
    choice = f"--weights {shlex.quote(f'{path}:{pool[0].key}')}"
    raise WeightsError(printable(f"{str(path)!r} {problem}; choose which to take, for example {choice}"))


def _is_equal(one: State, other: State) -> bool:
    return all(key in other and torch.equal(value, other[key]) for key, value in one.items() if is_required(key))


def _nearest(candidates: list[_Candidate], items: list[_Item], path: Path, content: object) -> State:
    """Return the state of a file that has most of the model's names, else the largest, which the model may refuse.

    Raises:
        WeightsError: there is none.
    """
    inert = sorted(
        (item.value for item in items if isinstance(item.value, Inert)), key=lambda value: not value.is_module
    )
    if candidates and (len(candidates[0].items) > 1 or not inert):
        return candidates[0].state
    if inert and inert[0].is_module:
        raise refusal(path, inert[0])
    states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for item in items:
        name = item.name.removeprefix(item.container)
        if isinstance(item.value, Tensor) and not name.isdecimal():  # of a list
            states[item.container][name] = item.value
    if states:
        return max(states.values(), key=len)
    if inert:
        raise refusal(path, inert[0])
    raise WeightsError(
        f"{str(path)!r} holds a {type(content).__name__} that is no state_dict; expected names and tensors, in "
        "dictionaries of any depth; save them with torch.save(model.state_dict(), FILE)"
    )
