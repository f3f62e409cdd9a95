"""The library's log, diagnoses of its errors, and whether it and the GPU work here."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from clusterq_deploy.errors import ClusterQError, EngineError, TensorRTMissing
from clusterq_deploy.runtimes.tensorrt.library import RTX_TARGETS, TITLES, Library, in_use, library_problem, trt

logger = logging.getLogger(__name__)

_LAYERS = "Layers:"
_DRIVER_CALL = re.compile(r"\s*\[checkMacros\.cpp::catchCudaError\S* Error Code 1: Cuda Runtime \(.*\)")


@dataclass(frozen=True)
class KnownFailure:
    """A failure that is recognized by a message of TensorRT, CUDA or torch.

    Attributes:
        pattern: regular expression, searched for in a message, ignoring case.
        cause: what is wrong; `{what}` is the pattern's group of that name.
        remedy: what to do.
    """

    pattern: str
    cause: str
    remedy: str


KNOWN_FAILURES = {
    "driver too old": KnownFailure(
        r"CUDA initialization failure with error:? 35\b|driver version is insufficient|InsufficientDriver"
        r"|driver on your system is too old",
        "the NVIDIA driver is older than the CUDA release that is used",
        "install a newer driver, or the torch and TensorRT wheels of the CUDA release that nvidia-smi shows",
    ),
    "no GPU": KnownFailure(
        r"CUDA initialization failure with error:? 100\b|no CUDA-capable device|ErrorNoDevice"
        r"|Found no NVIDIA driver|No CUDA GPUs are available",
        "no NVIDIA GPU is visible to torch",
        "check nvidia-smi, CUDA_VISIBLE_DEVICES, and a container's --gpus",
    ),
    "unknown GPU": KnownFailure(
        r"\bSM (?P<what>\S+) is not supported|Unsupported SM",
        "this release of TensorRT does not support this GPU",
        "install one whose support matrix names it",
    ),
    "host memory": KnownFailure(
        r"bad_alloc|\bMemoryError\b|host memory",
        "the computer's memory ran out",
        "close other programs, or give a container more",
    ),
    # before "no implementation": for lack of memory TensorRT reports that too
    "GPU memory": KnownFailure(
        r"out of memory|OutOfMemory|MemoryAllocation\b|allocating \d+-byte buffer"
        r"|CUDA initialization failure with error:? 2\b",
        "the GPU's memory ran out",
        "end what else uses it (nvidia-smi lists it), or lower --workspace or the largest size of --batch",
    ),
    "no implementation": KnownFailure(
        r"could not find any implementation for node (?P<what>.+?)[.)\s]*$",
        "it has no kernel for the layer {what}",
        "raise --workspace, end what else uses the GPU's memory, or install a newer TensorRT; clusterq check lists "
        "the rules that the graph breaks",
    ),
    "no operator": KnownFailure(
        r"plugin not found|could not find plugin|no importer registered for op",
        "an operator is neither TensorRT's own nor a plugin's",
        "replace it in the model, or load its plugin; clusterq check lists operators that are not ONNX's own",
    ),
    "Turing": KnownFailure(
        r"Cannot compile operation '(?P<what>[^']*)' for Turing",
        "Turing (sm75) has no kernel for {what}",
        "use a graph in FP16 (clusterq export RUN --fp16), or leave sm75 out of --rtx",
    ),
    "CUDA broken": KnownFailure(
        r"CUDA initialization failure with error:? (?P<what>\d+)",
        "CUDA does not start (error {what})",
        "check nvidia-smi; after an update of the driver, restart",
    ),
}
"""Every known failure; if several match, the first is the cause."""


@dataclass(frozen=True)
class Diagnosis:
    """A recognized failure: its cause and remedy as one clause, and the message that matched."""

    advice: str
    message: str


def diagnose(messages: Sequence[str]) -> Diagnosis | None:
    """Return the known failure that one of the messages describes, or None."""
    for failure in KNOWN_FAILURES.values():
        for message in messages:
            if match := re.search(failure.pattern, message, re.IGNORECASE):
                return Diagnosis(f"{failure.cause.format(**match.groupdict())}: {failure.remedy}", message)
    return None


def tensorrt_log() -> trt.ILogger:
    """Return the logger that all objects of the library in use share: it uses the first one for the whole process.

    Errors and warnings are logged as such, information at debug level, and verbose messages are dropped. `errors` has
    the last error messages, `layers` the verbose message of TensorRT-RTX with its kernels. The library calls the logger
    from its own threads.
    """
    return _log(in_use())


@cache
def _log(_: Library) -> trt.ILogger:
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding requires this call instead of super()
            self.errors: deque[str] = deque(maxlen=10)
            self.layers = ""

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if (level := levels.get(severity)) is None:
                if msg.startswith(_LAYERS):
                    self.layers = msg
                return
            logger.log(level, "%s", msg)
            if level == logging.ERROR:
                self.errors.append(msg)

    return Log()


def without_driver(message: str) -> str:
    """Return a message in one line, without the failed call of a driver that TensorRT-RTX appends if there is none."""
    line = " ".join(message.split())
    return line if in_use() == "tensorrt" or torch.cuda.is_available() else _DRIVER_CALL.sub("", line)


def failure(message: str, *details: str) -> EngineError:
    """Return an EngineError of one line: what failed, why, and what to do if that is known.

    `details` are messages in addition to the errors that TensorRT logged since `explained` began.
    """
    lines = list(filter(None, map(without_driver, (*details, *tensorrt_log().errors))))
    if diagnosis := diagnose(lines):
        return EngineError(f"{message}: {diagnosis.advice} ({title()}: {diagnosis.message})")
    return EngineError("; ".join([message, *lines]))


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Clear what was logged earlier, and turn what the bindings raise in the block into an EngineError.

    The bindings raise TypeError if an object cannot be created, MemoryError for C++'s bad_alloc, and ValueError or
    RuntimeError otherwise. `action` is what the block does, for the message: `start the builder`.

    Raises:
        EngineError: the block raised one of these; a `ClusterQError` is unchanged.
    """
    log = tensorrt_log()
    log.errors.clear()
    log.layers = ""
    try:
        yield
    except ClusterQError:
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise failure(f"{title()} cannot {action}", str(error) or type(error).__name__) from error


def title() -> str:
    """Return the name of the library in use, for messages."""
    return TITLES[in_use()]


def unavailable_reason(library: Library = "tensorrt") -> str | None:
    """Return one line with everything that prevents running the engines of a library here, or None."""
    return "; ".join(filter(None, (gpu_problem(library), library_problem(library)))) or None


def build_problem(library: Library) -> str | None:
    """Return one line with what prevents building engines here, or None: only TensorRT needs a GPU for it."""
    return unavailable_reason() if library == "tensorrt" else library_problem(library)


def require(problem: str | None) -> None:
    """Raise TensorRTMissing if there is a problem.

    Raises:
        TensorRTMissing: its message is `problem`.
    """
    if problem:
        raise TensorRTMissing(problem)


def gpu_problem(library: Library = "tensorrt") -> str | None:
    """Return one line with the reason why torch or a library cannot use a GPU, and a remedy; None if they can."""
    if torch.cuda.is_available():
        if library == "tensorrt":
            return None
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        if f"sm{gpu.major}{gpu.minor}" in RTX_TARGETS:
            return None
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}; TensorRT-RTX runs on {', '.join(RTX_TARGETS)}"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build for the CUDA that nvidia-smi shows"
    try:
        torch.cuda.init()  # unlike is_available, it reports the reason
    except RuntimeError as error:
        if diagnosis := diagnose([str(error)]):
            return diagnosis.advice
    no_gpu = KNOWN_FAILURES["no GPU"]
    return f"{no_gpu.cause}: {no_gpu.remedy}"


def start_builder() -> None:
    """Start TensorRT's builder, which loads its libraries and uses the GPU; a wrong driver may crash the process.

    Raises:
        EngineError: it does not start.
    """
    with explained("start the builder"):
        trt.Builder(tensorrt_log())
