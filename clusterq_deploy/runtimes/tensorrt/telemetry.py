"""Clocks, power, temperature and throttling of a GPU while something is measured, by NVML; no setting is changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, Literal, Self

import torch

from clusterq_deploy.results.engines import GpuTelemetry, Reading

_INTERVAL_S = 0.1
_THROTTLING = {
    "SwPowerCap": "power limit",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "temperature (software)",
    "HwThermalSlowdown": "temperature (hardware)",
    "HwPowerBrakeSlowdown": "external power brake",
}
"""NVML's reasons for clocks that are lower than asked for, and what the report calls them."""

_Sample = dict[str, float | None]


class GpuMonitor:
    """Asks NVML every 100 ms, from a thread of its own, while its context is open.

    Where NVML cannot be asked, `telemetry` says why; nothing is raised.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._samples: list[_Sample] = []
        self._limits: _Sample = {}
        self._reason: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            import pynvml
        except ModuleNotFoundError:
            self._reason = "nvidia-ml-py is not installed: pip install 'clusterq-deploy[tensorrt]'"
            return self
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._reason = f"NVML does not start: {error}"
            return self
        try:
            uuid = str(torch.cuda.get_device_properties(self._device).uuid).removeprefix("GPU-")
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            self._reason = f"NVML does not know the device: {error}"
            pynvml.nvmlShutdown()
            return self
        self._limits = _limits(pynvml, handle)
        self._thread = threading.Thread(target=self._watch, args=(pynvml, handle), name="GpuMonitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        import pynvml

        self._stop.set()
        self._thread.join()
        pynvml.nvmlShutdown()

    def telemetry(self) -> GpuTelemetry:
        """What was seen while the context was open."""
        if self._reason is not None:
            return GpuTelemetry(reason=self._reason)
        return summarize_samples(self._samples, self._limits)

    def _watch(self, nvml: ModuleType, handle: Any) -> None:
        self._samples.append(_sample(nvml, handle))
        while not self._stop.wait(_INTERVAL_S):
            self._samples.append(_sample(nvml, handle))


def summarize_samples(samples: Sequence[_Sample], limits: _Sample) -> GpuTelemetry:
    """The record of samples that `GpuMonitor` took."""
    reasons = [int(mask) for sample in samples if (mask := sample["reasons"]) is not None]
    sm_clock = _reading(samples, "sm_clock_mhz")
    return GpuTelemetry(
        samples=len(samples),
        sm_clock_mhz=sm_clock,
        memory_clock_mhz=_reading(samples, "memory_clock_mhz"),
        clocks=_clocks(sm_clock, reasons),
        power_watts=_reading(samples, "power_watts"),
        temperature_celsius=_reading(samples, "temperature_celsius"),
        throttling=_throttling(reasons),
        **limits,
    )


def _clocks(sm_clock: Reading | None, reasons: Sequence[int]) -> Literal["set", "steady", "floating"] | None:
    import pynvml

    if any(mask & pynvml.nvmlClocksEventReasonApplicationsClocksSetting for mask in reasons):
        return "set"
    if sm_clock is None:
        return None
    return "steady" if sm_clock.lowest == sm_clock.highest else "floating"


def _throttling(reasons: Sequence[int]) -> dict[str, float] | None:
    """The share of the samples that each reason to throttle was given in; None where NVML gives no reasons."""
    import pynvml

    if not reasons:
        return None
    bits = {words: getattr(pynvml, f"nvmlClocksEventReason{name}") for name, words in _THROTTLING.items()}
    counts = {words: sum(bool(mask & bit) for mask in reasons) for words, bit in bits.items()}
    return {words: count / len(reasons) for words, count in counts.items() if count}


def _reading(samples: Sequence[_Sample], quantity: str) -> Reading | None:
    values = [value for sample in samples if (value := sample[quantity]) is not None]
    if not values:
        return None
    return Reading(lowest=min(values), mean=sum(values) / len(values), highest=max(values))


def _sample(nvml: ModuleType, handle: Any) -> _Sample:
    def ask(query: Callable[..., float], *arguments: Any, unit: float = 1.0) -> float | None:
        return _asked(nvml, query, handle, *arguments, unit=unit)

    return {
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "power_watts": ask(nvml.nvmlDeviceGetPowerUsage, unit=1e-3),
        "temperature_celsius": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "reasons": ask(nvml.nvmlDeviceGetCurrentClocksEventReasons),
    }


def _limits(nvml: ModuleType, handle: Any) -> _Sample:
    return {
        "sm_clock_limit_mhz": _asked(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_clock_limit_mhz": _asked(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": _asked(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle, unit=1e-3),
    }


def _asked(nvml: ModuleType, query: Callable[..., float], *arguments: Any, unit: float = 1.0) -> float | None:
    """NVML's answer in a unit; None where the device or the driver does not give it."""
    try:
        return unit * query(*arguments)
    except nvml.NVMLError:
        return None
