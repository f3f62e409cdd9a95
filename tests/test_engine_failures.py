"""Known failures of TensorRT, CUDA and torch are told by what they say, in their own words."""

import sys

import pytest
import torch
from tensorrt_double import install

from clusterq_deploy.runtimes.tensorrt import failures, unavailable_reason
from clusterq_deploy.runtimes.tensorrt.failures import KNOWN, KnownFailure, diagnose

# What was said where it happened to somebody, shortened.
SAID = [
    (
        failures.DRIVER_TOO_OLD,
        "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: 35. Please check "
        "your CUDA installation)",
    ),
    (failures.DRIVER_TOO_OLD, "CUDA initialization failure with error 35. Please check your CUDA installation"),
    (failures.DRIVER_TOO_OLD, "CUDA driver version is insufficient for CUDA runtime version"),
    (failures.DRIVER_TOO_OLD, "The NVIDIA driver on your system is too old (found version 11040)."),
    (failures.NO_GPU, "CUDA initialization failure with error: 100"),
    (failures.NO_GPU, "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    (failures.NO_GPU, "no CUDA-capable device is detected"),
    (failures.UNKNOWN_GPU, "Target GPU SM 120 is not supported by this TensorRT release."),
    (failures.HOST_MEMORY, "std::bad_alloc"),
    (failures.HOST_MEMORY, "MemoryError"),
    (failures.GPU_MEMORY, "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"),
    (failures.GPU_MEMORY, "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further info)"),
    (failures.GPU_MEMORY, "autotuning: User allocator error allocating 15485030400-byte buffer"),
    (failures.GPU_MEMORY, "CUDA out of memory. Tried to allocate 20.00 GiB."),
    (failures.NO_IMPLEMENTATION, "Error Code 10: Internal Error (Could not find any implementation for node conv1.)"),
    (failures.NO_OPERATOR, 'Assertion failed: creator && "Plugin not found, are the plugin name and version correct?"'),
    (failures.NO_OPERATOR, "getPluginCreator could not find plugin: Round version: 1"),
    (failures.NO_OPERATOR, "No importer registered for op: DCNv2"),
    (failures.CUDA_BROKEN, "CUDA initialization failure with error: 222. Please check your CUDA installation"),
]


def told(known: KnownFailure, advice: str) -> bool:
    return advice.startswith(known.cause.partition("{")[0]) and advice.endswith(known.remedy)


@pytest.mark.parametrize(("known", "message"), SAID)
def test_is_told_by_its_message_and_by_that_alone(known: KnownFailure, message: str) -> None:
    found = diagnose(["something else", message])
    assert found is not None
    assert found.message == message
    assert [own for own in KNOWN if told(own, found.advice)] == [known]
    assert "\n" not in found.advice
    assert "{" not in found.advice


def test_every_known_failure_has_a_message_that_tells_it() -> None:
    assert {known.cause for known, _ in SAID} == {known.cause for known in KNOWN}


def test_names_the_layer_without_an_implementation() -> None:
    layer = "{ForeignNode[/a/Constant_36_output_0.../a/Slice_4]}"
    found = diagnose(
        [f"IBuilder::buildSerializedNetwork: Error Code 10 (Could not find any implementation for node {layer}.)"]
    )
    assert found is not None
    assert found.advice.startswith(f"it has no kernel for the layer {layer}: raise --workspace")


def test_memory_that_ran_out_is_the_cause_of_a_layer_without_an_implementation() -> None:
    found = diagnose(
        ["Could not find any implementation for node conv1.", "Error Code 1: Cuda Runtime (out of memory)"]
    )
    assert found is not None
    assert told(failures.GPU_MEMORY, found.advice)


def test_what_is_not_known_is_not_explained() -> None:
    assert diagnose(["Assertion bound >= 0 failed."]) is None
    assert diagnose([]) is None


@pytest.mark.skipif(torch.cuda.is_available() or torch.version.cuda is None, reason="torch sees a GPU, or has no CUDA")
def test_this_machine_has_no_gpu() -> None:
    reason = unavailable_reason()
    assert reason is not None
    assert f"{failures.NO_GPU.cause}: {failures.NO_GPU.remedy}" in reason


def test_an_old_driver_is_told_from_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = unavailable_reason()
    assert reason is not None
    assert failures.DRIVER_TOO_OLD.remedy in reason
    assert "\n" not in reason


def test_a_release_before_10_3_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert unavailable_reason() is None
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.2.0.post1")
    assert unavailable_reason() == "tensorrt 10.2.0.post1 is too old: install 10.3 or later"
