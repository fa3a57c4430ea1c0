"""A data set that is being written: complete episodes on disk from the moment they are saved, the set when it is done.

While episodes are recorded, they lie in the folder `.recording` inside the target, one complete file each:

    recording.json                       the features, fps and limits
    episode_000003.parquet, .<camera>.mp4    its frames
    episode_000003.json                  length, task; written last: an episode with this file is complete
    groups.json                          which episodes have been joined into files of the data set already

When they have reached the size of a file, they are joined into one data file and one video per camera. `finish` joins
the rest, writes the metadata, `meta/info.json` last, and removes the folder. It reads everything from disk, so that it
does the same after a process was killed, whenever that was. Every file appears under its final name by a rename.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data import metadata_writer
from torchpi.data.columns import to_numpy
from torchpi.data.metadata_writer import RecordingSettings, SavedEpisode
from torchpi.data.video import concatenate_videos
from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Kept free for the metadata of a finished set, so that a disk that has run full can still hold it.
_RESERVE, _RESERVE_PER_EPISODE = 256 * 1024, 16 * 1024


class Recording:
    """The folder `.recording`; one process holds it at a time."""

    def __init__(self, root: Path, settings: RecordingSettings, *, made_root: bool = False) -> None:
        self.root, self.settings = root, settings
        self._made_root = made_root
        self.folder = root / lerobot.RECORDING_FOLDER
        self._lock: int | None = None
        self.episodes: list[SavedEpisode] = []
        self._groups: list[list[int]] = []

    @classmethod
    def create(cls, root: Path, settings: RecordingSettings) -> "Recording":
        """Begin a data set in an empty or new folder."""
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            hint = "choose another path"
            if (root / lerobot.RECORDING_FOLDER).is_dir():
                hint = f"it is a recording that was not finished: LeRobotWriter.recover({str(root)!r}) finishes it"
            raise DatasetError(f"{root} exists already and is not an empty folder; {hint}.")
        recording = cls(root, settings, made_root=not root.exists())
        recording.folder.mkdir(parents=True)
        recording._hold()
        try:
            recording._write_json("recording.json", dataclasses.asdict(settings))
            recording._grow_reserve()
        except BaseException:
            recording.abandon()
            raise
        return recording

    @classmethod
    def reopen(cls, root: Path) -> "Recording":
        """A recording that was not finished."""
        folder = root / lerobot.RECORDING_FOLDER
        if not (folder / "recording.json").is_file():
            raise MissingFileError(f"There is no unfinished recording in {root}.")
        try:
            settings = RecordingSettings(**json.loads((folder / "recording.json").read_bytes()))
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{folder / 'recording.json'} is damaged: {error}") from error
        recording = cls(root, settings)
        recording._hold()
        recording.reload()
        return recording

    @property
    def num_frames(self) -> int:
        """Frames of all saved episodes."""
        return sum(episode.length for episode in self.episodes)

    def task_index(self, task: str) -> int:
        """The number of a task, a new one if it is new."""
        tasks = {episode.task: episode.task_index for episode in self.episodes}
        return tasks.get(task, len(tasks))

    def save(self, write: Callable[[Path, Mapping[str, Path]], None], episode: SavedEpisode) -> None:
        """Add an episode: complete, or not at all.

        Args:
            write: writes the data file, and per camera the video, to the paths that it is given.
            episode: what is known of it; its sizes are filled in here.
        """
        index = len(self.episodes)
        data, videos = self._data_part(index), {key: self._video_part(index, key) for key in self.settings.videos}
        try:
            write(data, videos)
            for path in (data, *videos.values()):
                fsync(path)
            sizes = {"data": data.stat().st_size, **{key: path.stat().st_size for key, path in videos.items()}}
            episode = dataclasses.replace(episode, bytes=sizes)
            if self._pending and self._too_large(sizes):
                self._join(self._pending)
            self._grow_reserve()
            self._write_json(self._json_part(index).name, dataclasses.asdict(episode))
            self.episodes.append(dataclasses.replace(episode, histograms={}))
        except BaseException:
            self.reload()  # an interrupt may come right after the episode was saved
            raise

    def reload(self) -> None:
        """Learn from disk which episodes are complete, and remove what is left of an incomplete one."""
        self.episodes = []
        while self._json_part(len(self.episodes)).is_file():
            self.episodes.append(dataclasses.replace(self._read(len(self.episodes)), histograms={}))
        groups = self.folder / "groups.json"
        self._groups = json.loads(groups.read_bytes()) if groups.is_file() else []
        for path in self.folder.glob("*.part"):
            path.unlink()
        for path in self.folder.glob(f"episode_{len(self.episodes):06d}.*"):
            path.unlink()

    def finish(self) -> None:
        """Make it a data set. May be called again if it failed."""
        if self._lock is None:  # released when it failed
            self._hold()
        try:
            self.reload()
            if not self.episodes:
                self.abandon()
                raise DatasetError(f"No episode was saved; there is no data set at {self.root}.")
            (self.folder / "reserve").unlink(missing_ok=True)
            if self._pending:
                self._join(self._pending)
            self._write_metadata()
            done = self.folder.with_name(f"{self.folder.name}.done")  # in one step: half of it is worse than none
            os.replace(self.folder, done)
        except OSError as error:
            error.add_note(
                f"The {len(self.episodes)} saved episodes are safe in {self.folder}; "
                f"LeRobotWriter.recover({str(self.root)!r}) finishes the data set."
            )
            raise
        finally:
            self._release()
        shutil.rmtree(done)

    def abandon(self) -> None:
        """Remove everything that was written."""
        self._release()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_root:
            with contextlib.suppress(OSError):  # something else is in it by now
                self.root.rmdir()

    # Joining episodes into files

    @property
    def _pending(self) -> list[int]:
        """The episodes that are not in a file of the data set yet."""
        return list(range(self._groups[-1][-1] + 1 if self._groups else 0, len(self.episodes)))

    def _too_large(self, sizes: Mapping[str, int]) -> bool:
        """Whether a file would exceed its limit with this episode in it."""
        for key, size in sizes.items():
            limit = self.settings.data_file_mb if key == "data" else self.settings.video_file_mb
            if size + sum(self.episodes[i].bytes[key] for i in self._pending) > limit * 2**20:
                return True
        return False

    def _join(self, episodes: Sequence[int]) -> None:
        """Give episodes their place in the data set, in as few files as the disk has room for."""
        if not self._data_part(episodes[0]).exists():  # killed while it was moved
            self._place_alone(episodes[0])
            episodes = episodes[1:]
        if len(episodes) > 1:
            try:
                self._place_joined(episodes)
                return
            except OSError as error:
                for path in self.folder.glob("*.part"):
                    path.unlink()
                if error.errno not in _NO_SPACE:
                    raise
        for index in episodes:  # moving a file takes no space
            self._place_alone(index)

    def _place_alone(self, index: int) -> None:
        self._place([index], self._data_part(index), {key: self._video_part(index, key) for key in self._videos})

    @property
    def _videos(self) -> tuple[str, ...]:
        return self.settings.videos

    def _place_joined(self, episodes: Sequence[int]) -> None:
        data = self.folder / "data.parquet.part"
        join_parquet(data, [self._data_part(i) for i in episodes])
        videos = {}
        for key in self._videos:
            videos[key] = self.folder / f"{key}.mp4.part"
            parts = [(self._video_part(i, key), self.episodes[i].length) for i in episodes]
            concatenate_videos(videos[key], parts, fps=self.settings.fps)
        for path in (data, *videos.values()):
            fsync(path)
        self._place(episodes, data, videos)

    def _place(self, episodes: Sequence[int], data: Path, videos: Mapping[str, Path]) -> None:
        number = len(self._groups)
        self._move(data, metadata_writer.data_file(self.root, number))
        for key, path in videos.items():
            self._move(path, metadata_writer.video_file(self.root, number, key))
        groups = [*self._groups, list(episodes)]
        self._write_json("groups.json", groups)
        self._groups = groups
        for index in episodes:
            for path in (self._data_part(index), *(self._video_part(index, key) for key in self._videos)):
                path.unlink(missing_ok=True)

    def _move(self, source: Path, target: Path) -> None:
        if not source.exists() and target.exists():  # killed after this move and before groups.json
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        fsync(target.parent)

    # Metadata

    def _write_metadata(self) -> None:
        write_table = require("pyarrow.parquet", "data").write_table
        episodes = [self._read(index) for index in range(len(self.episodes))]
        columns = self._numeric_columns()
        tasks = metadata_writer.tasks_table(episodes)
        table = metadata_writer.episodes_table(self.settings, episodes, self._groups, columns)
        stats = metadata_writer.stats(self.settings, episodes, columns)
        info = metadata_writer.info(self.settings, episodes)
        self._put(lerobot.TASKS_PARQUET, lambda path: write_table(tasks, path))
        self._put(lerobot.EPISODES_PATH.format(chunk_index=0, file_index=0), lambda path: write_table(table, path))
        self._put(lerobot.STATS, lambda path: _write_text(path, json.dumps(stats, indent=4)))
        self._put(lerobot.INFO, lambda path: _write_text(path, json.dumps(info, indent=4)))  # last: now it is complete

    def _put(self, name: str, write: Callable[[Path], None]) -> None:
        part = self.folder / "metadata.part"
        write(part)
        fsync(part)
        self._move(part, self.root / name)

    def _numeric_columns(self) -> dict[str, np.ndarray]:
        """All frames of each numeric feature, [F, d]."""
        read = require("pyarrow.parquet", "data").read_table
        names = [key for key in self.settings.features if key not in self.settings.cameras]
        tables = [read(metadata_writer.data_file(self.root, i), columns=names) for i in range(len(self._groups))]
        return {
            name: np.concatenate([to_numpy(table.column(name)).reshape(len(table), -1) for table in tables])
            for name in names
        }

    # Files of the folder

    def _read(self, index: int) -> SavedEpisode:
        file = self._json_part(index)
        try:
            return SavedEpisode(**json.loads(file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{file} is damaged: {error}") from error

    def _json_part(self, index: int) -> Path:
        return self.folder / f"episode_{index:06d}.json"

    def _data_part(self, index: int) -> Path:
        return self.folder / f"episode_{index:06d}.parquet"

    def _video_part(self, index: int, key: str) -> Path:
        return self.folder / f"episode_{index:06d}.{key}.mp4"

    def _write_json(self, name: str, content: Any) -> None:
        part = self.folder / f"{name}.part"
        _write_text(part, json.dumps(content))
        fsync(part)
        os.replace(part, self.folder / name)
        fsync(self.folder)

    def _grow_reserve(self) -> None:
        with (self.folder / "reserve").open("ab") as file:
            file.write(bytes(_RESERVE_PER_EPISODE if self.episodes else _RESERVE))

    def _hold(self) -> None:
        """Keep other processes from finishing what this one still writes."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise DatasetError(f"{self.root} is still being recorded by another process; let it finish.") from error

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def join_parquet(path: Path, parts: Sequence[Path]) -> None:
    """Write the rows of several files into one, a row group for each."""
    pq = require("pyarrow.parquet", "data")
    with write_parquet(path, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


@contextlib.contextmanager
def write_parquet(path: Path, schema: Any) -> Iterator[Any]:
    """A data file's writer; images are compressed already, and a dictionary of them would only take time."""
    plain = [field.name for field in schema if not field.name.startswith(lerobot.IMAGES)]
    with require("pyarrow.parquet", "data").ParquetWriter(path, schema, use_dictionary=plain) as writer:
        yield writer


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Have the disk keep a file or a folder's entries."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
