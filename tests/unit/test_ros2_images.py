"""Conversion of ROS camera messages: encodings, padding, byte order, compression and refused messages."""

import numpy as np
import PIL.Image
import pytest
from ros2_helpers import compressed, image, rgb

from torchpi_ros2.config import COMPRESSED, IMAGE, CameraTopic
from torchpi_ros2.errors import UnusableError
from torchpi_ros2.images import check_image, read_image
from torchpi_ros2.plan import Camera

RED_GREEN = [[200, 10, 20], [5, 150, 60]]
"""Two pixels."""


@pytest.mark.parametrize(
    ("encoding", "data", "expected"),
    [
        ("rgb8", [200, 10, 20, 5, 150, 60], RED_GREEN),
        ("bgr8", [20, 10, 200, 60, 150, 5], RED_GREEN),
        ("rgba8", [200, 10, 20, 9, 5, 150, 60, 9], RED_GREEN),
        ("bgra8", [20, 10, 200, 9, 60, 150, 5, 9], RED_GREEN),
        ("mono8", [7, 250], [[7] * 3, [250] * 3]),
        ("8UC1", [7, 250], [[7] * 3, [250] * 3]),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_encodings_of_colours(encoding, data, expected, padding):
    row = data + [99] * padding
    message = image(bytes(row * 2), encoding, width=2, height=2, step=len(row))
    check_image(message, IMAGE)
    pixels = read_image(message, IMAGE)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.tolist() == [expected, expected]


@pytest.mark.parametrize(("encoding", "luma"), [("uyvy", 1), ("yuv422", 1), ("yuyv", 0), ("yuv422_yuy2", 0)])
def test_yuv_is_bt601_with_limited_range(encoding, luma):
    # Black, white, and red as BT.601 defines it: Y 81, U 90, V 240.
    pairs = [(16, 128, 128, 235), (81, 90, 240, 81)]
    data = []
    for y0, u, v, y1 in pairs:
        data += [y0, u, y1, v] if luma == 0 else [u, y0, v, y1]
    pixels = read_image(image(bytes(data), encoding, width=2, height=2), IMAGE)
    assert pixels[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert np.abs(pixels[1].astype(int) - [255, 0, 0]).max() <= 1


def test_last_row_may_lack_its_padding():
    row = [1, 2, 3, 4, 5, 6]
    message = image(bytes([*row, 0, 0, *row]), "rgb8", width=2, height=2, step=8)
    assert read_image(message, IMAGE).reshape(2, 6).tolist() == [row, row]


@pytest.mark.parametrize("big_endian", [False, True])
def test_depth_in_millimetres_of_either_byte_order(big_endian):
    depth = np.array([[0, 1500]], ">u2" if big_endian else "<u2")
    message = image(depth, "16UC1", width=2, height=1, big_endian=big_endian)
    metres = read_image(message, IMAGE, "m")
    assert np.isnan(metres[0, 0])
    assert metres[0, 1] == 1.5
    for dtype, unit, expected in (("uint16", "mm", [[[0], [1500]]]), ("float32", "cm", [[[np.nan], [150]]])):
        camera = Camera(CameraTopic("depth", "/depth", IMAGE, unit), dtype=dtype)
        sent = camera.read(message)
        assert sent.dtype == dtype
        np.testing.assert_array_equal(sent, np.array(expected, dtype if dtype == "float32" else np.uint16))


def test_depth_in_metres_of_floats():
    depth = np.array([[np.nan, 0.25, np.inf]], ">f4")
    message = image(depth, "32FC1", width=3, height=1, big_endian=True)
    assert read_image(message, IMAGE, "mm")[0, 1] == 250
    sent = Camera(CameraTopic("depth", "/depth", IMAGE, "mm"), dtype="uint16").read(message)
    assert sent[..., 0].tolist() == [[0, 250, 65535]]


def test_image_is_converted_to_the_policys_form():
    topic = CameraTopic("front", "/front", IMAGE)
    message = rgb((255, 0, 51))
    assert Camera(topic, layout="chw").read(message).shape == (3, 2, 4)
    scaled = Camera(topic, dtype="float32").read(message)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[0, 0], [1, 0, 0.2])


@pytest.mark.parametrize(
    ("encoding", "depth_unit", "match"),
    [
        ("16UC1", None, "expected rgb8, .* for a colour camera: a depth camera has to be declared"),
        ("mono16", None, "a depth camera has to be declared"),
        ("rgb8", "mm", "expected 16UC1, .* for a depth camera: leave out depth_unit"),
        ("bayer_rggb8", None, "image_proc"),
        ("8UC3", None, "does not state the colour order"),
        ("nv12", None, "convert the topic"),
        ("rgb16", None, "convert the topic"),
        ("", None, "the encoding is ''"),
    ],
)
def test_other_encodings_are_refused(encoding, depth_unit, match):
    message = image(bytes(12), encoding, width=2, height=1)
    for read in (read_image, check_image):
        with pytest.raises(UnusableError, match=match):
            read(message, IMAGE, depth_unit)


@pytest.mark.parametrize(
    ("size", "step", "width", "height"),
    [(12, 5, 2, 2), (11, 6, 2, 2), (13, 6, 2, 2), (0, 0, 0, 0), (12, 6, 2, 4), (12, 6, 100_000, 100_000)],
)
def test_contradicting_sizes_are_refused(size, step, width, height):
    message = image(bytes(size), "rgb8", width=width, height=height, step=step)
    for read in (read_image, check_image):
        with pytest.raises(UnusableError, match=r"expected (a step of|1 to)"):
            read(message, IMAGE)


def test_odd_width_of_yuv_is_refused():
    with pytest.raises(UnusableError, match="3 pixels wide"):
        read_image(image(bytes(6), "yuyv", width=3, height=1), IMAGE)


COLOURS = np.full((8, 8, 3), (200, 10, 20), np.uint8)
SWAPPED = COLOURS[..., ::-1]


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("jpeg", COLOURS),
        ("png", COLOURS),
        ("rgb8; jpeg compressed bgr8", COLOURS),
        ("bgr8; jpeg compressed bgr8", COLOURS),
        ("yuv422_yuy2; jpeg compressed bgr8", COLOURS),
        ("bgr8; png compressed bgr8", COLOURS),
        # A publisher that passed RGB to an encoder for BGR.
        ("rgb8; jpeg compressed rgb8", SWAPPED),
        ("rgb8; png compressed rgb8", SWAPPED),
    ],
)
def test_compressed_images(text, pixels):
    message = compressed(pixels, text)
    check_image(message, COMPRESSED)
    assert np.abs(read_image(message, COMPRESSED).astype(int) - COLOURS).max() <= 3


def test_grey_and_transparent_images_have_three_channels():
    grey = read_image(compressed(np.full((4, 4), 77, np.uint8), "mono8; jpeg compressed "), COMPRESSED)
    assert np.abs(grey.astype(int) - 77).max() <= 1
    assert grey.shape == (4, 4, 3)
    clear = read_image(compressed(np.full((4, 4, 4), 9, np.uint8), "png"), COMPRESSED)
    assert clear.shape == (4, 4, 3)


def test_orientation_of_a_file_is_applied():
    upside_down = PIL.Image.Exif()
    upside_down[0x0112] = 3
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[4:] = 200
    read = read_image(compressed(pixels, "png", exif=upside_down), COMPRESSED)
    assert (read[:4] == 200).all()
    assert not read[4:].any()


def test_compressed_depth_is_png_of_16_bits():
    depth = np.array([[0, 2500]], np.uint16)
    message = compressed(depth, "16UC1; png compressed ")
    assert read_image(message, COMPRESSED, "mm")[0, 1] == 2500
    with pytest.raises(UnusableError, match="has 16 bits of one channel; expected 8 bits"):
        read_image(message, COMPRESSED)
    with pytest.raises(UnusableError, match="expected depth in 16 bits"):
        read_image(compressed(COLOURS, "png"), COMPRESSED, "mm")
    with pytest.raises(UnusableError, match="lossless"):
        check_image(compressed(COLOURS, "jpeg"), COMPRESSED, "mm")


@pytest.mark.parametrize("text", ["16UC1; compressedDepth png", "h264", ""])
def test_other_formats_are_refused(text):
    with pytest.raises(UnusableError, match="expected one with jpeg or jpg or png"):
        check_image(compressed(COLOURS, text), COMPRESSED)


def test_damaged_image_is_unusable():
    message = compressed(COLOURS, "jpeg")
    message.data = message.data[:100]
    with pytest.raises(UnusableError, match="cannot decode 100 bytes of 'jpeg'"):
        read_image(message, COMPRESSED)
