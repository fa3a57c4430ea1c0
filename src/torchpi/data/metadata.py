"""Metadata of LeRobot datasets: features, tasks, and the files of each episode. Formats v3.0, v2.1 and v2.0."""

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpi.data import format as lerobot
from torchpi.data.files import DatasetFolder, is_hidden, open_parquet, read_json_lines, read_table, unreadable
from torchpi.data.rename import renamed_features, resolve_rename
from torchpi.errors import DatasetError, MissingFileError, is_whole, listed
from torchpi.schema import parse, read_json

_HUB = "hf://"
_MAX_FPS, _MAX_NUMBER = 100_000, 10**9


@dataclasses.dataclass(frozen=True)
class Info:
    """Contents of meta/info.json. The writer writes every field, in format v3.0."""

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
        """True if files hold several episodes, as in v3.0; v2.1 and v2.0 have one file per episode."""
        return self.codebase_version == "v3.0"

    @property
    def tasks_file(self) -> str:
        return lerobot.TASKS_PARQUET if self.is_v3 else lerobot.TASKS_JSONL

    @property
    def cameras(self) -> tuple[str, ...]:
        """Features that are images or videos, in the dataset's order."""
        return tuple(key for key, feature in self.features.items() if feature.get("dtype") in ("image", "video"))

    @property
    def videos(self) -> tuple[str, ...]:
        """Cameras stored as videos."""
        return tuple(key for key in self.cameras if self.features[key]["dtype"] == "video")


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Position of an episode in a video file."""

    path: Path
    from_timestamp: float
    """Time of the episode's first frame in the video file, in seconds."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode and its files."""

    index: int
    length: int
    tasks: tuple[str, ...]
    """Instructions; usually one."""
    data_file: Path
    videos: Mapping[str, VideoSpan]
    """By camera; without videos that are not encoded yet."""

    def video(self, key: str) -> VideoSpan:
        """The video of a camera; an error if it was not encoded."""
        if key not in self.videos:
            raise DatasetError(
                f"Episode {self.index} of {self.data_file} has no video of {key}: the list of episodes names none, "
                f"because it was not encoded before the recording ended. Encode it with LeRobot, or "
                f"{lerobot.LEAVE_OUT}."
            )
        return self.videos[key]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A dataset without its frames."""

    root: Path
    info: Info
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]
    """In the order of their indices."""
    sources: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Names in the files of renamed features; several, in order, for a joined column."""

    def with_names(self, rename: Mapping[str, str]) -> "Metadata":
        """The same dataset with some features renamed and some columns joined; see `LeRobotDataset`."""
        sources = resolve_rename(rename, self.info.features, self.root)
        info = dataclasses.replace(self.info, features=renamed_features(self.info.features, sources, self.root))
        new_names = {olds[0]: new for new, olds in sources.items()}  # a camera is never joined
        episodes = []
        for episode in self.episodes:
            videos = {new_names.get(name, name): span for name, span in episode.videos.items()}
            episodes.append(dataclasses.replace(episode, videos=videos))
        return dataclasses.replace(self, info=info, episodes=tuple(episodes), sources=sources)


def open_metadata(path: str | Path, *, rename: Mapping[str, str] | None = None) -> Metadata:
    """Read the metadata of a dataset. For an address, the folder `meta` is downloaded first. See `LeRobotDataset`."""
    root = Path(path).expanduser()
    if str(path).startswith(_HUB):
        root = _download(str(path), ["meta/"])
    elif not root.is_dir():
        raise _no_folder(path, root)
    folder = DatasetFolder(root)
    info = _read_info(folder)
    tasks = _tasks(folder, info)
    episodes = [_episode(row, info, folder, tasks) for row in episode_rows(root, info)]
    _check_episodes(episodes, info, root)
    episodes.sort(key=lambda episode: episode.index)
    return Metadata(root, info, tasks, tuple(episodes)).with_names(rename or {})


def _no_folder(path: str | Path, root: Path) -> DatasetError | MissingFileError:
    from torchpi.checkpoints.address import hub_hint  # imports torch

    hint = hub_hint(str(path))
    if str(path).startswith(("hf:/", "gs:/", "s3:/", "http:/", "https:/")):  # a Path collapses two slashes into one
        return DatasetError(f"A dataset is a folder or a string hf://org/name[@revision]; found {path!r}.{hint}")
    if root.exists():
        return DatasetError(f"{root} is a file, not a dataset's folder.")
    if root.is_symlink():
        return DatasetError(f"{root} is a broken link, not a dataset's folder.")
    return MissingFileError(f"There is no folder {root}; expected a LeRobot dataset.{hint}")


def download_frames(path: str | Path, root: Path, episodes: Iterable[Episode], cameras: Collection[str]) -> None:
    """Download the files of some episodes and cameras if the dataset's path is an address on the Hub."""
    if str(path).startswith(_HUB):
        files = {episode.data_file for episode in episodes}
        files |= {span.path for episode in episodes for key, span in episode.videos.items() if key in cameras}
        _download(str(path), [file.relative_to(root).as_posix() for file in sorted(files)])


def drop_empty(episodes: Sequence[Episode], root: Path) -> tuple[Episode, ...]:
    """Drop episodes without frames, left by recordings that were stopped at once, with a warning."""
    if empty := ", ".join(str(episode.index) for episode in episodes if not episode.length):
        if not any(episode.length for episode in episodes):
            raise DatasetError(f"{root}: the episodes {empty} have no frames; choose others.")
        warnings.warn(f"{root}: the episodes {empty} have no frames, and are left out.", UserWarning, stacklevel=4)
    return tuple(episode for episode in episodes if episode.length)


def _download(address: str, names: list[str]) -> Path:
    from torchpi.checkpoints.hub import fetch_dataset  # imports huggingface_hub

    return fetch_dataset(address, names)


def _read_info(folder: DatasetFolder) -> Info:
    root, path = folder.root, folder.file(lerobot.INFO)
    if not path.is_file() and (root / lerobot.RECORDING_FOLDER).is_dir():
        raise DatasetError(
            f"The recording of {root} is still in progress, or was killed. If it was killed, "
            f"torchpi.data.LeRobotWriter.recover({str(root)!r}) builds a dataset from the episodes that it had saved."
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise MissingFileError(f"{root} is not a LeRobot dataset: it has no {lerobot.INFO}; found {found}.")
    try:
        document = read_json(path, error=DatasetError)
    except DatasetError as error:
        raise unreadable(path, error) from error
    version = document.get("codebase_version") if isinstance(document, dict) else None
    if f"v{version}" in lerobot.VERSIONS:
        version = document["codebase_version"] = f"v{version}"
    if version not in lerobot.VERSIONS:
        raise DatasetError(f"{path}: the format version is {version!r}; {_version_advice(version)}")
    info = parse(Info, document, str(path), error=DatasetError, known_only=False)
    if not 0 < info.fps <= _MAX_FPS:
        raise DatasetError(f"{path}: fps is {info.fps}; expected a number of frames per second up to {_MAX_FPS}.")
    if info.chunks_size < 1:
        raise DatasetError(f"{path}: chunks_size is {info.chunks_size}; expected the number of files per folder.")
    _check_template(info.data_path, info, f"{path}: data_path")
    _check_template(info.video_path or "", info, f"{path}: video_path")
    for key, feature in info.features.items():
        if not isinstance(feature, dict):
            raise DatasetError(f"{path}: the feature {key} is {feature!r}; expected an object. The file is damaged.")
        if feature.get("dtype") == "video" and info.video_path is None:
            raise DatasetError(
                f"{path}: {key} is a video, but video_path is None; expected a path template. The file is damaged."
            )
    return info


def _version_advice(version: Any) -> str:
    supported = f"the supported versions are {', '.join(lerobot.VERSIONS)}."
    numbers = tuple(map(int, re.findall(r"\d+", str(version))))
    if numbers > (3, 0):
        return (
            f"{supported} It is newer than this torchpi: install a newer torchpi, or use a revision in an older format "
            "(hf://org/name@v3.0) if the dataset has one."
        )
    if numbers:
        return f"{supported} LeRobot's own scripts convert older datasets."
    return f"{supported} LeRobot's own scripts convert older datasets, and write the version."


def _check_template(template: str, info: Info, where: str) -> None:
    """Refuse a path template with fields other than LeRobot's, or with widths of three digits or more."""
    fields = ("chunk_index", "file_index") if info.is_v3 else ("episode_chunk", "episode_index")
    if not re.fullmatch(rf"([^{{}}]|{{({'|'.join(fields)})(:0?\d{{0,2}}d?)?}}|{{video_key}})*", template):
        raise DatasetError(
            f"{where} is {template!a:.200}; expected the fields {', '.join(fields)} with widths below 100, and "
            "video_key. The file is damaged."
        )


def _tasks(folder: DatasetFolder, info: Info) -> dict[int, str]:
    """Instructions by task_index; empty if the dataset has no file of tasks."""
    path = folder.file(info.tasks_file)
    if not path.is_file() and not path.is_symlink():
        return {}
    if info.is_v3:
        with open_parquet(path) as file:
            columns = read_table(file, path).to_pydict()
    else:
        rows = read_json_lines(path)
        columns = {name: [row.get(name) for row in rows] for name in ("task_index", "task")}
    # The instruction is the pandas index, which has no name in older files.
    texts = columns.get("task", columns.get("__index_level_0__"))
    if texts is None or not all(map(is_whole, columns.get("task_index", [None]))):
        found = ", ".join(columns)
        raise DatasetError(f"{path} has the columns {found}; expected task, texts, and task_index, whole numbers.")
    return dict(sorted(zip(columns["task_index"], texts, strict=True)))


def episode_rows(root: Path, info: Info, *, stats: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of the list of episodes; with `stats`, including v3.0's columns of statistics."""
    path, folder = root / lerobot.EPISODES_JSONL, root / lerobot.EPISODES_FOLDER
    files = sorted(file for file in folder.glob("*/*.parquet") if not is_hidden(file.relative_to(folder)))
    dataset_folder = DatasetFolder(root)
    for file in (*files, path):
        dataset_folder.check(file)
    if not (files if info.is_v3 else path.is_file()):
        raise _no_episode_list(folder if info.is_v3 else path, info, other_format=path.is_file() or bool(files))
    if not info.is_v3:
        yield from read_json_lines(path)
        return
    for path in files:
        with open_parquet(path) as file:
            names = [name for name in file.schema_arrow.names if stats or not name.startswith("stats/")]
            rows = read_table(file, path, names).to_pylist()
        yield from rows


def _no_episode_list(path: Path, info: Info, *, other_format: bool) -> Exception:
    missing = f"{path}, the list of episodes, is missing"
    if other_format:
        cause = f"but there is one of another format than {info.codebase_version}, the version in {lerobot.INFO}: two "
        cause += "versions are mixed"
    elif info.total_episodes == 0:  # LeRobot hasn't written the other files of meta either
        return DatasetError(f"The dataset has no episodes: {missing}, and {lerobot.INFO} says so; record some first.")
    else:
        cause = f"and {lerobot.INFO} states {info.total_episodes or 'no number of'} episodes: the recording ended "
        cause += "before LeRobot wrote the list (in dataset.finalize()), or not everything was copied"
    return MissingFileError(f"{missing}, {cause}. Get the whole dataset again.")


def _episode(row: Mapping[str, Any], info: Info, folder: DatasetFolder, tasks: Mapping[int, str]) -> Episode:
    root = folder.root
    index = _whole_number(row, "episode_index", root)

    def file(template: str | None, part: str, **names: str) -> Path:
        if info.is_v3:
            fields = {name: _whole_number(row, f"{part}/{name}", root) for name in ("chunk_index", "file_index")}
        else:
            fields = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        return folder.file(str(template).format(**fields, **names))

    videos: dict[str, VideoSpan] = {}
    for key in info.videos:
        part = f"videos/{key}"
        from_timestamp = 0.0
        if info.is_v3:
            values = [row.get(f"{part}/{name}") for name in ("from_timestamp", "chunk_index", "file_index")]
            if any(value is None or value != value for value in values):  # pandas writes NaN for None
                continue
            from_timestamp = row[f"{part}/from_timestamp"]
        videos[key] = VideoSpan(file(info.video_path, part, video_key=key), from_timestamp)
    data_file = file(info.data_path, "data")
    episode_tasks = row.get("tasks")  # LeRobot writes a list of texts; others a single text, or task indices
    if isinstance(episode_tasks, str | int):
        episode_tasks = [episode_tasks]
    texts = tuple(str(tasks.get(task, task)) for task in episode_tasks or [])
    return Episode(index, _whole_number(row, "length", root), texts, data_file, videos)


def _whole_number(row: Mapping[str, Any], column: str, root: Path) -> int:
    """A whole number in an episode's row; pandas stores it as a float if other rows have none."""
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or not 0 <= value <= _MAX_NUMBER:
        raise DatasetError(
            f"The list of episodes of {root} has {value!s:.80} as the {column} of episode "
            f"{row.get('episode_index')!s:.80}; expected a whole number up to {_MAX_NUMBER}. The dataset is damaged."
        )
    return value


def _check_episodes(episodes: list[Episode], info: Info, root: Path) -> None:
    if not episodes:
        raise DatasetError(f"The list of episodes of {root} is empty; record some first.")
    if twice := [index for index, count in Counter(episode.index for episode in episodes).items() if count > 1]:
        raise DatasetError(
            f"The list of episodes of {root} has the episodes {', '.join(map(str, twice))} more than once: the "
            "dataset is damaged, or one of its files is a copy that must be removed."
        )
    found = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    stated = {field: getattr(info, field) for field in found}
    if differing := [f"{field} {stated[field]}" for field in found if stated[field] not in (None, found[field])]:
        raise DatasetError(
            f"{root / lerobot.INFO} states {listed(differing)}, but the list of episodes has {len(episodes)} with "
            f"{found['total_frames']} frames: a recording or copy ended early, or the list was edited. Get the dataset "
            "again, or, if the listed episodes are all that you want, correct these numbers."
        )
