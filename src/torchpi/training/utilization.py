"""Model FLOPs utilization (MFU): FLOP/s of the updates, as a fraction of the device's peak."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from torchpi.model.operations import Workload, trained_flops
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.training.curves import TABLES


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of a device's matmuls in FLOP/s; None if unknown."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return TABLES["peak_flops"].get(torch.cuda.get_device_name(device))


class Utilization:
    """Counts the model FLOPs of this process between two lines of the metrics."""

    def __init__(self, model: Pi0, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.flops = model, config, 0
        self.dtype = str(config.model.dtype)
        self.peak = peak_flops(device, self.dtype)
        self._batch_flops = functools.lru_cache(self._count)

    def add(self, collated: Mapping[str, Any]) -> None:
        """Count a batch of `Samples.collate`."""
        if self.peak is not None:
            samples, cameras = len(collated["actions"]), len(collated["inputs"]["image"])
            self.flops += self._batch_flops(samples, cameras, round(collated["prompt_tokens"] / samples))

    def _count(self, samples: int, cameras: int, prompt_tokens: int) -> int:
        dtype, flow_samples = getattr(torch, self.dtype), self.config.optim.flow_samples_per_obs
        sizes = (self.model.config, samples, cameras, prompt_tokens)
        return trained_flops(self.model, Workload(*sizes, 1, dtype, flow_samples_per_obs=flow_samples))

    def take(self, seconds: float) -> dict[str, float]:
        """Return the utilization over the last `seconds` and restart the count; {} if the peak is unknown."""
        flops, self.flops = self.flops, 0
        return {} if self.peak is None else {"mfu": flops / (seconds * self.peak)}
