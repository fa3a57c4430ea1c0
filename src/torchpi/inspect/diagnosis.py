"""Data structures of a diagnosis: description of the policy, findings, and checks of an observation."""

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
"""An input counts as ignored if changing it moves the chunk by less than a fiftieth of the effect of noise."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Finding about a policy or an observation, with the expectation and advice."""

    level: Level
    """ "problem": the robot would misbehave or get no actions; "warning": check before the robot moves; "note": unusual
    but harmless by itself."""
    about: str
    """Subject: "weights", "camera base_0_rgb", "statistics of state", …"""
    message: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """An entry of assets/findings.toml."""

    level: Level
    message: str
    beyond: float | None = None
    """Threshold of a rule about distances from the range."""


RULES = msgspec.toml.decode((assets() / "findings.toml").read_bytes(), type=dict[str, Rule])


def finding(rule: str, about: str, **values: Any) -> Finding:
    """Create the finding of a rule; `values` fill its message."""
    return Finding(RULES[rule].level, about, RULES[rule].message.format(**values))


@dataclasses.dataclass(frozen=True)
class CameraCheck:
    """A camera that the model reads."""

    name: str
    key: str | None
    """Key in the observation; None if the robot does not have the camera."""
    presence: str
    found: bool


@dataclasses.dataclass(frozen=True)
class StateCheck:
    """State dimension in the model's units, compared with the range of the statistics."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    excess: float
    """Distance from the range, relative to its width; 0 inside."""
    outside: bool


@dataclasses.dataclass(frozen=True)
class PromptCheck:
    """The whole prompt as the model reads it, before truncation."""

    text: str
    num_tokens: int
    max_token_len: int | None
    """None if the policy does not state a limit; nothing is then truncated."""
    cut: bool
    """True if the prompt exceeds the limit."""


@dataclasses.dataclass(frozen=True)
class ActionCheck:
    """Dimension of the predicted actions in the robot's units, compared with the range of the training data."""

    name: str
    unit: str
    kind: str
    min: float
    """Smallest value over all actions of all chunks."""
    max: float
    low: float
    """Lower end of the range; for a delta, added to this observation's state."""
    high: float
    outside: float
    """Fraction of the actions outside the range."""
    excess: float
    """Largest distance from the range, relative to its width; 0 if all actions are inside."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Movement of the chunk when one input is changed."""

    input: str
    change: str
    moves: float | None
    """Movement relative to the chunk's spread, see `torchpi.inspect.sensitivity`; None if it was not tried."""
    untried: str = ""
    """Reason why it was not tried."""

    @property
    def is_ignored(self) -> bool:
        """True if the input cannot affect the robot."""
        return self.moves is not None and self.moves < IGNORED_BELOW


@dataclasses.dataclass
class ObservationCheck:
    """Checks of one observation; checks that were not reached are empty or None."""

    cameras: tuple[CameraCheck, ...]
    state: tuple[StateCheck, ...] = ()
    state_outside: float | None = None
    """Fraction of the state's dimensions outside their range."""
    prompt: PromptCheck | None = None
    actions: tuple[ActionCheck, ...] = ()
    spread: float | None = None
    """RMS deviation of the chunks over the noise seeds, in normalized units."""
    sensitivity: tuple[Sensitivity, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of a policy, optionally with an observation."""

    policy: dict[str, Any]
    """Description of the policy, see `describe`."""
    findings: tuple[Finding, ...]
    """Findings, most severe first."""
    observation: ObservationCheck | None = None

    @property
    def status(self) -> int:
        """Exit status: 1 if there is a problem, else 0."""
        return int(any(finding.level == "problem" for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """JSON document; non-finite numbers become None."""
        return dict(without_nan(dataclasses.asdict(self) | {"status": self.status}))


def describe(policy: Policy) -> dict[str, Any]:
    """Describe a policy as a JSON document; settings that it does not state are None."""
    robot, config, transforms = policy.embodiment, policy.model.config, policy.transforms
    quantization = quantization_of(policy.model)
    names = robot.state_names[: state_dim(policy)]
    return {
        "variant": config.variant,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "dtype": str(policy.model.embedding.dtype).removeprefix("torch."),
        "quantization": quantization and quantization.kind,
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
    """Form in which the model reads the state; None if it does not."""
    forms = []
    if config.state_in_prompt:
        forms.append("text in the prompt")
    if not config.pi05:
        forms.append("token of the suffix")
    return " and ".join(forms) or None


def state_dim(policy: Policy) -> int:
    """Number of state dimensions that the policy uses; the embodiment may allow several."""
    return len(policy.embodiment.to_model(policy.example_observation())["state"])


def state_units(policy: Policy) -> tuple[str, ...]:
    """Unit of each state dimension of the policy; "" if not stated."""
    return policy.embodiment.state_units[: state_dim(policy)]
