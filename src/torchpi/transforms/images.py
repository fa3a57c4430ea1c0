"""Camera images: check and conversion to uint8 [h, w, 3], and the resize used everywhere."""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from torchpi.errors import TransformError

LAYOUTS = ("hwc", "chw")
DTYPES = ("uint8", "float32", "any")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Resize that a policy was trained with."""

    resize: Literal["pad"] = "pad"
    """Keep the aspect ratio, centre the image, and pad with bars."""
    filter: Literal["bilinear_antialiased", "bilinear"] = "bilinear_antialiased"
    """"bilinear_antialiased": Pillow's filter in uint8, as in openpi. "bilinear": without antialiasing, in float32, as
    in LeRobot (`torch.nn.functional.interpolate`)."""
    bars: Literal[-1, -3] = -1
    """Value of the bars in the model's images, where -1 is black; -3 in LeRobot up to 0.4.4."""

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """Dtype of the resized image: uint8 for openpi's transform, otherwise float32 in [-1, 1]."""
        return np.uint8 if self == OPENPI_IMAGES else np.float32


OPENPI_IMAGES = ImageTransform()


def resize_with_pad(
    image: Any, height: int, width: int, transform: ImageTransform = OPENPI_IMAGES
) -> Shaped[np.ndarray, "{height} {width} 3"]:
    """Scale an image to fit height x width, keeping its aspect ratio, and centre it between bars.

    By default the result equals that of `openpi_client` bit for bit: Pillow's antialiased bilinear filter, black bars,
    scaled sizes truncated to integers. An image that already has the right size is then not copied.

    Args:
        image: uint8 [h, w, 3].
        height, width: size of the result in pixels.
        transform: filter and bars; the result has its dtype.

    Raises:
        ValueError: the image isn't uint8 [h, w, 3].
    """
    from PIL import Image  # imported here, because client code and training on cached features never resize

    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise TransformError(f"Cannot resize {_describe(image)}; expected uint8 [height, width, 3].")
    h, w = image.shape[:2]
    if 0 in (h, w):
        raise TransformError(f"Cannot resize an empty image of shape {list(image.shape)}.")
    ratio = max(w / width, h / height)
    # At least one pixel: a 1 x 1000 image would otherwise vanish.
    size = max(1, int(h / ratio)), max(1, int(w / ratio))
    scaled = image
    if transform.filter == "bilinear":
        scaled = _bilinear(image, *size)
    elif size != (h, w):
        scaled = np.asarray(Image.fromarray(image).resize(size[::-1], resample=Image.Resampling.BILINEAR))
    if transform.dtype is np.float32:
        scaled = scaled.astype(np.float32) / 255 * 2 - 1
    if size == (height, width):
        return scaled
    out = np.full((height, width, 3), 0 if transform.dtype is np.uint8 else transform.bars, transform.dtype)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out[top : top + size[0], left : left + size[1]] = scaled
    return out


def black_like(image: np.ndarray) -> np.ndarray:
    """Black image of the same shape and dtype: 0 in uint8, -1 in float32."""
    return np.full_like(image, 0 if image.dtype == np.uint8 else -1)


def _bilinear(image: np.ndarray, height: int, width: int) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Bilinear interpolation without antialiasing, as PyTorch's `interpolate` with align_corners=False."""

    def neighbours(size: int, scaled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ratio = float(np.float32(size) / np.float32(scaled))  # PyTorch rounds both the ratio and the positions
        positions = np.maximum((ratio * (np.arange(scaled) + 0.5) - 0.5).astype(np.float32), 0)
        first = np.minimum(positions.astype(np.int64), size - 1)
        return first, np.minimum(first + 1, size - 1), (positions - first).astype(np.float32)

    top, bottom, v = neighbours(image.shape[0], height)
    left, right, u = neighbours(image.shape[1], width)
    top, bottom, v, u = top[:, None], bottom[:, None], v[:, None, None], u[:, None]
    upper = (1 - u) * image[top, left] + u * image[top, right]
    lower = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return ((1 - v) * upper + v * lower).clip(0, 255)


def to_uint8_hwc(image: Any, *, layout: str, dtype: str, camera: str) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a camera image from the layout and dtype stated in the embodiment to uint8 [h, w, 3].

    Args:
        image: [h, w, 3] for layout "hwc", [3, h, w] for "chw".
        dtype: "uint8", "float32" (values in [0, 1]), or "any" (uint8, or floating-point values in [0, 1]).
        camera: camera name, for messages.

    Raises:
        ValueError: wrong layout, dtype or number of channels; floats that are NaN, infinite or outside [0, 1].
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
        # Negated, so that NaN fails as well.
        if not (image.min() >= 0 and image.max() <= 1):
            raise TransformError(
                f"Camera '{camera}' sent {_describe(image)} with values from {image.min()} to {image.max()}; "
                "expected floating-point images in [0, 1], without NaN. Divide by 255, or send uint8."
            )
        image = (255 * image).astype(np.uint8)  # truncated, as in openpi
    return image if layout == "hwc" else np.moveaxis(image, 0, -1)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _layout_hint(image: np.ndarray, layout: str) -> str:
    if image.ndim == 2 or (image.ndim == 3 and 1 in (image.shape[0], image.shape[2])):
        return " An RGB image needs three channels; for depth, state its mapping in the embodiment's camera: depth."
    if image.ndim == 4:
        return " This looks like a batch: send one observation at a time."
    other = "chw" if layout == "hwc" else "hwc"
    if image.ndim == 3 and image.shape[0 if layout == "hwc" else 2] == 3:
        return f" This looks like layout '{other}': transpose the image, or state layout='{other}' in the embodiment."
    return " Images are RGB, without alpha."
