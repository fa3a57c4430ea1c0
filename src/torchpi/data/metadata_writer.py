"""The metadata of a v3.0 data set, made from its settings and episodes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.feature_stats import image_stats, number_stats, summed
from torchpi.extras import require


@dataclasses.dataclass(frozen=True)
class RecordingSettings:
    """What a data set is, as `recording.json` has it."""

    fps: int
    features: dict[str, Any]
    """As in meta/info.json."""
    robot_type: str | None
    data_file_mb: int | float
    video_file_mb: int | float

    @property
    def cameras(self) -> dict[str, str]:
        """The keys of the cameras, each with "image" or "video"."""
        return {
            key: feature["dtype"] for key, feature in self.features.items() if feature["dtype"] in ("image", "video")
        }

    @property
    def videos(self) -> tuple[str, ...]:
        """The keys of the cameras that are written as video."""
        return tuple(key for key, dtype in self.cameras.items() if dtype == "video")


@dataclasses.dataclass(frozen=True)
class SavedEpisode:
    """A complete episode, as its .json file has it."""

    length: int
    task: str
    task_index: int
    bytes: dict[str, int]
    """Size of its data file ("data") and of its videos, per camera."""
    histograms: dict[str, Any]
    """Per camera the sum of its images' histograms, [3, 256]; only on disk, not in `Recording.episodes`."""


def info(settings: RecordingSettings, episodes: Sequence[SavedEpisode]) -> dict[str, Any]:
    """meta/info.json."""
    return {
        "codebase_version": "v3.0",
        "fps": settings.fps,
        "features": settings.features,
        "total_episodes": len(episodes),
        "total_frames": sum(episode.length for episode in episodes),
        "total_tasks": len({episode.task for episode in episodes}),
        "chunks_size": lerobot.CHUNKS_SIZE,
        "data_files_size_in_mb": settings.data_file_mb,
        "video_files_size_in_mb": settings.video_file_mb,
        "data_path": lerobot.DATA_PATH,
        "video_path": lerobot.VIDEO_PATH if settings.videos else None,
        "robot_type": settings.robot_type,
        "splits": {"train": f"0:{len(episodes)}"},
    }


def stats(
    settings: RecordingSettings, episodes: Sequence[SavedEpisode], columns: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """meta/stats.json.

    Args:
        columns: all frames of each numeric feature, [F, d].
    """
    num_frames = sum(episode.length for episode in episodes)
    return {
        key: image_stats(summed([episode.histograms[key] for episode in episodes]), num_frames)
        if key in settings.cameras
        else number_stats(columns[key])
        for key in settings.features
    }


def episodes_table(
    settings: RecordingSettings,
    episodes: Sequence[SavedEpisode],
    groups: Sequence[Sequence[int]],
    columns: Mapping[str, np.ndarray],
) -> Any:
    """meta/episodes: where each episode lies, and its statistics.

    Args:
        groups: the episodes of each data file and its videos, in order.
        columns: all frames of each numeric feature, [F, d].
    """
    rows = []
    first = 0  # of the episode's frames in the data set
    for number, group in enumerate(groups):
        before = 0  # frames in this file
        for index in group:
            episode = episodes[index]
            last = first + episode.length
            rows.append(
                {
                    "episode_index": index,
                    "tasks": [episode.task],
                    "length": episode.length,
                    **_prefixed("data", _place_of(number)),
                    "dataset_from_index": first,
                    "dataset_to_index": last,
                    **_video_spans(settings, number, before, before + episode.length),
                    **_episode_stats(settings, episode, {key: values[first:last] for key, values in columns.items()}),
                    **_prefixed("meta/episodes", _place_of(0)),
                }
            )
            first, before = last, before + episode.length
    return require("pyarrow", "data").Table.from_pylist(rows)


def _video_spans(settings: RecordingSettings, number: int, first: int, last: int) -> dict[str, Any]:
    span = {**_place_of(number), "from_timestamp": first / settings.fps, "to_timestamp": last / settings.fps}
    return {name: value for key in settings.videos for name, value in _prefixed(f"videos/{key}", span).items()}


def _episode_stats(
    settings: RecordingSettings, episode: SavedEpisode, columns: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key in settings.features:
        if key in settings.cameras:
            found = image_stats(np.asarray(episode.histograms[key], np.int64), episode.length)
        else:
            found = number_stats(columns[key])
        row |= _prefixed(f"stats/{key}", found)
    return row


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def tasks_table(episodes: Sequence[SavedEpisode]) -> Any:
    """meta/tasks.parquet, with the metadata by which pandas takes their texts as the index."""
    pa = require("pyarrow", "data")
    tasks = {episode.task: episode.task_index for episode in episodes}

    def column(name: str, kind: str, dtype: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def data_file(root: Path, number: int) -> Path:
    """The number-th data file of a v3.0 set."""
    return root / lerobot.DATA_PATH.format(**_place_of(number))


def video_file(root: Path, number: int, key: str) -> Path:
    """The number-th video of a camera of a v3.0 set."""
    return root / lerobot.VIDEO_PATH.format(video_key=key, **_place_of(number))


def _place_of(number: int) -> dict[str, int]:
    chunk_index, file_index = divmod(number, lerobot.CHUNKS_SIZE)
    return {"chunk_index": chunk_index, "file_index": file_index}
