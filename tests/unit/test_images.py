"""Image resizing, and conversion of camera images to uint8 [h, w, 3]."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchpi.transforms import resize_with_pad, to_uint8_hwc


def gray(h: int, w: int, value: int = 200) -> np.ndarray:
    return np.full((h, w, 3), value, np.uint8)


def test_image_of_target_size_is_returned_unchanged():
    image = gray(20, 30)
    assert resize_with_pad(image, 20, 30) is image


@settings(deadline=None)
@given(h=st.integers(1, 80), w=st.integers(1, 80), height=st.integers(1, 40), width=st.integers(1, 40))
def test_resize_fills_one_axis_and_centres_the_other(h, w, height, width):
    out = resize_with_pad(gray(h, w), height, width)
    assert out.shape == (height, width, 3)
    rows, columns = (np.flatnonzero(out.any(axis=(axis, 2))) for axis in (1, 0))
    # Within one pixel: 18 / (18 / 31) is 30.999… in floating point, and is truncated to 30 as in openpi.
    assert min(height - len(rows), width - len(columns)) <= 1
    for filled, size in ((rows, height), (columns, width)):
        before, behind = filled[0], size - 1 - filled[-1]
        assert behind - before in (0, 1)
    assert set(np.unique(out)) <= {0, 200}  # the image keeps its grey: padding doesn't bleed into it


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        3,
    ],
)
def test_resize_of_non_image_is_an_error(image):
    with pytest.raises(ValueError, match="Cannot resize"):
        resize_with_pad(image, 8, 8)


def test_layouts_and_dtypes_convert_to_the_same_image():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    floats = (image / np.float64(255)).clip(0, 1)
    chw = np.moveaxis(image, -1, 0)
    np.testing.assert_array_equal(to_uint8_hwc(image, layout="hwc", dtype="uint8", camera="c"), image)
    np.testing.assert_array_equal(to_uint8_hwc(chw, layout="chw", dtype="any", camera="c"), image)
    # 255 · x is truncated, not rounded: at most one level is lost.
    difference = image - to_uint8_hwc(floats, layout="hwc", dtype="any", camera="c").astype(int)
    assert set(np.unique(difference)) <= {0, 1}


UINT8, FLOAT = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8, 3), np.float32)


@pytest.mark.parametrize(
    ("image", "layout", "dtype", "message"),
    [
        (UINT8, "chw", "uint8", r"\[3, height, width\].*looks like layout 'hwc'"),
        (np.moveaxis(UINT8, -1, 0), "hwc", "uint8", r"\[height, width, 3\].*looks like layout 'chw'"),
        (np.zeros((6, 8, 4), np.uint8), "hwc", "uint8", "without alpha"),
        (np.zeros((6, 8), np.uint8), "hwc", "uint8", "expected uint8"),
        (UINT8[None], "hwc", "uint8", "one observation at a time"),
        (UINT8[:0], "hwc", "uint8", "empty"),
        (FLOAT, "hwc", "uint8", "float32.*expected uint8"),
        (UINT8, "hwc", "float32", "uint8.*expected float32"),
        (FLOAT.astype(np.float64), "hwc", "float32", "float64.*expected float32"),
        (UINT8.astype(np.int64), "hwc", "any", "int64.*expected uint8 or float"),
        (FLOAT + 255, "hwc", "float32", "from 255.0 to 255.0.*Divide by 255"),
        (FLOAT - 1, "hwc", "any", "from -1.0"),
        (np.where(np.arange(3) == 1, np.nan, FLOAT), "hwc", "any", "NaN"),
        (np.where(np.arange(3) == 1, np.inf, FLOAT), "hwc", "any", r"\[0, 1\]"),
        ([[0]], "hwc", "any", "a value of type list.*NumPy array"),
        (None, "hwc", "any", "NoneType"),
    ],
)
def test_invalid_images_are_errors(image, layout, dtype, message):
    with pytest.raises(ValueError, match=message) as error:
        to_uint8_hwc(image, layout=layout, dtype=dtype, camera="wrist")
    assert "Camera 'wrist'" in str(error.value)


def test_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match=r"'bgr'.*hwc"):
        to_uint8_hwc(UINT8, layout="bgr", dtype="uint8", camera="c")
