"""Model FLOPs utilization (MFU): the FLOPs of the updates, as a fraction of what the device could have done."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from torchpi.model.operations import Workload, trained_flops
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.training.curves import TABLES


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The peak of a device's matmuls, per second; None: unknown."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return TABLES["peak_flops"].get(torch.cuda.get_device_name(device))


class Utilization:
    """Model FLOPs of this process since the last line of the metrics."""

    def __init__(self, model: Pi0, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.flops = model, config, 0
        self.dtype = str(config.model.dtype)
        self.peak = peak_flops(device, self.dtype)
        self._of_batch = functools.lru_cache(self._count)

    def add(self, stacked: Mapping[str, Any]) -> None:
        """Count a batch, as `Samples.collate` returns it."""
        if self.peak is not None:
            samples, cameras = len(stacked["actions"]), len(stacked["inputs"]["image"])
            self.flops += self._of_batch(samples, cameras, round(stacked["prompt_tokens"] / samples))

    def _count(self, samples: int, cameras: int, prompt_tokens: int) -> int:
        dtype, flow_samples = getattr(torch, self.dtype), self.config.optim.flow_samples_per_obs
        sizes = (self.model.config, samples, cameras, prompt_tokens)
        return trained_flops(self.model, Workload(*sizes, 1, dtype, flow_samples_per_obs=flow_samples))

    def take(self, seconds: float) -> dict[str, float]:
        """The utilization over so many seconds, from which on it is counted anew; {} where the peak is unknown."""
        flops, self.flops = self.flops, 0
        return {} if self.peak is None else {"mfu": flops / (seconds * self.peak)}
