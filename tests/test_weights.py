"""Weights in checkpoints of every usual form: which are taken, what is said of it, and what is refused."""

import argparse
import collections
import datetime
import enum
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from clusterq_deploy.errors import WeightsError
from clusterq_deploy.models.checkpoints import read_weights, split_weights
from clusterq_deploy.models.sources import rename_torchvision
from clusterq_deploy.models.weights import fit_state

State = dict[str, Tensor]


def make_net(seed: int) -> nn.Module:
    """Return a small net of random weights; a sequence in a module, so that names have several parts."""
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.ModuleDict({"features": features, "fc": nn.Linear(4, 5)})


NET = make_net(0)
RIGHT, WRONG = (dict(make_net(seed).state_dict()) for seed in (1, 2))


def named(prefix: str, state: State = RIGHT) -> State:
    return {prefix + key: value for key, value in state.items()}


def inside(name: str, state: State = RIGHT) -> State:
    """Return a state whose `features` are wrapped, as in DataParallel(features)."""
    return {key.replace("features.", f"features.{name}."): value for key, value in state.items()}


class Config(dict[str, Any]):
    """A dictionary with attributes, such as yacs' CfgNode."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.__dict__["frozen"] = True


class History(list[float]):
    """A list of a class of its own."""


class Colour(enum.Enum):
    """An enumeration, pickled by a call."""

    RED = 1


class Slots:
    """An object without a dictionary."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


def trained_by(make_optimizer: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the state of an optimizer after a step."""
    net = make_net(3)
    optimizer = make_optimizer(net.parameters(), lr=0.1)
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def averaged(steps: int) -> State:
    """Return the state of an AveragedModel that was updated this number of times."""
    model = AveragedModel(make_net(1))
    for _ in range(steps):
        model.update_parameters(make_net(1))
    return dict(model.state_dict())


def write(folder: Path, content: object, **options: Any) -> Path:
    torch.save(content, folder / "net.pth", **options)
    return folder / "net.pth"


def load(weights: Path | str) -> str:
    """Load weights and return the note on them; checked to be the right ones, and nothing else."""
    net = make_net(0)
    state, description = read_weights(str(weights), net.state_dict())
    fit_state(net, state, name="net", origin=description)
    for key, value in net.state_dict().items():
        assert torch.equal(value, RIGHT[key]), key
    file, _ = split_weights(str(weights))
    return description.removeprefix(str(file)).strip(" ()")


def failure(weights: Path | str) -> str:
    """Return the message of a refusal, which is one line."""
    with pytest.raises(WeightsError) as caught:
        load(weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names ----


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "net.", "module._orig_mod.", "a.b.model.module."]
)
def test_read_weights_strips_prefixes(prefix: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, named(prefix))) == f"stripped {prefix}"
    save_file(named(prefix), tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors") == f"stripped {prefix}"


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_read_weights_strips_wrappers_inside_names(name: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, inside(name))) == f"stripped {name}."
    assert load(write(tmp_path, {"net": named("model.", inside(name))})) == f"took net; stripped model., {name}."


def test_read_weights_keeps_a_segment_that_the_model_has_itself(tmp_path: Path) -> None:
    net = nn.ModuleDict({"module": make_net(1)})
    for prefix in ("", "module.", "net."):
        state, _ = read_weights(str(write(tmp_path, named(prefix, net.state_dict()))), net.state_dict())
        assert set(state) == set(net.state_dict())


KEYS = (
    "state_dict model net network weights params model_state_dict model_state backbone ema model_ema state_dict_ema "
    "ema_state_dict swa_state_dict teacher student generator module"
)


@pytest.mark.parametrize("key", KEYS.split())
def test_read_weights_finds_a_state_under_any_key(key: str, tmp_path: Path) -> None:
    more = {"epoch": 3, "optimizer": trained_by(torch.optim.Adam), "scheduler": {"last": [0.1]}, "loss": torch.zeros(1)}
    assert load(write(tmp_path, {**more, key: RIGHT})) == f"took {key}"
    assert (
        load(write(tmp_path, {**more, "outer": [{key: named("module.")}]})) == f"took outer.0.{key}; stripped module."
    )


@pytest.mark.parametrize(
    "more",
    [
        {"features.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        {"n_averaged": torch.tensor(5)},
    ],
)
def test_read_weights_ignores_counters(more: State, tmp_path: Path) -> None:
    load(write(tmp_path, RIGHT | more))
    load(write(tmp_path, named("module.", RIGHT | more)))
    load(write(tmp_path, named("module.") | more))


def test_read_weights_leaves_other_parts_of_a_training_module_behind(tmp_path: Path) -> None:
    loss = {"criterion.weight": torch.zeros(5), "val_acc.tp": torch.zeros(5)}
    assert load(write(tmp_path, {"state_dict": named("model.") | loss})) == "took state_dict; stripped model."


def test_read_weights_of_the_models_parts_in_dictionaries(tmp_path: Path) -> None:
    parts = {part: {k.removeprefix(f"{part}."): v for k, v in RIGHT.items() if k.startswith(part)} for part in NET}
    load(write(tmp_path, parts))
    assert load(write(tmp_path, {"model": parts})) == "took model"


def test_read_weights_renames_behind_a_prefix(tmp_path: Path) -> None:
    target = {"denselayer1.norm1.weight": torch.zeros(2, 2)}
    old = {"module.denselayer1.norm.1.weight": torch.ones(2, 2), "module.AuxLogits.fc.weight": torch.ones(1)}
    state, _ = read_weights(str(write(tmp_path, {"state_dict": old})), target, rename_torchvision)
    assert torch.equal(state.pop("denselayer1.norm1.weight"), torch.ones(2, 2))
    assert not state


def test_read_weights_says_what_does_not_fit(tmp_path: Path) -> None:
    other = {key: value for key, value in RIGHT.items() if key != "fc.bias"} | {"more": torch.zeros(1)}
    for content in (other, {"net": named("module.", other)}):
        message = failure(write(tmp_path, content))
        assert "1 missing (fc.bias), 1 unexpected (more)" in message
    assert "instead of (5, 4)" in failure(write(tmp_path, {"net": RIGHT | {"fc.weight": torch.zeros(9, 4)}}))
    assert "8 missing" in failure(write(tmp_path, {"conv.weight": torch.zeros(3, 3)}))


# ---- several states ----


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "ema"),
        ("model", "model_ema"),
        ("model", "modelEMA"),
        ("model", "swa_model"),
        ("net", "avg_net"),
        ("net", "polyak"),
        ("net", "callbacks.EMA.weights"),
    ],
)
def test_read_weights_prefers_averaged_weights(plain: str, average: str, tmp_path: Path) -> None:
    def nested(key: str, state: State) -> dict[str, Any]:
        first, _, rest = key.partition(".")
        return {first: nested(rest, state) if rest else state}

    content = nested(plain, named("module.", WRONG)) | nested(average, named("module."))
    assert load(write(tmp_path, content)) == f"took {average}, not {plain}; stripped module."
    swapped = nested(plain, RIGHT) | nested(average, WRONG)
    assert load(f"{write(tmp_path, swapped)}:{plain}") == f"took {plain}"
    flat = named(f"{plain}.", WRONG) | named(f"{average}.")
    assert load(write(tmp_path, {"state_dict": flat})) == f"took state_dict.{average}, not state_dict.{plain}"
    assert load(write(tmp_path, WRONG | named(f"{average}."))) == f"took {average}, not ."


def test_read_weights_knows_an_averaged_model_by_its_counter(tmp_path: Path) -> None:
    assert load(write(tmp_path, averaged(2))) == "stripped module."
    assert load(write(tmp_path, {"one": WRONG, "two": averaged(2)})) == "took two, not one; stripped module."
    message = failure(write(tmp_path, {"one": WRONG, "swa": averaged(0)}))
    assert "several weights that fit, under one, swa" in message


@pytest.mark.parametrize(
    ("one", "two"), [("student", "teacher"), ("last", "best"), ("ema_0.99", "ema_0.999"), ("0", "1")]
)
def test_read_weights_asks_for_a_choice(one: str, two: str, tmp_path: Path) -> None:
    file = write(tmp_path, {one: WRONG, two: RIGHT, "plain": WRONG} if "ema" in one else {one: WRONG, two: RIGHT})
    message = failure(file)
    assert f"has several weights that fit, under {one}, {two}; choose" in message
    assert f"--weights {file}:{one}" in message
    assert load(f"{file}:{two}") == f"took {two}"
    assert "under 'absent'; it has them under" in failure(f"{file}:absent")
    flat = write(tmp_path, {"state_dict": named(f"{one}.", WRONG) | named(f"{two}.")})
    assert f"under state_dict.{one}, state_dict.{two}" in failure(flat)
    assert load(f"{flat}:state_dict.{two}") == f"took state_dict.{two}"
    assert "choose" in failure(f"{flat}:state_dict")


def test_read_weights_takes_either_of_equal_states(tmp_path: Path) -> None:
    copy = {key: value.clone() for key, value in RIGHT.items()}
    assert load(write(tmp_path, {"one": RIGHT, "two": copy})) == "took one, not two"


@pytest.mark.parametrize(
    "average",
    [
        {"ema": {"shadow_params": [torch.zeros(4, 3, 3, 3)]}},
        {"ema": {key: value for key, value in RIGHT.items() if "running" not in key}},
        {"optimizer_states": [{"ema": (torch.zeros(4, 3, 3, 3),)}]},
        {"state_dict": named("model.") | {"model_ema.features0weight": torch.zeros(4, 3, 3, 3)}},
        {"ema": make_net(1)},
    ],
)
def test_read_weights_does_not_silently_take_the_plain_ones(average: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {"state_dict": named("model.")} | average)
    assert "has averaged weights too, at " in failure(file)
    assert "--weights " in failure(file)
    load(f"{file}:state_dict")


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.AdamW, torch.optim.Adadelta])
def test_read_weights_does_not_take_an_optimizers_averages_for_weights(
    optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    more = {"ema": None, "ema_decay": 0.99, "optimizer": trained_by(optimizer), "acc_ema": np.float64(3)}
    assert "took model" in load(write(tmp_path, {"model": RIGHT, **more}))


# ---- what else is in a file ----

OTHERS = {
    "numpy number": np.float64(91.25),
    "numpy array": np.arange(3),
    "random state": np.random.RandomState(0).get_state(),
    "arguments": argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=Path("x"))),
    "namespace": types.SimpleNamespace(arch="net"),
    "config": Config(lr=0.1, sizes=[1, 2]),
    "history": History([0.1, 0.2]),
    "enum": Colour.RED,
    "slots": Slots(),
    "date": datetime.datetime(2024, 1, 2),
    "partial": functools.partial(print, end=""),
    "function": make_net,
    "dtype": np.dtype("float32"),
    "collections": [collections.defaultdict(list, a=[1]), collections.Counter("aa"), {1, 2}, frozenset("b"), b"bytes"],
    "numbers": [2**40, -1, 10**30, 1.5, complex(1, 2), None, True, ("a", "b", "c", "d")],
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_read_weights_skips_other_objects(zipped: bool, protocol: int, tmp_path: Path) -> None:
    content = {**OTHERS, "state_dict": RIGHT}
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    assert load(write(tmp_path, content, **options)).startswith("took state_dict; skipped numpy.")
    for name, value in OTHERS.items():
        assert load(write(tmp_path, {name: value, "state_dict": RIGHT}, **options)).startswith("took state_dict")


@pytest.mark.parametrize("zipped", [True, False])
def test_read_weights_next_to_other_objects_are_exact(zipped: bool, tmp_path: Path) -> None:
    """Views, shared and empty storages, types and layouts survive where torch's own reader refuses a file."""
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "view": base[1:, ::2],
        "transposed": base.t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base),
        **{str(dtype)[6:]: torch.tensor([1, 0]).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
        **{
            str(dtype)[6:]: torch.tensor([1, 0]).to(dtype)
            for dtype in (torch.bool, torch.int8, torch.uint8, torch.int32)
        },
    }
    content = {"state_dict": state, "args": argparse.Namespace(a=1)}
    read, _ = read_weights(str(write(tmp_path, content, _use_new_zipfile_serialization=zipped)), state)
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name


def test_read_weights_refuses_a_whole_model(tmp_path: Path) -> None:
    for content in (make_net(1), {"model": make_net(1), "epoch": 3}, [make_net(1)]):
        for zipped in (True, False):
            message = failure(write(tmp_path, content, _use_new_zipfile_serialization=zipped))
            assert "it holds a whole model, torch.nn.modules.container.ModuleDict" in message
            assert "torch.save(model.state_dict(), FILE)" in message


def test_read_weights_says_what_a_file_is_instead(tmp_path: Path) -> None:
    file = write(tmp_path, RIGHT)
    whole = file.read_bytes()
    for content, said in (
        (whole[:-200], "its end is missing; download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"", "cannot read the weights"),
    ):
        file.write_bytes(content)
        assert said in failure(file)
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    assert "torch.jit.load(FILE).state_dict()" in failure(file)


# ---- paths ----


@pytest.mark.parametrize("name", ["a b, c.pth", "C:net.pth", "net.pth:ema", "a:b:c"])
def test_read_weights_takes_any_path_that_exists_as_a_whole(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"one": RIGHT, "two: three": WRONG}).rename(tmp_path / name)
    assert load(f"{file}:one") == "took one"
    assert split_weights(f"{file}:two: three") == (file, "two: three")
    assert split_weights(str(file)) == (file, None)
    assert split_weights(f"{tmp_path}/absent:one") == (tmp_path / "absent:one", None)
