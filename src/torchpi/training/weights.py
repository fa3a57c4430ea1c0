"""The weights that a run begins with, and which of them it changes."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from torchpi.checkpoints.adapter import digest
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.config import PRESETS, Pi0Config, preset
from torchpi.errors import TrainingError
from torchpi.model.lora import add_lora, is_lora, lora_config, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.training.config import TrainConfig
from torchpi.types import Observation


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Where the weights of a run come from."""

    source: str
    """The address, or "random"."""
    loaded: tuple[str, ...]
    """Parameters out of the checkpoint."""
    fresh: tuple[str, ...]
    """Parameters that were drawn."""
    left_out: Mapping[str, str]
    """Arrays of the checkpoint that no computation reads, and why."""
    adapted: str
    """What was cut or extended."""
    constant: str = ""
    """SHA-256 of the weights that the run does not change; none where they are on "meta"."""


def model_config(config: TrainConfig) -> Pi0Config:
    """The model's sizes, without reading any weights."""
    given = _given_sizes(config)
    if config.model.init is None:
        if given is None:
            raise TrainingError(
                "Say which weights to begin with (--init, for example gs://openpi-assets/checkpoints/pi05_base), or "
                f"the sizes of a model that is trained from scratch (--model: {', '.join(PRESETS)}, or a JSON file)."
            )
        return given
    return open_checkpoint(config.model.init, config=given, adapt=config.model.adapt and given is not None).config


def _given_sizes(config: TrainConfig) -> Pi0Config | None:
    if config.model.config is None:
        return None
    if config.model.config in PRESETS:
        return preset(config.model.config)
    if not pathlib.Path(config.model.config).is_file():
        raise TrainingError(
            f"model {config.model.config!r} is neither a file nor a preset; presets are {', '.join(PRESETS)}."
        )
    return Pi0Config.from_json(config.model.config)


def begin_model(config: TrainConfig, sizes: Pi0Config, *, skeleton: bool) -> tuple[Pi0, Beginning]:
    """The model before the first update: from scratch or `init`, with LoRA where it is trained; what is not trained
    needs no gradient, and is in its own dtype.

    Args:
        sizes: `model_config` of the recipe.
        skeleton: leave the weights on "meta".
    """
    device = "meta" if skeleton else "cpu"
    if config.model.init is None or skeleton:
        model = Pi0(sizes, device="meta")
        if not skeleton:
            model.to_empty(device="cpu")
            model.init_weights(torch.Generator().manual_seed(config.seed))
        beginning = Beginning("random", (), (), {}, "")
    else:
        model, beginning = _load(config, sizes)
    if config.model.trains_lora and lora_config(model) is None:
        add_lora(model, config.model.lora, torch.Generator(device).manual_seed(config.seed) if not skeleton else None)
    model.compute_dtype_override = getattr(torch, config.model.dtype)
    model.requires_grad_(True).train()
    freeze(model, config)
    fresh = tuple(name for name, _ in model.named_parameters() if name not in beginning.loaded)
    constant = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    sha256 = "" if skeleton else digest(constant, model.get_parameter)
    return model, dataclasses.replace(beginning, fresh=fresh, constant=sha256)


def _load(config: TrainConfig, sizes: Pi0Config) -> tuple[Pi0, Beginning]:
    assert config.model.init is not None
    try:
        checkpoint = open_checkpoint(config.model.init, config=sizes, adapt=config.model.adapt)
    except ValueError as error:
        if not config.model.adapt and config.model.config is not None:
            error.add_note("Weights of another action_dim are cut or extended on request: adapt (--adapt).")
        raise
    # LoRA that is there is trained on where LoRA is trained, and is a part of the weights elsewhere.
    if checkpoint.folded:
        alpha = (config.model.lora.backbone_alpha, config.model.lora.expert_alpha)
        keep = config.model.trains_lora
        model = checkpoint.model(lora_alpha=alpha, lora="keep" if keep else "fold")
        if keep and lora_config(model) != config.model.lora:
            raise TrainingError(
                f"{config.model.init} has {lora_config(model)}, the recipe {config.model.lora}: use the same, or "
                "fold it into the weights first with torchpi convert."
            )
    else:
        model = checkpoint.model()
    loaded = tuple(name for name, _ in model.named_parameters())
    return model, Beginning(config.model.init, loaded, (), checkpoint.dropped, "; ".join(checkpoint.notes))


def freeze(model: Pi0, config: TrainConfig) -> None:
    """Say of every parameter whether it is trained, and bring those that are not to their dtype."""
    changed, unused = trainable_parameters(model, config.model.finetune), without_gradient(model, config)
    frozen_dtype = getattr(torch, config.model.frozen_dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(changed[name] and name not in unused)
        if not changed[name]:
            parameter.data = parameter.data.to(frozen_dtype)


def without_gradient(model: Pi0, config: TrainConfig) -> frozenset[str]:
    """The parameters that the flow loss does not depend on: of the backbone's last layer all behind keys and values,
    and its final norm. They are found by a backward pass without numbers.
    """
    twin = Pi0(model.config, device="meta")
    if config.model.trains_lora:
        add_lora(twin, config.model.lora, None)
    sizes = model.config
    horizon = sizes.action_horizon or 1
    observation = Observation.from_dict(
        {
            "image": {"camera": torch.empty(1, sizes.image_size, sizes.image_size, 3, device="meta")},
            "image_mask": {"camera": torch.ones(1, dtype=torch.bool, device="meta")},
            "state": torch.empty(1, sizes.action_dim, device="meta"),
            "tokenized_prompt": torch.zeros(1, 2, dtype=torch.long, device="meta"),
            "tokenized_prompt_mask": torch.ones(1, 2, dtype=torch.bool, device="meta"),
        }
    )
    actions = torch.empty(1, horizon, sizes.action_dim, device="meta")
    time = torch.empty(1, device="meta")
    twin(observation, actions, noise=torch.empty_like(actions), time=time).mean().backward()
    return frozenset(name for name, parameter in twin.named_parameters() if parameter.grad is None)


@dataclasses.dataclass(frozen=True)
class Part:
    """A line of the table of parameters."""

    part: str
    trainable: int
    frozen: int
    without_gradient: int
    """Trained as far as the recipe goes, but the loss does not depend on them."""
    dtype: str
    """Of the frozen ones, or of all."""


def table(model: Pi0, config: TrainConfig) -> list[Part]:
    """What is trained of each part of the model."""
    changed = trainable_parameters(model, config.model.finetune)
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = f"{name.split('.')[0]}{' LoRA' if is_lora(name) else ''}"
        count = rows.setdefault(part, {"trainable": 0, "frozen": 0, "without_gradient": 0, "dtype": set()})
        kind = "trainable" if parameter.requires_grad else "without_gradient" if changed[name] else "frozen"
        count[kind] += parameter.numel()
        count["dtype"].add(str(parameter.dtype).removeprefix("torch."))
    return [Part(part, **{**count, "dtype": ", ".join(sorted(count["dtype"]))}) for part, count in rows.items()]
