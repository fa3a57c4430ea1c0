"""Writing episodes of existing datasets to a new dataset in format v3.0.

Videos are copied. An episode's video is re-encoded only if it can't be decoded without its neighbours, or if frames are
dropped.
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
"""Files of meta, in all formats, that are not copied but written anew."""
_WRITTEN_COLUMNS = re.compile("episode_index|tasks|length|dataset_(from|to)_index|(data|videos|stats|meta)/.*")
"""Columns of the list of episodes that are not copied but written anew."""

Progress = Callable[[int, int], None]
"""Called with the number of episodes written so far and in total."""


def no_progress(done: int, total: int) -> None:
    """Report no progress."""


@dataclasses.dataclass
class Edited:
    """Summary of a new dataset."""

    path: str
    episodes: int = 0
    frames: int = 0
    videos_copied: int = 0
    """Counted per episode and camera, as is `videos_encoded`."""
    videos_encoded: int = 0
    notes: tuple[str, ...] = ()
    """Parts of the sources that the new dataset lacks."""


class SourceEpisode(NamedTuple):
    """An episode of a source dataset."""

    source: Metadata
    episode: Episode
    row: Mapping[str, Any]
    """Its row in the list of episodes, including statistics."""


def source_episodes(path: str | Path, source: Metadata, indices: Collection[int] | None = None) -> list[SourceEpisode]:
    """Episodes of a dataset, by default all. For an address on the Hub, their files are downloaded."""
    selected = [episode for episode in source.episodes if indices is None or episode.index in indices]
    episodes = drop_empty(selected, source.root)
    download_frames(path, source.root, episodes, source.info.videos)
    spans, pool = VideoSpans(source.episodes, episodes, source.info.videos, source.info.fps, None), VideoPool()
    for video in {span.path for episode in episodes for span in episode.videos.values()}:
        spans.check(video, partial(pool.frame_times, video, source.info.fps))
    rows = {row["episode_index"]: row for row in episode_rows(source.root, source.info, stats=True)}
    stats_file = DatasetFolder(source.root).file(_EPISODES_STATS)
    if stats_file.is_file():
        for row in read_json_lines(stats_file):
            rows.setdefault(row["episode_index"], {}).update(flatten(row, "/"))
    return [SourceEpisode(source, episode, rows[episode.index]) for episode in episodes]


def write_episodes(
    folder: Path,
    items: Sequence[SourceEpisode],
    result: Edited,
    *,
    robot_type: str | None = None,
    resampling: Resampling | None = None,
    progress: Progress,
) -> None:
    """Write episodes of mergeable datasets to a new or empty folder. Counts and notes are added to `result`."""
    source_info = items[0].source.info
    info = new_info(
        fps=source_info.fps if resampling is None else resampling.fps,
        features=source_info.features,
        robot_type=robot_type or source_info.robot_type,
        data_file_mb=source_info.data_files_size_in_mb or 100,  # LeRobot's limits
        video_file_mb=source_info.video_files_size_in_mb or 200,
    )
    recording = Recording.create(folder, info)
    try:
        for done, (item, table) in enumerate(_tables(items, info, result), start=1):
            _write_episode(recording, item, table, result, resampling)
            progress(done, len(items))
        recording.finish(recoverable=False)
    except BaseException:
        recording.abandon()
        raise
    result.episodes, result.frames = len(items), recording.num_frames
    _copy_other_files(folder, list(dict.fromkeys(item.source.root for item in items)), result)


def _tables(items: Sequence[SourceEpisode], info: Info, result: Edited) -> Iterator[tuple[SourceEpisode, Any]]:
    """Each episode with the table of its rows. All tables have the same schema."""
    pa = require("pyarrow", "data")
    names, schema = [name for name in info.features if name not in info.videos], None
    image_columns = set(info.cameras) - set(info.videos)
    by_file = itertools.groupby(items, lambda item: (item.source.root, item.episode.data_file))
    for (root, path), group in by_file:
        with open_parquet(path) as file:
            table = file.read()
        if missing := ({"timestamp", "episode_index", "task_index"} | image_columns) - set(table.column_names):
            raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}, which a new dataset needs.")
        rows = rows_of_episodes(to_numpy(table.column("episode_index")).ravel(), path)
        if unknown := sorted(set(table.column_names) - set(names)):
            result.notes += (f"{', '.join(unknown)} of {path}: no feature in {lerobot.INFO}",)
        table, images = table.select([name for name in names if name in table.column_names]), ParquetImages(root, 0)
        for item in group:
            span = rows.get(item.episode.index, slice(0, 0))
            if span.stop - span.start != item.episode.length:
                raise DatasetError(
                    f"{path}: episode {item.episode.index} has {counted(span.stop - span.start, 'frame')}; expected "
                    f"{item.episode.length}, as its metadata say. Delete it: torchpi data delete."
                )
            episode_table = table[span]
            for camera in image_columns:
                episode_table = _with_images(episode_table, camera, images, path, span.start)
            schema = schema or episode_table.schema
            try:
                episode_table = episode_table.select(schema.names).cast(schema)
            except (KeyError, ValueError, pa.ArrowException) as error:
                raise DatasetError(
                    f"{path} has other columns than the first data file, {', '.join(schema.names)}: {error}."
                ) from error
            yield item, episode_table


def _with_images(table: Any, camera: str, images: ParquetImages, path: Path, first_row: int) -> Any:
    """The table of an episode with a camera's images embedded, including those that it only names files for."""
    pa = require("pyarrow", "data")
    column, kind = table.column(camera), table.schema.field(camera).type
    if pa.types.is_struct(kind) and "bytes" in kind.names and not column.combine_chunks().field("bytes").null_count:
        return table
    files = (images.file(path, camera, first_row + i) for i in range(len(table)))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return _with_column(table, camera, [{"bytes": file} for file in files], kind)


def _write_episode(
    recording: Recording, item: SourceEpisode, table: Any, result: Edited, resampling: Resampling | None
) -> None:
    texts = _instructions(item, table)
    timestamps = to_numpy(table.column("timestamp")).ravel().astype(np.float64)
    timestamps -= timestamps[0]
    frames = None
    if resampling is not None:
        frames = resampling.frames(len(table))
        texts, timestamps = [texts[i] for i in frames], np.arange(len(frames)) / resampling.fps
        actions, kind = to_numpy(table.column(lerobot.ACTION)), table.schema.field(lerobot.ACTION).type
        resampled = resampling.actions(actions.reshape(len(table), -1)).reshape(-1, *actions.shape[1:])
        table = _with_column(table.take(frames), lerobot.ACTION, resampled.tolist(), kind)
    for name, values in recording.bookkeeping(texts, timestamps).items():
        table = _with_column(table, name, values)
    tasks = tuple(dict.fromkeys([*texts, *item.episode.tasks]))
    stats = {
        key: {name.rpartition("/")[2]: value for name, value in item.row.items() if name.startswith(f"stats/{key}/")}
        for key in recording.info.cameras
    }
    columns = {name: value for name, value in item.row.items() if not _WRITTEN_COLUMNS.fullmatch(name)}
    codecs: dict[str, str] = {}
    with recording.saving(SavedEpisode(len(texts), tasks[0], {}, tasks[1:], stats, codecs, columns)) as files:
        write_parquet(files["data"], [table])
        for camera in recording.info.videos:
            _write_video(files[camera], recording, item, camera, frames, result)
            codecs[camera] = codec_of(files[camera])


def _instructions(item: SourceEpisode, table: Any) -> list[str]:
    indices, source = to_numpy(table.column("task_index")).ravel().tolist(), item.source
    if missing := [index for index in indices if not isinstance(source.tasks.get(index), str)]:
        raise DatasetError(
            f"Episode {item.episode.index} of {source.root} has the task_index {missing[0]}, for which "
            f"{source.info.tasks_file} has no text. Add the instruction there, or delete the episode."
        )
    return [source.tasks[index] for index in indices]


def _with_column(table: Any, name: str, values: Any, kind: Any = None) -> Any:
    i, array = table.schema.get_field_index(name), require("pyarrow", "data").array(values, kind)
    return table.append_column(name, array) if i < 0 else table.set_column(i, name, array)


def _write_video(
    path: Path, recording: Recording, item: SourceEpisode, camera: str, frames: np.ndarray | None, result: Edited
) -> None:
    """Copy an episode's video, or re-encode it. If `frames` are given, only these are kept, at the new rate."""
    (source, episode, _), feature = item, recording.info.features[camera]
    span, fps = episode.video(camera), source.info.fps
    if frames is None and cut_video(path, span.path, span.from_timestamp, num_frames=episode.length, fps=fps):
        result.videos_copied += 1
        return
    if is_depth_map(feature):
        raise DatasetError(
            f"{camera} of episode {episode.index} is a depth video that would have to be re-encoded, which would "
            "change its depths; it can only be copied if it starts with a keyframe and keeps its rate."
        )
    result.videos_encoded += 1
    pool, encoder = VideoPool(limit=1), default_encoder()
    seconds = span.from_timestamp + (np.arange(episode.length) if frames is None else frames) / fps
    images = (pool.read(span.path, second, 0.25 / fps, 1 / fps) for second in seconds.tolist())
    encode_video(path, images, fps=recording.info.fps, encoder=encoder)
    if not recording.episodes:  # as in LeRobot, the feature describes the first file
        height, width = feature["shape"][:2]
        info = video_info(encoder, height=height, width=width, fps=recording.info.fps)
        recording.info.features[camera] = {**feature, "info": info}


def _copy_other_files(folder: Path, roots: Sequence[Path], result: Edited) -> None:
    """Copy files of meta that are not part of LeRobot's format, if they are the same in all sources."""
    files = [file for root in roots for file in (root / "meta").iterdir() if file.is_file()]
    names = {f"meta/{file.name}" for file in files if not is_hidden(Path(file.name))}
    for name in sorted(names - _WRITTEN_FILES):
        contents = {(root / name).read_bytes() if (root / name).is_file() else None for root in roots}
        if len(contents) == 1:
            shutil.copy(roots[0] / name, folder / name)
        else:
            result.notes += (f"{name}: differs between the datasets",)
