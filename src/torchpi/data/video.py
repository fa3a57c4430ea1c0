"""Video files through PyAV: frames by their time, and episodes into files."""

import collections
import contextlib
import os
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from torchpi.data.files import require_file, unreadable
from torchpi.errors import DatasetError
from torchpi.extras import environment_defaults, require

# LeRobot's defaults: a keyframe at every second frame, so that any frame is found by decoding at most two.
_GOP = 2
# The first one that this build of FFmpeg has.
_ENCODERS: dict[str, dict[str, int | str]] = {
    "libsvtav1": {"crf": 30, "preset": 12},
    "libx264": {"crf": 23, "preset": "fast"},
}


class VideoReader:
    """Frames of one video file by their time, decoded one after the other where they are read so, otherwise from the
    keyframe before. Not for several threads at once; `VideoPool` is."""

    def __init__(self, path: Path) -> None:
        av = require("av", "data")
        self.path = path
        self._error = av.FFmpegError
        require_file(path, "video")
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise unreadable(path, error) from error
        # With several threads, decoders hold frames back, and a single frame takes longer.
        self._stream.codec_context.thread_count = 1
        self._frames: Any = None
        self._frame: Any = None
        self._keyframe_time = 0.0
        # The longest distance from a keyframe that was seen: within it, decoding on is not slower than a seek.
        self._stride = 0.0

    def near(self, seconds: float, tolerance: float) -> bool:
        """True if that time is reached by decoding on, without a seek."""
        return self._frame is not None and -tolerance <= seconds - self._frame.time <= self._stride + tolerance

    def read(self, seconds: float, tolerance: float) -> UInt8[np.ndarray, "h w 3"]:
        """The frame at a time of the file, off by less than half of a frame at most; RGB as PyAV converts it."""
        try:
            if not self.near(seconds, tolerance):
                self._seek(seconds + tolerance)
                if self._frame.time > seconds + tolerance:  # an index that is off: from the beginning, then
                    self._seek(0.0)
            while self._frame.time < seconds - tolerance:
                self._next()
            if self._frame.time > seconds + tolerance:
                raise EOFError(f"the nearest one is at {self._frame.time:.4f} s")
            return np.asarray(self._frame.to_ndarray(format="rgb24"))
        except (self._error, EOFError) as error:
            self._frame = None
            raise DatasetError(
                f"{self.path} has no frame at {seconds:.4f} s: {error}. The file is damaged, or is not the one that "
                "the dataset describes."
            ) from error

    def close(self) -> None:
        self._frames = self._frame = None
        self._container.close()

    def _seek(self, seconds: float) -> None:
        self._frame = None
        self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
        self._frames = self._container.decode(self._stream)
        self._next()

    def _next(self) -> None:
        previous = self._frame
        self._frame = next(self._frames, None)
        if self._frame is None:
            end = "it has none" if previous is None else f"it ends with the one at {previous.time:.4f} s"
            raise EOFError(end)
        if self._frame.key_frame or previous is None:
            self._keyframe_time = self._frame.time
        step = self._frame.time - previous.time if previous is not None else 0.0
        self._stride = max(self._stride, self._frame.time - self._keyframe_time + step)


class VideoPool:
    """Open video files, at most `limit` idle ones, for any number of threads."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: collections.OrderedDict[VideoReader, None] = collections.OrderedDict()

    def read(self, path: Path, seconds: float, tolerance: float) -> UInt8[np.ndarray, "h w 3"]:
        with self._lock:
            readers = (reader for reader in self._idle if reader.path == path)
            found = min(readers, key=lambda reader: not reader.near(seconds, tolerance), default=None)  # or the oldest
            if found is not None:
                del self._idle[found]
        reader = found or VideoReader(path)
        image = reader.read(seconds, tolerance)
        with self._lock:
            self._idle[reader] = None
            surplus = [self._idle.popitem(last=False)[0] for _ in range(len(self._idle) - self._limit)]
        for old in surplus:
            old.close()
        return image


def video_rate(path: Path) -> float | None:
    """Frames per second of a file, as its container states them."""
    reader = VideoReader(path)
    try:
        rate = reader._stream.average_rate
        return None if rate is None else float(rate)
    finally:
        reader.close()


def default_encoder() -> str:
    """The encoder that new videos are made with: AV1 as LeRobot's, or H.264 where FFmpeg has no SVT-AV1."""
    return find_encoder(_ENCODERS, advice="; or record images (video=False)")


def find_encoder(encoders: Collection[str], *, advice: str = "") -> str:
    """The first of these encoders that this build of FFmpeg has."""
    available = require("av", "data").codec.codecs_available
    if found := next((encoder for encoder in encoders if encoder in available), None):
        return found
    names = ", ".join(encoders)
    raise DatasetError(f"This build of PyAV has no encoder for videos; expected one of {names}{advice}.")


def video_info(encoder: str, *, height: int, width: int, fps: int) -> dict[str, Any]:
    """The entry "info" of a video feature in meta/info.json."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": {"libsvtav1": "av1", "libx264": "h264"}[encoder],
        "video.pix_fmt": "yuv420p",
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
        "is_depth_map": False,
        "video.g": _GOP,
        **{f"video.{name}": value for name, value in _ENCODERS[encoder].items()},
    }


def encode_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float | int,
    encoder: str,
    options: Mapping[str, int | str] | None = None,
    threads: int = 0,
    fast_start: bool = False,
) -> None:
    """Write frames, uint8 [h, w, 3] with even h and w, as an .mp4 file; by default with the options of datasets."""
    av = require("av", "data")
    flags = {"movflags": "faststart"} if fast_start else {}
    options = {"g": _GOP, **_ENCODERS[encoder]} if options is None else options
    texts = {name: str(value) for name, value in options.items()}
    real_time = _real_time_threads()
    # SVT-AV1 prints thirty lines per video to stderr, unless this variable says that it shall print errors only.
    with environment_defaults(SVT_LOG="1"), av.open(str(path), "w", format="mp4", options=flags) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=texts)
        stream.pix_fmt = "yuv420p"
        if threads:
            stream.codec_context.thread_count = threads
        for number, image in enumerate(frames):
            if number == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            if number == 0:
                # Run by root, SVT-AV1 makes its own threads and the one that calls it real-time threads, which let no
                # other program run; processes that are started from here later inherit it.
                for thread in _real_time_threads() - real_time:
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        container.mux(stream.encode(None))


def _real_time_threads() -> set[int]:
    if sys.platform != "linux":
        return set()
    found = set()
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            if os.sched_getscheduler(thread) == os.SCHED_FIFO:
                found.add(thread)
    return found
