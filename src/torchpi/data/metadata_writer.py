"""Metadata of a v3.0 dataset, with LeRobot's statistics per episode and over all episodes.

torchpi itself never reads these statistics (it computes its own, see `torchpi.data.stats`), because those of other
writers are not always right.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Num, UInt8

from torchpi.data import format as lerobot
from torchpi.data.metadata import Info
from torchpi.extras import require
from torchpi.robots.keys import flatten

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Histograms take every n-th row and column, so that a large image takes no longer than one of this height.
_HISTOGRAM_HEIGHT = 128


@dataclasses.dataclass(frozen=True)
class SavedEpisode:
    """A complete episode, as stored in its .json file."""

    length: int
    task: str
    histograms: dict[str, Any]
    """Sum of the images' histograms [3, 256] by camera; only on disk, empty in `Recording.episodes`."""
    other_tasks: tuple[str, ...] = ()
    """Instructions of its frames other than `task`."""
    camera_stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Statistics of cameras without histograms, copied from the source dataset."""
    codecs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Codec parameters of copied videos. Only episodes with the same ones share a file."""
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Extra columns of its row in meta/episodes."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task, *self.other_tasks)


def new_info(
    *,
    fps: float | int,
    features: dict[str, Any],
    robot_type: str | None,
    data_file_mb: int | float,
    video_file_mb: int | float,
) -> Info:
    """Contents of meta/info.json for a dataset without episodes; the columns of `BOOKKEEPING` are added."""
    bookkeeping = {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in lerobot.BOOKKEEPING.items()}
    features = features | bookkeeping
    is_video = any(feature["dtype"] == "video" for feature in features.values())
    info = Info("v3.0", fps, features, lerobot.DATA_PATH, lerobot.VIDEO_PATH if is_video else None, robot_type)
    return dataclasses.replace(info, data_files_size_in_mb=data_file_mb, video_files_size_in_mb=video_file_mb)


def file_path(root: Path, number: int, key: str) -> Path:
    """Path of the number-th data file (key "data") or video file of a camera."""
    template = lerobot.DATA_PATH if key == "data" else lerobot.VIDEO_PATH
    return root / template.format(video_key=key, **_file_indices(number))


def feature_stats(
    info: Info, episodes: Sequence[SavedEpisode], columns: Mapping[str, np.ndarray]
) -> dict[str, dict[str, list[Any]]]:
    """Statistics by feature over some episodes, from their images and the numeric columns [F, d] of their frames.
    Features of other kinds have none."""
    stats = {key: _camera_stats(episodes, key) for key in info.cameras}
    stats |= {key: number_stats(values) for key, values in columns.items()}
    return {key: stats[key] for key in info.features if stats.get(key)}


def _camera_stats(episodes: Sequence[SavedEpisode], key: str) -> dict[str, list[Any]]:
    if all(key in episode.histograms for episode in episodes):
        histogram = np.sum([episode.histograms[key] for episode in episodes], axis=0)
        return image_stats(histogram, sum(episode.length for episode in episodes))
    return merged_stats([episode.camera_stats.get(key, {}) for episode in episodes])


def merged_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Combine the statistics of several parts; empty if a part has none. Exact except for quantiles, which are
    averaged, as in LeRobot."""
    if not all({"min", "max", "mean", "std", "count"} <= part.keys() for part in parts):
        return {}
    names = [name for name in parts[0] if all(name in part for part in parts)]
    values = {name: np.array([part[name] for part in parts], np.float64) for name in names}
    merged = {name: np.average(array, axis=0, weights=values["count"][:, 0]) for name, array in values.items()}
    variance = values["std"] ** 2 + (values["mean"] - merged["mean"]) ** 2
    merged["std"] = np.sqrt(np.average(variance, axis=0, weights=values["count"][:, 0]))
    merged |= {"min": values["min"].min(axis=0), "max": values["max"].max(axis=0)}
    return {**{name: array.tolist() for name, array in merged.items()}, "count": [int(values["count"].sum())]}


def episodes_table(
    info: Info, episodes: Sequence[SavedEpisode], groups: Sequence[Sequence[int]], columns: Mapping[str, np.ndarray]
) -> Any:
    """Build the table meta/episodes: file positions and statistics of each episode. `groups` are the episodes of each
    file, `columns` all frames of each numeric feature, [F, d]."""
    starts = np.cumsum([0, *(episode.length for episode in episodes)]).tolist()
    rows = []
    for number, group in enumerate(groups):
        file_indices = _file_indices(number)
        for index in group:
            episode, start, stop = episodes[index], starts[index], starts[index + 1]
            offset = start - starts[group[0]]  # frames before it in its file
            span = {"from_timestamp": offset / info.fps, "to_timestamp": (offset + episode.length) / info.fps}
            episode_columns = {key: values[start:stop] for key, values in columns.items()}
            row = {
                "episode_index": index,
                "tasks": list(episode.tasks),
                "length": episode.length,
                "data": file_indices,
                "dataset_from_index": start,
                "dataset_to_index": stop,
                "videos": {key: {**file_indices, **span} for key in info.videos},
                "stats": feature_stats(info, [episode], episode_columns),
                "meta/episodes": _file_indices(0),
            }
            rows.append({**episode.columns, **flatten(row, "/")})
    names = dict.fromkeys(name for row in rows for name in row)
    return require("pyarrow", "data").table({name: [row.get(name) for row in rows] for name in names})


def tasks_table(tasks: Sequence[str]) -> Any:
    """Build the table meta/tasks.parquet, with the schema metadata that makes the texts the index in pandas."""
    pa = require("pyarrow", "data")

    def column(name: str | None, kind: str, dtype: str, metadata: Any = None) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": metadata}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [column(None, "unicode", "object", {"encoding": "UTF-8"})],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def number_stats(values: Num[np.ndarray, "F d"] | Bool[np.ndarray, "F d"]) -> dict[str, list[Any]]:
    exact = np.asarray(values, np.float64)
    stats = {name: getattr(exact, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0).tolist()
    return {**stats, "count": [len(exact)], **dict(zip(_QUANTILES, quantiles, strict=True))}


def image_histogram(image: UInt8[np.ndarray, "h w 3"]) -> Int64[np.ndarray, "3 256"]:
    """Count the values of each channel. Histograms of several images can be added."""
    step = max(1, image.shape[0] // _HISTOGRAM_HEIGHT)
    subsampled = image[::step, ::step]
    return np.stack([np.bincount(subsampled[..., channel].ravel(), minlength=256) for channel in range(3)])


def image_stats(histogram: Int64[np.ndarray, "3 256"], num_frames: int) -> dict[str, list[Any]]:
    """Statistics [3, 1, 1] of a camera's pixels, scaled to [0, 1], from the sum of its images' histograms."""
    levels = np.arange(256) / 255
    total, cumulative = histogram.sum(axis=1), np.cumsum(histogram, axis=1)  # [3], [3, 256]
    mean = histogram @ levels / total  # [3]
    std = np.sqrt((histogram * (levels - mean[:, None]) ** 2).sum(axis=1) / total)
    ranks = {"min": np.ones(3), "max": total, **{name: q * total for name, q in _QUANTILES.items()}}
    # The pixel value at each rank, with pixels sorted by value.
    values = {name: (cumulative < rank[:, None]).sum(axis=1) / 255 for name, rank in ranks.items()}
    values |= {"mean": mean, "std": std}
    stats = {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()} | {"count": [num_frames]}
    return {name: stats[name] for name in ("min", "max", "mean", "std", "count", *_QUANTILES)}  # LeRobot's order


def _file_indices(number: int) -> dict[str, int]:
    chunk_index, file_index = divmod(number, lerobot.CHUNKS_SIZE)
    return {"chunk_index": chunk_index, "file_index": file_index}
