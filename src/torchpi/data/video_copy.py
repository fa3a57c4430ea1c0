"""Parts of video files, copied into new files without decoding them."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchpi.extras import require


def concatenate_videos(path: Path, parts: Iterable[tuple[Path, int]], *, fps: float | int) -> None:
    """Join .mp4 files that were encoded alike, each given with its number of frames."""
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
    """Copy the frames from a time on, in seconds, into a new .mp4 file; False if they can't be decoded by themselves.

    They can if the first one is a keyframe and the others follow it in the order of decoding, with none in between.
    """
    av = require("av", "data")
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        container.seek(round((start + 0.5 / fps) / stream.time_base), stream=stream)
        found = list(itertools.islice(_packets(container), num_frames + 1))
        numbers = [round((packet.pts * stream.time_base - start) * fps) for packet in found]
        inside = [0 <= number < num_frames for number in numbers]
        whole = inside[:num_frames] == [True] * num_frames and inside[num_frames:] in ([], [False])
        if not (whole and found[0].is_keyframe and numbers[0] == 0):
            return False
        with av.open(str(path), "w", format="mp4") as target:
            out = target.add_stream_from_template(stream, opaque=True)
            _mux(target, out, found[:num_frames], -found[0].pts)
    return True


def codec_of(path: Path) -> str:
    """The parameters that videos have to share to be joined."""
    with require("av", "data").open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        sizes = context.name, context.width, context.height, context.pix_fmt, stream.time_base
        turn = next(container.decode(stream)).side_data.get("DISPLAYMATRIX")
        return repr((*sizes, context.extradata, None if turn is None else bytes(turn)))


def _packets(container: Any) -> Iterator[Any]:
    """The packets of a file's video from its position on, in the order of decoding."""
    return itertools.takewhile(lambda packet: packet.dts is not None, container.demux(container.streams.video[0]))


def _mux(container: Any, out: Any, packets: Iterable[Any], offset: int) -> None:
    for packet in packets:
        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
        packet.stream = out
        container.mux(packet)
