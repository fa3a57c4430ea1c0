"""Inputs of a trace: a model and a batch, from a preset, a path, a policy or a dataset."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpi.arrays import read_npz
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.config import PRESETS, Pi0Config
from torchpi.errors import MissingFileError, UsageError
from torchpi.inspect import nanopi
from torchpi.inspect.stages import TraceInputs, observation_stages
from torchpi.model import flow
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy, load_policy
from torchpi.robots.keys import flatten, nest
from torchpi.types import Observation

CLASSIC_PI0 = Pi0Config(action_dim=7, action_horizon=32, max_token_len=16)  # the usual example for explaining π₀
PROMPT = ("tokenized_prompt", "tokenized_prompt_mask")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes that a trace can override; None keeps the target's own."""

    batch: int = 4
    max_token_len: int | None = None
    action_horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")

    def of_config(self) -> dict[str, Any]:
        """Overridden fields of `Pi0Config`."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "batch"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Source of a policy's observation: a file, or a frame of a dataset."""

    inputs: pathlib.Path | None = None
    dataset: str | None = None
    episode: int = 0
    frame: int = 0
    """Index within the episode."""
    dataset_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of `LeRobotDataset`: prompt, fps, tolerance_s."""
    demo: Mapping[str, Any] | None = None
    """Default observation of the embedded policy."""

    def __post_init__(self) -> None:
        if self.inputs is not None and self.dataset is not None:
            raise UsageError("An observation is read from --inputs or from --dataset, not from both.")


def find_inputs(target: str, shapes: Shapes, source: Source = Source(), **load: Any) -> TraceInputs:
    """Find the model and the batch of a trace target.

    Args:
        target: a preset name, "demo" or "tiny" for the embedded policy, or the path of a policy or checkpoint.
        load: arguments of `load_policy`.
    """
    if target in PRESETS and target != "tiny":
        if source.inputs is not None or source.dataset is not None:
            raise UsageError(
                f"{target} is a preset, traced without weights; inputs and datasets need the path of a policy."
            )
        _refuse_ignored(load, f"{target} is a preset, traced without weights")
        return inputs_of_config(CLASSIC_PI0 if target == "pi0" else PRESETS[target], shapes, title=target)
    if target not in ("demo", "tiny") and "/" not in target and not pathlib.Path(target).exists():
        raise MissingFileError(
            f"There is neither a checkpoint nor a preset {target}; presets are {', '.join(PRESETS)}."
        )
    return _inputs_of_path("demo" if target == "tiny" else target, pathlib.Path(target).name, shapes, source, load)


def inputs_of_config(config: Pi0Config, shapes: Shapes, *, title: str = "") -> TraceInputs:
    """Model of these sizes on the meta device, which has shapes but no values, and a batch for it."""
    config, notes = _complete(dataclasses.replace(config, **shapes.of_config()))
    arrays = nanopi.random_inputs(config, 1)
    return inputs_of_model(Pi0(config, device="meta"), shapes, arrays, title=title, notes=notes)


def _inputs_of_path(path: str, title: str, shapes: Shapes, source: Source, load: Mapping[str, Any]) -> TraceInputs:
    """Policy with an observation, or checkpoint of an unknown robot with a batch of the model's own keys."""
    arrays = None if source.inputs is None else read_npz(source.inputs)
    is_model_batch = arrays is not None and "tokenized_prompt" in arrays
    checkpoint = open_checkpoint(path, config=load.get("config"), embedding=load.get("embedding"))
    if not is_model_batch and ("embodiment" in load or checkpoint.spec().embodiment is not None):
        policy = load_policy(path, engine="eager", **load)
        if arrays is not None:
            return inputs_of_policy(policy, shapes, arrays, title=title)
        if path == "demo" and source.dataset is None and source.demo is not None:
            return inputs_of_policy(policy, shapes, source.demo, title=title)
        observation, note = _default_observation(policy, source)
        return inputs_of_policy(policy, shapes, observation, title=title, notes=(note,))
    if source.dataset is not None or (arrays is not None and not is_model_batch):
        keys = f" ({', '.join(sorted(arrays)[:6])})" if arrays is not None else ""
        raise UsageError(
            f"{path} is a checkpoint that does not state its robot, and {source.dataset or source.inputs} has a "
            f"robot's observations{keys}. Trace a policy folder, name the robot with --embodiment, or give a batch "
            "with the model's keys: image.<camera>, state, tokenized_prompt, tokenized_prompt_mask."
        )
    model_options = ("config", "embedding", "device", "lora_alpha", "verify")
    ignored = {name: value for name, value in load.items() if name not in model_options}
    _refuse_ignored(ignored, f"{path} is traced as a model without a robot")
    weight_options = {name: load[name] for name in ("lora_alpha", "verify") if name in load}
    model = checkpoint.model(device=load.get("device") or "cpu", **weight_options)
    if arrays is not None:
        return inputs_of_model(model, shapes, arrays, title=title)
    note = "The checkpoint does not state its robot: images, state and prompt are random numbers."
    random = nanopi.random_inputs(_complete(dataclasses.replace(model.config, **shapes.of_config()))[0], 1)
    batch = {name: array for name, array in random.items() if name not in ("noise", "time", "actions")}
    return inputs_of_model(model, shapes, batch, title=title, notes=(note,))


def _refuse_ignored(options: Mapping[str, Any], reason: str) -> None:
    if options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise UsageError(f"{reason}; {names} would have no effect. Leave it out.")


def _default_observation(policy: Policy, source: Source) -> tuple[Mapping[str, Any], str]:
    """Frame of the dataset, or the embodiment's example observation, and a note about its origin."""
    if source.dataset is None:
        note = "No observation was given: this is the embodiment's example, with random pixels and a state of zeros."
        return policy.example_observation(), note
    from torchpi.data import LeRobotDataset
    from torchpi.data.observations import to_observation

    frames = LeRobotDataset(
        source.dataset,
        action_horizon=policy.model.config.require("action_horizon"),
        embodiment=policy.embodiment,
        episodes=[source.episode],
        columns=(),
        **source.dataset_args,
    )
    if not 0 <= source.frame < len(frames):
        raise UsageError(f"Episode {source.episode} has the frames 0 to {len(frames) - 1}, got {source.frame}.")
    note = f"Observation and actions: frame {source.frame} of episode {source.episode} of {source.dataset}."
    return to_observation(frames[source.frame], policy.embodiment), note


def inputs_of_policy(
    policy: Policy,
    shapes: Shapes,
    observation: Mapping[str, Any],
    *,
    title: str = "",
    notes: tuple[str, ...] = (),
    noise: np.ndarray | None = None,
) -> TraceInputs:
    """Policy with one observation of its robot, repeated to the batch size.

    Args:
        observation: may include "actions", as a dataset's frame does; the loss is then computed with them.
        noise: [H, action_dim]; by default random.
    """
    state, sample = policy.prepare(observation)
    arrays = {key: np.asarray(value)[None] for key, value in flatten(sample).items()}
    if noise is not None:
        arrays["noise"] = noise[None]
    if "source" in policy.provenance:
        notes = (f"Source of the weights: {policy.provenance['source']}.", *notes)
    inputs = inputs_of_model(policy.model, shapes, arrays, title=title or policy.embodiment.name, notes=notes)
    size = policy.embodiment.action_size
    return dataclasses.replace(
        inputs,
        action_names=policy.embodiment.action_names,
        robot=tuple(observation_stages(policy, observation, state, sample)),
        to_robot=lambda chunk: policy.embodiment.from_model(
            policy.transforms.inverse(chunk, action_size=size), state
        ).astype(np.float32),
    )


def inputs_of_model(
    model: Pi0, shapes: Shapes, arrays: Mapping[str, np.ndarray], *, title: str = "", notes: tuple[str, ...] = ()
) -> TraceInputs:
    """Model with a batch of the model's own keys, whose rows are repeated to the batch size.

    Args:
        arrays: keys of `TraceInputs.batch`; optionally "actions" and "noise" [b, H, A] and "time" [b].
    """
    sizes = shapes.of_config()
    if sizes.pop("action_dim", model.config.action_dim) != model.config.action_dim:
        raise UsageError(
            f"action_dim is {model.config.action_dim} in the weights of this model and cannot be {shapes.action_dim}; "
            "trace a preset instead, or omit --action-dim."
        )
    if missing := [key for key in ("state", *PROMPT) if key not in arrays]:
        raise UsageError(f"The batch has no {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}.")
    rows = {
        name: torch.from_numpy(np.resize(array, (shapes.batch, *array.shape[1:]))).to(model.device)
        for name, array in arrays.items()
    }
    if (chunk := rows.get("noise", rows.get("actions"))) is not None:
        sizes.setdefault("action_horizon", chunk.shape[1])
    config, assumptions = _complete(dataclasses.replace(model.config, **sizes))
    generator, shape = torch.Generator().manual_seed(0), (shapes.batch, *config.chunk_shape)
    random_noise = torch.randn(shape, generator=generator)
    random_time = flow.sample_time(shapes.batch, generator=generator, device=torch.device("cpu"))
    noise, time = rows.get("noise", random_noise.to(model.device)), rows.get("time", random_time.to(model.device))
    actions = rows["actions"].float() if "actions" in rows else None
    for name, value in (("noise", noise), ("actions", actions)):
        if value is not None and value.shape != shape:
            raise UsageError(f"{name} must be {list(shape)} for this model, got {list(value.shape)}.")
    if actions is None:
        note = "The loss is computed for a chunk sampled by the model itself; --dataset supplies recorded actions."
        assumptions = (*assumptions, note)
    length = config.require("max_token_len")
    rows |= {name: torch.nn.functional.pad(rows[name], (0, length - rows[name].shape[1])) for name in PROMPT}
    batch = {name: row for name, row in rows.items() if name.startswith("image") or name in ("state", *PROMPT)}
    observation_of(batch)  # raises an error for a malformed batch
    return TraceInputs(title or config.variant, model, config, batch, noise, time, actions, (*notes, *assumptions))


def observation_of(batch: Mapping[str, Tensor]) -> Observation:
    """Observation from a trace's batch."""
    return Observation.from_dict(nest(batch))


def _complete(config: Pi0Config) -> tuple[Pi0Config, tuple[str, ...]]:
    """Set unset sizes to the variant's defaults; returns the config and a note for the assumption."""
    default = PRESETS["pi05" if config.pi05 else "pi0"]
    unset = [name for name in ("action_horizon", "max_token_len") if getattr(config, name) is None]
    if not unset:
        return config, ()
    values: dict[str, Any] = {name: getattr(default, name) for name in unset}
    assumed = ", ".join(f"{name} {value}" for name, value in values.items())
    note = f"The checkpoint does not state all sizes; assumed {config.variant}'s default: {assumed}."
    return dataclasses.replace(config, **values), (note,)
