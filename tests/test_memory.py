"""Memory that is not enough: work goes on in smaller batches, and a measurement that cannot is left out."""

import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import graph_of, reference
from nets import captured, images
from support import SMALL, edited_stages, output_of, run_python, small_config, write_settings
from torch import nn

from calib.synthesis import SynthesisConfig
from clusterq_deploy import Pipeline
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.errors import ExportError, OutOfMemoryError
from clusterq_deploy.evaluation import features as compare
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.lowering import GraphFormat, agreement, compare_integers, verify
from clusterq_deploy.oom import is_out_of_memory, retry_on_oom
from clusterq_deploy.quantization import FinetuneConfig, Student
from clusterq_deploy.report.text import notes
from clusterq_deploy.results.report import Skipped, read_report
from clusterq_deploy.runtimes.runners import Array, OnnxRunner, TorchRunner
from clusterq_deploy.stages import quantize, sensitivity, synthesize

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."
ORT = "Failed to allocate memory for requested buffer of size 9"


def limit_batches(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, largest: int, error: Callable[[], Exception]
) -> list[int]:
    """Make a method fail on batches of more images than `largest`; return a list that gets the size of each batch."""
    original, sizes = getattr(owner, method), list[int]()

    def limited(self: object, batch: Array) -> Any:
        sizes.append(len(batch))
        if len(batch) > largest:
            raise error()
        return original(self, batch)

    monkeypatch.setattr(owner, method, limited)
    return sizes


@pytest.fixture
def exported(tmp_path: Path) -> Pipeline:
    """Return a run whose float graph is exported."""
    settings = {"model": "digits", "limit": 60, "benchmark": {"batches": [1, 3], "min_seconds": 0, "rounds": 1}}
    run = Pipeline(make_config(settings), tmp_path / "run")
    run.write_config()
    run.export("fp32")
    return run


def test_evaluation_goes_on_in_smaller_batches_and_says_so(
    exported: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    class Limited(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 13:
                raise torch.OutOfMemoryError(CUDA)
            return x

    with TorchRunner(exported.model.original) as runner:
        whole = exported.predictions(runner)
    limited = nn.Sequential(Limited(), exported.model.original)
    with TorchRunner(limited) as runner:
        assert exported.predictions(runner).tolist() == whole.tolist()
    object.__setattr__(exported.model, "original", limited)
    assert exported.teacher_predictions().tolist() == whole.tolist()
    message = "evaluation on torch: there is not enough memory; again, with batches divided by"
    assert [record.getMessage() for record in caplog.records] == [f"{message} {divisor}" for divisor in (2, 4)] * 2


def test_evaluation_on_a_runtime_retries_only_what_lacked_memory(
    exported: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exported.teacher_predictions().tolist()
    reason = f"[ONNXRuntimeError] : 6 : bfc_arena.cc:376 {ORT}"
    sizes = limit_batches(
        monkeypatch, OnnxRunner, "infer", 30, lambda: ExportError(f"onnxruntime-cpu cannot run the graph: {reason}")
    )
    with OnnxRunner(exported.directory.path / "fp32/model.onnx") as runner:
        assert exported.predictions(runner).tolist() == expected
        assert sizes == [50, 25, 25, 5, 5]  # what was done is not done again, and what follows is as small
        reason = "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input"
        with pytest.raises(ExportError, match="invalid dimensions"):
            exported.predictions(runner)
    assert sizes == [50, 25, 25, 5, 5, 50]


def test_features_go_on_in_smaller_batches(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = limit_batches(monkeypatch, TorchRunner, "infer", 30, lambda: torch.OutOfMemoryError(CUDA))
    features = Pipeline(small_config(limit=60), run_copy).features().result.features
    assert sizes == [50, 25, 25, 25, 5, 25, 25, 10]
    assert (features.synthetic.images, features.real.images) == (80, 60)
    assert "features: there is not enough memory; again, with batches divided by 2" in caplog.text


def test_features_that_do_not_fit_are_left_out_for_now(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edited_stages(run_copy) as stages:
        del stages["features"]
    monkeypatch.setattr(compare, "_MAX_BYTES", 1 << 60)
    skipped = Pipeline(small_config(), run_copy).features().result.skipped
    assert skipped.startswith("features: there is not enough memory for batches of 1/64 either")
    monkeypatch.undo()
    again = Pipeline(small_config(), run_copy).features().result.features
    assert again.synthetic.images == 80


def test_compare_features_frees_the_room_that_it_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    separation = compare.separation

    def watched(*arguments: Any) -> Any:
        sizes.append(tracemalloc.get_traced_memory()[0])
        return separation(*arguments)

    monkeypatch.setattr(compare, "separation", watched)
    data = EvaluationSet.from_images("some", images(40).numpy(), [index % 4 for index in range(40)])
    tracemalloc.start()
    compare.compare_features(captured("residual"), data, None, classes=10, seed=0)
    tracemalloc.stop()
    assert sizes
    assert max(sizes) < compare._MAX_BYTES


def test_benchmark_that_lacked_memory_is_done_again_by_another_process(
    exported: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_batches(monkeypatch, OnnxRunner, "infer", 2, lambda: ExportError(ORT))
    record = exported.benchmark()
    assert [entry.batch for entry in record.result.latency["fp32"]] == [1]
    reason = "onnxruntime-cpu fp32/model.onnx: a batch of 3 does not fit the memory"
    assert record.result.skipped == [Skipped(stage="benchmark", reason=reason)]
    assert exported.benchmark() == record
    monkeypatch.undo()
    again, later = (Pipeline(exported.config, exported.directory.path).benchmark() for _ in range(2))
    assert [entry.batch for entry in again.result.latency["fp32"]] == [1, 3]
    assert later == again


@pytest.mark.slow
def test_synthesis_and_quantization_go_on_in_smaller_batches_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images, finetune, seen = synthesize.make_images, quantize.finetune, []
    sensitivities = sensitivity.sensitivities

    def limited_images(*args: object, config: SynthesisConfig, **options: object) -> object:
        seen.append((config.generator.batch_size, config.refine.batch_size))
        if config.generator.batch_size > 16:
            raise torch.OutOfMemoryError(CUDA)
        return make_images(*args, config=config, **options)

    def limited_finetune(*args: object, config: FinetuneConfig, **options: object) -> object:
        seen.append(config.batch_size)
        if config.batch_size > 4:
            torch.empty(1 << 60)  # more than any machine has: torch's own error of a CPU
        return finetune(*args, config=config, **options)

    def limited_sensitivities(*args: object, batch_size: int, **options: object) -> object:
        seen.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError(CUDA)
        return sensitivities(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(synthesize, "make_images", limited_images)
    monkeypatch.setattr(sensitivity, "sensitivities", limited_sensitivities)
    monkeypatch.setattr(quantize, "finetune", limited_finetune)
    generator = {"steps": 8, "warmup_steps": 4, "batch_size": 64}
    settings = write_settings(
        tmp_path / "small.toml",
        synthesis={"images": 64, "generator": generator, "refine": {"steps": 4, "batch_size": 64}},
        finetune={**SMALL["finetune"], "steps": 4},
    )
    out = tmp_path / "out"
    output_of("synthesize", "digits", "--config", settings, "--out", out)
    for stage in ("quantize", "sensitivity"):
        output_of(stage, out, "--bits", "w4a4")
    for stage in ("export", "report"):
        output_of(stage, out)
    assert seen == [(64, 64), (32, 32), (16, 16), 16, 8, 4, 16, 8]
    report = read_report(out / "report.json")
    assert report.calibration.batch_divisor == 4
    assert [note for note in notes(report) if "not enough memory" in note] == [
        f"{what} used batches of 1/4 of the configured size: there was not enough memory."
        for what in ("Synthesis", "Fine-tuning of w4a4")
    ]


# ---- graphs ----


@pytest.mark.parametrize("graph_format", ["onnxruntime", "tensorrt"])
def test_compare_integers_counts_each_once_in_any_batches(
    graph_format: GraphFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, graph = graph_of("residual", graph_format)
    batch = images(40, seed=7).numpy()
    whole = compare_integers(graph, student, batch, graph_format=graph_format)
    forward = Student.forward

    def limited(self: Student, x: torch.Tensor) -> torch.Tensor:
        logits = forward(self, x)
        if len(x) > 4:  # when its quantizers have run
            raise RuntimeError("could not create a primitive")
        return logits

    sizes = limit_batches(monkeypatch, OnnxRunner, "outputs", 8, lambda: ExportError(ORT))
    monkeypatch.setattr(Student, "forward", limited)
    assert compare_integers(graph, student, batch, graph_format=graph_format) == whole
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2]


def test_verify_and_agreement_go_on_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    student, graph = graph_of("residual", "onnxruntime")
    batch = images(32, seed=7)
    expected = reference(student, "onnxruntime", batch)
    whole = verify(graph, batch.numpy(), expected, name="residual", optimized=True)
    sizes = limit_batches(monkeypatch, OnnxRunner, "infer", 16, lambda: ExportError(ORT))
    assert verify(graph, batch.numpy(), expected, name="residual", optimized=True) == whole
    runner = OnnxRunner(graph.SerializeToString())
    assert agreement(runner, student, batch.numpy(), graph_format="onnxruntime", batch_size=20) == 100
    assert sizes == [32, 16, 16] * 2 + [20, 10, 10, 6, 6]


# ---- retries ----


def test_retry_on_oom_divides_the_batch_until_it_fits() -> None:
    def work(divisor: int) -> int:
        if divisor < 4:
            raise MemoryError
        return divisor

    assert retry_on_oom(work, "work") == (4, 4)


def test_retry_on_oom_raises_other_errors_and_gives_up_at_a_sixty_fourth() -> None:
    divisors: list[int] = []

    def work(divisor: int, message: str) -> None:
        divisors.append(divisor)
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shapes"):
        retry_on_oom(lambda divisor: work(divisor, "shapes do not fit"), "work")
    assert divisors == [1]
    with pytest.raises(OutOfMemoryError, match="work: there is not enough memory for batches of 1/64 either"):
        retry_on_oom(lambda divisor: work(divisor, "not enough memory: you tried to allocate 9 bytes"), "work")
    assert divisors == [1, 1, 2, 4, 8, 16, 32, 64]


def test_is_out_of_memory_knows_the_messages() -> None:
    for message in (
        "could not create a primitive",
        "could not execute a primitive",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        CUDA,
        "std::bad_alloc",
    ):
        assert is_out_of_memory(RuntimeError(message)), message
    for message in ("could not create a primitive descriptor for a convolution", "shapes do not fit"):
        assert not is_out_of_memory(RuntimeError(message)), message
    assert not is_out_of_memory(ValueError("out of memory"))


# in a process of its own, whose address space ends a little above what it has taken: real failures of oneDNN, of
# ONNX Runtime and of torch's allocator
REAL = """
import resource
import numpy as np
import torch
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.lowering import float_graphs
from clusterq_deploy.evaluation.accuracy import predictions
from clusterq_deploy.evaluation.latency import BenchmarkConfig, benchmark
from clusterq_deploy.models import load_model
from clusterq_deploy.runtimes.runners import OnnxRunner, TorchRunner

torch.set_num_threads(1)
model = load_model("digits", device=torch.device("cpu"))
graph = float_graphs(model.module, model.input.size, seed=0, name="fp32").fp32
images = np.random.default_rng(0).standard_normal((12000, *model.input.size), dtype=np.float32)
data = EvaluationSet.from_images("noise", images)
runners = {"torch": TorchRunner(model.module), "ort": OnnxRunner(graph.SerializeToString(), threads=1)}
whole = {name: predictions(runner, data, 50) for name, runner in runners.items()}
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((taken + 400 * 1024) * 1024, resource.RLIM_INFINITY))
for name, runner in runners.items():
    print(name, (predictions(runner, data, 12000) == whole[name]).mean())
config = BenchmarkConfig(batches=(1, 8192), min_seconds=0, warmup_ms=0, min_runs=3, rounds=1)
timings = benchmark(runners, model.input.size, config)
print([[record.batch for record in records] for records in timings.latencies.values()])
print(timings.skipped)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_real_lack_of_memory() -> None:
    done = run_python("-c", REAL)
    assert done.returncode == 0, done.stderr
    torch_line, ort_line, batches, unfit = done.stdout.splitlines()
    assert float(torch_line.removeprefix("torch ")) > 0.999
    assert float(ort_line.removeprefix("ort ")) > 0.999
    assert batches == "[[1], [1]]"
    assert unfit == str([f"{name}: a batch of 8192 does not fit the memory" for name in ("torch", "ort")])
    message = r"evaluation on (torch|onnxruntime-cpu): there is not enough memory; again, with batches divided by \d+"
    assert done.stderr
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(message, line)] == []
