"""Augmentation: equality with openpi's images, and the effect of each parameter."""

import colorsys
import json

import numpy as np
import pytest
import torch

from torchpi.randomness import generator_at
from torchpi.training.augment import augment, draw, jitter, warp
from torchpi.training.config import Augmentation
from torchpi.types import Observation


def batch(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


@pytest.fixture(scope="module")
def golden_augment(golden_root):
    with np.load(golden_root / "augment" / "augment.npz") as arrays:
        return dict(arrays), json.loads((golden_root / "augment" / "augment.json").read_text())


@pytest.mark.parametrize("case", ["base.key1", "wrist.key0", "wrist.key2"])
def test_augmented_images_equal_openpi(case, golden_augment):
    """The golden images have every second row and column; openpi's saturation has no effect."""
    arrays, cases = golden_augment
    parameters = cases[case]
    image = torch.from_numpy(arrays["input_uint8"])[None].float() / 255
    if "rotate_theta_rad" in parameters:
        offset = torch.tensor([[parameters["crop_center_offset_y"], parameters["crop_center_offset_x"]]])
        image = warp(image, offset, batch(parameters["rotate_theta_rad"]), 212 / 224)
    if parameters["jitter_applied"]:
        values = (batch(parameters[f"jitter_{name}"]) for name in ("brightness", "contrast"))
        image = jitter(image, *values, batch(0.0), batch(parameters["jitter_hue"]))
    assert np.abs(image[0, ::2, ::2].numpy() - arrays[f"{case}.output"]).max() < 1e-4


def test_jitter_equals_colorsys():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((1, 6, 6, 3), np.float32))
    brightness, saturation, hue = 0.2, -0.3, 0.08
    out = jitter(image, batch(brightness), batch(0.0), batch(saturation), batch(hue))
    for before, after in zip(image.reshape(-1, 3).numpy(), out.reshape(-1, 3).numpy(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(h + hue, s * (1 + saturation), v * (1 - brightness) + brightness)
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_jitter_without_hue_and_saturation_equals_the_general_formula():
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.random((1, 8, 8, 3), np.float32))
    short = jitter(image, batch(-0.2), batch(0.3), batch(0.0), batch(0.0))
    long = jitter(image, batch(-0.2), batch(0.3), batch(0.0), batch(1e-12))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


def test_grey_and_black_stay_grey_and_black():
    image = torch.tensor([[[[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]]])
    out = jitter(image, batch(-0.2), batch(0.1), batch(-0.5), batch(0.1))
    assert out[0, 0, 0].abs().max() == 0
    assert out[0, 0, 1].std() < 1e-6


def test_zero_parameters_change_nothing():
    image = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(2)
    assert jitter(image, zeros, zeros, zeros, zeros) is image
    torch.testing.assert_close(warp(image, torch.zeros(2, 2), zeros, 1.0), image)


def observation(size: int = 16) -> Observation:
    generator = torch.Generator().manual_seed(0)
    images = {
        name: torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=generator)
        for name in ("base_0_rgb", "left_wrist_0_rgb")
    }
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    return Observation.from_dict(
        {
            "image": images,
            "state": torch.zeros(2, 4),
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": tokens == 0,
        }
    )


def test_wrist_cameras_are_not_warped_and_parameters_are_per_sample():
    before = observation()
    config = Augmentation(color_probability=0.0)
    values = np.stack([draw(config, generator_at(0, "test", i), 16) for i in range(2)])
    assert (values[0] != values[1]).any()
    parameters = {name: torch.from_numpy(values) for name in before.images}
    after = augment(before, config, parameters)
    torch.testing.assert_close(after.images["left_wrist_0_rgb"], before.images["left_wrist_0_rgb"])
    assert (after.images["base_0_rgb"] != before.images["base_0_rgb"]).any()
    # The same parameters give the same images again.
    alone = augment(observation(), config, {name: torch.from_numpy(values) for name in before.images})
    torch.testing.assert_close(alone.images["base_0_rgb"], after.images["base_0_rgb"])


def test_drawn_parameters_stay_in_their_ranges():
    config = Augmentation(crop=0.9, degrees=3.0, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05)
    values = np.stack([draw(config, generator_at(0, "range", i), 100) for i in range(400)])
    limits = [5, 5, np.radians(3), 0.1, 0.2, 0.3, 0.05]
    assert (np.abs(values) <= np.float32(limits)).all()
    assert (np.abs(values).max(axis=0) > 0.9 * np.float32(limits)).all()
    changed = (values[:, 3:] != 0).any(axis=1).mean()
    assert 0.4 < changed < 0.6


@pytest.mark.parametrize(
    "fields", [{"crop": 0.0}, {"crop": 1.1}, {"brightness": -0.1}, {"contrast": 1.0}, {"degrees": 200.0}, {"hue": 2.0}]
)
def test_invalid_settings_raise_error(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Augmentation(**fields)
