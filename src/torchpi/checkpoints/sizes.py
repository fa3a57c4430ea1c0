"""Sizes of a checkpoint's model, from its arrays, its config.json and `config=`; adapting a model to other sizes."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from torchpi.checkpoints.fields import require_fields
from torchpi.config import MAX_SIZES, PRESETS, Pi0Config
from torchpi.errors import CheckpointError, did_you_mean, is_whole
from torchpi.model.flow import MAX_NUM_STEPS
from torchpi.model.pi0 import Pi0
from torchpi.model.suffix import Pi0Suffix
from torchpi.robots.keys import flatten
from torchpi.schema import read_json_object

ConfigLike = Pi0Config | Mapping[str, Any] | str | pathlib.Path
"""A Pi0Config, a dict of its fields or a JSON file (either may be partial), or the name of a preset."""

# Fields of Pi0Config, and their names in the PyTorch formats. The names of variants there define no sizes.
_OPENPI_FIELDS = {name: name for name in ("action_dim", "action_horizon", "max_token_len")}
_FLAGS = ("pi05", "discrete_state_input")
_LEROBOT_FIELDS = {
    "action_dim": "max_action_dim",
    "action_horizon": "chunk_size",
    "max_token_len": "tokenizer_max_length",
}
_LEROBOT_COUNTS = {
    "num_inference_steps": (1, MAX_NUM_STEPS),
    "n_action_steps": (1, MAX_SIZES["action_horizon"]),
    "rtc_training_max_delay": (0, MAX_SIZES["action_horizon"]),
    "empty_cameras": (0, 100),
}
"""Minimum and maximum of LeRobot's other counts."""
ADAPTABLE = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
"""Fields that `adapt` can change. Only action_dim changes arrays."""


def read_config(config: ConfigLike) -> Pi0Config | dict[str, Any]:
    """Resolve the argument `config=`; the result is a dict, maybe partial, if it is a dict or a file."""
    if isinstance(config, Pi0Config):
        return config
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    if isinstance(config, str) and not pathlib.Path(config).is_file():
        presets = f"{', '.join(PRESETS)}{did_you_mean(config, PRESETS)}"
        raise CheckpointError(f"config={config!r} is neither a file nor a preset; presets are {presets}.")
    return read_json_object(config)


def stated_heads(config: Pi0Config | Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Numbers of vision, query and key/value heads, which the shapes of PyTorch's matrices do not determine; None if
    the config does not state them."""
    values = config.to_dict() if isinstance(config, Pi0Config) else config
    try:
        vision, backbone = values["siglip"], values["paligemma"]
        return vision["num_heads"], backbone["num_heads"], backbone["num_kv_heads"]
    except (KeyError, TypeError):
        return None


def stated_sizes(file: pathlib.Path, document: Mapping[str, Any], *, is_lerobot: bool) -> dict[str, Any]:
    """Fields of Pi0Config in the config.json of a PyTorch format."""
    fields = _LEROBOT_FIELDS if is_lerobot else _OPENPI_FIELDS
    require_fields(f"{'lerobot' if is_lerobot else 'openpi-pytorch'}: config.json", document, file)
    given = {name: value for name, value in document.items() if value is not None}
    bounds = {name: (1, MAX_SIZES[field]) for field, name in fields.items()} | _LEROBOT_COUNTS
    for name in sorted(bounds.keys() & given.keys()):
        minimum, maximum = bounds[name]
        value = given[name]
        if not is_whole(value) or not minimum <= value <= maximum:
            expected = "a positive integer" if minimum else "a non-negative integer"
            if is_whole(value) and value > maximum:
                expected = f"at most {maximum}"
            raise CheckpointError(f"{file}: {name} must be {expected}, found {value!r:.80}.")
    for name in _FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise CheckpointError(f"{file}: {name} must be true or false, found {given[name]!r}.")
    stated = {field: given[name] for field, name in fields.items() if name in given}
    if not is_lerobot:
        return stated | {name: given[name] for name in _FLAGS if name in given}
    stated["pi05"] = stated["discrete_state_input"] = document.get("type") == "pi05"
    if resolution := document.get("image_resolution"):
        if not isinstance(resolution, list) or len({*map(repr, resolution)}) != 1 or not is_whole(resolution[0]):
            raise CheckpointError(f"{file}: image_resolution is {resolution}; only square images are supported.")
        stated["image_size"] = resolution[0]
    return stated


def add_stated(
    from_arrays: Pi0Config, stated: Mapping[str, Any], file: pathlib.Path, *, may_contradict: bool
) -> tuple[Pi0Config, list[str]]:
    """Complete the sizes from the arrays by those in a config.json next to them.

    Also returns a note on contradictions; they are an error unless `may_contradict`.
    """
    contradictions = [
        f"{field} is {value} there, {getattr(from_arrays, field)} in the arrays"
        for field, value in stated.items()
        if getattr(from_arrays, field) not in (None, value)
    ]
    notes = [f"{file} contradicts the arrays: {'; '.join(contradictions)}"] if contradictions else []
    if notes and not may_contradict:
        raise CheckpointError(f"{notes[0]}. Correct it, or pass config=.")
    unset = {field: value for field, value in stated.items() if getattr(from_arrays, field) is None}
    return dataclasses.replace(from_arrays, **unset), notes


def overrule(root: pathlib.Path, stored: Pi0Config, explicit: Pi0Config, *, in_file: str) -> list[str]:
    """Check `config=` against the stored sizes; return a note on what it overrules in the file that states them.

    It may overrule every field of a policy.json, since the arrays are checked against it later. In other checkpoints it
    may overrule only fields that no array determines.
    """
    if in_file == "policy.json":
        differences = _differences(explicit, stored)
        return [f"{root}: config= overrides {differences}"] if differences else []
    not_in_arrays = {"action_horizon", "max_token_len", "discrete_state_input"}
    if stored.siglip.position != "learned":
        not_in_arrays.add("image_size")
    if contradictions := _differences(explicit, stored, except_for=not_in_arrays):
        raise CheckpointError(
            f"config= contradicts the checkpoint's arrays: {contradictions}. adapt=True cuts or extends action_dim."
        )
    overruled = [
        f"{field} {getattr(stored, field)} with {getattr(explicit, field)}"
        for field in sorted(not_in_arrays)
        if getattr(stored, field) not in (None, getattr(explicit, field))
    ]
    return [f"{root / in_file}: config= overrides {'; '.join(overruled)}"] if overruled and in_file else []


def _differences(explicit: Pi0Config, stored: Pi0Config, *, except_for: Collection[str] = ()) -> str:
    """Describe the fields in which two configs differ, with both values."""
    stored_values = flatten(stored.to_dict())
    return "; ".join(
        f"{name} is {value} in config, {stored_values[name]} in the checkpoint"
        for name, value in flatten(explicit.to_dict()).items()
        if value != stored_values[name] and name not in except_for
    )


def adapt(model: Pi0, sizes: Pi0Config | Mapping[str, int]) -> list[str]:
    """Change a model to the sizes of a config, or other values of `ADAPTABLE` fields, in place; describe the changes.

    Weights of dimensions that both have stay as they are; new ones are 0. A new state dimension is thus ignored. A new
    action dimension has velocity 0, and remains noise until it is trained; `trained_action_dim` excludes it, and a
    policy returns the mean of the statistics for it.
    """
    if not isinstance(sizes, Pi0Config) and (unknown := sorted(set(sizes) - set(ADAPTABLE))):
        raise CheckpointError(f"{', '.join(unknown)} can't be adapted; {', '.join(ADAPTABLE)} can.")
    config = sizes if isinstance(sizes, Pi0Config) else Pi0Config.from_dict(sizes, model.config)
    old, new = model.config.to_dict(), config.to_dict()
    different = [name for name in new if new[name] != old[name]]
    if not_adaptable := [name for name in different if name not in ADAPTABLE]:
        raise CheckpointError(
            f"adapt=True can change {', '.join(ADAPTABLE)}; the config also differs in {', '.join(not_adaptable)}."
        )
    report = [f"{field}: {old[field]} to {new[field]}" for field in ADAPTABLE if field in different]
    if "action_dim" in different:
        trained = min(model.trained_action_dim, old["action_dim"], config.action_dim)
        report += [*_resize(model, config.action_dim), *untrained_note(trained, config.action_dim)]
        model.trained_action_dim = trained
    model.config = config
    return report


def untrained_note(trained: int, action_dim: int) -> list[str]:
    """Note on action dimensions that have not been trained, if there are any."""
    if trained == action_dim:
        return []
    return [
        f"actions from {trained} on, counted from 0, are noise until they are trained, and policies of torchpi give "
        "their mean instead"
    ]


def _resize(model: Pi0, width: int) -> list[str]:
    """Cut or extend the projections of states and actions to another action_dim, in place; describe the changes."""
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
