"""Writing datasets in LeRobot's format v3.0."""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from torchpi.data import format as lerobot
from torchpi.data.metadata_writer import SavedEpisode, image_histogram, new_info
from torchpi.data.recording import Recording, write_parquet
from torchpi.data.video import default_encoder, encode_video, video_info
from torchpi.errors import DatasetError, UnknownKeyError, counted, listed
from torchpi.extras import require
from torchpi.transforms.normalize import require_finite


class LeRobotWriter:
    """Records episodes into a new dataset that LeRobot 0.4 and later and `LeRobotDataset` read.

        with LeRobotWriter("my_set", fps=30, cameras={"base": (96, 96, 3)}, state_names=…, action_names=…) as writer:
            for observation, action in episode:
                writer.add_frame({"observation.images.base": …, "observation.state": …, "action": …})
            writer.save_episode("open the drawer")

    A saved episode is complete on disk; only the frames of the episode in progress are held in memory. The dataset
    appears when the block ends, and with the saved episodes also if an exception, an interrupt or a full disk ends it.
    A process that is killed leaves no dataset (`LeRobotDataset` says so), but every saved episode:
    `LeRobotWriter.recover` makes a dataset of them. One thread at a time.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: int,
        cameras: Mapping[str, Sequence[int]],
        state_names: Sequence[str] | None,
        action_names: Sequence[str],
        robot_type: str | None = None,
        video: bool = False,
        slow_cameras: bool = False,
        data_file_mb: int | float = 100,
        video_file_mb: int | float = 200,
    ) -> None:
        """
        Args:
            path: the dataset's folder: new, or empty.
            fps: frames per second.
            cameras: per camera its images' shape (h, w, 3); "base" becomes the key "observation.images.base".
            state_names, action_names: the dimensions; None: there is no state.
            robot_type: for people.
            video: cameras as video (small, lossy), otherwise as PNG (exact).
            slow_cameras: each frame says in "images_are_new" whether its images are its own, or an earlier frame's.
            data_file_mb, video_file_mb: size in MiB from which on a new file is begun.

        Raises:
            ValueError: the folder is not empty; a shape or name that can't be; video of an odd height or width.
            ModuleNotFoundError: pyarrow or av is missing.
        """
        self.path = Path(path).expanduser()
        require("pyarrow.parquet", "data")
        self._encoder = default_encoder() if video else None
        if fps != int(fps) or fps < 1:
            raise DatasetError(f"fps is {fps}; expected a whole number of frames per second, 1 or more.")
        features = {
            **{f"{lerobot.IMAGES}{name}": self._camera(name, shape, int(fps)) for name, shape in cameras.items()},
            **({lerobot.STATE: _numbers_feature("state_names", state_names)} if state_names is not None else {}),
            lerobot.ACTION: _numbers_feature("action_names", action_names),
            **({lerobot.NEW_IMAGES: {"dtype": "bool", "shape": [1], "names": None}} if slow_cameras else {}),
        }
        self._info = new_info(
            fps=int(fps),
            features=features,
            robot_type=robot_type,
            data_file_mb=data_file_mb,
            video_file_mb=video_file_mb,
        )
        self._schema = _data_schema(self._info.features)
        self._recording: Recording | None = Recording.create(self.path, self._info)
        self.discard_episode()

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """Add a frame to the episode in progress. The arrays are copied.

        Args:
            frame: "observation.images.<camera>" uint8 [h, w, 3] for each camera, "observation.state" [s] and "action"
                [a], numbers; with slow cameras "images_are_new", a bool.

        Raises:
            KeyError: a key is missing or unknown.
            ValueError: another shape or dtype; NaN or infinity; the dataset is finished.
        """
        self._open_recording()
        self._check_keys(frame)
        checked = {key: self._checked(key, frame[key]) for key in self._frames}
        for key, value in checked.items():
            if key not in self._histograms:
                self._frames[key].append(value)
                continue
            self._histograms[key].append(image_histogram(value))
            self._frames[key].append(value.copy() if self._encoder else _png(value))

    def save_episode(self, task: str) -> None:
        """Write the episode in progress. When this returns, it is complete on disk.

        Args:
            task: the instruction.

        Raises:
            ValueError: the episode has no frames; the task is empty.
            OSError: the disk is full; the frames are kept, so that it can be called again.
        """
        recording = self._open_recording()
        if not self.num_frames_in_progress:
            raise DatasetError("The episode has no frames; add_frame comes before save_episode.")
        if not isinstance(task, str) or not task.strip():
            raise DatasetError(f"The task of an episode is {task!r}; expected its instruction, a text.")
        histograms = {key: np.sum(counts, axis=0).tolist() for key, counts in self._histograms.items()}
        with recording.saving(SavedEpisode(self.num_frames_in_progress, task, histograms)) as files:
            for key in self._info.videos:
                encode_video(files[key], self._frames[key], fps=int(self._info.fps), encoder=str(self._encoder))
            write_parquet(files["data"], [self._table(recording, task)])
        self.discard_episode()

    def add_episode(self, frames: Mapping[str, Any], task: str) -> None:
        """Add and save a whole episode, for example one that another process has recorded.

        Args:
            frames: as in `add_frame`, with the frames in front: [T, h, w, 3], [T, s], [T, a].
            task: the instruction.

        Raises:
            ValueError: arrays of several lengths; an episode is in progress.
            ValueError, KeyError, OSError: as `add_frame` and `save_episode`.
        """
        if self.num_frames_in_progress:
            raise DatasetError(
                f"An episode ({counted(self.num_frames_in_progress, 'frame')}) is in progress; save or discard it."
            )
        self._check_keys(frames)
        lengths = {key: len(values) for key, values in frames.items()}
        if len(set(lengths.values())) > 1:
            raise DatasetError(
                f"The arrays of an episode have several lengths: {lengths}; expected one value per frame."
            )
        try:
            for i in range(max(lengths.values())):
                self.add_frame({key: values[i] for key, values in frames.items()})
            self.save_episode(task)
        except BaseException:
            self.discard_episode()
            raise

    def discard_episode(self) -> None:
        """Forget the frames of the episode in progress."""
        cameras = self._info.cameras
        self._frames: dict[str, list[Any]] = {key: [] for key in self._info.features if key not in lerobot.BOOKKEEPING}
        self._histograms: dict[str, list[np.ndarray]] = {key: [] for key in cameras}

    def finalize(self) -> None:
        """Make a dataset of the saved episodes; called again, it does nothing.

        Raises:
            ValueError: no episode was saved; nothing is left at the path.
            OSError: the disk is full even so; the saved episodes are safe, and it can be called again.

        Warns: about frames that were not saved as an episode; they are dropped.
        """
        if self._recording is None:
            return
        if self.num_frames_in_progress:
            warnings.warn(
                f"The last {counted(self.num_frames_in_progress, 'frame was', 'frames were')} not saved as an episode, "
                "and dropped.",
                UserWarning,
                stacklevel=2,
            )
            self.discard_episode()
        recording = self._recording
        if not recording.episodes:
            self._recording = None
        recording.finish()
        self._recording = None

    @classmethod
    def recover(cls, path: str | Path) -> int:
        """Make a dataset of the episodes that a process had saved when it was killed.

        Returns:
            Their number.

        Raises:
            FileNotFoundError: there is no unfinished recording.
            ValueError: the recording is in progress; no episode was saved.
            OSError: the disk is full.
        """
        recording = Recording.reopen(Path(path).expanduser())
        recording.finish()
        return len(recording.episodes)

    @property
    def num_episodes(self) -> int:
        """Episodes saved so far; 0 when the dataset is finished."""
        return len(self._recording.episodes) if self._recording else 0

    @property
    def num_frames_in_progress(self) -> int:
        """Frames added since the last episode was saved."""
        return len(self._frames[lerobot.ACTION])

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finalize()
            return
        self.discard_episode()
        if self._recording is not None and not self._recording.episodes:
            self._recording.abandon()
            self._recording = None
        try:
            self.finalize()
        except Exception as second:  # what went wrong first is what the user has to see
            error.add_note(f"{type(second).__name__} while finishing {self.path}: {second}")
            for note in getattr(second, "__notes__", ()):
                error.add_note(note)

    def _open_recording(self) -> Recording:
        if self._recording is None:
            raise DatasetError(f"The dataset {self.path} is finished; a new writer needs a new path.")
        return self._recording

    def _camera(self, name: str, shape: Sequence[int], fps: int) -> dict[str, Any]:
        if not name or "/" in name:
            raise DatasetError(f"A camera is called {name!r}; expected a name without '/'.")
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise DatasetError(f"Camera {name!r} has the shape {list(shape)}; expected (height, width, 3).")
        height, width = (int(size) for size in shape[:2])
        feature = {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if self._encoder is None:
            return feature
        if height % 2 or width % 2:
            raise DatasetError(
                f"Camera {name!r} is {height} x {width}; video needs an even height and width. Crop or resize it, or "
                "record images (video=False)."
            )
        info = video_info(self._encoder, height=height, width=width, fps=fps)
        return {**feature, "dtype": "video", "info": info}

    def _check_keys(self, frame: Mapping[str, Any]) -> None:
        missing, unknown = [key for key in self._frames if key not in frame], sorted(set(frame) - set(self._frames))
        found = [f"has no {', '.join(missing)}"] if missing else []
        found += [f"has the unknown keys {', '.join(unknown)}"] if unknown else []
        if found:
            raise UnknownKeyError(f"A frame {listed(found)}; expected {', '.join(self._frames)}.")

    def _checked(self, key: str, value: Any) -> np.ndarray:
        array, is_image = np.asarray(value), key in self._histograms
        if key == lerobot.NEW_IMAGES:
            if array.dtype != bool or array.ndim:
                raise DatasetError(f"{key} is {array.dtype} {list(array.shape)}; expected a bool.")
            return array[None]
        shape, names = self._info.features[key]["shape"], self._info.features[key]["names"]
        right_dtype = array.dtype == np.uint8 if is_image else array.dtype.kind in "fiu"
        if not right_dtype or list(array.shape) != shape:
            expected = f"uint8 {shape}" if is_image else f"numbers {shape}: {', '.join(names)}"
            raise DatasetError(f"{key} is {array.dtype} {list(array.shape)}; expected {expected}.")
        if is_image:
            return array
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)  # a copy
        require_finite(array, key, names)
        return array

    def _table(self, recording: Recording, task: str) -> Any:
        """The rows of the episode in progress."""
        seconds = np.arange(self.num_frames_in_progress) / self._info.fps
        columns: dict[str, Any] = {**recording.bookkeeping([task] * len(seconds), seconds)}
        for key in self._frames.keys() - set(self._info.videos):
            values = self._frames[key]
            if key in self._histograms:
                columns[key] = [{"bytes": png, "path": f"frame-{i:06d}.png"} for i, png in enumerate(values)]
            else:  # a single dimension as plain numbers
                columns[key] = values if len(values[0]) > 1 else np.concatenate(values)
        return require("pyarrow", "data").table(columns, schema=self._schema)


def _numbers_feature(what: str, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise DatasetError(f"{what} is {names!r}; expected a list with a different name for each dimension.")
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def _data_schema(features: Mapping[str, Any]) -> Any:
    """The data files' columns; videos are in files of their own."""
    pa = require("pyarrow", "data")
    kinds, described = dict[str, Any](), dict[str, Any]()
    for key, feature in features.items():
        dtype, dim = feature["dtype"], feature["shape"][0]
        if dtype == "image":
            kinds[key], described[key] = pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}
        elif dtype != "video":
            kinds[key], described[key] = pa.type_for_alias(dtype), {"dtype": dtype, "_type": "Value"}
            if dim > 1:  # LeRobot has plain numbers for a single dimension
                kinds[key] = pa.list_(pa.field("element", kinds[key]), dim)
                described[key] = {"feature": described[key], "length": dim, "_type": "List"}
    return pa.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # 1: three times as fast as Pillow's default for files a tenth larger.
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
