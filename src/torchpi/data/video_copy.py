"""Copying of parts of video files into new files, without decoding."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchpi.extras import require


def concatenate_videos(path: Path, parts: Iterable[tuple[Path, int]], *, fps: float | int) -> None:
    """Concatenate .mp4 files with the same `codec_of`, each given with its number of frames."""
    av = require("av", "data")
    with av.open(str(path), "w", format="mp4") as container:
        out: Any = None
        first_frame = 0
        for part, num_frames in parts:
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                out = out or container.add_stream_from_template(stream, opaque=True)
                _mux(container, out, _packets(source), round(first_frame / fps / stream.time_base))
            first_frame += num_frames


def cut_video(path: Path, source: Path, start: float, *, num_frames: int, fps: float | int) -> bool:
    """Copy `num_frames` frames, from the time `start` in seconds, to a new .mp4 file.

    Returns:
        False if they can't be decoded on their own: the first must be a keyframe, and the others must follow it in
        decoding order without other frames in between.
    """
    av = require("av", "data")
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        container.seek(round((start + 0.5 / fps) / stream.time_base), stream=stream)
        packets = list(itertools.islice(_packets(container), num_frames + 1))
        numbers = [round((packet.pts * stream.time_base - start) * fps) for packet in packets]
        inside = [0 <= number < num_frames for number in numbers]
        is_contiguous = inside[:num_frames] == [True] * num_frames and inside[num_frames:] in ([], [False])
        if not (is_contiguous and packets[0].is_keyframe and numbers[0] == 0):
            return False
        with av.open(str(path), "w", format="mp4") as target:
            out = target.add_stream_from_template(stream, opaque=True)
            _mux(target, out, packets[:num_frames], -packets[0].pts)
    return True


def codec_of(path: Path) -> str:
    """Codec parameters of a video. Only videos with the same ones can be concatenated."""
    with require("av", "data").open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        sizes = context.name, context.width, context.height, context.pix_fmt, stream.time_base
        rotation = next(container.decode(stream)).side_data.get("DISPLAYMATRIX")
        return repr((*sizes, context.extradata, None if rotation is None else bytes(rotation)))


def _packets(container: Any) -> Iterator[Any]:
    """The remaining packets of a file's video, in decoding order."""
    return itertools.takewhile(lambda packet: packet.dts is not None, container.demux(container.streams.video[0]))


def _mux(container: Any, out: Any, packets: Iterable[Any], offset: int) -> None:
    for packet in packets:
        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
        packet.stream = out
        container.mux(packet)
