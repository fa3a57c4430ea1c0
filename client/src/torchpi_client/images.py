"""JPEG images in requests: a few percent of the bytes, for a few milliseconds and a small error.

Over a cable raw images are faster: 450 kB take 4 ms at 1 Gbit/s. Over a radio link of 50 Mbit/s they take 72 ms. JPEG
is lossy, and the policy may have been trained on uncompressed images; `jpeg_cost` measures size, time and error on
your images.
"""

from __future__ import annotations

import dataclasses
import io
import time
from typing import Any, Callable

import numpy as np

from torchpi_client.protocol import JPEG

QUALITY = 90
MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded; larger ones are refused before anything is allocated."""
MAX_SIDE = 65500
"""Longest side of an image in pixels, as limited by libjpeg."""


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
        observation: its arrays with three axes are the images, uint8 [h, w, 3] or [3, h, w]. Depth, other numbers in
            [h, w, 1] or [1, h, w], stays as it is.
        quality: 1 to 95. Colours keep their full resolution (4:4:4).

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: an array with three axes is no image, there is no image, or a side exceeds `MAX_SIDE` pixels.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"The JPEG quality is {quality}; expected 1 to 95.")
    count = 0

    def encode(key: str, image: np.ndarray) -> dict[str, Any]:
        nonlocal count
        count += 1
        layout = _layout(key, image)
        pixels = np.ascontiguousarray(image if layout == "hwc" else np.moveaxis(image, 0, -1))
        height, width = pixels.shape[:2]
        if max(height, width) > MAX_SIDE:
            raise ValueError(
                f"Cannot send {key} as JPEG: it is {width}×{height} pixels; the largest side of a JPEG is {MAX_SIDE}: "
                "send it uncompressed, or smaller."
            )
        buffer = io.BytesIO()
        # Pillow's default, 4:2:0, would halve the colour resolution.
        _pillow().fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
        return {JPEG: buffer.getvalue(), "layout": layout}

    encoded = _map_images(observation, encode)
    if not count:
        raise ValueError(
            f"There is no image to send as JPEG in the observation with {', '.join(map(str, observation))}."
        )
    return encoded


def decode_images(observation: dict[str, Any], *, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """The inverse of `encode_images`, for servers: each encoded image as a uint8 array in its layout.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: an encoded image is malformed or too large.
    """

    def decode(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _decode_image(key, value, max_pixels) if JPEG in value else _walk(value, decode, f"{key}.")
        return value

    return _walk(observation, decode)


def jpeg_cost(
    observation: dict[str, Any], *, quality: int = QUALITY, timer: Callable[[], float] = time.perf_counter
) -> list[ImageCost]:
    """Bytes, time and error of `encode_images` for each image of an observation; raises as it does."""
    costs: list[ImageCost] = []

    def measure(key: str, image: np.ndarray) -> np.ndarray:
        start = timer()
        encoded = encode_images({"image": image}, quality=quality)
        encode_ms = 1e3 * (timer() - start)
        error = np.abs(decode_images(encoded)["image"].astype(np.int16) - image)
        size = len(encoded["image"][JPEG])
        costs.append(ImageCost(key, image.nbytes, size, encode_ms, float(error.mean()), int(error.max())))
        return image

    _map_images(observation, measure)
    return costs


def _map_images(observation: dict[str, Any], change: Callable[[str, np.ndarray], Any]) -> dict[str, Any]:
    """The tree with `change` applied to all images."""

    def visit(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _walk(value, visit, f"{key}.")
        return change(key, value) if isinstance(value, np.ndarray) and _is_image(value) else value

    return _walk(observation, visit)


def _is_image(array: np.ndarray) -> bool:
    """True for three axes, but for depth."""
    return array.ndim == 3 and (array.dtype == np.uint8 or 1 not in (array.shape[0], array.shape[2]))


def _walk(tree: dict[str, Any], change: Callable[[str, Any], Any], prefix: str = "") -> dict[str, Any]:
    return {key: change(f"{prefix}{key}", value) for key, value in tree.items()}


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
    from PIL import ImageOps

    data, layout = value[JPEG], value.get("layout")
    if set(value) != {JPEG, "layout"} or not isinstance(data, bytes) or layout not in ("hwc", "chw"):
        raise ValueError(f"{key} is no image: expected {{{JPEG!r}: bytes, 'layout': 'hwc' or 'chw'}} alone.")
    try:
        with pillow.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
            if width * height > max_pixels or image.mode != "RGB":
                raise ValueError(f"{width}×{height} pixels in mode {image.mode}; expected at most {max_pixels} in RGB.")
            pixels = np.array(ImageOps.exif_transpose(image))  # as a dataset's images
    # Pillow raises many kinds of errors for damaged files: OSError, SyntaxError, its own DecompressionBombError …
    except Exception as error:
        raise ValueError(f"Cannot decode the JPEG of {key} ({len(data)} bytes): {str(error).rstrip('.')}.") from error
    return pixels if layout == "hwc" else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"JPEG needs Pillow: pip install 'torchpi-client[jpeg]' ({error}).") from error
    return Image
