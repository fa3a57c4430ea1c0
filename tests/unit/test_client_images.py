"""JPEGs in requests: images that cannot be encoded, and decoding of untrusted JPEGs."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from torchpi_client.images import decode_images, encode_images


@pytest.mark.parametrize("shape", [(65501, 1, 3), (1, 70000, 3), (3, 65501, 2), (3, 2, 65501)])
def test_image_above_largest_jpeg_side_is_refused_with_its_key(shape):
    with pytest.raises(
        ValueError, match=r"Cannot send cams\.top as JPEG: .* pixels; the largest side of a JPEG is 65500"
    ):
        encode_images({"cams": {"top": np.zeros(shape, np.uint8)}})


@pytest.mark.parametrize("shape", [(65500, 1, 3), (3, 1, 65500)])
def test_image_with_largest_jpeg_side_is_encoded(shape):
    image = np.full(shape, 100, np.uint8)
    np.testing.assert_array_equal(decode_images(encode_images({"top": image}))["top"], image)


def jpeg(pixels, **settings):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, settings.pop("format", "JPEG"), **settings)
    return file.getvalue()


def decoded(data, **arguments):
    return decode_images({"top": {"torchpi/jpeg": data, "layout": "hwc"}}, **arguments)["top"]


NOISE = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
SMOOTH = Image.fromarray(NOISE[:5, :5]).resize((130, 90))


def exif(orientation, order="<", tag=0x0112):
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + mark + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, tag, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(10))
def test_image_is_rotated_by_its_exif_orientation(orientation, order):
    data = jpeg(SMOOTH, exif=exif(orientation, order))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decoded(data), np.asarray(expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"progressive": True, "optimize": True},
        {"subsampling": 0, "quality": 100},
        {"subsampling": 2},
        {"restart_marker_blocks": 3},
        {"exif": exif(1, tag=0x0100), "icc_profile": bytes(100_000), "comment": b"x" * 1000},
        {"format": "MPO", "save_all": True, "append_images": [SMOOTH]},
    ],
)
@pytest.mark.parametrize("pixels", [NOISE, SMOOTH, Image.new("RGB", (33, 17), (3, 99, 7))])
def test_jpeg_of_a_camera_is_decoded_as_pillow_decodes_it(pixels, settings):
    data = jpeg(pixels, **settings)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decoded(data + bytes(100)), decoded(data))  # data after the end is ignored


def with_size(data, height, width):
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def with_last_scan_repeated(count):
    data = jpeg(Image.new("RGB", (800, 800)), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


GOOD = jpeg(NOISE)
HOSTILE = {
    "progressive, its last scan repeated": (with_last_scan_repeated(10_000), "more than 32 scans"),
    "many segments": (GOOD[:2] + b"\xff\xe0\x00\x02" * 1_000_000 + GOOD[2:], "1000 segments"),
    "large metadata": (GOOD[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 20 + GOOD[2:], "bytes besides the scans"),
    "fill bytes": (GOOD[:2] + b"\xff" * 2_000_000 + GOOD[2:], "bytes besides the scans"),
    "zeros before the image": (GOOD[:2] + b"\xff\x00" * 1_000_000 + GOOD[2:], "bytes besides the scans"),
    "more pixels than allowed": (with_size(GOOD, 65_500, 65_500), "65500×65500 pixels"),
    "more pixels than data": (with_size(jpeg(NOISE[:16, :16]), 1000, 1000), "bytes hold at most"),
    "twice the width": (with_size(GOOD, 90, 260), "data end before"),
    "no height": (with_size(GOOD, 0, 130), "cannot identify"),
    "cut, with an end": (GOOD[:-3000] + b"\xff\xd9", "data end before"),
    "cut": (GOOD[:-3000], "truncated"),
    "no scan": (GOOD[: GOOD.rindex(b"\xff\xda")] + b"\xff\xd9", "it contains no image"),
    "arithmetic coding": (GOOD.replace(b"\xff\xc0", b"\xff\xc9", 1), "segment 0xc9"),
    "two frames": (GOOD[:2] + GOOD[(f := GOOD.index(b"\xff\xc0")) : f + 19] + GOOD[2:], "segment 0xc0"),
    "grey": (jpeg(Image.fromarray(NOISE).convert("L")), "mode L"),
    "CMYK": (jpeg(Image.fromarray(NOISE).convert("CMYK")), "mode CMYK"),
    "nothing": (b"", "not begin as a JPEG"),
    **{name: (jpeg(NOISE, format=name), "not begin as a JPEG") for name in ("PNG", "WEBP", "GIF", "TIFF", "BMP")},
    "PNG that is a bomb": (jpeg(Image.new("L", (6000, 6000)), format="PNG"), "not begin as a JPEG"),
    "animated WebP": (jpeg(SMOOTH, format="WEBP", save_all=True, append_images=[SMOOTH] * 3), "not begin as a JPEG"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_expensive_jpeg_is_refused_before_decoding(name):
    data, message = HOSTILE[name]
    with pytest.raises(
        ValueError, match=rf"Cannot decode the JPEG of top \({len(data)} bytes\): .*{message}"
    ) as caught:
        decoded(data, max_pixels=2**22)
    assert len(str(caught.value)) < 400
