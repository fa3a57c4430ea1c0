"""Reading and writing video files with PyAV."""

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

# LeRobot's default: every second frame is a keyframe, so that reading any frame decodes at most two.
_GOP = 2
# In order of preference, with their options.
_ENCODERS: dict[str, dict[str, int | str]] = {
    "libsvtav1": {"crf": 30, "preset": 12},
    "libx264": {"crf": 23, "preset": "fast"},
}


class VideoReader:
    """Reader of a video file's frames by time. Sequential reads decode on; others seek to the previous keyframe. Not
    thread-safe; `VideoPool` is."""

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
        # With several threads, decoders delay frames, so that reading a single frame takes longer.
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._pixels = FramePixels()
        self._frames: Any = None
        self._frame: Any = None
        self._keyframe_time = 0.0
        # Longest distance seen between keyframes, in seconds. Within it, decoding on is not slower than a seek.
        self._stride = 0.0

    def near(self, seconds: float, period: float) -> bool:
        """True if a time can be reached by decoding on, without a seek."""
        return self._frame is not None and -period / 8 <= seconds - self._frame.time <= self._stride + period / 2

    def read(self, seconds: float, tolerance: float, period: float, depth: DepthCoding | None = None) -> Pixels:
        """Read the frame nearest to a time, at most `tolerance` seconds off.

        Args:
            period: seconds between two frames. A frame within an eighth of it is taken as the nearest one; otherwise
                the frames before and after the time are compared.
        """
        try:
            if not self.near(seconds, period):
                self._seek(seconds + period / 8)
                if self._frame.time > seconds + period / 8:  # the file's index is off: decode from the start
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
        """The times of all frames in seconds, without decoding: computed from the container's frame count if this fits
        its duration at `fps`, otherwise taken from the packets, which reads the whole file."""
        stream, base = self._stream, float(self._stream.time_base)
        is_counted = fps is not None and stream.frames and stream.duration
        if is_counted and abs(stream.duration * base * fps - stream.frames) <= 0.25:
            return ((stream.start_time or 0) + np.arange(stream.frames) * (stream.duration / stream.frames)) * base
        self._frame = None
        try:
            self._container.seek(0, stream=stream)
            packets = (packet for packet in self._container.demux(stream) if not packet.is_discard)
            times = np.sort(np.array([packet.pts for packet in packets if packet.pts is not None], np.float64)) * base
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
            raise EOFError("it has none" if previous is None else f"the last one is at {previous.time:.4f} s")
        if self._frame.key_frame or previous is None:
            self._keyframe_time = self._frame.time
        step = self._frame.time - previous.time if previous is not None else 0.0
        self._stride = max(self._stride, self._frame.time - self._keyframe_time + step)


class VideoPool:
    """Thread-safe pool of open video files, which keeps at most `limit` idle ones."""

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
        """Borrow the idle reader of a file with the lowest cost, or a new reader."""
        with self._lock:
            readers = (reader for reader in self._idle if reader.path == path)
            idle = min(readers, key=cost, default=None)  # the oldest of equal cost
            if idle is not None:
                del self._idle[idle]
        reader = idle or VideoReader(path)
        yield reader
        with self._lock:
            self._idle[reader] = None
            surplus = [self._idle.popitem(last=False)[0] for _ in range(len(self._idle) - self._limit)]
        for old in surplus:
            old.close()


def default_encoder() -> str:
    """The encoder for new videos: AV1, as in LeRobot, or H.264 if FFmpeg lacks SVT-AV1."""
    return find_encoder(_ENCODERS, advice="; or record images (video=False)")


def find_encoder(encoders: Collection[str], *, advice: str = "") -> str:
    """The first of these encoders that this build of FFmpeg provides."""
    available = require("av", "data").codec.codecs_available
    if found := next((encoder for encoder in encoders if encoder in available), None):
        return found
    names = ", ".join(encoders)
    raise DatasetError(f"This build of PyAV has no video encoder; expected one of {names}{advice}.")


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
    """Write frames, uint8 [h, w, 3] with even h and w, to an .mp4 file; the default options are those for datasets."""
    av = require("av", "data")
    flags = {"movflags": "faststart"} if fast_start else {}
    options = {"g": _GOP, **_ENCODERS[encoder]} if options is None else options
    option_texts = {name: str(value) for name, value in options.items()}
    real_time = _real_time_threads()
    # Without this variable, SVT-AV1 prints thirty lines per video to stderr; 1: errors only.
    with environment_defaults(SVT_LOG="1"), av.open(str(path), "w", format="mp4", options=flags) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=option_texts)
        stream.pix_fmt = "yuv420p"
        if threads:
            stream.codec_context.thread_count = threads
        for number, image in enumerate(frames):
            if number == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            if number == 0:
                # As root, SVT-AV1 gives its own threads and the calling one real-time priority, which starves other
                # programs and is inherited by processes started later.
                for thread in _real_time_threads() - real_time:
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        container.mux(stream.encode(None))


def _real_time_threads() -> set[int]:
    if sys.platform != "linux":
        return set()
    threads = set()
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            if os.sched_getscheduler(thread) == os.SCHED_FIFO:
                threads.add(thread)
    return threads
