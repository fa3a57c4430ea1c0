"""Choice of the device and its fastest dtype."""

import pathlib
import re
import warnings

import torch

from torchpi.errors import PolicyError


def has_bfloat16(device: torch.device) -> bool:
    """Check for bfloat16 arithmetic. Without it bfloat16 is emulated, on a CPU about ten times slower than float32.

    A CUDA device is assumed to have it if CUDA is not available on this machine.
    """
    if device.type != "cpu":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # Linux only; the flags of x86 and ARM
    return cpuinfo.is_file() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text()) is not None


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Choose the fastest dtype: bfloat16 on a GPU that supports it, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic; the policy computes in float32, with twice "
        "the memory.",
        stacklevel=3,
    )
    return torch.float32


def usable_device(device: str | torch.device | None) -> torch.device:
    """Check that a device exists; by default use CUDA if available, else the CPU."""
    try:
        checked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # torch does not know the name
        raise PolicyError(f"Unknown device {device!r}; expected for example cpu or cuda.") from error
    if checked.type == "cuda" and (checked.index or 0) >= torch.cuda.device_count():
        raise PolicyError(
            f"There is no device {checked}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu."
        )
    return checked
