"""Pieces of video files, copied into new files without decoding them."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchpi.extras import require


class VideoCopy:
    """A new .mp4 file of pieces of other ones, each appended behind the last. A context manager."""

    def __init__(self, path: Path, fps: float | int) -> None:
        self.num_frames, self.num_bytes = 0, 0
        self._fps, self._codec, self._out = fps, (), None
        self._container = require("av", "data").open(str(path), "w", format="mp4")

    def __enter__(self) -> "VideoCopy":
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def takes(self, stream: Any) -> bool:
        """True if a stream's packets can follow those that are there: a file has one set of codec parameters."""
        return self._out is None or self._codec == _codec(stream)

    def append(self, stream: Any, packets: Iterable[Any], num_frames: int) -> None:
        """Append packets of a stream, in the order of decoding; the first one is the first frame that is shown."""
        if self._out is None:
            self._codec = _codec(stream)
            self._out = self._container.add_stream_from_template(stream, opaque=True)
        offset: int | None = None
        for packet in packets:
            if offset is None:
                offset = round(self.num_frames / self._fps / stream.time_base) - packet.pts
            packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
            packet.stream = self._out
            self.num_bytes += packet.size
            self._container.mux(packet)
        self.num_frames += num_frames


def concatenate_videos(path: Path, parts: Iterable[tuple[Path, int]], *, fps: float | int) -> None:
    """Join .mp4 files that were encoded alike, each given with its number of frames."""
    with VideoCopy(path, fps) as joined:
        for part, num_frames in parts:
            with require("av", "data").open(str(part)) as source:
                joined.append(source.streams.video[0], all_packets(source), num_frames)


def all_packets(container: Any) -> Iterable[Any]:
    """The packets of a file's video from its position on."""
    return itertools.takewhile(lambda packet: packet.dts is not None, container.demux(container.streams.video[0]))


def packets_between(container: Any, start: float, end: float, num_frames: int) -> list[Any] | None:
    """The packets of the frames shown from `start` to `end`, in seconds of the file, the last one excluded; None if
    these frames can't be decoded by themselves, or are not so many.

    They can if the first one is a keyframe and the others follow it in the order of decoding, with none in between.
    """
    stream = container.streams.video[0]
    half = (end - start) / num_frames / 2
    container.seek(round((start + half) / stream.time_base), stream=stream)
    found = list(itertools.islice(all_packets(container), num_frames + 1))
    inside = [start - half <= packet.pts * stream.time_base < end - half for packet in found]
    whole = inside[:num_frames] == [True] * num_frames and inside[num_frames:] in ([], [False])
    if not (whole and found[0].is_keyframe and found[0].pts == min(packet.pts for packet in found[:num_frames])):
        return None
    return found[:num_frames]


def _codec(stream: Any) -> tuple[Any, ...]:
    context = stream.codec_context
    return context.name, context.width, context.height, context.pix_fmt, stream.time_base, context.extradata
