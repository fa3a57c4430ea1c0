"""Reader of datasets in LeRobot's formats v3.0, v2.1 and v2.0."""

import concurrent.futures
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from torchpi.data import format as lerobot
from torchpi.data.columns import check_names, read_columns
from torchpi.data.files import require_file
from torchpi.data.images import ParquetImages
from torchpi.data.metadata import Episode, download_frames, drop_empty, open_metadata
from torchpi.data.names import dimension_names
from torchpi.data.observations import camera_keys_of, in_robot_order
from torchpi.data.pixels import DepthCoding, is_depth_map
from torchpi.data.rate import Resampling, check_increments, resampling_for
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool
from torchpi.errors import DatasetError, UnknownKeyError, counted, is_whole
from torchpi.robots import Embodiment

_CHECK_THREADS = 16
"""Threads of `check_videos`: more than cores, because the files may be on a remote disk."""

_INHERITED_POOLS: list[VideoPool] = []
"""Video pools inherited from a parent process. Closing them would join threads that the forked child doesn't have."""


class LeRobotDataset:
    """A sequence of frames, each with the action chunk that starts at it.

        dataset = LeRobotDataset("my_set", action_horizon=50)
        dataset[0]  # {"observation.images.base": uint8 [h, w, 3], "observation.state": float32 [s], "action":
                    #  float32 [H, a], "action_is_pad": bool [H], "task": str, …}

    Thread-safe, picklable, and usable in forked processes. The numeric columns of all frames are held in memory; images
    stored in data files are cached in memory in compressed form after their first read.
    """

    path: Path
    action_horizon: int
    fps: int | float
    """Frames per second."""
    robot_type: str | None
    features: Mapping[str, Any]
    """Features of meta/info.json, after renaming."""
    tasks: Mapping[int, str]
    """Instructions by task_index; `prompt`, if given, replaces all of them."""
    camera_keys: tuple[str, ...]
    """Cameras to read."""
    depth_keys: tuple[str, ...]
    """Depth cameras among `camera_keys`."""
    columns: Mapping[str, np.ndarray]
    """Every numeric column over all frames: "observation.state" [F, s], "action" [F, a], "episode_index" [F], …."""
    episode_indices: tuple[int, ...]
    """Indices of the selected episodes."""
    episode_lengths: tuple[int, ...]
    """Number of frames per selected episode."""
    state_names: tuple[str, ...] | None
    """Names of the state's dimensions; None if the dataset doesn't name them."""
    action_names: tuple[str, ...] | None
    """Names of the action's dimensions; None if the dataset doesn't name them."""

    def __init__(
        self,
        path: str | Path,
        *,
        action_horizon: int,
        embodiment: Embodiment | None = None,
        episodes: Iterable[int] | None = None,
        cameras: Iterable[str] | None = None,
        columns: Collection[str] | None = None,
        rename: Mapping[str, str] | None = None,
        prompt: str | None = None,
        fps: float | int | None = None,
        tolerance_s: float | int | None = None,
        image_cache_bytes: int = 4 * 2**30,
    ) -> None:
        """
        Args:
            path: a dataset folder, or an address on the Hugging Face Hub, hf://org/name[@revision]; only the folder
                `meta` and the files of the selected episodes and cameras are downloaded.
            action_horizon: H, the number of actions in a chunk.
            embodiment: the robot that the data is read for: state and action are reordered to match its names, only the
                cameras it reads are read, and its control_hz must equal the frame rate.
            episodes: indices of the episodes to read, in the dataset's order; all by default (see `select_episodes`).
            cameras: keys of the cameras to read; by default all, or the embodiment's. Others' files may be missing.
            columns: numeric columns to read in addition to state, action and bookkeeping; by default all that have the
                same shape in every frame, with a warning about the others.
            rename: from the dataset's names of columns and cameras to LeRobot's: {"state": "observation.state", "top":
                "observation.images.cam_high"}. Numeric columns joined by "+" are concatenated in that order:
                {"joint_position+gripper_position": "observation.state"}. All other arguments use the new names.
            prompt: an instruction for all frames that replaces their tasks, which may then be missing.
            fps: read at this frame rate instead of the recorded one, see `torchpi.data.rate.Resampling`.
            tolerance_s: maximum deviation of timestamps and video frames from their expected times, in seconds from the
                start of the episode; a quarter of a frame by default. For video frames it is capped at half a frame,
                beyond which the nearest frame is a different one.
            image_cache_bytes: limit of the in-memory cache of compressed images.

        Raises:
            FileNotFoundError: the folder or one of the dataset's files is missing, or the folder is no dataset.
            KeyError: a column or camera is missing, or one to rename.
            ValueError: unknown format version or episode; damaged file; NaN or infinity; timestamps or a rate that
                don't fit; episodes that overlap in a video; an impossible new name; other joints than the robot's.
        """
        self._metadata = metadata = open_metadata(path, rename=rename)
        check_names(metadata)
        if not is_whole(action_horizon) or action_horizon < 1:
            raise DatasetError(f"action_horizon is {action_horizon!r}; expected a whole number, 1 or more.")
        self.path, self.action_horizon, self._cache_bytes = metadata.root, action_horizon, image_cache_bytes
        self.fps, self.features, self.robot_type = metadata.info.fps, metadata.info.features, metadata.info.robot_type
        self._episodes = _selected(metadata.episodes, episodes, self.path)
        self._choose_cameras(metadata.info.cameras, cameras, embodiment)
        resampling = resampling_for(self.path, self.fps, embodiment, fps)
        self._spans = VideoSpans(metadata.episodes, self._episodes, self.camera_keys, self.fps, tolerance_s)
        download_frames(path, self.path, self._episodes, self.camera_keys)
        self.columns, self.tasks, self._first_rows = read_columns(
            metadata, self._episodes, tolerance_s=self._spans.tolerance_s, extra=columns, prompt=prompt
        )
        self._set_dimension_names(embodiment)
        self._set_frames(embodiment, resampling)
        self._open_files()
        self._require_videos()

    @property
    def recorded_fps(self) -> int | float:
        """Frames per second of meta/info.json."""
        return self._metadata.info.fps

    def __repr__(self) -> str:
        cameras = ", ".join(name.removeprefix("observation.images.") for name in self.camera_keys)
        return (
            f"<LeRobotDataset {self.path}: {counted(len(self.episode_lengths), 'episode')}, "
            f"{counted(len(self), 'frame')} at {self.fps:g} Hz, cameras {cameras or 'not read'}>"
        )

    @property
    def episode_rows(self) -> list[slice]:
        """The rows of `columns` that belong to each episode."""
        return [slice(end - length, end) for end, length in zip(self._ends.tolist(), self.episode_lengths, strict=True)]

    @property
    def new_images(self) -> np.ndarray:
        """Indices of the frames whose images are not repeated from an earlier frame: all, unless the column
        "images_are_new" says otherwise."""
        return np.flatnonzero(self.columns.get(lerobot.NEW_IMAGES, np.ones(len(self), bool)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame: `numbers(index)` and, per camera, "observation.images.<camera>" uint8 [h, w, 3], or float32
        [h, w, 1] in metres for a depth camera.

        Raises:
            FileNotFoundError, ValueError: a video or image is missing or damaged.
        """
        i = self._frame_number(index)
        number, frame = self._episode_number(i), int(self._recorded_frames[i])
        return {**{key: self._image(key, number, frame) for key in self.camera_keys}, **self.numbers(i)}

    def numbers(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame without its images: "observation.state" float32 [s], "action" float32 [H, a], "action_is_pad" bool
        [H], "task" str, and the other numeric columns. Past the end of the episode, its last action is repeated.
        """
        i = self._frame_number(index)
        chunk = np.arange(i, i + self.action_horizon)  # [H]
        last = self._ends[self._episode_number(i)] - 1
        # Copies, because the caller may change them.
        item: dict[str, Any] = {name: values[i].copy() for name, values in self.columns.items()}
        item[lerobot.ACTION] = self.columns[lerobot.ACTION][np.minimum(chunk, last)]  # [H, a]
        item["action_is_pad"] = chunk > last
        item["task"] = self.tasks[int(item["task_index"])]
        return item

    def check_videos(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Check the frame count of every video file against its episodes, and decode the last frame needed from it.

        Finds mismatched and truncated files before training starts, in a few milliseconds per file. Damage in the
        middle of a file is not found.

        Args:
            progress: called with the number of files checked so far and in total.

        Raises:
            FileNotFoundError, ValueError: a video is missing or damaged, or does not match its episodes.
        """
        last: dict[Path, tuple[float, str, int, int]] = {}  # per file: the frame's time, and arguments of `_image`
        for number, episode in enumerate(self._episodes):
            for key in self.camera_keys:
                if (span := episode.videos.get(key)) is not None:
                    end = (span.from_timestamp + episode.length / self.recorded_fps, key, number, episode.length - 1)
                    last[span.path] = max(last.get(span.path, end), end)
        with concurrent.futures.ThreadPoolExecutor(_CHECK_THREADS) as pool:
            futures = [pool.submit(self._image, key, number, frame) for _, key, number, frame in last.values()]
            try:
                for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                    future.result()
                    progress(done, len(futures))
            finally:
                pool.shutdown(cancel_futures=True)

    def _choose_cameras(
        self, keys: tuple[str, ...], wanted: Iterable[str] | None, embodiment: Embodiment | None
    ) -> None:
        depth_keys = [key for key in keys if is_depth_map(self.features[key])]
        if wanted is None:
            wanted = keys if embodiment is None else camera_keys_of(embodiment, keys, depth_keys)
        chosen = set(wanted)
        if unknown := sorted(chosen - set(keys)):
            raise UnknownKeyError(
                f"{self.path} has no camera {', '.join(unknown)}; its cameras are {', '.join(keys) or 'none'}."
            )
        self.camera_keys = tuple(key for key in keys if key in chosen)
        self._depth = {key: DepthCoding.of(key, self.features[key]) for key in depth_keys if key in chosen}
        self.depth_keys = tuple(self._depth)
        if unstated := [key for key, coding in self._depth.items() if coding.unit is None and coding.table is None]:
            warnings.warn(
                f"{self.path}: {lerobot.INFO} states no depth_unit for {', '.join(unstated)}; integers are read as "
                'millimetres, others as metres. State "depth_unit": "mm" or "m" in the info of the feature.',
                UserWarning,
                stacklevel=1,
            )

    def _set_dimension_names(self, embodiment: Embodiment | None) -> None:
        """Name the dimensions of state and action, and reorder them to match the robot."""
        columns = dict(self.columns)
        names = {
            key: dimension_names(self.features.get(key, {}), columns[key].shape[1])
            for key in (lerobot.STATE, lerobot.ACTION)
        }
        if embodiment is not None:
            for key, order in in_robot_order(embodiment, columns, names, self.path).items():
                columns[key] = columns[key][:, order]
                if (key_names := names[key]) is not None:
                    names[key] = tuple(key_names[i] for i in order)
        self.columns, self.state_names, self.action_names = columns, names[lerobot.STATE], names[lerobot.ACTION]

    def _set_frames(self, embodiment: Embodiment | None, resampling: Resampling | None) -> None:
        """Set the episodes' lengths and boundaries, and resample the columns if there is a resampling."""
        self.episode_indices = tuple(episode.index for episode in self._episodes)
        self.episode_lengths = tuple(episode.length for episode in self._episodes)
        self._ends = np.cumsum(self.episode_lengths)  # [E], row after the last frame of each episode
        self._recorded_frames = self.columns["frame_index"]  # [F], frame number in the recorded episode
        if embodiment is None or resampling is None:
            return
        frames = [resampling.frames(length) for length in self.episode_lengths]
        starts = self._ends - self.episode_lengths
        rows = np.concatenate([start + selected for start, selected in zip(starts, frames, strict=True)])
        episodes = np.split(self.columns[lerobot.ACTION], self._ends[:-1])
        actions = np.concatenate([resampling.actions(episode) for episode in episodes])
        check_increments(actions, embodiment, resampling.fps)
        numbers = np.concatenate([np.arange(len(selected)) for selected in frames])
        timestamps = (numbers / resampling.fps).astype(np.float32)
        new = {lerobot.ACTION: actions, "frame_index": numbers, "timestamp": timestamps}
        self.columns = {name: values[rows] for name, values in self.columns.items()} | new
        self.fps, self._recorded_frames = resampling.fps, self._recorded_frames[rows]
        self.episode_lengths = tuple(map(len, frames))
        self._ends = np.cumsum(self.episode_lengths)

    def _open_files(self) -> None:
        """Start with no open file and an empty image cache."""
        self._images, self._videos = ParquetImages(self.path, self._cache_bytes), VideoPool()
        self._pid = os.getpid()  # last: other threads may wait for it

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_images", "_videos")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_files()

    def _frame_number(self, index: SupportsIndex) -> int:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no frame {i}; {self.path} has {len(self)}.")
        return i % len(self)

    def _episode_number(self, i: int) -> int:
        return int(np.searchsorted(self._ends, i, side="right"))

    def _image(self, key: str, number: int, frame: int) -> np.ndarray:
        """The image of a recorded frame of the episode `self._episodes[number]`."""
        if self._pid != os.getpid():  # forked: file positions are shared with the parent, and a lock may be held
            _INHERITED_POOLS.append(self._videos)
            self._open_files()
        episode = self._episodes[number]
        span, depth = episode.videos.get(key), self._depth.get(key)
        if span is not None:
            self._spans.check(span.path, lambda: self._videos.frame_times(span.path, self._spans.counted_fps))
        try:
            if span is not None:
                seconds = span.from_timestamp + frame / self.recorded_fps
                return self._videos.read(span.path, seconds, self._spans.tolerance_s, 1 / self.recorded_fps, depth)
            (name,) = self._metadata.sources.get(key, (key,))
            return self._images.read(episode.data_file, name, int(self._first_rows[number]) + frame, depth)
        except ValueError as error:
            raise DatasetError(
                f"{key} of episode {episode.index}, frame {frame} can't be read: {error} Repair the file, or "
                f"{lerobot.LEAVE_OUT}."
            ) from error

    def _require_videos(self) -> None:
        """Raise an error if a video file of the selected episodes is missing. Checks each file once."""
        labels: dict[Path, str] = {}
        for episode in self._episodes:
            for key in self._metadata.info.videos:
                if key in self.camera_keys:
                    labels.setdefault(episode.video(key).path, f"video of {key}, episode {episode.index},")
        for path, label in labels.items():
            require_file(path, label)


def _selected(episodes: tuple[Episode, ...], wanted: Iterable[int] | None, path: Path) -> tuple[Episode, ...]:
    known = [episode.index for episode in episodes]
    indices = set(known) if wanted is None else {operator.index(index) for index in wanted}
    if unknown := sorted(indices - set(known)):
        raise DatasetError(
            f"{path} has no episode {', '.join(map(str, unknown))}; its episodes are {known[0]} to {known[-1]}."
        )
    if not indices:
        raise DatasetError("episodes= is empty; expected the indices of the episodes to read, or None for all.")
    return drop_empty([episode for episode in episodes if episode.index in indices], path)
