"""examples/nanopi.py, the explicit joint forward pass: it equals openpi, and `Pi0` equals it."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import torchpi
from torchpi.config import PRESETS
from torchpi.inspect import nanopi

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model(golden):
    return golden.model()


@pytest.fixture(scope="module")
def stages(golden, model):
    """All tensors that nanopi shows, by step and name."""
    shown = {}

    def show(step, name, tensor, layer=None):
        shown.setdefault((step, name), tensor)
        return tensor

    with torch.no_grad():
        run(model, golden.inputs, show)
    return shown


def run(model, inputs, show=nanopi.silent):
    w, config = nanopi.weights_of(model), model.config
    prefix = nanopi.embed_prefix(w, config, inputs, show)
    loss = nanopi.training_loss(w, config, prefix, inputs, show)
    return loss, nanopi.sample_actions(w, config, prefix, inputs["state"], inputs["noise"], show)


def test_installed_module_is_the_example():
    assert pathlib.Path(nanopi.__file__).read_text() == (ROOT / "examples" / "nanopi.py").read_text()


@pytest.mark.parametrize(
    ("step", "name", "original"),
    [
        ("2", "patch_embedding/base_0_rgb", "siglip_stem.base_0_rgb"),
        ("2", "final_norm/base_0_rgb", "siglip_encoded.base_0_rgb"),
        *(("2", f"image_tokens/{c}", f"image_tokens.{c}") for c in ("base_0_rgb", "left_wrist_0_rgb")),
        ("4", "prefix_tokens", "prefix_tokens"),
        ("4", "prefix_mask", "prefix_mask"),
        ("4", "prefix_ar_mask", "prefix_ar_mask"),
        ("5", "x_t", "x_t"),
        ("5", "u_t", "u_t"),
        ("5", "posemb_sincos", "posemb_sincos"),
        ("5", "adarms_cond", "adarms_cond"),
        ("5", "suffix_tokens", "suffix_tokens"),
        ("5", "suffix_mask", "suffix_mask"),
        ("5", "suffix_ar_mask", "suffix_ar_mask"),
        ("6", "attn_mask", "attn_mask"),
        ("6", "positions", "positions"),
        ("9", "prefix_out", "prefix_out"),
        ("9", "suffix_out", "suffix_out"),
        ("10", "v_t", "v_t"),
        ("11", "loss", "loss"),
        ("inference", "action_chunk", "sample_actions_10"),
    ],
)
def test_every_stage_equals_openpi(golden, stages, step, name, original):
    if name == "adarms_cond" and golden.kind == "pi0":
        assert (step, name) not in stages
        return
    found = stages[step, name]
    expected = golden.outputs[original]
    expected = expected.flatten(1, 2) if name.startswith("patch_embedding") else expected
    assert found.shape == expected.shape
    valid = golden.outputs["prefix_mask"] if name == "prefix_out" else ...  # rows of padding are arbitrary
    assert (found.double() - expected.double()).abs()[valid].max() <= TOLERANCE


def test_cache_and_euler_steps_equal_openpi(golden, stages):
    valid = golden.outputs["prefix_mask"]
    assert not valid.all()  # there is padding inside the prefix, before the suffix
    for i in range(len(golden.outputs["kv_cache_k"])):
        for letter in "kv":
            expected = golden.outputs[f"kv_cache_{letter}"][i]
            for step in ("8", "inference"):
                difference = stages[step, f"cache/layer_{i}/{letter}"] - expected
                assert difference[valid].abs().max() <= TOLERANCE
    times = golden.outputs["sample_traj_10_time"][:-1]
    for x_t, t in zip(golden.outputs["sample_traj_10_x"], times, strict=False):
        assert stages["inference", f"time/t={t:.3g}"][0] == t
        assert (stages["inference", f"x_t/t={t:.3g}"] - x_t).abs().max() <= TOLERANCE


@torch.no_grad()
def test_pi0_equals_nanopi(golden, model):
    observation, given = golden.observation(), golden.inputs
    loss, actions = run(model, given)
    ours = model.compute_loss(observation, given["actions"], noise=given["noise"], time=given["time"])
    assert (ours - loss).abs().max() <= TOLERANCE
    assert (model.sample_actions(observation, noise=given["noise"]) - actions).abs().max() <= TOLERANCE


def test_gradients_of_pi0_equal_those_of_the_joint_forward(golden, model):
    observation, given = golden.observation(), golden.inputs
    losses = (
        lambda: run(model, given)[0],
        lambda: model.compute_loss(observation, given["actions"], noise=given["noise"], time=given["time"]),
    )
    gradients = []
    for loss in losses:
        model.zero_grad()
        loss().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    joint, cached = gradients
    # The joint forward pass computes more of the last backbone layer, but the velocity does not depend on that.
    assert set(cached) == set(joint)
    assert all((joint[name] - cached[name]).abs().max() <= 1e-5 * (1 + joint[name].abs().max()) for name in joint)


@torch.no_grad()
def test_expert_equals_the_joint_forward_to_the_last_digits_in_float64(golden, monkeypatch):
    model, observation, given = golden.model(torch.float64), golden.observation(), golden.inputs
    w, prefix = nanopi.weights_of(model), model.embed_prefix(observation)
    conditioning = model.time_conditioning(given["time"])
    tokens, *_ = model.embed_suffix(observation, golden.outputs["x_t"], given["time"])
    found = []

    def show(step, name, tensor, layer=None):
        found.extend([tensor] if name == "suffix_out" else [])
        return tensor

    # Norms and RoPE are computed in float32, whose rounding would hide differences below 1e-7.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    nanopi.training_loss(w, model.config, prefix, given, show)
    cache = model.prefill(observation, prefix)
    attention, modulations = cache.suffix, conditioning.modulations
    out, _ = model.expert(
        tokens.double(), attention.rope, attention.mask, past=cache.key_values, modulations=modulations
    )
    assert out.dtype is torch.float64
    assert (out - found[0]).abs().max() <= 1e-12


def test_query_without_keys_attends_uniformly():
    q, k, v = torch.randn(1, 2, 2, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    mask = torch.tensor([[[True, False, False], [False, False, False]]])
    shown = {}
    out = nanopi.attention(q, k, v, mask, 0, lambda step, name, x, layer: shown.setdefault(name, x))
    assert shown["logits"].shape == shown["probs"].shape == (1, 1, 2, 2, 3)
    torch.testing.assert_close(out[0, 0], v[0, 0, 0].repeat(2))
    torch.testing.assert_close(shown["probs"][..., 1, :], torch.full((1, 1, 2, 3), 1 / 3))


def test_weights_include_a_fixed_position_embedding():
    vision = dataclasses.replace(PRESETS["tiny"].siglip, position="sincos2d")
    model = torchpi.Pi0(dataclasses.replace(PRESETS["tiny"], siglip_variant=vision), device="meta")
    assert nanopi.weights_of(model)["vision.pos_embed"].shape == (36, vision.width)


@pytest.mark.slow
def test_command_writes_loss_and_actions(golden, tmp_path):
    arguments = ["--config", golden.config, "--inputs", golden.root / "inputs.npz", "--out", tmp_path / "y.npz"]
    command = [sys.executable, ROOT / "examples" / "nanopi.py", golden.checkpoint, *arguments]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    with np.load(tmp_path / "y.npz") as found:
        assert np.abs(found["loss"] - golden.outputs["loss"].numpy()).max() <= TOLERANCE
        assert np.abs(found["actions"] - golden.outputs["sample_actions_10"].numpy()).max() <= TOLERANCE
    steps = [line.split()[0] for line in out.splitlines()]
    assert [step for step in dict.fromkeys(steps) if step in ("0", "4", "6", "7-4", "11")] == [
        "0",
        "4",
        "6",
        "7-4",
        "11",
    ]
    assert "q_grouped" in out
    assert "random inputs" not in out


def test_command_draws_random_inputs(golden):
    command = [sys.executable, ROOT / "examples" / "nanopi.py", golden.checkpoint, "--config", golden.config]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    assert "(random inputs: not a quality measure)" in out.splitlines()[-1]
