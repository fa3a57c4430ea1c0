"""Operations with hand-written gradients, compared with autograd on their plain formulas."""

import pytest
import torch
from torch.nn import functional as F

from torchpi.config import GemmaConfig
from torchpi.model.gemma import AdaRMSNorm, FeedForward, RMSNorm, apply_rope, rope_table
from torchpi.model.layers import attend


def drawn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def assert_same(found, expected, inputs, dtype=torch.float32):
    """Compare values and gradients of two results of the same inputs."""
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    assert found.dtype == dtype
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    gradients = [torch.autograd.grad(result, inputs, direction) for result in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_equals_rotation_formula(dtype):
    x = drawn(2, 5, 3, 8, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 3, 40], [0, 0, 5, 6, 7]])
    angle = positions[:, :, None, None] / 10_000.0 ** (torch.arange(4) / 4)  # [B, S, 1, K/2]
    first, second = x.float().split(4, dim=-1)
    expected = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    assert_same(apply_rope(x, rope_table(positions, 8)), torch.cat(expected, dim=-1).to(dtype), [x], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_equal_their_formulas(dtype):
    x, scale, modulation = drawn(3, 4, 16, dtype=dtype), drawn(16, seed=1), drawn(3, 1, 48, seed=2, dtype=dtype)

    def normalized():
        return x.float() / torch.sqrt((x.float() ** 2).mean(dim=-1, keepdim=True) + 1e-6)

    norm = RMSNorm(16)
    norm.scale = torch.nn.Parameter(scale.detach())
    expected = (normalized() * (1 + norm.scale)).to(dtype)
    assert_same(norm(x)[0], expected, [x, norm.scale], dtype)

    found, gate = AdaRMSNorm(16)(x, modulation)
    ada_scale, shift, expected_gate = modulation.split(16, dim=-1)
    assert_same(found, (normalized() * (1 + ada_scale) + shift).to(dtype), [x, modulation], dtype)
    assert torch.equal(gate, expected_gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geglu_equals_its_formula(dtype):
    x = drawn(2, 3, 8, dtype=dtype)
    layer = FeedForward(GemmaConfig(width=8, depth=1, mlp_dim=12, num_heads=1, num_kv_heads=1, head_dim=8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    gate, up = F.linear(x, layer.gate_up.weight.to(dtype)).split(12, dim=-1)
    expected = F.linear(F.gelu(gate, approximate="tanh") * up, layer.down.weight.to(dtype))
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    found = layer(x)
    torch.testing.assert_close(found, expected, **tolerance)
    inputs = [x, layer.gate_up.weight, layer.down.weight]
    for one, other in zip(*(torch.autograd.grad(r.sum(), inputs) for r in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_attention_equals_fused_attention(rows, dtype):
    q, k, v = (
        drawn(2, 5, 4, 8, dtype=dtype),
        drawn(2, 7, 2, 8, seed=1, dtype=dtype),
        drawn(2, 7, 2, 8, seed=2, dtype=dtype),
    )
    mask = None
    if rows:
        mask = torch.rand(2, rows, 7, generator=torch.Generator().manual_seed(4)) < 0.7
        mask[:, :, 0] = True
    heads = [part.transpose(1, 2) for part in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    fused = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None])
    assert_same(attend(q, k, v, mask), fused.transpose(1, 2).flatten(2), [q, k, v], dtype)
