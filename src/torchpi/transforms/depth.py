"""Mapping of depth images to the RGB images that the model reads; it is part of the policy."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8

from torchpi.errors import EmbodimentError, TransformError

UNITS = {"m": 1, "cm": 100, "mm": 1000}
"""Depth units, with their number per metre."""
DEPTH_DTYPES = ("uint16", "float32", "any")
COLORMAPS = ("grey", "jet")


@dataclasses.dataclass(frozen=True)
class DepthMapping:
    """Colours for depths from near to far: black to white, or a colour map.

    Pixels beyond `far` get its colour. Pixels nearer than `near`, and zero, negative or NaN (cameras send these where
    they measure nothing), are black.

    Raises:
        ValueError: near isn't less than far; unknown unit or colour map.
    """

    near: float | int
    """Metres, at least 0."""
    far: float | int
    """Metres."""
    unit: str
    """Unit that the robot sends: "m", "cm" or "mm"."""
    colormap: str = "grey"
    """"grey" (black to white) or "jet" (blue, cyan, yellow, red)."""

    def __post_init__(self) -> None:
        if not 0 <= self.near < self.far < math.inf:
            raise EmbodimentError(f"depth: near is {self.near} and far {self.far}; expected metres, 0 <= near < far.")
        for field, allowed in (("unit", tuple(UNITS)), ("colormap", COLORMAPS)):
            if getattr(self, field) not in allowed:
                raise EmbodimentError(
                    f"depth: {field} is {getattr(self, field)!r}; expected one of {', '.join(allowed)}."
                )

    def read(self, image: Any, *, layout: str, dtype: str, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """Map a depth image to RGB.

        Args:
            image: [h, w], or [h, w, 1] for layout "hwc", or [1, h, w] for "chw"; in `unit`.
            dtype: "uint16", "float32", or "any" (uint16 or floating-point).
            camera: camera name, for messages.
        """
        array = image if isinstance(image, np.ndarray) else None
        if array is not None and array.ndim == 3 and array.shape[-1 if layout == "hwc" else 0] == 1:
            array = array[..., 0] if layout == "hwc" else array[0]
        kinds = ("u2", "f2", "f4", "f8") if dtype == "any" else (np.dtype(dtype).str[1:],)
        if array is None or array.ndim != 2 or not array.size or array.dtype.str[1:] not in kinds:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            expected = "uint16 or float" if dtype == "any" else dtype
            shape = "[height, width, 1]" if layout == "hwc" else "[1, height, width]"
            raise TransformError(
                f"Depth camera '{camera}' sent {found}; expected depth in {self.unit}, {expected}, [height, width] or "
                f"{shape}. Send what the sensor measures, without colours, or state its dtype in the embodiment."
            )
        metres = np.round(array.astype(np.float64) / UNITS[self.unit], 5)  # rounded: float32 and integers then agree
        measured = metres[(metres > 0) & (metres < math.inf)]
        if measured.size and (measured.min() > 100 * self.far or measured.max() < self.near / 100):
            raise TransformError(
                f"Depth camera '{camera}' sent depths from {measured.min():g} to {measured.max():g} m (read as "
                f"{self.unit}); expected depths near {self.near:g} to {self.far:g} m. State the robot's unit in the "
                "embodiment's camera."
            )
        visible = (metres >= self.near) & (metres > 0)  # False for NaN
        fraction = np.where(visible, metres - self.near, 0) / (self.far - self.near)
        levels = np.rint(255 * np.minimum(fraction, 1)).astype(np.uint8)
        return _colour_table(self.colormap)[levels] * visible[..., None]

    def as_sent(self, metres: np.ndarray, dtype: str) -> np.ndarray:
        """Convert depth in metres to the robot's unit and dtype, as input of `read`; NaN becomes 0 in integers."""
        values = metres * UNITS[self.unit]
        if dtype != "uint16":
            return values.astype(np.float32)
        return np.rint(np.nan_to_num(values, posinf=65535)).clip(0, 65535).astype(np.uint16)


def _colour_table(colormap: str) -> UInt8[np.ndarray, "256 3"]:
    levels = np.arange(256)[:, None] / 255
    if colormap == "jet":  # as in MATLAB: each channel is a trapezoid, shifted by a quarter of the range
        return np.rint(255 * (1.5 - np.abs(4 * levels - [3, 2, 1])).clip(0, 1)).astype(np.uint8)
    return np.rint(255 * levels * [1, 1, 1]).astype(np.uint8)
