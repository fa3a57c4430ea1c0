"""Small datasets with given images or videos."""

import io
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from torchpi.data import LeRobotWriter

CAMERA = "observation.images.front"
HEIGHT, WIDTH = 32, 48


def some_depth(height=HEIGHT, width=WIDTH):
    """Depth in mm with different values, and zeros for missing measurements."""
    depth = (np.arange(height * width).reshape(height, width) % 3000 + 200).astype(np.uint16)
    depth[:4, :5] = 0
    return depth


def some_picture(height=HEIGHT, width=WIDTH):
    """A dark image with a bright patch at the top left and a green one at the top right."""
    picture = np.full((height, width, 3), 20, np.uint8)
    picture[:8, :16] = 230
    picture[:8, -8:, 1] = 200
    return picture


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array, *, order="<"):
    """A TIFF of one channel, also in formats that Pillow can read but not write."""
    form = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    height, width = array.shape
    tags = {256: width, 257: height, 258: 8 * array.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: form}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def write_set(path, *, images=None, video=None, info=None, camera="front"):
    """Write a dataset of two frames whose camera has the given encoded images, or the given encoded video."""
    with LeRobotWriter(
        path, fps=10, cameras={camera: (HEIGHT, WIDTH, 3)}, state_names=["a"], action_names=["a"], video=bool(video)
    ) as writer:
        for i in range(2):
            image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            writer.add_frame(
                {f"observation.images.{camera}": image, "observation.state": np.full(1, i), "action": np.zeros(1)}
            )
        writer.save_episode("go")
    key = f"observation.images.{camera}"
    document = json.loads((path / "meta/info.json").read_text())
    if info is not None:
        document["features"][key]["info"] = info
    (path / "meta/info.json").write_text(json.dumps(document))
    if video:
        (path / f"videos/{key}/chunk-000/file-000.mp4").write_bytes(video)
    else:
        file = path / "data/chunk-000/file-000.parquet"
        table = pq.read_table(file)
        column = pa.array([{"bytes": data, "path": None} for data in images], table.schema.field(key).type)
        pq.write_table(table.set_column(table.column_names.index(key), key, column), file)
    return path


def encoded_video(planes, pix_fmt):
    """A lossless video with the given first planes [h, w]; all other planes have the middle of their range."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pix_fmt
        for number, plane in enumerate(planes):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            for empty in frame.planes:
                empty.update(np.full(empty.buffer_size // 2, 2048, np.uint16).tobytes())
            rows = np.zeros((stream.height, frame.planes[0].line_size // plane.itemsize), plane.dtype)
            rows[:, : stream.width] = plane
            frame.planes[0].update(rows.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def turned_video(picture, matrix):
    """An .mp4 of two equal frames whose track header has the transformation ((a, b), (c, d))."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(buffer.getvalue())
    start = data.index(b"tkhd") + 44  # after version, times, duration, layer and volume
    (a, b), (c, d) = (np.asarray(matrix) * 2**16).astype(int).tolist()
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)
