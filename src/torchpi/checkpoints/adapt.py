"""A model of other sizes out of a trained one, for another robot: cut, or extended by zeros."""

import torch
from torch import nn

from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import Pi0Suffix

FIELDS = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
"""The sizes that may change. action_dim changes arrays, the others are in none."""


def adapt(model: Pi0, config: Pi0Config) -> list[str]:
    """Give a model the sizes of `config`, in place.

    Rows and columns of dimensions that both have stay as they are; new ones are 0, so that a new dimension of the state
    is not read, and one of the actions is predicted as its mean.

    Returns:
        The changes, one line per setting and array.
    """
    old, new = model.config.to_dict(), config.to_dict()
    different = [name for name in new if new[name] != old[name]]
    if others := [name for name in different if name not in FIELDS]:
        raise CheckpointError(
            f"adapt=True can change {', '.join(FIELDS)}; the config also differs in {', '.join(others)}."
        )
    report = [f"{field}: {old[field]} to {new[field]}" for field in FIELDS if field in different]
    if "action_dim" in different:
        report += _resize(model, config.action_dim)
    model.config = config
    return report


def _resize(model: Pi0, width: int) -> list[str]:
    readers = {"suffix.action_in_proj": model.suffix.action_in_proj}
    if isinstance(model.suffix, Pi0Suffix):
        readers["suffix.state_proj"] = model.suffix.state_proj
    report = []
    for name, axis in [
        *((f"{name}.weight", 1) for name in readers),
        ("action_out_proj.weight", 0),
        ("action_out_proj.bias", 0),
    ]:
        before = model.get_parameter(name).detach()
        after = _resized(before, axis, width)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(after))
        verb = "cut" if width < before.shape[axis] else "extended by zeros"
        report.append(f"{name}: {list(before.shape)} {verb} to {list(after.shape)}")
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
