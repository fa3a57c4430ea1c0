"""Merging, splitting, deleting and resampling. The result is a new dataset in format v3.0; sources are not changed."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.atomic import atomic_folder
from torchpi.data import format as lerobot
from torchpi.data.episodes import select_episodes
from torchpi.data.metadata import Metadata, open_metadata
from torchpi.data.names import dimension_names
from torchpi.data.observations import robot_order
from torchpi.data.pixels import is_depth_map, stated_info
from torchpi.data.rate import Resampling
from torchpi.data.rewrite import Edited, Progress, SourceEpisode, no_progress, source_episodes, write_episodes
from torchpi.errors import DatasetError, UnknownKeyError, first_of
from torchpi.robots import Embodiment


def merge_datasets(
    paths: Sequence[str | Path], out: Path, *, robot_type: str | None = None, progress: Progress = no_progress
) -> Edited:
    """Concatenate several datasets.

    Args:
        paths: datasets in any supported format, with the same features, dimension names and rate.
        out: folder of the new dataset; it must not exist.
        robot_type: robot type of the new dataset, if those of the sources differ.
    """
    if not paths:
        raise DatasetError("There is no dataset to merge; give at least one.")
    first, *others = sources = [open_metadata(path) for path in paths]
    counts = Counter(source.root.resolve() for source in sources)
    if twice := [str(root) for root, count in counts.items() if count > 1]:
        raise DatasetError(f"{', '.join(twice)} would be merged with itself; give each dataset once.")
    for other in others:
        _check_mergeable(first, other, robot_type)
    episodes: list[SourceEpisode] = []
    for path, source in zip(paths, sources, strict=True):
        episodes += source_episodes(path, source)
    return _write(out, {"": episodes}, robot_type=robot_type, progress=progress)[0]


def split_dataset(
    path: str | Path, out: Path, parts: Mapping[str, str], *, progress: Progress = no_progress
) -> list[Edited]:
    """Write parts of a dataset to new datasets, the folders `out`/NAME.

    Args:
        parts: by name, an expression of `select_episodes`, or a fraction of the episodes such as "0.8". Fractions are
            taken in order, from the first episode on.
    """
    source = open_metadata(path)
    indices_of = _select_parts(path, [episode.index for episode in source.episodes], parts)
    episodes = {name: source_episodes(path, source, indices) for name, indices in indices_of.items()}
    return _write(out, episodes, progress=progress)


def delete_episodes(path: str | Path, out: Path, expression: str, *, progress: Progress = no_progress) -> Edited:
    """Write a dataset without the episodes that `select_episodes` selects. The others are renumbered."""
    source, deleted = open_metadata(path), select_episodes(path, expression)
    kept = {episode.index for episode in source.episodes} - set(deleted)
    if not kept:
        raise DatasetError(f"{expression!r} selects all {len(deleted)} episodes of {path}; at least one must remain.")
    return _write(out, {"": source_episodes(path, source, kept)}, progress=progress)[0]


def resample_dataset(
    path: str | Path,
    out: Path,
    fps: float | int,
    *,
    commands: str | Sequence[str] | Embodiment,
    progress: Progress = no_progress,
) -> Edited:
    """Write a dataset at a lower frame rate, see `Resampling`.

    Args:
        fps: the new rate.
        commands: the command of the actions, see `ActionDim`: one for all dimensions, one per dimension, or the robot
            whose actions state it.
    """
    source = open_metadata(path)
    if lerobot.ACTION not in source.info.features:
        raise UnknownKeyError(
            f"{source.root} has no column {lerobot.ACTION}, which is required for resampling; its columns are "
            f"{', '.join(source.info.features)}."
        )
    num_dims = int(np.prod(source.info.features[lerobot.ACTION]["shape"]))
    if isinstance(commands, Embodiment):
        commands = _commands_of(commands, dimension_names(source.info.features[lerobot.ACTION], num_dims), source.root)
    commands = (commands,) * num_dims if isinstance(commands, str) else tuple(commands)
    if len(commands) != num_dims:
        raise DatasetError(f"There are {len(commands)} commands; expected one for each of the {num_dims} dimensions.")
    if not 0 < fps < source.info.fps:
        raise DatasetError(
            f"The dataset has {source.info.fps:g} frames per second, and {fps:g} were requested; expected a lower "
            "rate: frames that were not recorded can't be created."
        )
    resampling = Resampling(source.info.fps, fps, commands)
    return _write(out, {"": source_episodes(path, source)}, resampling=resampling, progress=progress)[0]


def _commands_of(robot: Embodiment, names: Sequence[str] | None, path: Path) -> list[str]:
    """The commands of a dataset's action dimensions, from the robot's actions of the same names."""
    commands = [action.command or "not stated" for action in robot.actions]
    if names is None or len(names) != len(commands):
        return commands
    order = robot_order(names, robot.action_names, f"{path}: {lerobot.ACTION}", robot.name)
    return [commands[order.index(i)] for i in range(len(names))]


def _select_parts(path: str | Path, indices: list[int], parts: Mapping[str, str]) -> dict[str, list[int]]:
    selected, start = dict[str, list[int]](), 0.0
    for name, expression in parts.items():
        if not re.fullmatch(r"[\w.-]*\w", name):
            raise DatasetError(f"A part is named {name!r}; expected the name of a folder.")
        if re.fullmatch(r"0?\.\d+", expression):
            end = start + float(expression)
            first, last = (round(fraction * len(indices) + 1e-9) for fraction in (start, end))
            selected[name], start = indices[first:last], end
        else:
            selected[name] = select_episodes(path, expression)
        if not selected[name] or start > 1 + 1e-9:
            raise DatasetError(
                f"The part {name}={expression} is empty, or the fractions exceed the {len(indices)} episodes."
            )
    counts = Counter(index for part in selected.values() for index in part)
    if shared := [str(index) for index, count in counts.items() if count > 1]:
        raise DatasetError(f"The episodes {first_of(shared, 20)} are in two parts; expected each in one.")
    return selected


def _check_mergeable(first: Metadata, other: Metadata, robot_type: str | None) -> None:
    ours, theirs = _merge_properties(first), _merge_properties(other)
    if robot_type:
        ours["robot_type"] = theirs["robot_type"] = robot_type
    differences = [
        f"{name} is {ours.get(name, 'missing')} in the first and {theirs.get(name, 'missing')} in the second"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise DatasetError(
            f"{first.root} and {other.root} can't be merged: {'; '.join(differences)}. `torchpi data resample` changes "
            "the rate of a dataset, --robot-type sets the robot if only its name differs, and `torchpi train` takes "
            "different datasets as a mixture (docs/training.md)."
        )


def _merge_properties(metadata: Metadata) -> dict[str, Any]:
    """Properties that must be equal to merge datasets, by their names in error messages."""
    properties: dict[str, Any] = {"fps": metadata.info.fps, "robot_type": metadata.info.robot_type}
    for key, feature in metadata.info.features.items():
        properties |= {f"the {name} of {key}": feature.get(name) for name in ("dtype", "shape")}
        if is_depth_map(feature):
            coding = {k: v for k, v in stated_info(feature).items() if re.search("depth|shift|use_log", k)}
            properties[f"the depth coding of {key}"] = coding
        if key not in metadata.info.cameras and feature.get("shape"):
            names = dimension_names(feature, feature["shape"][0])
            properties[f"the order of dimensions of {key}"] = names and ", ".join(names)
    return properties


def _write(out: Path, parts: Mapping[str, Sequence[SourceEpisode]], **options: Any) -> list[Edited]:
    """Write new datasets to the folders `out`/NAME. `out` is created completely or not at all."""
    if out.exists():
        raise DatasetError(f"{out} exists already; choose a path that does not exist for the new dataset.")
    results = [Edited(str(out / name)) for name in parts]
    with atomic_folder(out) as folder:
        for (name, episodes), result in zip(parts.items(), results, strict=True):
            write_episodes(folder / name, episodes, result, **options)
    return results
