"""Numeric columns of a dataset, over all frames, as NumPy arrays."""

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

_BASE_COLUMNS = (lerobot.STATE, lerobot.ACTION, lerobot.NEW_IMAGES, *lerobot.BOOKKEEPING)
Columns = dict[str, np.ndarray]


def check_names(metadata: Metadata) -> None:
    """Raise a KeyError if the metadata list no action, or the state under another name, before any file is downloaded.

    A dataset without any state is accepted, for robots that have none.
    """
    features = metadata.info.features
    missing = [name for name in (lerobot.STATE, lerobot.ACTION) if name not in features]
    if missing == [lerobot.STATE] and openpi_name(lerobot.STATE, features) is None:
        return
    if missing:
        option = suggested_rename(missing, features, metadata.sources)
        raise UnknownKeyError(
            f"The dataset {metadata.root} has no column {', '.join(missing)}; its columns and cameras are "
            f"{', '.join(features)}. If one of them holds the missing values, rename it: {option}, or rename= in "
            "Python."
        )


def read_columns(
    metadata: Metadata,
    episodes: Sequence[Episode],
    *,
    tolerance_s: float,
    extra: Collection[str] | None = None,
    prompt: str | None = None,
) -> tuple[Columns, Mapping[int, str], Int[np.ndarray, " E"]]:
    """Read the numeric columns of some episodes.

    Args:
        extra: columns to read in addition to state, action and bookkeeping; by default all numeric ones that have the
            same shape in every frame. Names are those of the metadata.
        prompt: an instruction that replaces the dataset's, which may then be missing.

    Returns:
        Columns [F, …], state and action as float32 [F, s] and [F, a] (s = 0 without a state); instructions by
        task_index; and, per episode, the row of its first frame in its data file.
    """
    frames: list[Columns] = []  # per episode
    first_rows: list[int] = []
    skipped: dict[str, str] = {}  # reasons by column
    optional = {lerobot.STATE, lerobot.NEW_IMAGES} - metadata.info.features.keys()
    if prompt is not None:
        optional.add("task_index")
    required = [name for name in _BASE_COLUMNS if name not in optional]
    for path, group in itertools.groupby(episodes, key=lambda episode: episode.data_file):
        selected = {episode.index: episode for episode in group}
        columns, file_rows = _read_file(metadata, path, selected, required, extra, skipped)
        if frames and len(columns["index"]):
            _check_shapes(columns, frames[0], path, skipped if extra is None else None)
        rows = rows_of_episodes(columns["episode_index"], path)  # without those of other episodes
        for episode in selected.values():
            episode_rows = rows.get(episode.index, slice(0))
            frames.append({name: values[episode_rows] for name, values in columns.items()})
            _check_episode(frames[-1], episode)
            first_rows.append(file_rows[episode.index].start)
    if skipped:
        warnings.warn(
            f"{metadata.root}: the columns {', '.join(skipped)} are skipped, because they can't be read for every "
            f"frame ({next(iter(skipped.values())).rstrip('.')}). Name the columns that you need: columns= in Python.",
            UserWarning,
            stacklevel=3,
        )
    columns = {name: np.concatenate([each[name] for each in frames]) for name in frames[0] if name not in skipped}
    check_clock(columns["timestamp"], episodes, fps=metadata.info.fps, tolerance_s=tolerance_s)
    if prompt is None:
        _check_tasks(columns, metadata)
        return columns, metadata.tasks, np.array(first_rows)
    return columns, dict.fromkeys(np.unique(columns["task_index"]).tolist(), prompt), np.array(first_rows)


def to_numpy(column: Any) -> np.ndarray:
    """Convert a column of numbers, or of nested lists of equal length, to an array [F], [F, d], …."""
    pa, pc = require("pyarrow", "data"), require("pyarrow.compute", "data")
    array = column.combine_chunks()
    shape = [len(array)]
    while not array.null_count and pa.types.is_nested(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise DatasetError(f"Its lists have the lengths {', '.join(map(str, lengths))}; expected one length.")
        shape += lengths or [0]
        array = array.flatten()
    if array.null_count:
        raise DatasetError(f"{counted(array.null_count, 'value is', 'values are')} missing.")
    return np.asarray(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _read_file(
    metadata: Metadata,
    path: Path,
    selected: Collection[int],
    required: Collection[str],
    extra: Collection[str] | None,
    skipped: dict[str, str],
) -> tuple[Columns, dict[int, slice]]:
    """Read the columns of the selected episodes of a data file, under their new names.

    Also returns the rows of every episode of the file. Unreadable columns that the caller did not name are added to
    `skipped`.
    """
    with open_parquet(path) as file:
        sources = _columns_to_read(metadata, path, file.schema_arrow, required, extra)
        table = read_table(file, path, [source for names in sources.values() for source in names])
    index = _one_per_frame(_column(table, sources["episode_index"], path), "episode_index", path)
    rows = rows_of_episodes(index, path)
    if not rows.keys() <= set(selected):  # missing values in other episodes don't matter
        table = table.filter(np.isin(index, list(selected)))
    columns: Columns = {}
    for name, names in sources.items():
        try:
            columns[name] = _column(table, names, path)
        except DatasetError as error:
            if extra is not None or name in required or name in metadata.sources:
                raise
            skipped[name] = str(error)
    for name in lerobot.BOOKKEEPING:
        columns[name] = _one_per_frame(columns.get(name, np.zeros(len(table))), name, path)
    for name in (lerobot.STATE, lerobot.ACTION):  # a single dimension is stored as plain numbers
        values = columns.get(name, np.zeros((len(table), 0)))
        columns[name] = values.reshape(len(table), -1 if values.size else 0).astype(np.float32, copy=False)
    return columns, rows


def _columns_to_read(
    metadata: Metadata, path: Path, schema: Any, required: Collection[str], extra: Collection[str] | None
) -> dict[str, tuple[str, ...]]:
    """The columns to read, with their names in the file: several names for a joined column."""
    numeric = numeric_names(schema)
    renamed = {source for names in metadata.sources.values() for source in names}
    sources: dict[str, tuple[str, ...]] = {name: (name,) for name in numeric if name not in renamed}
    sources |= {new: olds for new, olds in metadata.sources.items() if not set(olds).isdisjoint(numeric)}
    available = f"its numeric columns are {', '.join(numeric)}"
    if missing := [name for name in required if name not in sources]:
        types = [f"{name} is {schema.field(name).type}, not numbers" for name in missing if name in schema.names]
        raise UnknownKeyError(
            f"{path} has no column {', '.join(missing)}; {'; '.join([*types, available])}. A policy is trained on "
            f"{lerobot.STATE} and {lerobot.ACTION}; task_index may be missing if there is a prompt (--prompt)."
        )
    if extra is not None:
        sources = {name: olds for name, olds in sources.items() if name in (*_BASE_COLUMNS, *extra)}
    for name, olds in sources.items():
        if missing := [old for old in olds if old not in numeric]:
            raise UnknownKeyError(
                f"{path} has no column {', '.join(missing)}, which {name} is joined from; {available}."
            )
    return sources


def _one_per_frame(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """A bookkeeping column as [F]. Lists of one number and floats with whole values are accepted."""
    flat = values.ravel()
    typed = flat if name == "timestamp" else flat.astype(np.int64)
    if len(flat) != len(values) or not np.array_equal(typed, flat, equal_nan=True):
        raise DatasetError(
            f"{path}: column {name} has {values[0]} in its first frame; expected one number, whole except for "
            "timestamp."
        )
    return typed


def _column(table: Any, names: Sequence[str], path: Path) -> np.ndarray:
    """A column, or several concatenated: [F] or [F, d]."""
    arrays = []
    for name in names:
        try:
            arrays.append(to_numpy(table.column(name)))
        except ValueError as error:
            raise DatasetError(f"{path}: column {name}: {error}") from error
        if len(names) > 1 and arrays[-1].ndim > 2:
            raise DatasetError(
                f"{path}: column {name} has the shape {list(arrays[-1].shape[1:])} per frame; only numbers and flat "
                "lists of numbers can be joined with other columns."
            )
    if len(names) == 1:
        return arrays[0]
    return np.concatenate([array.reshape(len(table), -1) for array in arrays], axis=1)


def numeric_names(schema: Any) -> list[str]:
    """Columns of a data file that hold numbers or lists of numbers."""
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
        raise DatasetError(f"{path}: the frames of an episode are not contiguous; the file is damaged.")
    spans = zip(indices.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return {index: slice(start, start + count) for index, start, count in spans}


def _check_shapes(columns: Columns, previous: Columns, path: Path, skipped: dict[str, str] | None) -> None:
    """Refuse a data file whose columns or their shapes differ from the previous files'.

    If `skipped` is given, differing columns other than state, action and bookkeeping are added to it instead.
    """

    def shape(of: Columns, name: str) -> str:
        return f"the shape {list(of[name].shape[1:])}" if name in of else "no values"

    for name in {**previous, **columns}:
        if (found := shape(columns, name)) != (expected := shape(previous, name)):
            reason = (
                f"{path}: {name} has {found} per frame, and {expected} in the previous data files; expected the same "
                "in all files."
            )
            if skipped is None or name in _BASE_COLUMNS:
                raise DatasetError(f"{reason} Repair the file, or {lerobot.LEAVE_OUT}.")
            skipped.setdefault(name, reason)


def _check_tasks(columns: Columns, metadata: Metadata) -> None:
    advice = "give one for all frames (--prompt, or prompt= in Python)"
    file = metadata.root / metadata.info.tasks_file
    if not metadata.tasks:
        kind, reason = (DatasetError, "is empty") if file.is_file() else (MissingFileError, "is missing")
        raise kind(f"The dataset {metadata.root} has no instructions, because {file} {reason}; {advice}.")
    for index in np.unique(columns["task_index"]).tolist():
        if not isinstance(metadata.tasks.get(index), str):
            rows = columns["task_index"] == index
            raise DatasetError(
                f"{rows.sum()} frames, the first in episode {columns['episode_index'][rows][0]}, have the task_index "
                f"{index}, for which {file} has no text. Add the instruction there, {advice}, or {lerobot.LEAVE_OUT}."
            )


def _check_episode(columns: Columns, episode: Episode) -> None:
    """Refuse an episode with missing frames, or with NaN or infinity in its state or action."""
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
