"""Samples → a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpi.types import Observation


def stack_inputs(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the inputs of several samples, as `Observation.from_dict` takes them; shorter prompts are padded."""
    length = max(len(sample["tokenized_prompt"]) for sample in samples)

    def padded(key: str) -> Tensor:
        rows = [np.pad(sample[key], (0, length - len(sample[key]))) for sample in samples]
        return torch.from_numpy(np.stack(rows))

    cameras = list(samples[0]["image"])
    return {
        "image": {name: torch.from_numpy(np.stack([s["image"][name] for s in samples])) for name in cameras},
        "image_mask": {name: torch.tensor([bool(s["image_mask"][name]) for s in samples]) for name in cameras},
        "state": torch.from_numpy(np.stack([s["state"] for s in samples])),
        "tokenized_prompt": padded("tokenized_prompt"),
        "tokenized_prompt_mask": padded("tokenized_prompt_mask"),
    }


def collate(samples: Sequence[Mapping[str, Any]]) -> Observation:
    """The inputs of several samples as one batch."""
    return Observation.from_dict(stack_inputs(samples))
