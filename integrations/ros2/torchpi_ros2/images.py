"""Conversion of camera messages (sensor_msgs/Image and CompressedImage) to uint8 RGB [h, w, 3] or to depth."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from torchpi_ros2.config import DEPTH_UNITS, IMAGE
from torchpi_ros2.errors import UnusableError

MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded; the server has the same limit."""


def read_image(message: Any, kind: str, depth_unit: str | None = None) -> np.ndarray:
    """Convert a message to an image.

    Args:
        kind: the message's type.
        depth_unit: "m", "cm" or "mm" for a depth camera, None for a colour camera.

    Returns:
        uint8 RGB [h, w, 3]; for a depth camera float64 [h, w] in the unit, NaN where nothing was measured.

    Raises:
        UnusableError: unsupported encoding, inconsistent sizes, or damaged data.
    """
    decode = _raw if kind == IMAGE else _compressed
    pixels = decode(message, depth_unit is not None)
    if depth_unit is None:
        return pixels
    return pixels * DEPTH_UNITS[depth_unit]


def check_image(message: Any, kind: str, depth_unit: str | None = None) -> None:
    """Raise an UnusableError, without decoding, for a message whose encoding or sizes `read_image` refuses."""
    if kind == IMAGE:
        _check_encoding(message.encoding, depth_unit is not None)
        _rows(message)
    else:
        _check_format(message.format, depth_unit is not None)


# ---- sensor_msgs/Image ----


def _raw(message: Any, depth: bool) -> np.ndarray:
    _check_encoding(message.encoding, depth)
    rows = _rows(message)
    if depth:
        return _metres(rows.view(_depth_dtype(message)))
    _, decode = COLOURS[message.encoding]
    return np.ascontiguousarray(decode(rows))


def _rows(message: Any) -> np.ndarray:
    """Bytes of the rows without padding, uint8 [h, w · bytes per pixel]."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    if not 0 < height * width <= MAX_PIXELS:
        raise UnusableError(f"the image has {width}×{height} pixels; expected 1 to {MAX_PIXELS}")
    used = width * _bytes_per_pixel(message.encoding)
    data = np.frombuffer(message.data, np.uint8)
    # The last row may lack its padding.
    if step < used or not step * (height - 1) + used <= data.size <= step * height:
        raise UnusableError(
            f"the image is {width}×{height} in {message.encoding} with step {step} and {data.size} bytes; expected a "
            f"step of {used} or more and {height} rows of it"
        )
    if data.size < step * height:
        data = np.concatenate([data, np.zeros(step * height - data.size, np.uint8)])
    return np.ascontiguousarray(data.reshape(height, step)[:, :used])


def _check_encoding(encoding: str, depth: bool) -> None:
    known, other = (DEPTHS, COLOURS) if depth else (COLOURS, DEPTHS)
    if encoding in known:
        return
    if encoding in other:
        todo = "leave out depth_unit" if depth else "a depth camera has to be declared in the policy"
    elif encoding.startswith("bayer"):
        todo = "subscribe to the debayered image of image_proc"
    elif encoding in ("8UC3", "8UC4"):
        todo = "it does not state the colour order; configure the driver to publish rgb8 or bgr8"
    else:
        todo = "configure the driver to publish one of these, or convert the topic"
    kind = "depth" if depth else "colour"
    raise UnusableError(f"the encoding is {encoding!r}; expected {', '.join(known)} for a {kind} camera: {todo}")


def _bytes_per_pixel(encoding: str) -> int:
    return DEPTHS[encoding].itemsize if encoding in DEPTHS else COLOURS[encoding][0]


def _depth_dtype(message: Any) -> np.dtype[Any]:
    dtype = DEPTHS[message.encoding]
    return dtype.newbyteorder(">" if message.is_bigendian else "<")


def _metres(depth: np.ndarray) -> np.ndarray:
    """Integers are millimetres and 0 is no measurement, floating-point numbers are metres (REP 118)."""
    if depth.dtype.kind != "u":
        return depth.astype(np.float64)
    return np.where(depth > 0, depth.astype(np.float64) / 1000, np.nan)


def _channels(order: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of interleaved channels; `order` has the indices of red, green and blue."""
    count = 3 if max(order) == 2 else 4
    return lambda rows: rows.reshape(len(rows), -1, count)[..., order]


def _grey(rows: np.ndarray) -> np.ndarray:
    return np.repeat(rows[..., None], 3, axis=2)


def _yuv422(luma: int) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of two pixels per four bytes: Y at `luma` and `luma` + 2, U and V in the other two."""

    def decode(rows: np.ndarray) -> np.ndarray:
        if rows.shape[1] % 4:
            raise UnusableError(f"the image is {rows.shape[1] // 2} pixels wide; YUV 4:2:2 needs an even number")
        pairs = rows.reshape(len(rows), -1, 4).astype(np.float32)
        y = pairs[..., luma::2].reshape(len(rows), -1)
        u, v = (np.repeat(pairs[..., 1 - luma + 2 * i], 2, axis=1) - 128 for i in (0, 1))
        # ITU-R BT.601 with Y from 16 to 235, as cameras send and cv_bridge reads.
        y = 255 / 219 * (y - 16)
        rgb = (y + 1.596 * v, y - 0.813 * v - 0.391 * u, y + 2.018 * u)
        return np.rint(np.stack(rgb, axis=-1)).clip(0, 255).astype(np.uint8)

    return decode


COLOURS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "rgb8": (3, _channels([0, 1, 2])),
    "bgr8": (3, _channels([2, 1, 0])),
    "rgba8": (4, lambda rows: rows.reshape(len(rows), -1, 4)[..., :3]),
    "bgra8": (4, lambda rows: rows.reshape(len(rows), -1, 4)[..., 2::-1]),
    "mono8": (1, _grey),
    "8UC1": (1, _grey),
    "uyvy": (2, _yuv422(1)),
    "yuv422": (2, _yuv422(1)),
    "yuyv": (2, _yuv422(0)),
    "yuv422_yuy2": (2, _yuv422(0)),
}
"""Bytes per pixel and decoder of each colour encoding. Each YUV format has a newer and an older name."""

DEPTHS: dict[str, np.dtype[Any]] = {
    "16UC1": np.dtype(np.uint16),
    "mono16": np.dtype(np.uint16),
    "32FC1": np.dtype(np.float32),
}


# ---- sensor_msgs/CompressedImage ----


def _check_format(text: str, depth: bool) -> None:
    """Formats are "jpeg" and "png", or image_transport's "rgb8; jpeg compressed bgr8"."""
    known = ("png",) if depth else ("jpeg", "jpg", "png")
    if "compressedDepth" in text or not any(name in text for name in known):
        todo = "; depth has to be lossless: /compressed with PNG, or the raw topic" if depth else ""
        raise UnusableError(f"the format is {text!r}; expected one with {' or '.join(known)}{todo}")


def _compressed(message: Any, depth: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    _check_format(message.format, depth)
    data = bytes(message.data)
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels; expected at most {MAX_PIXELS}")
            mode = image.mode
            oriented = ImageOps.exif_transpose(image)
            is_deep = mode.startswith("I")
            pixels = np.asarray(oriented if is_deep else oriented.convert("RGB"))
    # Pillow raises many kinds of errors for damaged files: OSError, SyntaxError, ValueError …
    except Exception as error:
        raise UnusableError(f"cannot decode {len(data)} bytes of {message.format!r}: {error}") from error
    if is_deep != depth:
        raise UnusableError(
            f"the image has {'16 bits of one channel' if is_deep else f'mode {mode}'}; expected "
            f"{'depth in 16 bits' if depth else '8 bits per channel; depth cameras have to be declared'}"
        )
    if depth:
        return _metres(pixels.astype(np.uint16))
    return np.ascontiguousarray(pixels[..., ::-1]) if _is_swapped(message.format) else pixels


def _is_swapped(text: str) -> bool:
    """True if red and blue are swapped in the file. image_transport's encoder expects BGR; its publishers state after
    "compressed" the format that they passed to it."""
    encoding, separator, rest = text.partition(";")
    colours = encoding.strip() in ("rgb8", "bgr8", "rgba8", "bgra8")
    return bool(separator) and colours and "compressed bgr" not in rest
