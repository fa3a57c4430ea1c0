"""Image augmentation: random parameters per sample, applied on the device.

Crop, resizing and rotation are one bilinear resampling; wrist cameras have none, because their images move with the
hand. Colours change in HSV. Source: openpi's `preprocess_observation` and the formulas of augmax, which it uses. In
openpi the saturation has no effect and all cameras of a sample share one draw, which looks unintended.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn import functional as F

from torchpi.training.config import Augmentation
from torchpi.training.distributed import to_device
from torchpi.types import Observation

NUM_PARAMETERS = 7
OFF = np.zeros(NUM_PARAMETERS, np.float32)
"""Parameters without any random change; only the crop's scale remains."""


def draw(config: Augmentation, rng: np.random.Generator, image_size: int) -> Float32[np.ndarray, "7"]:
    """Draw crop offset (row, column) in pixels, angle in rad, brightness, contrast, saturation and hue of one image.

    The last four are 0 for an image whose colours don't change.
    """
    max_offset = (image_size - _cropped(config, image_size)) / 2
    scale = [max_offset, max_offset, math.radians(config.degrees)]
    scale += [config.brightness, config.contrast, config.saturation, config.hue]
    values = rng.uniform(-1, 1, NUM_PARAMETERS) * scale
    if config.like_openpi:
        values[5] = 0  # augmax, which openpi uses, does not apply the saturation
    if rng.uniform() >= config.color_probability:
        values[3:] = 0
    return values.astype(np.float32)


def _cropped(config: Augmentation, image_size: int) -> int:
    return int(image_size * config.crop)


def augment(
    observation: Observation, config: Augmentation, parameters: Mapping[str, Float32[Tensor, "B 7"]]
) -> Observation:
    """Augment the images of an observation.

    Args:
        parameters: the output of `draw` for each sample, per camera, on the CPU.
    """
    images = {}
    for camera, image in observation.images.items():
        values = parameters[camera]
        image01 = image * 0.5 + 0.5
        if "wrist" not in camera and (config.crop < 1 or config.degrees):
            zoom = _cropped(config, image.shape[1]) / image.shape[1]
            offset, angle = to_device(values[:, :3].contiguous(), image.device).split([2, 1], dim=1)
            image01 = warp(image01, offset, angle[:, 0], zoom)
        images[camera] = jitter(image01, *values[:, 3:].unbind(1)) * 2 - 1
    return dataclasses.replace(observation, images=images)


def warp(
    images: Float32[Tensor, "B h w 3"], offset: Float32[Tensor, "B 2"], angle: Float32[Tensor, " B"], zoom: float
) -> Float32[Tensor, "B h w 3"]:
    """Crop, resize and rotate about the centre, in one bilinear resampling; pixels outside the image are black.

    Args:
        images: in [0, 1], square.
        offset: offset of the crop's centre, (row, column) in pixels.
        angle: rotation in rad.
        zoom: side of the crop divided by the side of the image.
    """
    centre = (images.shape[1] - 1) / 2
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    row, column = (offset / centre).unbind(1)
    matrix = torch.stack([torch.stack([cos, -sin, column], 1), torch.stack([sin, cos, row], 1)], 1)  # [B, 2, 3]
    pixels = images.permute(0, 3, 1, 2)  # [B, 3, h, w]
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=True)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True).permute(0, 2, 3, 1)


def jitter(
    images: Float32[Tensor, "B h w 3"],
    brightness: Float32[Tensor, " B"],
    contrast: Float32[Tensor, " B"],
    saturation: Float32[Tensor, " B"],
    hue: Float32[Tensor, " B"],
) -> Float32[Tensor, "B h w 3"]:
    """Change the colours of images in [0, 1]; images whose four parameters are 0 are not changed.

    The parameters are on the CPU, so that choosing the operations needs no wait for the device.
    """
    parameters = torch.stack([brightness, contrast, saturation, hue])
    (changed,) = parameters.any(dim=0).nonzero(as_tuple=True)
    if not len(changed):
        return images
    b, c, s, h = to_device(parameters[:, changed], images.device)[..., None, None]
    changed = to_device(changed, images.device)
    rgb = images[changed]
    low, high = rgb.amin(dim=-1), rgb.amax(dim=-1)  # [B, h, w]
    value = _contrast(_toward_one(high, b), c)
    if not (saturation.any() or hue.any()):  # rgb is proportional to the value
        out = rgb * (value / high.clamp_min(1e-12))[..., None]
    else:
        out = _from_hsv(_hue(rgb, high, high - low) + h, _toward_one(1 - low / high.clamp_min(1e-12), s), value)
    result = images.clone()
    result[changed] = torch.where(rgb < 0, rgb, out)  # padding bars below black, as in ImageTransform, are not changed
    return result


def _toward_one(x: Tensor, amount: Tensor) -> Tensor:
    """Move x toward 0 by the fraction -amount if amount is negative, else toward 1 by the fraction amount."""
    return torch.where(amount < 0, x * (1 + amount), x * (1 - amount) + amount)


def _contrast(value: Tensor, amount: Tensor) -> Tensor:
    """Apply a curve through (0, 0), (½, ½) and (1, 1), with steepness `slope` in the middle and 1/slope at the ends."""
    slope = torch.tan((amount + 1) * (math.pi / 4))
    # At slope 1 the curve is the identity, and the formula for its corners divides by 0: any corner is right.
    corner = ((slope - slope**2) / (2 * (1 - slope**2))).masked_fill(slope == 1, 0.25)
    middle = slope * (value - 0.5) + 0.5
    upper = value / slope + 1 - 1 / slope
    return torch.where(value < corner, value / slope, torch.where(value > 1 - corner, upper, middle))


def _hue(rgb: Tensor, high: Tensor, chroma: Tensor) -> Tensor:
    """Hue in turns; 0 for grey."""
    r, g, b = rgb.unbind(-1)
    safe = chroma.clamp_min(1e-12)
    sector = torch.where(high == r, (g - b) / safe % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return sector / 6


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    shift = torch.arange(5.0, 0.0, -2.0, device=hue.device)  # 5, 3, 1
    k = (shift + 6 * hue[..., None]) % 6
    distance = torch.minimum(k, 4 - k).clamp(0, 1)  # 0 for the strongest channel, 1 for the weakest
    return value[..., None] * (1 - saturation[..., None] * distance)
