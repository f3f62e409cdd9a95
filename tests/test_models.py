"""Models by every kind of name, their inputs and weights, and the errors of those that do not load."""

import dataclasses
import os
import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models as tv
from torchvision import transforms as T

from clusterq_deploy.errors import ModelError, NoBatchNormError, UnknownModelError, WeightsError
from clusterq_deploy.models import InputSpec, LoadedModel, available_models, load_model
from clusterq_deploy.models.digits import ASSETS, PRETRAINED_CFG, WEIGHTS, DigitsNet
from clusterq_deploy.models.inputs import input_spec, label_names
from clusterq_deploy.models.registry import torchvision_cfg

CPU = torch.device("cpu")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

NET = """
from dataclasses import dataclass
from pathlib import Path
from torch import nn

@dataclass
class Config:
    width: int = 4

def make():
    width = int(Path(__file__).with_name("width.txt").read_text())
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(Config(width).width), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return net
"""


def load(name: str, **options: object) -> LoadedModel:
    return load_model(name, device=CPU, **options)


def failure(kind: type[Exception], name: str, **options: object) -> str:
    """Return the message of the error that loading raises; checked to be of exactly this kind and one line."""
    with pytest.raises(kind) as caught:
        load(name, **options)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def spec_of(size: tuple[int, int, int], **settings: object) -> InputSpec:
    """Return an input that leaves pixels in [0, 1]."""
    return InputSpec(size=size, mean=(0.0,) * size[0], std=(1.0,) * size[0], **settings)


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    write(tmp_path / "width.txt", "7")
    return write(tmp_path / "net.py", NET)


# ---- digits ----


def test_digits_is_a_small_frozen_teacher() -> None:
    model = load("digits")
    convolutions = [module for module in model.module.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9
    assert all(convolution.bias is None for convolution in convolutions)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 1_000_000
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.original(images), model.module(images))
    assert model.original.pretrained_cfg == PRETRAINED_CFG
    assert (model.name, model.slug, model.source, model.classes) == ("digits", "digits", "bundled", 10)
    assert model.input == InputSpec(size=(1, 32, 32), mean=(0.305,), std=(0.325,), resize=32)
    assert model.parameters == sum(parameter.numel() for parameter in DigitsNet().parameters())
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())
    assert len(model.weights_sha256) == 64


def test_weights_sha256_differs_for_other_weights() -> None:
    trained, random = load("digits"), load("digits", weights="none")
    assert trained.weights_sha256 == load("digits").weights_sha256
    assert trained.weights_sha256 != random.weights_sha256
    assert random.weights_sha256 == load("digits", weights="none").weights_sha256


# ---- inputs ----


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (333, 512), (257, 300), (100, 150), (31, 31)])
def test_preprocess_computes_torchvisions_pixels(interpolation: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    resize = T.Resize(256, T.InterpolationMode(interpolation))
    reference = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(**IMAGENET)])
    spec = InputSpec(size=(3, 224, 224), resize=256, interpolation=interpolation, **IMAGENET)
    pixels = spec.preprocess(image)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, reference(image).numpy(), rtol=0, atol=1e-6)


def test_preprocess_only_crops_an_image_near_the_models_size() -> None:
    spec = spec_of((1, 6, 6), resize=8)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20), np.uint8)
    for rows, columns in ((6, 6), (7, 7), (8, 20), (6, 20)):
        cropped = spec.preprocess(Image.fromarray(pixels[:rows, :columns]))[0] * 255
        top, left = round((rows - 6) / 2), round((columns - 6) / 2)
        np.testing.assert_array_equal(np.rint(cropped), pixels[top : top + 6, left : left + 6])


@pytest.mark.parametrize("size", [(64, 128), (100, 100), (20, 300), (300, 20), (128, 64), (1, 1)])
def test_preprocess_always_covers_a_wide_crop(size: tuple[int, int]) -> None:
    spec = spec_of((3, 64, 128), resize=73)
    white = Image.new("RGB", size, "white")
    np.testing.assert_array_equal(spec.preprocess(white), np.ones((3, 64, 128), np.float32))


def test_preprocess_without_a_resize_squeezes_the_image() -> None:
    halves = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 40, axis=1).repeat(8, axis=0))
    pixels = spec_of((1, 4, 4)).preprocess(halves)
    assert pixels.shape == (1, 4, 4)
    assert (pixels[0, 0, 0], pixels[0, 0, 3]) == (0, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocess_accepts_modes_of_known_range(mode: str, channels: int) -> None:
    image = Image.new(mode.replace("PA", "P"), (4, 4))
    if mode == "PA":
        image.info["transparency"] = b"\x00\xff"
    assert spec_of((channels, 4, 4)).preprocess(image).shape == (channels, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (2, 8, 8)}, "2 channels"),
        ({"size": (3, 0, 8)}, "greater than 0"),
        ({"mean": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"mean": (123.7, 116.3, 103.5)}, r"expected values of pixels in \[0, 1\]"),
        ({"std": (1.0, 0.0, 1.0)}, "expected positive numbers"),
        ({"std": (1.0, float("nan"), 1.0)}, "expected positive numbers"),
        ({"resize": 7}, "resize is 7, less than the crop of 8x8"),
        ({"interpolation": "nearest"}, "'bilinear' or 'bicubic'"),
        ({"crop": 3}, "Extra inputs"),
    ],
)
def test_input_spec_refuses_values_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InputSpec(**{"size": (3, 8, 8), **IMAGENET, **change})


@pytest.mark.parametrize(
    ("cfg", "resize"),
    [
        ({"input_size": (3, 224, 224)}, 256),
        ({"input_size": (3, 299, 299)}, 342),
        ({"input_size": (3, 32, 32)}, 32),
        ({"input_size": (3, 224, 224), "crop_pct": 0.95}, 235),
        ({"input_size": (3, 224, 224), "crop_pct": 1.0}, 224),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9, "resize": 230}, 230),
    ],
)
def test_input_spec_takes_the_resize_of_pretrained_cfg(cfg: dict[str, object], resize: int) -> None:
    assert input_spec("net", {**IMAGENET, **cfg}).resize == resize
    assert input_spec("net", SimpleNamespace(**IMAGENET, **cfg)).resize == resize


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (None, "give --input-size --mean --std"),
        ({"input_size": (3, 8, 8), "mean": (0.5,) * 3}, "(std missing): give --std"),
        ({**IMAGENET, "input_size": (8, 8)}, "size is (8, 8); expected (channels, height, width)"),
        ({**IMAGENET, "input_size": 224}, "size is 224; expected (channels, height, width)"),
        ({**IMAGENET, "input_size": (3, 8, 8), "mean": "grey"}, "mean is 'grey'; expected one number per channel"),
        ({**IMAGENET, "input_size": (3, 8, 8), "interpolation": "lanczos"}, "expected bilinear or bicubic"),
        ({**IMAGENET, "input_size": (3, 8, 8), "crop_pct": 0}, "division by zero"),
        ({**IMAGENET, "input_size": (3, 8, 8), "crop_pct": 2}, "resize is 4, less than the crop"),
    ],
)
def test_input_spec_refuses_a_wrong_pretrained_cfg_in_one_line(cfg: object, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        input_spec("net", cfg)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- torchvision ----


def test_load_model_reads_torchvisions_transforms() -> None:
    model = load("resnet18", weights="none")
    assert model.input == InputSpec(size=(3, 224, 224), resize=256, **IMAGENET)
    assert (model.source, model.classes, model.parameters) == ("torchvision", 1000, 11_689_512)
    smaller = load("resnet18", weights="none", input_size=(3, 96, 96), mean=(0.5,) * 3)
    assert smaller.input == InputSpec(size=(3, 96, 96), resize=109, mean=(0.5,) * 3, std=IMAGENET["std"])


def test_load_model_reads_torchvisions_weights_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "shufflenet_v2_x0_5"
    default = tv.get_model_weights(name).DEFAULT
    cached = tmp_path / "hub" / "checkpoints" / default.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    net = tv.get_model(name)
    torch.save(net.state_dict(), cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = load(name)
    assert model.weights == str(default)
    assert torch.equal(model.module.fc.weight, net.fc.weight)


def test_load_model_says_what_to_do_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    message = failure(ModelError, "shufflenet_v2_x0_5")
    assert "cannot get the weights of 'shufflenet_v2_x0_5' from https://" in message
    assert "pass --weights FILE, or --weights none" in message


def test_load_model_reads_official_files_with_old_names_and_auxiliary_heads(tmp_path: Path) -> None:
    dense = tv.densenet121()
    old = {key: value for key, value in dense.state_dict().items() if not key.endswith("num_batches_tracked")}
    for layer in ("norm1", "norm2", "conv1", "conv2"):
        old = {key.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}."): value for key, value in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    save_file(old, tmp_path / "dense.safetensors")
    loaded = load("densenet121", weights=str(tmp_path / "dense.safetensors"), input_size=(3, 32, 32)).module
    for name in ("classifier.weight", "features.denseblock2.denselayer3.conv2.weight"):
        assert torch.equal(loaded.get_parameter(name), dense.get_parameter(name))

    inception = tv.googlenet(aux_logits=True, init_weights=False)
    torch.save(inception.state_dict(), tmp_path / "google.pth")
    loaded = load("googlenet", weights=str(tmp_path / "google.pth")).module
    assert any(node.name.startswith("mul") for node in loaded.graph.nodes)  # it transforms its input
    assert torch.equal(loaded.fc.weight, inception.fc.weight)


def test_load_model_refuses_a_model_without_batchnorm_before_it_fetches_weights() -> None:
    message = failure(NoBatchNormError, "squeezenet1_1")
    assert "'squeezenet1_1' (torchvision, SqueezeNet) has no BatchNorm layer" in message


@pytest.mark.parametrize(
    ("typo", "message"),
    [("resnet81", "resnet18"), ("Digit", "digits"), ("mobilenetv2", "mobilenet_v2"), ("zzz", "'zzz'; expected digits")],
)
def test_load_model_offers_near_names(typo: str, message: str) -> None:
    assert message in failure(UnknownModelError, typo)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_load_model_says_how_timm_is_installed() -> None:
    assert "pip install timm" in failure(ModelError, "timm:resnet18")


@pytest.mark.slow
def test_available_models_agree_with_the_models() -> None:
    entries = {entry.name: entry for entry in available_models()}
    assert next(iter(entries)) == "digits"
    assert entries["digits"].parameters == load("digits").parameters
    assert entries["resnet18"].input_size == (3, 224, 224)
    assert entries["resnet18"].top1 == pytest.approx(69.758)
    for name, entry in entries.items():
        if name == "digits" or name.startswith("regnet"):  # RegNet's widths are computed, which meta tensors cannot be
            continue
        with torch.device("meta"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            net = tv.get_model(name, **options)
        assert entry.has_batchnorm == any(isinstance(module, _BatchNorm) for module in net.modules()), name


# ---- weights from a file ----


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    ],
)
def test_load_model_reads_wrapped_torch_files(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    random = load("digits", weights="none").module.state_dict()
    state = {key: value.half().to(value.dtype) for key, value in random.items()}
    torch.save(wrap(state), tmp_path / "net.pth")
    save_file(state, tmp_path / "net.safetensors")
    model = load("digits", weights=str(tmp_path / "net.pth"))
    assert model.weights.startswith(str(tmp_path / "net.pth"))
    assert model.weights_sha256 == load("digits", weights=str(tmp_path / "net.safetensors")).weights_sha256


def test_load_model_refuses_weights_that_are_not_finite_or_do_not_fit(tmp_path: Path) -> None:
    file, state = tmp_path / "net.safetensors", load_file(WEIGHTS)
    state["bn1.weight"][3] = torch.nan
    save_file(state, file)
    assert "not finite, such as in bn1.weight" in failure(WeightsError, "digits", weights=str(file))
    del state["bn1.weight"]
    state["fc.weight"] = torch.zeros(7, 96)
    save_file(state | {f"extra{number}": torch.zeros(1) for number in range(5)}, file)
    message = failure(WeightsError, "digits", weights=str(file))
    assert "1 missing (bn1.weight)" in message
    assert "5 unexpected (extra0, extra1, extra2, ...)" in message
    assert "1 of another shape (fc.weight: (7, 96) instead of (10, 96))" in message


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_load_model_runs_no_code_of_a_pickle(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"state_dict": Malicious(trace)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        message = failure(WeightsError, "digits", weights=str(tmp_path / name))
        assert "refused to load" in message
        assert "save the state_dict as safetensors" in message
        assert not trace.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert trace.exists(), "the attack must work if nothing stops it"


def test_load_model_refuses_weights_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no weights file" in failure(WeightsError, "digits", weights=str(tmp_path / "absent.pth"))
    for name in ("text.pth", "text.safetensors"):
        file = write(tmp_path / name, "no weights")
        assert "safetensors" in failure(WeightsError, "digits", weights=str(file))
    whole = WEIGHTS.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in failure(WeightsError, "digits", weights=str(tmp_path / "cut.safetensors"))
    for number, content in enumerate(([1, 2], {}, {"state_dict": {"epoch": 1}}, {1: torch.zeros(1)}, torch.zeros(3))):
        torch.save(content, tmp_path / f"{number}.pth")
        message = failure(WeightsError, "digits", weights=str(tmp_path / f"{number}.pth"))
        assert "no state_dict" in message


# ---- a user's own module ----


def test_load_model_calls_a_users_factory(net_file: Path) -> None:
    model = load(f"{net_file}:make")
    assert (model.name, model.slug, model.source) == (f"{net_file}:make", "make", "file")
    assert model.classes == 7  # read through __file__
    assert model.input.size == (3, 8, 8)
    assert load(f"{net_file}:make").weights_sha256 == model.weights_sha256
    overridden = load(f"{net_file}:make", input_size=(3, 80, 96), std=(1.0, 1.0, 1.0))
    assert (overridden.input.size, overridden.input.resize) == ((3, 80, 96), 91)
    assert overridden.input.mean == (0.5,) * 3


def test_load_model_reads_weights_for_a_users_factory(net_file: Path) -> None:
    state = load(f"{net_file}:make").module.state_dict()
    state["0.weight"].fill_(0.25)
    save_file(state, net_file.with_name("net.safetensors"))
    model = load(f"{net_file}:make", weights=str(net_file.with_name("net.safetensors")))
    assert (model.module.get_parameter("0.weight") == 0.25).all()
    assert "makes its own weights" in failure(ModelError, f"{net_file}:make", weights="none")


FACTORIES = """
from torch import nn
def resnet_tiny(): return nn.Identity()
def raises(): raise KeyError('first\\nsecond')
def needs(width): ...
def nothing(): return None
def plain(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
def untracked(): return nn.BatchNorm2d(3, track_running_stats=False)
def unflattened(): return nn.BatchNorm2d(3)
def fails(): return nn.Sequential(nn.BatchNorm2d(5))
def ends(): raise SystemExit('no arguments')
"""


@pytest.mark.parametrize(
    ("kind", "factory", "message"),
    [
        (ModelError, "resnet_tini", "did you mean resnet_tiny?"),
        (ModelError, "xyz", "did you mean resnet_tiny or raises"),
        (ModelError, "raises", "KeyError"),
        (ModelError, "needs", "called without arguments, raised TypeError"),
        (ModelError, "ends", "raised SystemExit"),
        (ModelError, "nothing", "made a NoneType"),
        (NoBatchNormError, "plain", "no BatchNorm layer"),
        (NoBatchNormError, "untracked", "1 BatchNorm layers without running statistics"),
        (ModelError, "unflattened", "a tensor of shape (1, 3, 8, 8)"),
        (ModelError, "fails", "fails on an input of shape (1, 3, 8, 8)"),
    ],
)
def test_load_model_says_why_a_factory_fails(kind: type[Exception], factory: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "net.py", FACTORIES)
    size = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert message in failure(kind, f"{file}:{factory}", **size)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no such file"),
        ("def make(:", "SyntaxError"),
        ("import no_such_module_anywhere", "PYTHONPATH"),
        ("import sys\nsys.exit(0)", "raised SystemExit"),
        ("from torch import nn\ndef make(): return nn.BatchNorm2d(3)", "give --input-size --mean --std"),
    ],
)
def test_load_model_says_why_a_users_file_fails(code: str | None, message: str, tmp_path: Path) -> None:
    if code is not None:
        write(tmp_path / "net.py", code)
    assert message in failure(ModelError, f"{tmp_path}/net.py:make")


def test_load_model_leaves_the_process_unchanged(net_file: Path) -> None:
    meddling = "sys.path.insert(0, 'x'); torch.set_default_dtype(torch.float64); torch.rand(3)"
    net_file.write_text(f"{NET}\nimport sys, torch\n{meddling}\n")
    path, state, modules = list(sys.path), torch.get_rng_state(), set(sys.modules)
    model = load(f"{net_file}:make")
    load("resnet18", weights="none")
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert model.module.get_parameter("0.weight").dtype == torch.float32
    (added,) = {name for name in set(sys.modules) - modules if "user" in name}
    assert added.endswith("_net")
    assert dataclasses.is_dataclass(sys.modules[added].Config)


def test_class_label_has_the_names_that_the_model_knows(net_file: Path) -> None:
    """Torchvision's come with its weights, a user's with `pretrained_cfg`; random weights know no class."""
    assert label_names(torchvision_cfg("resnet18"), 1000)[:2] == ("tench", "goldfish")
    assert label_names({"label_names": ["a", "b"]}, 3) == label_names({"label_names": "abc"}, 3) == ()
    assert label_names(None, 3) == ()
    write(net_file.with_name("width.txt"), "2")
    named = "net.pretrained_cfg['label_names'] = ['a  cat', '1']; return net"
    write(net_file, NET.replace("return net", named))
    model = load(f"{net_file}:make")
    assert [model.class_label(index) for index in (0, 1)] == ["0 a cat", "1"]
    random = load("resnet18", weights="none")
    assert (random.class_names, random.class_label(7)) == ((), "7")
