"""Memory that does not suffice: work goes on in smaller batches, and a measurement that cannot is left out."""

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import images, make_net
from test_export import graph_of, reference
from test_pipeline import SMALL
from torch import nn

from clusterq_deploy import Pipeline
from clusterq_deploy.config.run_config import make_config
from clusterq_deploy.errors import ExportError, OutOfMemoryError
from clusterq_deploy.evaluation import features as compare
from clusterq_deploy.evaluation.data import EvaluationSet
from clusterq_deploy.lowering import GraphFormat, agreement, compare_integers, verify
from clusterq_deploy.oom import is_out_of_memory, retry_on_oom
from clusterq_deploy.quantization import Student
from clusterq_deploy.results.report import Skipped
from clusterq_deploy.runtimes.runners import Array, OnnxRunner, TorchRunner

ROOT = Path(__file__).parents[1]


def limited(largest: int, message: str) -> type[nn.Module]:
    """A layer that passes on batches of so many images, and has no memory for more."""

    class Limited(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > largest:
                raise torch.OutOfMemoryError(message)
            return x

    return Limited


def test_an_evaluation_that_does_not_fit_the_memory_goes_on_in_smaller_batches_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60}), tmp_path / "run")
    with TorchRunner(run.model.module) as runner:
        whole = run.predictions(runner)
    narrow = nn.Sequential(limited(13, "CUDA out of memory. Tried to allocate 2.00 GiB.")(), run.model.module)
    with TorchRunner(narrow) as runner:
        assert run.predictions(runner).tolist() == whole.tolist()
    object.__setattr__(run.model, "module", narrow)
    assert run.teacher_predictions().tolist() == whole.tolist()
    said = "evaluation on torch: the memory does not suffice; again, with batches divided by"
    assert [record.getMessage() for record in caplog.records] == [f"{said} {divisor}" for divisor in (2, 4)] * 2


def test_a_runtime_that_fails_for_want_of_memory_gets_smaller_batches_and_for_no_other_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60}), tmp_path / "run")
    run.write_config()
    run.export("fp32")
    calls: list[int] = []
    infer = OnnxRunner.infer

    def narrow(self: OnnxRunner, images: Array) -> Array:
        calls.append(len(images))
        if len(images) > 30:
            raise ExportError(f"onnxruntime-cpu cannot run the graph: {reason}")
        return infer(self, images)

    monkeypatch.setattr(OnnxRunner, "infer", narrow)
    reason = "[ONNXRuntimeError] : 6 : bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9"
    with OnnxRunner(tmp_path / "run/fp32/model.onnx") as runner:
        found = run.predictions(runner)
        assert found.tolist() == run.teacher_predictions().tolist()
        assert calls == [50, 25, 25, 5, 5]  # what was done is not done again, and what follows is as small
        reason = "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input"
        with pytest.raises(ExportError, match="invalid dimensions"):
            run.predictions(runner)
    assert calls == [50, 25, 25, 5, 5, 50]


def test_features_that_do_not_fit_the_memory_are_taken_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60, **SMALL}), tmp_path / "run")
    run.write_config()
    run.synthesize()
    infer, calls = TorchRunner.infer, []

    def narrow(self: TorchRunner, images: Array) -> Array:
        calls.append(len(images))
        if len(images) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return infer(self, images)

    monkeypatch.setattr(TorchRunner, "infer", narrow)
    found = run.features().result.features
    assert found is not None
    assert found.real is not None
    assert calls == [50, 25, 25, 25, 5, 25, 25, 10]
    assert (found.synthetic.images, found.real.images) == (80, 60)
    assert "features: the memory does not suffice; again, with batches divided by 2" in caplog.text


def test_memory_that_python_lacks_counts_too() -> None:
    def work(divisor: int) -> int:
        if divisor < 4:
            raise MemoryError
        return divisor

    assert retry_on_oom(work, "work") == (4, 4)


def test_other_errors_and_too_small_a_memory_are_raised() -> None:
    calls: list[int] = []

    def work(divisor: int, message: str) -> None:
        calls.append(divisor)
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shapes"):
        retry_on_oom(lambda divisor: work(divisor, "shapes do not fit"), "work")
    assert calls == [1]
    with pytest.raises(OutOfMemoryError, match="work: the memory does not suffice for batches of 1/64 either"):
        retry_on_oom(lambda divisor: work(divisor, "not enough memory: you tried to allocate 9 bytes"), "work")
    assert calls == [1, 1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("graph_format", ["onnxruntime", "tensorrt"])
def test_integers_are_counted_once_whatever_the_memory_suffices_for(
    graph_format: GraphFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, graph = graph_of("residual", graph_format)
    batch = images(40, seed=7).numpy()
    whole = compare_integers(graph, student, batch, graph_format=graph_format)
    outputs, forward, calls = OnnxRunner.outputs, Student.forward, []

    def narrow(self: OnnxRunner, some: Array) -> dict[str, Any]:
        calls.append(len(some))
        if len(some) > 8:
            raise ExportError("Failed to allocate memory for requested buffer of size 9")
        return outputs(self, some)

    def tight(self: Student, some: torch.Tensor) -> torch.Tensor:
        logits = forward(self, some)
        if len(some) > 4:  # when its quantizers are behind it
            raise RuntimeError("could not create a primitive")
        return logits

    monkeypatch.setattr(OnnxRunner, "outputs", narrow)
    monkeypatch.setattr(Student, "forward", tight)
    assert compare_integers(graph, student, batch, graph_format=graph_format) == whole
    assert calls == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2]


def test_a_graph_is_verified_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, graph = graph_of("residual", "onnxruntime")
    batch = images(32, seed=7)
    expected = reference(student, "onnxruntime", batch)
    whole = verify(graph, batch.numpy(), expected, name="residual", optimized=True)
    infer, calls = OnnxRunner.infer, []

    def narrow(self: OnnxRunner, some: Array) -> Array:
        calls.append(len(some))
        if len(some) > 16:
            raise ExportError("Failed to allocate memory for requested buffer of size 9")
        return infer(self, some)

    monkeypatch.setattr(OnnxRunner, "infer", narrow)
    assert verify(graph, batch.numpy(), expected, name="residual", optimized=True) == whole
    same = agreement(
        OnnxRunner(graph.SerializeToString()), student, batch.numpy(), graph_format="onnxruntime", batch_size=20
    )
    assert same == 100
    assert calls == [32, 16, 16] * 2 + [20, 10, 10, 6, 6]


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
found = benchmark(runners, model.input.size, config)
print([[record.batch for record in records] for records in found.latencies.values()])
print(found.skipped)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_memory_that_really_does_not_suffice() -> None:
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True, cwd=ROOT)
    torch_line, ort_line, batches, unfit = done.stdout.splitlines()
    assert float(torch_line.removeprefix("torch ")) > 0.999
    assert float(ort_line.removeprefix("ort ")) > 0.999
    assert batches == "[[1], [1]]"
    assert unfit == str([f"{name}: a batch of 8192 does not fit the memory" for name in ("torch", "ort")])
    said = r"evaluation on (torch|onnxruntime-cpu): the memory does not suffice; again, with batches divided by \d+"
    assert done.stderr
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(said, line)] == []


def test_what_is_of_memory() -> None:
    for message in (
        "could not create a primitive",
        "could not execute a primitive",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "std::bad_alloc",
    ):
        assert is_out_of_memory(RuntimeError(message)), message
    for message in ("could not create a primitive descriptor for a convolution", "shapes do not fit"):
        assert not is_out_of_memory(RuntimeError(message)), message
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_benchmark_that_lacked_memory_is_done_again_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": "digits", "limit": 60, "benchmark": {"batches": [1, 3], "min_seconds": 0, "rounds": 1}}
    run = Pipeline(make_config(settings), tmp_path / "run")
    run.write_config()
    run.export("fp32")
    infer = OnnxRunner.infer

    def narrow(self: OnnxRunner, some: Array) -> Array:
        if len(some) > 2:
            raise ExportError("Failed to allocate memory for requested buffer of size 9")
        return infer(self, some)

    monkeypatch.setattr(OnnxRunner, "infer", narrow)
    record = run.benchmark()
    assert [own.batch for own in record.result.latency["fp32"]] == [1]
    reason = "onnxruntime-cpu fp32/model.onnx: a batch of 3 does not fit the memory"
    assert record.result.skipped == [Skipped(stage="benchmark", reason=reason)]
    assert run.benchmark() == record
    monkeypatch.undo()
    again = Pipeline(make_config(settings), tmp_path / "run").benchmark()
    assert [own.batch for own in again.result.latency["fp32"]] == [1, 3]
    later = Pipeline(make_config(settings), tmp_path / "run").benchmark()
    assert later == again


def test_features_that_the_memory_does_not_suffice_for_are_left_out_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipeline(make_config({"model": "digits", "limit": 60, **SMALL}), tmp_path / "run")
    run.write_config()
    run.synthesize()
    monkeypatch.setattr(compare, "_ROOM", 1 << 60)
    found = run.features().result
    assert str(found.skipped).startswith("features: the memory does not suffice for batches of 1/64 either")
    monkeypatch.undo()
    again = Pipeline(make_config({"model": "digits", "limit": 60, **SMALL}), tmp_path / "run").features().result
    assert again.features is not None
    assert again.features.synthetic.images == 80


def test_room_for_a_comparison_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    separation = compare.separation

    def watched(*arguments: Any) -> Any:
        taken.append(tracemalloc.get_traced_memory()[0])
        return separation(*arguments)

    monkeypatch.setattr(compare, "separation", watched)
    some = EvaluationSet.from_images("some", images(40).numpy(), [index % 4 for index in range(40)])
    tracemalloc.start()
    compare.compare_features(make_net("residual"), some, None, classes=10, seed=0)
    tracemalloc.stop()
    assert taken
    assert max(taken) < compare._ROOM
