"""What a walk finds."""

import dataclasses

import numpy as np

from torchpi.config import Pi0Config
from torchpi.trace.record import TraceEntry


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind."""

    label: str
    start: int
    stop: int
    group: int
    """Number of its attention group: it sees its own and those before."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two computations of the same thing are apart."""

    what: str
    max_abs: float
    scale: float
    """Largest absolute value of the thing itself."""


@dataclasses.dataclass(frozen=True)
class Modulation:
    """Root mean square of every adaptive norm's scale, shift and gate over time."""

    times: list[float]
    norms: list[str]
    rms: dict[str, np.ndarray]
    """By "scale", "shift", "gate": [norms, times]."""


@dataclasses.dataclass(frozen=True)
class Values:
    """What there is to see of the first sample, where the model has weights and an input."""

    images: dict[str, np.ndarray | None]
    """Per camera uint8 [h, w, 3] as the model sees it, None where it is masked."""
    times: list[float]
    """At which the velocity was evaluated."""
    chunk: np.ndarray
    """x before the first and behind every Euler step: [steps + 1, H, A]."""
    modulation: Modulation | None
    """None for π₀, which has none."""
    agreement: list[Agreement]
    """Joint against cached."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything that the walk found."""

    title: str
    config: Pi0Config
    batch: int
    dtype: str
    """Of the computation."""
    notes: tuple[str, ...]
    prompt: str | None
    action_names: tuple[str, ...]
    entries: list[TraceEntry]
    segments: list[Segment]
    mask: np.ndarray
    """Joint attention mask of the first sample, bool [S+T, S+T]."""
    cache_bytes: int
    """Of the prefix's keys and values of one observation, all layers."""
    layers: int
    time_inputs: int
    """Modules that were handed the time: norms (π₀.₅) or the MLP in front of the expert (π₀)."""
    time_injections: int
    """How many of them are in the layers."""
    parameters: dict[str, int]
    """Per part of the model."""
    values: Values | None

    @property
    def variant(self) -> str:
        """π₀ or π₀.₅."""
        return "π₀.₅" if self.config.pi05 else "π₀"

    @property
    def cameras(self) -> list[str]:
        """In the prefix's order."""
        return [part.label for part in self.segments[:-1] if part.group == 0][:-1]

    @property
    def suffix_tokens(self) -> int:
        """T."""
        return sum(part.stop - part.start for part in self.segments if part.group > 0)

    @property
    def prefix_tokens(self) -> int:
        """S."""
        return self.sequence_length - self.suffix_tokens

    @property
    def sequence_length(self) -> int:
        """S + T."""
        return self.segments[-1].stop

    @property
    def num_groups(self) -> int:
        """Attention groups, over prefix and suffix."""
        return self.segments[-1].group + 1
