"""The metadata of a v3.0 dataset, made from its episodes, with statistics per episode and for all, as LeRobot has them.

torchpi itself reads none of these statistics (see `torchpi.data.stats`): other writers' are not always what they say.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Num, UInt8

from torchpi.data import format as lerobot
from torchpi.data.metadata import Info
from torchpi.extras import require
from torchpi.robots.keys import flatten

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Images are counted at every n-th row and column, so that a large camera takes no longer than one of this height.
_COUNTED_HEIGHT = 128


@dataclasses.dataclass(frozen=True)
class SavedEpisode:
    """A complete episode, as its .json file has it."""

    length: int
    task: str
    histograms: dict[str, Any]
    """Per camera the sum of its images' histograms, [3, 256]; only on disk, not in `Recording.episodes`."""


def new_info(
    *,
    fps: int,
    features: dict[str, Any],
    robot_type: str | None,
    data_file_mb: int | float,
    video_file_mb: int | float,
) -> Info:
    """The settings of a dataset, as meta/info.json has them, without any episode."""
    is_video = any(feature["dtype"] == "video" for feature in features.values())
    info = Info("v3.0", fps, features, lerobot.DATA_PATH, lerobot.VIDEO_PATH if is_video else None, robot_type)
    return dataclasses.replace(info, data_files_size_in_mb=data_file_mb, video_files_size_in_mb=video_file_mb)


def file_path(root: Path, number: int, key: str) -> Path:
    """The number-th data file (key "data") or video of a camera."""
    if key == "data":
        return root / lerobot.DATA_PATH.format(**_place(number))
    return root / lerobot.VIDEO_PATH.format(video_key=key, **_place(number))


def feature_stats(
    info: Info, histograms: Mapping[str, Any], columns: Mapping[str, np.ndarray], num_frames: int
) -> dict[str, dict[str, list[Any]]]:
    """The statistics of each feature, from the cameras' histograms [3, 256] and the numeric columns [F, d]."""
    return {
        key: image_stats(np.asarray(histograms[key], np.int64), num_frames)
        if key in info.cameras
        else number_stats(columns[key])
        for key in info.features
    }


@dataclasses.dataclass(frozen=True)
class EpisodeRow:
    """An episode as the table meta/episodes has it."""

    length: int
    tasks: Sequence[str]
    places: Mapping[str, tuple[int, int]]
    """Of "data" and each video: the number of the file, and of the episode's first frame in it."""
    stats: Mapping[str, Any]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further columns."""


def metadata_files(
    info: Info, rows: Sequence[EpisodeRow], stats: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, Callable[[Path], Any]]:
    """The files of meta by their place in the dataset, each as a function that writes it to a path; the last one,
    meta/info.json, makes the dataset complete."""
    write_table = require("pyarrow.parquet", "data").write_table
    info = dataclasses.replace(
        info,
        total_episodes=len(rows),
        total_frames=sum(row.length for row in rows),
        total_tasks=len(tasks),
        splits={"train": f"0:{len(rows)}"},
    )
    documents = {lerobot.STATS: stats, lerobot.INFO: dataclasses.asdict(info)}
    return {
        lerobot.TASKS_PARQUET: lambda path: write_table(_tasks_table(tasks), path),
        lerobot.EPISODES_PATH.format(**_place(0)): lambda path: write_table(_episodes_table(info, rows), path),
        **{
            name: partial(Path.write_text, data=json.dumps(document, indent=4), encoding="utf-8")
            for name, document in documents.items()
        },
    }


def _episodes_table(info: Info, rows: Sequence[EpisodeRow]) -> Any:
    """The table meta/episodes: place and statistics of each episode."""
    documents, start = [], 0
    for index, row in enumerate(rows):
        videos = {}
        for key in info.videos:
            number, in_file = row.places[key]
            span = {"from_timestamp": in_file / info.fps, "to_timestamp": (in_file + row.length) / info.fps}
            videos[key] = {**_place(number), **span}
        document = {
            "episode_index": index,
            "tasks": list(row.tasks),
            "length": row.length,
            "data": _place(row.places["data"][0]),
            "dataset_from_index": start,
            "dataset_to_index": start + row.length,
            "videos": videos,
            "stats": row.stats,
            "meta/episodes": _place(0),
        }
        documents.append({**row.extra, **flatten(document, "/")})
        start += row.length
    names = dict.fromkeys(name for document in documents for name in document)
    return require("pyarrow", "data").table({name: [document.get(name) for document in documents] for name in names})


def _tasks_table(tasks: Sequence[str]) -> Any:
    """The table meta/tasks.parquet, with the metadata by which pandas takes their texts as the index."""
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


def number_stats(values: Num[np.ndarray, "F d"]) -> dict[str, list[Any]]:
    """Exact statistics of a numeric feature, one value per dimension."""
    exact = np.asarray(values, np.float64)
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return {
        "min": exact.min(axis=0).tolist(),
        "max": exact.max(axis=0).tolist(),
        "mean": exact.mean(axis=0).tolist(),
        "std": exact.std(axis=0).tolist(),
        "count": [len(exact)],
        **dict(zip(_QUANTILES, quantiles.tolist(), strict=True)),
    }


def image_histogram(image: UInt8[np.ndarray, "h w 3"]) -> Int64[np.ndarray, "3 256"]:
    """The frequency of each value in each channel; histograms of several images can be added."""
    step = max(1, image.shape[0] // _COUNTED_HEIGHT)
    thinned = image[::step, ::step]
    return np.stack([np.bincount(thinned[..., channel].ravel(), minlength=256) for channel in range(3)])


def image_stats(histogram: Int64[np.ndarray, "3 256"], num_frames: int) -> dict[str, list[Any]]:
    """Statistics of a camera in [0, 1], each [3, 1, 1], from the sum of its images' histograms."""
    levels = np.arange(256) / 255
    total, cumulative = histogram.sum(axis=1), np.cumsum(histogram, axis=1)  # [3], [3, 256]
    mean = np.array([counts @ levels for counts in histogram]) / total  # [3]
    std = np.sqrt([counts @ (levels - centre) ** 2 for counts, centre in zip(histogram, mean, strict=True)] / total)

    def as_list(channels: np.ndarray) -> list[Any]:
        return list(channels.reshape(3, 1, 1).tolist())

    def level(rank: np.ndarray) -> list[Any]:
        """The value that the `rank`-th pixel has, in the order of their values."""
        return as_list((cumulative < rank[:, None]).sum(axis=1) / 255)

    return {
        "min": level(np.ones(3)),
        "max": level(total),
        "mean": as_list(mean),
        "std": as_list(std),
        "count": [num_frames],
        **{name: level(q * total) for name, q in _QUANTILES.items()},
    }


def _place(number: int) -> dict[str, int]:
    chunk_index, file_index = divmod(number, lerobot.CHUNKS_SIZE)
    return {"chunk_index": chunk_index, "file_index": file_index}
