"""Where synthesis may compute in bfloat16: images need no more, and it takes half the time."""

import torch

_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS)
    return False


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context in which convolutions and products run in bfloat16, if the device is fast at it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
