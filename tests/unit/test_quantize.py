"""Quantized layers compute what their formulas say, travel in a policy folder, and are refused where they cannot be."""

import math

import pytest
import torch
from test_engine import conditions, make_model, make_observation, noise_of

from torchpi.engine import InferenceEngine
from torchpi.engine import quantize as q
from torchpi.model.layers import Linear
from torchpi.model.lora import LoraConfig, add_lora

KINDS = ["int8", "fp8"]


def samples(model, **rtc):
    return model.sample_actions(make_observation(), noise=noise_of(), num_steps=4, **rtc)


def quantized(kind, *, pi05=True):
    model = make_model(pi05=pi05)
    q.quantize_model(model, kind, lambda: samples(model))
    return model


def e4m3(value: float) -> float:
    """The nearest value with 4 exponent bits (bias 7) and 3 mantissa bits, ties to even; at most 448."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)  # below 2⁻⁶ they are subnormal
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)  # round() takes ties to even


def random_linear(bias=False):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(16, 8, bias=bias)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer, torch.randn(5, 16, generator=generator)


def test_fp8_rounds_as_e4m3_by_hand():
    values = torch.cat([torch.randn(200, generator=torch.Generator().manual_seed(1)) * 10.0**i for i in range(-4, 4)])
    ties = torch.tensor([0.0, 17.0, 18.0, 19.0, 2**-10, 3 * 2**-10, 448.0, 449.0, 1e9, -1e9])
    values = torch.cat([values, ties])
    rounded = q._round(values[None], torch.float8_e4m3fn)[0].float()
    assert rounded.tolist() == [e4m3(value) for value in values.tolist()]


def test_fp8_emulation_equals_the_formula_and_scaled_mm():
    layer, x = random_linear()
    scale = 0.004
    fp8 = q.QuantizedLinear(layer, "fp8", scale)
    peaks = layer.weight.abs().amax(dim=1) / 448
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for row in range(5):
        for out in range(8):
            products = (
                e4m3((x[row, i] / scale).item()) * e4m3((layer.weight[out, i] / peaks[out]).item()) for i in range(16)
            )
            expected[row, out] = math.fsum(products) * scale * peaks[out].item()
    torch.testing.assert_close(fp8(x).double(), expected, rtol=1e-5, atol=1e-6)
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.full((5, 1), scale), fp8.weight_scale.detach()[None]
    scaled_mm = torch._scaled_mm(rounded, fp8.weight.t(), *scales, out_dtype=torch.float32)
    torch.testing.assert_close(fp8(x), scaled_mm, rtol=1e-6, atol=1e-6)


def test_int8_equals_its_formula():
    layer, x = random_linear(bias=True)
    int8 = q.QuantizedLinear(layer, "int8", None)
    weight_scale, row_scale = layer.weight.abs().amax(dim=1) / 127, x.abs().amax(dim=1, keepdim=True) / 127
    weight, rows = (layer.weight / weight_scale[:, None]).round(), (x / row_scale).round()
    assert weight.abs().max() == 127
    expected = (rows.double() @ weight.double().t()) * row_scale * weight_scale + layer.bias
    torch.testing.assert_close(int8(x).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(int8.rows(x, 3), int8(x)[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_of_zeros_give_zeros(kind):
    layer, x = random_linear()
    layer.weight.data[2] = 0
    x[1] = 0
    out = q.QuantizedLinear(layer, kind, 0.01 if kind == "fp8" else None)(x)
    assert out[1].eq(0).all()
    assert out[:, 2].eq(0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_input_passes_over_its_rounding(kind):
    layer, x = random_linear()
    quantized_layer = q.QuantizedLinear(layer, kind, 0.01 if kind == "fp8" else None)
    x.requires_grad_()
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(quantized_layer(x), x, gradient)
    weight = quantized_layer.weight.float() * quantized_layer.weight_scale[:, None]
    torch.testing.assert_close(found, gradient @ weight)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_dtypes_and_values_when_the_model_is_cast(kind):
    layer, x = random_linear(bias=True)
    moved = q.QuantizedLinear(layer, kind, 0.01 if kind == "fp8" else None)
    before = moved(x)
    moved.to(torch.bfloat16)
    assert moved.weight.dtype is q.DTYPES[kind]
    assert moved.weight_scale.dtype is torch.float32
    assert moved.bias.dtype is torch.bfloat16
    torch.testing.assert_close(moved(x), before, rtol=1e-2, atol=1e-2)  # the bias is rounded


def test_calibrated_scales_are_the_maxima_that_were_seen():
    model, seen = make_model(), {}
    for name, layer in q._large_layers(model).items():
        forward = layer.rows

        def rows(x, first, name=name, forward=forward):
            seen[name] = max(seen.get(name, 0.0), x.abs().max().item())
            return forward(x, first)

        layer.rows = rows
        layer.forward = lambda x, rows=rows: rows(x, 0)
    q._fold_norms(model)
    samples(model)
    quantization = q.quantization_of(quantized("fp8"))
    assert quantization.input_scales == {name: peak / 448 for name, peak in seen.items()}
    unused = {f"backbone.layers.1.{name}" for name in ("attention.out", "feed_forward.gate_up", "feed_forward.down")}
    assert set(q._large_layers(model)) - set(seen) == unused


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.1)])
def test_actions_stay_near_those_in_float32_and_the_engine_samples_the_same(kind, most, pi05):
    model = quantized(kind, pi05=pi05)
    for rtc in ({}, conditions(("guidance", "action_prefix"))):
        actions, exact = samples(model, **rtc), samples(make_model(pi05=pi05), **rtc)
        error = (actions - exact).abs().max() / exact.abs().max()
        assert 1e-4 < error < most
        engine = InferenceEngine(model, mode="eager").sample_actions(
            make_observation(), noise=noise_of(), num_steps=4, **rtc
        )
        # A rounded activation may be the next one where the sums before it differ in their last bits.
        torch.testing.assert_close(engine, actions, rtol=0, atol=1e-3 * exact.abs().max().item())


def test_quantization_that_cannot_be_names_the_remedy():
    model = make_model()
    with pytest.raises(ValueError, match=r"Unknown quantization 'int4'; expected fp8 or int8\."):
        q.quantize_model(model, "int4")
    with pytest.raises(ValueError, match=r"give a dataset of the robot \(--dataset\), or choose int8"):
        q.quantize_model(model, "fp8")
    with pytest.raises(ValueError, match="sampled nothing"):
        q.quantize_model(make_model(), "fp8", lambda: None)
    q.quantize_model(model, "int8")
    with pytest.raises(ValueError, match="quantized already, to int8; quantize the one that it was made of"):
        q.quantize_model(model, "int8")
    with_lora = make_model()
    add_lora(with_lora, LoraConfig(2, 2.0, 2, 2.0), None)
    with pytest.raises(ValueError, match="merge_lora folds it"):
        q.quantize_model(with_lora, "int8")


def test_devices_without_the_matmul_are_refused(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 8\.9 or higher; cuda, NVIDIA A100, has 8\.0: .*--emulate-fp8"):
        q.check_device("fp8", cuda, emulate_fp8=False)
    q.check_device("fp8", cuda, emulate_fp8=True)
    with pytest.raises(ValueError, match="int8, which does not run on cuda: choose device cpu"):
        q.check_device("int8", cuda, emulate_fp8=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    q.check_device("fp8", cuda, emulate_fp8=False)
