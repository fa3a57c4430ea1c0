"""JPEG images in requests: a few percent of the bytes, at the cost of a few milliseconds and a small error.

Over a cable raw images are faster: 450 kB take 4 ms at 1 Gbit/s. Over a radio link of 50 Mbit/s they take 72 ms. JPEG
is lossy, and the policy may have been trained on uncompressed images. `jpeg_cost` measures size, time and error for
your images.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import time
from typing import Any, Callable, Iterator

import numpy as np

from torchpi_client.protocol import JPEG, PNG

QUALITY = 90
MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded. Larger ones are refused before anything is allocated."""
MAX_SIDE = 65500
"""Longest side of an image in pixels, a limit of libjpeg."""
MAX_SCANS = 32
"""Scans per JPEG. libjpeg writes at most ten. An empty scan has a few bytes, but decoding it takes as long as the whole
image."""
MAX_SEGMENTS = 1000
"""Segments per JPEG."""
MAX_METADATA = 2**20
"""Bytes of a JPEG besides its scans: tables, colour profile, Exif."""
MAX_CHUNKS = 10_000
"""Chunks per PNG. Encoders write several kilobytes of pixels into each."""

# JPEG markers (ITU T.81, table B.1). _FRAMES has the largest number of pixels that one byte can encode: a block of
# 8 × 8 pixels takes at least one bit in the first scan of a progressive image, and two bits in other images. Cameras
# use neither arithmetic coding nor the remaining kinds of frames.
_FRAMES = {0xC0: 256, 0xC1: 256, 0xC2: 512}
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_NEEDED = (*_FRAMES, 0xC4, _SCAN, 0xDB, 0xDD, 0xE0, 0xEE)
"""Frame, Huffman tables, scan, quantization tables, restart interval; JFIF and Adobe state the colour space."""
_IGNORED = (*range(0xE1, 0xF0), 0xFE)
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Next marker that is not part of a scan."""
_OTHER_BYTES = bytes(range(64, 192))
_TRANSPOSES = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"),
    *("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)
"""Pillow's names for the Exif orientations 2 to 8."""


@dataclasses.dataclass(frozen=True)
class ImageCost:
    """The cost of JPEG for one image."""

    key: str
    """The image's key in the observation, nested keys joined by '.'."""
    raw_bytes: int
    jpeg_bytes: int
    encode_ms: float
    mean_error: float
    """Mean absolute difference of the decoded image, in levels of 255."""
    max_error: int

    def __str__(self) -> str:
        return (
            f"{self.key}: {self.raw_bytes / 1e3:.0f} kB raw, {self.jpeg_bytes / 1e3:.0f} kB as JPEG, "
            f"{self.encode_ms:.1f} ms to encode, error {self.mean_error:.2f} of 255 on average, "
            f"{self.max_error} at most"
        )


def encode_images(observation: dict[str, Any], *, quality: int = QUALITY) -> dict[str, Any]:
    """A copy of the observation with each image as {"torchpi/jpeg": bytes, "layout": "hwc" or "chw"}.

    Args:
        observation: arrays with three axes are images, uint8 [h, w, 3] or [3, h, w]. Depth ([h, w, 1] or [1, h, w],
            not uint8) is not changed.
        quality: 1 to 95. Colours keep their full resolution (4:4:4).

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: an array with three axes is no image, there is no image, or a side exceeds `MAX_SIDE` pixels.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"The JPEG quality is {quality}; expected 1 to 95.")
    num_images = 0

    def encode(key: str, value: Any) -> Any:
        nonlocal num_images
        if not _is_image(value):
            return value
        num_images += 1
        return _encode_image(key, value, quality)

    encoded = _map_values(observation, encode)
    if not num_images:
        raise ValueError(
            f"There is no image to send as JPEG in the observation with {', '.join(map(str, observation))}."
        )
    return encoded


def decode_images(observation: dict[str, Any], *, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """The inverse of `encode_images`, for servers: each image as JPEG or PNG becomes a uint8 array in its layout.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: an encoded image is malformed, too large, or decoding it would be too expensive for its size.
    """
    return _map_values(
        observation, lambda key, value: _decode_image(key, value, max_pixels) if _is_encoded(value) else value
    )


def jpeg_cost(
    observation: dict[str, Any], *, quality: int = QUALITY, timer: Callable[[], float] = time.perf_counter
) -> list[ImageCost]:
    """Bytes, time and error of `encode_images` for each image of an observation; raises as it does."""
    costs: list[ImageCost] = []

    def measure(key: str, image: Any) -> Any:
        if _is_image(image):
            start = timer()
            encoded = encode_images({"image": image}, quality=quality)
            encode_ms = 1e3 * (timer() - start)
            error = np.abs(decode_images(encoded)["image"].astype(np.int16) - image)
            size = len(encoded["image"][JPEG])
            costs.append(ImageCost(key, image.nbytes, size, encode_ms, float(error.mean()), int(error.max())))
        return image

    _map_values(observation, measure)
    return costs


def _map_values(tree: dict[str, Any], change: Callable[[str, Any], Any], prefix: str = "") -> dict[str, Any]:
    """A copy with `change(key, value)` for each value; nested keys are joined by '.', encoded images are values."""
    return {
        key: _map_values(value, change, f"{prefix}{key}.")
        if isinstance(value, dict) and not _is_encoded(value)
        else change(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def _is_encoded(value: Any) -> bool:
    return isinstance(value, dict) and (JPEG in value or PNG in value)


def _is_image(value: Any) -> bool:
    """True for an array with three axes, except depth."""
    if not isinstance(value, np.ndarray) or value.ndim != 3:
        return False
    return value.dtype == np.uint8 or 1 not in (value.shape[0], value.shape[2])


def _encode_image(key: str, image: np.ndarray, quality: int) -> dict[str, Any]:
    layout = _layout(key, image)
    pixels = np.ascontiguousarray(image if layout == "hwc" else np.moveaxis(image, 0, -1))
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"Cannot send {key} as JPEG: it is {width}×{height} pixels; the largest side of a JPEG is {MAX_SIDE}: "
            "send it uncompressed, or smaller."
        )
    buffer = io.BytesIO()
    # Pillow's default subsampling, 4:2:0, would halve the colour resolution.
    _pillow().fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return {JPEG: buffer.getvalue(), "layout": layout}


def _layout(key: str, image: np.ndarray) -> str:
    if image.dtype == np.uint8 and image.size:
        if image.shape[-1] == 3:
            return "hwc"
        if image.shape[0] == 3:
            return "chw"
    raise ValueError(
        f"Cannot send {key} as JPEG: it is {image.dtype} {list(image.shape)}; expected uint8 [h, w, 3] or [3, h, w]."
    )


def _decode_image(key: str, value: dict[str, Any], max_pixels: int) -> np.ndarray:
    pillow = _pillow()
    field, name = (JPEG, "JPEG") if JPEG in value else (PNG, "PNG")
    data, layout = value[field], value.get("layout")
    if set(value) != {field, "layout"} or not isinstance(data, bytes) or layout not in ("hwc", "chw"):
        raise ValueError(
            f"{key:.80} is no valid image: expected {{{field!r}: bytes, 'layout': 'hwc' or 'chw'}} and no other keys."
        )
    try:
        parts, orientation = _jpeg_parts(data, max_pixels) if field == JPEG else (_png_parts(data), 1)
        with pillow.open(io.BytesIO(b"".join(parts)), formats=[name]) as image:
            if image.mode != "RGB" or image.width * image.height > max_pixels:
                found = f"{image.width}×{image.height} pixels in mode {image.mode}"
                raise ValueError(f"{found}; expected RGB, and at most {max_pixels} pixels")
            upright = image.transpose(pillow.Transpose[_TRANSPOSES[orientation - 2]]) if orientation > 1 else image
            pixels = np.array(upright)  # as the images of datasets are read
            if field == JPEG:  # for a truncated PNG, Pillow raises an error itself
                _check_complete(parts, image)
    # Pillow raises many kinds of errors for damaged files: OSError, SyntaxError, its own DecompressionBombError …
    except Exception as error:
        reason = f"{error}".rstrip(".")
        raise ValueError(f"Cannot decode the {name} of {key:.80} ({len(data)} bytes): {reason:.200}.") from error
    return pixels if layout == "hwc" else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def _jpeg_parts(data: bytes, max_pixels: int) -> tuple[list[bytes], int]:
    """The parts of a JPEG that determine its pixels, and its Exif orientation.

    Raises an error if decoding would be too expensive for the image's size. Only headers are read for this.
    """
    frame, num_pixels, num_scans, scan_bytes, orientation = 0, 0, 0, 0, 0
    parts = [data[:2]]
    for index, (marker, start, header_end, end) in enumerate(_segments(data)):
        num_scans, scan_bytes = num_scans + (marker == _SCAN), scan_bytes + end - header_end
        if index >= MAX_SEGMENTS or num_scans > MAX_SCANS or end - scan_bytes > MAX_METADATA:
            limits = f"{MAX_SCANS} scans, {MAX_SEGMENTS} segments, or {MAX_METADATA} bytes besides the scans"
            raise ValueError(f"it has more than {limits}")
        if marker not in _NEEDED + _IGNORED or (frame and marker in _FRAMES):
            raise ValueError(f"it has a segment {marker:#x}; expected one image, baseline or progressive")
        if marker in _NEEDED:
            parts.append(data[start:end])
        if marker in _FRAMES:
            height, width = (int.from_bytes(data[start + i : start + i + 2], "big") for i in (5, 7))
            frame, num_pixels = marker, width * height
        elif marker == _EXIF and not orientation and data[start + 4 : start + 10] == b"Exif\0\0":
            orientation = _orientation(data[start + 10 : header_end])
    if not frame or not num_scans:
        raise ValueError("it contains no image")
    possible = _FRAMES[frame] * scan_bytes
    if num_pixels > min(max_pixels, possible):
        limits = f"at most {max_pixels}, and its {scan_bytes} bytes hold at most {possible}"
        raise ValueError(f"its header has {width}×{height} pixels; expected {limits}")
    return [*parts, data[end : end + 2]], orientation


def _png_parts(data: bytes) -> list[bytes]:
    """The parts of a PNG that determine its pixels. Other chunks may unpack to a thousand times their size."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("it does not begin as a PNG file")
    parts, start = [data[:8]], 8
    for _ in range(MAX_CHUNKS):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(data[start:end])
        if end >= len(data):
            return parts
        start = end
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _check_complete(parts: list[bytes], image: Any) -> None:
    """Raise an error for a truncated JPEG.

    libjpeg silently fills missing data with the last colour. So if the last block has a single colour, the image is
    decoded again with other bytes appended to its scans: if they change any pixel, data was missing.
    """
    left, top = (max((side - 1) // 8 * 8, side - 4) for side in image.size)
    if any(low != high for low, high in image.crop((left, top, *image.size)).getextrema()):
        return
    padded = [part + _OTHER_BYTES if part[:2] == b"\xff\xda" else part for part in parts]
    with _pillow().open(io.BytesIO(b"".join(padded)), formats=["JPEG"]) as other:
        if other.tobytes() != image.tobytes():
            raise ValueError("its data end before the image is complete")


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """The segments of a JPEG: marker, start, end of the header and end. Only a scan has data behind its header."""
    if data[:3] != b"\xff\xd8\xff":
        raise ValueError("it does not begin as a JPEG file")
    match = _MARKER.search(data, 2)
    while match is not None and data[match.start() + 1] != _END:
        marker = data[match.start() + 1]
        header_end = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
        following = _MARKER.search(data, header_end)
        end = len(data) if following is None else following.start()
        yield marker, match.start(), header_end, end if marker == _SCAN else min(header_end, end)
        match = following


def _orientation(tiff: bytes) -> int:
    """The orientation in the first directory of Exif data, 1 to 8; 1 if there is none."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for i in range(num_entries):
            tag, field_type, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * i)
            if (tag, field_type) == (0x0112, 3):
                return value if 1 <= value <= 8 else 1
    except struct.error:  # damaged; Pillow ignores it too
        pass
    return 1


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"JPEG needs Pillow: pip install 'torchpi-client[jpeg]' ({error}).") from error
    return Image
