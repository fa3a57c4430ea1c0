"""Episodes of datasets, written into a new one in format v3.0.

Videos are copied; an episode's is encoded anew only where it can't be decoded without its neighbours, or where frames
are left out.
"""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.columns import rows_of_episodes, to_numpy
from torchpi.data.files import is_hidden, open_parquet, read_json_lines
from torchpi.data.images import file_inside
from torchpi.data.metadata import Episode, Info, Metadata, download_frames, episode_rows, with_frames
from torchpi.data.metadata_writer import SavedEpisode, new_info
from torchpi.data.pixels import is_depth_map
from torchpi.data.rate import Resampling
from torchpi.data.recording import Recording, write_parquet
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool, default_encoder, encode_video, video_info
from torchpi.data.video_copy import codec_of, cut_video
from torchpi.errors import DatasetError
from torchpi.extras import require
from torchpi.robots.keys import flatten

_EPISODES_STATS = "meta/episodes_stats.jsonl"
_WRITTEN_FILES = {lerobot.INFO, lerobot.STATS, lerobot.TASKS_PARQUET, lerobot.TASKS_JSONL, lerobot.EPISODES_JSONL}
_WRITTEN_FILES |= {_EPISODES_STATS}
"""Files of meta that are written anew, of all formats."""
_WRITTEN_COLUMNS = re.compile("episode_index|tasks|length|dataset_(from|to)_index|(data|videos|stats|meta)/.*")
"""Columns of the list of episodes that are written anew."""

Progress = Callable[[int, int], None]
"""Called with the number of episodes that are written, and of all."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclasses.dataclass(frozen=True)
class Edited:
    """A new dataset."""

    path: str
    episodes: int
    frames: int
    videos_copied: int
    """Videos, of one episode and camera each, that were copied."""
    videos_encoded: int
    """Those that were encoded anew."""
    notes: tuple[str, ...]
    """Parts of the old datasets that the new one has not."""


class Piece(NamedTuple):
    """An episode of a dataset."""

    source: Metadata
    episode: Episode
    row: Mapping[str, Any]
    """Its row in the list of episodes, statistics included."""


def pieces_of(path: str | Path, source: Metadata, indices: Sequence[int] | None = None) -> list[Piece]:
    """Episodes of a dataset, by default all; of an address, their files are downloaded."""
    wanted = {episode.index for episode in source.episodes} if indices is None else set(indices)
    episodes = with_frames([episode for episode in source.episodes if episode.index in wanted], source.root)
    download_frames(path, source.root, episodes, source.info.videos)
    spans, pool = VideoSpans(source.episodes, episodes, source.info.videos, source.info.fps, None), VideoPool()
    for video in {span.path for episode in episodes for span in episode.videos.values()}:
        spans.check(video, partial(pool.frame_times, video, source.info.fps))
    rows = _rows_with_stats(source)
    return [Piece(source, episode, rows.get(episode.index, {})) for episode in episodes]


def write_pieces(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    shown_as: Path,
    robot_type: str | None = None,
    resampling: Resampling | None = None,
    progress: Progress = no_progress,
) -> Edited:
    """Write episodes of datasets that are alike into a new or empty folder.

    Args:
        shown_as: the path of the folder in the result.
        robot_type: by default the first dataset's.
        resampling: by default none.
    """
    info = pieces[0].source.info
    fps = info.fps if resampling is None else resampling.fps
    info = _v3(dataclasses.replace(info, fps=fps, robot_type=robot_type or info.robot_type))
    recording, notes = Recording.create(folder, info), dict[str, None]()
    numbers: dict[str, int] = {}
    encoded = 0
    try:
        for done, (piece, table) in enumerate(_tables(pieces, info, notes), start=1):
            encoded += _add(recording, piece, table, numbers, resampling)
            progress(done, len(pieces))
        recording.finish(recoverable=False)
    except BaseException:
        recording.abandon()
        raise
    _copy_other_files(folder, list({piece.source.root: None for piece in pieces}), notes)
    copied = len(pieces) * len(info.videos) - encoded
    return Edited(str(shown_as), len(pieces), recording.num_frames, copied, encoded, tuple(notes))


def _rows_with_stats(source: Metadata) -> dict[int, dict[str, Any]]:
    """The list of episodes with all of its columns, by episode_index."""
    found: dict[int, dict[str, Any]] = {}
    for row in episode_rows(source.root, source.info, stats=True):
        found[int(row["episode_index"])] = row
    if (path := source.root / _EPISODES_STATS).is_file():
        for row in read_json_lines(path):
            found.setdefault(int(row["episode_index"]), {}).update(flatten(row, "/"))
    return found


def _v3(info: Info) -> Info:
    """The same settings in format v3.0."""
    bookkeeping = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in lerobot.BOOKKEEPING.items()}
    return new_info(
        fps=info.fps,
        features={**info.features, **bookkeeping},
        robot_type=info.robot_type,
        data_file_mb=info.data_files_size_in_mb or 100,  # LeRobot's limits
        video_file_mb=info.video_files_size_in_mb or 200,
    )


def _tables(pieces: Sequence[Piece], info: Info, notes: dict[str, None]) -> Iterator[tuple[Piece, Any]]:
    """The rows of each episode, all with the same columns."""
    pa = require("pyarrow", "data")
    names = [name for name in info.features if name not in info.videos]
    schema: Any = None
    by_file = itertools.groupby(pieces, key=lambda piece: (piece.source.root, piece.episode.data_file))
    for (root, path), group in by_file:
        with open_parquet(path) as file:
            table = file.read()
        runs = rows_of_episodes(to_numpy(table.column("episode_index")).ravel(), path)
        if others := sorted(set(table.column_names) - set(names)):
            notes[f"{', '.join(others)} of {path}: no feature in {lerobot.INFO}"] = None
        table = table.select([name for name in names if name in table.column_names])
        for camera in info.cameras:
            table = table if camera in info.videos else _with_images(table, camera, root, path)
        schema = schema or table.schema
        try:
            table = table.select(schema.names).cast(schema)
        except (KeyError, pa.ArrowInvalid, ValueError) as error:
            raise DatasetError(
                f"{path} has other columns than the first data file, {', '.join(schema.names)}: {error}."
            ) from error
        for piece in group:
            rows = runs.get(piece.episode.index, slice(0, 0))
            if rows.stop - rows.start != piece.episode.length:
                raise DatasetError(
                    f"{path}: episode {piece.episode.index} has {rows.stop - rows.start} frames; expected "
                    f"{piece.episode.length}, as its metadata say. Delete it: torchpi data delete."
                )
            yield piece, table.slice(rows.start, piece.episode.length)


def _with_images(table: Any, camera: str, root: Path, path: Path) -> Any:
    """The table with a camera's images in it, also those that it has names of files for."""
    pa = require("pyarrow", "data")
    images, kind = table.column(camera), table.schema.field(camera).type
    if pa.types.is_struct(kind) and "bytes" in kind.names and not images.combine_chunks().field("bytes").null_count:
        return table
    found = ({"path": each} if isinstance(each, str) else each or {} for each in images.to_pylist())
    rows: list[dict[str, Any]] = list(found)
    for number, row in enumerate(rows):
        if row.get("bytes") is None:
            row["bytes"] = file_inside(root, row["path"], f"{path}, row {number}").read_bytes()
    return _with_column(table, camera, pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})))


def _add(recording: Recording, piece: Piece, table: Any, numbers: dict[str, int], resampling: Resampling | None) -> int:
    """Save an episode; the number of its videos that had to be encoded.

    Args:
        numbers: the task_index of each instruction so far; new ones are added.
    """
    texts = _instructions(piece, table)
    tasks = tuple(dict.fromkeys((*texts, *piece.episode.tasks)))
    for text in tasks:
        numbers.setdefault(text, len(numbers))
    frames = np.arange(len(table)) if resampling is None else resampling.frames(len(table))
    seconds = to_numpy(table.column("timestamp")).ravel().astype(np.float64)
    new: dict[str, np.ndarray] = {
        "timestamp": seconds - seconds[0] if resampling is None else np.arange(len(frames)) / resampling.fps,
        "frame_index": np.arange(len(frames)),
        "episode_index": np.full(len(frames), len(recording.episodes)),
        "index": recording.num_frames + np.arange(len(frames)),
        "task_index": np.array([numbers[text] for text in texts])[frames],
    }
    fps = None if resampling is None else resampling.fps
    columns = {name: value for name, value in piece.row.items() if not _WRITTEN_COLUMNS.fullmatch(name)}
    stats = {
        key: {name.rpartition("/")[2]: value for name, value in piece.row.items() if name.startswith(f"stats/{key}/")}
        for key in recording.info.cameras
    }
    codecs: dict[str, str] = {}
    encoded = 0
    with recording.saving(SavedEpisode(len(frames), tasks[0], {}, tasks[1:], stats, codecs, columns)) as files:
        rows = table if resampling is None else _resampled(table, frames, resampling)
        for name, dtype in lerobot.BOOKKEEPING.items():
            rows = _with_column(rows, name, require("pyarrow", "data").array(new[name].astype(dtype)))
        with write_parquet(files["data"], rows.schema) as file:
            file.write_table(rows)
        for camera in recording.info.videos:
            is_copied = _write_video(files[camera], piece, camera, frames.tolist(), fps)
            encoded += not is_copied
            codecs[camera] = codec_of(files[camera])
            if not is_copied and not recording.episodes:  # LeRobot, too, describes the first file
                feature = recording.info.features[camera]
                height, width = feature["shape"][:2]
                info = video_info(default_encoder(), height=height, width=width, fps=recording.info.fps)
                recording.info.features[camera] = {**feature, "info": info}
    return encoded


def _instructions(piece: Piece, table: Any) -> list[str]:
    """The instruction of each frame."""
    indices = to_numpy(table.column("task_index")).ravel()
    if missing := {index for index in indices.tolist() if not isinstance(piece.source.tasks.get(index), str)}:
        raise DatasetError(
            f"Episode {piece.episode.index} of {piece.source.root} has the task_index {min(missing)}, for which "
            f"{piece.source.info.tasks_file} has no text. Add the instruction there, or delete the episode."
        )
    return [piece.source.tasks[int(index)] for index in indices]


def _resampled(table: Any, frames: np.ndarray, resampling: Resampling) -> Any:
    actions = to_numpy(table.column(lerobot.ACTION))
    new = resampling.actions(actions.reshape(len(table), -1)).reshape(-1, *actions.shape[1:])
    array = require("pyarrow", "data").array(new.tolist(), table.schema.field(lerobot.ACTION).type)
    return _with_column(table.take(frames), lerobot.ACTION, array)


def _with_column(table: Any, name: str, array: Any) -> Any:
    place = table.schema.get_field_index(name)
    return table.append_column(name, array) if place < 0 else table.set_column(place, name, array)


def _write_video(path: Path, piece: Piece, camera: str, frames: Sequence[int], fps: float | int | None) -> bool:
    """Write an episode's video, at another rate if it is given; True if it could be copied."""
    index, recorded_fps, length = piece.episode.index, piece.source.info.fps, piece.episode.length
    if camera not in piece.episode.videos:
        raise DatasetError(
            f"{camera} of episode {index} has no video: it was not encoded before the recording ended. Leave the "
            "episode out (torchpi data delete)."
        )
    span = piece.episode.videos[camera]
    if fps is None and cut_video(path, span.path, span.from_timestamp, num_frames=length, fps=recorded_fps):
        return True
    feature = piece.source.info.features[camera]
    if is_depth_map(feature):
        raise DatasetError(
            f"{camera} of episode {index} is a depth video that would have to be encoded anew, which "
            "would change its depths; it can be copied only where it begins with a keyframe, at the same rate."
        )
    pool = VideoPool(limit=1)
    period = 1 / recorded_fps
    images = (pool.read(span.path, span.from_timestamp + frame * period, 0.25 * period, period) for frame in frames)
    encode_video(path, images, fps=fps or recorded_fps, encoder=default_encoder())
    return False


def _copy_other_files(folder: Path, roots: Sequence[Path], notes: dict[str, None]) -> None:
    """Copy the files of meta that LeRobot's format doesn't have, if they are the same in all datasets."""
    files = [file for root in roots for file in (root / "meta").iterdir() if file.is_file()]
    names = {f"meta/{file.name}" for file in files if not is_hidden(Path(file.name))}
    for name in sorted(names - _WRITTEN_FILES):
        contents = {(root / name).read_bytes() if (root / name).is_file() else None for root in roots}
        if len(contents) == 1:
            shutil.copy(roots[0] / name, folder / name)
        else:
            notes[f"{name}: differs between the datasets"] = None
