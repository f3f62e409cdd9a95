"""Whether TensorRT and a GPU are there, and known failures, recognized by what TensorRT, CUDA and torch say."""

import sys
from pathlib import Path

import pytest
import torch
from tensorrt_double import World, build

from clusterq_deploy.errors import TensorRTMissing
from clusterq_deploy.runtimes.tensorrt import unavailable_reason
from clusterq_deploy.runtimes.tensorrt.gpu import KNOWN_FAILURES, diagnose

# What was said when it happened to somebody, shortened.
MESSAGES = [
    (
        "driver too old",
        "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35. Please check "
        "your CUDA installation)",
    ),
    ("driver too old", "CUDA initialization failure with error 35. Please check your CUDA installation"),
    ("driver too old", "CUDA driver version is insufficient for CUDA runtime version"),
    ("driver too old", "The NVIDIA driver on your system is too old (found version 11040)."),
    ("no GPU", "CUDA initialization failure with error: 100"),
    ("no GPU", "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    ("no GPU", "no CUDA-capable device is detected"),
    ("unknown GPU", "Target GPU SM 120 is not supported by this TensorRT release."),
    ("host memory", "std::bad_alloc"),
    ("host memory", "MemoryError"),
    ("GPU memory", "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"),
    ("GPU memory", "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further info)"),
    ("GPU memory", "autotuning: User allocator error allocating 15485030400-byte buffer"),
    ("GPU memory", "CUDA out of memory. Tried to allocate 20.00 GiB."),
    ("no implementation", "Error Code 10: Internal Error (Could not find any implementation for node conv1.)"),
    ("no operator", 'Assertion failed: creator && "Plugin not found, are the plugin name and version correct?"'),
    ("no operator", "getPluginCreator could not find plugin: Round version: 1"),
    ("no operator", "No importer registered for op: DCNv2"),
    (
        "Turing",
        "Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot compile operation 'node_linear' "
        "for Turing (SM75): FP32 GEMM is not supported. In compileGraph at codeGenerator.cpp:2012)",
    ),
    ("CUDA broken", "CUDA initialization failure with error: 222. Please check your CUDA installation"),
]


def diagnosed(*messages: str) -> list[str]:
    """Return the names of the known failures whose cause and remedy the advice has."""
    diagnosis = diagnose(messages)
    assert "\n" not in diagnosis.advice
    assert "{what}" not in diagnosis.advice
    return [
        name
        for name, known in KNOWN_FAILURES.items()
        if diagnosis.advice.startswith(known.cause.partition("{")[0]) and diagnosis.advice.endswith(known.remedy)
    ]


@pytest.mark.parametrize(("name", "message"), MESSAGES)
def test_diagnose_recognizes_a_message_as_one_failure(name: str, message: str) -> None:
    assert diagnosed("something else", message) == [name]
    assert diagnose(["something else", message]).message == message


def test_messages_cover_the_known_failures() -> None:
    assert {name for name, _ in MESSAGES} == set(KNOWN_FAILURES)


def test_diagnose_names_the_layer_without_an_implementation() -> None:
    layer = "{ForeignNode[/a/Constant_36_output_0.../a/Slice_4]}"
    message = f"IBuilder::buildSerializedNetwork: Error Code 10 (Could not find any implementation for node {layer}.)"
    assert diagnosed(message) == ["no implementation"]
    assert diagnose([message]).advice.startswith(f"it has no kernel for the layer {layer}: raise --workspace")


def test_diagnose_prefers_memory_to_a_layer_without_an_implementation() -> None:
    messages = "Could not find any implementation for node conv1.", "Error Code 1: Cuda Runtime (out of memory)"
    assert diagnosed(*messages) == ["GPU memory"]


def test_diagnose_returns_none_for_unknown_messages() -> None:
    assert diagnose(["Assertion bound >= 0 failed."]) is None
    assert diagnose([]) is None


@pytest.mark.skipif(torch.cuda.is_available() or torch.version.cuda is None, reason="torch sees a GPU, or has no CUDA")
def test_unavailable_reason_names_the_missing_gpu_of_this_machine() -> None:
    no_gpu = KNOWN_FAILURES["no GPU"]
    assert f"{no_gpu.cause}: {no_gpu.remedy}" in (unavailable_reason() or "")


def test_unavailable_reason_distinguishes_an_old_driver_from_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = unavailable_reason()
    assert KNOWN_FAILURES["driver too old"].remedy in reason
    assert "\n" not in reason


def test_unavailable_reason_requires_tensorrt_10_3(world: World) -> None:
    assert unavailable_reason() is None
    world.move(version="10.2.0.post1")
    assert unavailable_reason() == "tensorrt 10.2.0.post1 is too old: install 10.3 or later"


def test_unavailable_reason_has_all_that_is_missing(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # the import system's own mark of a module that is not there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = unavailable_reason()
    assert "\n" not in reason
    assert "GPU" in reason or "without CUDA" in reason
    assert "pip install 'clusterq-deploy[tensorrt]'" in reason
    with pytest.raises(TensorRTMissing, match="tensorrt is not installed"):
        build(graph)


def test_unavailable_reason_distinguishes_a_broken_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open\\n object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert (unavailable_reason() or "").endswith("cannot be imported: libnvinfer.so.10: cannot open object file")
