"""Triton kernels against their plain versions: on the GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/unit/triton_kernels.py

`test_kernels.py` runs this file in a separate process, because Triton reads that variable when it is imported.

Tolerances: in float32, kernel and plain version compute the same formula with another order of operations, on values of
the order of 1 to 10, so the tolerance is 1e-5. In bfloat16 both round float32 results that may differ in their last
bits, so it is one unit in the last place (2^-7 of the value), and near 0 the float32 tolerance.
"""

import os

import numpy as np
import pytest
import torch
from test_engine import make_model, make_observation, noise_of

from torchpi.engine import InferenceEngine
from torchpi.engine.kernels import PLAIN, attention, triton_kernels
from torchpi.engine.quantize import quantize_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # from NumPy, for a sigmoid near 0
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def rounding_interpreter():
    """Make the interpreter round to bfloat16 and e4m3 as a GPU does: it truncates, and multiplies bit patterns."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def to_float32(handle):
        if handle.dtype.scalar == tl.float8e4nv:
            wide = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float().numpy()
        else:
            wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, tl.float32)

    def to_e4m3(self, source, kind, rounding_mode):
        assert (source.dtype.scalar, kind.scalar) == (tl.float32, tl.float8e4nv)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(rounded.numpy(), tl.float8e4nv)

    def rounding_cast(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    def float_dot(self, a, b, *others):
        a, b = (to_float32(x) if x.dtype.scalar in (tl.bfloat16, tl.float8e4nv) else x for x in (a, b))
        return dot(self, a, b, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        for name in ("create_fp_trunc", "create_fp_ext"):
            patch.setattr(InterpreterBuilder, name, rounding_cast)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", to_e4m3)
        patch.setattr(InterpreterBuilder, "create_dot", float_dot)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def kernels():
    return triton_kernels()


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_equal(got, expected, factor=1.0):
    """Assert equality within `factor` times the tolerances above."""
    assert got.dtype == expected.dtype
    relative = 1e-5 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.float(), expected.float(), rtol=factor * relative, atol=factor * 1e-5)


def assert_same_norms(total, got, expected):
    """Assert that the sum is bitwise equal, and the norm's output within the tolerances."""
    assert torch.equal(got[0], total)
    assert_equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "width"), [(1, 1, 64), (3, 7, 72), (1, 33, 200)])
class TestNorms:
    def test_rms_norm(self, kernels, batch, num_tokens, width, dtype):
        x, y = normal(2, batch, num_tokens, width, dtype=dtype)
        assert_same_norms(x, kernels.rms_norm(x), PLAIN.rms_norm(x))
        assert_same_norms(x + y, kernels.rms_norm(x, y), PLAIN.rms_norm(x + y))

    @pytest.mark.parametrize("per_token", [False, True])
    def test_ada_rms_norm(self, kernels, batch, num_tokens, width, dtype, per_token):
        x, y = normal(2, batch, num_tokens, width, dtype=dtype)
        tables = normal(2, batch, num_tokens, 3 * width, dtype=dtype)
        gates, modulation = tables if per_token else (tables[0, :1, :1].float(), tables[1, :, :1])
        assert_same_norms(x, kernels.ada_rms_norm(x, modulation), PLAIN.ada_rms_norm(x, modulation))
        total, normed = kernels.ada_rms_norm(x, modulation, y, gates)
        assert_equal(total, PLAIN.ada_rms_norm(x, modulation, y, gates)[0])
        assert_equal(normed, PLAIN.ada_rms_norm(total, modulation)[1])

    def test_layer_norm(self, kernels, batch, num_tokens, width, dtype):
        x, y = normal(2, batch, num_tokens, width, dtype=dtype) + 3
        weight, bias = normal(2, width)
        assert_same_norms(x, kernels.layer_norm(x, weight, bias), PLAIN.layer_norm(x, weight, bias))
        weight, bias = weight.to(dtype), bias.to(dtype)
        assert_same_norms(x + y, kernels.layer_norm(x, weight, bias, y), PLAIN.layer_norm(x + y, weight, bias))


def test_norms_of_small_and_large_rows_are_finite(kernels):
    x = torch.cat([torch.zeros(1, 1, 64), torch.full((1, 1, 64), 1e15)], dim=1).to(DEVICE)
    assert_same_norms(x, kernels.rms_norm(x), PLAIN.rms_norm(x))
    one = torch.ones(64, device=DEVICE)
    assert_same_norms(x, kernels.layer_norm(x, one, one), PLAIN.layer_norm(x, one, one))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_heads", "groups", "head_dim"),
    [(1, 1, 4, 1, 64), (3, 5, 4, 2, 24), (1, 51, 4, 1, 32), (1, 7, 0, 1, 32)],  # 0: only keys and values
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_split_rope_store(kernels, batch, num_tokens, num_heads, groups, head_dim, dtype, per_sample):
    qkv = normal(batch, num_tokens, (num_heads + 2 * groups) * head_dim, dtype=dtype)
    angle = 300 * torch.rand(batch if per_sample else 1, num_tokens, head_dim // 2, device=DEVICE)
    caches = [normal(2, 3, batch, num_tokens + 9, groups, head_dim, dtype=dtype)[:, 1] for _ in range(2)]
    caches[1].copy_(caches[0])  # the cache of one of several layers
    got = kernels.split_rope_store(qkv, angle.cos(), angle.sin(), *caches[0], 5)
    expected = PLAIN.split_rope_store(qkv, angle.cos(), angle.sin(), *caches[1], 5)
    assert_equal(got, expected)
    assert_equal(caches[0], caches[1])
    assert torch.equal(caches[0][1], caches[1][1])  # values are only copied
    assert torch.equal(caches[0][:, :, :5], caches[1][:, :, :5])
    assert torch.equal(caches[0][:, :, 5 + num_tokens :], caches[1][:, :, 5 + num_tokens :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "num_tokens", "width"), [(1, 1, 64), (3, 3, 1100), (1, 51, 72)])
def test_geglu(kernels, batch, num_tokens, width, dtype):
    gate_up = normal(batch, num_tokens, 2 * width, dtype=dtype) * 4
    assert_equal(kernels.geglu(gate_up), PLAIN.geglu(gate_up.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_tokens", "depth", "width"), [(1, 1, 64, 32), (1, 50, 72, 100), (3, 33, 200, 40)]
)
def test_linear_geglu(kernels, batch, num_tokens, depth, width, dtype):
    x, weight = normal(batch, num_tokens, depth, dtype=dtype), normal(2 * width, depth, dtype=dtype) * depth**-0.5
    # The plain version rounds gate and up to bfloat16, the kernel only the output.
    assert_equal(kernels.linear_geglu(x, weight), PLAIN.linear_geglu(x.float(), weight.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "num_tokens", "num_prefix", "num_state_tokens", "valid", "processors"),
    [
        (1, 50, 100, 0, [77], 132),  # blocks of 32 rows, 5 splits
        (1, 33, 69, 1, [50], 132),
        (2, 33, 40, 0, [40, 20, 17], 40),
        (2, 1, 5, 0, [2], 132),  # one split
        (1, 51, 69, 1, [1, 69, 33], 1),  # blocks of 64 rows
        (1, 100, 100, 0, [61], 8),
    ],
)
def test_attend(kernels, monkeypatch, groups, num_tokens, num_prefix, num_state_tokens, valid, processors, dtype):
    monkeypatch.setattr(attention, "num_processors", lambda device: processors)
    slots = num_prefix if num_prefix == num_tokens else num_prefix + num_tokens
    q = normal(len(valid), num_tokens, 4, 24, dtype=dtype)
    keys, values = normal(2, len(valid), slots, groups, 24, dtype=dtype)
    arguments = torch.tensor(valid, dtype=torch.int32, device=DEVICE), num_prefix, num_state_tokens
    got = kernels.attend(q, keys, values, *arguments).float()
    expected = PLAIN.attend(q.float(), keys.float(), values.float(), *arguments)
    # In bfloat16, as in the plain model, softmax weights and output are each rounded by a relative error of up to
    # 2^-9: together less than 2^-8 of the largest value.
    absolute = 2**-8 * values.float().abs().max().item() if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=absolute)


def test_attend_is_deterministic_and_resets_its_counters(kernels):
    q, keys = normal(1, 33, 4, 24), normal(1, 133, 1, 24)
    arguments = q, keys, keys, torch.tensor([90], dtype=torch.int32, device=DEVICE), 100
    first = kernels.attend(*arguments)
    assert torch.equal(kernels.attend(*arguments), first)
    (counters,) = kernels.attend._counters.values()
    assert not counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_fp8_rounds_to_the_same_bits_as_the_plain_one(kernels, dtype):
    edges = [0.0, -0.0, 17, 18, 19, 2**-10, 3 * 2**-10, 2**-11, 447, 448, 464, 465, -1e30, np.inf, -np.inf, np.nan]
    edges = torch.tensor(edges, device=DEVICE)
    values = torch.cat([edges, edges * 0.3, *(normal(200) * 10.0**i for i in range(-4, 4))]).to(dtype)[None, None]
    for scale in (1.0, 0.3, 1 / 448, 7e-5):
        got, expected = kernels.to_fp8(values, scale), PLAIN.to_fp8(values, scale)
        assert got.dtype == torch.float8_e4m3fn
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert kernels.to_fp8(values, None) is values


def fp8_calls(dtype):
    """Arguments of each operation that rounds to e4m3."""
    x, y = normal(2, 2, 7, 72, dtype=dtype)
    table, q, cache = normal(2, 1, 1, 216), normal(1, 33, 4, 24, dtype=dtype), normal(2, 1, 83, 1, 24, dtype=dtype)
    valid = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    return {
        "rms_norm": (x,), "rms_norm of a sum": (x, y), "ada_rms_norm": (x, table[0]),
        "ada_rms_norm of a sum": (x, table[1], y, table[0]), "layer_norm": (x, *x[0, :2]),
        "layer_norm of a sum": (x, *x[0, :2], y), "geglu": (x,),
        "linear_geglu": (x, normal(40, 72, dtype=dtype)), "attend": (q, *cache, valid, 50),
    }  # fmt: skip


@pytest.mark.parametrize("processors", [132, 1], ids=["splits", "one_split"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", fp8_calls(torch.float32))
def test_fp8_output_of_every_kernel_is_its_output_rounded(kernels, monkeypatch, name, dtype, processors):
    monkeypatch.setattr(attention, "num_processors", lambda device: processors)
    arguments = fp8_calls(dtype)[name]
    for implementation in (kernels, PLAIN):
        plain, rounded = (getattr(implementation, name.split()[0])(*arguments, **k) for k in ({}, {"fp8_scale": 0.001}))
        if isinstance(plain, tuple):
            assert torch.equal(plain[0], rounded[0])
            plain, rounded = plain[1], rounded[1]
        expected = PLAIN.to_fp8(plain, 0.001)
        assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))
        assert expected.float().abs().max() == 448  # some values are clamped


def test_fp8_linear_geglu_equals_the_plain_one(kernels):
    x, weight = PLAIN.to_fp8(normal(2, 17, 72), 0.01), PLAIN.to_fp8(normal(200, 72), 0.01)
    arguments = x, weight, 1e-4 * (1 + torch.rand(200, device=DEVICE)), 0.3
    got, expected = (operations.linear_geglu(*arguments).float() for operations in (kernels, PLAIN))
    # Float32 sums have another order, so a sum midway between two e4m3 numbers may be rounded to the other one.
    torch.testing.assert_close(got, expected, rtol=2**-3, atol=2**-9)
    assert (got != expected).float().mean() < 0.01


def test_another_stream_has_its_own_counters(kernels):
    assert kernels.for_another_stream().attend is not kernels.attend
    assert PLAIN.for_another_stream() is PLAIN


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "of_fp8"])
@pytest.mark.parametrize("pi05", [True, False])
def test_engine_with_kernels_samples_the_models_actions(kernels, pi05, fp8):
    model = make_model(pi05=pi05).to(DEVICE)
    observation, noise = make_observation(lengths=(17, 9)).to(DEVICE), noise_of(2).to(DEVICE)
    if fp8:
        quantize_model(model, "fp8", lambda: model.sample_actions(observation, noise=noise, num_steps=2))
    engine = InferenceEngine(model, mode="eager", kernels=kernels, prompt_lengths=[20], batch_sizes=[2])
    actions = engine.sample_actions(observation, noise=noise, num_steps=2)
    assert len(engine.metadata["warm_buckets"]) == 1
    expected = model.sample_actions(observation, noise=noise, num_steps=2)
    # If sums differ in their last bits, an activation may be rounded to the neighbouring value.
    atol = 2e-3 * expected.abs().max().item() if fp8 else 2e-5
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=atol)
