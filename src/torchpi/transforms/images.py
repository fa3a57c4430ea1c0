"""Camera images: the check against what the embodiment states, and the one resize that everything uses."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from torchpi.errors import TransformError

LAYOUTS = ("hwc", "chw")
DTYPES = ("uint8", "float32", "any")


def resize_with_pad(image: Any, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Scale an image into height x width with its aspect ratio, and centre it on black.

    The result is what `openpi_client` computes on the robot, bit for bit: Pillow's antialiased bilinear filter, scaled
    sizes cut to integers. An image that already has the size is returned as it is, not copied.

    Args:
        image: uint8 [h, w, 3].
        height, width: of the result, in pixels.

    Raises:
        ValueError: the image isn't uint8 [h, w, 3].
    """
    from PIL import Image  # not at import time: training on cached features and client code never resize

    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise TransformError(f"Cannot resize {_describe(image)}; expected uint8 [height, width, 3].")
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    if 0 in (h, w):
        raise TransformError(f"Cannot resize an empty image of shape {list(image.shape)}.")
    ratio = max(w / width, h / height)
    # At least one pixel: a 1 x 1000 image would otherwise shrink to nothing.
    scaled_h, scaled_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    scaled = Image.fromarray(image).resize((scaled_w, scaled_h), resample=Image.Resampling.BILINEAR)
    out = np.zeros((height, width, 3), np.uint8)
    top, left = (height - scaled_h) // 2, (width - scaled_w) // 2
    out[top : top + scaled_h, left : left + scaled_w] = np.asarray(scaled)
    return out


def to_uint8_hwc(image: Any, *, layout: str, dtype: str, camera: str) -> UInt8[np.ndarray, "h w 3"]:
    """Bring one camera's image to uint8 [h, w, 3] from the layout and dtype that the embodiment states.

    Args:
        image: [h, w, 3] for layout "hwc", [3, h, w] for "chw".
        layout: "hwc" or "chw".
        dtype: "uint8"; "float32", values in [0, 1]; or "any": uint8, or floating-point numbers in [0, 1].
        camera: its name, for the messages.

    Raises:
        ValueError: another layout, dtype or number of channels; floats that are NaN, infinite or outside of [0, 1].
    """
    if layout not in LAYOUTS or dtype not in DTYPES:
        raise TransformError(
            f"Camera '{camera}': layout {layout!r}, dtype {dtype!r}; expected one of {LAYOUTS}, {DTYPES}."
        )
    shape = "[height, width, 3]" if layout == "hwc" else "[3, height, width]"
    expected = f"expected {'uint8 or float in [0, 1]' if dtype == 'any' else dtype}, {shape}"
    if not isinstance(image, np.ndarray):
        raise TransformError(f"Camera '{camera}' sent {_describe(image)}; {expected}. Send it as a NumPy array.")
    if image.ndim != 3 or image.shape[2 if layout == "hwc" else 0] != 3:
        raise TransformError(f"Camera '{camera}' sent {_describe(image)}; {expected}.{_layout_hint(image, layout)}")
    if 0 in image.shape:
        raise TransformError(f"Camera '{camera}' sent an empty image, {_describe(image)}; {expected}.")
    floating = np.issubdtype(image.dtype, np.floating)
    accepted = (image.dtype == np.uint8 or floating) if dtype == "any" else image.dtype == np.dtype(dtype)
    if not accepted:
        raise TransformError(
            f"Camera '{camera}' sent {_describe(image)}; {expected}. "
            f"Convert the image, or state its dtype in the embodiment's camera (one of {', '.join(DTYPES)})."
        )
    if floating:
        # Written so that NaN fails as well.
        if not (image.min() >= 0 and image.max() <= 1):
            raise TransformError(
                f"Camera '{camera}' sent {_describe(image)} with values from {image.min()} to {image.max()}; "
                "expected floating-point images in [0, 1], without NaN. Divide by 255, or send uint8."
            )
        image = (255 * image).astype(np.uint8)  # cut, not rounded: as openpi
    return image if layout == "hwc" else np.moveaxis(image, 0, -1)


def _describe(value: Any) -> str:
    """A value that should have been an image, for messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _layout_hint(image: np.ndarray, layout: str) -> str:
    if image.ndim == 2 or (image.ndim == 3 and 1 in (image.shape[0], image.shape[2])):
        return " One channel is no RGB image; if it is depth, state its mapping in the embodiment's camera: depth."
    if image.ndim == 4:
        return " This looks like a batch: send one observation at a time."
    other = "chw" if layout == "hwc" else "hwc"
    if image.ndim == 3 and image.shape[0 if layout == "hwc" else 2] == 3:
        return f" This looks like layout '{other}': transpose the image, or state layout='{other}' in the embodiment."
    return " Images are RGB, without alpha."
