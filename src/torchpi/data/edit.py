"""Editing datasets: new ones in format v3.0 of the episodes of others, which stay as they are."""

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
from torchpi.data.rewrite import Edited, Piece, Progress, no_progress, pieces_of, write_pieces
from torchpi.errors import DatasetError, UnknownKeyError, first_of
from torchpi.robots import Embodiment


def merge_datasets(
    paths: Sequence[str | Path], out: Path, *, robot_type: str | None = None, progress: Progress = no_progress
) -> Edited:
    """Write the episodes of several datasets into a new one, one set after the other.

    Args:
        paths: datasets with the same features, names of dimensions and rate, in any format that is read.
        out: the folder of the new dataset; it must not exist.
        robot_type: of the new dataset, where the sets state different ones.
    """
    if not paths:
        raise DatasetError("There is no dataset to merge; give one at least.")
    first, *others = sources = [open_metadata(path) for path in paths]
    if twice := [str(root) for root, count in Counter(of.root.resolve() for of in sources).items() if count > 1]:
        raise DatasetError(f"{', '.join(twice)} would be merged with itself; give each dataset once.")
    for other in others:
        _check_alike(first, other, robot_type)
    pieces = [piece for path, source in zip(paths, sources, strict=True) for piece in pieces_of(path, source)]
    return _write(out, {"": pieces}, robot_type=robot_type, progress=progress)[0]


def split_dataset(
    path: str | Path, out: Path, parts: Mapping[str, str], *, progress: Progress = no_progress
) -> list[Edited]:
    """Write parts of a dataset into new ones, the folders `out`/NAME.

    Args:
        parts: by name an expression of `select_episodes`, or a fraction of the episodes, such as "0.8"; fractions
            follow each other, from the first episode on.
    """
    source = open_metadata(path)
    chosen = _chosen_parts(path, [episode.index for episode in source.episodes], parts)
    return _write(out, {name: pieces_of(path, source, part) for name, part in chosen.items()}, progress=progress)


def delete_episodes(path: str | Path, out: Path, expression: str, *, progress: Progress = no_progress) -> Edited:
    """Write a dataset without some episodes, chosen as by `select_episodes`; the others are numbered anew."""
    source, left_out = open_metadata(path), select_episodes(path, expression)
    kept = {episode.index for episode in source.episodes} - set(left_out)
    if not kept:
        raise DatasetError(f"{expression!r} are all {len(left_out)} episodes of {path}; expected that one is left.")
    return _write(out, {"": pieces_of(path, source, kept)}, progress=progress)[0]


def resample_dataset(
    path: str | Path,
    out: Path,
    fps: float | int,
    *,
    commands: str | Sequence[str] | Embodiment,
    progress: Progress = no_progress,
) -> Edited:
    """Write a dataset at a lower rate: of each time of the new rate the nearest frame, actions by their command.

    Args:
        fps: the new rate.
        commands: what the robot does with an action, see `ActionDim`: one for all dimensions, each, or the robot that
            states them by the names of its actions; it decides what becomes of the actions, see `Resampling`.
    """
    source = open_metadata(path)
    if lerobot.ACTION not in source.info.features:
        raise UnknownKeyError(
            f"{source.root} has no column {lerobot.ACTION}, without which nothing says what is summed or averaged; its "
            f"columns are {', '.join(source.info.features)}."
        )
    num_dims = int(np.prod(source.info.features[lerobot.ACTION]["shape"]))
    if isinstance(commands, Embodiment):
        commands = _commands_of(commands, dimension_names(source.info.features[lerobot.ACTION], num_dims), source.root)
    stated = (commands,) * num_dims if isinstance(commands, str) else tuple(commands)
    if len(stated) != num_dims:
        raise DatasetError(f"There are {len(stated)} commands; expected one for each of the {num_dims} dimensions.")
    if not 0 < fps < source.info.fps:
        raise DatasetError(
            f"The dataset has {source.info.fps:g} frames per second, and {fps:g} were asked for; expected fewer: "
            "frames that were not recorded can't be made."
        )
    resampling = Resampling(source.info.fps, fps, stated)
    return _write(out, {"": pieces_of(path, source)}, resampling=resampling, progress=progress)[0]


def _commands_of(robot: Embodiment, names: Sequence[str] | None, path: Path) -> list[str]:
    """The commands of a dataset's actions, in its order."""
    stated = [action.command or "not stated" for action in robot.actions]
    if names is None or len(names) != len(stated):
        return stated
    order = robot_order(names, robot.action_names, f"{path}: {lerobot.ACTION}", robot.name)
    return [stated[order.index(i)] for i in range(len(names))]


def _chosen_parts(path: str | Path, indices: list[int], parts: Mapping[str, str]) -> dict[str, list[int]]:
    chosen, begin = dict[str, list[int]](), 0.0
    for name, text in parts.items():
        if not re.fullmatch(r"[\w.-]*\w", name):
            raise DatasetError(f"A part is called {name!r}; expected the name of a folder.")
        if re.fullmatch(r"0?\.\d+", text):
            end = begin + float(text)
            first, last = (round(edge * len(indices) + 1e-9) for edge in (begin, end))
            chosen[name], begin = indices[first:last], end
        else:
            chosen[name] = select_episodes(path, text)
        if not chosen[name] or begin > 1 + 1e-9:
            raise DatasetError(f"The part {name}={text} of {len(indices)} episodes has none, or more than there are.")
    counts = Counter(index for part in chosen.values() for index in part)
    if shared := [index for index, count in counts.items() if count > 1]:
        raise DatasetError(
            f"The episodes {first_of(list(map(str, shared)), 20)} are in two parts; expected each in one."
        )
    return chosen


def _check_alike(first: Metadata, other: Metadata, robot_type: str | None) -> None:
    left, right = (_properties(of) | ({"robot_type": robot_type} if robot_type else {}) for of in (first, other))
    differing = [name for name in left | right if left.get(name) != right.get(name)]
    if differing:
        found = (
            f"{name} is {left.get(name, 'missing')} there and {right.get(name, 'missing')} here" for name in differing
        )
        raise DatasetError(
            f"{other.root} can't be merged with {first.root}: {'; '.join(found)}. `torchpi data resample` gives a set "
            "another rate, --robot-type states the robot where only its name differs, and `torchpi train` takes "
            "different datasets as a mixture (docs/training.md)."
        )


def _properties(metadata: Metadata) -> dict[str, Any]:
    """The properties that datasets have to share to be merged, by their names in a message."""
    found: dict[str, Any] = {"fps": metadata.info.fps, "robot_type": metadata.info.robot_type}
    for key, feature in metadata.info.features.items():
        found |= {f"the {name} of {key}": feature.get(name) for name in ("dtype", "shape")}
        if is_depth_map(feature):
            coding = stated_info(feature).items()
            found[f"the coding of depths of {key}"] = {k: v for k, v in coding if re.search("depth|shift|use_log", k)}
        if key not in metadata.info.cameras and feature.get("shape"):
            names = dimension_names(feature, feature["shape"][0])
            found[f"the order of dimensions of {key}"] = names and ", ".join(names)
    return found


def _write(out: Path, parts: Mapping[str, Sequence[Piece]], **options: Any) -> list[Edited]:
    """Write new datasets, the folders `out`/NAME: `out` appears complete, or not at all."""
    if out.exists():
        raise DatasetError(f"{out} exists already; choose a path for the new dataset where nothing is.")
    results = [Edited(str(out / name)) for name in parts]
    with atomic_folder(out) as folder:
        for (name, pieces), result in zip(parts.items(), results, strict=True):
            write_pieces(folder / name, pieces, result, **options)
    return results
