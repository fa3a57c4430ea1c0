"""The joint forward equals the original, and the working path (prefill + denoise_step) equals the joint forward."""

import pytest
import torch

from torchpi.joint import explicit_attention, joint_forward, joint_transformer


@pytest.fixture(scope="module")
def model(golden):
    return golden.model()


def cached_velocity(model, observation, x_t, time):
    return model.denoise_step(model.prefill(observation), x_t, time)


@torch.no_grad()
def test_joint_forward_equals_the_original(golden, model):
    joint = joint_forward(model, golden.observation(), golden.outputs["x_t"], golden.inputs["time"])
    real = golden.outputs["prefix_mask"]
    assert not real.all()  # padding inside the prefix, in front of the suffix
    assert torch.equal(joint.attn_mask, golden.outputs["attn_mask"])
    assert torch.equal(joint.positions, golden.outputs["positions"].to(torch.int64))
    assert (joint.prefix_out - golden.outputs["prefix_out"])[real].abs().max() <= 2e-5
    assert (joint.suffix_out - golden.outputs["suffix_out"]).abs().max() <= 2e-5
    assert (joint.v_t - golden.outputs["v_t"]).abs().max() <= 2e-5


def test_cached_equals_joint_with_gradients(golden, model):
    x_t, time = golden.outputs["x_t"], golden.inputs["time"]
    gradients, velocities = [], []
    for v_t in (
        joint_forward(model, golden.observation(), x_t, time).v_t,
        cached_velocity(model, golden.observation(), x_t, time),
    ):
        model.zero_grad()
        (v_t - golden.outputs["u_t"]).square().mean().backward()
        velocities.append(v_t.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert (velocities[0] - velocities[1]).abs().max() <= 1e-5
    joint, cached = gradients
    # Of the last backbone layer, the joint forward computes more, of which nothing reaches the velocity.
    assert set(cached) == set(joint)
    assert all((joint[name] - cached[name]).abs().max() <= 1e-5 * (1 + joint[name].abs().max()) for name in joint)


@torch.no_grad()
def test_cached_equals_joint_to_the_last_digits_in_float64(golden, monkeypatch):
    model = golden.model(torch.float64)
    tokens, input_mask, ar_mask = model.embed_prefix(golden.observation())
    suffix = model.embed_suffix(golden.observation(), golden.outputs["x_t"], golden.inputs["time"])
    suffix_tokens, suffix_mask, suffix_ar_mask, _ = suffix
    modulations = model.time_conditioning(golden.inputs["time"]).modulations
    # Norms and rotations go through float32, whose rounding would hide everything below 1e-7.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    joint = joint_transformer(
        model,
        (tokens, suffix_tokens.double()),
        torch.cat([input_mask, suffix_mask], dim=1),
        torch.cat([ar_mask, suffix_ar_mask]),
        modulations,
    )
    cache = model.prefill(golden.observation(), (tokens, input_mask, ar_mask))
    (rope, mask), past = (cache.suffix.rope, cache.suffix.mask), cache.key_values
    out, _ = model.expert(suffix_tokens.double(), rope, mask, past=past, modulations=modulations)
    assert out.dtype is torch.float64
    assert (out - joint.suffix_out).abs().max() <= 1e-12


def test_a_row_that_may_attend_to_nothing_attends_to_everything_alike():
    q, k, v = torch.randn(1, 2, 2, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    mask = torch.tensor([[[True, False, False], [False, False, False]]])
    out, logits, probs = explicit_attention(q, k, v, mask)
    assert logits.shape == probs.shape == (1, 1, 2, 2, 3)
    torch.testing.assert_close(out[0, 0], v[0, 0, 0].repeat(2))
    torch.testing.assert_close(probs[..., 1, :], torch.full((1, 1, 2, 3), 1 / 3))


@torch.no_grad()
def test_record_gets_the_attention_of_the_first_layer(golden, model):
    found = {}
    joint_forward(model, golden.observation(), golden.outputs["x_t"], golden.inputs["time"], record=found.__setitem__)
    config = model.config.paligemma
    tokens = golden.outputs["positions"].shape[1]
    assert found["q"].shape == (2, tokens, config.num_heads, config.head_dim)
    assert found["logits"].shape == found["probs"].shape == (2, 1, config.num_heads, tokens, tokens)
    assert found["attn_out"].shape == (2, tokens, config.num_heads * config.head_dim)
