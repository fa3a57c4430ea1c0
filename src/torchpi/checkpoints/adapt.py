"""A model of other sizes out of a trained one, for another robot: cut, or extended by zeros."""

from collections.abc import Mapping

from torch import nn

from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import Pi0Suffix

FIELDS = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
"""The sizes that may change. action_dim changes arrays, the others are in none."""


def adapt(model: Pi0, sizes: Pi0Config | Mapping[str, int]) -> list[str]:
    """Give a model the sizes of a config, or other values of some of its `FIELDS`, in place.

    Rows and columns of dimensions that both have stay as they are; new ones are 0, so that a new dimension of the state
    is not read, and one of the actions is predicted as its mean.

    Returns:
        The changes, one line per setting and array.
    """
    if not isinstance(sizes, Pi0Config) and (unknown := sorted(set(sizes) - set(FIELDS))):
        raise CheckpointError(f"{', '.join(unknown)} can't be adapted; {', '.join(FIELDS)} can.")
    config = sizes if isinstance(sizes, Pi0Config) else Pi0Config.from_dict(sizes, model.config)
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
    resized = [("suffix.action_in_proj.weight", 1), ("action_out_proj.weight", 0), ("action_out_proj.bias", 0)]
    if isinstance(model.suffix, Pi0Suffix):
        resized.insert(1, ("suffix.state_proj.weight", 1))
    report = []
    for name, axis in resized:
        owner, _, attribute = name.rpartition(".")
        layer, before = model.get_submodule(owner), model.get_parameter(name).detach()
        kept = before.narrow(axis, 0, min(width, before.shape[axis]))
        after = before.new_zeros([width if i == axis else size for i, size in enumerate(before.shape)])
        after.narrow(axis, 0, kept.shape[axis]).copy_(kept)
        setattr(layer, attribute, nn.Parameter(after))
        setattr(layer, "in_features" if axis == 1 else "out_features", width)
        verb = "cut" if width < before.shape[axis] else "extended by zeros"
        report.append(f"{name}: {list(before.shape)} {verb} to {list(after.shape)}")
    return report
