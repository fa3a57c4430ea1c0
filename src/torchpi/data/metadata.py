"""What a LeRobot data set says of itself: features, tasks, and where each episode lies. Formats v3.0, v2.1, v2.0."""

import dataclasses
import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torchpi.data import format as lerobot
from torchpi.data.rename import renamed_features, resolve_rename
from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where the frames of an episode are in a video."""

    path: Path
    from_timestamp: float
    """Of its first frame, in seconds of the file."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode and its files."""

    index: int
    length: int
    tasks: tuple[str, ...]
    """Its instructions, usually one."""
    data_file: Path
    videos: Mapping[str, VideoSpan]
    """Per camera that is a video."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A data set without its frames."""

    root: Path
    version: str
    fps: int | float
    features: Mapping[str, Any]
    robot_type: str | None
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]
    """In the order of their indices."""
    sources: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """From names of `features` and videos to those in the files, where they differ: of a column that is joined of
    several all of them, in order."""

    @property
    def tasks_file(self) -> Path:
        """Where the instructions are."""
        return self.root / (lerobot.TASKS_PARQUET if self.version == "v3.0" else lerobot.TASKS_JSONL)

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """The features that are images, in the set's order."""
        return tuple(key for key, feature in self.features.items() if feature.get("dtype") in ("image", "video"))

    @property
    def video_keys(self) -> tuple[str, ...]:
        """The cameras whose frames are in videos."""
        return tuple(key for key in self.camera_keys if self.features[key]["dtype"] == "video")

    def names_in_files(self, key: str) -> tuple[str, ...]:
        """What the files call a camera or column; of one that is joined, its parts in order."""
        return self.sources.get(key, (key,))

    def with_names(self, rename: Mapping[str, str]) -> "Metadata":
        """The same data set with other names for some of its features, and with some columns joined.

        Args:
            rename: from the data set's names to the new ones, see `LeRobotDataset`.
        """
        sources = resolve_rename(rename, self.features, self.root)
        features = renamed_features(self.features, sources, self.root)
        new_names = {olds[0]: new for new, olds in sources.items()}  # a camera is never joined

        def change(videos: Mapping[str, VideoSpan]) -> dict[str, VideoSpan]:
            return {new_names.get(name, name): span for name, span in videos.items()}

        episodes = tuple(dataclasses.replace(episode, videos=change(episode.videos)) for episode in self.episodes)
        return dataclasses.replace(self, features=features, episodes=episodes, sources=sources)


def read_metadata(root: Path) -> Metadata:
    """Read the folder `meta`."""
    info = _read_info(root)
    where = root / lerobot.INFO
    version = info.get("codebase_version")
    if version not in lerobot.VERSIONS:
        raise DatasetError(
            f"{where}: the format's version is {version!r}; {', '.join(lerobot.VERSIONS)} are read. "
            "LeRobot's own scripts convert older sets."
        )
    for field, kind in (("fps", (int, float)), ("features", dict), ("data_path", str)):
        if not isinstance(info.get(field), kind):
            raise DatasetError(f"{where} has no valid {field!r}, found {info.get(field)!r}; the file is damaged.")
    _check_features(info, where)
    if info.get("total_episodes") == 0:  # then LeRobot has not written the other files of meta either
        raise DatasetError(f"The data set {root} has no episodes; record some first.")
    read_episodes, read_tasks = (_episodes_v3, _tasks_v3) if version == "v3.0" else (_episodes_v2, _tasks_v2)
    metadata = Metadata(
        root=root,
        version=version,
        fps=info["fps"],
        features=info["features"],
        robot_type=info.get("robot_type"),
        tasks=read_tasks(root),
        episodes=(),
    )
    if metadata.fps <= 0:
        raise DatasetError(f"{where}: fps is {metadata.fps}; expected frames per second.")
    try:
        episodes = read_episodes(metadata, info)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DatasetError(f"The episodes of {root} lack what {version} has: {error!r}; the set is damaged.") from error
    _check_episodes(episodes, info, where)
    return dataclasses.replace(metadata, episodes=tuple(sorted(episodes, key=lambda episode: episode.index)))


def read_parquet(path: Path, read: Callable[[Any], _T]) -> _T:
    """What `read` takes from the open file."""
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; the data set is incomplete. Get it again.")
    try:
        with pq.ParquetFile(path) as file:
            return read(file)
    except (pa.ArrowException, OSError) as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise DatasetError(f"{path} is truncated or damaged: {cause}. Get the file again.") from error


def _read_info(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise MissingFileError(f"There is no folder {root}; expected a LeRobot data set.")
    path = root / lerobot.INFO
    if not path.is_file() and (root / lerobot.RECORDING_FOLDER).is_dir():
        raise DatasetError(
            f"The recording of {root} is still going on, or was killed. If it was killed, "
            f"torchpi.data.LeRobotWriter.recover({str(root)!r}) makes a data set of the episodes that it had saved."
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise MissingFileError(f"{root} is no LeRobot data set: it has no {lerobot.INFO}; found {found}.")
    info = _json(path.read_bytes(), path)
    if not isinstance(info, dict):
        raise DatasetError(f"{path} holds a {type(info).__name__}; expected an object.")
    return info


def _check_features(info: Mapping[str, Any], where: Path) -> None:
    for key, feature in info["features"].items():
        if not isinstance(feature, dict):
            raise DatasetError(f"{where}: the feature {key} is {feature!r}; expected an object. The file is damaged.")
        if feature.get("dtype") == "video" and not isinstance(info.get("video_path"), str):
            raise DatasetError(
                f"{where}: {key} is a video, but video_path, where videos are, is {info.get('video_path')!r}; expected "
                "a text. The file is damaged."
            )


def _check_episodes(episodes: Sequence[Episode], info: Mapping[str, Any], where: Path) -> None:
    if twice := [index for index, count in Counter(episode.index for episode in episodes).items() if count > 1]:
        raise DatasetError(
            f"The list of episodes of {where.parents[1]} has the episodes {', '.join(map(str, twice))} more than once; "
            "the data set is damaged."
        )
    found = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    if differing := [f"{field} {info[field]}" for field in found if info.get(field, found[field]) != found[field]]:
        raise DatasetError(
            f"{where} says {' and '.join(differing)}, but the list of episodes has {len(episodes)} with "
            f"{found['total_frames']} frames; the data set is incomplete or damaged."
        )


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / lerobot.TASKS_PARQUET
    columns = read_parquet(path, lambda file: file.read().to_pydict())
    # The text is a pandas index, which older files did not name.
    text = next((name for name in ("task", "__index_level_0__") if name in columns), None)
    if text is None or "task_index" not in columns:
        raise DatasetError(f"{path} has the columns {', '.join(columns)}; expected task and task_index.")
    return dict(sorted(zip(columns["task_index"], columns[text], strict=True)))


def _tasks_v2(root: Path) -> dict[int, str]:
    rows = _json_lines(root / lerobot.TASKS_JSONL)
    return dict(sorted((row["task_index"], row["task"]) for row in rows))


def _episodes_v3(metadata: Metadata, info: Mapping[str, Any]) -> list[Episode]:
    root = metadata.root
    files = sorted((root / lerobot.EPISODES_FOLDER).glob("*/*.parquet"))
    if not files:
        raise MissingFileError(f"There is no file in {root / lerobot.EPISODES_FOLDER}; the data set is incomplete.")

    def read(file: Any) -> list[dict[str, Any]]:
        names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        return list(file.read(columns=names).to_pylist())

    def place(row: Mapping[str, Any], of: str) -> dict[str, int]:
        return {name: row[f"{of}/{name}"] for name in ("chunk_index", "file_index")}

    return [
        Episode(
            index=operator.index(row["episode_index"]),
            length=operator.index(row["length"]),
            tasks=tuple(row["tasks"]),
            data_file=root / info["data_path"].format(**place(row, "data")),
            videos={
                key: VideoSpan(
                    path=root / info["video_path"].format(video_key=key, **place(row, f"videos/{key}")),
                    from_timestamp=row[f"videos/{key}/from_timestamp"],
                )
                for key in metadata.video_keys
            },
        )
        for path in files
        for row in read_parquet(path, read)
    ]


def _episodes_v2(metadata: Metadata, info: Mapping[str, Any]) -> list[Episode]:
    root = metadata.root
    episodes = []
    for row in _json_lines(root / lerobot.EPISODES_JSONL):
        index = operator.index(row["episode_index"])
        place = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", lerobot.CHUNKS_SIZE)}
        videos = {
            key: VideoSpan(root / info["video_path"].format(video_key=key, **place), from_timestamp=0.0)
            for key in metadata.video_keys
        }
        data_file = root / info["data_path"].format(**place)
        episodes.append(Episode(index, operator.index(row["length"]), tuple(row["tasks"]), data_file, videos))
    return episodes


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; the data set is incomplete.")
    return [_json(line, path) for line in path.read_bytes().splitlines() if line.strip()]


def _json(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path} is not valid JSON: {error}; the file is damaged.") from error
