"""Tries out one part of what a run needs: `python -m cli.probe library`.

Each part has a process of its own: a library that does not fit the others may crash or hang the process that it is
loaded into, and parts that are slow to load are loaded at the same time. A finding is a line of JSON on stdout as soon
as it is made. Nothing of the library is imported outside of a check, so that a package that is missing or does not
load is a finding like any other.
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace

from cli import remedies
from cli.machine import Finding, cpu, gib, guarded, line

_IR_VERSION, _OPSET = 10, 21
_CPU_PROVIDER = "CPUExecutionProvider"


def _essential(name: str, purpose: str, remedy: str) -> Finding:
    return Finding(name, "broken", "", purpose, remedy, essential=True)


_TIMM = Finding("timm", "broken", "", "models named timm:NAME", "pip install 'clusterq-deploy[timm]'")

ESSENTIAL = {
    "library": (
        _essential("torch", "synthesis and fine-tuning", remedies.REINSTALL_TORCH),
        _essential("clusterq-deploy", "the pipeline", "pip install --upgrade --force-reinstall clusterq-deploy"),
    ),
    "torchvision": (_essential("torchvision", "its classifiers, by name", remedies.REINSTALL_TORCH),),
    "runtime": (
        _essential("onnx", "writing and checking graphs", "pip install --force-reinstall onnx"),
        _essential("onnxruntime", "running graphs", remedies.REINSTALL_RUNTIME),
        _essential("ONNX Runtime, CPU", "accuracy and latency of the INT8 graphs", remedies.REINSTALL_RUNTIME),
    ),
}
"""What nothing works without, by the part that tries it, as it is said where the part gives no answer."""

GPU_PROVIDERS = {
    "CUDAExecutionProvider": Finding(
        "ONNX Runtime, CUDA", "broken", "", "the graphs in ONNX Runtime on the GPU", remedies.CUDA_LIBRARIES
    ),
    "TensorrtExecutionProvider": Finding(
        "ONNX Runtime, Tensorrt", "broken", "", "TensorRT inside ONNX Runtime", remedies.TENSORRT_10
    ),
}


def _library() -> Iterator[Finding]:
    """Torch, the library, the processor, and GPUs last: to start one may fail in most ways."""
    torch, library = ESSENTIAL["library"]
    yield _package(torch, lambda: _convolve("cpu"))
    try:
        importlib.import_module("clusterq_deploy.pipeline")  # imports all that a run needs but torchvision
        version = importlib.import_module("clusterq_deploy.version").__version__
    except Exception as error:
        yield replace(library, found=f"does not import: {line(error)}")
    else:
        yield _works(library, version)
    yield from guarded("CPU", cpu)
    yield from guarded("GPUs", _gpus)


def _torchvision() -> Iterator[Finding]:
    """Torchvision, which takes longer to load than all else, and timm, which loads it."""
    (torchvision,) = ESSENTIAL["torchvision"]
    yield _package(torchvision)
    yield _package(_TIMM)


def _runtime() -> Iterator[Finding]:
    """The ONNX packages, a graph on the CPU, and the other providers that are listed."""
    onnx, runtime, on_cpu = ESSENTIAL["runtime"]
    yield _package(onnx)
    yield _package(runtime)
    try:
        run_graph(_CPU_PROVIDER)
    except Exception as error:
        yield replace(on_cpu, found=line(error))
    else:
        yield _works(on_cpu, "computes")
    with suppress(Exception):  # which is said above
        for name in _listed():
            if (own := GPU_PROVIDERS.get(name)) is not None:
                found = "listed, but there is no GPU for it"
                yield replace(own, state="absent", found=found, remedy=remedies.SEE_GPU)
            elif name != _CPU_PROVIDER:
                title = "ONNX Runtime, " + name.removesuffix("ExecutionProvider")
                yield Finding(title, "absent", "listed, not tried", "not used")


def _listed() -> list[str]:
    import onnxruntime

    names: list[str] = onnxruntime.get_available_providers()
    return names[::-1]


def _package(row: Finding, work: Callable[[], None] = lambda: None) -> Finding:
    """What there is of a package: its version where it is imported and `work` is done."""
    try:
        version = str(importlib.import_module(row.name).__version__)
        work()
    except Exception as error:  # a wheel whose libraries do not fit raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == row.name:
            return replace(row, state="absent", found="not installed")
        return replace(row, found=line(error))
    return _works(row, version)


def _works(row: Finding, found: str) -> Finding:
    return replace(row, state="ok", found=found, remedy=None)


def _convolve(device: str) -> None:
    """A convolution and its gradient on a device; raises what torch raises where that does not work."""
    import torch

    weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4, device=device), weight).sum().backward()
    if weight.grad is None or float(weight.grad.sum()) != 36:
        raise RuntimeError(f"torch computes a wrong gradient on {device}")


def _gpus() -> Iterator[Finding]:
    import torch

    from clusterq_deploy.environment import driver_version

    driver, purpose = driver_version(), "larger models in minutes, TensorRT"
    if driver:
        yield Finding("NVIDIA driver", "ok", driver, "GPUs")
    else:
        remedy = "with an NVIDIA GPU, install its driver; start a container with docker run --gpus all"
        yield Finding("NVIDIA driver", "absent", "no nvidia-smi", "GPUs", remedy)
    if torch.version.cuda:
        yield Finding("CUDA of torch", "ok", torch.version.cuda, "GPUs")
    else:
        yield Finding("CUDA of torch", "absent", "CPU build", "GPUs", remedies.cuda_torch(driver) if driver else None)
    if not torch.cuda.is_available():
        remedy = remedies.gpu(driver, torch.version.cuda)
        yield Finding("GPU", "broken" if driver else "absent", "torch sees none", purpose, remedy)
        return
    for index in range(torch.cuda.device_count()):
        name = f"GPU {index}"
        try:
            _convolve(f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:  # a driver that is too old, a GPU that torch has no kernels for
            yield Finding(name, "broken", line(error), purpose, remedies.REINSTALL_TORCH)
        else:
            found = f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free"
            yield Finding(name, "ok", found, purpose)


def _tensorrt() -> Iterator[Finding]:
    """TensorRT, whose builder may crash the process."""
    from clusterq_deploy.environment import driver_version
    from clusterq_deploy.runtimes.tensorrt.gpu import gpu_problem, start_builder, tensorrt_problem

    row = Finding("TensorRT", "broken", "", "engines", remedies.tensorrt(driver_version(), again=True))
    if problem := tensorrt_problem():
        yield replace(row, found=problem)
    elif problem := gpu_problem():
        yield replace(row, found=problem, remedy=remedies.SEE_GPU)
    else:
        start_builder()
        yield _works(row, str(importlib.import_module("tensorrt").__version__))


def _on_gpu(name: str) -> Iterator[Finding]:
    """A GPU provider of ONNX Runtime. Why one does not load is in its log on stderr, not in what it raises."""
    import torch  # noqa: F401  (brings the CUDA libraries that it finds in a run, too)

    if name.startswith("Tensorrt"):
        with suppress(ImportError, OSError):  # as in a run: it loads the libraries that its wheel has
            import tensorrt  # noqa: F401
    row = GPU_PROVIDERS[name]
    if name in _listed():
        run_graph(name)
        yield _works(row, "computes")
    else:
        yield replace(row, state="absent", found="not in this build", remedy=remedies.GPU_RUNTIME)


def graph() -> bytes:
    """An ONNX graph of one convolution that adds up nine values: x (1, 1, 3, 3) float32 to y (1, 1, 1, 1)."""
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, side, side])
        for name, side in (("x", 3), ("y", 1))
    ]
    convolution = helper.make_node("Conv", ["x", "weight"], ["y"])
    body = helper.make_graph([convolution], "probe", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", _OPSET)]
    model: onnx.ModelProto = helper.make_model(body, ir_version=_IR_VERSION, opset_imports=opsets)
    data: bytes = model.SerializeToString()
    return data


def run_graph(provider: str) -> None:
    """Run the graph on `provider`; raises where that does not work."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(graph(), providers=[provider], enable_fallback=0)
    if provider not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime fell back to {session.get_providers()[0]}")
    (found,) = session.run(None, {"x": np.ones((1, 1, 3, 3), np.float32)})
    if found.item() != 9:
        raise RuntimeError(f"computes {found.item()} where 9 is right")


_CHECKS = {"library": _library, "torchvision": _torchvision, "runtime": _runtime, "tensorrt": _tensorrt}

if __name__ == "__main__":
    gc.disable()  # of what is imported nothing is garbage, and to look for it takes a tenth of the time
    part, answers = sys.argv[1], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no finding
    try:
        for finding in _CHECKS[part]() if part in _CHECKS else _on_gpu(part):
            print(json.dumps(asdict(finding)), file=answers, flush=True)
    except Exception as error:
        sys.exit(line(error))
