"""The numbers of a data set: every numeric column of every frame, as arrays."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from torchpi.data import format as lerobot
from torchpi.data.metadata import Episode, Metadata, read_parquet
from torchpi.data.rename import suggested_rename
from torchpi.errors import DatasetError, UnknownKeyError
from torchpi.extras import require

_REQUIRED = (lerobot.STATE, lerobot.ACTION, *lerobot.BOOKKEEPING)


def check_names(metadata: Metadata) -> None:
    """Raises a KeyError if a data set names no state or no action: before its files are downloaded or read."""
    if missing := [name for name in (lerobot.STATE, lerobot.ACTION) if name not in metadata.features]:
        option = suggested_rename(missing, metadata.features, metadata.sources)
        raise UnknownKeyError(
            f"The data set {metadata.root} has no column {', '.join(missing)}; its columns and cameras are "
            f"{', '.join(metadata.features)}. If one of them is what is missing, give it LeRobot's name: {option}, "
            "or rename= in Python."
        )


def read_columns(
    metadata: Metadata, episodes: Sequence[Episode], *, tolerance_s: float, others: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " E"]]:
    """The numbers of some episodes, and the row of each one's first frame in its data file.

    Args:
        tolerance_s: how far a timestamp may be from what the frame's number and fps make it.
        others: which columns to read beside state, action and those that every set has; None: all that are numeric.
            As everywhere, names are those of the metadata.

    Returns:
        Per column an array [F, …], in the order of the episodes; state and action float32 [F, s] and [F, a].
    """
    pieces: list[dict[str, np.ndarray]] = []
    first_rows: list[int] = []
    for path, group in itertools.groupby(episodes, key=lambda episode: episode.data_file):
        columns = _read_file(metadata, path, others)
        if pieces:
            _check_alike(columns, pieces[0], path)
        runs = _runs(columns["episode_index"], path)
        rows = []
        for episode in group:
            rows.append(_checked_rows(columns, episode, runs.get(episode.index)))
            _check_finite(columns, episode, rows[-1])
            _check_clock(columns, episode, rows[-1], metadata.fps, tolerance_s)
        first_rows += [part.start for part in rows]
        # One slice where they lie one after the other: no copy of what may be a whole file.
        if all(after.start == before.stop for before, after in itertools.pairwise(rows)):
            rows = [slice(rows[0].start, rows[-1].stop)]
        pieces += [{name: values[part] for name, values in columns.items()} for part in rows]
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


def _read_file(metadata: Metadata, path: Path, others: Collection[str] | None) -> dict[str, np.ndarray]:
    """The columns of a data file, under their new names."""
    names: dict[str, tuple[str, ...]] = {}

    def read(file: Any) -> Any:
        names.update(_wanted_names(metadata, path, _numeric_names(file.schema_arrow), others))
        return file.read(columns=[part for parts in names.values() for part in parts])

    table = read_parquet(path, read)
    columns = {name: _column(table, parts, path) for name, parts in names.items()}
    for name in (lerobot.STATE, lerobot.ACTION):  # a single dimension is stored as plain numbers
        columns[name] = columns[name].reshape(len(table), -1).astype(np.float32, copy=False)
    return columns


def _wanted_names(
    metadata: Metadata, path: Path, numeric: Sequence[str], others: Collection[str] | None
) -> dict[str, tuple[str, ...]]:
    """The columns to read of a data file, and what it calls each of them or their parts.

    Args:
        numeric: the file's numeric columns, in its own names.
        others: see `read_columns`.
    """
    parts = {part for of_one in metadata.sources.values() for part in of_one}
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in numeric if name not in parts}
    names |= {new: olds for new, olds in metadata.sources.items() if not set(olds).isdisjoint(numeric)}
    there = f"its numeric columns are {', '.join(numeric)}"
    if missing := [name for name in _REQUIRED if name not in names]:
        raise UnknownKeyError(
            f"{path} has no column {', '.join(missing)}; {there}. A policy is trained on "
            f"{lerobot.STATE} and {lerobot.ACTION}."
        )
    wanted = {name: olds for name, olds in names.items() if others is None or name in (*_REQUIRED, *others)}
    for name, olds in wanted.items():
        if missing := [old for old in olds if old not in numeric]:
            raise UnknownKeyError(f"{path} has no column {', '.join(missing)}, of which {name} is joined; {there}.")
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
    if not len(episode_index):
        return {}
    starts = [0, *(1 + np.flatnonzero(np.diff(episode_index))).tolist()]
    runs = {
        int(episode_index[start]): slice(start, stop)
        for start, stop in itertools.pairwise([*starts, len(episode_index)])
    }
    if len(runs) < len(starts):
        raise DatasetError(f"{path}: the frames of an episode are not in one piece; the file is damaged.")
    return runs


def _check_alike(columns: dict[str, np.ndarray], before: dict[str, np.ndarray], path: Path) -> None:
    if set(columns) != set(before):
        raise DatasetError(
            f"{path} has the columns {', '.join(columns)}, the data files before it {', '.join(before)}."
        )
    for name, values in columns.items():
        found, expected = values.shape[1:], before[name].shape[1:]
        if found != expected:
            raise DatasetError(
                f"{path}: {name} has the shape {list(found)} per frame, and {list(expected)} in the data files before "
                f"it; expected the same in all. Repair the file, or {lerobot.LEAVE_OUT}."
            )


def _check_tasks(columns: dict[str, np.ndarray], metadata: Metadata) -> None:
    for index in np.unique(columns["task_index"]).tolist():
        task = metadata.tasks.get(index)
        if not isinstance(task, str):
            rows = columns["task_index"] == index
            raise DatasetError(
                f"{rows.sum()} frames, the first in episode {columns['episode_index'][rows][0]}, have the task_index "
                f"{index}, for which {metadata.tasks_file} has no text. Add the instruction there, or "
                f"{lerobot.LEAVE_OUT}."
            )


def _checked_rows(columns: dict[str, np.ndarray], episode: Episode, rows: slice | None) -> slice:
    if rows is None:
        raise DatasetError(f"{episode.data_file} has no frame of episode {episode.index}; the data set is damaged.")
    frames = columns["frame_index"][rows]
    if len(frames) != episode.length or (frames != np.arange(episode.length)).any():
        raise DatasetError(
            f"{episode.data_file}: episode {episode.index} has {len(frames)} frames, numbered {frames[0]} to "
            f"{frames[-1]}; expected 0 to {episode.length - 1}, as its metadata say. The data set is damaged."
        )
    return rows


def _check_finite(columns: dict[str, np.ndarray], episode: Episode, rows: slice) -> None:
    for name in (lerobot.STATE, lerobot.ACTION):
        bad = ~np.isfinite(columns[name][rows])  # [T, d]
        if bad.any():
            frames, dims = np.nonzero(bad)
            raise DatasetError(
                f"{episode.data_file}: {name} is NaN or infinite in frame {frames[0]} of episode {episode.index}, "
                f"dimension {dims[0]}, and in {len(np.unique(frames))} of its {episode.length} frames. Repair the "
                f"column, or {lerobot.LEAVE_OUT}."
            )


def _check_clock(
    columns: dict[str, np.ndarray], episode: Episode, rows: slice, fps: float | int, tolerance_s: float
) -> None:
    """A chunk's actions are one frame apart: at another rate, the robot would move faster or slower than it was shown.
    Where an episode's clock begins doesn't matter."""
    seconds = columns["timestamp"][rows].reshape(-1).astype(np.float64)
    seconds -= seconds[0]
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
