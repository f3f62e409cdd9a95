"""`clusterq run --dry-run`: what would be done, what it would take, and that nothing is written."""

import json
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner, Result
from test_pipeline import SMALL

from cli.main import main
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.plan import StepTimes, amounts, peak_memory, plan
from clusterq_deploy.quantization import BitWidths
from clusterq_deploy.run.run import Run

EXPECTED = StepTimes(forward=0.01, forward_mixed=0.004)


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "small.toml"
    path.write_text(tomli_w.dumps({"limit": 60, "bits": ["w8a8"], **SMALL}))
    return path


@pytest.fixture(scope="module")
def finished(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    result = call("run", "digits", "--config", settings, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states(settings: Path, out: Path, *more: object) -> dict[str, str]:
    result = call("run", "digits", "--config", settings, "--out", out, "--dry-run", "--json", *more)
    assert result.exit_code == 0, result.output
    return {stage["stage"]: stage["state"] for stage in json.loads(result.stdout)["stages"]}


def test_a_new_run_is_planned_whole_and_nothing_is_written(settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("run", "digits", "--config", settings, "--out", out, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    by_stage = {stage["stage"]: stage for stage in plan["stages"]}
    assert {name for name, stage in by_stage.items() if stage["state"] == "to do"} == {
        "export/fp32",
        "synthesize",
        "quantize/w8a8",
        "export/w8a8",
        "evaluate/fp32",
        "evaluate/w8a8",
        "features",
        "benchmark",
    } | {name for name in by_stage if name.startswith("build/") and by_stage[name]["state"] != "skipped"}
    assert by_stage["synthesize"]["work"] == "12 steps of 40, then 80 images: 12 steps for each of 1 batches"
    assert by_stage["evaluate/w8a8"]["work"] == "60 images"
    assert 0 < by_stage["synthesize"]["seconds"] < 600
    assert by_stage["quantize/w8a8"]["seconds"] > 0
    assert by_stage["export/w8a8"]["seconds"] is None
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] or 0 for stage in plan["stages"]))
    assert 1e8 < plan["memory_bytes"] < 1e11
    assert plan["settings"]["synthesis.images"] == 80
    assert plan["scaled"] == {}
    assert not out.exists()


def test_finished_stages_are_not_done_again(settings: Path, finished: Path) -> None:
    before = contents(finished)
    assert set(states(settings, finished).values()) <= {"finished", "skipped"}
    shown = call("run", "digits", "--config", settings, "--out", finished, "--dry-run").stdout
    assert "Everything is finished" in shown
    assert contents(finished) == before


def test_a_changed_option_redoes_what_depends_on_it(settings: Path, finished: Path) -> None:
    before = contents(finished)
    limited = states(settings, finished, "--limit", 50)
    assert {stage for stage, state in limited.items() if state == "to do"} == {
        "evaluate/fp32",
        "evaluate/w8a8",
        "features",
    }
    images = states(settings, finished, "--images", 60)
    assert {stage for stage, state in images.items() if state == "finished"} == {"export/fp32", "evaluate/fp32"}
    wider = states(settings, finished, "--bits", "w8a8", "--bits", "w8a4")
    assert {stage for stage, state in wider.items() if state == "to do" and not stage.startswith("build/")} == {
        "quantize/w8a4",
        "export/w8a4",
        "evaluate/w8a4",
        "benchmark",
    }
    assert contents(finished) == before


def test_a_plan_finds_what_is_wrong_before_the_work(settings: Path, tmp_path: Path) -> None:
    result = call("run", "digits", "--config", settings, "--dry-run", "--data", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_the_estimate_is_passes_times_their_seconds() -> None:
    config = make_config({"model": "digits", "bits": ["w4a4"]})
    passes = 100 * 64 * 8 + 1024 * 60 * 6
    assert EXPECTED.seconds("synthesize", config, 100) == pytest.approx(0.004 * passes)
    steps = config.finetune.steps * config.finetune.batch_size
    assert EXPECTED.seconds("quantize/w4a4", config, 100) == pytest.approx(
        0.01 * (3000 + 1024 * 25) + 0.004 * steps * 4
    )
    fewer = config.finetune.scaled_to(BitWidths(8, 8))
    steps = fewer.steps * fewer.batch_size
    assert EXPECTED.seconds("quantize/w8a8", config, 100) == pytest.approx(0.01 * (3000 + steps * 4))
    assert EXPECTED.seconds("evaluate/fp32", config, 100) == pytest.approx(100 * 2 * 0.01)
    assert EXPECTED.seconds("evaluate/w4a4", config, 100) == pytest.approx(100 * 4 * 0.01)
    assert EXPECTED.seconds("benchmark", config, 100) == pytest.approx(2 * (0.2 + 3) + 2 * (0.2 + 10 * 32 * 0.01))
    assert EXPECTED.seconds("export/w4a4", config, 100) is None


@pytest.mark.parametrize("name", ["resnet50", "regnet_y_128gf", "densenet121", "inception_v3", "efficientnet_v2_l"])
def test_a_plan_computes_no_pass_of_the_model_and_makes_no_weights(name: str, tmp_path: Path) -> None:
    """What makes it answer in seconds: of 645 million parameters none is made, and no map of 224 pixels."""
    config = make_config({"model": name, "weights": "none", "device": "cpu"})
    run = Run(config, tmp_path / "out", shapes_only=True)
    assert all(tensor.is_meta for tensor in run.model.module.state_dict().values())
    assert peak_memory(run, run.config.widths) > 1e9
    found = plan(config, tmp_path / "out")
    assert found.seconds > 60
    assert [own.state for own in found.stages if own.stage == "synthesize"] == ["to do"]
    assert not (tmp_path / "out").exists()


OWN = """
import torch
from torch import nn

class Net(nn.Sequential):
    pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images):
        return super().forward(images * self.scale)

def make():
    net = Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net.scale = torch.ones(1, 3, 1, 1)  # not registered, so that it stays where it is
    return net
"""


def test_a_module_of_ones_own_need_not_have_all_its_tensors_registered(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN)
    config = make_config({"model": f"{tmp_path / 'net.py'}:make", "device": "cpu"})
    found = plan(config, tmp_path / "out")
    assert found.seconds > 0
    assert found.memory_bytes is not None


def test_settings_scaled_to_a_large_model_are_told_from_those_asked_for(tmp_path: Path) -> None:
    config = make_config({"model": "resnet18", "weights": "none", "bits": ["w4a4"], "device": "cpu"})
    run = Run(config, tmp_path / "out")
    asked, done = amounts(run.asked), amounts(run.config)
    assert (asked["synthesis.images"], done["synthesis.images"]) == (1024, 256)
    assert (asked["finetune.steps"], done["finetune.steps"]) == (1200, 300)
    assert asked["synthesis.refine.steps"] == done["synthesis.refine.steps"]
