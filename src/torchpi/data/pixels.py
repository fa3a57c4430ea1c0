"""The pixels of an image file or of a video's frame: upright, as RGB, or as depth in metres."""

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
"""Pillow knows some that run other programs. A JPEG of several pictures (MPO) is opened as JPEG."""
MAX_PIXELS = 2**26
"""Of an image file or a frame, whatever its container says; a compressed one of some kB can have any number."""
_NUM_CODES = 4096
"""LeRobot quantizes depth to 12 bits in videos."""
_CODING = ("depth_min", "depth_max", "shift", "use_log")


def is_depth_map(feature: Mapping[str, Any]) -> bool:
    stated = stated_info(feature)
    return bool(stated.get("is_depth_map") or stated.get("video.is_depth_map"))  # LeRobot's before 0.6


def stated_info(feature: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of a camera's videos and images, as meta/info.json states them."""
    return {**(feature.get("video_info") or {}), **(feature.get("info") or {})}


@dataclasses.dataclass(frozen=True, eq=False)
class DepthCoding:
    """The meaning of a depth camera's numbers."""

    unit: str | None = None
    """One of `UNITS`; None: not stated, which is millimetres for integers and metres for others, as LeRobot records."""
    table: np.ndarray | None = None
    """Metres of a video's codes 0 to 4095; None: it has numbers in the unit."""

    @classmethod
    def of(cls, key: str, feature: Mapping[str, Any]) -> "DepthCoding":
        """The coding that a depth camera's feature states."""
        stated = stated_info(feature)
        unit = stated.get("depth_unit")
        if unit not in (None, *UNITS):
            raise DatasetError(
                f"{lerobot.INFO}: the depth_unit of {key} is {unit!r}; expected one of {', '.join(UNITS)}."
            )
        return cls(unit, _metres_of_codes(key, stated))

    def metres(self, values: np.ndarray) -> Float32[np.ndarray, "h w 1"]:
        """Depth of numbers [h, w] that are no codes."""
        per_metre = UNITS[self.unit or ("m" if values.dtype.kind == "f" else "mm")]
        return (values / per_metre).astype(np.float32)[..., None]


def _metres_of_codes(key: str, stated: Mapping[str, Any]) -> np.ndarray | None:
    """The depth of each code, linear or, as LeRobot 0.6 writes it, in the logarithm of depth + shift.

    Code 0 is depth_min, and stands for pixels without a measurement, too.
    """
    coding: list[Any] = [stated.get(f"video.{name}") for name in _CODING]
    low, high, shift, use_log = coding
    if low is high is use_log is None:
        return None
    shift = shift if use_log else 0
    is_known = isinstance(use_log, bool) and all(isinstance(value, int | float) for value in (low, high, shift))
    if not is_known or not low < high or (use_log and not low + shift > 0):
        raise DatasetError(
            f"{lerobot.INFO}: the depth codes of {key} have {', '.join(_CODING)} {low}, {high}, {shift}, {use_log}; "
            "expected metres, depth_min below depth_max and depth_min + shift above 0, and true or false."
        )
    ends = np.array([low, high], np.float64)
    first, last = np.log(ends + shift) if use_log else ends
    codes = np.linspace(first, last, _NUM_CODES)
    return (np.exp(codes) - shift if use_log else codes).clip(low, high).astype(np.float32)


def image_pixels(file: io.BytesIO, depth: DepthCoding | None = None) -> Pixels:
    """Decode an image file: colours of 16 bits are cut to 8; alpha is left out; grey, palettes and CMYK become RGB.

    A damaged file, or a format that Pillow doesn't read, is an OSError or a SyntaxError, as Pillow has it.
    """
    with Image.open(file, formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(f"The image has {image.width} × {image.height} pixels; expected at most {MAX_PIXELS}.")
        ImageOps.exif_transpose(image, in_place=True)
        is_wide = image.mode in ("I", "F") or image.mode.startswith("I;")
        found = f"is of {'floating-point' if image.mode == 'F' else 'integers of 16 or 32 bits'}, without colour"
        _check_depth(depth, is_wide=is_wide, found=found if is_wide else f"has {image.mode} pixels of 8 bits")
        if depth is not None:
            return depth.metres(np.array(image))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class FramePixels:
    """Converter of the frames of one video, as PyAV decodes them, to pixels; RGB as FFmpeg converts it. Not for several
    threads at once."""

    def __init__(self) -> None:
        # One for all frames: those that frames make of their own cost more time than the conversion.
        self._reformatter = require("av.video.reformatter", "data").VideoReformatter()
        self._turn: np.ndarray | None = None

    def __call__(self, frame: Any, depth: DepthCoding | None = None) -> Pixels:
        if self._turn is None:  # once: a frame that is asked for it is in a reference cycle from then on
            self._turn = _turn(frame)
        name = frame.format.name
        if depth is None:
            _check_depth(None, is_wide=name.startswith("gray") and name != "gray", found=f"is {name}")
            return _turned(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), self._turn)
        wide = re.fullmatch(r"(?:gray|yuv4\d\dp)(12|16)(le|be)", name)
        fits = wide is not None and (wide[1] == "12") == (depth.table is not None)
        _check_depth(depth, is_wide=fits, found=f"is {name}")
        assert wide is not None
        plane = frame.planes[0]
        rows = np.frombuffer(plane, "<u2" if wide[2] == "le" else ">u2").reshape(-1, plane.line_size // 2)
        values = rows[: frame.height, : frame.width]
        metres = depth.metres(values) if depth.table is None else depth.table.take(values, mode="clip")[..., None]
        return _turned(metres, self._turn)


def _check_depth(depth: DepthCoding | None, *, is_wide: bool, found: str) -> None:
    if depth is None and is_wide:
        raise DatasetError(
            f"The image {found}, and {lerobot.INFO} doesn't say what its numbers are. If it is depth, state "
            '"info": {"is_depth_map": true, "depth_unit": "mm"} (or "m") in the camera\'s feature; otherwise store it '
            "with 8 bits."
        )
    if depth is not None and not is_wide:
        raise DatasetError(
            f"{lerobot.INFO} calls it a depth map, but the image {found}; expected integers of 16 bits or "
            "floating-point numbers in the depth_unit, or a video of 16 bits, or of 12-bit codes with depth_min, "
            "depth_max, shift and use_log in its info. A coloured picture of depth is an image: is_depth_map false."
        )


def _turn(frame: Any) -> np.ndarray:
    """The transformation ((a, b), (c, d)) with which a video is to be shown: x' = a x + c y, y' = b x + d y."""
    if (side_data := frame.side_data.get("DISPLAYMATRIX")) is None:
        return np.eye(2)
    turn = np.round(np.frombuffer(side_data, np.int32).reshape(3, 3)[:2, :2] / 2**16, 2)  # 16.16, ISO/IEC 14496-12
    if np.abs(turn).tolist() in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        return turn
    raise DatasetError(
        f"The video is to be shown with the transformation {turn.tolist()}; expected turns by 90 degrees. Encode it "
        "upright."
    )


def _turned(pixels: np.ndarray, turn: np.ndarray) -> np.ndarray:
    (a, b), (c, d) = turn.astype(int).tolist()
    return np.ascontiguousarray(pixels[::d, ::a] if a else pixels.swapaxes(0, 1)[::b, ::c])
