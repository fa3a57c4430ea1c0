"""Devices: those of this machine, and how to compute on them."""

import pathlib
import re
import warnings

import torch

from torchpi.errors import PolicyError


def has_bfloat16(device: torch.device) -> bool:
    """True if a device has bfloat16 arithmetic; one without emulates it, on a CPU some ten times slower than float32.

    A CUDA device that is not here is taken for one that has it.
    """
    if device.type != "cpu":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    flags = pathlib.Path("/proc/cpuinfo")  # of Linux; x86's names, and ARM's
    return flags.is_file() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text()) is not None


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in that a device is fast in: bfloat16 on a GPU that has it, float32 elsewhere."""
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
    """The device; by default CUDA where there is one, or else the CPU."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # torch does not know the name
        raise PolicyError(f"Unknown device {device!r}; expected for example cpu or cuda.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PolicyError(
            f"There is no device {found}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu."
        )
    return found
