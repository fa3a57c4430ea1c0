"""What is traced: a model and a batch of input, found from what the user named."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchpi.arrays import read_npz
from torchpi.config import PRESETS, Pi0Config
from torchpi.errors import UsageError
from torchpi.model import flow
from torchpi.model.pi0 import Pi0

if TYPE_CHECKING:
    from torchpi.policy import Policy

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # of the published models
CLASSIC_PI0 = Pi0Config(action_dim=7, action_horizon=32, max_token_len=16)  # the example that π₀ is explained with


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a trace may be asked to change; None: as the target has it."""

    batch: int = 4
    max_token_len: int | None = None
    action_horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise UsageError(f"{field.name} must be at least 1, got {value}.")

    def of_config(self) -> dict[str, Any]:
        """Those that were asked for and are fields of a config."""
        asked = dataclasses.asdict(self)
        del asked["batch"]
        return {name: value for name, value in asked.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and a batch of input for it, on one device; on "meta" neither has values."""

    title: str
    model: Pi0
    config: Pi0Config
    """The model's, with horizon and prompt length set."""
    observation: Mapping[str, Any]
    """What `Observation.from_dict` takes."""
    noise: Tensor
    """[B, H, A]"""
    time: Tensor
    """[B]"""
    actions: Tensor | None = None
    """[B, H, A]; None: the chunk that the model itself samples stands in for recorded ones."""
    notes: tuple[str, ...] = ()
    """What the reader must know: assumptions, made-up input, untrained weights."""
    prompt: str | None = None
    """The text behind the token ids."""
    action_names: tuple[str, ...] = ()
    """Of the dimensions that the robot has; the others are padding. Empty: not known."""

    @property
    def real(self) -> bool:
        """Whether there are values, or shapes alone."""
        return self.model.device.type != "meta"


def find_subject(
    target: str,
    sizes: Sizes,
    *,
    inputs: pathlib.Path | None = None,
    config: str | None = None,
    device: str | None = None,
) -> Subject:
    """What a user means by `target`.

    Args:
        target: a preset's name; "tiny" or "demo": the embedded policy with its camera frames; else the path of a policy
            or checkpoint.
        inputs: an .npz file, nested keys joined with '.': a robot's observation, or a batch in the model's terms.
        config: a preset or JSON file for checkpoints that do not say their horizon and prompt length.
        device: where a policy runs.
    """
    if target in ("tiny", "demo"):
        from torchpi.demo.frames import demo_observation
        from torchpi.policy import load_policy

        observation = demo_observation() if inputs is None else read_npz(inputs)
        policy = load_policy("demo", config=config, device=device or "cpu")
        return from_policy(policy, sizes, observation, title=target)
    if target in PRESETS:
        if inputs is not None:
            raise UsageError(f"{target} is traced by its sizes alone, without weights; inputs need a policy's path.")
        return from_config(CLASSIC_PI0 if target == "pi0" else PRESETS[target], sizes, title=target)
    return from_path(target, sizes, inputs=inputs, config=config, device=device)


def from_config(config: Pi0Config, sizes: Sizes, *, title: str = "") -> Subject:
    """A model of these sizes on the meta device: shapes without values, at any size."""
    config, notes = _complete(dataclasses.replace(config, **sizes.of_config()))
    model = Pi0(config, device="meta")
    with torch.device("meta"):
        batch, size, length = sizes.batch, config.image_size, config.require("max_token_len")
        observation = {
            "image": {name: torch.empty(batch, size, size, 3, dtype=torch.uint8) for name in CAMERAS},
            "image_mask": {name: torch.empty(batch, dtype=torch.bool) for name in CAMERAS},
            "state": torch.empty(batch, config.action_dim),
            "tokenized_prompt": torch.empty(batch, length, dtype=torch.int64),
            "tokenized_prompt_mask": torch.empty(batch, length, dtype=torch.bool),
        }
        actions, noise = torch.empty(2, batch, config.require("action_horizon"), config.action_dim).unbind()
    time = flow.sample_time(sizes.batch, device=torch.device("meta"))
    return Subject(title or _variant(config), model, config, observation, noise, time, actions, notes)


def from_path(
    path: str,
    sizes: Sizes,
    *,
    inputs: pathlib.Path | None = None,
    config: str | None = None,
    device: str | None = None,
) -> Subject:
    """A policy folder with an observation, or a bare checkpoint with a batch in the model's terms.

    Without `inputs`, a policy sees its embodiment's example and a bare checkpoint random numbers; the notes say so.
    """
    from torchpi.checkpoints import load_model
    from torchpi.checkpoints.address import existing_folder
    from torchpi.checkpoints.folder import is_policy_folder
    from torchpi.policy import load_policy

    arrays = None if inputs is None else read_npz(inputs)
    of_model = arrays is not None and "tokenized_prompt" in arrays
    title = pathlib.Path(path).name
    if is_policy_folder(existing_folder(path)) and not of_model:
        policy = load_policy(path, config=config, device=device)
        if arrays is not None:
            return from_policy(policy, sizes, arrays, title=title)
        note = "No observation was given: random pixels and a state of zeros, the embodiment's example."
        return from_policy(policy, sizes, policy.example_observation(), title=title, notes=(note,))
    if arrays is not None and not of_model:
        raise UsageError(
            f"{path} is a bare checkpoint, which says nothing about a robot, and {inputs} is a robot's observation "
            f"({', '.join(sorted(arrays)[:6])}). Trace a policy folder, or give a batch in the model's terms: "
            "image.<camera>, state, tokenized_prompt, tokenized_prompt_mask."
        )
    model = load_model(path, config=config, device=device or "cpu")
    if arrays is None:
        note = "The checkpoint says nothing about a robot: images, state and prompt are random numbers."
        return from_model(model, sizes, _random_batch(model.config, sizes), title=title, notes=(note,))
    return from_model(model, sizes, arrays, title=title)


def from_policy(
    policy: "Policy",
    sizes: Sizes,
    observation: Mapping[str, Any],
    *,
    title: str = "",
    notes: tuple[str, ...] = (),
) -> Subject:
    """A policy with one observation of its robot, repeated to the batch."""
    from torchpi.transforms.prompt import as_text, clean_text, pi05_prompt_text

    state, sample = policy.prepare(observation)
    batch = {
        **{f"image.{name}": image[None] for name, image in sample["image"].items()},
        **{f"image_mask.{name}": np.asarray(present)[None] for name, present in sample["image_mask"].items()},
        **{key: sample[key][None] for key in ("state", "tokenized_prompt", "tokenized_prompt_mask")},
        **{key: np.asarray(sample[key], np.float32)[None] for key in ("actions",) if key in sample},
    }
    text = as_text(observation.get("prompt", policy.default_prompt or ""))
    if policy.transforms.discrete_state_input:
        text = pi05_prompt_text(text, sample["state"][: len(state)])
    else:
        text = clean_text(text) + "\n"
    if "source" in policy.provenance:
        notes = (f"Where the weights come from: {policy.provenance['source']}.", *notes)
    subject = from_model(policy.model, sizes, batch, title=title or policy.embodiment.name, notes=notes)
    names = tuple(action.name for action in policy.embodiment.actions)
    return dataclasses.replace(subject, prompt=text, action_names=names)


def from_model(
    model: Pi0, sizes: Sizes, arrays: Mapping[str, np.ndarray], *, title: str = "", notes: tuple[str, ...] = ()
) -> Subject:
    """A model with a batch in its own terms, whose rows are repeated to the batch size.

    Args:
        arrays: "image.<camera>" [b, h, w, 3], "image_mask.<camera>" [b], "state" [b, A], "tokenized_prompt" and
            "tokenized_prompt_mask" [b, L]; optionally "actions" and "noise" [b, H, A] and "time" [b].
    """
    asked = sizes.of_config()
    if asked.pop("action_dim", model.config.action_dim) != model.config.action_dim:
        raise UsageError(
            f"action_dim is {model.config.action_dim} in the weights of this model and cannot be {sizes.action_dim}; "
            "trace a preset instead, or leave --action-dim away."
        )
    missing = [key for key in ("state", "tokenized_prompt", "tokenized_prompt_mask") if key not in arrays]
    if missing:
        raise UsageError(f"The batch has no {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}.")
    rows = {name: torch.from_numpy(np.resize(value, (sizes.batch, *value.shape[1:]))) for name, value in arrays.items()}
    given = rows.get("noise", rows.get("actions"))
    if given is not None:
        asked.setdefault("action_horizon", given.shape[1])
    config, assumed = _complete(dataclasses.replace(model.config, **asked))
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, config.require("action_horizon"), config.action_dim)
    noise = rows.get("noise", torch.randn(shape, generator=generator))
    time = rows.get("time", flow.sample_time(sizes.batch, generator=generator, device=torch.device("cpu")))
    for name, chunk in (("noise", noise), ("actions", rows.get("actions"))):
        if chunk is not None and chunk.shape != shape:
            raise UsageError(f"{name} must be {list(shape)} for this model, got {list(chunk.shape)}.")
    if "actions" not in rows:
        assumed = (*assumed, "No recorded actions: the chunk that the model itself samples stands in for them.")
    length = config.require("max_token_len")
    rows |= {name: _to_length(rows[name], length) for name in ("tokenized_prompt", "tokenized_prompt_mask")}
    rows = {name: tensor.to(model.device) for name, tensor in rows.items()}
    return Subject(
        title=title or _variant(config),
        model=model,
        config=config,
        observation={
            "image": _under("image.", rows),
            "image_mask": _under("image_mask.", rows),
            **{name: rows[name] for name in ("state", "tokenized_prompt", "tokenized_prompt_mask")},
        },
        noise=noise.to(model.device),
        time=time.to(model.device),
        actions=rows.get("actions"),
        notes=(*notes, *assumed),
    )


def _random_batch(config: Pi0Config, sizes: Sizes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length = sizes.max_token_len or config.max_token_len or _defaults(config).require("max_token_len")
    size = config.image_size
    return {
        **{f"image.{name}": rng.integers(0, 256, (1, size, size, 3), np.uint8) for name in CAMERAS},
        "state": rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32),
        "tokenized_prompt": rng.integers(0, config.vocab_size, (1, length)),
        "tokenized_prompt_mask": np.ones((1, length), np.bool_),
    }


def _complete(config: Pi0Config) -> tuple[Pi0Config, tuple[str, ...]]:
    """The config with every size set, and what had to be assumed for that."""
    unset = [name for name in ("action_horizon", "max_token_len") if getattr(config, name) is None]
    defaults: dict[str, Any] = {name: getattr(_defaults(config), name) for name in unset}
    said = ", ".join(f"{name} {value}" for name, value in defaults.items())
    notes = (f"The checkpoint does not say {said}: {_variant(config)}'s default.",) if unset else ()
    return dataclasses.replace(config, **defaults), notes


def _defaults(config: Pi0Config) -> Pi0Config:
    return PRESETS["pi05" if config.pi05 else "pi0"]


def _variant(config: Pi0Config) -> str:
    return "π₀.₅" if config.pi05 else "π₀"


def _under(prefix: str, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in rows.items() if name.startswith(prefix)}


def _to_length(tokens: Tensor, length: int) -> Tensor:
    """Padded with zeros, or cut at the end."""
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]))
