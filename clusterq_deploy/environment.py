"""The machine and the versions that a measurement belongs to."""

import importlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import cpuinfo
import psutil
import torch

from clusterq_deploy.results.report import Environment

# CPU flags of instructions that add up products of 8-bit integers, by their names in Linux.
_INT8_FLAGS = ("avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
_KERNEL_CPUINFO = Path("/proc/cpuinfo")


def collect_environment(device: torch.device) -> Environment:
    """Describe this machine; unknown values are None. The GPU is `device`, or on the CPU the one that runs engines."""
    cpu, cpu_int8 = describe_cpu()
    on_gpu = torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=_version("torchvision"),
        onnx=_version("onnx") or "not installed",
        onnxruntime=_version("onnxruntime") or "not installed",
        tensorrt=_version("tensorrt"),
        cuda=torch.version.cuda if on_gpu else None,
        driver=driver_version() if on_gpu else None,
        gpu=torch.cuda.get_device_name(device if device.type == "cuda" else None) if on_gpu else None,
        cpu=cpu,
        cpu_int8=cpu_int8,
        cores=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        platform=platform.platform(),
    )


def _version(module: str) -> str | None:
    """Return the version of a module; None if it cannot be imported, such as a wheel whose libraries do not load."""
    try:
        return str(importlib.import_module(module).__version__)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def describe_cpu() -> tuple[str, list[str] | None]:
    """Return the CPU's name and its INT8 instructions; None for the latter if its flags cannot be read."""
    try:
        processor = _KERNEL_CPUINFO.read_text(errors="replace").partition("\n\n")[0]
    except OSError:  # not Linux
        processor = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in processor.splitlines())}
    name, flags = fields.get("model name"), fields.get("flags", "").split()
    if not name or not flags:  # not x86, or not Linux: py-cpuinfo supports more, but takes a second
        try:
            info = cpuinfo.get_cpu_info()
        except Exception:  # it raises bare exceptions on unknown processors
            info = {}
        name, flags = info.get("brand_raw"), info.get("flags", [])
    name = name or platform.processor() or platform.machine() or "unknown"
    return name, [flag for flag in _INT8_FLAGS if flag in flags] if flags else None


def adds_in_32_bits() -> bool:
    """Return whether this CPU adds products of UINT8 and INT8 in 32 bits: x86 without VNNI saturates at 16."""
    capabilities = torch.cpu.get_capabilities()
    x86 = capabilities.get("architecture", "x86_64") == "x86_64"
    return not x86 or bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: respects taskset and container pinning
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def driver_version() -> str | None:
    """Return the NVIDIA driver's version by nvidia-smi, which takes a second: torch has no public call for it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)
