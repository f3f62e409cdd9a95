"""Models and images that no benchmark has: one class, dead channels, a class that never wins, images of one value."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import captured, images
from support import output_of, seeded, write_settings

from clusterq_deploy.quantization import BitWidths, calibrate, make_student
from clusterq_deploy.results.report import read_report

MODELS = """
import torch
from torch import nn


def net(classes, channels=3):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
    model.pretrained_cfg = {"input_size": (channels, 16, 16), "mean": (0.5,) * channels, "std": (0.25,) * channels}
    return model.eval()


def one_class():
    return net(1)


def dead_channels():
    model = net(5)
    model[1].weight.data[:3] = model[1].bias.data[:3] = model[1].running_var[:2] = 0
    return model


def a_class_that_never_wins():
    model = net(5)
    model[-1].weight.data[4], model[-1].bias.data[4] = 0, -100
    return model


def grey():
    return net(5, channels=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_class", "dead_channels", "a_class_that_never_wins", "grey"])
def test_run_of_an_odd_model_writes_a_report(tmp_path: Path, name: str) -> None:
    models, data, out = tmp_path / "models.py", tmp_path / "data.npz", tmp_path / "out"
    models.write_text(MODELS)
    settings = write_settings(tmp_path / "small.toml", bits=["w8a8", "w3a3"])
    rng, channels, classes = np.random.default_rng(0), 1 if name == "grey" else 3, 1 if name == "one_class" else 5
    pictures = rng.integers(0, 255, (12, 16, 16, channels), np.uint8)
    pictures[0] = 7  # all of one value
    np.savez(data, images=pictures, labels=rng.integers(0, classes, 12))
    output_of("run", f"{models}:{name}", "--config", settings, "--data", data, "--out", out)
    report = read_report(out / "report.json")
    assert [variant.name for variant in report.variants] == ["fp32", "w8a8", "w3a3"]
    scored = [entry for variant in report.variants for entry in variant.accuracy if entry.graph]
    assert len(scored) == 1 + 2 + 3  # each graph was verified, written and executed
    assert all(entry.top1 is not None for entry in scored)


def test_calibrate_fits_a_bias_much_larger_than_the_weights_to_the_accumulator() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] *= 1e-6
        linear.bias[:2] = torch.tensor([-100.0, 3000.0])
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear
    )
    student = make_student(captured(net.eval()), BitWidths.parse("w8a8"))
    calibrate(student, images(), batch_size=16, rng=seeded())
    step = student.accumulator_steps()["4"]
    assert bool((student.layers()["4"].bias.detach().abs() / step <= 2**29 * (1 + 1e-6)).all())
    with torch.no_grad():
        torch.testing.assert_close(student(images())[:, :2], net(images())[:, :2], rtol=1e-5, atol=0)
