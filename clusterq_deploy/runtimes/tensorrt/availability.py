"""Whether TensorRT engines can be built and run on this machine."""

import torch

from clusterq_deploy.errors import TensorRTMissing
from clusterq_deploy.runtimes.tensorrt.failures import NO_GPU, diagnose
from clusterq_deploy.runtimes.tensorrt.log import explained, tensorrt_log


def unavailable_reason() -> str | None:
    """One line with everything that keeps engines from being built and run here; None if nothing does."""
    return "; ".join(filter(None, (gpu_problem(), tensorrt_problem()))) or None


def require_tensorrt() -> None:
    """Return if engines can be built and run here.

    Raises:
        TensorRTMissing: they cannot; the message is that of `unavailable_reason`.
    """
    if reason := unavailable_reason():
        raise TensorRTMissing(reason)


def gpu_problem() -> str | None:
    """One line with what keeps torch from an NVIDIA GPU, and what mends it; None if nothing does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build for the CUDA that nvidia-smi shows"
    try:
        torch.cuda.init()  # unlike is_available, it says why not
    except RuntimeError as error:
        if found := diagnose([str(error)]):
            return found.advice
    return f"{NO_GPU.cause}: {NO_GPU.remedy}"


def tensorrt_problem() -> str | None:
    """One line with what keeps TensorRT from being imported; None if nothing does."""
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        if error.name == "tensorrt":
            return "tensorrt is not installed: pip install 'clusterq-deploy[tensorrt]'"
        return f"tensorrt is installed but cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:  # a shared library is missing, or of another CUDA
        return f"tensorrt is installed but cannot be imported: {' '.join(str(error).split())}"
    release = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if release < (10, 3):
        return f"tensorrt {trt.__version__} is too old: install 10.3 or later"
    return None


def start_builder() -> None:
    """Start TensorRT's builder, which loads its libraries and asks for the GPU, and end it.

    A TensorRT that does not fit the driver may crash the process here.

    Raises:
        EngineError: it does not start.
    """
    import tensorrt as trt

    with explained("start the builder"):
        trt.Builder(tensorrt_log())
