"""Metadata of LeRobot datasets: features, tasks, and the files of each episode. Formats v3.0, v2.1 and v2.0."""

import contextlib
import dataclasses
import json
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchpi.data import format as lerobot
from torchpi.data.rename import renamed_features, resolve_rename
from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require
from torchpi.schema import parse, read_json

_HUB = "hf://"


@dataclasses.dataclass(frozen=True)
class Info:
    """The document meta/info.json. The writer writes every field, in format v3.0."""

    codebase_version: str
    fps: int | float
    features: dict[str, Any]
    data_path: str
    video_path: str | None = None
    robot_type: str | None = None
    total_episodes: int | None = None
    total_frames: int | None = None
    total_tasks: int | None = None
    chunks_size: int = lerobot.CHUNKS_SIZE
    data_files_size_in_mb: int | float | None = None
    video_files_size_in_mb: int | float | None = None
    splits: Any = None

    @property
    def is_v3(self) -> bool:
        """True for several episodes per file, as in v3.0; v2.1 and v2.0 have one."""
        return self.codebase_version == "v3.0"

    @property
    def cameras(self) -> tuple[str, ...]:
        """The features that are images or videos, in the dataset's order."""
        return tuple(key for key, feature in self.features.items() if feature.get("dtype") in ("image", "video"))

    @property
    def videos(self) -> tuple[str, ...]:
        """The cameras whose frames are in videos."""
        return tuple(key for key in self.cameras if self.features[key]["dtype"] == "video")


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """An episode's place in a video file."""

    path: Path
    from_timestamp: float
    """Timestamp of the episode's first frame in the video file, in seconds."""


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
    """A dataset without its frames."""

    root: Path
    info: Info
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]
    """In the order of their indices."""
    sources: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """From names of features to those in the files, where they differ: of a joined column all of them, in order."""

    @property
    def tasks_file(self) -> Path:
        """The file of the instructions."""
        return self.root / (lerobot.TASKS_PARQUET if self.info.is_v3 else lerobot.TASKS_JSONL)

    def with_names(self, rename: Mapping[str, str]) -> "Metadata":
        """The same dataset with other names for some features, and with some columns joined; see `LeRobotDataset`."""
        sources = resolve_rename(rename, self.info.features, self.root)
        info = dataclasses.replace(self.info, features=renamed_features(self.info.features, sources, self.root))
        new_names = {olds[0]: new for new, olds in sources.items()}  # a camera is never joined
        episodes = tuple(
            dataclasses.replace(
                episode, videos={new_names.get(name, name): span for name, span in episode.videos.items()}
            )
            for episode in self.episodes
        )
        return dataclasses.replace(self, info=info, episodes=episodes, sources=sources)


def open_metadata(path: str | Path, *, rename: Mapping[str, str] | None = None) -> Metadata:
    """Read the metadata of a dataset; of an address, the folder `meta` is downloaded first. See `LeRobotDataset`."""
    text = str(path)
    if text.startswith(_HUB):
        return _read_metadata(_download(text, ["meta/"])).with_names(rename or {})
    if text.startswith(("hf:/", "gs:/", "s3:/", "http:/", "https:/")):  # a Path makes one slash of two
        raise DatasetError(f"A dataset is a folder or hf://org/name[@revision], as a text; found {path!r}.")
    return _read_metadata(Path(path).expanduser()).with_names(rename or {})


def download_frames(path: str | Path, root: Path, episodes: Iterable[Episode], cameras: Collection[str]) -> None:
    """Download the files of some episodes and cameras, if the dataset's path is an address."""
    if str(path).startswith(_HUB):
        files = {episode.data_file for episode in episodes}
        files |= {span.path for episode in episodes for key, span in episode.videos.items() if key in cameras}
        _download(str(path), [file.relative_to(root).as_posix() for file in sorted(files)])


def _download(address: str, names: list[str]) -> Path:
    from torchpi.checkpoints.hub import fetch_dataset  # brings huggingface_hub

    return fetch_dataset(address, names)


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; an error of reading it names it."""
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; the dataset is incomplete. Get it again.")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise DatasetError(f"{path} is truncated or damaged: {cause}. Get the file again.") from error


def _read_metadata(root: Path) -> Metadata:
    info = _read_info(root)
    if info.total_episodes == 0:  # then LeRobot has not written the other files of meta either
        raise DatasetError(f"The dataset {root} has no episodes; record some first.")
    try:
        tasks = dict(sorted(_tasks(root, info).items()))
        episodes = [_episode(row, info, root) for row in _episode_rows(root, info)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"The episodes or tasks of {root} lack what {info.codebase_version} has: {error!r}; the dataset is damaged."
        ) from error
    _check_episodes(episodes, info, root)
    return Metadata(root, info, tasks, tuple(sorted(episodes, key=lambda episode: episode.index)))


def _read_info(root: Path) -> Info:
    if not root.is_dir():
        raise MissingFileError(f"There is no folder {root}; expected a LeRobot dataset.")
    path = root / lerobot.INFO
    if not path.is_file() and (root / lerobot.RECORDING_FOLDER).is_dir():
        raise DatasetError(
            f"The recording of {root} is still in progress, or was killed. If it was killed, "
            f"torchpi.data.LeRobotWriter.recover({str(root)!r}) makes a dataset of the episodes that it had saved."
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise MissingFileError(f"{root} is no LeRobot dataset: it has no {lerobot.INFO}; found {found}.")
    document = read_json(path, error=DatasetError)
    version = document.get("codebase_version") if isinstance(document, dict) else None
    if version not in lerobot.VERSIONS:
        raise DatasetError(
            f"{path}: the format's version is {version!r}; {', '.join(lerobot.VERSIONS)} are read. "
            "LeRobot's own scripts convert older datasets."
        )
    info = parse(Info, document, str(path), error=DatasetError, known_only=False)
    if info.fps <= 0:
        raise DatasetError(f"{path}: fps is {info.fps}; expected frames per second.")
    for key, feature in info.features.items():
        if not isinstance(feature, dict):
            raise DatasetError(f"{path}: the feature {key} is {feature!r}; expected an object. The file is damaged.")
        if feature.get("dtype") == "video" and info.video_path is None:
            raise DatasetError(
                f"{path}: {key} is a video, but video_path, the place of videos, is None; expected a text. The file is "
                "damaged."
            )
    return info


def _tasks(root: Path, info: Info) -> dict[int, str]:
    if not info.is_v3:
        return {row["task_index"]: row["task"] for row in _json_lines(root / lerobot.TASKS_JSONL)}
    path = root / lerobot.TASKS_PARQUET
    with open_parquet(path) as file:
        columns = file.read().to_pydict()
    # The text is a pandas index, which older files did not name.
    text = next((name for name in ("task", "__index_level_0__") if name in columns), None)
    if text is None or "task_index" not in columns:
        raise DatasetError(f"{path} has the columns {', '.join(columns)}; expected task and task_index.")
    return dict(zip(columns["task_index"], columns[text], strict=True))


def _episode_rows(root: Path, info: Info) -> Iterator[dict[str, Any]]:
    if not info.is_v3:
        yield from _json_lines(root / lerobot.EPISODES_JSONL)
        return
    files = sorted((root / lerobot.EPISODES_FOLDER).glob("*/*.parquet"))
    if not files:
        raise MissingFileError(f"There is no file in {root / lerobot.EPISODES_FOLDER}; the dataset is incomplete.")
    for path in files:
        with open_parquet(path) as file:
            names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            rows = file.read(columns=names).to_pylist()
        yield from rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; the dataset is incomplete.")
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DatasetError(f"{path} is not valid JSON: {error}; the file is damaged.") from error


def _episode(row: Mapping[str, Any], info: Info, root: Path) -> Episode:
    index = operator.index(row["episode_index"])

    def file(template: str | None, part: str, **names: str) -> Path:
        place = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        if info.is_v3:
            place = {name: row[f"{part}/{name}"] for name in ("chunk_index", "file_index")}
        return root / str(template).format(**place, **names)

    return Episode(
        index=index,
        length=operator.index(row["length"]),
        tasks=tuple(row["tasks"]),
        data_file=file(info.data_path, "data"),
        videos={
            key: VideoSpan(
                file(info.video_path, f"videos/{key}", video_key=key),
                row[f"videos/{key}/from_timestamp"] if info.is_v3 else 0.0,
            )
            for key in info.videos
        },
    )


def _check_episodes(episodes: list[Episode], info: Info, root: Path) -> None:
    if twice := [index for index, count in Counter(episode.index for episode in episodes).items() if count > 1]:
        raise DatasetError(
            f"The list of episodes of {root} has the episodes {', '.join(map(str, twice))} more than once; the dataset "
            "is damaged."
        )
    found = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    stated = {field: getattr(info, field) for field in found}
    if differing := [f"{field} {stated[field]}" for field in found if stated[field] not in (None, found[field])]:
        raise DatasetError(
            f"{root / lerobot.INFO} says {' and '.join(differing)}, but the list of episodes has {len(episodes)} with "
            f"{found['total_frames']} frames; the dataset is incomplete or damaged."
        )
