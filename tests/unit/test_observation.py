"""`Observation.from_dict`: conversion of images, masks, state and tokens, and its errors."""

import re

import numpy as np
import pytest
import torch

from torchpi import Observation

B, L, A = 2, 5, 7


def data(**changes):
    fields = {
        "image": {
            "wrist": torch.arange(B * 4 * 6 * 3, dtype=torch.int32).reshape(B, 4, 6, 3).to(torch.uint8),
            "base": torch.zeros(B, 4, 6, 3, dtype=torch.uint8),
        },
        "image_mask": {"wrist": torch.tensor([True, False]), "base": torch.tensor([True, True])},
        "state": torch.linspace(-1, 1, B * A).reshape(B, A),
        "tokenized_prompt": torch.arange(B * L).reshape(B, L),
        "tokenized_prompt_mask": torch.tensor([[True] * 3 + [False] * 2, [True] * 5]),
    }
    return fields | changes


def test_uint8_images_are_scaled_to_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 1, 3).repeat(B, 1, 1, 1)
    image = Observation.from_dict(data(image={"base": levels}, image_mask={})).images["base"]
    assert image.dtype is torch.float32
    expected = np.arange(256).astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    assert torch.equal(image[1, :, 0, 2], torch.from_numpy(expected))
    assert (image.min(), image.max()) == (-1, 1)


def test_float32_images_are_not_changed():
    image = torch.rand(B, 4, 6, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(Observation.from_dict(data(image={"base": image}, image_mask={})).images["base"], image)


def test_from_dict_does_not_change_its_argument():
    given = data()
    before = {camera: image.clone() for camera, image in given["image"].items()}
    kept = {key: given[key] for key in given}
    observation = Observation.from_dict(given)
    for image in observation.images.values():
        image += 1
    assert {key: id(value) for key, value in given.items()} == {key: id(value) for key, value in kept.items()}
    assert list(given["image"]) == list(before)
    for camera, image in before.items():
        assert given["image"][camera].dtype is torch.uint8
        assert torch.equal(given["image"][camera], image)


def test_cameras_keep_their_order_and_masks_follow_it():
    masks = {"base": torch.tensor([True, True]), "wrist": torch.tensor([True, False])}
    observation = Observation.from_dict(data(image_mask=masks))
    assert list(observation.images) == list(observation.image_masks) == ["wrist", "base"]
    assert observation.image_masks["wrist"].tolist() == [True, False]


@pytest.mark.parametrize("masks", [{"wrist": torch.tensor([False, True])}, None])
def test_camera_without_mask_is_present_in_every_sample(masks):
    given = data(image_mask=masks)
    if masks is None:
        del given["image_mask"]
    observation = Observation.from_dict(given)
    assert observation.image_masks["base"].tolist() == [True, True]
    assert observation.image_masks["wrist"].tolist() == ([True, True] if masks is None else [False, True])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_becomes_float32(dtype):
    state = data()["state"].to(dtype)
    observation = Observation.from_dict(data(state=state))
    assert observation.state.dtype is torch.float32
    assert torch.equal(observation.state, state.float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_token_ids_of_any_integer_type_become_int64(dtype):
    observation = Observation.from_dict(data(tokenized_prompt=data()["tokenized_prompt"].to(dtype)))
    assert observation.tokenized_prompt.dtype is torch.int64
    assert torch.equal(observation.tokenized_prompt, data()["tokenized_prompt"])


def test_padding_may_be_minus_one():
    mask, tokens = data()["tokenized_prompt_mask"], data()["tokenized_prompt"]
    observation = Observation.from_dict(data(tokenized_prompt=tokens.masked_fill(~mask, -1)))
    assert torch.equal(observation.tokenized_prompt, tokens.masked_fill(~mask, 0))


def test_to_moves_every_tensor():
    moved = Observation.from_dict(data()).to("meta")
    tensors = [*moved.images.values(), *moved.image_masks.values(), moved.state]
    assert all(tensor.is_meta for tensor in [*tensors, moved.tokenized_prompt, moved.tokenized_prompt_mask])
    assert moved.batch_size == B


@pytest.mark.parametrize("key", ["image", "state", "tokenized_prompt", "tokenized_prompt_mask"])
def test_missing_key_error_lists_the_present_keys(key):
    given = data()
    del given[key]
    with pytest.raises(KeyError, match=rf"no '{key}'; it has .*image_mask"):
        Observation.from_dict(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {}}, "observation['image'] is empty"),
        ({"image": torch.zeros(B, 4, 6, 3)}, "observation['image'] must map cameras to tensors, got Tensor"),
        ({"image_mask": torch.ones(B, dtype=torch.bool)}, "observation['image_mask'] must map cameras to tensors"),
        ({"image_mask": None}, "observation['image_mask'] must map cameras to tensors, got NoneType"),
        ({"state": np.zeros((B, A), np.float32)}, "state must be a torch tensor, got ndarray; torch.from_numpy"),
        ({"state": torch.zeros(A)}, "state must have 2 dimensions with the batch first, got shape [7]"),
        ({"tokenized_prompt": torch.zeros(B, L)}, "tokenized_prompt must hold integer token ids, got torch.float32"),
        (
            {"tokenized_prompt": torch.zeros(B, L, dtype=torch.bool)},
            "tokenized_prompt must hold integer token ids, got torch.bool",
        ),
        (
            {"tokenized_prompt": torch.zeros(B + 1, L, dtype=torch.int64),
             "tokenized_prompt_mask": torch.ones(B + 1, L, dtype=torch.bool)},
            "state has batch size 2, tokenized_prompt 3",
        ),
        (
            {"tokenized_prompt_mask": torch.ones(B, L)},
            "tokenized_prompt_mask must be bool [2, 5], got torch.float32 [2, 5]",
        ),
        (
            {"tokenized_prompt_mask": torch.ones(B, L + 1, dtype=torch.bool)},
            "tokenized_prompt_mask must be bool [2, 5], got torch.bool [2, 6]",
        ),
        ({"image_mask": {"base": torch.ones(B)}}, "image_mask['base'] must be bool [2], got torch.float32 [2]"),
        (
            {"image_mask": {"base": torch.ones(B + 1, dtype=torch.bool)}},
            "image_mask['base'] must be bool [2], got torch.bool [3]",
        ),
        ({"image_mask": {"base": True}}, "image_mask['base'] must be a torch tensor, got bool"),
    ],
)  # fmt: skip
def test_invalid_value_error_states_the_found_value(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Observation.from_dict(data(**changes))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((B, 4, 6, 3), np.uint8), "image['base'] must be a torch tensor, got ndarray"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8), "image['base'] must have 4 dimensions with the batch first"),
        (
            torch.zeros(B, 3, 4, 6, dtype=torch.uint8),
            "(channels last), got [2, 3, 4, 6]; convert channels-first images",
        ),
        (torch.zeros(B, 4, 6, 4, dtype=torch.uint8), "image['base'] must be [2, h, w, 3] (channels last)"),
        (torch.zeros(B + 1, 4, 6, 3, dtype=torch.uint8), "image['base'] must be [2, h, w, 3]"),
        (torch.zeros(B, 4, 6, 3, dtype=torch.uint16), "must be uint8, or float32 in [-1, 1], got torch.uint16"),
        (torch.zeros(B, 4, 6, 3, dtype=torch.float64), "must be uint8, or float32 in [-1, 1], got torch.float64"),
        (torch.zeros(B, 4, 6, 3, dtype=torch.bool), "must be uint8, or float32 in [-1, 1], got torch.bool"),
        (torch.full((B, 4, 6, 3), 255.0), "has values from 255 to 255; expected float32 in [-1, 1]. Pass pixels"),
    ],
)
def test_invalid_image_error_names_the_camera(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Observation.from_dict(data(image={"base": image}, image_mask={}))


def test_unequal_image_sizes_error_lists_the_cameras():
    images = {"base": torch.zeros(B, 4, 6, 3), "wrist": torch.zeros(B, 4, 8, 3)}
    with pytest.raises(ValueError, match=r"the same size, got \{'base': \[4, 6\], 'wrist': \[4, 8\]\}"):
        Observation.from_dict(data(image=images))


def test_mask_of_unknown_camera_is_an_error():
    with pytest.raises(KeyError, match=r"cameras without an image: \['top'\]"):
        Observation.from_dict(data(image_mask={"top": torch.ones(B, dtype=torch.bool)}))
