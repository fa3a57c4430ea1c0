"""Depth cameras: decoding to metres, and the mapping to colours that is part of the policy."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from pixel_sets import CAMERA, HEIGHT, WIDTH, encoded, encoded_video, some_depth, some_picture, tiff, write_set

import torchpi
from torchpi.data import LeRobotDataset, camera_keys_of, to_observation
from torchpi.robots import ActionDim, Camera, DepthMapping, Embodiment, StateKey, get_embodiment

MM = {"is_depth_map": True, "depth_unit": "mm"}
METRES = {"is_depth_map": True, "depth_unit": "m"}
DEPTH = some_depth()


def read(path):
    return LeRobotDataset(path, action_horizon=1)[1][CAMERA]


@pytest.mark.parametrize(
    ("image", "info", "metres"),
    [
        (encoded(DEPTH), MM, DEPTH / 1000),
        (encoded(DEPTH, "TIFF"), MM, DEPTH / 1000),
        (tiff(DEPTH, order=">"), MM, DEPTH / 1000),
        (encoded(DEPTH.astype(np.int32), "TIFF"), MM, DEPTH / 1000),
        (encoded(DEPTH), {"video.is_depth_map": True, "depth_unit": "cm"}, DEPTH / 100),  # LeRobot's key before 0.6
        (encoded((DEPTH / 1000).astype(np.float32), "TIFF"), METRES, DEPTH / 1000),
        (tiff((DEPTH / 1000).astype(np.float32), order=">"), METRES, DEPTH / 1000),
        (encoded(DEPTH.astype(np.float32), "TIFF"), MM, DEPTH / 1000),
    ],
)
def test_depth_images_are_read_in_metres(image, info, metres, tmp_path):
    dataset = LeRobotDataset(write_set(tmp_path / "set", images=[image] * 2, info=info), action_horizon=1)
    assert dataset.depth_keys == (CAMERA,)
    found = dataset[1][CAMERA]
    assert found.dtype == np.float32
    assert np.array_equal(found, metres.astype(np.float32)[..., None])


@pytest.mark.parametrize(("image", "scale"), [(DEPTH, 1000), ((DEPTH / 1000).astype(np.float32), 1)])
def test_missing_unit_defaults_to_lerobots_with_a_note(image, scale, tmp_path):
    path = write_set(tmp_path / "set", images=[encoded(image, "TIFF")] * 2, info={"is_depth_map": True})
    with pytest.warns(UserWarning, match=r"no depth_unit for observation\.images\.front; integers .* millimetres"):
        found = read(path)
    assert np.array_equal(found[..., 0], (image / scale).astype(np.float32))


CODES = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 4096 // (HEIGHT * WIDTH)).astype(np.uint16)
CODING = {"is_depth_map": True, "depth_unit": "mm", "video.depth_min": 0.25, "video.depth_max": 8.0}


@pytest.mark.parametrize("pix_fmt", ["gray12le", "yuv420p12le"])
def test_lerobot_depth_video_is_decoded_to_metres(pix_fmt, tmp_path):
    video = encoded_video([CODES, CODES], pix_fmt)
    info = {**CODING, "video.shift": 3.5, "video.use_log": True}
    found = read(write_set(tmp_path / "log", video=video, info=info))
    # LeRobot's documented quantization: equal steps of log(depth + shift).
    first, last = np.log(0.25 + 3.5), np.log(8.0 + 3.5)
    expected = np.exp(CODES / 4095 * (last - first) + first) - 3.5
    assert np.allclose(found[..., 0], expected, atol=1e-6)
    assert found[0, 0, 0] == np.float32(0.25)
    found = read(write_set(tmp_path / "linear", video=video, info={**CODING, "video.use_log": False}))
    assert np.allclose(found[..., 0], 0.25 + CODES / 4095 * 7.75, atol=1e-6)


def test_video_of_16_bits_uses_the_stated_unit(tmp_path):
    path = write_set(tmp_path / "set", video=encoded_video([DEPTH, DEPTH], "gray16le"), info=MM)
    assert np.array_equal(read(path)[..., 0], (DEPTH / 1000).astype(np.float32))


PICTURE = some_picture()
UNIT_PLANES = [DEPTH // 16] * 2


@pytest.mark.parametrize(
    ("files", "info", "message"),
    [
        ({"images": [encoded(DEPTH)] * 2}, None, r"without colour, and meta/info\.json doesn't state .*is_depth_map"),
        (
            {"images": [encoded((DEPTH / 5000).astype(np.float32), "TIFF")] * 2},
            None,
            "has floating-point pixels without",
        ),
        ({"images": [tiff(DEPTH / 1000)] * 2}, METRES, "a format that Pillow can't read, for example TIFF with 64-bit"),
        ({"images": [encoded(PICTURE)] * 2}, MM, "calls it a depth map, but the image has RGB pixels of 8 bits"),
        ({"images": [encoded(PICTURE[..., 0])] * 2}, MM, "has L pixels of 8 bits"),
        ({"images": [encoded(DEPTH)] * 2}, {**MM, "depth_unit": "inch"}, "depth_unit of .* is 'inch'; expected one of"),
        ({"video": encoded_video(UNIT_PLANES, "gray12le")}, None, r"is gray12le, and meta/info\.json doesn't state"),
        ({"video": encoded_video(UNIT_PLANES, "gray12le")}, MM, "but the image is gray12le; expected .* depth_min"),
        ({"video": encoded_video(UNIT_PLANES, "gray10le")}, {**CODING, "video.use_log": False}, "is gray10le"),
        ({"video": encoded_video([PICTURE[..., 0]] * 2, "gray")}, MM, "but the image is gray;"),
        ({"video": encoded_video(UNIT_PLANES, "gray12le")}, {**CODING, "video.use_log": True}, "True; expected metres"),
        ({"video": encoded_video(UNIT_PLANES, "gray12le")}, {**CODING, "video.depth_max": 0.1}, "depth_max, shift, us"),
    ],
)
def test_ambiguous_depth_encodings_are_errors(files, info, message, tmp_path):
    path = write_set(tmp_path / "set", info=info, **files)
    with pytest.raises(ValueError, match=message):
        read(path)


# ---- the mapping ----

GREY = DepthMapping(near=0.5, far=2.5, unit="mm")


def arm(depth=GREY, **camera):
    return Embodiment(
        "arm",
        cameras=(Camera("base_0_rgb", "front", **{"dtype": "any", "depth": depth, **camera}),),
        state=(StateKey("state", ("a",)),),
        actions=(ActionDim("a"),),
    )


def seen(robot, image):
    return robot.to_model({"front": image, "state": np.zeros(1), "prompt": "go"})["image"]["base_0_rgb"]


def test_grey_goes_from_near_to_far():
    depth = np.array([[0, 499, 500, 1000], [1500, 2500, 2501, 65535]], np.uint16)
    found = seen(arm(), depth)
    assert found.dtype == np.uint8
    # not measured and too near: black; then 255 * (d - near) / (far - near); beyond far: white
    assert found[..., 0].tolist() == [[0, 0, 0, 64], [128, 255, 255, 255]]
    assert np.array_equal(found, np.repeat(found[..., :1], 3, axis=2))


def test_jet_goes_from_blue_to_red_with_unmeasured_black():
    depth = np.array([[500, 1500, 2500, 0]], np.uint16)
    found = seen(arm(dataclasses.replace(GREY, colormap="jet")), depth)
    assert found.tolist() == [[[0, 0, 128], [130, 255, 126], [128, 0, 0], [0, 0, 0]]]


def test_nan_and_infinity_are_mapped_to_colours():
    depth = np.array([[np.nan, np.inf, -1.0, 1.5]], np.float32)
    assert seen(arm(dataclasses.replace(GREY, unit="m")), depth)[..., 0].tolist() == [[0, 255, 0, 128]]


@pytest.mark.parametrize("unit", ["mm", "m", "cm"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_training_and_inference_map_depth_equally(unit, layout, tmp_path):
    dataset = LeRobotDataset(write_set(tmp_path / "set", images=[encoded(DEPTH)] * 2, info=MM), action_horizon=1)
    robot = arm(dataclasses.replace(GREY, unit=unit), layout=layout)
    trained = robot.to_model(to_observation(dataset[0], robot))["image"]["base_0_rgb"]
    assert np.unique(trained).size > 100
    sent = (DEPTH / {"mm": 1, "cm": 10, "m": 1000}[unit]).astype(np.float32)
    with_channel = sent[..., None] if layout == "hwc" else sent[None]
    for image in (sent, with_channel, sent.astype(np.float64), *([DEPTH] if unit == "mm" else [])):
        assert np.array_equal(seen(robot, image), trained)


def test_depth_mapping_is_saved_with_the_policy(tmp_path):
    policy = torchpi.load_policy("demo")
    mapped = Camera("base_0_rgb", "base", dtype="uint16", depth=dataclasses.replace(GREY, colormap="jet"))
    (first, *others) = policy.embodiment.cameras
    assert (first.name, first.key) == (mapped.name, mapped.key)
    policy.embodiment = dataclasses.replace(policy.embodiment, cameras=(mapped, *others))
    policy.save(tmp_path / "saved")
    loaded = torchpi.load_policy(tmp_path / "saved")
    assert loaded.embodiment.cameras == (mapped, *others)
    assert loaded.metadata["observation"]["cameras"][0]["depth_unit"] == "mm"
    observation = loaded.example_observation()
    assert observation["base"].dtype == np.uint16
    noise = np.zeros(policy.model.config.chunk_shape, np.float32)
    expected = policy.infer(observation, noise=noise)["actions"]
    assert np.array_equal(loaded.infer(observation, noise=noise)["actions"], expected)
    cameras = json.loads((tmp_path / "saved/policy.json").read_text())["embodiment"]["cameras"]
    assert [camera.get("depth") for camera in cameras] == [dataclasses.asdict(mapped.depth), None]
    assert "depth" not in cameras[1]  # older versions read policies without it


def test_depth_camera_needs_a_mapping(tmp_path):
    path = write_set(tmp_path / "set", images=[encoded(DEPTH)] * 2, info=MM)
    plain = arm(None, dtype="uint8")
    for attempt in (
        lambda: LeRobotDataset(path, action_horizon=1, embodiment=plain),
        lambda: to_observation(LeRobotDataset(path, action_horizon=1)[0], plain),
    ):
        with pytest.raises(
            ValueError, match=r'front is a depth camera, .* "depth": {"near": 0\.2, "far": 2, "unit": "mm"'
        ):
            attempt()
    rgb = write_set(tmp_path / "rgb", images=[encoded(PICTURE)] * 2)
    with pytest.raises(ValueError, match="has colours, but the embodiment's camera front maps depth"):
        LeRobotDataset(rgb, action_horizon=1, embodiment=arm())


def test_depth_and_rgb_camera_may_share_a_name_suffix():
    keys = ["observation.images.front", "observation.depth.front"]
    assert camera_keys_of(arm(None, dtype="uint8"), keys, keys[1:]) == keys[:1]
    assert camera_keys_of(arm(), keys, keys[1:]) == keys[1:]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PICTURE, r"Depth camera .* sent uint8 \[32, 48, 3\]; expected depth in mm"),
        (PICTURE[..., 0], "sent uint8"),
        (np.zeros((2, 3, 4), np.uint16), "sent uint16"),
        (np.zeros((0, 3), np.uint16), "sent uint16"),
        ([[1.0]], "sent list"),
        ((DEPTH / 1000).astype(np.float32), "sent depths from 0.0002 to 0.00174 m .read as .*State the robot's unit"),
    ],
)
def test_invalid_depth_image_is_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        seen(arm(), image)


def test_depth_image_for_rgb_camera_is_an_error():
    for image in (DEPTH, DEPTH[..., None], (DEPTH / 1000).astype(np.float32)):
        with pytest.raises(ValueError, match="for depth, state its mapping"):
            seen(arm(None), image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"near": 2.0, "far": 1.0, "unit": "m"}, "near is 2.0 and far 1.0; expected metres, 0 <= near < far"),
        ({"near": float("nan"), "far": 1.0, "unit": "m"}, "near is nan"),
        ({"near": 0, "far": float("inf"), "unit": "m"}, "far inf"),
        ({"near": 0, "far": 1, "unit": "inch"}, "unit is 'inch'; expected one of m, cm, mm"),
        ({"near": 0, "far": 1, "unit": "m", "colormap": "turbo"}, "colormap is 'turbo'; expected one of grey, jet"),
        ({"near": 0, "far": 1}, "unit"),
    ],
)
def test_invalid_mappings_are_errors(fields, message, tmp_path):
    document = arm().to_dict()
    document["cameras"][0]["depth"] = fields
    (tmp_path / "arm.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        get_embodiment(tmp_path / "arm.json")


def test_depth_camera_needs_a_depth_dtype():
    with pytest.raises(ValueError, match="dtype is 'uint8'; expected one of uint16, float32, any"):
        arm(dtype="uint8")
    with pytest.raises(ValueError, match="dtype is 'uint16'"):
        arm(None, dtype="uint16")


# ---- colours ----


def png_of_16_bits(rgb):
    """A PNG with 16 bits per channel, which Pillow reads but doesn't write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREYS = np.repeat(PICTURE[..., :1], 3, axis=2)


@pytest.mark.parametrize(
    ("image", "expected", "tolerance"),
    [
        (png_of_16_bits(PICTURE.astype(np.uint16) * 257), PICTURE, 0),
        (encoded(Image.fromarray(PICTURE).quantize(8)), PICTURE, 0),
        (encoded(np.dstack([PICTURE, PICTURE[..., 0]])), PICTURE, 0),
        (encoded(PICTURE[..., 0]), GREYS, 0),
        (encoded(Image.fromarray(np.dstack([PICTURE[..., 0], PICTURE[..., 1]]), "LA")), GREYS, 0),
        (encoded(PICTURE[..., 0] > 128), np.where(GREYS > 128, 255, 0), 0),
        (
            encoded(Image.fromarray(np.dstack([255 - PICTURE, GREYS[..., 0] * 0]), "CMYK"), "JPEG", quality=100),
            PICTURE,
            8,
        ),
    ],
)
def test_images_of_every_mode_become_rgb(image, expected, tolerance, tmp_path):
    found = read(write_set(tmp_path / "set", images=[image] * 2))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def test_grey_video_becomes_rgb(tmp_path):
    found = read(write_set(tmp_path / "set", video=encoded_video([PICTURE[..., 0]] * 2, "gray")))
    assert np.abs(found.astype(int) - GREYS).max() <= 1
