"""What TensorRT says while it works: to Python's logging, and into the message of an error."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from clusterq_deploy.errors import ClusterQError, EngineError
from clusterq_deploy.runtimes.tensorrt.failures import diagnose

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)


@cache
def tensorrt_log() -> trt.ILogger:
    """The one logger that all of TensorRT's objects share: it keeps the first that it is given, process-wide.

    Errors and warnings are logged as such, information at debug level, and verbose messages are dropped.
    `errors` holds the newest error messages. TensorRT calls it from threads of its own.
    """
    import tensorrt as trt

    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding asks for this call rather than super()
            self.errors: deque[str] = deque(maxlen=10)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            level = levels.get(severity)
            if level is None:
                return
            logger.log(level, "%s", msg)
            if level == logging.ERROR:
                self.errors.append(msg)

    return Log()


def failure(message: str, *said: str) -> EngineError:
    """An EngineError of one line: what failed, why, and what to do where that is known.

    Args:
        message: what failed.
        said: what was said of it, beside the errors that TensorRT logged since `explained` began.
    """
    details = [" ".join(text.split()) for text in (*said, *tensorrt_log().errors)]
    if found := diagnose(details):
        return EngineError(f"{message}: {found.advice} (TensorRT: {found.message})")
    return EngineError("; ".join([message, *details]))


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Forget earlier errors, and turn what TensorRT's bindings raise in the block into an EngineError.

    The bindings raise TypeError where an object cannot be created, MemoryError for C++'s bad_alloc, ValueError or
    RuntimeError elsewhere.

    Args:
        action: what the block does, as the message names it: `start the builder`.

    Raises:
        EngineError: the block raised one of these; the project's own errors pass as they are.
    """
    tensorrt_log().errors.clear()
    try:
        yield
    except ClusterQError:
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise failure(f"TensorRT cannot {action}", str(error) or type(error).__name__) from error
