"""What a policy is, in the terms of the one who has to drive a robot with it."""

import dataclasses
from typing import Any

from torchpi.policy import Policy


def describe(policy: Policy) -> dict[str, Any]:
    """Everything that the policy says of itself, as JSON values; what it does not say is None."""
    robot, config, transforms = policy.embodiment, policy.model.config, policy.transforms
    names = robot.state_names[: state_dim(policy)]
    return {
        "variant": "π₀.₅" if config.pi05 else "π₀",
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "dtype": str(policy.model.embedding.dtype).removeprefix("torch."),
        "device": str(policy.model.device),
        "model": config.to_dict(),
        "embodiment": robot.name,
        "hook": robot.hook,
        "cameras": [{"name": c.name, "key": c.key, "presence": c.presence} for c in robot.cameras],
        "state": [{"name": name, "unit": unit} for name, unit in zip(names, state_units(policy), strict=True)],
        "state_input": state_input(policy),
        "actions": [dataclasses.asdict(action) for action in robot.actions],
        "normalization": {key: dataclasses.asdict(rule) for key, rule in transforms.normalization.items()},
        "prompt_format": transforms.prompt_format,
        "max_token_len": transforms.max_token_len,
        "truncation": transforms.truncation,
        "default_prompt": policy.default_prompt,
        "action_horizon": config.action_horizon,
        "execute_steps": robot.execute_steps,
        "control_hz": robot.control_hz,
        "metadata": policy.metadata,
        "provenance": policy.provenance,
    }


def state_input(policy: Policy) -> str | None:
    """How the model reads the state; None: it does not."""
    ways = []
    if policy.transforms.discrete_state_input:
        ways.append("text in the prompt")
    if policy.model.suffix.num_state_tokens:
        ways.append("token of the suffix")
    return " and ".join(ways) or None


def state_dim(policy: Policy) -> int:
    """The length of the state that the policy takes, of those that its embodiment allows."""
    return len(policy.embodiment.to_model(policy.example_observation())["state"])


def state_units(policy: Policy) -> tuple[str, ...]:
    """The unit of each dimension of the state that the policy takes; "": not stated."""
    units = [unit for part in policy.embodiment.state for unit in part.units or ("",) * len(part.names)]
    return tuple(units[: state_dim(policy)])
