"""Quantized layers equal their formulas, are saved in policy folders, and are refused where they are impossible."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from test_dataset_evaluation import ARM, write_set
from test_engine import conditions, make_model, make_observation, noise_of
from test_policy import request

import torchpi
from torchpi import Policy
from torchpi.cli import main
from torchpi.engine import InferenceEngine
from torchpi.engine import quantize as q
from torchpi.evaluation.quantization import quantize_policy
from torchpi.inspect.compare import _stages_of
from torchpi.model.layers import Linear
from torchpi.model.lora import LoraConfig, add_lora
from torchpi.model.pi0 import Pi0
from torchpi.robots.keys import flatten
from torchpi.transforms.normalize import NormStats

KINDS = ["int8", "fp8"]


def samples(model, **rtc):
    return model.sample_actions(make_observation(), noise=noise_of(), num_steps=4, **rtc)


def quantized(kind, *, pi05=True):
    model = make_model(pi05=pi05)
    q.quantize_model(model, kind, lambda: samples(model))
    return model


def e4m3(value: float) -> float:
    """Round to 4 exponent bits (bias 7) and 3 mantissa bits, ties to even, clamped to 448."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)  # values below 2⁻⁶ are subnormal
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)  # round() rounds ties to even


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
    assert q.to_fp8(values, 1.0).float().tolist() == [e4m3(value) for value in values.tolist()]


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


@pytest.mark.parametrize(("capability", "row_scales"), [((8, 9), False), ((9, 0), True), ((12, 0), False)])
def test_matmul_of_every_gpu_with_fp8_equals_the_emulation(capability, row_scales, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    generator = torch.Generator().manual_seed(0)
    layer = Linear(16, 16, bias=True)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(5, 16, generator=generator)
    fp8 = q.QuantizedLinear(layer, "fp8", 0.004)
    assert fp8.row_scales is row_scales
    # On "meta" the layer calls the GPU's matmul, which is replaced by the CPU's here.
    scaled_mm, calls = torch._scaled_mm, []

    def compute(*arguments, bias=None, **options):
        calls.append((arguments[2].shape, arguments[3].shape, bias))
        return scaled_mm(*arguments, bias=bias, **options)

    monkeypatch.setattr(torch, "_scaled_mm", compute)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    packed = q.takes_rounded(fp8, torch.float32)
    outputs = packed(q.to_fp8(x, 0.004)), fp8(x)
    monkeypatch.undo()
    shapes = (torch.Size([5, 1]), torch.Size([1, 16])) if row_scales else (torch.Size([]), torch.Size([]))
    assert [call[:2] for call in calls] == [shapes] * 2
    assert (calls[0][2] is not None) == row_scales  # the bias is added by the matmul
    for each in outputs:  # up to three roundings to bfloat16
        torch.testing.assert_close(each, packed(q.to_fp8(x, 0.004)), rtol=2**-6, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_rounded_beforehand_gives_the_same_bits(dtype):
    layer, x = random_linear(bias=True)
    fp8, x = q.QuantizedLinear(layer, "fp8", 0.004), x.to(dtype)
    packed = q.takes_rounded(fp8, dtype)
    assert torch.equal(packed(q.to_fp8(x, packed.input_scale)), fp8(x))
    assert torch.equal(packed.rows(q.to_fp8(x, packed.input_scale), 3), fp8.rows(x, 3))
    assert torch.equal(packed(x), fp8(x))
    fp8.emulated = True  # as on a device without e4m3
    assert q.takes_rounded(fp8, dtype) is fp8
    assert q.takes_rounded(layer, dtype) is layer


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
def test_input_gradient_ignores_rounding(kind):
    layer, x = random_linear()
    quantized_layer = q.QuantizedLinear(layer, kind, 0.01 if kind == "fp8" else None)
    x.requires_grad_()
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    (input_gradient,) = torch.autograd.grad(quantized_layer(x), x, gradient)
    weight = quantized_layer.weight.float() * quantized_layer.weight_scale[:, None]
    torch.testing.assert_close(input_gradient, gradient @ weight)


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


def test_calibrated_scales_come_from_the_largest_inputs():
    model, seen = make_model(), {}
    for name, layer in q.large_layers(model).items():
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
    assert set(q.large_layers(model)) - set(seen) == unused


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.1)])
def test_actions_stay_near_float32_and_the_engine_samples_the_same(kind, most, pi05):
    model = quantized(kind, pi05=pi05)
    for rtc in ({}, conditions(("guidance", "action_prefix"))):
        actions, exact = samples(model, **rtc), samples(make_model(pi05=pi05), **rtc)
        error = (actions - exact).abs().max() / exact.abs().max()
        assert 1e-4 < error < most
        engine = InferenceEngine(model, mode="eager").sample_actions(
            make_observation(), noise=noise_of(), num_steps=4, **rtc
        )
        # If sums differ in their last bits, an activation may be rounded to the neighbouring value.
        torch.testing.assert_close(engine, actions, rtol=0, atol=1e-3 * exact.abs().max().item())


def test_impossible_quantization_error_names_the_remedy():
    model = make_model()
    with pytest.raises(ValueError, match=r"Unknown quantization 'int4'; expected fp8 or int8\."):
        q.quantize_model(model, "int4")
    with pytest.raises(ValueError, match=r"give a dataset of the robot \(--dataset\), or choose int8"):
        q.quantize_model(model, "fp8")
    with pytest.raises(ValueError, match="Calibration did not run the model"):
        q.quantize_model(make_model(), "fp8", lambda: None)
    q.quantize_model(model, "int8")
    with pytest.raises(ValueError, match="already quantized to int8; quantize the original model instead"):
        q.quantize_model(model, "int8")
    with_lora = make_model()
    add_lora(with_lora, LoraConfig(2, 2.0, 2, 2.0), None)
    with pytest.raises(ValueError, match="merge_lora folds it"):
        q.quantize_model(with_lora, "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_nan_are_refused(kind):
    model = make_model()
    with torch.no_grad():
        model.expert.layers[1].attention.out.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights of expert\.layers\.1\.attention\.out contain NaN or infinity"):
        q.quantize_model(model, kind, lambda: samples(model))
    assert q.quantization_of(model) is None


def test_calibration_with_nan_is_refused():
    model = make_model()
    with torch.no_grad():
        model.vision.pos_embed[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"The inputs of vision\.blocks\.0\.qkv, .* became NaN or infinite"):
        q.quantize_model(model, "fp8", lambda: samples(model))
    assert q.quantization_of(model) is None


def test_unsupported_devices_are_refused(monkeypatch):
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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "arm")


@pytest.fixture(scope="module")
def source(tmp_path_factory, golden_root):
    """Policy folder for an arm with two joints."""
    config = dataclasses.replace(make_model().config, action_horizon=4, action_dim=3, vocab_size=512)
    model, generator = Pi0(config), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    one = NormStats(np.zeros(2), np.ones(2), np.full(2, -2.0), np.full(2, 2.0))
    policy = Policy(
        model,
        ARM,
        norm_stats={"state": one, "actions": one},
        tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
    )
    policy.save(path := tmp_path_factory.mktemp("policies") / "arm")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, source, dataset):
    out = tmp_path_factory.mktemp("quantized")
    main(["quantize", str(source), "--to", "int8", "-o", str(out / "int8")])
    data = ["--dataset", str(dataset), "--num-observations", "5"]
    main(["quantize", str(source), "--to", "fp8", *data, "-o", str(out / "fp8")])
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_folder_is_small_and_samples_the_same_bits_again(kind, folders, source, tmp_path):
    policy = torchpi.load_policy(folders / kind, device="cpu")
    policy.save(tmp_path / "again")
    again, original = torchpi.load_policy(tmp_path / "again", device="cpu"), torchpi.load_policy(source, device="cpu")
    observation = request(policy)
    noise = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    actions = policy.infer(observation, noise=noise)["actions"]
    assert np.array_equal(actions, again.infer(observation, noise=noise)["actions"])
    expected = original.infer(observation, noise=noise)["actions"]
    assert 0 < abs(actions - expected).max() < 0.1 * abs(expected).max()
    size = {path: (path / "model.safetensors").stat().st_size for path in (source, folders / kind, tmp_path / "again")}
    assert size[tmp_path / "again"] == size[folders / kind] < 0.75 * size[source]
    document = json.loads((folders / kind / "policy.json").read_text())
    assert document["format_version"] == 3
    assert document["quantization"]["kind"] == document["provenance"]["quantized"]["kind"] == kind
    assert json.loads((tmp_path / "again" / "policy.json").read_text())["quantization"] == document["quantization"]


def test_calibration_depends_only_on_dataset_and_seed(folders, source, dataset, tmp_path):
    expected = torchpi.load_policy(folders / "fp8", device="cpu")
    quantization = quantize_policy(source, tmp_path / "one", "fp8", dataset=dataset, num_observations=5)
    assert quantization == q.quantization_of(expected.model)
    other = quantize_policy(source, tmp_path / "two", "fp8", dataset=dataset, num_observations=1)
    few = json.loads((tmp_path / "two" / "policy.json").read_text())["provenance"]["quantized"]
    assert few["num_observations"] == 1
    name = "expert.layers.1.feed_forward.down"
    assert other.input_scales[name] < quantization.input_scales[name]  # from fewer observations


@pytest.mark.parametrize("kind", KINDS)
def test_doctor_and_compare_read_a_quantized_policy(kind, folders, source, tmp_path, capsys):
    observation = flatten(request(torchpi.load_policy(source, device="cpu")))
    np.savez(tmp_path / "observation.npz", **observation)
    main(["doctor", str(folders / kind), "--json"])
    assert json.loads(capsys.readouterr().out)["policy"]["quantization"] == kind
    both = ["--observation", str(tmp_path / "observation.npz"), "--json", "--device", "cpu"]
    main(["compare", str(folders / kind), str(folders / kind), *both])
    assert json.loads(capsys.readouterr().out)["same"] is True
    with pytest.raises(SystemExit):
        main(["compare", str(source), str(folders / kind), *both])
    report = json.loads(capsys.readouterr().out)
    assert report["settings"] == [f'quantization: null in A, "{kind}" in B']
    assert report["first_difference"] == "image tokens base_0_rgb"


@pytest.mark.parametrize("kind", KINDS)
def test_compare_stages_end_in_the_policys_actions(kind, folders):
    policy = torchpi.load_policy(folders / kind, device="cpu")
    noise = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    stages, _ = _stages_of(policy, request(policy), noise, 10)
    actions = policy.infer(request(policy), noise=noise)["actions"]
    np.testing.assert_allclose(stages["actions, robot's units"], actions, atol=2e-3 * abs(actions).max())


def error_of(capsys, *command):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_command_errors_name_the_remedy(folders, source, dataset, tmp_path, capsys):
    out = ["-o", tmp_path / "out"]
    assert "give a dataset of the robot (--dataset)" in error_of(capsys, "quantize", source, "--to", "fp8", *out)
    data = ["--dataset", dataset]
    none = error_of(capsys, "quantize", source, "--to", "fp8", *data, "--num-observations", 0, *out)
    assert "num_observations is 0; calibration needs 1 or more" in none
    assert "leave out --dataset" in error_of(capsys, "quantize", source, "--to", "int8", *data, *out)
    other = write_set(tmp_path / "other", camera="observation.images.side")
    wrong = error_of(capsys, "quantize", source, "--to", "fp8", "--dataset", other, *out)
    assert "front" in wrong
    assert "side" in wrong
    twice = error_of(capsys, "quantize", folders / "fp8", "--to", "int8", *out)
    assert "already quantized to fp8; quantize the original model instead" in twice
    assert "exists already" in error_of(capsys, "quantize", tmp_path / "none", "--to", "int8", "-o", folders / "int8")
    assert not (tmp_path / "out").exists()


def test_quantized_policy_is_neither_trained_nor_converted(folders, dataset, tmp_path, capsys):
    robot = tmp_path / "arm.json"
    robot.write_text(json.dumps(ARM.to_dict()))
    run = ["--dataset", dataset, "--embodiment", robot, "--out", tmp_path / "run"]
    message = error_of(capsys, "train", "--init", folders / "int8", *run)
    assert "is quantized to int8 and can't be trained; take the policy that it was made from" in message
    message = error_of(capsys, "convert", folders / "fp8", tmp_path / "out", "--to", "lerobot")
    assert "is quantized to fp8 and can't be converted" in message


LAYER = "expert.layers.0.attention.qkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version is 2, and quantization is stated"),
        (lambda d: d.update(quantization=None), "format_version is 3, and quantization is missing"),
        (lambda d: d["quantization"].update(kind="int4"), "int4"),
        (lambda d: d["quantization"]["input_scales"].update({"expert.layers.7": None}), "no layer expert.layers.7"),
        (lambda d: d["quantization"]["input_scales"].update({LAYER: 0.5}), "expected a positive number for fp8"),
        (lambda d: d["quantization"]["input_scales"].pop(LAYER), f"bfloat16 or float16, but {LAYER}.weight has I8"),
        (lambda d: d.update(quantization={"kind": "fp8", "input_scales": dict.fromkeys(
            d["quantization"]["input_scales"], 1.0)}), "has dtype I8; policy.json says torch.float8_e4m3fn"),
    ],
)  # fmt: skip
def test_contradictory_folder_is_refused(change, message, folders, tmp_path):
    shutil.copytree(folders / "int8", tmp_path / "policy")
    file = tmp_path / "policy" / "policy.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape(message)):
        torchpi.load_policy(tmp_path / "policy", device="cpu")
