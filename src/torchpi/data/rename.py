"""Renaming of columns and cameras to LeRobot's names, and joining of several columns into one."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.names import dimension_names
from torchpi.errors import DatasetError, UnknownKeyError

_JOINED = "+"
_OPENPI_NAMES = {lerobot.STATE: ("state", "joint_position+gripper_position"), lerobot.ACTION: ("actions",)}
"""Names of state and action in datasets written by openpi's converters."""
_FRAME_KEYS = ("action_is_pad", "task")
"""Keys that `LeRobotDataset` adds to each frame."""


def parse_rename(values: Sequence[str]) -> dict[str, str]:
    """Parse `rename` options of a command line or a recipe: "OLD=NEW" or "OLD+OLD=NEW"."""
    rename: dict[str, str] = {}
    for value in values:
        old, _, new = value.partition("=")
        if not new or "=" in new or not all(old.split(_JOINED)):
            raise DatasetError(
                f"{value!r} is not a renaming; expected OLD=NEW, for example state={lerobot.STATE}, or OLD+OLD=NEW to "
                "join columns."
            )
        if old in rename:
            raise DatasetError(f"{old} is renamed twice, to {rename[old]} and to {new}; expected one new name.")
        rename[old] = new
    return rename


def resolve_rename(rename: Mapping[str, str], names: Iterable[str], root: Path) -> dict[str, tuple[str, ...]]:
    """The old names for each new name; several, in order, for a joined column."""
    names = tuple(names)
    olds_of = {old: (old,) if old in names else tuple(old.split(_JOINED)) for old in rename}
    used = Counter(name for olds in olds_of.values() for name in olds)
    if unknown := [name for name in used if name not in names]:
        raise UnknownKeyError(
            f"{root} has no {', '.join(unknown)} to rename; its columns and cameras are {', '.join(names)}."
        )
    if twice := [name for name, count in used.items() if count > 1]:
        raise DatasetError(f"rename uses {', '.join(twice)} of {root} twice; expected each name once.")
    taken = {name: "the dataset has this name already" for name in names if name not in used}
    taken |= dict.fromkeys(_FRAME_KEYS, "the reader adds it to every frame")
    for old, new in rename.items():
        if new in taken:
            raise DatasetError(f"{old} of {root} can't be renamed to {new}: {taken[new]}. Choose another name.")
        taken[new] = f"{old} is renamed to it as well"
    return {new: olds_of[old] for old, new in rename.items()}


def renamed_features(features: Mapping[str, Any], sources: Mapping[str, tuple[str, ...]], root: Path) -> dict[str, Any]:
    """Features under their new names; a joined feature takes the position of its first part."""
    new_names = {old: new for new, olds in sources.items() for old in olds}
    renamed: dict[str, Any] = {}
    for name, feature in features.items():
        new = new_names.get(name, name)
        if new not in renamed:
            parts = {old: features[old] for old in sources.get(new, ())}
            renamed[new] = _joined_feature(parts, root) if len(parts) > 1 else feature
    return renamed


def openpi_name(name: str, names: Collection[str]) -> str | None:
    """The name by which openpi's converters call a column; None if the dataset has no such name."""
    return next((old for old in _OPENPI_NAMES.get(name, ()) if set(old.split(_JOINED)) <= set(names)), None)


def suggested_rename(missing: Iterable[str], names: Collection[str], current: Mapping[str, tuple[str, ...]]) -> str:
    """A --rename option for the columns that a dataset seems to lack, added to the current renaming."""
    pairs = [f"{_JOINED.join(olds)}={new}" for new, olds in current.items()]
    pairs += [f"{openpi_name(new, names) or 'NAME'}={new}" for new in missing]
    return f"--rename {' '.join(pairs)}"


def _joined_feature(parts: Mapping[str, Mapping[str, Any]], root: Path) -> dict[str, Any]:
    """The feature of concatenated columns. Unnamed dimensions are named after their column: joint_position_0, …, or
    just the column if it has one dimension."""
    names: list[str] = []
    for name, feature in parts.items():
        dtype, shape = feature.get("dtype"), feature.get("shape")
        is_numeric = dtype in np.sctypeDict and np.dtype(dtype).kind in "biuf"
        if not is_numeric or not isinstance(shape, list) or len(shape) > 1:
            raise DatasetError(
                f"{name} of {root} can't be joined with other columns: it is {dtype} of the shape {shape} per frame; "
                "expected a number or a flat list of numbers."
            )
        num_dims = int(shape[0]) if shape else 1
        numbered = (name,) if num_dims == 1 else tuple(f"{name}_{i}" for i in range(num_dims))
        names += dimension_names(feature, num_dims) or numbered
    dtype = np.result_type(*(feature["dtype"] for feature in parts.values()))
    return {"dtype": dtype.name, "shape": [len(names)], "names": names}
