"""What the demo has done."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchpi.demo.way import Way
from torchpi.policy import Policy
from torchpi.sim.result import Evaluation


@dataclasses.dataclass(frozen=True)
class Glance:
    """One request without an episode around it."""

    observation: Mapping[str, Any]
    actions: np.ndarray
    """The action chunk, float32 [H, a]."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """What there is to tell."""

    policy: Policy
    task: str
    """Whose packaged camera frames went the way."""
    way: Way
    evaluation: Evaluation | None
    """The episodes; None: nothing could be rendered."""
    problem: str | None
    """Why nothing could be rendered."""
    glances: Mapping[str, Glance]
    """In place of episodes: per task, a chunk for its packaged frames."""
    commands: Sequence[tuple[str, str]]
    """What to try next: what it does, and the command."""

    @property
    def variant(self) -> str:
        """π₀ or π₀.₅."""
        return self.way.trace.variant
