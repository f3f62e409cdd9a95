"""What is known of the ways in which TensorRT and CUDA fail: how to tell them, and what a user can do."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFailure:
    """A failure that is told by what TensorRT, CUDA or torch says of it.

    Attributes:
        pattern: regular expression, found anywhere in one of their messages, in any case.
        cause: what is wrong; `{what}` is the pattern's group of that name.
        remedy: what to do.
    """

    pattern: str
    cause: str
    remedy: str


DRIVER_TOO_OLD = KnownFailure(
    r"CUDA initialization failure with error:? 35\b|driver version is insufficient|InsufficientDriver"
    r"|driver on your system is too old",
    "the NVIDIA driver is older than the CUDA release that is used",
    "install a newer driver, or the torch and TensorRT wheels of the CUDA release that nvidia-smi shows",
)
NO_GPU = KnownFailure(
    r"CUDA initialization failure with error:? 100\b|no CUDA-capable device|ErrorNoDevice"
    r"|Found no NVIDIA driver|No CUDA GPUs are available",
    "no NVIDIA GPU is visible to torch",
    "check nvidia-smi, CUDA_VISIBLE_DEVICES, and a container's --gpus",
)
UNKNOWN_GPU = KnownFailure(
    r"\bSM (?P<what>\S+) is not supported|Unsupported SM",
    "this release of TensorRT does not support this GPU",
    "install one whose support matrix names it",
)
HOST_MEMORY = KnownFailure(
    r"bad_alloc|\bMemoryError\b|host memory",
    "the computer's memory ran out",
    "close other programs, or give a container more",
)
GPU_MEMORY = KnownFailure(
    r"out of memory|OutOfMemory|MemoryAllocation\b|allocating \d+-byte buffer"
    r"|CUDA initialization failure with error:? 2\b",
    "the GPU's memory ran out",
    "end what else uses it (nvidia-smi lists it), or lower --workspace or the largest size of --batch",
)
NO_IMPLEMENTATION = KnownFailure(
    r"could not find any implementation for node (?P<what>.+?)[.)\s]*$",
    "it has no kernel for the layer {what}",
    "raise --workspace, end what else uses the GPU's memory, or install a newer TensorRT; clusterq check says which of "
    "its rules the graph breaks",
)
NO_OPERATOR = KnownFailure(
    r"plugin not found|could not find plugin|no importer registered for op",
    "an operator is neither TensorRT's own nor a plugin's",
    "replace it in the model, or load its plugin; clusterq check lists operators that are not ONNX's own",
)
CUDA_BROKEN = KnownFailure(
    r"CUDA initialization failure with error:? (?P<what>\d+)",
    "CUDA does not start (error {what})",
    "check nvidia-smi; after an update of the driver, restart",
)

KNOWN = (
    DRIVER_TOO_OLD,
    NO_GPU,
    UNKNOWN_GPU,
    HOST_MEMORY,
    GPU_MEMORY,  # a layer for which memory did not suffice has no implementation either: memory is the cause
    NO_IMPLEMENTATION,
    NO_OPERATOR,
    CUDA_BROKEN,
)
"""Every known failure; of several that fit, the first is the cause."""


@dataclass(frozen=True)
class Diagnosis:
    """A known failure in what was said: its cause and remedy as one clause, and the message that tells it."""

    advice: str
    message: str


def diagnose(messages: Iterable[str]) -> Diagnosis | None:
    """The known failure that messages tell of, or None."""
    said = list(messages)
    for known in KNOWN:
        for message in said:
            if match := re.search(known.pattern, message, re.IGNORECASE):
                cause = known.cause.format(**match.groupdict())
                return Diagnosis(f"{cause}: {known.remedy}", message)
    return None
