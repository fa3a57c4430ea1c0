"""Orientation tags of images and videos are applied when they are read."""

import io

import numpy as np
import pytest
from PIL import Image
from pixel_sets import CAMERA, encoded, some_depth, some_picture, turned_video, write_set

from torchpi.data import LeRobotDataset
from torchpi.data.pixels import image_pixels
from torchpi.serving.messages import decode_encoded

PICTURE = some_picture()


def shown(image, orientation):
    """Apply the orientation of TIFF 6.0, tag 274; comments: display position of the first row and column."""
    return {
        1: image,  # top, left
        2: image[:, ::-1],  # top, right
        3: image[::-1, ::-1],  # bottom, right
        4: image[::-1],  # bottom, left
        5: image.swapaxes(0, 1),  # left, top
        6: np.rot90(image, -1),  # right, top
        7: image[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: np.rot90(image),  # left, bottom
    }[orientation]


def with_orientation(image, kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def read(path):
    return LeRobotDataset(path, action_horizon=1)[1][CAMERA]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_of_images_is_applied(kind):
    for orientation in range(1, 9):
        found = image_pixels(io.BytesIO(with_orientation(PICTURE, kind, orientation, quality=95)))
        expected = shown(PICTURE, orientation)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 4  # a wrong rotation differs by 30 or more


def test_orientation_of_depth_is_applied(tmp_path):
    info = {"is_depth_map": True, "depth_unit": "mm"}
    path = write_set(tmp_path / "set", images=[with_orientation(some_depth(), "PNG", 6)] * 2, info=info)
    assert np.array_equal(read(path)[..., 0], (shown(some_depth(), 6) / 1000).astype(np.float32))


def test_orientation_of_a_request_is_applied():
    image = with_orientation(PICTURE, "JPEG", 8, quality=95)
    found = decode_encoded({"front": {"torchpi/jpeg": image, "layout": "hwc"}}, max_bytes=1 << 20)["front"]
    assert np.abs(found.astype(int) - shown(PICTURE, 8)).mean() < 4


def test_damaged_orientation_tag_is_ignored(tmp_path):
    exif = b"Exif\0\0" + b"\xff" * 40
    assert Image.open(io.BytesIO(encoded(PICTURE, "JPEG", exif=exif))).mode == "RGB"
    found = read(write_set(tmp_path / "set", images=[encoded(PICTURE, "JPEG", exif=exif, quality=95)] * 2))
    assert np.abs(found.astype(int) - PICTURE).mean() < 4


@pytest.mark.parametrize(
    ("matrix", "orientation"),
    [
        (((1, 0), (0, 1)), 1),
        (((-1, 0), (0, 1)), 2),
        (((-1, 0), (0, -1)), 3),
        (((1, 0), (0, -1)), 4),
        (((0, 1), (1, 0)), 5),
        (((0, 1), (-1, 0)), 6),  # a phone held upright: x goes down, y goes left
        (((0, -1), (-1, 0)), 7),
        (((0, -1), (1, 0)), 8),
    ],
)
def test_transformation_of_videos_is_applied(matrix, orientation, tmp_path):
    found = read(write_set(tmp_path / "set", video=turned_video(PICTURE, matrix)))
    expected = shown(PICTURE, orientation)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4


def test_video_rotated_by_unsupported_angle_is_an_error(tmp_path):
    path = write_set(tmp_path / "set", video=turned_video(PICTURE, ((0.71, 0.71), (-0.71, 0.71))))
    with pytest.raises(
        ValueError, match=r"transformation \[\[0\.71, 0\.71\], .* expected rotations by multiples of 90 degrees"
    ):
        read(path)
