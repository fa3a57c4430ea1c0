"""Preprocessing as in training (openpi, LeRobot 0.4, LeRobot 0.5): image resize, and state in the prompt."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import torchpi
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.spec import PREPROCESSING, PolicySpec
from torchpi.config import Pi0Config
from torchpi.convert import convert
from torchpi.errors import CheckpointError
from torchpi.robots import get_embodiment
from torchpi.training.augment import jitter
from torchpi.transforms import ImageTransform, resize_with_pad

OPENPI, LEROBOT, LEROBOT_04 = (PREPROCESSING[name][0] for name in ("openpi", "lerobot", "lerobot_0.4"))
STEPS = {
    "policy_preprocessor.json": "relative_actions_processor",
    "policy_postprocessor.json": "absolute_actions_processor",
}
NEWER = (
    "use_relative_actions",
    "relative_exclude_joints",
    "action_feature_names",
    "pretrained_revision",
    "memory_frames",
)
NEWER += ("use_visual_memory", "use_proprioceptive_memory", "memory_stride", "memory_temporal_attention_every")
NEWER += ("rtc_training_max_delay",)


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.fixture
def unstated(golden, tmp_path):
    """Folder as written by LeRobot 0.4.4 and 0.5.0, which does not state the version."""
    root = shutil.copytree(golden.root / "lerobot", tmp_path / "lerobot")
    edit(root / "config.json", lambda d: [d.pop(name, None) for name in NEWER])
    for file, name in STEPS.items():
        edit(root / file, lambda d, name=name: d.update(steps=[s for s in d["steps"] if s["registry_name"] != name]))
    return root


def load(root, golden, **options):
    return torchpi.load_policy(root, config=golden.config, device="cpu", engine="eager", **options)


def request(size=(48, 96), dtype=np.uint8):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, *size), np.uint8)
    images = images if dtype == np.uint8 else images.astype(dtype) / dtype(255)
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    return {
        "observation": {"images": dict(zip(names, images, strict=True)), "state": np.zeros(32, np.float32)},
        "prompt": "go",
    }


# The resize


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (7, 5), (1, 200), (101, 33), (32, 32), (200, 200)])
@pytest.mark.parametrize("transform", [LEROBOT, LEROBOT_04])
def test_bilinear_resize_equals_pytorchs_interpolate(size, transform):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    out = resize_with_pad(image, 32, 32, transform)
    ratio = max(size) / 32
    inner = [max(1, int(length / ratio)) for length in size]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    scaled = torch.nn.functional.interpolate(pixels, inner, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    expected = np.full((32, 32, 3), transform.bars, np.float32)
    top, left = ((32 - length) // 2 for length in inner)
    expected[top : top + inner[0], left : left + inner[1]] = scaled.numpy() * 2 - 1
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_bars_of_minus_three_work_with_both_filters():
    image = np.random.default_rng(2).integers(0, 256, (20, 40, 3), np.uint8)
    plain, barred = (resize_with_pad(image, 16, 16, ImageTransform(bars=bars)) for bars in (-1, -3))
    assert (plain.dtype, barred.dtype) == (np.uint8, np.float32)
    np.testing.assert_allclose(barred[4:12], plain[4:12].astype(np.float32) / 255 * 2 - 1, atol=1e-6)
    assert (barred[:4] == -3).all()
    assert (barred[12:] == -3).all()


def test_augmentation_does_not_change_bars():
    images = torch.full((1, 4, 4, 3), -1.0)  # in [0, 1], where the model's -3 is -1
    images[:, 1:3] = 0.5
    changed = jitter(images, *torch.tensor([[0.2], [0.1], [0.3], [0.1]]))
    assert (changed[:, 0] == -1).all()
    assert not torch.equal(changed[:, 1:3], images[:, 1:3])


# LeRobot's version


def test_folder_without_version_is_read_as_lerobot_04_with_a_warning(unstated, golden):
    with pytest.warns(
        UserWarning, match=r"does not say whether LeRobot 0.4 or 0.5.0 trained it.*lerobot_0.4 is assumed"
    ):
        transforms = load(unstated, golden).transforms
    assert transforms.image_transform == LEROBOT_04
    assert transforms.prompt_state_dim == (32 if golden.kind == "pi05" else None)


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize(
    ("program", "expected"), [("openpi", OPENPI), ("lerobot", LEROBOT), ("lerobot_0.4", LEROBOT_04)]
)
def test_preprocessing_option_silences_the_warning(unstated, golden, program, expected, recwarn):
    spec = open_checkpoint(unstated, config=golden.config).spec().requested(preprocessing=program)
    assert spec.image_transform == expected
    assert spec.prompt_state_dim == (32 if program == "lerobot_0.4" else None)
    assert not recwarn.list


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "expected"), [({"seed": 1, "cudnn_deterministic": False}, LEROBOT), ({"seed": 1}, LEROBOT_04)]
)
def test_training_settings_distinguish_lerobot_050_from_earlier(unstated, golden, settings, expected):
    (unstated / "train_config.json").write_text(json.dumps(settings))
    spec = open_checkpoint(unstated, config=golden.config).spec()
    assert (spec.image_transform, spec.unstated) == (expected, "")


def later_field(root):
    edit(root / "config.json", lambda d: d.update(use_relative_actions=False))


def later_step(root):
    entry = {"registry_name": "relative_actions_processor", "config": {"enabled": False}}
    edit(root / "policy_preprocessor.json", lambda d: d["steps"].insert(2, entry))


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize("change", [later_field, later_step])
def test_fields_of_later_versions_identify_them(unstated, golden, change):
    change(unstated)
    spec = open_checkpoint(unstated, config=golden.config).spec()
    assert (spec.image_transform, spec.prompt_state_dim, spec.unstated) == (LEROBOT, None, "")


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
def test_base_without_statistics_is_read_as_current_lerobot(unstated, golden):
    for file in STEPS:
        edit(unstated / file, lambda d: [entry.pop("state_file", None) for entry in d["steps"]])
    spec = open_checkpoint(unstated, config=golden.config).spec()
    assert (spec.image_transform, spec.prompt_state_dim) == (LEROBOT, None)
    with pytest.warns(UserWarning, match="does not say"):
        spec.preprocessed_by(None)


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize("width", [0, -3, "32", 10**9, 2.5, True])
def test_invalid_state_width_is_an_error(unstated, golden, width):
    edit(unstated / "config.json", lambda d: d.update(max_state_dim=width))
    with pytest.raises(CheckpointError, match=r"max_state_dim is .*; expected 1 to 1000"):
        open_checkpoint(unstated, config=golden.config).spec()


# Saving and inference


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
def test_policy_folder_keeps_images_and_prompt(unstated, golden, tmp_path):
    loaded = load(unstated, golden, preprocessing="lerobot_0.4")
    loaded.save(tmp_path / "saved")
    again = torchpi.load_policy(tmp_path / "saved", device="cpu", engine="eager")
    document = json.loads((tmp_path / "saved/policy.json").read_text())
    assert document["image_transform"] == {"resize": "pad", "filter": "bilinear", "bars": -3}
    assert document["prompt"]["state_dim"] == 32
    one, other = (policy.prepare(request())[1] for policy in (loaded, again))
    np.testing.assert_array_equal(one["image"]["base_0_rgb"], other["image"]["base_0_rgb"])
    np.testing.assert_array_equal(one["tokenized_prompt"], other["tokenized_prompt"])
    assert again.metadata["image_transform"] == {"size": 224, "resize": "pad", "filter": "bilinear", "bars": -3}
    with_option = torchpi.load_policy(tmp_path / "saved", device="cpu", engine="eager", preprocessing="openpi")
    assert with_option.transforms.image_transform == OPENPI


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
def test_absent_cameras_are_black_and_all_images_of_a_request_have_one_dtype(unstated, golden):
    policy = load(unstated, golden, preprocessing="lerobot_0.4")
    observation = request()
    del observation["observation"]["images"]["right_wrist_0_rgb"]
    images = policy.prepare(observation)[1]["image"]
    assert (images["right_wrist_0_rgb"] == -1).all()
    assert (images["base_0_rgb"][0] == -3).all()
    assert np.isfinite(policy.infer(observation, num_steps=1)["actions"]).all()
    square = policy.prepare(request((224, 224)))[1]["image"]["base_0_rgb"]
    expected = (
        np.moveaxis(request((224, 224))["observation"]["images"]["base_0_rgb"], 0, -1).astype(np.float32) / 255 * 2 - 1
    )
    np.testing.assert_allclose(square, expected, atol=1e-6)


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
def test_float_images_on_uint8_levels_give_the_same_inputs(unstated, golden):
    policy = load(unstated, golden, preprocessing="lerobot")
    one, other = (policy.prepare(request(dtype=dtype))[1]["image"] for dtype in (np.uint8, np.float32))
    np.testing.assert_array_equal(one["base_0_rgb"], other["base_0_rgb"])


# Conversions


def spec_of(program, state=7):
    transform, state_dim = PREPROCESSING[program]
    robot = get_embodiment("so101")
    names = tuple(f"state_{i}" for i in range(state))
    robot = dataclasses.replace(robot, state=(dataclasses.replace(robot.state[0], names=names, units=()),))
    return PolicySpec("p", embodiment=robot, image_transform=transform, prompt_state_dim=state_dim)


PI05, PI0 = Pi0Config(pi05=True), Pi0Config(pi05=False)


@pytest.mark.parametrize(
    ("program", "target", "config", "expected"),
    [
        ("openpi", "openpi", PI05, None),
        ("lerobot", "lerobot", PI05, None),
        ("openpi", "lerobot", PI0, r"lerobot resizes images with another filter \(bilinear\)"),
        ("lerobot", "openpi", PI05, r"openpi resizes images with another filter \(bilinear_antialiased\)"),
    ],
)
def test_different_resize_of_the_target_is_noted(program, target, config, expected):
    notes = spec_of(program).require_preprocessing(target, config)
    assert bool(notes) == bool(expected)
    if expected:
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(notes[0])


@pytest.mark.parametrize("target", ["openpi", "lerobot"])
def test_transform_unsupported_by_target_is_an_error(target):
    with pytest.raises(CheckpointError, match=r"bars of -3 .* and 25 zeros behind the state in the prompt"):
        spec_of("lerobot_0.4").require_preprocessing(target, PI05)
    with pytest.raises(CheckpointError, match=r"trained with bars of -3 [^0-9]*, as in"):
        spec_of("lerobot_0.4").require_preprocessing(target, PI0)  # has no state in its prompt
    square = dataclasses.replace(spec_of("lerobot_0.4", state=32), image_transform=LEROBOT)
    square.require_preprocessing(target, PI05)  # as wide as the padding


@pytest.mark.parametrize("golden", ["pi05"], indirect=True)
@pytest.mark.parametrize("to", ["lerobot", "openpi-pytorch"])
def test_conversion_of_a_folder_of_04_needs_the_option(unstated, golden, tmp_path, to):
    options = {"config": golden.config, "check": False}
    with pytest.warns(UserWarning, match="does not say"), pytest.raises(CheckpointError, match="bars of -3"):
        convert(unstated, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()
