"""The numbers of a dataset: every numeric column of every frame, as arrays."""

import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from torchpi.data import format as lerobot
from torchpi.data.clock import check_clock
from torchpi.data.files import open_parquet, read_table
from torchpi.data.metadata import Episode, Metadata
from torchpi.data.rename import openpi_name, suggested_rename
from torchpi.errors import DatasetError, MissingFileError, UnknownKeyError, counted
from torchpi.extras import require

_KEPT = (lerobot.STATE, lerobot.ACTION, lerobot.NEW_IMAGES, *lerobot.BOOKKEEPING)
Columns = dict[str, np.ndarray]


def check_names(metadata: Metadata) -> None:
    """Raise a KeyError if a dataset names no action, or its state otherwise: before its files are downloaded or read.

    A dataset without any state is read, for robots that have none.
    """
    features = metadata.info.features
    missing = [name for name in (lerobot.STATE, lerobot.ACTION) if name not in features]
    if missing == [lerobot.STATE] and openpi_name(lerobot.STATE, features) is None:
        return
    if missing:
        option = suggested_rename(missing, features, metadata.sources)
        raise UnknownKeyError(
            f"The dataset {metadata.root} has no column {', '.join(missing)}; its columns and cameras are "
            f"{', '.join(features)}. If one of them is what is missing, give it LeRobot's name: {option}, or rename= "
            "in Python."
        )


def read_columns(
    metadata: Metadata,
    episodes: Sequence[Episode],
    *,
    tolerance_s: float,
    others: Collection[str] | None = None,
    prompt: str | None = None,
) -> tuple[Columns, Mapping[int, str], Int[np.ndarray, " E"]]:
    """Read the numbers of some episodes, [F, …] per column; their instructions by task_index; and the row of each one's
    first frame in its data file.

    Beside state and action (float32 [F, s] and [F, a]; s = 0 without a state) and the columns that every dataset has
    come `others`, by default all that are numeric and have one shape in all frames. Names are those of the metadata.
    A `prompt` is the only instruction; those of the dataset may then be missing.
    """
    pieces: list[Columns] = []
    first_rows: list[int] = []
    left_out: dict[str, str] = {}
    optional = {lerobot.STATE, lerobot.NEW_IMAGES} - metadata.info.features.keys() | (
        {"task_index"} if prompt is not None else set()
    )
    required = [name for name in _KEPT if name not in optional]
    for path, group in itertools.groupby(episodes, key=lambda episode: episode.data_file):
        chosen = {episode.index: episode for episode in group}
        columns, rows = _read_file(metadata, path, chosen, required, others, left_out)
        if pieces and len(columns["index"]):
            _check_shapes(columns, pieces[0], path, left_out if others is None else None)
        runs = rows if chosen.keys() >= rows.keys() else rows_of_episodes(columns["episode_index"], path)
        for episode in chosen.values():
            frames = {name: values[runs.get(episode.index, slice(0))] for name, values in columns.items()}
            _check_episode(frames, episode)
            pieces.append(frames)
            first_rows.append(rows[episode.index].start)
    if left_out:
        warnings.warn(
            f"{metadata.root}: the columns {', '.join(left_out)} are left out, as they can't be read of every frame "
            f"({next(iter(left_out.values())).rstrip('.')}). Name those that you need: columns= in Python.",
            UserWarning,
            stacklevel=3,
        )
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name not in left_out}
    check_clock(columns["timestamp"], episodes, fps=metadata.info.fps, tolerance_s=tolerance_s)
    if prompt is None:
        _check_tasks(columns, metadata)
        return columns, metadata.tasks, np.array(first_rows)
    return columns, dict.fromkeys(np.unique(columns["task_index"]).tolist(), prompt), np.array(first_rows)


def to_numpy(column: Any) -> np.ndarray:
    """A column of numbers, or of lists of them that are all as long, as [F], [F, d], …."""
    pa, pc = require("pyarrow", "data"), require("pyarrow.compute", "data")
    array = column.combine_chunks()
    shape = [len(array)]
    while not array.null_count and pa.types.is_nested(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise DatasetError(f"Its lists have the lengths {', '.join(map(str, lengths))}; expected one.")
        shape += lengths or [0]
        array = array.flatten()
    if array.null_count:
        raise DatasetError(f"{counted(array.null_count, 'value is', 'values are')} missing.")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _read_file(
    metadata: Metadata,
    path: Path,
    chosen: Collection[int],
    required: Collection[str],
    others: Collection[str] | None,
    left_out: dict[str, str],
) -> tuple[Columns, dict[int, slice]]:
    """The columns of the chosen episodes of a data file, under their new names, and the rows of all of its episodes.

    Columns that nobody asked for, and that can't be read, go into `left_out` with the reason.
    """
    with open_parquet(path) as file:
        names = _wanted_names(metadata, path, file.schema_arrow, required, others)
        table = read_table(file, path, [part for parts in names.values() for part in parts])
    index = _one_per_frame(_column(table, names["episode_index"], path), "episode_index", path)
    rows = rows_of_episodes(index, path)
    if not rows.keys() <= set(chosen):  # what the other episodes lack is nobody's concern
        table = table.filter(np.isin(index, list(chosen)))
    columns: Columns = {}
    for name, parts in names.items():
        try:
            columns[name] = _column(table, parts, path)
        except DatasetError as error:
            if others is not None or name in required or name in metadata.sources:
                raise
            left_out[name] = str(error)
    for name in lerobot.BOOKKEEPING:
        columns[name] = _one_per_frame(columns.get(name, np.zeros(len(table))), name, path)
    for name in (lerobot.STATE, lerobot.ACTION):  # a single dimension is stored as plain numbers
        values = columns.get(name, np.zeros((len(table), 0)))
        columns[name] = values.reshape(len(table), -1 if values.size else 0).astype(np.float32, copy=False)
    return columns, rows


def _wanted_names(
    metadata: Metadata, path: Path, schema: Any, required: Collection[str], others: Collection[str] | None
) -> dict[str, tuple[str, ...]]:
    """The columns to read, each with the file's own names of it or its parts."""
    numeric = numeric_names(schema)
    parts = {part for parts in metadata.sources.values() for part in parts}
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in numeric if name not in parts}
    names |= {new: olds for new, olds in metadata.sources.items() if not set(olds).isdisjoint(numeric)}
    found = f"its numeric columns are {', '.join(numeric)}"
    if missing := [name for name in required if name not in names]:
        types = [f"{name} is {schema.field(name).type}, not numbers" for name in missing if name in schema.names]
        raise UnknownKeyError(
            f"{path} has no column {', '.join(missing)}; {'; '.join([*types, found])}. A policy is trained on "
            f"{lerobot.STATE} and {lerobot.ACTION}; task_index may be missing where a prompt is given (--prompt)."
        )
    wanted = {name: olds for name, olds in names.items() if others is None or name in (*_KEPT, *others)}
    for name, olds in wanted.items():
        if missing := [old for old in olds if old not in numeric]:
            raise UnknownKeyError(f"{path} has no column {', '.join(missing)}, of which {name} is joined; {found}.")
    return wanted


def _one_per_frame(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """A bookkeeping column [F], also one of lists of one, or of floats that are whole."""
    flat = values.ravel()
    typed = flat if name == "timestamp" else flat.astype(np.int64)
    if len(flat) != len(values) or not np.array_equal(typed, flat, equal_nan=True):
        raise DatasetError(
            f"{path}: column {name} has {values[0]} in its first frame; expected one number, whole but for timestamp."
        )
    return typed


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


def numeric_names(schema: Any) -> list[str]:
    """The columns of a data file that hold numbers, or lists of them."""
    types = require("pyarrow", "data").types
    names = []
    for field in schema:
        kind = field.type
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            names.append(field.name)
    return names


def rows_of_episodes(episode_index: np.ndarray, path: Path) -> dict[int, slice]:
    indices, starts, counts = np.unique(episode_index, return_index=True, return_counts=True)
    if np.count_nonzero(np.diff(episode_index)) >= max(1, len(indices)):
        raise DatasetError(f"{path}: the frames of an episode are not in one piece; the file is damaged.")
    spans = zip(indices.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return {index: slice(start, start + count) for index, start, count in spans}


def _check_shapes(columns: Columns, before: Columns, path: Path, left_out: dict[str, str] | None) -> None:
    """Refuse a data file whose columns, or their shapes, differ from those of the files before it.

    Columns that need not be read go into `left_out` instead, if it is given.
    """

    def shape(of: Columns, name: str) -> str:
        return f"the shape {list(of[name].shape[1:])}" if name in of else "no values"

    for name in {**before, **columns}:
        if (found := shape(columns, name)) != (expected := shape(before, name)):
            reason = (
                f"{path}: {name} has {found} per frame, and {expected} in the data files before it; expected the same "
                "in all."
            )
            if left_out is None or name in _KEPT:
                raise DatasetError(f"{reason} Repair the file, or {lerobot.LEAVE_OUT}.")
            left_out.setdefault(name, reason)


def _check_tasks(columns: Columns, metadata: Metadata) -> None:
    given = "give one for all frames (--prompt, or prompt= in Python)"
    file = metadata.root / metadata.info.tasks_file
    if not metadata.tasks:
        kind, reason = (DatasetError, "is empty") if file.is_file() else (MissingFileError, "is missing")
        raise kind(f"The dataset {metadata.root} has no instructions, because {file} {reason}; {given}.")
    for index in np.unique(columns["task_index"]).tolist():
        if not isinstance(metadata.tasks.get(index), str):
            rows = columns["task_index"] == index
            raise DatasetError(
                f"{rows.sum()} frames, the first in episode {columns['episode_index'][rows][0]}, have the task_index "
                f"{index}, for which {file} has no text. Add the instruction there, {given}, or {lerobot.LEAVE_OUT}."
            )


def _check_episode(columns: Columns, episode: Episode) -> None:
    """Refuse an episode that lacks frames, or a number in its state or action."""
    numbers = columns["frame_index"]
    if not len(numbers):
        raise DatasetError(
            f"{episode.data_file} has no frame of episode {episode.index}; the dataset is damaged. If another file has "
            f"them, as after some releases of LeRobot's converter to v3.0, correct data/file_index in "
            f"{lerobot.EPISODES_FOLDER}; otherwise {lerobot.LEAVE_OUT}."
        )
    if len(numbers) != episode.length or not np.array_equal(numbers, np.arange(episode.length)):
        raise DatasetError(
            f"{episode.data_file}: episode {episode.index} has {counted(len(numbers), 'frame')}, numbered {numbers[0]} "
            f"to {numbers[-1]}; expected 0 to {episode.length - 1}, as its metadata say. The dataset is damaged."
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
