"""Writer of datasets in LeRobot's format v3.0."""

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

    A saved episode is complete on disk; only the frames of the episode in progress are held in memory. The dataset is
    finalized when the block ends, also if an exception, an interrupt or a full disk ends it. A killed process leaves no
    dataset (`LeRobotDataset` says so), but no saved episode is lost: `LeRobotWriter.recover` builds a dataset from
    them. Not thread-safe.
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
            path: folder of the dataset; it must not exist, or be empty.
            fps: frames per second.
            cameras: image shape (h, w, 3) by camera; "base" becomes the key "observation.images.base".
            state_names, action_names: names of the dimensions; state_names=None for a robot without state.
            robot_type: free text.
            video: store images as video (small, lossy) instead of PNG (exact).
            slow_cameras: add the column "images_are_new", in which each frame says whether its images are new or
                repeated from an earlier frame.
            data_file_mb, video_file_mb: file size in MiB above which a new file is started.

        Raises:
            ValueError: the folder is not empty; an invalid shape or name; video of an odd height or width.
            ModuleNotFoundError: pyarrow or av is missing.
        """
        self.path = Path(path).expanduser()
        require("pyarrow.parquet", "data")
        self._encoder = default_encoder() if video else None
        if fps != int(fps) or fps < 1:
            raise DatasetError(f"fps is {fps}; expected a whole number of frames per second, 1 or more.")
        features = {f"{lerobot.IMAGES}{name}": self._camera(name, shape, int(fps)) for name, shape in cameras.items()}
        if state_names is not None:
            features[lerobot.STATE] = _vector_feature("state_names", state_names)
        features[lerobot.ACTION] = _vector_feature("action_names", action_names)
        if slow_cameras:
            features[lerobot.NEW_IMAGES] = {"dtype": "bool", "shape": [1], "names": None}
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
        """Add a copy of a frame to the episode in progress.

        Args:
            frame: "observation.images.<camera>" uint8 [h, w, 3] for each camera, numeric "observation.state" [s] and
                "action" [a]; with slow cameras also "images_are_new", a bool.

        Raises:
            KeyError: a key is missing or unknown.
            ValueError: a wrong shape or dtype; NaN or infinity; the dataset is finished.
        """
        self._open_recording()
        self._check_keys(frame)
        arrays = {key: self._to_array(key, frame[key]) for key in self._frames}
        for key, array in arrays.items():
            if key in self._histograms:
                self._histograms[key].append(image_histogram(array))
                self._frames[key].append(array.copy() if self._encoder else _png(array))
            else:
                self._frames[key].append(array)

    def save_episode(self, task: str) -> None:
        """Write the episode in progress. When this returns, it is complete on disk.

        Args:
            task: the instruction.

        Raises:
            ValueError: the episode has no frames; the task is empty.
            OSError: the disk is full. The frames are kept, so the call can be repeated.
        """
        recording = self._open_recording()
        if not self.num_frames_in_progress:
            raise DatasetError("The episode has no frames; add_frame comes before save_episode.")
        if not isinstance(task, str) or not task.strip():
            raise DatasetError(f"The task of an episode is {task!r}; expected its instruction, a non-empty string.")
        histograms = {key: np.sum(counts, axis=0).tolist() for key, counts in self._histograms.items()}
        with recording.saving(SavedEpisode(self.num_frames_in_progress, task, histograms)) as files:
            for key in self._info.videos:
                encode_video(files[key], self._frames[key], fps=int(self._info.fps), encoder=str(self._encoder))
            write_parquet(files["data"], [self._table(recording, task)])
        self.discard_episode()

    def add_episode(self, frames: Mapping[str, Any], task: str) -> None:
        """Add and save a whole episode, for example one recorded by another process.

        Args:
            frames: as in `add_frame`, with a leading frame dimension: [T, h, w, 3], [T, s], [T, a].
            task: the instruction.

        Raises:
            ValueError: arrays of different lengths; an episode is in progress.
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
                f"The arrays of an episode have different lengths: {lengths}; expected one value per frame."
            )
        try:
            for i in range(max(lengths.values())):
                self.add_frame({key: values[i] for key, values in frames.items()})
            self.save_episode(task)
        except BaseException:
            self.discard_episode()
            raise

    def discard_episode(self) -> None:
        """Discard the frames of the episode in progress."""
        self._frames: dict[str, list[Any]] = {key: [] for key in self._info.features if key not in lerobot.BOOKKEEPING}
        self._histograms: dict[str, list[np.ndarray]] = {key: [] for key in self._info.cameras}

    def finalize(self) -> None:
        """Build the dataset from the saved episodes. Further calls do nothing.

        Raises:
            ValueError: no episode was saved; nothing is left at the path.
            OSError: the disk is full. The saved episodes are safe, and the call can be repeated.

        Warns: about frames not saved as an episode, which are dropped.
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
        """Build a dataset from the episodes that a process had saved when it was killed.

        Returns:
            The number of recovered episodes.

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
        """Number of episodes saved so far; 0 once the dataset is finished."""
        return len(self._recording.episodes) if self._recording else 0

    @property
    def num_frames_in_progress(self) -> int:
        """Number of frames added since the last episode was saved."""
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
        except Exception as second:  # the user must see the first error
            error.add_note(f"{type(second).__name__} while finishing {self.path}: {second}")
            for note in getattr(second, "__notes__", ()):
                error.add_note(note)

    def _open_recording(self) -> Recording:
        if self._recording is None:
            raise DatasetError(f"The dataset {self.path} is finished; a new writer needs a new path.")
        return self._recording

    def _camera(self, name: str, shape: Sequence[int], fps: int) -> dict[str, Any]:
        if not name or "/" in name:
            raise DatasetError(f"A camera is named {name!r}; expected a name without '/'.")
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
        problems = []
        if missing:
            problems.append(f"has no {', '.join(missing)}")
        if unknown:
            problems.append(f"has the unknown keys {', '.join(unknown)}")
        if problems:
            raise UnknownKeyError(f"A frame {listed(problems)}; expected {', '.join(self._frames)}.")

    def _to_array(self, key: str, value: Any) -> np.ndarray:
        """Check a value of a frame, and convert it to an array: float32 copies of numbers, images as they are."""
        array, is_image = np.asarray(value), key in self._histograms
        if key == lerobot.NEW_IMAGES:
            if array.dtype != bool or array.ndim:
                raise DatasetError(f"{key} is {array.dtype} {list(array.shape)}; expected a bool.")
            return array[None]
        shape, names = self._info.features[key]["shape"], self._info.features[key]["names"]
        is_dtype_valid = array.dtype == np.uint8 if is_image else array.dtype.kind in "fiu"
        if not is_dtype_valid or list(array.shape) != shape:
            expected = f"uint8 {shape}" if is_image else f"numbers {shape}: {', '.join(names)}"
            raise DatasetError(f"{key} is {array.dtype} {list(array.shape)}; expected {expected}.")
        if is_image:
            return array
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)  # a copy
        require_finite(array, key, names)
        return array

    def _table(self, recording: Recording, task: str) -> Any:
        """Rows of the data file for the episode in progress."""
        seconds = np.arange(self.num_frames_in_progress) / self._info.fps
        columns: dict[str, Any] = dict(recording.bookkeeping([task] * len(seconds), seconds))
        for key in self._frames.keys() - set(self._info.videos):
            values = self._frames[key]
            if key in self._histograms:
                columns[key] = [{"bytes": png, "path": f"frame-{i:06d}.png"} for i, png in enumerate(values)]
            else:  # a single dimension as plain numbers
                columns[key] = values if len(values[0]) > 1 else np.concatenate(values)
        return require("pyarrow", "data").table(columns, schema=self._schema)


def _vector_feature(argument: str, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise DatasetError(f"{argument} is {names!r}; expected a list with a different name for each dimension.")
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def _data_schema(features: Mapping[str, Any]) -> Any:
    """Arrow schema of the data files. Videos are stored in separate files."""
    pa = require("pyarrow", "data")
    types: dict[str, Any] = {}
    descriptions: dict[str, Any] = {}
    for key, feature in features.items():
        dtype, dim = feature["dtype"], feature["shape"][0]
        if dtype == "image":
            types[key] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            descriptions[key] = {"_type": "Image"}
        elif dtype != "video":
            types[key] = pa.type_for_alias(dtype)
            descriptions[key] = {"dtype": dtype, "_type": "Value"}
            if dim > 1:  # LeRobot stores a single dimension as plain numbers
                types[key] = pa.list_(pa.field("element", types[key]), dim)
                descriptions[key] = {"feature": descriptions[key], "length": dim, "_type": "List"}
    return pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": descriptions}})})


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 1 is three times as fast as Pillow's default, for files 10 % larger.
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
