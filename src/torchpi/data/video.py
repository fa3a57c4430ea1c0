"""Video files through PyAV: frames by their time, and episodes into files."""

import collections
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from torchpi.data.files import require_file, unreadable
from torchpi.data.pixels import MAX_PIXELS, DepthCoding, FramePixels, Pixels
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
        self._stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._pixels = FramePixels()
        self._frames: Any = None
        self._frame: Any = None
        self._keyframe_time = 0.0
        # The longest distance from a keyframe that was seen: within it, decoding on is not slower than a seek.
        self._stride = 0.0

    def near(self, seconds: float, period: float) -> bool:
        """True if that time is reached by decoding on, without a seek."""
        return self._frame is not None and -period / 8 <= seconds - self._frame.time <= self._stride + period / 2

    def read(self, seconds: float, tolerance: float, period: float, depth: DepthCoding | None = None) -> Pixels:
        """The frame nearest to a time of the file, off by no more than the tolerance.

        Args:
            period: seconds between two frames. A frame within an eighth of it is the nearest one; elsewhere the frame
                behind that time is compared with the one before.
        """
        try:
            if not self.near(seconds, period):
                self._seek(seconds + period / 8)
                if self._frame.time > seconds + period / 8:  # an index that is off: from the beginning, then
                    self._seek(0.0)
            nearest = self._frame
            while self._frame.time < seconds - period / 8:
                try:
                    self._next()
                except EOFError:
                    break
                if abs(self._frame.time - seconds) < abs(nearest.time - seconds):
                    nearest = self._frame
        except (self._error, EOFError) as error:
            raise self._no_frame(seconds, str(error)) from error
        if not abs(nearest.time - seconds) <= tolerance:
            raise self._no_frame(seconds, f"the nearest one is at {nearest.time:.4f} s")
        return self._pixels(nearest, depth)

    def frame_times(self, fps: float | int | None) -> Float[np.ndarray, " n"]:
        """The times of all frames, without decoding: by the container's count if they fill its duration at a rate, else
        of each packet, for which the file is read."""
        stream, base = self._stream, float(self._stream.time_base)
        is_counted = fps is not None and stream.frames and stream.duration
        if is_counted and abs(stream.duration * base * fps - stream.frames) <= 0.25:
            return ((stream.start_time or 0) + np.arange(stream.frames) * (stream.duration / stream.frames)) * base
        self._frame = None
        try:
            self._container.seek(0, stream=stream)
            shown = (packet for packet in self._container.demux(stream) if not packet.is_discard)
            times = np.sort(np.array([packet.pts for packet in shown if packet.pts is not None], np.float64)) * base
        except self._error as error:
            raise self._no_frame(0.0, str(error)) from error
        if not len(times):
            raise self._no_frame(0.0, "it has none")
        return times

    def close(self) -> None:
        self._frames = self._frame = None
        self._container.close()

    def _seek(self, seconds: float) -> None:
        self._frame = None
        self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
        self._frames = self._container.decode(self._stream)
        self._next()

    def _no_frame(self, seconds: float, cause: str) -> DatasetError:
        self._frame = None
        return DatasetError(
            f"{self.path} has no frame at {seconds:.4f} s: {cause}. The file is damaged, or lacks frames."
        )

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

    def read(
        self, path: Path, seconds: float, tolerance: float, period: float, depth: DepthCoding | None = None
    ) -> Pixels:
        with self._reader(path, lambda reader: not reader.near(seconds, period)) as reader:
            return reader.read(seconds, tolerance, period, depth)

    def frame_times(self, path: Path, fps: float | int | None) -> Float[np.ndarray, " n"]:
        with self._reader(path) as reader:
            return reader.frame_times(fps)

    @contextlib.contextmanager
    def _reader(self, path: Path, cost: Callable[[VideoReader], int] = lambda reader: 0) -> Iterator[VideoReader]:
        """An idle reader of a file, of several that which costs least, or a new one; idle again afterwards."""
        with self._lock:
            readers = (reader for reader in self._idle if reader.path == path)
            found = min(readers, key=cost, default=None)  # or the oldest
            if found is not None:
                del self._idle[found]
        reader = found or VideoReader(path)
        yield reader
        with self._lock:
            self._idle[reader] = None
            surplus = [self._idle.popitem(last=False)[0] for _ in range(len(self._idle) - self._limit)]
        for old in surplus:
            old.close()


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


def video_info(encoder: str, *, height: int, width: int, fps: float | int) -> dict[str, Any]:
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
