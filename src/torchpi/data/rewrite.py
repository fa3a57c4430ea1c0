"""Episodes of datasets, written into a new one in format v3.0.

Videos are copied; an episode's is encoded anew only where it can't be decoded without its neighbours, or where frames
are left out.
"""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.columns import rows_of_episodes, to_numpy
from torchpi.data.files import DatasetFolder, is_hidden, open_parquet, read_json_lines
from torchpi.data.images import ParquetImages
from torchpi.data.metadata import Episode, Info, Metadata, download_frames, drop_empty, episode_rows
from torchpi.data.metadata_writer import SavedEpisode, new_info
from torchpi.data.pixels import is_depth_map
from torchpi.data.rate import Resampling
from torchpi.data.recording import Recording, write_parquet
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool, default_encoder, encode_video, video_info
from torchpi.data.video_copy import codec_of, cut_video
from torchpi.errors import DatasetError, counted
from torchpi.extras import require
from torchpi.robots.keys import flatten

_EPISODES_STATS = "meta/episodes_stats.jsonl"
_WRITTEN_FILES = {lerobot.INFO, lerobot.STATS, lerobot.TASKS_PARQUET}
_WRITTEN_FILES |= {lerobot.TASKS_JSONL, lerobot.EPISODES_JSONL, _EPISODES_STATS}
"""Files of meta that are written anew, of all formats."""
_WRITTEN_COLUMNS = re.compile("episode_index|tasks|length|dataset_(from|to)_index|(data|videos|stats|meta)/.*")
"""Columns of the list of episodes that are written anew."""

Progress = Callable[[int, int], None]
"""Called with the number of episodes that are written, and of all."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclasses.dataclass
class Edited:
    """A new dataset."""

    path: str
    episodes: int = 0
    frames: int = 0
    videos_copied: int = 0
    """Videos are counted per episode and camera."""
    videos_encoded: int = 0
    notes: tuple[str, ...] = ()
    """Parts of the old datasets that the new one has not."""


class Piece(NamedTuple):
    """An episode of a dataset."""

    source: Metadata
    episode: Episode
    row: Mapping[str, Any]
    """Its row in the list of episodes, statistics included."""


def pieces_of(path: str | Path, source: Metadata, indices: Collection[int] | None = None) -> list[Piece]:
    """Episodes of a dataset, by default all; of an address, their files are downloaded."""
    wanted = [episode for episode in source.episodes if indices is None or episode.index in indices]
    episodes = drop_empty(wanted, source.root)
    download_frames(path, source.root, episodes, source.info.videos)
    spans, pool = VideoSpans(source.episodes, episodes, source.info.videos, source.info.fps, None), VideoPool()
    for video in {span.path for episode in episodes for span in episode.videos.values()}:
        spans.check(video, partial(pool.frame_times, video, source.info.fps))
    rows = {row["episode_index"]: row for row in episode_rows(source.root, source.info, stats=True)}
    if (path := DatasetFolder(source.root).file(_EPISODES_STATS)).is_file():
        for row in read_json_lines(path):
            rows.setdefault(row["episode_index"], {}).update(flatten(row, "/"))
    return [Piece(source, episode, rows[episode.index]) for episode in episodes]


def write_pieces(
    folder: Path,
    pieces: Sequence[Piece],
    result: Edited,
    *,
    robot_type: str | None = None,
    resampling: Resampling | None = None,
    progress: Progress,
) -> None:
    """Write episodes of datasets that are alike into a new or empty folder; `result` gets the counts and notes."""
    old = pieces[0].source.info
    info = new_info(
        fps=old.fps if resampling is None else resampling.fps,
        features=old.features,
        robot_type=robot_type or old.robot_type,
        data_file_mb=old.data_files_size_in_mb or 100,  # LeRobot's limits
        video_file_mb=old.video_files_size_in_mb or 200,
    )
    recording = Recording.create(folder, info)
    try:
        for done, (piece, table) in enumerate(_tables(pieces, info, result), start=1):
            _add(recording, piece, table, result, resampling)
            progress(done, len(pieces))
        recording.finish(recoverable=False)
    except BaseException:
        recording.abandon()
        raise
    result.episodes, result.frames = len(pieces), recording.num_frames
    _copy_other_files(folder, list(dict.fromkeys(piece.source.root for piece in pieces)), result)


def _tables(pieces: Sequence[Piece], info: Info, result: Edited) -> Iterator[tuple[Piece, Any]]:
    """The rows of each episode, all with the same columns."""
    pa = require("pyarrow", "data")
    names, schema = [name for name in info.features if name not in info.videos], None
    images_in_rows = set(info.cameras) - set(info.videos)
    by_file = itertools.groupby(pieces, lambda piece: (piece.source.root, piece.episode.data_file))
    for (root, path), group in by_file:
        with open_parquet(path) as file:
            table = file.read()
        if missing := ({"timestamp", "episode_index", "task_index"} | images_in_rows) - set(table.column_names):
            raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}, which a new dataset needs.")
        rows = rows_of_episodes(to_numpy(table.column("episode_index")).ravel(), path)
        if others := sorted(set(table.column_names) - set(names)):
            result.notes += (f"{', '.join(others)} of {path}: no feature in {lerobot.INFO}",)
        table, images = table.select([name for name in names if name in table.column_names]), ParquetImages(root, 0)
        for piece in group:
            place = rows.get(piece.episode.index, slice(0, 0))
            if place.stop - place.start != piece.episode.length:
                raise DatasetError(
                    f"{path}: episode {piece.episode.index} has {counted(place.stop - place.start, 'frame')}; expected "
                    f"{piece.episode.length}, as its metadata say. Delete it: torchpi data delete."
                )
            of_piece = table[place]
            for camera in images_in_rows:
                of_piece = _with_images(of_piece, camera, images, path, place.start)
            schema = schema or of_piece.schema
            try:
                of_piece = of_piece.select(schema.names).cast(schema)
            except (KeyError, ValueError, pa.ArrowException) as error:
                raise DatasetError(
                    f"{path} has other columns than the first data file, {', '.join(schema.names)}: {error}."
                ) from error
            yield piece, of_piece


def _with_images(table: Any, camera: str, images: ParquetImages, path: Path, first_row: int) -> Any:
    """The table of an episode with a camera's images in it, also those that it has names of files for."""
    pa = require("pyarrow", "data")
    column, kind = table.column(camera), table.schema.field(camera).type
    if pa.types.is_struct(kind) and "bytes" in kind.names and not column.combine_chunks().field("bytes").null_count:
        return table
    files = (images.file(path, camera, first_row + i) for i in range(len(table)))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return _with_column(table, camera, [{"bytes": file} for file in files], kind)


def _add(recording: Recording, piece: Piece, table: Any, result: Edited, resampling: Resampling | None) -> None:
    texts = _instructions(piece, table)
    seconds = to_numpy(table.column("timestamp")).ravel().astype(np.float64)
    seconds -= seconds[0]
    frames = None
    if resampling is not None:
        frames = resampling.frames(len(table))
        texts, seconds = [texts[i] for i in frames], np.arange(len(frames)) / resampling.fps
        actions, kind = to_numpy(table.column(lerobot.ACTION)), table.schema.field(lerobot.ACTION).type
        taken = resampling.actions(actions.reshape(len(table), -1)).reshape(-1, *actions.shape[1:])
        table = _with_column(table.take(frames), lerobot.ACTION, taken.tolist(), kind)
    for name, values in recording.bookkeeping(texts, seconds).items():
        table = _with_column(table, name, values)
    tasks = tuple(dict.fromkeys([*texts, *piece.episode.tasks]))
    stats = {
        key: {name.rpartition("/")[2]: value for name, value in piece.row.items() if name.startswith(f"stats/{key}/")}
        for key in recording.info.cameras
    }
    columns = {name: value for name, value in piece.row.items() if not _WRITTEN_COLUMNS.fullmatch(name)}
    codecs: dict[str, str] = {}
    with recording.saving(SavedEpisode(len(texts), tasks[0], {}, tasks[1:], stats, codecs, columns)) as files:
        write_parquet(files["data"], [table])
        for camera in recording.info.videos:
            _write_video(files[camera], recording, piece, camera, frames, result)
            codecs[camera] = codec_of(files[camera])


def _instructions(piece: Piece, table: Any) -> list[str]:
    indices, source = to_numpy(table.column("task_index")).ravel().tolist(), piece.source
    if missing := [index for index in indices if not isinstance(source.tasks.get(index), str)]:
        raise DatasetError(
            f"Episode {piece.episode.index} of {source.root} has the task_index {missing[0]}, for which "
            f"{source.info.tasks_file} has no text. Add the instruction there, or delete the episode."
        )
    return [source.tasks[index] for index in indices]


def _with_column(table: Any, name: str, values: Any, kind: Any = None) -> Any:
    place, array = table.schema.get_field_index(name), require("pyarrow", "data").array(values, kind)
    return table.append_column(name, array) if place < 0 else table.set_column(place, name, array)


def _write_video(
    path: Path, recording: Recording, piece: Piece, camera: str, frames: np.ndarray | None, result: Edited
) -> None:
    """Copy an episode's video, or encode it anew: some of its frames, at the new dataset's rate, if they are given."""
    (source, episode, _), feature = piece, recording.info.features[camera]
    span, fps = episode.video(camera), source.info.fps
    if frames is None and cut_video(path, span.path, span.from_timestamp, num_frames=episode.length, fps=fps):
        result.videos_copied += 1
        return
    if is_depth_map(feature):
        raise DatasetError(
            f"{camera} of episode {episode.index} is a depth video that would have to be encoded anew, which "
            "would change its depths; it can be copied only where it begins with a keyframe, at the same rate."
        )
    result.videos_encoded += 1
    pool, encoder = VideoPool(limit=1), default_encoder()
    seconds = span.from_timestamp + (np.arange(episode.length) if frames is None else frames) / fps
    images = (pool.read(span.path, second, 0.25 / fps, 1 / fps) for second in seconds.tolist())
    encode_video(path, images, fps=recording.info.fps, encoder=encoder)
    if not recording.episodes:  # LeRobot, too, describes the first file
        height, width = feature["shape"][:2]
        info = video_info(encoder, height=height, width=width, fps=recording.info.fps)
        recording.info.features[camera] = {**feature, "info": info}


def _copy_other_files(folder: Path, roots: Sequence[Path], result: Edited) -> None:
    """Copy the files of meta that LeRobot's format doesn't have, if they are the same in all datasets."""
    files = [file for root in roots for file in (root / "meta").iterdir() if file.is_file()]
    names = {f"meta/{file.name}" for file in files if not is_hidden(Path(file.name))}
    for name in sorted(names - _WRITTEN_FILES):
        contents = {(root / name).read_bytes() if (root / name).is_file() else None for root in roots}
        if len(contents) == 1:
            shutil.copy(roots[0] / name, folder / name)
        else:
            result.notes += (f"{name}: differs between the datasets",)
