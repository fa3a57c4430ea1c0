"""A dataset while it is being written: every saved episode is complete on disk, and the dataset is built at the end.

During recording, the folder `.recording` inside the target holds one complete set of files per episode:

    recording.json                       features, fps and size limits, as in meta/info.json
    episode_000003.parquet, .<camera>.mp4    frames of the episode
    episode_000003.json                  length and task; written last, so an episode with this file is complete
    groups.json                          episodes that have been merged into files of the dataset, per file

When the pending episodes reach the size limit of a file, they are merged into one data file and one video per camera.
`finish` merges the rest, writes the metadata (`meta/info.json` last) and removes the folder. It reads all state from
disk, so it works the same after the process was killed at any point. Every file gets its final name by a rename.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.atomic import fsync
from torchpi.data import format as lerobot
from torchpi.data import metadata_writer
from torchpi.data.columns import numeric_names, to_numpy
from torchpi.data.metadata import Info
from torchpi.data.metadata_writer import SavedEpisode, file_path, new_info
from torchpi.data.video_copy import concatenate_videos
from torchpi.errors import DatasetError, MissingFileError
from torchpi.extras import require
from torchpi.schema import parse, read_json

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Disk space in bytes reserved for the metadata, so that the dataset can be finished even if the disk is full.
_RESERVE, _RESERVE_PER_EPISODE = 256 * 1024, 16 * 1024


class Recording:
    """The folder `.recording`, locked by one process at a time."""

    def __init__(self, root: Path, info: Info, *, made_root: bool = False) -> None:
        self.root, self.info = root, info
        self._made_root = made_root
        self.folder = root / lerobot.RECORDING_FOLDER
        self._lock: int | None = None
        self.episodes: list[SavedEpisode] = []
        self.tasks: dict[str, None] = {}  # instructions in the order of their task_index
        self._groups: list[list[int]] = []

    @classmethod
    def create(cls, root: Path, info: Info) -> "Recording":
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            hint = "choose another path"
            if (root / lerobot.RECORDING_FOLDER).is_dir():
                hint = f"it holds an unfinished recording: LeRobotWriter.recover({str(root)!r}) finishes it"
            raise DatasetError(f"{root} exists already and is not an empty folder; {hint}.")
        recording = cls(root, info, made_root=not root.exists())
        recording.folder.mkdir(parents=True)
        recording._acquire_lock()
        try:
            recording._put_json(recording.folder / "recording.json", dataclasses.asdict(info))
            recording._grow_reserve()
        except BaseException:
            recording.abandon()
            raise
        return recording

    @classmethod
    def reopen(cls, root: Path) -> "Recording":
        file = root / lerobot.RECORDING_FOLDER / "recording.json"
        if not file.is_file():
            raise MissingFileError(f"There is no unfinished recording in {root}.")
        document = read_json(file, error=DatasetError)
        if "data_file_mb" in document:  # written by an earlier version
            document = dataclasses.asdict(new_info(**document))
        recording = cls(root, parse(Info, document, str(file), error=DatasetError))
        recording._acquire_lock()
        recording.reload()
        return recording

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    def bookkeeping(self, texts: Sequence[str], timestamps: np.ndarray) -> dict[str, np.ndarray]:
        """The `BOOKKEEPING` columns of the next episode, from the instruction and timestamp of each frame."""
        task_indices = {task: i for i, task in enumerate(self.tasks | dict.fromkeys(texts))}
        frame_index = np.arange(len(texts))
        columns = {
            "timestamp": timestamps,
            "frame_index": frame_index,
            "episode_index": np.full_like(frame_index, len(self.episodes)),
            "index": self.num_frames + frame_index,
            "task_index": np.array([task_indices[text] for text in texts]),
        }
        return {name: columns[name].astype(dtype) for name, dtype in lerobot.BOOKKEEPING.items()}

    @contextlib.contextmanager
    def saving(self, episode: SavedEpisode) -> Iterator[dict[str, Path]]:
        """Yield the paths for an episode's data file ("data") and videos (by camera). When the block ends, the episode
        is either complete on disk or removed."""
        files = self._files(len(self.episodes))
        try:
            yield files
            for path in files.values():
                fsync(path)
            if self._pending:
                same_codecs = self.episodes[self._pending[0]].codecs == episode.codecs
                if not same_codecs or self._exceeds_limit(files):
                    self._merge(self._pending)
            self._grow_reserve()
            self._put_json(self._json_file(len(self.episodes)), dataclasses.asdict(episode))
            self.episodes.append(dataclasses.replace(episode, histograms={}))
            self.tasks |= dict.fromkeys(episode.tasks)
        except BaseException:
            self.reload()  # an interrupt may come right after the episode was saved
            raise

    def reload(self) -> None:
        """Read the complete episodes from disk, and remove the files of an incomplete one."""
        self.episodes = []
        while self._json_file(len(self.episodes)).is_file():
            self.episodes.append(dataclasses.replace(self._read(len(self.episodes)), histograms={}))
        self.tasks = dict.fromkeys(task for episode in self.episodes for task in episode.tasks)
        groups = self.folder / "groups.json"
        self._groups = read_json(groups, error=DatasetError) if groups.is_file() else []
        for pattern in ("*.part", f"episode_{len(self.episodes):06d}.*"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def finish(self, *, recoverable: bool = True) -> None:
        """Build the dataset. If it fails, the call can be repeated; `recoverable` adds advice on how to do so."""
        if self._lock is None:  # released by a failed call
            self._acquire_lock()
        try:
            self.reload()
            if not self.episodes:
                self.abandon()
                raise DatasetError(f"No episode was saved; there is no dataset at {self.root}.")
            (self.folder / "reserve").unlink(missing_ok=True)
            if self._pending:
                self._merge(self._pending)
            self._write_metadata()
            # A rename is atomic; a half-deleted folder would look like an unfinished recording.
            done = self.folder.with_name(f"{self.folder.name}.done")
            os.replace(self.folder, done)
        except OSError as error:
            if recoverable:
                error.add_note(
                    f"The {len(self.episodes)} saved episodes are safe in {self.folder}; "
                    f"LeRobotWriter.recover({str(self.root)!r}) finishes the dataset."
                )
            raise
        finally:
            self._release_lock()
        shutil.rmtree(done)

    def abandon(self) -> None:
        """Delete the recording."""
        self._release_lock()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_root:
            with contextlib.suppress(OSError):  # not empty
                self.root.rmdir()

    # Merging episodes into files

    @property
    def _pending(self) -> list[int]:
        """Episodes that are not in a file of the dataset yet."""
        return list(range(self._groups[-1][-1] + 1 if self._groups else 0, len(self.episodes)))

    def _exceeds_limit(self, new: Mapping[str, Path]) -> bool:
        """True if merging the pending episodes with a new one, given by its files, would exceed a file size limit."""
        for key, path in new.items():
            limit = self.info.data_files_size_in_mb if key == "data" else self.info.video_files_size_in_mb
            parts = [path, *(self._files(i)[key] for i in self._pending)]
            # An episode that could not be merged for lack of space may have been moved already.
            if sum(part.stat().st_size for part in parts if part.exists()) > (limit or 0) * 2**20:
                return True
        return False

    def _merge(self, episodes: Sequence[int]) -> None:
        """Move episodes into the dataset, merged into as few files as disk space allows."""
        if not self._files(episodes[0])["data"].exists():  # killed while moving this episode
            self._publish(episodes[:1], self._files(episodes[0]))
            episodes = episodes[1:]
        if len(episodes) > 1:
            try:
                self._publish(episodes, self._merged_files(episodes))
                return
            except OSError as error:
                for path in self.folder.glob("*.part"):
                    path.unlink()
                if error.errno not in _NO_SPACE:
                    raise
        for index in episodes:  # moving a file takes no space
            self._publish([index], self._files(index))

    def _merged_files(self, episodes: Sequence[int]) -> dict[str, Path]:
        merged = {key: self.folder / f"{key}.part" for key in ("data", *self.info.videos)}
        for key, path in merged.items():
            parts = {self._files(i)[key]: self.episodes[i].length for i in episodes}
            if key == "data":
                write_parquet(path, map(require("pyarrow.parquet", "data").read_table, parts))
            else:
                concatenate_videos(path, parts.items(), fps=self.info.fps)
            fsync(path)
        return merged

    def _publish(self, episodes: Sequence[int], files: Mapping[str, Path]) -> None:
        """Move the files of one group of episodes into the dataset, and remove the files that they were merged from."""
        for key, path in files.items():
            self._move(path, file_path(self.root, len(self._groups), key))
        groups = [*self._groups, list(episodes)]
        self._put_json(self.folder / "groups.json", groups)
        self._groups = groups
        for index in episodes:
            for path in self._files(index).values():
                path.unlink(missing_ok=True)

    def _move(self, source: Path, target: Path) -> None:
        if not source.exists() and target.exists():  # killed between this move and writing groups.json
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        fsync(target.parent)

    # Metadata

    def _write_metadata(self) -> None:
        write_table = require("pyarrow.parquet", "data").write_table
        episodes = [self._read(index) for index in range(len(self.episodes))]
        columns = self._numeric_columns()
        tasks = metadata_writer.tasks_table(list(self.tasks))
        table = metadata_writer.episodes_table(self.info, episodes, self._groups, columns)
        stats = metadata_writer.feature_stats(self.info, episodes, columns)
        info = dataclasses.replace(
            self.info,
            total_episodes=len(episodes),
            total_frames=self.num_frames,
            total_tasks=len(tasks),
            splits={"train": f"0:{len(episodes)}"},
        )
        episodes_file = lerobot.EPISODES_PATH.format(chunk_index=0, file_index=0)
        self._put(self.root / lerobot.TASKS_PARQUET, lambda path: write_table(tasks, path))
        self._put(self.root / episodes_file, lambda path: write_table(table, path))
        self._put_json(self.root / lerobot.STATS, stats, indent=4)
        self._put_json(self.root / lerobot.INFO, dataclasses.asdict(info), indent=4)  # last: now it is complete

    def _numeric_columns(self) -> dict[str, np.ndarray]:
        """All frames of each numeric feature, [F, d]. Features whose shape varies are left out."""
        pq = require("pyarrow.parquet", "data")
        files = [file_path(self.root, i, "data") for i in range(len(self._groups))]
        names = [key for key in numeric_names(pq.read_schema(files[0])) if key in self.info.features]
        tables = [pq.read_table(file, columns=names) for file in files]
        columns = {}
        for name in names:
            with contextlib.suppress(ValueError):
                values = [to_numpy(table.column(name)).reshape(len(table), -1) for table in tables]
                columns[name] = np.concatenate(values)
        return columns

    # Files of the folder

    def _files(self, index: int) -> dict[str, Path]:
        """Paths of an episode's data file ("data") and videos (by camera)."""
        videos = {key: self.folder / f"episode_{index:06d}.{key}.mp4" for key in self.info.videos}
        return {"data": self.folder / f"episode_{index:06d}.parquet", **videos}

    def _json_file(self, index: int) -> Path:
        return self.folder / f"episode_{index:06d}.json"

    def _read(self, index: int) -> SavedEpisode:
        file = self._json_file(index)
        document = read_json(file, error=DatasetError)  # files of earlier versions have more fields
        return parse(SavedEpisode, document, str(file), error=DatasetError, known_only=False)

    def _put_json(self, target: Path, content: Any, *, indent: int | None = None) -> None:
        self._put(target, lambda path: path.write_text(json.dumps(content, indent=indent), encoding="utf-8"))

    def _put(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Write a file atomically."""
        part = self.folder / f"{target.name}.part"
        write(part)
        fsync(part)
        self._move(part, target)

    def _grow_reserve(self) -> None:
        with (self.folder / "reserve").open("ab") as file:
            file.write(bytes(_RESERVE_PER_EPISODE if self.episodes else _RESERVE))

    def _acquire_lock(self) -> None:
        """Keep other processes from finishing this recording while it is being written."""
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release_lock()
            raise DatasetError(f"{self.root} is still being recorded by another process; let it finish.") from error

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_parquet(path: Path, tables: Iterable[Any]) -> None:
    """Write tables with the same columns into a data file, one row group per table."""
    remaining = iter(tables)
    first = next(remaining)
    # Images are compressed already; dictionary encoding would only take time.
    encoded = [name for name in first.column_names if not name.startswith(lerobot.IMAGES)]
    with require("pyarrow.parquet", "data").ParquetWriter(path, first.schema, use_dictionary=encoded) as writer:
        for table in itertools.chain([first], remaining):
            writer.write_table(table)
