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
    def tasks_file(self) -> str:
        return lerobot.TASKS_PARQUET if self.is_v3 else lerobot.TASKS_JSONL

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
    """Per camera that is a video; without those that are not encoded yet."""

    def video(self, key: str) -> VideoSpan:
        """A camera's video, which must be there."""
        if key not in self.videos:
            raise DatasetError(
                f"Episode {self.index} of {self.data_file} has no video of {key}: the list of episodes names none, as "
                f"it was not encoded before the recording ended. Encode it with LeRobot, or {lerobot.LEAVE_OUT}."
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
    """From names of features to those in the files, where they differ: of a joined column all of them, in order."""

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
    text, root = str(path), Path(path).expanduser()
    if text.startswith(_HUB):
        root = _download(text, ["meta/"])
    elif not root.is_dir():
        from torchpi.checkpoints.address import hub_hint  # brings torch

        if text.startswith(("hf:/", "gs:/", "s3:/", "http:/", "https:/")):  # a Path makes one slash of two
            raise DatasetError(
                f"A dataset is a folder or hf://org/name[@revision], as a text; found {path!r}.{hub_hint(text)}"
            )
        if root.exists() or root.is_symlink():
            raise DatasetError(
                f"{root} is {'a file' if root.exists() else 'a link to nothing'}, not a dataset's folder."
            )
        raise MissingFileError(f"There is no folder {root}; expected a LeRobot dataset.{hub_hint(text)}")
    folder = DatasetFolder(root)
    info = _read_info(folder)
    tasks = _tasks(folder, info)
    episodes = [_episode(row, info, folder, tasks) for row in episode_rows(root, info)]
    _check_episodes(episodes, info, root)
    episodes.sort(key=lambda episode: episode.index)
    return Metadata(root, info, tasks, tuple(episodes)).with_names(rename or {})


def download_frames(path: str | Path, root: Path, episodes: Iterable[Episode], cameras: Collection[str]) -> None:
    """Download the files of some episodes and cameras, if the dataset's path is an address."""
    if str(path).startswith(_HUB):
        files = {episode.data_file for episode in episodes}
        files |= {span.path for episode in episodes for key, span in episode.videos.items() if key in cameras}
        _download(str(path), [file.relative_to(root).as_posix() for file in sorted(files)])


def with_frames(episodes: Sequence[Episode], root: Path) -> tuple[Episode, ...]:
    """Those of the episodes that have frames; warns about the others, of recordings that were stopped at once."""
    if empty := ", ".join(str(episode.index) for episode in episodes if not episode.length):
        if not any(episode.length for episode in episodes):
            raise DatasetError(f"{root}: the episodes {empty} have no frames; choose others.")
        warnings.warn(f"{root}: the episodes {empty} have no frames, and are left out.", UserWarning, stacklevel=4)
    return tuple(episode for episode in episodes if episode.length)


def _download(address: str, names: list[str]) -> Path:
    from torchpi.checkpoints.hub import fetch_dataset  # brings huggingface_hub

    return fetch_dataset(address, names)


def _read_info(folder: DatasetFolder) -> Info:
    root, path = folder.root, folder.file(lerobot.INFO)
    if not path.is_file() and (root / lerobot.RECORDING_FOLDER).is_dir():
        raise DatasetError(
            f"The recording of {root} is still in progress, or was killed. If it was killed, "
            f"torchpi.data.LeRobotWriter.recover({str(root)!r}) makes a dataset of the episodes that it had saved."
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise MissingFileError(f"{root} is no LeRobot dataset: it has no {lerobot.INFO}; found {found}.")
    try:
        document = read_json(path, error=DatasetError)
    except DatasetError as error:
        raise unreadable(path, error) from error
    version = document.get("codebase_version") if isinstance(document, dict) else None
    if f"v{version}" in lerobot.VERSIONS:
        version = document["codebase_version"] = f"v{version}"
    if version not in lerobot.VERSIONS:
        raise DatasetError(f"{path}: the format's version is {version!r}; {_advice_about(version)}")
    info = parse(Info, document, str(path), error=DatasetError, known_only=False)
    if not 0 < info.fps <= _MAX_FPS:
        raise DatasetError(f"{path}: fps is {info.fps}; expected frames per second, at most {_MAX_FPS}.")
    if info.chunks_size < 1:
        raise DatasetError(f"{path}: chunks_size is {info.chunks_size}; expected the number of files in a folder.")
    _check_template(info.data_path, info, f"{path}: data_path")
    _check_template(info.video_path or "", info, f"{path}: video_path")
    for key, feature in info.features.items():
        if not isinstance(feature, dict):
            raise DatasetError(f"{path}: the feature {key} is {feature!r}; expected an object. The file is damaged.")
        if feature.get("dtype") == "video" and info.video_path is None:
            raise DatasetError(
                f"{path}: {key} is a video, but video_path, the place of videos, is None; expected a text. The file is "
                "damaged."
            )
    return info


def _advice_about(version: Any) -> str:
    """The rest of the error about a format's version that is not read."""
    read = f"{', '.join(lerobot.VERSIONS)} are read."
    numbers = tuple(map(int, re.findall(r"\d+", str(version))))
    if numbers > (3, 0):
        return (
            f"{read} It is newer than this torchpi: install a newer one, or take a revision in an older format "
            "(hf://org/name@v3.0), as far as the dataset has one."
        )
    return f"{read} LeRobot's own scripts convert older datasets" + ("." if numbers else ", and write the version.")


def _check_template(template: str, info: Info, where: str) -> None:
    """Refuse a template of paths with other fields than LeRobot's, or with widths that no path has."""
    known = ("chunk_index", "file_index") if info.is_v3 else ("episode_chunk", "episode_index")
    if not re.fullmatch(rf"([^{{}}]|{{({'|'.join(known)})(:0?\d{{0,2}}d?)?}}|{{video_key}})*", template):
        raise DatasetError(
            f"{where} is {template!a:.200}; expected the fields {', '.join(known)} with widths below 100, and "
            "video_key. The file is damaged."
        )


def _tasks(folder: DatasetFolder, info: Info) -> dict[int, str]:
    """The instructions by their task_index; none where the dataset has no file of them."""
    path = folder.file(info.tasks_file)
    if not path.is_file() and not path.is_symlink():
        return {}
    if info.is_v3:
        with open_parquet(path) as file:
            columns = read_table(file, path).to_pydict()
    else:
        rows = read_json_lines(path)
        columns = {name: [row.get(name) for row in rows] for name in ("task_index", "task")}
    # The text is a pandas index, which older files did not name.
    text = next((name for name in ("task", "__index_level_0__") if name in columns), None)
    if text is None or not all(map(is_whole, columns.get("task_index", [None]))):
        found = ", ".join(columns)
        raise DatasetError(f"{path} has the columns {found}; expected task_index, whole numbers, and task.")
    return dict(sorted(zip(columns["task_index"], columns[text], strict=True)))


def episode_rows(root: Path, info: Info, *, stats: bool = False) -> Iterator[dict[str, Any]]:
    """The list of episodes; `stats`: with the columns of statistics of v3.0."""
    path, folder = root / lerobot.EPISODES_JSONL, root / lerobot.EPISODES_FOLDER
    files = sorted(file for file in folder.glob("*/*.parquet") if not is_hidden(file.relative_to(folder)))
    inside = DatasetFolder(root)
    for file in (*files, path):
        inside.check(file)
    if not (files if info.is_v3 else path.is_file()):
        raise _no_list(folder if info.is_v3 else path, info, other_format=path.is_file() or bool(files))
    if not info.is_v3:
        yield from read_json_lines(path)
        return
    for path in files:
        with open_parquet(path) as file:
            names = [name for name in file.schema_arrow.names if stats or not name.startswith("stats/")]
            rows = read_table(file, path, names).to_pylist()
        yield from rows


def _no_list(path: Path, info: Info, *, other_format: bool) -> Exception:
    """The error about a dataset without its list of episodes."""
    missing = f"{path}, the list of episodes, is missing"
    if info.total_episodes == 0 and not other_format:  # then LeRobot has not written the other files of meta either
        return DatasetError(f"The dataset has no episodes: {missing}, and {lerobot.INFO} says so; record some first.")
    cause = f"and {lerobot.INFO} says {info.total_episodes or 'no number of'} episodes: the recording ended before "
    cause += "LeRobot wrote it (in dataset.finalize()), or not everything was copied"
    if other_format:
        cause = f"but there is one of another format than {info.codebase_version}, which {lerobot.INFO} states: "
        cause += "two versions are mixed"
    return MissingFileError(f"{missing}, {cause}. Get the whole dataset again.")


def _episode(row: Mapping[str, Any], info: Info, folder: DatasetFolder, tasks: Mapping[int, str]) -> Episode:
    root = folder.root
    index = _whole_number(row, "episode_index", root)

    def file(template: str | None, part: str, **names: str) -> Path:
        place = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        if info.is_v3:
            place = {name: _whole_number(row, f"{part}/{name}", root) for name in ("chunk_index", "file_index")}
        return folder.file(str(template).format(**place, **names))

    def span(key: str) -> VideoSpan | None:
        place: list[Any] = [0.0]
        if info.is_v3:
            place = [row.get(f"videos/{key}/{name}") for name in ("from_timestamp", "chunk_index", "file_index")]
        if any(value is None or value != value for value in place):  # NaN is pandas' None
            return None
        return VideoSpan(file(info.video_path, f"videos/{key}", video_key=key), place[0])

    texts = row.get("tasks")  # LeRobot lists texts; others write a text alone, or task indices
    texts = [texts] if isinstance(texts, str | int) else texts or []
    return Episode(
        index=index,
        length=_whole_number(row, "length", root),
        tasks=tuple(str(tasks.get(text, text)) for text in texts),
        data_file=file(info.data_path, "data"),
        videos={key: found for key in info.videos if (found := span(key)) is not None},
    )


def _whole_number(row: Mapping[str, Any], column: str, root: Path) -> int:
    """A number of an episode, also where pandas made a float of it because others are missing."""
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
            "dataset is damaged, or one of its files is a copy, which is to be removed."
        )
    found = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    stated = {field: getattr(info, field) for field in found}
    if differing := [f"{field} {stated[field]}" for field in found if stated[field] not in (None, found[field])]:
        raise DatasetError(
            f"{root / lerobot.INFO} says {listed(differing)}, but the list of episodes has {len(episodes)} with "
            f"{found['total_frames']} frames: a recording or copy ended early, or it was edited. Get the set again, "
            "or if what is listed is all that you want, correct these numbers."
        )
