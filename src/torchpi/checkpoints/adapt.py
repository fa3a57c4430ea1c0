"""A model of other sizes out of a trained one, for another robot: cut, or extended by zeros."""

import dataclasses

import torch
from torch import nn

from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import Pi0Suffix

FIELDS = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
"""What may change: the first one changes arrays, the others are in none."""


def adapt(model: Pi0, config: Pi0Config) -> list[str]:
    """Give a model the sizes of `config`, in place.

    The rows and columns that belong to dimensions that both have stay as they are; new ones are 0, so that a new
    dimension of the state is not read, and one of the actions is predicted as its mean.

    Returns:
        What was done, one line per array and setting.
    """
    old = model.config
    changed = {field: getattr(config, field) for field in FIELDS}
    if dataclasses.replace(old, **changed).to_dict() != config.to_dict():
        differences = [name for name, value in config.to_dict().items() if value != old.to_dict()[name]]
        raise CheckpointError(
            f"adapt=True can change {', '.join(FIELDS)}; the config also differs in "
            f"{', '.join(name for name in differences if name not in FIELDS)}."
        )
    report = [
        f"{field}: {getattr(old, field)} to {value}" for field, value in changed.items() if value != getattr(old, field)
    ]
    if config.action_dim != old.action_dim:
        report += _resize(model, config.action_dim)
    model.config = config
    return report


def _resize(model: Pi0, width: int) -> list[str]:
    suffix, report = model.suffix, []
    readers = {"suffix.action_in_proj": suffix.action_in_proj}
    if isinstance(suffix, Pi0Suffix):
        readers["suffix.state_proj"] = suffix.state_proj
    changed = [(name, layer, "weight", 1) for name, layer in readers.items()]
    changed += [("action_out_proj", model.action_out_proj, parameter, 0) for parameter in ("weight", "bias")]
    for name, layer, parameter, axis in changed:
        before = getattr(layer, parameter)
        after = nn.Parameter(_resized(before.detach(), axis, width))
        setattr(layer, parameter, after)
        verb = "cut" if width < before.shape[axis] else "extended by zeros"
        report.append(f"{name}.{parameter}: {list(before.shape)} {verb} to {list(after.shape)}")
    for layer in readers.values():
        layer.in_features = width
    model.action_out_proj.out_features = width
    return report


def _resized(array: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    kept = array.narrow(axis, 0, min(size, array.shape[axis]))
    if size <= array.shape[axis]:
        return kept.clone()
    shape = list(array.shape)
    shape[axis] = size - array.shape[axis]
    return torch.cat([kept, array.new_zeros(shape)], dim=axis)
