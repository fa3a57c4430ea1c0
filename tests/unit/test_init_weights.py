"""Initial weights have openpi's distributions, parameter by parameter."""

import math

import pytest
import torch

import torchpi
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig, preset
from torchpi.model.gemma import rope_table

WIDE = {"depth": 2, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32}


@pytest.fixture(scope="module", params=[True, False], ids=["pi05", "pi0"])
def model(request):
    """A model wide enough for statistics, filled with NaN to detect parameters that init_weights misses."""
    config = Pi0Config(
        pi05=request.param,
        paligemma_variant=GemmaConfig(width=256, mlp_dim=512, **WIDE),
        action_expert_variant=GemmaConfig(width=128, mlp_dim=384, **WIDE),
        siglip_variant=VisionConfig(width=192, depth=2, mlp_dim=320, num_heads=4, patch=14),
        vocab_size=1000,
        image_size=56,
    )
    model = torchpi.Pi0(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def expected(model):
    """Distribution and std of each parameter (of the whole weight; for Xavier, of each part of qkv)."""
    table = {}
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1]
        if name == "embedding":
            table[name] = ("normal", 0.01)
        elif name == "vision.pos_embed":
            table[name] = ("normal", 192**-0.5)
        elif name.startswith("vision.head") or name.endswith(".scale") or ".dense." in name:
            table[name] = ("constant", 0.0)
        elif "norm" in name:  # SigLIP's LayerNorms
            table[name] = ("constant", 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            table[name] = ("normal", 1e-6) if ".fc" in name else ("constant", 0.0)
        elif name == "vision.patch_embed.weight":
            table[name] = ("lecun", width**-0.5)
        elif name.startswith("vision."):
            outputs = 192 if ".qkv." in name else parameter.shape[0]
            table[name] = ("xavier", math.sqrt(2 / (width + outputs)))
        else:
            table[name] = ("lecun", width**-0.5)
    return table


def test_mean_and_std_of_every_parameter(model):
    table = expected(model)
    assert set(table) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kind, value = table[name]
        values = parameter.detach().double()
        if kind == "constant":
            assert (values == value).all(), name
            continue
        count = values.numel()
        assert abs(values.mean()) <= 5 * value / count**0.5, name
        assert values.std().item() == pytest.approx(value, rel=5 / count**0.5), name
        bound = {"normal": 7.0, "lecun": 2 / 0.87962566103423978, "xavier": 3**0.5}[kind]
        assert values.abs().max() <= bound * value * (1 + 1e-6), name


def test_same_seed_gives_the_same_model(model):
    again = torchpi.Pi0(model.config)
    again.init_weights(torch.Generator().manual_seed(0))
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_initial_gates_are_zero():
    """With adaptive norms the expert is initially the identity: its output is the normalized input."""
    model = torchpi.Pi0(preset("tiny"))
    width, head_dim = model.config.action_expert.width, model.config.action_expert.head_dim
    generator = torch.Generator().manual_seed(0)
    tokens, cond = torch.randn(1, 3, width, generator=generator), torch.randn(1, width, generator=generator)
    modulations = model.expert.modulations(cond)
    out, _ = model.expert(tokens, rope_table(torch.arange(3)[None], head_dim), None, modulations=modulations)
    torch.testing.assert_close(out, tokens / tokens.square().mean(dim=-1, keepdim=True).sqrt())
