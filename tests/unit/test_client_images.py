"""Images that the client cannot send as JPEG."""

import numpy as np
import pytest

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
