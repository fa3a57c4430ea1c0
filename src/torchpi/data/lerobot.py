"""Reading datasets in LeRobot's formats v3.0, v2.1 and v2.0."""

import concurrent.futures
import itertools
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
from torchpi.data.metadata import Episode, download_frames, open_metadata, with_frames
from torchpi.data.names import dimension_names
from torchpi.data.observations import camera_keys_of, in_robot_order
from torchpi.data.pixels import DepthCoding, is_depth_map
from torchpi.data.rate import Resampling, check_increments, resampling_for
from torchpi.data.spans import VideoSpans
from torchpi.data.video import VideoPool
from torchpi.errors import DatasetError, UnknownKeyError, counted, is_whole
from torchpi.robots import Embodiment

_CHECKING_THREADS = 16
"""Threads of `check_videos`; many, because files may be on a remote disk."""

_FORKED: list[Any] = []
"""Videos that a parent process has opened: closing them would join threads that the child doesn't have."""


class LeRobotDataset:
    """A sequence of frames, each with the chunk of actions that begins at it.

        dataset = LeRobotDataset("my_set", action_horizon=50)
        dataset[0]  # {"observation.images.base": uint8 [h, w, 3], "observation.state": float32 [s], "action":
                    #  float32 [H, a], "action_is_pad": bool [H], "task": str, …}

    Any number of threads may read; it can be pickled, and used in forked processes. The numbers of all frames are in
    memory; images in data files stay compressed there, too, once they have been read.
    """

    path: Path
    action_horizon: int
    fps: int | float
    """Frames per second."""
    robot_type: str | None
    features: Mapping[str, Any]
    """Features of meta/info.json, under their new names."""
    tasks: Mapping[int, str]
    """All instructions of the dataset, or the one given, by task_index."""
    camera_keys: tuple[str, ...]
    """The cameras that are read."""
    depth_keys: tuple[str, ...]
    """The depth cameras among them."""
    columns: Mapping[str, np.ndarray]
    """Every numeric column of all frames: "observation.state" [F, s], "action" [F, a], "episode_index" [F], …."""
    episode_indices: tuple[int, ...]
    """The episodes that are read."""
    episode_lengths: tuple[int, ...]
    """Frames of each of them."""
    state_names: tuple[str, ...] | None
    """The state's dimensions, if the dataset names them."""
    action_names: tuple[str, ...] | None
    """The action's dimensions, if the dataset names them."""

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
            path: the dataset's folder, or its address on the Hugging Face Hub, hf://org/name[@revision]: of that come
                the folder `meta`, and what these episodes and cameras need.
            action_horizon: H, actions in a chunk.
            embodiment: the robot whose policy reads it: state and action come in the order of its names, of the
                cameras those that it reads; its control_hz must be the rate.
            episodes: the indices of those to read, in the dataset's order; by default all (see `select_episodes`).
            cameras: the keys of those to read, by default all, or the embodiment's; others' files need not be there.
            columns: the numeric columns to read beside state, action and those that every dataset has; by default all
                of one shape in all frames, with a warning about others.
            rename: from the dataset's names of columns and cameras to LeRobot's: {"state": "observation.state", "top":
                "observation.images.cam_high"}; numeric columns are joined by "+", in that order:
                {"joint_position+gripper_position": "observation.state"}. All else here uses the new names.
            prompt: the instruction of all frames, in place of their tasks, which may be missing.
            fps: frames per second to read it at, in place of the recorded ones, see `torchpi.data.rate.Resampling`.
            tolerance_s: the greatest distance of timestamps and video frames from their times, which count from the
                beginning of an episode, wherever its clock begins; by default a quarter of a frame. More than half a
                frame is for timestamps alone: the nearest frame would be another one.
            image_cache_bytes: limit of the compressed images of data files that stay in memory.

        Raises:
            FileNotFoundError: no such folder; it is no dataset; a file of it is missing.
            KeyError: a column or camera is missing, also one to rename.
            ValueError: an unknown version; a damaged file; an episode that isn't there; NaN or infinity; a clock or
                rate that doesn't fit; episodes that share a part of a video; an impossible new name; other joints.
        """
        self._metadata = metadata = open_metadata(path, rename=rename)
        check_names(metadata)
        if not is_whole(action_horizon) or action_horizon < 1:
            raise DatasetError(f"action_horizon is {action_horizon!r}; expected a whole number, 1 or more.")
        self.path, self.action_horizon, self._cache_bytes = metadata.root, action_horizon, image_cache_bytes
        self.fps, self.features, self.robot_type = metadata.info.fps, metadata.info.features, metadata.info.robot_type
        self._episodes = _chosen(metadata.episodes, episodes, self.path)
        self._choose_cameras(metadata.info.cameras, cameras, embodiment)
        resampling = resampling_for(self.path, self.fps, embodiment, fps)
        self._spans = VideoSpans(metadata.episodes, self._episodes, self.camera_keys, self.fps, tolerance_s)
        download_frames(path, self.path, self._episodes, self.camera_keys)
        self.columns, self.tasks, self._first_rows = read_columns(
            metadata, self._episodes, tolerance_s=self._spans.tolerance_s, others=columns, prompt=prompt
        )
        self._name_dimensions(embodiment)
        self._count_frames(embodiment, resampling)
        self._open_files()
        self._check_cameras()

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
        """The frames of each episode, as rows of `columns`."""
        return [slice(end - length, end) for end, length in zip(self._ends.tolist(), self.episode_lengths, strict=True)]

    @property
    def new_images(self) -> np.ndarray:
        """The numbers of the frames with images of their own moment: all, unless a column says which are."""
        return np.flatnonzero(self.columns.get(lerobot.NEW_IMAGES, np.ones(len(self), bool)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame: that of `numbers`, with "observation.images.<camera>" uint8 [h, w, 3] for each camera, or float32
        [h, w, 1] in metres for a depth camera.

        Raises:
            FileNotFoundError, ValueError: a video or image is missing or damaged.
        """
        i = self._frame_number(index)
        number, frame = self._episode_number(i), int(self._recorded_frames[i])
        return {**{key: self._image(key, number, frame) for key in self.camera_keys}, **self.numbers(i)}

    def numbers(self, index: SupportsIndex) -> dict[str, Any]:
        """A frame without its images: "observation.state" float32 [s], "action" float32 [H, a] with the episode's last
        action where it is past the end, "action_is_pad" bool [H], "task" str, and the other numeric columns.
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
        """Compare the frames of each video file with its episodes, and read the last one that is needed: a file that
        doesn't fit, or is cut off, is found now, not when its turn comes. Some milliseconds per file; damage in its
        middle is not found.

        Args:
            progress: called with the number of files that are read, and of all.

        Raises:
            FileNotFoundError, ValueError: a video is missing or damaged, or isn't that of its episodes.
        """
        last: dict[Path, tuple[float, str, int, int]] = {}  # per file: the frame's time, and arguments of `_image`
        for number, episode in enumerate(self._episodes):
            for key in self.camera_keys:
                if (span := episode.videos.get(key)) is not None:
                    end = (span.from_timestamp + episode.length / self.recorded_fps, key, number, episode.length - 1)
                    last[span.path] = max(last.get(span.path, end), end)
        with concurrent.futures.ThreadPoolExecutor(_CHECKING_THREADS) as pool:
            reading = [pool.submit(self._image, key, number, frame) for _, key, number, frame in last.values()]
            try:
                for done, future in enumerate(concurrent.futures.as_completed(reading), start=1):
                    future.result()
                    progress(done, len(reading))
            finally:
                pool.shutdown(cancel_futures=True)

    def _choose_cameras(
        self, keys: tuple[str, ...], wanted: Iterable[str] | None, embodiment: Embodiment | None
    ) -> None:
        """Choose the cameras that are read, and find the depth cameras among them."""
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
        if guessed := [key for key, coding in self._depth.items() if coding.unit is None and coding.table is None]:
            warnings.warn(
                f"{self.path}: {lerobot.INFO} states no depth_unit of {', '.join(guessed)}; integers are read as "
                'millimetres, others as metres. State "depth_unit": "mm" or "m" in the info of the feature.',
                UserWarning,
                stacklevel=1,
            )

    def _name_dimensions(self, embodiment: Embodiment | None) -> None:
        """Name the dimensions of state and action, and bring them into the robot's order."""
        dims = {key: self.columns[key].shape[1] for key in (lerobot.STATE, lerobot.ACTION)}
        names = {key: dimension_names(self.features.get(key, {}), dims[key]) for key in dims}
        order = {} if embodiment is None else in_robot_order(embodiment, self.columns, names, self.path)
        self.columns = {**self.columns, **{key: self.columns[key][:, places] for key, places in order.items()}}
        for key, places in order.items():
            names[key] = tuple(found[i] for i in places) if (found := names[key]) else None
        self.state_names, self.action_names = names.values()

    def _count_frames(self, embodiment: Embodiment | None, resampling: Resampling | None) -> None:
        """Find the episodes' frames, of another rate if there is a resampling."""
        self.episode_indices = tuple(episode.index for episode in self._episodes)
        self.episode_lengths = tuple(episode.length for episode in self._episodes)
        self._ends = np.cumsum(self.episode_lengths)  # per episode, the number of its last frame + 1
        self._recorded_frames = self.columns["frame_index"]  # [F], in the episode as it was recorded
        if embodiment is None or resampling is None:
            return
        frames = [resampling.frames(length) for length in self.episode_lengths]
        begins = self._ends - self.episode_lengths
        rows = np.concatenate([begin + taken for begin, taken in zip(begins, frames, strict=True)])
        episodes = np.split(self.columns[lerobot.ACTION], self._ends[:-1])
        actions = np.concatenate([resampling.actions(episode) for episode in episodes])
        check_increments(actions, embodiment, resampling.fps)
        numbers = np.concatenate([np.arange(len(taken)) for taken in frames])
        clock = (numbers / resampling.fps).astype(np.float32)
        new = {lerobot.ACTION: actions, "frame_index": numbers, "timestamp": clock}
        self.columns = {name: values[rows] for name, values in self.columns.items()} | new
        self.fps, self._recorded_frames = resampling.fps, self._recorded_frames[rows]
        self.episode_lengths = tuple(map(len, frames))
        self._ends = np.cumsum(self.episode_lengths)

    def _open_files(self) -> None:
        """Begin without any open file and cached image."""
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
        """The image of a frame of the episode `self._episodes[number]`, as it was recorded."""
        if self._pid != os.getpid():  # a fork: the positions of files are the parent's, too, and a lock may be held
            _FORKED.append(self._videos)
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

    def _check_cameras(self) -> None:
        """Require the videos of all episodes, each file once."""
        keys, labels = [key for key in self._metadata.info.videos if key in self.camera_keys], dict[Path, str]()
        for episode, key in itertools.product(self._episodes, keys):
            labels.setdefault(episode.video(key).path, f"video of {key}, episode {episode.index},")
        for path, label in labels.items():
            require_file(path, label)


def _chosen(episodes: tuple[Episode, ...], wanted: Iterable[int] | None, path: Path) -> tuple[Episode, ...]:
    known = [episode.index for episode in episodes]
    indices = set(known) if wanted is None else {operator.index(index) for index in wanted}
    if unknown := sorted(indices - set(known)):
        raise DatasetError(
            f"{path} has no episode {', '.join(map(str, unknown))}; its episodes are {known[0]} to {known[-1]}."
        )
    if not indices:
        raise DatasetError("episodes= is empty; expected the indices of the episodes to read, or None for all.")
    return with_frames([episode for episode in episodes if episode.index in indices], path)
