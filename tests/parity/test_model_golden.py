"""Every stage of both models compared with openpi's tensors in float32, at valid tokens."""

import json

import numpy as np
import pytest
import torch

from torchpi.checkpoints.layout import stored_array
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.model.flow import euler_times, interpolate, posemb_sincos
from torchpi.model.gemma import rope_table
from torchpi.model.masks import make_attn_mask, token_positions

TOLERANCE = 2e-5
# A key bias shifts all logits of a query equally: its gradient is 0 up to rounding noise.
NO_GRADIENT = "MultiHeadDotProductAttention_0.key.bias"


def assert_close(ours, theirs, where=..., tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert (ours.detach() - theirs)[where].abs().max() <= tolerance


@pytest.fixture(scope="module")
def model(golden):
    return golden.model()


@pytest.fixture(scope="module")
def observation(golden):
    return golden.observation()


def test_image_tokens(golden, model, observation):
    for camera, image in observation.images.items():
        assert_close(model.vision(image, torch.float32), golden.outputs[f"image_tokens.{camera}"])


def test_siglip_stages(golden, model, observation):
    seen = {}

    def remember_stem(module, args, out):
        seen["stem"] = out

    def remember_encoded(module, args, out):
        seen["encoded"] = args[0]

    hooks = [
        model.vision.patch_embed.register_forward_hook(remember_stem),
        model.vision.head.register_forward_hook(remember_encoded),
    ]
    model.vision(observation.images["base_0_rgb"], torch.float32)
    for hook in hooks:
        hook.remove()
    assert_close(seen["stem"], golden.outputs["siglip_stem.base_0_rgb"].flatten(1, 2))
    assert_close(seen["encoded"], golden.outputs["siglip_encoded.base_0_rgb"])


def test_prefix(golden, model, observation):
    tokens, input_mask, ar_mask = model.embed_prefix(observation)
    assert_close(tokens, golden.outputs["prefix_tokens"])
    assert torch.equal(input_mask, golden.outputs["prefix_mask"])
    assert torch.equal(ar_mask, golden.outputs["prefix_ar_mask"])


def test_flow(golden):
    given, want = golden.inputs, golden.outputs
    x_t, u_t = interpolate(given["actions"], given["noise"], given["time"])
    assert_close(x_t, want["x_t"], tolerance=1e-6)
    assert_close(u_t, want["u_t"], tolerance=1e-6)
    embedding = posemb_sincos(given["time"], want["posemb_sincos"].shape[1], 4e-3, 4.0)
    assert_close(embedding, want["posemb_sincos"], tolerance=1e-7)


def test_suffix(golden, model, observation):
    tokens, input_mask, ar_mask, cond = model.embed_suffix(observation, golden.outputs["x_t"], golden.inputs["time"])
    assert_close(tokens, golden.outputs["suffix_tokens"])
    assert torch.equal(input_mask, golden.outputs["suffix_mask"])
    assert torch.equal(ar_mask, golden.outputs["suffix_ar_mask"])
    if golden.kind == "pi05":
        assert_close(cond, golden.outputs["adarms_cond"])
    else:
        assert cond is None


def test_masks_and_positions(golden):
    want = golden.outputs
    input_mask = torch.cat([want["prefix_mask"], want["suffix_mask"]], dim=1)
    ar_mask = torch.cat([want["prefix_ar_mask"], want["suffix_ar_mask"]])
    assert torch.equal(make_attn_mask(input_mask, ar_mask), want["attn_mask"])
    assert torch.equal(token_positions(input_mask).int(), want["positions"])
    assert torch.equal(token_positions(want["prefix_mask"]).int(), want["prefix_positions"])
    last_rows = make_attn_mask(input_mask, ar_mask, num_queries=want["suffix_mask"].shape[1])
    assert torch.equal(last_rows, want["attn_mask"][:, want["prefix_mask"].shape[1] :])


def original_prefix(golden):
    """openpi's embedded prefix, in the form of `embed_prefix`."""
    return tuple(golden.outputs[f"prefix_{name}"] for name in ("tokens", "mask", "ar_mask"))


def test_key_value_cache(golden, model, observation):
    mask = golden.outputs["prefix_mask"]
    cache = model.prefill(observation, original_prefix(golden))
    for layer, (keys, values, length) in enumerate(cache.key_values):
        assert length == mask.shape[1]
        assert_close(keys[:, :length], golden.outputs["kv_cache_k"][layer], where=mask)
        assert_close(values[:, :length], golden.outputs["kv_cache_v"][layer], where=mask)


def test_backbone_output(golden, model):
    """The output of the final norm, which only a text head would need; sampling skips it."""
    mask = golden.outputs["prefix_mask"]
    rope = rope_table(token_positions(mask), model.config.paligemma.head_dim)
    tokens = golden.outputs["prefix_tokens"]
    out, key_values = model.backbone(tokens, rope, mask[:, None, :])
    assert_close(out, golden.outputs["prefix_only_out"], where=mask)
    for ours, same in zip(key_values, model.backbone.keys_and_values(tokens, rope, mask[:, None, :]), strict=True):
        assert torch.equal(ours[0], same[0])
        assert torch.equal(ours[1], same[1])


@pytest.mark.parametrize("gradients", [False, True])
def test_denoise_step(golden, model, observation, gradients):
    """Keys and values of the suffix are written into the cache's buffers, or concatenated if gradients are enabled."""
    with torch.set_grad_enabled(gradients):
        cache = model.prefill(observation, original_prefix(golden))
        v_t = model.denoise_step(cache, golden.outputs["x_t"], golden.inputs["time"])
    assert_close(v_t, golden.outputs["v_t"])


def test_loss(golden, model, observation):
    given = golden.inputs
    loss = model.compute_loss(observation, given["actions"], noise=given["noise"], time=given["time"])
    assert_close(loss, golden.outputs["compute_loss"])
    assert_close(loss, golden.outputs["loss"])


@pytest.mark.parametrize("num_steps", [10, 4])
def test_sampled_actions(golden, model, observation, num_steps):
    actions = model.sample_actions(observation, noise=golden.inputs["noise"], num_steps=num_steps)
    assert_close(actions, golden.outputs[f"sample_actions_{num_steps}"])


@pytest.mark.parametrize("num_steps", [10, 4])
def test_euler_trajectory(golden, model, observation, num_steps):
    """x_t at every step, and the final result."""
    states = []
    hook = model.suffix.register_forward_hook(lambda module, args, out: states.append(args[1]))
    states.append(model.sample_actions(observation, noise=golden.inputs["noise"], num_steps=num_steps))
    hook.remove()
    # The hook recorded x_t of each step in order; the result was appended last.
    want = golden.outputs[f"sample_traj_{num_steps}_x"]
    assert len(states) == len(want)
    for ours, theirs in zip(states, want, strict=True):
        assert_close(ours, theirs)
    assert euler_times(num_steps) == golden.outputs[f"sample_traj_{num_steps}_time"][:-1].tolist()


def test_gradients(golden, observation):
    model, given = golden.model(), golden.inputs
    loss = model.compute_loss(observation, given["actions"], noise=given["noise"], time=given["time"]).mean()
    loss.backward()
    for parameter in model.parameters():  # the last prefix layer is partly unused
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    table = jax_table(model.config)
    norms = json.loads((golden.root / "grad_norms.json").read_text())
    assert {name.replace("/", ".") for name in norms} == set(table)
    with np.load(golden.root / "grads.npz") as arrays:
        want = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    assert loss.item() == pytest.approx(want.pop("__mean_loss__").item(), abs=1e-6)
    compared = 0
    for name, entry in table.items():
        if NO_GRADIENT in name:
            continue
        ours = stored_array(model, entry)
        assert ours.norm().item() == pytest.approx(norms[name.replace(".", "/")], rel=1e-4, abs=1e-6), name
        if name in want:
            assert_close(ours, want[name])
            compared += 1
    assert compared == len(want)


def test_bfloat16_stays_near_float32(golden, observation):
    """openpi in bfloat16 differs by 0.03 to 0.04 (max) and 0.005 to 0.009 (mean)."""
    model = golden.model(dtype=torch.bfloat16)
    actions = model.sample_actions(observation, noise=golden.inputs["noise"])
    difference = (actions - golden.outputs["sample_actions_10"]).abs()
    assert difference.max() <= 0.06
    assert difference.mean() <= 0.012


def test_float32_weights_with_bfloat16_matmuls(golden, observation):
    """Training precision, set by compute_dtype, is as accurate as bfloat16 weights."""
    model = golden.model()
    model.compute_dtype_override = torch.bfloat16
    actions = model.sample_actions(observation, noise=golden.inputs["noise"])
    difference = (actions - golden.outputs["sample_actions_10"]).abs()
    assert 1e-4 < difference.max() <= 0.06
    assert difference.mean() <= 0.012
