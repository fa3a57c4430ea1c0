"""Stages of a forward pass: every tensor from a robot's observation to the loss and to the robot's actions.

`observation_stages` follows a policy's transforms. `forward_stages` follows the model as `torchpi.inspect.nanopi`
computes it, with the joint transformer of the papers written out. The trace and compare commands show these stages.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from torchpi.config import Pi0Config
from torchpi.engine.quantize import AsWeight, quantized_layers
from torchpi.inspect import nanopi
from torchpi.inspect.steps import STEP_OF
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy
from torchpi.robots.keys import flatten


@dataclasses.dataclass(frozen=True)
class Stage:
    """One value of a forward pass."""

    step: str
    """"0" to "11", with "7-1" to "7-7", and "inference"."""
    name: str
    """Name of the tensor; parts are separated by "/"."""
    value: Tensor | np.ndarray | str
    view: str = "both"
    """"joint" if it exists only in the joint forward pass of the papers, "cached" if only in the model's own
    computation (prefill and denoising), or "both"."""


@dataclasses.dataclass(frozen=True)
class TraceInputs:
    """A model and a batch for it, on one device; on the meta device, neither has values."""

    title: str
    model: Pi0
    config: Pi0Config
    """The model's config, with action horizon and prompt length set."""
    batch: Mapping[str, Tensor]
    """"image.<camera>", "image_mask.<camera>", "state", "tokenized_prompt" and "tokenized_prompt_mask"."""
    noise: Tensor
    """[B, H, A]"""
    time: Tensor
    """[B]"""
    actions: Tensor | None = None
    """[B, H, A]; None to use a chunk sampled by the model instead of recorded actions."""
    notes: tuple[str, ...] = ()
    """Notes for the user: assumptions, random input, source of the weights."""
    action_names: tuple[str, ...] = ()
    """Names of the robot's action dimensions, before padding; empty if unknown."""
    robot: tuple[Stage, ...] = ()
    """Stages from the robot's observation to the batch."""
    to_robot: Callable[[Float32[np.ndarray, "H A"]], np.ndarray] | None = None
    """Converts a chunk of the model to the robot's actions."""

    @property
    def has_values(self) -> bool:
        """False on the meta device."""
        return self.model.device.type != "meta"

    @property
    def prompt(self) -> str | None:
        """Prompt text, if known."""
        return next((str(stage.value) for stage in self.robot if stage.name == "prompt_text"), None)

    @property
    def cameras(self) -> list[str]:
        """Camera names in the order of the prefix."""
        return [name.removeprefix("image.") for name in self.batch if name.startswith("image.")]


def observation_stages(
    policy: Policy, observation: Mapping[str, Any], state: np.ndarray, sample: Mapping[str, Any]
) -> Iterator[Stage]:
    """Stages of step 0, from the robot's observation to token IDs.

    Args:
        state, sample: return values of `policy.prepare` for the observation.
    """
    inputs = policy.embodiment.to_model(observation, default_prompt=policy.default_prompt)
    present = [name for name, is_present in sample["image_mask"].items() if is_present]
    normalized = sample["state"][: len(state)]
    values = {
        **{f"robot/{key}": value for key, value in flatten(observation).items()},
        "cameras": ", ".join(present),
        **{f"embodiment/image/{name}": inputs["image"][name] for name in present},
        "embodiment/state": state,
        "embodiment/prompt": inputs["prompt"],
        "normalized_state": normalized,
        "prompt_text": policy.transforms.prompt_text(inputs["prompt"], normalized),
        "token_ids": sample["tokenized_prompt"][sample["tokenized_prompt_mask"]],
    }
    for name, value in values.items():
        yield Stage("0", name, value if isinstance(value, str) else np.asarray(value))


def forward_stages(inputs: TraceInputs, *, training: bool = True, num_steps: int = 10) -> Iterator[Stage]:
    """Stages of a batch in the order of the steps. Inference runs on the first sample only.

    Args:
        training: whether to include steps 5 to 11.
        num_steps: number of Euler steps.
    """
    yield from inputs.robot
    config, shown = inputs.config, list[Stage]()  # stages shown by nanopi but not yielded yet
    w: dict[str, Any] = {name: weight.detach() for name, weight in nanopi.weights_of(inputs.model).items()}
    w |= {f"{name}.weight": AsWeight(layer) for name, layer in quantized_layers(inputs.model).items()}

    def show(step: str, name: str, tensor: Tensor, layer: int | None = None) -> Tensor:
        if not layer or step in ("2", "8", "inference"):  # steps 7-1 to 7-7 show layer 0 only
            shown.extend(_stages(step, name, tensor, num_prefix=prefix_length))
        return tensor

    prefix_length = 0
    prefix = nanopi.embed_prefix(w, config, inputs.batch, show)
    prefix_length = prefix[0].shape[1]
    yield from shown
    shown.clear()
    first = (prefix[0][:1], prefix[1][:1], prefix[2])
    chunk = nanopi.sample_actions(w, config, first, inputs.batch["state"][:1], inputs.noise[:1], show, num_steps)
    inference = list(shown)
    shown.clear()
    if training:
        actions = chunk.expand_as(inputs.noise) if inputs.actions is None else inputs.actions
        yield Stage("0", "actions", actions)
        batch = {**inputs.batch, "actions": actions, "noise": inputs.noise, "time": inputs.time}
        nanopi.training_loss(w, config, prefix, batch, show)
        yield from shown
    yield from inference
    if inputs.to_robot is not None:
        yield Stage("inference", "robot_actions", inputs.to_robot(chunk[0].cpu().numpy()))


def _stages(step: str, name: str, tensor: Tensor, *, num_prefix: int) -> Iterator[Stage]:
    """Stage of a shown tensor; for a joint tensor, also the prefix and suffix blocks that the model computes."""
    is_joint = name in STEP_OF[step].joint
    yield Stage(step, name, tensor, "joint" if is_joint else "both")
    if not is_joint or step == "9" or name == "attn_out":  # nanopi shows the blocks of these itself
        return
    is_square = name in ("attn_mask", "logits", "probs")  # [..., queries, keys]
    query_dim = -2 if is_square else 1
    prefix, suffix = tensor.split([num_prefix, tensor.shape[query_dim] - num_prefix], query_dim)
    yield Stage(step, f"prefix/{name}", prefix[..., :num_prefix] if is_square else prefix, "cached")
    yield Stage(step, f"suffix/{name}", suffix, "cached")
