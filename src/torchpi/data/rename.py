"""LeRobot's names for the columns and cameras of data sets that have others, or that have a column in several parts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpi.data import format as lerobot
from torchpi.data.features import joined_feature
from torchpi.errors import DatasetError, UnknownKeyError

_JOINED = "+"
_OPENPI_NAMES = {lerobot.STATE: ("state", "joint_position+gripper_position"), lerobot.ACTION: ("actions",)}
"""Of the columns in the data sets that openpi's converters write."""
_FRAME_KEYS = ("action_is_pad", "task")
"""What `LeRobotDataset` adds to each frame."""


def parse_rename(values: Sequence[str]) -> dict[str, str]:
    """The `rename` of `LeRobotDataset` as a command line or a recipe says it: texts "OLD=NEW" or "OLD+OLD=NEW"."""
    rename: dict[str, str] = {}
    for value in values:
        old, _, new = value.partition("=")
        if not new or "=" in new or not all(old.split(_JOINED)):
            raise DatasetError(
                f"{value!r} renames nothing; expected OLD=NEW, for example state={lerobot.STATE}, or OLD+OLD=NEW, for "
                "columns that are joined."
            )
        if old in rename:
            raise DatasetError(f"{old} is renamed twice, to {rename[old]} and to {new}; expected one new name.")
        rename[old] = new
    return rename


def resolve_rename(rename: Mapping[str, str], names: Iterable[str], root: Path) -> dict[str, tuple[str, ...]]:
    """Which of a data set's names each new one stands for: one, or several in the order in which they are joined.

    Args:
        rename: from the data set's names, or several of them joined by "+", to LeRobot's.
        names: of the data set's features.
        root: its folder.
    """
    names = tuple(names)
    olds_of = {old: (old,) if old in names else tuple(old.split(_JOINED)) for old in rename}
    used = Counter(name for olds in olds_of.values() for name in olds)
    if unknown := [name for name in used if name not in names]:
        raise UnknownKeyError(
            f"{root} has no {', '.join(unknown)} that could be renamed; its columns and cameras are {', '.join(names)}."
        )
    if twice := [name for name, count in used.items() if count > 1]:
        raise DatasetError(f"{', '.join(twice)} of {root} would be used twice; expected each name once in rename.")
    taken = {name: "the data set has it already" for name in names if name not in used}
    taken |= dict.fromkeys(_FRAME_KEYS, "every frame gets it from the reader")
    for old, new in rename.items():
        if new in taken:
            raise DatasetError(f"{old} of {root} can't be renamed to {new}: {taken[new]}. Choose another name.")
        taken[new] = f"{old} is renamed to it, too"
    return {new: olds_of[old] for old, new in rename.items()}


def renamed_features(features: Mapping[str, Any], sources: Mapping[str, tuple[str, ...]], root: Path) -> dict[str, Any]:
    """A data set's features under their new names; what is joined has the place of its first part.

    Args:
        sources: see `resolve_rename`.
    """
    new_names = {old: new for new, olds in sources.items() for old in olds}
    renamed: dict[str, Any] = {}
    for name, feature in features.items():
        new = new_names.get(name, name)
        olds = sources.get(new, ())
        if new not in renamed:
            renamed[new] = joined_feature({old: features[old] for old in olds}, root) if len(olds) > 1 else feature
    return renamed


def suggested_rename(missing: Iterable[str], names: Iterable[str], given: Mapping[str, tuple[str, ...]]) -> str:
    """The option that names the columns which a data set seems to lack.

    Args:
        missing: these, in LeRobot's names.
        names: those that the data set has.
        given: what is renamed already, see `resolve_rename`.
    """
    names = set(names)

    def old_name(new: str) -> str:
        fitting = (old for old in _OPENPI_NAMES.get(new, ()) if names.issuperset(old.split(_JOINED)))
        return next(fitting, "NAME")

    pairs = [(_JOINED.join(olds), new) for new, olds in given.items()] + [(old_name(new), new) for new in missing]
    return f"--rename {' '.join(f'{old}={new}' for old, new in pairs)}"
