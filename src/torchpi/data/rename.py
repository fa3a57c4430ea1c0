"""LeRobot's names for the columns and cameras of data sets that have others."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torchpi.data import format as lerobot

_OPENPI_NAMES = {lerobot.STATE: "state", lerobot.ACTION: "actions"}
"""Of the columns in openpi's own data sets."""
_FRAME_KEYS = ("action_is_pad", "task")
"""What `LeRobotDataset` adds to each frame."""


def parse_rename(values: Sequence[str]) -> dict[str, str]:
    """The `rename` of `LeRobotDataset` as a command line or a recipe says it: texts "OLD=NEW".

    Raises:
        ValueError: malformed; a name that is renamed twice.
    """
    rename: dict[str, str] = {}
    for value in values:
        old, _, new = value.partition("=")
        if not old or not new or "=" in new:
            raise ValueError(f"{value!r} renames nothing; expected OLD=NEW, for example state={lerobot.STATE}.")
        if old in rename:
            raise ValueError(f"{old} is renamed twice, to {rename[old]} and to {new}; expected one new name.")
        rename[old] = new
    return rename


def check_rename(rename: Mapping[str, str], names: Iterable[str], root: Path) -> None:
    """Check that each name is there, and that afterwards no two are alike.

    Args:
        rename: from the data set's names to LeRobot's.
        names: of the data set's features.
        root: its folder.

    Raises:
        KeyError: the data set has no such name.
        ValueError: the new name is taken.
    """
    names = tuple(names)
    if unknown := [old for old in rename if old not in names]:
        raise KeyError(
            f"{root} has no {', '.join(unknown)} that could be renamed; its columns and cameras are {', '.join(names)}."
        )
    taken = {name: "the data set has it already" for name in names if name not in rename}
    taken |= dict.fromkeys(_FRAME_KEYS, "every frame gets it from the reader")
    for old, new in rename.items():
        if new in taken:
            raise ValueError(f"{old} of {root} can't be renamed to {new}: {taken[new]}. Choose another name.")
        taken[new] = f"{old} is renamed to it, too"


def suggested_rename(missing: Iterable[str], names: Iterable[str], given: Mapping[str, str]) -> str:
    """The option that names the columns which a data set seems to lack.

    Args:
        missing: these, in LeRobot's names.
        names: those that the data set has.
        given: what is renamed already.
    """
    names = tuple(names)
    olds = {new: _OPENPI_NAMES.get(new, "") for new in missing}
    pairs = [*given.items(), *((old if old in names else "NAME", new) for new, old in olds.items())]
    return f"--rename {' '.join(f'{old}={new}' for old, new in pairs)}"
