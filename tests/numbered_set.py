"""Datasets whose frames have their number, 1000 × episode + frame, drawn into the pixels of every camera."""

import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot

FRONT = "observation.images.front"
WRIST = "observation.images.wrist"
V21 = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
JOINTS = ("j0", "j1", "j2", "j3")


def draw(number: int) -> np.ndarray:
    """An image of 64 × 96 pixels, in which each of 24 blocks is a bit of the number."""
    bits = np.array([number >> i & 1 for i in range(24)]).reshape(4, 6)
    return np.repeat((np.kron(bits, np.ones((16, 16))) * 205 + 25).astype(np.uint8)[..., None], 3, axis=2)


def read_number(image: np.ndarray) -> int:
    blocks = image[..., 0].reshape(4, 16, 6, 16)[:, 4:12, :, 4:12].mean(axis=(1, 3)) > 128
    return int(sum(1 << i for i, bit in enumerate(blocks.ravel()) if bit))


def encode(
    path: pathlib.Path, numbers: Sequence[int], fps: float | Fraction, times: Sequence[float] | None = None
) -> None:
    """A video of drawn numbers, H.264 with frames that refer to later ones; `times` of the frames, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000), options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 10_000)
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 10_000), Fraction(1, 10_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_set(
    root: pathlib.Path,
    lengths: Sequence[int] = (20, 15, 25),
    *,
    fps: float = 10,
    clock: Callable[[int, np.ndarray], np.ndarray] = lambda episode, seconds: seconds,
    clock_type: str = "float32",
    version: str = "v3.0",
    kind: str = "video",
    cameras: Sequence[str] = (FRONT,),
    order: Sequence[int] | None = None,
    rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    videos: Mapping[str, Mapping[str, Any]] | None = None,
) -> pathlib.Path:
    """Write a dataset of format v3.0, in one file, or v2.1.

    Args:
        clock: the timestamps of an episode, from the times since its first frame.
        order: of the episodes in the videos; by default that of their numbers.
        rows: may change the rows of meta/episodes.
        videos: per camera arguments of `encode` that differ.
    """
    (root / "meta").mkdir(parents=True)
    is_v3 = version == "v3.0"
    paths = {"data_path": lerobot.DATA_PATH, "video_path": lerobot.VIDEO_PATH} if is_v3 else V21
    features = {key: {"dtype": kind, "shape": [64, 96, 3]} for key in cameras}
    features |= {
        key: {"dtype": "float32", "shape": [4], "names": list(JOINTS)} for key in ("observation.state", "action")
    }
    info = {"codebase_version": version, "fps": fps, "features": features, **paths}
    (root / lerobot.INFO).write_text(json.dumps(info))
    tables = [
        _table(e, length, fps, clock, clock_type, cameras if kind == "image" else ())
        for e, length in enumerate(lengths)
    ]
    numbers = [[1000 * e + f for f in range(length)] for e, length in enumerate(lengths)]
    meta = [{"episode_index": e, "tasks": ["push it"], "length": length} for e, length in enumerate(lengths)]
    if not is_v3:
        for e, table in enumerate(tables):
            _write(table, root / V21["data_path"].format(episode_chunk=0, episode_index=e))
            for key in cameras if kind == "video" else ():
                path = root / V21["video_path"].format(episode_chunk=0, episode_index=e, video_key=key)
                encode(path, **{"numbers": numbers[e], "fps": fps} | dict((videos or {}).get(key, {})))
        (root / lerobot.EPISODES_JSONL).write_text("".join(json.dumps(row) + "\n" for row in meta))
        (root / lerobot.TASKS_JSONL).write_text('{"task_index": 0, "task": "push it"}\n')
        return root
    start, in_file = 0, list(order or range(len(lengths)))
    for e in in_file:
        meta[e] |= {f"data/{name}": 0 for name in ("chunk_index", "file_index")}
        for key in cameras if kind == "video" else ():
            meta[e] |= {f"videos/{key}/{name}": 0 for name in ("chunk_index", "file_index")}
            span = {"from_timestamp": start / fps, "to_timestamp": (start + lengths[e]) / fps}
            meta[e] |= {f"videos/{key}/{name}": seconds for name, seconds in span.items()}
        start += lengths[e]
    rows(meta)
    _write(pa.concat_tables(tables), root / lerobot.DATA_PATH.format(chunk_index=0, file_index=0))
    _write(pa.Table.from_pylist(meta), root / lerobot.EPISODES_PATH.format(chunk_index=0, file_index=0))
    _write(pa.table({"task_index": [0], "task": ["push it"]}), root / lerobot.TASKS_PARQUET)
    for key in cameras if kind == "video" else ():
        drawn = {"numbers": [number for e in in_file for number in numbers[e]], "fps": fps}
        path = root / lerobot.VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
        encode(path, **drawn | dict((videos or {}).get(key, {})))
    return root


def wrong_frames(dataset: LeRobotDataset) -> list[tuple[int, int]]:
    """The frames of a dataset that show another number than theirs: found and expected."""
    numbers = [
        1000 * e + f for e, n in zip(dataset.episode_indices, dataset.episode_lengths, strict=True) for f in range(n)
    ]
    found = [(read_number(dataset[i][key]), number) for i, number in enumerate(numbers) for key in dataset.camera_keys]
    return [pair for pair in found if pair[0] != pair[1]]


def _table(episode: int, length: int, fps: float, clock: Any, clock_type: str, images: Sequence[str]) -> pa.Table:
    frame = np.arange(length)
    joints = np.sin(0.1 * frame[:, None] + np.arange(4)) + episode
    columns = {
        "observation.state": pa.array(joints.tolist(), pa.list_(pa.float32())),
        "action": pa.array((joints + 0.1).tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array(clock(episode, frame / fps)).cast(clock_type, safe=False),
        "frame_index": frame,
        "episode_index": np.full(length, episode),
        "index": 1000 * episode + frame,
        "task_index": np.zeros(length, np.int64),
    }
    for key in images:
        shown = [{"bytes": _png(draw(1000 * episode + f)), "path": None} for f in range(length)]
        columns[key] = pa.array(shown, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _write(table: pa.Table, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
