"""The engine's kernels: plain versions equal the model, and Triton kernels equal the plain versions."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from torchpi.config import GEMMA_VARIANTS, GemmaConfig
from torchpi.engine.kernels import PLAIN, rope, triton_kernels
from torchpi.model import gemma, layers, siglip

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = GEMMA_VARIANTS["tiny_expert"]  # D 128, Q 4, G 1, K 64
TWO_GROUPS = GemmaConfig(width=96, depth=1, mlp_dim=80, num_heads=4, num_kv_heads=2, head_dim=32)
NEAR = {"rtol": 1e-6, "atol": 1e-6}
"""Tolerances for the same float32 formula with another order of operations."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_rms_norm_times_its_scale_equals_the_models():
    norm = gemma.RMSNorm(128)
    torch.nn.init.normal_(norm.scale)
    x, y = torch.randn(2, 3, 7, 128)
    total, normed = PLAIN.rms_norm(x, y)
    torch.testing.assert_close(total, x + y)
    torch.testing.assert_close(normed * (1 + norm.scale), norm(x + y)[0], **NEAR)
    torch.testing.assert_close(PLAIN.rms_norm(x)[1] * (1 + norm.scale), norm(x)[0], **NEAR)


@pytest.mark.parametrize("per_token", [False, True])
def test_gated_residual_and_ada_rms_norm_equal_the_models(per_token):
    first, second = (gemma.AdaRMSNorm(128) for _ in range(2))
    for norm in (first, second):
        torch.nn.init.normal_(norm.dense.weight, std=0.1)
        torch.nn.init.normal_(norm.dense.bias)
    cond = torch.randn(3, 7, 128) if per_token else torch.randn(1, 128)
    modulations = [norm.modulation(cond) for norm in (first, second)]
    x, y = torch.randn(2, 3, 7, 128)
    normed, gate = first(x, modulations[0])
    torch.testing.assert_close(PLAIN.ada_rms_norm(x, modulations[0])[1], normed, **NEAR)
    total = gemma.add_residual(x, y, gate)
    got_total, got_normed = PLAIN.ada_rms_norm(x, modulations[1], y, modulations[0])
    torch.testing.assert_close(got_total, total, **NEAR)
    torch.testing.assert_close(got_normed, second(total, modulations[1])[0], **NEAR)


def test_layer_norm_equals_the_models():
    norm = torch.nn.LayerNorm(72, eps=siglip.LAYER_NORM_EPS)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, y = torch.randn(2, 3, 7, 72)
    expected = layers.float32_layer_norm(norm, x + y)
    total, normed = PLAIN.layer_norm(x, norm.weight, norm.bias, y)
    torch.testing.assert_close(total, x + y)
    torch.testing.assert_close(normed, expected, **NEAR)
    torch.testing.assert_close(PLAIN.layer_norm(x + y, norm.weight, norm.bias)[1], expected, **NEAR)


@pytest.mark.parametrize("config", [CONFIG, TWO_GROUPS])
def test_split_rope_equals_the_models_projection(config):
    attention = gemma.Attention(config)
    torch.nn.init.normal_(attention.qkv.weight, std=0.1)
    x, positions = torch.randn(3, 7, config.width), torch.randint(0, 300, (3, 7))
    cos, sin = (table[:, :, 0, : config.head_dim // 2] for table in gemma.rope_table(positions, config.head_dim))
    expected = attention.project(x, gemma.rope_table(positions, config.head_dim))
    qkv = attention.qkv(x)
    for got, want in zip(rope.split_rope(qkv, cos, sin, config.num_kv_heads), expected, strict=True):
        torch.testing.assert_close(got, want, **NEAR)
    with torch.no_grad():
        keys, values = torch.full((2, 3, 12, config.num_kv_heads, config.head_dim), torch.nan)
        q = PLAIN.split_rope_store(qkv, cos, sin, keys, values, 4)
        torch.testing.assert_close(q, expected[0], **NEAR)
        for cache, want in ((keys, expected[1]), (values, expected[2])):
            torch.testing.assert_close(cache[:, 4:11], want, **NEAR)
            assert cache[:, :4].isnan().all()
            assert cache[:, 11:].isnan().all()


def test_linear_geglu_equals_the_models_feed_forward():
    feed_forward = gemma.FeedForward(CONFIG)
    for weight in feed_forward.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x = torch.randn(3, 7, CONFIG.width)
    weight = feed_forward.gate_up.weight
    torch.testing.assert_close(feed_forward.down(PLAIN.linear_geglu(x, weight)), feed_forward(x), **NEAR)
    torch.testing.assert_close(PLAIN.geglu(F.linear(x, weight)), PLAIN.linear_geglu(x, weight), **NEAR)


@pytest.mark.parametrize("num_state_tokens", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_attend_equals_the_models_with_its_mask(groups, num_state_tokens):
    valid, num_prefix, num_suffix = torch.tensor([5, 9, 1], dtype=torch.int32), 9, 4
    q = torch.randn(3, num_suffix, 4, 32)
    keys, values = torch.randn(2, 3, num_prefix + num_suffix, groups, 32)
    mask = torch.zeros(3, num_suffix, num_prefix + num_suffix, dtype=torch.bool)
    for sample, length in enumerate(valid.tolist()):
        mask[sample, :, :length] = True
    mask[:, :, num_prefix:] = True
    if num_state_tokens:
        mask[:, 0, num_prefix + 1 :] = False
    expected = layers.attend(q, keys, values, mask)
    torch.testing.assert_close(PLAIN.attend(q, keys, values, valid, num_prefix, num_state_tokens), expected, **NEAR)
    over_prefix = PLAIN.attend(q, keys, values, valid, keys.shape[1])
    mask[:, :, num_prefix:] = False
    torch.testing.assert_close(over_prefix, layers.attend(q, keys, values, mask[:, -1:]), **NEAR)


@pytest.mark.parametrize(
    "subject",
    [
        "orm or rope",
        pytest.param(
            "geglu or to_fp8 or fp8_output or attend or stream or (engine and not of_fp8)", marks=pytest.mark.slow
        ),
        pytest.param("engine and of_fp8", marks=pytest.mark.slow),
    ],
)
def test_triton_kernels_equal_the_plain_ones_in_the_interpreter(subject):
    pytest.importorskip("triton")
    file = pathlib.Path(__file__).with_name("triton_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, file, "-k", subject], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_missing_triton_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the extra 'gpu': pip install 'torchpi\[gpu\]'"):
        triton_kernels()


def test_plain_kernels_import_without_triton():
    program = "import sys\nimport torchpi.engine.kernels\nassert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_triton_kernels_compile_for_gpus_without_spills_as_documented(tmp_path):
    pytest.importorskip("triton")
    written, documented = tmp_path / "kernels.md", ROOT / "docs" / "kernels.md"
    command = [sys.executable, ROOT / "scripts" / "compile_kernels.py", "--out", written]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if f"Triton {importlib.metadata.version('triton')}," in documented.read_text(encoding="utf-8"):
        assert written.read_text(encoding="utf-8") == documented.read_text(encoding="utf-8")
