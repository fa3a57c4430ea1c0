"""Pixels of image files and video frames: upright, as RGB or as depth in metres."""

import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from torchpi.data import format as lerobot
from torchpi.errors import DatasetError
from torchpi.extras import require
from torchpi.transforms.depth import UNITS

Pixels = UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 1"]

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")
"""Image formats that are read; some of Pillow's others run external programs. MPO files are opened as JPEG."""
MAX_PIXELS = 2**26
"""Limit per image or frame: a compressed file of a few kB can decode to any number of pixels."""
_NUM_CODES = 4096
"""Number of depth codes in videos, which LeRobot quantizes to 12 bits."""
_CODING = ("depth_min", "depth_max", "shift", "use_log")


def is_depth_map(feature: Mapping[str, Any]) -> bool:
    info = stated_info(feature)
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))  # the latter before LeRobot 0.6


def stated_info(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of a camera's videos and images in meta/info.json."""
    return {**(feature.get("video_info") or {}), **(feature.get("info") or {})}


@dataclasses.dataclass(frozen=True, eq=False)
class DepthCoding:
    """Encoding of a depth camera's numbers."""

    unit: str | None = None
    """One of `UNITS`; None if not stated: then integers are millimetres and others metres, as in LeRobot."""
    table: np.ndarray | None = None
    """Depth in metres of a video's codes 0 to 4095; None if the numbers are in the unit."""

    @classmethod
    def of(cls, key: str, feature: Mapping[str, Any]) -> "DepthCoding":
        """The coding stated in a depth camera's feature."""
        info = stated_info(feature)
        unit = info.get("depth_unit")
        if unit not in (None, *UNITS):
            raise DatasetError(
                f"{lerobot.INFO}: the depth_unit of {key} is {unit!r}; expected one of {', '.join(UNITS)}."
            )
        return cls(unit, _metres_of_codes(key, info))

    def metres(self, values: np.ndarray) -> Float32[np.ndarray, "h w 1"]:
        """Convert numbers [h, w] in the unit to metres."""
        per_metre = UNITS[self.unit or ("m" if values.dtype.kind == "f" else "mm")]
        return (values / per_metre).astype(np.float32)[..., None]


def _metres_of_codes(key: str, info: Mapping[str, Any]) -> np.ndarray | None:
    """Depth of each code, linear or, as written by LeRobot 0.6, in the logarithm of depth + shift.

    Code 0 is depth_min, and also marks pixels without a measurement.
    """
    coding: list[Any] = [info.get(f"video.{name}") for name in _CODING]
    low, high, shift, use_log = coding
    if low is high is use_log is None:
        return None
    shift = shift if use_log else 0
    is_typed = isinstance(use_log, bool) and all(isinstance(value, int | float) for value in (low, high, shift))
    if not is_typed or not low < high or (use_log and not low + shift > 0):
        raise DatasetError(
            f"{lerobot.INFO}: the depth codes of {key} have {', '.join(_CODING)} {low}, {high}, {shift}, {use_log}; "
            "expected metres with depth_min < depth_max and depth_min + shift > 0, and use_log true or false."
        )
    ends = np.array([low, high], np.float64)
    first, last = np.log(ends + shift) if use_log else ends
    codes = np.linspace(first, last, _NUM_CODES)
    return (np.exp(codes) - shift if use_log else codes).clip(low, high).astype(np.float32)


def image_pixels(file: io.BytesIO, depth: DepthCoding | None = None) -> Pixels:
    """Decode an image file. 16-bit colours are reduced to 8 bits, alpha is dropped; grey, palettes and CMYK become RGB.

    Raises:
        OSError, SyntaxError: Pillow's errors about damaged files and unknown formats.
    """
    with Image.open(file, formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(f"The image has {image.width} × {image.height} pixels; expected at most {MAX_PIXELS}.")
        ImageOps.exif_transpose(image, in_place=True)
        is_wide = image.mode in ("I", "F") or image.mode.startswith("I;")
        found = f"has {image.mode} pixels of 8 bits"
        if is_wide:
            found = f"has {'floating-point' if image.mode == 'F' else '16-bit or 32-bit integer'} pixels without colour"
        _check_depth(depth, is_wide=is_wide, found=found)
        if depth is not None:
            return depth.metres(np.array(image))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class FramePixels:
    """Converter of one video's decoded PyAV frames to pixels, with FFmpeg's conversion to RGB. Not thread-safe."""

    def __init__(self) -> None:
        # Shared by all frames: creating one per frame takes longer than the conversion.
        self._reformatter = require("av.video.reformatter", "data").VideoReformatter()
        self._rotation: np.ndarray | None = None

    def __call__(self, frame: Any, depth: DepthCoding | None = None) -> Pixels:
        if self._rotation is None:  # read once, because reading it creates a reference cycle in the frame
            self._rotation = _rotation(frame)
        name = frame.format.name
        if depth is None:
            _check_depth(None, is_wide=name.startswith("gray") and name != "gray", found=f"is {name}")
            return _rotated(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), self._rotation)
        wide = re.fullmatch(r"(?:gray|yuv4\d\dp)(12|16)(le|be)", name)
        fits = wide is not None and (wide[1] == "12") == (depth.table is not None)
        _check_depth(depth, is_wide=fits, found=f"is {name}")
        assert wide is not None
        plane = frame.planes[0]
        rows = np.frombuffer(plane, "<u2" if wide[2] == "le" else ">u2").reshape(-1, plane.line_size // 2)
        values = rows[: frame.height, : frame.width]
        metres = depth.metres(values) if depth.table is None else depth.table.take(values, mode="clip")[..., None]
        return _rotated(metres, self._rotation)


def _check_depth(depth: DepthCoding | None, *, is_wide: bool, found: str) -> None:
    if depth is None and is_wide:
        raise DatasetError(
            f"The image {found}, and {lerobot.INFO} doesn't state what its numbers mean. If it is depth, state "
            '"info": {"is_depth_map": true, "depth_unit": "mm"} (or "m") in the camera\'s feature; otherwise store it '
            "with 8 bits."
        )
    if depth is not None and not is_wide:
        raise DatasetError(
            f"{lerobot.INFO} calls it a depth map, but the image {found}; expected 16-bit integers or floating-point "
            "numbers in the depth_unit, or a video of 16 bits, or of 12-bit codes with depth_min, depth_max, shift and "
            "use_log in its info. A colour rendering of depth is an ordinary image: is_depth_map false."
        )


def _rotation(frame: Any) -> np.ndarray:
    """The display transformation ((a, b), (c, d)) of a video: x' = a x + c y, y' = b x + d y."""
    if (side_data := frame.side_data.get("DISPLAYMATRIX")) is None:
        return np.eye(2)
    matrix = np.round(np.frombuffer(side_data, np.int32).reshape(3, 3)[:2, :2] / 2**16, 2)  # 16.16, ISO/IEC 14496-12
    if np.abs(matrix).tolist() in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        return matrix
    raise DatasetError(
        f"The video has the display transformation {matrix.tolist()}; expected rotations by multiples of 90 degrees. "
        "Encode it upright."
    )


def _rotated(pixels: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    (a, b), (c, d) = rotation.astype(int).tolist()
    return np.ascontiguousarray(pixels[::d, ::a] if a else pixels.swapaxes(0, 1)[::b, ::c])
