"""A diagnosis as data: what a policy is, findings, and what an observation shows."""

import dataclasses
from typing import Any, Literal

import msgspec

from torchpi.assets import assets
from torchpi.config import Pi0Config
from torchpi.engine.quantize import quantization_of
from torchpi.policy import Policy
from torchpi.ui.format import without_nan

Level = Literal["problem", "warning", "note"]
IGNORED_BELOW = 0.02
"""An input that moves the chunk by less than a fiftieth of the effect of noise cannot steer the robot."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A remark on a policy or an observation: the finding, the expectation and the advice."""

    level: Level
    """ "problem": a robot would misbehave, or gets no actions; "warning": look at it before the robot moves; "note":
    unusual, and harmless by itself."""
    about: str
    """Its subject: "weights", "camera base_0_rgb", "statistics of state", …"""
    message: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """An entry of assets/findings.toml."""

    level: Level
    message: str
    beyond: float | None = None
    """Least distance from the range, of rules about distances."""


RULES = msgspec.toml.decode((assets() / "findings.toml").read_bytes(), type=dict[str, Rule])


def finding(rule: str, about: str, **found: Any) -> Finding:
    """The finding of a rule, with what was found."""
    return Finding(RULES[rule].level, about, RULES[rule].message.format(**found))


@dataclasses.dataclass(frozen=True)
class CameraCheck:
    """A camera that the model reads."""

    name: str
    key: str | None
    """In the observation; None: the robot does not have it."""
    presence: str
    found: bool


@dataclasses.dataclass(frozen=True)
class StateCheck:
    """A dimension of the state, in the model's units, compared with the range of the statistics."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    excess: float
    """Distance from the range, in its widths; 0: inside."""
    outside: bool


@dataclasses.dataclass(frozen=True)
class PromptCheck:
    """The prompt as the model reads it, whole, before anything is cut."""

    text: str
    num_tokens: int
    max_token_len: int | None
    """None: the policy does not state it, and nothing is cut."""
    cut: bool
    """There are more tokens than the policy takes."""


@dataclasses.dataclass(frozen=True)
class ActionCheck:
    """A dimension of the predicted actions, in the robot's units, compared with the range of the training data."""

    name: str
    unit: str
    kind: str
    min: float
    """Smallest value over all actions of the chunks and all noise seeds."""
    max: float
    low: float
    """Lower end of the range; a delta's is added to this observation's state."""
    high: float
    outside: float
    """Share of the actions outside of the range."""
    excess: float
    """Distance of the farthest from the range, in its widths; 0: all are inside."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Movement of the chunk when one input is changed."""

    input: str
    change: str
    moves: float | None
    """In units of the chunk's own spread, see `torchpi.inspect.sensitivity`; None: could not be tried."""
    untried: str = ""
    """The reason."""

    @property
    def is_ignored(self) -> bool:
        """The input cannot steer the robot."""
        return self.moves is not None and self.moves < IGNORED_BELOW


@dataclasses.dataclass
class ObservationCheck:
    """One observation in a policy; what could not be reached is empty or None."""

    cameras: tuple[CameraCheck, ...]
    state: tuple[StateCheck, ...] = ()
    state_outside: float | None = None
    """Share of the state's dimensions outside of their range."""
    prompt: PromptCheck | None = None
    actions: tuple[ActionCheck, ...] = ()
    spread: float | None = None
    """RMS deviation of the chunks over the noise seeds, in normalized units."""
    sensitivity: tuple[Sensitivity, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A policy, findings, and what an observation shows."""

    policy: dict[str, Any]
    """See `describe`."""
    findings: tuple[Finding, ...]
    """The worst first."""
    observation: ObservationCheck | None = None

    @property
    def status(self) -> int:
        """1 if there is a problem, else 0."""
        return int(any(finding.level == "problem" for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are not finite are None."""
        return dict(without_nan(dataclasses.asdict(self) | {"status": self.status}))


def describe(policy: Policy) -> dict[str, Any]:
    """All that a policy states, as JSON values; None: not stated."""
    robot, config, transforms = policy.embodiment, policy.model.config, policy.transforms
    names = robot.state_names[: state_dim(policy)]
    return {
        "variant": config.variant,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "dtype": str(policy.model.embedding.dtype).removeprefix("torch."),
        "quantization": None if (found := quantization_of(policy.model)) is None else found.kind,
        "device": str(policy.model.device),
        "model": config.to_dict(),
        "embodiment": robot.name,
        "hook": robot.hook,
        "cameras": [{"name": c.name, "key": c.key, "presence": c.presence} for c in robot.cameras],
        "state": [{"name": name, "unit": unit} for name, unit in zip(names, state_units(policy), strict=True)],
        "state_input": state_input(config),
        "actions": [dataclasses.asdict(action) for action in robot.actions],
        "normalization": {key: dataclasses.asdict(rule) for key, rule in transforms.normalization.items()},
        "prompt_format": transforms.prompt_format,
        "max_token_len": transforms.max_token_len,
        "truncation": transforms.truncation,
        "prompt_state_dim": transforms.prompt_state_dim,
        "image_transform": dataclasses.asdict(transforms.image_transform),
        "default_prompt": policy.default_prompt,
        "action_horizon": config.action_horizon,
        "execute_steps": robot.execute_steps,
        "control_hz": robot.control_hz,
        "metadata": policy.metadata,
        "provenance": policy.provenance,
    }


def state_input(config: Pi0Config) -> str | None:
    """The form in which the model reads the state; None: it does not."""
    forms = ["text in the prompt"] * config.state_in_prompt + ["token of the suffix"] * (not config.pi05)
    return " and ".join(forms) or None


def state_dim(policy: Policy) -> int:
    """Length of the policy's state, of those that its embodiment allows."""
    return len(policy.embodiment.to_model(policy.example_observation())["state"])


def state_units(policy: Policy) -> tuple[str, ...]:
    """Unit of each dimension of the policy's state; "": not stated."""
    return policy.embodiment.state_units[: state_dim(policy)]
