"""Reading data sets in LeRobot's formats v3.0, v2.1 and v2.0."""

import concurrent.futures
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.columns import check_names, read_columns
from torchpi.data.features import dimension_names
from torchpi.data.images import ParquetImages
from torchpi.data.metadata import Episode
from torchpi.data.place import fetch_frames, open_metadata
from torchpi.data.video import VideoPool
from torchpi.errors import DatasetError, MissingFileError, UnknownKeyError

_CHECKING_THREADS = 16
"""For `check_videos`; many, because files may be far away."""


class LeRobotDataset:
    """A sequence of frames, each with the chunk of actions that begins at it.

        dataset = LeRobotDataset("my_set", action_horizon=50)
        dataset[0]  # {"observation.images.base": uint8 [h, w, 3], "observation.state": float32 [s], "action":
                    #  float32 [H, a], "action_is_pad": bool [H], "task": str, …}

    Any number of threads may read; it can be pickled, and used in forked processes. The numbers of all frames are in
    memory; images in data files stay compressed there, too, once they have been read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        action_horizon: int,
        episodes: Iterable[int] | None = None,
        cameras: Iterable[str] | None = None,
        columns: Collection[str] | None = None,
        rename: Mapping[str, str] | None = None,
        tolerance_s: float | None = None,
        image_cache_bytes: int = 4 * 2**30,
    ) -> None:
        """
        Args:
            path: the data set's folder, or its address on the Hugging Face Hub, hf://org/name[@revision]: of that come
                the folder `meta`, and what these episodes and cameras need.
            action_horizon: H, actions in a chunk.
            episodes: the indices of those to read, by default all (see `select_episodes`); frames are counted among
                them, in the set's order.
            cameras: the keys of those to read, by default all (see `camera_keys_of`); the others' images are not
                decoded, and their videos need not be there.
            columns: the numeric columns to read beside state, action and those that every set has; by default all.
            rename: from the set's names of columns and cameras to LeRobot's, where it has others: {"state":
                "observation.state", "actions": "action", "top": "observation.images.cam_high"}. Numeric columns are
                joined by "+", in that order: {"joint_position+gripper_position": "observation.state"}. Everything else
                here, arguments included, speaks of the new names.
            tolerance_s: how far a video's frame may be from its time, and a timestamp from its frame's number; by
                default a quarter of a frame.
            image_cache_bytes: how much of the compressed images in data files stays in memory.

        Raises:
            FileNotFoundError: no such folder; it is no data set; a file of it is missing.
            KeyError: a column or camera is missing, also one to rename.
            ValueError: a version that isn't read; a damaged file; an episode that isn't there; NaN or infinity in state
                or action; timestamps that don't fit fps; a new name that is taken; a column that can't be joined.
            ModuleNotFoundError: pyarrow or av is missing.
        """
        if action_horizon < 1:
            raise DatasetError(f"action_horizon is {action_horizon}; expected 1 or more.")
        self.action_horizon = action_horizon
        self._metadata = open_metadata(path, rename=rename)
        check_names(self._metadata)
        self.path = self._metadata.root
        self._episodes = _chosen(self._metadata.episodes, episodes, self.path)
        self._camera_keys = _chosen_cameras(self._metadata.camera_keys, cameras, self.path)
        fetch_frames(path, self._episodes, self._camera_keys)
        self._tolerance = 0.25 / self.fps if tolerance_s is None else tolerance_s
        self._columns, self._first_rows = read_columns(
            self._metadata, self._episodes, tolerance_s=self._tolerance, others=columns
        )
        lengths = np.array([episode.length for episode in self._episodes])
        self._ends = np.cumsum(lengths)  # per episode, the number of its last frame + 1
        self._images = ParquetImages(image_cache_bytes)
        self._videos = VideoPool()
        self._check_cameras()

    def __len__(self) -> int:
        """The number of frames."""
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame: what `numbers` gives, and "observation.images.<camera>" uint8 [h, w, 3] for each camera.

        Raises:
            IndexError: there is no such frame.
            FileNotFoundError, ValueError: a video or image is missing or damaged.
        """
        i = self._frame_number(index)
        return {**{key: self._image(key, i) for key in self.camera_keys}, **self.numbers(i)}

    def numbers(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame without its images: "observation.state" float32 [s], "action" float32 [H, a] with the episode's last
        action where it is past the end, "action_is_pad" bool [H], "task" str, and the other numeric columns.

        Raises:
            IndexError: there is no such frame.
        """
        i = self._frame_number(index)
        chunk = np.arange(i, i + self.action_horizon)  # [H]
        last = self._ends[self._episode_number(i)] - 1
        # Copies, because the caller may change them.
        item: dict[str, Any] = {name: values[i].copy() for name, values in self._columns.items()}
        item[lerobot.ACTION] = self._columns[lerobot.ACTION][np.minimum(chunk, last)]  # [H, a]
        item["action_is_pad"] = chunk > last
        item["task"] = self.tasks[int(item["task_index"])]
        return item

    def check_videos(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read the last frame that is needed of each video file: one that is too short or cut off is found now, not
        when its turn comes. Some milliseconds per file; what is damaged in its middle is not found.

        Args:
            progress: is told how many files are read, and of how many.

        Raises:
            FileNotFoundError, ValueError: a video is missing or damaged, or ends too early.
        """
        last: dict[Path, tuple[float, str, int]] = {}  # per file: when the frame is, its camera, its number
        for end, episode in zip(self._ends.tolist(), self._episodes, strict=True):
            for key in self._camera_keys:
                if (span := episode.videos.get(key)) is not None:
                    before = last.get(span.path, (-np.inf, key, end - 1))
                    last[span.path] = max(before, (span.from_timestamp + episode.length / self.fps, key, end - 1))
        with concurrent.futures.ThreadPoolExecutor(_CHECKING_THREADS) as pool:
            reading = [pool.submit(self._image, key, i) for _, key, i in last.values()]
            try:
                for done, future in enumerate(concurrent.futures.as_completed(reading), start=1):
                    future.result()
                    progress(done, len(reading))
            finally:
                pool.shutdown(cancel_futures=True)

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Every numeric column of all frames: "observation.state" [F, s], "action" [F, a], "episode_index" [F], …."""
        return self._columns

    @property
    def fps(self) -> int | float:
        """Frames per second."""
        return self._metadata.fps

    @property
    def features(self) -> Mapping[str, Any]:
        """The features as meta/info.json has them, but for new names."""
        return self._metadata.features

    @property
    def robot_type(self) -> str | None:
        """What the set says of its robot."""
        return self._metadata.robot_type

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """The keys of the cameras that are read."""
        return self._camera_keys

    @property
    def tasks(self) -> Mapping[int, str]:
        """The set's instructions by their task_index."""
        return self._metadata.tasks

    @property
    def episode_indices(self) -> tuple[int, ...]:
        """The indices of the episodes that are read."""
        return tuple(episode.index for episode in self._episodes)

    @property
    def episode_lengths(self) -> tuple[int, ...]:
        """Frames of each of them."""
        return tuple(episode.length for episode in self._episodes)

    @property
    def state_names(self) -> tuple[str, ...] | None:
        """The state's dimensions, if the set names them."""
        return self._names(lerobot.STATE)

    @property
    def action_names(self) -> tuple[str, ...] | None:
        """The action's dimensions, if the set names them."""
        return self._names(lerobot.ACTION)

    def _names(self, key: str) -> tuple[str, ...] | None:
        return dimension_names(self.features.get(key, {}), self._columns[key].shape[1])

    def _frame_number(self, index: SupportsIndex) -> int:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no frame {i}; {self.path} has {len(self)}.")
        return i % len(self)

    def _episode_number(self, i: int) -> int:
        return int(np.searchsorted(self._ends, i, side="right"))

    def _image(self, key: str, i: int) -> np.ndarray:
        number = self._episode_number(i)
        episode = self._episodes[number]
        frame = i - (int(self._ends[number]) - episode.length)
        span = episode.videos.get(key)
        try:
            if span is not None:
                seconds = span.from_timestamp + float(self._columns["timestamp"][i])
                return self._videos.read(span.path, seconds, self._tolerance)
            (name,) = self._metadata.names_in_files(key)
            return self._images.read(episode.data_file, name, int(self._first_rows[number]) + frame)
        except ValueError as error:
            raise DatasetError(
                f"{key} of episode {episode.index}, frame {frame} can't be read: {error} Repair the file, or "
                f"{lerobot.LEAVE_OUT}."
            ) from error

    def _check_cameras(self) -> None:
        for episode in self._episodes:
            for key, span in episode.videos.items():
                if key in self._camera_keys and not span.path.is_file():
                    raise MissingFileError(
                        f"There is no video {span.path} ({key} of episode {episode.index}); the data set is "
                        "incomplete. Get it again."
                    )


def _chosen(all_: tuple[Episode, ...], wanted: Iterable[int] | None, path: Path) -> tuple[Episode, ...]:
    if wanted is None:
        if not all_:
            raise DatasetError(f"The data set {path} has no episodes.")
        return all_
    indices = {operator.index(index) for index in wanted}
    known = [episode.index for episode in all_]
    if unknown := sorted(indices - set(known)):
        there = f"{known[0]} to {known[-1]}" if known else "none"
        raise DatasetError(f"{path} has no episode {', '.join(map(str, unknown))}; its episodes are {there}.")
    if not indices:
        raise DatasetError("episodes= is empty; expected the indices of the episodes to read, or None for all.")
    return tuple(episode for episode in all_ if episode.index in indices)


def _chosen_cameras(all_: tuple[str, ...], wanted: Iterable[str] | None, path: Path) -> tuple[str, ...]:
    chosen = set(all_ if wanted is None else wanted)
    if unknown := sorted(chosen - set(all_)):
        raise UnknownKeyError(
            f"{path} has no camera {', '.join(unknown)}; its cameras are {', '.join(all_) or 'none'}."
        )
    return tuple(key for key in all_ if key in chosen)
