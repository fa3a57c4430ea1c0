"""What a policy has around its model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from torchpi.robots.embodiment import Embodiment
from torchpi.transforms.normalize import Normalization, NormStats


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """Everything of a policy but the model."""

    embodiment: Embodiment
    norm_stats: Mapping[str, NormStats]
    """Of "state" and "actions"."""
    normalization: Mapping[str, Normalization]
    """The rule for "state" and for "actions"; empty: openpi's, which follows the variant."""
    tokenizer: pathlib.Path | None
    """None: not in the folder."""
    prompt_format: str = "openpi"
    truncation: str = "instruction"
    default_prompt: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
