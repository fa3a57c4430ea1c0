"""What `torchpi doctor` finds, as data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

Level = Literal["problem", "warning", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know about a policy or an observation."""

    level: Level
    """ "problem": a robot would misbehave, or does not get any actions; "warning": look at it before the robot moves;
    "note": unusual, and harmless by itself."""
    about: str
    """What it is about: "weights", "camera base_0_rgb", "statistics of state", …"""
    message: str
    """What was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class CameraCheck:
    """One camera that the model reads, and whether the observation has it."""

    name: str
    key: str | None
    """Where it is in the observation; None: the robot does not have it."""
    presence: str
    found: bool


@dataclasses.dataclass(frozen=True)
class StateCheck:
    """One dimension of the state, in the model's units, beside the range of the statistics."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    excess: float
    """How far it lies outside, in widths of the range; 0: inside."""

    @property
    def outside(self) -> bool:
        """Whether it lies outside of the range."""
        return self.excess > 0


@dataclasses.dataclass(frozen=True)
class PromptCheck:
    """What the model reads as text."""

    text: str
    """Whole, before anything is cut."""
    num_tokens: int
    max_token_len: int | None
    """None: the policy does not say, and nothing is cut."""

    @property
    def cut(self) -> bool:
        """Whether there are more tokens than the policy takes."""
        return self.max_token_len is not None and self.num_tokens > self.max_token_len


@dataclasses.dataclass(frozen=True)
class ActionCheck:
    """One dimension of the predicted actions, in the robot's units, beside the range of the statistics."""

    name: str
    unit: str
    kind: str
    min: float
    """Over all actions of the chunks, and all noise seeds."""
    max: float
    low: float
    """Of the training data; where the model predicts deltas, behind this observation's state."""
    high: float
    outside: float
    """The share of the actions that lies outside of the range."""
    excess: float
    """How far the farthest lies outside, in widths of the range; 0: all are inside."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How far the chunk moves when one input is changed."""

    input: str
    change: str
    moves: float | None
    """In units of the chunk's own spread, see `torchpi.doctor.sensitivity`; None: could not be tried."""
    untried: str = ""
    """Why it could not be tried."""


@dataclasses.dataclass(frozen=True)
class ObservationCheck:
    """What one observation shows; what could not be reached is empty or None."""

    cameras: tuple[CameraCheck, ...]
    state: tuple[StateCheck, ...] = ()
    prompt: PromptCheck | None = None
    actions: tuple[ActionCheck, ...] = ()
    spread: float | None = None
    """RMS deviation of the chunks over the noise seeds, in normalized units."""
    sensitivity: tuple[Sensitivity, ...] = ()

    @property
    def state_outside(self) -> float | None:
        """The share of the state's dimensions that lie outside of their range."""
        return sum(check.outside for check in self.state) / len(self.state) if self.state else None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A policy, what is wrong with it, and what an observation shows."""

    policy: Mapping[str, Any]
    """What the policy is, see `torchpi.doctor.description`."""
    findings: tuple[Finding, ...]
    """The worst first."""
    observation: ObservationCheck | None = None

    @property
    def status(self) -> int:
        """1 if there is a problem, else 0."""
        return int(any(finding.level == "problem" for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite are None."""
        document = dataclasses.asdict(self) | {"status": self.status}
        if self.observation is not None:
            checks, found = self.observation, document["observation"]
            found["state_outside"] = checks.state_outside
            for check, entry in zip(checks.state, found["state"], strict=True):
                entry["outside"] = check.outside
            if checks.prompt is not None:
                found["prompt"]["cut"] = checks.prompt.cut
        return dict(json_values(document))


def json_values(value: Any) -> Any:
    """A tree of dicts, lists and tuples with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
