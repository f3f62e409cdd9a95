"""`clusterq run --dry-run`: what would be done, what it would take, and that nothing is written."""

from pathlib import Path

import pytest
from support import call, error_line, json_of, read_files

from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.plan import StepTimes, amounts, peak_memory, plan
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.run.run import Run


def to_do(settings: Path, out: Path, *options: object) -> set[str]:
    """Return the stages that a run would do, without the engines, which only some machines can build."""
    plan = json_of("run", "digits", "--config", settings, "--out", out, "--dry-run", *options)
    return {stage["stage"] for stage in plan["stages"] if stage["state"] == "to do" and "build/" not in stage["stage"]}


def test_plan_of_a_new_run_has_every_stage_and_writes_nothing(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = json_of("run", "digits", "--config", settings, "--bits", "w8a8", "--out", out, "--dry-run")
    by_stage = {stage["stage"]: stage for stage in plan["stages"]}
    variants = {f"{kind}/{variant}" for kind in ("export", "build", "evaluate") for variant in ("fp32", "w8a8")}
    assert set(by_stage) == {"synthesize", "quantize/w8a8", "features", "benchmark", *variants}
    assert all(stage["state"] == "to do" for name, stage in by_stage.items() if "build/" not in name)
    assert by_stage["synthesize"]["work"] == "12 steps of 40, then 80 images: 12 steps for each of 1 batches"
    assert by_stage["evaluate/w8a8"]["work"] == "100 images"
    assert 0 < by_stage["synthesize"]["seconds"] < 600
    assert by_stage["quantize/w8a8"]["seconds"] > 0
    assert by_stage["export/w8a8"]["seconds"] is None
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] or 0 for stage in plan["stages"]))
    assert 1e8 < plan["memory_bytes"] < 1e11
    assert plan["settings"]["synthesis.images"] == 80
    assert plan["scaled"] == {}
    assert not out.exists()


def test_plan_of_a_finished_run_has_what_a_changed_option_redoes(settings: Path, finished_run: Path) -> None:
    before = read_files(finished_run)
    assert to_do(settings, finished_run) == set()
    shown = call("run", "digits", "--config", settings, "--out", finished_run, "--dry-run").stdout
    assert "Everything is finished" in shown
    evaluations = {"evaluate/fp32", "evaluate/w8a8", "evaluate/w4a4"}
    assert to_do(settings, finished_run, "--limit", 50) == {*evaluations, "features"}
    of_images = {f"{kind}/{bits}" for kind in ("quantize", "export", "evaluate") for bits in ("w8a8", "w4a4")}
    assert to_do(settings, finished_run, "--images", 60) == {"synthesize", "features", "benchmark", *of_images}
    added = {"quantize/w8a4", "export/w8a4", "evaluate/w8a4", "benchmark"}
    assert to_do(settings, finished_run, "--bits", "w8a8", "--bits", "w8a4") == added
    assert read_files(finished_run) == before


def test_plan_finds_what_is_wrong_before_the_work(settings: Path, tmp_path: Path) -> None:
    data = tmp_path / "nowhere"
    assert "does not exist" in error_line("run", "digits", "--config", settings, "--dry-run", "--data", data)


def test_seconds_are_passes_times_the_time_of_one() -> None:
    times = StepTimes(forward=0.01, forward_mixed=0.004)
    config = make_config({"model": "digits", "bits": ["w4a4"]})
    tuned = {bits: config.finetune.scaled_to(BitWidths.parse(bits)).steps * 32 * 4 for bits in ("w4a4", "w8a8")}
    for stage, seconds in {
        "synthesize": 0.004 * (100 * 64 * 8 + 1024 * 60 * 6),
        "quantize/w4a4": 0.01 * (3000 + 1024 * 25) + 0.004 * tuned["w4a4"],
        "quantize/w8a8": 0.01 * (3000 + tuned["w8a8"]),
        "evaluate/fp32": 100 * 2 * 0.01,
        "evaluate/w4a4": 100 * 4 * 0.01,
        "features": 4 + (1024 + 100) * 0.01,
        "benchmark": 2 * (0.2 + 3) + 2 * (0.2 + 10 * 32 * 0.01),
    }.items():
        assert times.seconds(stage, config, 100) == pytest.approx(seconds), stage
    assert times.seconds("export/w4a4", config, 100) is None


@pytest.mark.parametrize("name", ["regnet_y_128gf", "densenet121", "inception_v3", "efficientnet_v2_l"])
def test_plan_of_a_torchvision_model_computes_no_pass_and_makes_no_weights(name: str, tmp_path: Path) -> None:
    """What makes it answer in seconds: of 645 million parameters none is made, and no map of 224 pixels."""
    config = make_config({"model": name, "weights": "none", "device": "cpu"})
    run = Run(config, tmp_path / "out", shapes_only=True)
    assert all(tensor.is_meta for tensor in run.model.module.state_dict().values())
    assert peak_memory(run, run.config.widths) > 1e9
    planned = plan(config, tmp_path / "out")
    assert planned.seconds > 60
    assert [stage.state for stage in planned.stages if stage.stage == "synthesize"] == ["to do"]
    assert not (tmp_path / "out").exists()


UNREGISTERED = """
import torch
from torch import nn

class Net(nn.Sequential):
    pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images):
        return super().forward(images * self.scale)

def make():
    net = Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net.scale = torch.ones(1, 3, 1, 1)  # not registered, so that it stays on its device
    return net
"""


def test_plan_of_a_module_whose_tensors_are_not_all_registered(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(UNREGISTERED)
    planned = plan(make_config({"model": f"{tmp_path / 'net.py'}:make", "device": "cpu"}), tmp_path / "out")
    assert planned.seconds > 0
    assert planned.memory_bytes is not None


def test_amounts_of_a_large_model_are_scaled_and_those_asked_for_stay(tmp_path: Path) -> None:
    config = make_config({"model": "resnet18", "weights": "none", "bits": ["w4a4"], "device": "cpu"})
    asked, done = amounts(config), amounts(Run(config, tmp_path / "out", shapes_only=True).config)
    assert (asked["synthesis.images"], done["synthesis.images"]) == (1024, 256)
    assert (asked["finetune.steps"], done["finetune.steps"]) == (600, 150)
    assert asked["synthesis.refine.steps"] == done["synthesis.refine.steps"]
