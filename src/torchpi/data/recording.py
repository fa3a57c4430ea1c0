"""A dataset that is being written: complete episodes on disk from the moment they are saved, the dataset at the end.

While episodes are recorded, they lie in the folder `.recording` inside the target, one complete file each:

    recording.json                       the features, fps and limits, as in meta/info.json
    episode_000003.parquet, .<camera>.mp4    its frames
    episode_000003.json                  length, task; written last: an episode with this file is complete
    groups.json                          which episodes have been joined into files of the dataset already

When they have reached the size of a file, they are joined into one data file and one video per camera. `finish` joins
the rest, writes the metadata, `meta/info.json` last, and removes the folder. It reads everything from disk, so that it
does the same after a process was killed, whenever that was. Every file appears under its final name by a rename.
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
# Kept free for the metadata of a finished dataset, so that a disk that has run full can still hold it.
_RESERVE, _RESERVE_PER_EPISODE = 256 * 1024, 16 * 1024


class Recording:
    """The folder `.recording`; one process holds it at a time."""

    def __init__(self, root: Path, info: Info, *, made_root: bool = False) -> None:
        self.root, self.info = root, info
        self._made_root = made_root
        self.folder = root / lerobot.RECORDING_FOLDER
        self._lock: int | None = None
        self.episodes: list[SavedEpisode] = []
        self.tasks: dict[str, None] = {}  # the instructions so far, in the order of their task_index
        self._groups: list[list[int]] = []

    @classmethod
    def create(cls, root: Path, info: Info) -> "Recording":
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            hint = "choose another path"
            if (root / lerobot.RECORDING_FOLDER).is_dir():
                hint = f"it is a recording that was not finished: LeRobotWriter.recover({str(root)!r}) finishes it"
            raise DatasetError(f"{root} exists already and is not an empty folder; {hint}.")
        recording = cls(root, info, made_root=not root.exists())
        recording.folder.mkdir(parents=True)
        recording._hold()
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
        if "data_file_mb" in document:  # of an earlier version
            document = dataclasses.asdict(new_info(**document))
        recording = cls(root, parse(Info, document, str(file), error=DatasetError))
        recording._hold()
        recording.reload()
        return recording

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    def bookkeeping(self, texts: Sequence[str], timestamps: np.ndarray) -> dict[str, np.ndarray]:
        """The columns `BOOKKEEPING` of the next episode, from the instruction and the time of each frame."""
        numbers = {task: number for number, task in enumerate(self.tasks | dict.fromkeys(texts))}
        frame_index = np.arange(len(texts))
        columns = {
            "timestamp": timestamps,
            "frame_index": frame_index,
            "episode_index": np.full_like(frame_index, len(self.episodes)),
            "index": self.num_frames + frame_index,
            "task_index": np.array([numbers[text] for text in texts]),
        }
        return {name: columns[name].astype(dtype) for name, dtype in lerobot.BOOKKEEPING.items()}

    @contextlib.contextmanager
    def saving(self, episode: SavedEpisode) -> Iterator[dict[str, Path]]:
        """Yield the paths to write the data file ("data") and each camera's video of an episode to: when the block
        ends, it is complete on disk, or not there at all."""
        files = self._files(len(self.episodes))
        try:
            yield files
            for path in files.values():
                fsync(path)
            alike = not self._pending or self.episodes[self._pending[0]].codecs == episode.codecs
            if self._pending and (self._too_large(files) or not alike):
                self._join(self._pending)
            self._grow_reserve()
            self._put_json(self._json_file(len(self.episodes)), dataclasses.asdict(episode))
            self.episodes.append(dataclasses.replace(episode, histograms={}))
            self.tasks |= dict.fromkeys(episode.tasks)
        except BaseException:
            self.reload()  # an interrupt may come right after the episode was saved
            raise

    def reload(self) -> None:
        """Read from disk which episodes are complete, and remove the rest of an incomplete one."""
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
        """Make it a dataset. May be called again if it failed, by `LeRobotWriter.recover` as well if `recoverable`."""
        if self._lock is None:  # released when it failed
            self._hold()
        try:
            self.reload()
            if not self.episodes:
                self.abandon()
                raise DatasetError(f"No episode was saved; there is no dataset at {self.root}.")
            (self.folder / "reserve").unlink(missing_ok=True)
            if self._pending:
                self._join(self._pending)
            self._write_metadata()
            done = self.folder.with_name(f"{self.folder.name}.done")  # in one step: half of it is worse than none
            os.replace(self.folder, done)
        except OSError as error:
            if recoverable:
                error.add_note(
                    f"The {len(self.episodes)} saved episodes are safe in {self.folder}; "
                    f"LeRobotWriter.recover({str(self.root)!r}) finishes the dataset."
                )
            raise
        finally:
            self._release()
        shutil.rmtree(done)

    def abandon(self) -> None:
        self._release()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_root:
            with contextlib.suppress(OSError):  # something else is in it by now
                self.root.rmdir()

    # Joining episodes into files

    @property
    def _pending(self) -> list[int]:
        """The episodes that are not in a file of the dataset yet."""
        return list(range(self._groups[-1][-1] + 1 if self._groups else 0, len(self.episodes)))

    def _too_large(self, new: Mapping[str, Path]) -> bool:
        """True if a file would exceed its limit with an episode of these files in it."""
        for key, path in new.items():
            limit = self.info.data_files_size_in_mb if key == "data" else self.info.video_files_size_in_mb
            parts = [path, *(self._files(i)[key] for i in self._pending)]
            # One that could not be joined for lack of space may have its place already.
            if sum(part.stat().st_size for part in parts if part.exists()) > (limit or 0) * 2**20:
                return True
        return False

    def _join(self, episodes: Sequence[int]) -> None:
        """Give episodes their place in the dataset, in as few files as the disk has room for."""
        if not self._files(episodes[0])["data"].exists():  # killed while it was moved
            self._place(episodes[:1], self._files(episodes[0]))
            episodes = episodes[1:]
        if len(episodes) > 1:
            try:
                self._place(episodes, self._joined(episodes))
                return
            except OSError as error:
                for path in self.folder.glob("*.part"):
                    path.unlink()
                if error.errno not in _NO_SPACE:
                    raise
        for index in episodes:  # moving a file takes no space
            self._place([index], self._files(index))

    def _joined(self, episodes: Sequence[int]) -> dict[str, Path]:
        joined = {key: self.folder / f"{key}.part" for key in ("data", *self.info.videos)}
        for key, path in joined.items():
            parts = {self._files(i)[key]: self.episodes[i].length for i in episodes}
            if key == "data":
                write_parquet(path, map(require("pyarrow.parquet", "data").read_table, parts))
            else:
                concatenate_videos(path, parts.items(), fps=self.info.fps)
            fsync(path)
        return joined

    def _place(self, episodes: Sequence[int], files: Mapping[str, Path]) -> None:
        """Move files to their place in the dataset, and remove those that they were joined of."""
        for key, path in files.items():
            self._move(path, file_path(self.root, len(self._groups), key))
        groups = [*self._groups, list(episodes)]
        self._put_json(self.folder / "groups.json", groups)
        self._groups = groups
        for index in episodes:
            for path in self._files(index).values():
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
        """All frames of each numeric feature, [F, d]; not of those whose shape changes."""
        read = require("pyarrow.parquet", "data").read_table
        schema = require("pyarrow.parquet", "data").read_schema(file_path(self.root, 0, "data"))
        names = [key for key in numeric_names(schema) if key in self.info.features]
        tables = [read(file_path(self.root, i, "data"), columns=names) for i in range(len(self._groups))]
        columns = {}
        for name in names:
            with contextlib.suppress(ValueError):
                columns[name] = np.concatenate(
                    [to_numpy(table.column(name)).reshape(len(table), -1) for table in tables]
                )
        return columns

    # Files of the folder

    def _files(self, index: int) -> dict[str, Path]:
        """The data file ("data") of an episode and its videos, by camera."""
        videos = {key: self.folder / f"episode_{index:06d}.{key}.mp4" for key in self.info.videos}
        return {"data": self.folder / f"episode_{index:06d}.parquet", **videos}

    def _json_file(self, index: int) -> Path:
        return self.folder / f"episode_{index:06d}.json"

    def _read(self, index: int) -> SavedEpisode:
        file = self._json_file(index)
        document = read_json(file, error=DatasetError)  # an earlier version's has more fields
        return parse(SavedEpisode, document, str(file), error=DatasetError, known_only=False)

    def _put_json(self, target: Path, content: Any, *, indent: int | None = None) -> None:
        self._put(target, lambda path: path.write_text(json.dumps(content, indent=indent), encoding="utf-8"))

    def _put(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Write a file, whole or not at all."""
        part = self.folder / f"{target.name}.part"
        write(part)
        fsync(part)
        self._move(part, target)

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


def write_parquet(path: Path, tables: Iterable[Any]) -> None:
    """Write tables with the same columns into a data file, one row group each."""
    rest = iter(tables)
    first = next(rest)
    # Images are compressed already, and a dictionary of them would only take time.
    plain = [name for name in first.column_names if not name.startswith(lerobot.IMAGES)]
    with require("pyarrow.parquet", "data").ParquetWriter(path, first.schema, use_dictionary=plain) as writer:
        for table in itertools.chain([first], rest):
            writer.write_table(table)
