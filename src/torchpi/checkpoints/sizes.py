"""The sizes of a checkpoint's model: out of its arrays, out of a config.json beside them, and out of `config=`."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from torchpi.config import PRESETS, Pi0Config
from torchpi.errors import CheckpointError
from torchpi.schema import read_json_object

ConfigLike = Pi0Config | str | pathlib.Path
"""A Pi0Config, a JSON file (may be partial), or the name of a preset."""

# Our fields by the names of the PyTorch formats; their names of variants are names of code, and say no sizes.
_OPENPI_FIELDS = {"action_dim": "action_dim", "action_horizon": "action_horizon"}
_LEROBOT_FIELDS = {
    "action_dim": "max_action_dim",
    "action_horizon": "chunk_size",
    "max_token_len": "tokenizer_max_length",
}


def read_config(config: ConfigLike) -> Pi0Config | dict[str, Any]:
    """The argument `config=`; a file's object may be partial."""
    if isinstance(config, Pi0Config):
        return config
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    if isinstance(config, str) and not pathlib.Path(config).is_file():
        raise CheckpointError(f"config={config!r} is neither a file nor a preset; presets are {', '.join(PRESETS)}.")
    return read_json_object(config)


def stated_heads(config: Pi0Config | Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Numbers of heads, which the shapes of PyTorch's matrices do not say, if the config states them.

    Returns:
        Of the vision tower, and of Gemma's queries and its keys and values.
    """
    values = config.to_dict() if isinstance(config, Pi0Config) else config
    try:
        vision, backbone = values["siglip"], values["paligemma"]
        return vision["num_heads"], backbone["num_heads"], backbone["num_kv_heads"]
    except (KeyError, TypeError):
        return None


def stated_sizes(file: pathlib.Path, document: Mapping[str, Any], *, is_lerobot: bool) -> dict[str, Any]:
    """Fields of Pi0Config out of the config.json of a PyTorch format."""
    fields = _LEROBOT_FIELDS if is_lerobot else _OPENPI_FIELDS
    stated = {ours: document[theirs] for ours, theirs in fields.items() if theirs in document}
    for field, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{file}: {fields[field]} must be a positive integer, found {value!r}.")
    if not is_lerobot:
        return stated
    if document["type"] not in ("pi0", "pi05"):
        raise CheckpointError(f"{file}: type is {document['type']!r}; pi0 and pi05 policies are read.")
    stated["pi05"] = stated["discrete_state_input"] = document["type"] == "pi05"
    if resolution := document.get("image_resolution"):
        if not isinstance(resolution, list) or len(set(resolution)) != 1:
            raise CheckpointError(f"{file}: image_resolution is {resolution}; only squares are read.")
        stated["image_size"] = resolution[0]
    return stated


def add_stated(
    from_arrays: Pi0Config, stated: Mapping[str, Any], file: pathlib.Path, *, may_contradict: bool
) -> tuple[Pi0Config, list[str]]:
    """Complete the arrays' sizes by those of a config.json beside them.

    Returns:
        The sizes, and what the file contradicts; without `may_contradict` that is an error.
    """
    wrong = [
        f"{field} is {value} there, {getattr(from_arrays, field)} in the arrays"
        for field, value in stated.items()
        if getattr(from_arrays, field) not in (None, value)
    ]
    message = f"{file} contradicts the arrays: {'; '.join(wrong)}"
    if wrong and not may_contradict:
        raise CheckpointError(f"{message}. Correct it, or pass config=.")
    unset = {field: value for field, value in stated.items() if getattr(from_arrays, field) is None}
    return dataclasses.replace(from_arrays, **unset), [message] if wrong else []


def overrule(root: pathlib.Path, stored: Pi0Config, explicit: Pi0Config, *, in_file: str) -> list[str]:
    """Check an explicit config against the stored sizes.

    Args:
        in_file: the file that states sizes which are in no array; "" if there is none.

    Returns:
        What the explicit config overrules. It may overrule a policy.json in everything, since the arrays are checked
        against it afterwards, and other checkpoints in what is in no array.
    """
    if in_file == "policy.json":
        differences = _differences(explicit, stored)  # a variant's name and its sizes are the same
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
    """Each field in which two configs differ, with both values."""
    ours, theirs = _flat(explicit.to_dict()), _flat(stored.to_dict())
    return "; ".join(
        f"{name} is {value} in config, {theirs[name]} in the checkpoint"
        for name, value in ours.items()
        if value != theirs[name] and name not in except_for
    )


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= {f"{name}.{part}": size for part, size in value.items()} if isinstance(value, dict) else {name: value}
    return flat
