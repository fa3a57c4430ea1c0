"""The numbers of a dataset: every numeric column of every frame, as arrays."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from torchpi.data import format as lerobot
from torchpi.data.metadata import Episode, Metadata, open_parquet
from torchpi.data.rename import suggested_rename
from torchpi.errors import DatasetError, UnknownKeyError
from torchpi.extras import require

_REQUIRED = (lerobot.STATE, lerobot.ACTION, *lerobot.BOOKKEEPING)
Columns = dict[str, np.ndarray]


def check_names(metadata: Metadata) -> None:
    """Raise a KeyError if a dataset names no state or no action: before its files are downloaded or read."""
    features = metadata.info.features
    if missing := [name for name in (lerobot.STATE, lerobot.ACTION) if name not in features]:
        option = suggested_rename(missing, features, metadata.sources)
        raise UnknownKeyError(
            f"The dataset {metadata.root} has no column {', '.join(missing)}; its columns and cameras are "
            f"{', '.join(features)}. If one of them is what is missing, give it LeRobot's name: {option}, or rename= "
            "in Python."
        )


def read_columns(
    metadata: Metadata, episodes: Sequence[Episode], *, tolerance_s: float, others: Collection[str] | None = None
) -> tuple[Columns, Int[np.ndarray, " E"]]:
    """Read the numbers of some episodes, [F, …] per column, and the row of each one's first frame in its data file.

    Beside state and action (float32 [F, s] and [F, a]) and the columns that every dataset has come `others`, by default
    all that are numeric. Names are those of the metadata.
    """
    pieces: list[Columns] = []
    first_rows: list[int] = []
    for path, group in itertools.groupby(episodes, key=lambda episode: episode.data_file):
        columns = _read_file(metadata, path, others)
        if pieces:
            _check_shapes(columns, pieces[0], path)
        runs = _runs(columns["episode_index"], path)
        for episode in group:
            rows = runs.get(episode.index, slice(0))
            frames = {name: values[rows] for name, values in columns.items()}
            _check_episode(frames, episode)
            _check_clock(frames["timestamp"], episode, metadata.info.fps, tolerance_s)
            pieces.append(frames)
            first_rows.append(rows.start)
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    _check_tasks(columns, metadata)
    return columns, np.array(first_rows)


def to_numpy(column: Any) -> np.ndarray:
    """A column of numbers, or of lists of them that are all as long, as [F], [F, d], …."""
    pa, pc = require("pyarrow", "data"), require("pyarrow.compute", "data")
    array = column.combine_chunks()
    shape = [len(array)]
    while pa.types.is_nested(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if array.null_count or len(lengths) > 1:
            raise DatasetError(f"Its lists have the lengths {', '.join(map(str, lengths))}; expected one.")
        shape += lengths or [0]
        array = array.flatten()
    if array.null_count:
        raise DatasetError(f"{array.null_count} values are missing.")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _read_file(metadata: Metadata, path: Path, others: Collection[str] | None) -> Columns:
    """The columns of a data file, under their new names."""
    with open_parquet(path) as file:
        names = _wanted_names(metadata, path, _numeric_names(file.schema_arrow), others)
        table = file.read(columns=[part for parts in names.values() for part in parts])
    columns = {name: _column(table, parts, path) for name, parts in names.items()}
    for name in (lerobot.STATE, lerobot.ACTION):  # a single dimension is stored as plain numbers
        columns[name] = columns[name].reshape(len(table), -1).astype(np.float32, copy=False)
    return columns


def _wanted_names(
    metadata: Metadata, path: Path, numeric: Sequence[str], others: Collection[str] | None
) -> dict[str, tuple[str, ...]]:
    """The columns to read, each with the file's own names of it or its parts; `numeric` are those of the file."""
    parts = {part for parts in metadata.sources.values() for part in parts}
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in numeric if name not in parts}
    names |= {new: olds for new, olds in metadata.sources.items() if not set(olds).isdisjoint(numeric)}
    found = f"its numeric columns are {', '.join(numeric)}"
    if missing := [name for name in _REQUIRED if name not in names]:
        raise UnknownKeyError(
            f"{path} has no column {', '.join(missing)}; {found}. A policy is trained on {lerobot.STATE} and "
            f"{lerobot.ACTION}."
        )
    wanted = {name: olds for name, olds in names.items() if others is None or name in (*_REQUIRED, *others)}
    for name, olds in wanted.items():
        if missing := [old for old in olds if old not in numeric]:
            raise UnknownKeyError(f"{path} has no column {', '.join(missing)}, of which {name} is joined; {found}.")
    return wanted


def _column(table: Any, parts: Sequence[str], path: Path) -> np.ndarray:
    """A column, or several that are joined: [F] or [F, d]."""
    arrays = []
    for part in parts:
        try:
            arrays.append(to_numpy(table.column(part)))
        except ValueError as error:
            raise DatasetError(f"{path}: column {part}: {error}") from error
        if len(parts) > 1 and arrays[-1].ndim > 2:
            raise DatasetError(
                f"{path}: column {part} has the shape {list(arrays[-1].shape[1:])} per frame; to be joined with others "
                "it has to be a number or one list of them."
            )
    return arrays[0] if len(parts) == 1 else np.concatenate([part.reshape(len(table), -1) for part in arrays], axis=1)


def _numeric_names(schema: Any) -> list[str]:
    types = require("pyarrow", "data").types
    names = []
    for field in schema:
        kind = field.type
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            names.append(field.name)
    return names


def _runs(episode_index: np.ndarray, path: Path) -> dict[int, slice]:
    """The rows of each episode in a file."""
    indices, starts, counts = np.unique(episode_index, return_index=True, return_counts=True)
    if np.count_nonzero(np.diff(episode_index)) >= max(1, len(indices)):
        raise DatasetError(f"{path}: the frames of an episode are not in one piece; the file is damaged.")
    spans = zip(indices.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return {index: slice(start, start + count) for index, start, count in spans}


def _check_shapes(columns: Columns, before: Columns, path: Path) -> None:
    """Refuse a data file whose columns, or their shapes, differ from those of the files before it."""

    def shape(of: Columns, name: str) -> str:
        return f"the shape {list(of[name].shape[1:])}" if name in of else "no values"

    for name in {**before, **columns}:
        if (found := shape(columns, name)) != (expected := shape(before, name)):
            raise DatasetError(
                f"{path}: {name} has {found} per frame, and {expected} in the data files before it; expected the same "
                f"in all. Repair the file, or {lerobot.LEAVE_OUT}."
            )


def _check_tasks(columns: Columns, metadata: Metadata) -> None:
    for index in np.unique(columns["task_index"]).tolist():
        if not isinstance(metadata.tasks.get(index), str):
            rows = columns["task_index"] == index
            raise DatasetError(
                f"{rows.sum()} frames, the first in episode {columns['episode_index'][rows][0]}, have the task_index "
                f"{index}, for which {metadata.tasks_file} has no text. Add the instruction there, or "
                f"{lerobot.LEAVE_OUT}."
            )


def _check_episode(columns: Columns, episode: Episode) -> None:
    """Refuse an episode that lacks frames, or a number in its state or action."""
    numbers = columns["frame_index"]
    if not len(numbers):
        raise DatasetError(f"{episode.data_file} has no frame of episode {episode.index}; the dataset is damaged.")
    if not np.array_equal(numbers, np.arange(episode.length)):
        raise DatasetError(
            f"{episode.data_file}: episode {episode.index} has {len(numbers)} frames, numbered {numbers[0]} to "
            f"{numbers[-1]}; expected 0 to {episode.length - 1}, as its metadata say. The dataset is damaged."
        )
    for name in (lerobot.STATE, lerobot.ACTION):
        bad = ~np.isfinite(columns[name])  # [T, d]
        if bad.any():
            frames, dims = np.nonzero(bad)
            raise DatasetError(
                f"{episode.data_file}: {name} is NaN or infinite in frame {frames[0]} of episode {episode.index}, "
                f"dimension {dims[0]}, and in {len(np.unique(frames))} of its {episode.length} frames. Repair the "
                f"column, or {lerobot.LEAVE_OUT}."
            )


def _check_clock(timestamps: np.ndarray, episode: Episode, fps: float | int, tolerance_s: float) -> None:
    """Refuse another rate than fps: a chunk's actions, which are one frame apart, would be too fast or too slow."""
    seconds = timestamps.reshape(-1).astype(np.float64)
    seconds -= seconds[0]  # an episode's clock may begin at any time
    expected = np.arange(episode.length) / fps
    off = np.flatnonzero(~(np.abs(seconds - expected) <= tolerance_s))
    if off.size:
        first, total = off[0], seconds[-1]
        rate = (episode.length - 1) / total if total else np.inf
        raise DatasetError(
            f"{episode.data_file}: frame {first} of episode {episode.index} was taken {seconds[first]:.4f} s after the "
            f"first one; expected {expected[first]:.4f} s ± {tolerance_s:.4f} s, because {lerobot.INFO} says {fps:g} "
            f"frames per second. The whole episode has {rate:.4g}. If that is its true rate, correct fps there; if "
            f"frames are missing, {lerobot.LEAVE_OUT}."
        )
