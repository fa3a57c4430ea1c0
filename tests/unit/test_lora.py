"""LoRA: attaching, merging, trainable parameters, and files."""

import contextlib
import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

import torchpi
from torchpi.checkpoints.adapter import Base, load_adapter, read_adapter, save_adapter
from torchpi.checkpoints.folder import write_weights
from torchpi.checkpoints.lora import write_lora_params
from torchpi.checkpoints.openpi import JaxArrays, find_params
from torchpi.checkpoints.openpi_layout import jax_table, lora_table
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig, preset
from torchpi.convert import convert
from torchpi.model.layers import Linear
from torchpi.model.lora import LoraConfig, add_lora, is_lora, lora_config, merge_lora, trainable_parameters
from torchpi.model.pi0 import Pi0
from torchpi.robots import Embodiment

LORA = LoraConfig(backbone_rank=2, backbone_alpha=6.0, expert_rank=3, expert_alpha=1.5)
BASE = {"address": "gs://openpi-assets/checkpoints/pi05_base", "dtype": "float32"}
ALPHA = (8.0, 3.0)  # as in the golden LoRA checkpoints


def sizes(*, pi05: bool = True, kv_heads: int = 1, width: int = 16) -> Pi0Config:
    return Pi0Config(
        pi05=pi05,
        paligemma_variant=GemmaConfig(width, 2, 24, 2, kv_heads, 8),
        action_expert_variant=GemmaConfig(12, 2, 20, 2, kv_heads, 8),
        siglip_variant=VisionConfig(16, 1, 16, 2),
        action_dim=4,
        action_horizon=3,
        max_token_len=5,
        vocab_size=32,
        image_size=28,
    )


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_model(config: Pi0Config | None = None, **options) -> Pi0:
    """Random weights everywhere: initial gates are zero and would hide differences."""
    model = Pi0(config or sizes(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return model


def lora_model(config: Pi0Config | None = None, lora: LoraConfig = LORA, **options) -> Pi0:
    """LoRA with matrices as large as the weights, so that errors show."""
    model = plain_model(config, **options)
    add_lora(model, lora, seeded())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.mul_(30)
    return model


def observe(config: Pi0Config, batch: int = 2) -> torchpi.Observation:
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    side, g = config.image_size, seeded()
    return torchpi.Observation.from_dict(
        {
            "image": {c: torch.randint(256, (batch, side, side, 3), generator=g, dtype=torch.uint8) for c in cameras},
            "image_mask": {c: torch.tensor([True, c != cameras[2]]) for c in cameras},
            "state": torch.randn(batch, config.action_dim, generator=g),
            "tokenized_prompt": torch.randint(config.vocab_size, (batch, 5), generator=g),
            "tokenized_prompt_mask": torch.tensor([[True] * 5, [True, True, False, False, False]]),
        }
    )


def sample(model: Pi0) -> torch.Tensor:
    noise = torch.randn(2, 3, 4, generator=seeded())
    return model.sample_actions(observe(model.config), noise=noise, num_steps=4)


def loss(model: Pi0) -> torch.Tensor:
    noise, actions = torch.randn(2, 2, 3, 4, generator=seeded()).unbind()
    return model.compute_loss(observe(model.config), actions, noise=noise, time=torch.tensor([0.3, 0.8])).mean()


def state(model: Pi0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone_rank": -1},
        {"expert_alpha": 0.0},
        {"backbone_alpha": float("nan")},
        {"backbone_rank": 0, "expert_rank": 0},
        {"attention": False, "feed_forward": False},
    ],
)
def test_invalid_configs_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraConfig(**wrong)


def test_lora_adds_to_the_base_and_is_initially_small():
    model = plain_model(dtype=torch.bfloat16)
    before = dict(model.named_parameters())
    add_lora(model, LORA, seeded(3))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name: p for name, p in after.items() if name not in before}
    assert all(is_lora(name) for name in added)
    assert {p.dtype for p in added.values()} == {torch.float32}
    for letter in ("lora_a", "lora_b"):
        values = torch.cat([p.flatten() for name, p in added.items() if name.endswith(letter)])
        assert values.std().item() == pytest.approx(0.01, rel=0.05)
    assert lora_config(model) == LORA
    again = plain_model(dtype=torch.bfloat16)
    add_lora(again, LORA, seeded(3))
    assert_same(state(again), state(model))
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model, LORA, seeded())


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_merging_changes_no_result(pi05, kv_heads):
    config = sizes(pi05=pi05, kv_heads=kv_heads)
    model = lora_model(config)
    plain, with_lora = sample(plain_model(config)), sample(model)
    names = set(dict(plain_model(config).named_parameters()))
    assert (with_lora - plain).abs().max() > 0.05
    expected_loss = loss(model).detach()
    merge_lora(model)
    assert lora_config(model) is None
    assert set(dict(model.named_parameters())) == names
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {Linear}
    torch.testing.assert_close(sample(model), with_lora, atol=5e-5, rtol=0)
    torch.testing.assert_close(loss(model).detach(), expected_loss, atol=5e-5, rtol=0)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model)


@pytest.mark.parametrize("only", ["attention", "feed_forward"])
def test_lora_on_one_kind_of_layer(only):
    lora = LoraConfig(backbone_rank=2, expert_rank=0, attention=only == "attention", feed_forward=only != "attention")
    model = lora_model(lora=lora)
    assert {name.split(".")[0] for name, _ in model.named_parameters() if is_lora(name)} == {"backbone"}
    assert {name.split(".")[3] for name, _ in model.named_parameters() if is_lora(name)} == {only}
    expected = sample(model)
    merge_lora(model)
    torch.testing.assert_close(sample(model), expected, atol=5e-5, rtol=0)


def test_matmuls_use_the_activation_dtype():
    layer = lora_model().backbone.layers[0].attention.qkv
    x = torch.randn(2, 5, 16, generator=seeded())
    half = layer(x.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), atol=0.1, rtol=0.05)


def test_gradients_reach_every_used_parameter():
    model = lora_model()
    for name, trained in trainable_parameters(model, "lora").items():
        model.get_parameter(name).requires_grad_(trained)
    loss(model).backward()
    for name, parameter in model.named_parameters():
        # In the backbone nothing is computed after the last layer's keys and values.
        unread = name.startswith(("backbone.layers.1.attention.out", "backbone.layers.1.feed_forward"))
        if is_lora(name):
            assert unread == (parameter.grad is None), name
        if not parameter.requires_grad:
            assert parameter.grad is None, name


def test_gradients_stay_the_same_under_activation_checkpointing():
    model = lora_model()
    loss(model).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if is_lora(name)}
    model.zero_grad()
    for block in (*model.backbone.layers, *model.expert.layers):
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    loss(model).backward()
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        assert (found is None and gradient is None) or torch.equal(found, gradient), name


def test_write_weights_refuses_lora(tmp_path):
    with pytest.raises(ValueError, match="merge_lora"):
        write_weights(tmp_path, lora_model())


# ---- trainable parameters ----


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_trained"),
    [("pi05", 3_403_421_456, 466_957_072), ("pi0", 3_288_036_112, 468_039_440)],
)
def test_full_size_has_the_original_shapes(golden_root, name, num_parameters, num_trained):
    model = Pi0(preset(name), device="meta")
    add_lora(model, LoraConfig(), None)
    trained = trainable_parameters(model, "lora")
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert sum(p.numel() for n, p in model.named_parameters() if trained[n]) == num_trained
    leaves = jax_table(model.config) | lora_table(model.config, LoraConfig())
    listed = {}
    for line in (golden_root / f"keys_fullsize_jax_lora_{name}.txt").read_text().splitlines()[1:]:
        key, shape, _, rule = line.split("  ")
        listed[key.replace("/", ".")] = (shape, rule)
    found = {k: (str(v.shape), "trainable" if trained[v.slices[0].param] else "frozen") for k, v in leaves.items()}
    assert found == listed


def test_finetune_choices_select_parameters():
    model = lora_model()
    groups = {"full": set(), "frozen_vision": set(), "expert": set(), "lora": set(), "lora_strict": set()}
    for choice, found in groups.items():
        trained = trainable_parameters(model, choice)
        assert list(trained) == [name for name, _ in model.named_parameters()]
        found |= {name.split(".")[0] if not is_lora(name) else "lora" for name in trained if trained[name]}
    projections = {"suffix", "action_out_proj"}
    assert groups["full"] == {"vision", "embedding", "backbone", "expert", "lora"} | projections
    assert groups["frozen_vision"] == groups["full"] - {"vision"}
    assert groups["lora"] == {"vision", "lora"} | projections
    assert groups["lora_strict"] == {"lora"} | projections
    assert set(trainable_parameters(plain_model(), "expert").values()) == {True, False}
    assert groups["expert"] == {"expert", "lora"} | projections
    assert not any(on for n, on in trainable_parameters(model, "expert").items() if n.startswith("backbone"))
    with pytest.raises(ValueError, match="add_lora"):
        trainable_parameters(plain_model(), "lora")


# ---- openpi's checkpoints ----


@pytest.fixture(params=["pi05", "pi0"])
def jax_lora(request, golden_root):
    """Path and options of one of openpi's LoRA checkpoints."""
    root = golden_root / "lora" / request.param
    return root / "jax_ckpt", {"config": root / "model_config.json", "lora_alpha": ALPHA}


def test_merging_equals_folding(jax_lora):
    path, options = jax_lora
    kept, folded = torchpi.load_model(path, **options, lora="keep"), torchpi.load_model(path, **options)
    assert lora_config(kept) == LoraConfig(4, 8.0, 6, 3.0)
    merge_lora(kept)
    expected = state(folded)
    for name, found in state(kept).items():
        torch.testing.assert_close(found, expected[name], atol=1e-7, rtol=1e-7)


def test_original_lora_checkpoint_round_trips(jax_lora, tmp_path):
    path, options = jax_lora
    model = torchpi.load_model(path, **options, lora="keep")
    (tmp_path / "params").mkdir()
    write_lora_params(tmp_path / "params", model)
    assert JaxArrays(tmp_path / "params").shapes == JaxArrays(find_params(path)).shapes
    assert_same(state(torchpi.load_model(tmp_path, **options, lora="keep")), state(model))
    half = torchpi.load_model(tmp_path, **options, lora="keep", dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        expected = model.get_parameter(name)
        assert torch.equal(parameter, expected if is_lora(name) else expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("lora", [LORA, LoraConfig(backbone_rank=0), LoraConfig(expert_rank=0, feed_forward=False)])
def test_lora_of_plain_multi_head_attention_and_of_one_stack_round_trips(lora, tmp_path):
    config = sizes(kv_heads=2)
    model = lora_model(config, lora)
    write_lora_params(tmp_path, model)
    alpha = (lora.backbone_alpha, lora.expert_alpha)
    again = torchpi.load_model(tmp_path, config=config, lora_alpha=alpha, lora="keep")
    assert_same(state(again), state(model))
    merge_lora(model)
    folded = state(torchpi.load_model(tmp_path, config=config, lora_alpha=alpha))
    for name, found in state(model).items():
        torch.testing.assert_close(found, folded[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lora", "is_known"),
    [
        (LoraConfig(), True),
        (LoraConfig(backbone_rank=0), True),
        (LoraConfig(backbone_rank=8), False),
        (LoraConfig(backbone_rank=32, expert_rank=16), False),
        (LoraConfig(backbone_rank=0, expert_rank=16), False),
        (LoraConfig(backbone_rank=8, attention=False), True),  # the feed-forward's update is not scaled
    ],
)
def test_alphas_are_required_unless_the_ranks_are_openpis(lora, is_known, tmp_path):
    config = sizes()
    write_lora_params(tmp_path, lora_model(config, lora))
    with contextlib.nullcontext() if is_known else pytest.raises(ValueError, match="Pass lora_alpha= with the alphas"):
        default = torchpi.load_model(tmp_path, config=config)
        assert_same(state(default), state(torchpi.load_model(tmp_path, config=config, lora_alpha=(16.0, 32.0))))


@pytest.mark.parametrize("alpha", [(8.0, 0.0), (8.0, float("nan")), (-1.0, 3.0)])
def test_alphas_that_are_not_positive_numbers_are_errors(alpha, jax_lora):
    path, options = jax_lora
    with pytest.raises(ValueError, match=r"must be a positive number"):
        torchpi.load_model(path, **options | {"lora_alpha": alpha})


def test_all_loaders_require_alphas(golden_root, tmp_path):
    root, spm = golden_root / "lora" / "pi05", golden_root / "tokenizer" / "tiny_spm.model"
    robot = Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=["a", "b"], actions=["a", "b"])
    options = {"config": root / "model_config.json", "embodiment": robot, "tokenizer": spm}
    for attempt in (
        lambda: torchpi.load_policy(root / "jax_ckpt", **options),
        lambda: convert(root / "jax_ckpt", tmp_path / "out", "torchpi", **options),
        lambda: convert(root / "jax_ckpt", tmp_path / "out", "openpi-jax", config=root / "model_config.json"),
    ):
        with pytest.raises(ValueError, match=r"rank 4 in the backbone and rank 6 in the action .*Pass lora_alpha="):
            attempt()
    assert not (tmp_path / "out").exists()


def test_keeping_lora_requires_a_lora_checkpoint(golden_pi05):
    with pytest.raises(ValueError, match='lora="keep" belongs to a checkpoint with LoRA weights'):
        torchpi.load_model(golden_pi05.checkpoint, lora="keep")
    with pytest.raises(ValueError, match='lora="keep" belongs to a checkpoint with LoRA weights'):
        torchpi.load_model("demo", lora="keep")
    with pytest.raises(ValueError, match="The model has no LoRA"):
        write_lora_params(golden_pi05.root, plain_model())


# ---- adapters ----


@pytest.fixture
def saved(tmp_path):
    """An adapter with the vision tower, and the model that it was saved from."""
    model = lora_model()
    trained = [name for name, on in trainable_parameters(model, "lora").items() if on]
    with torch.no_grad():
        model.vision.head.weight.add_(1)
    save_adapter(model, tmp_path / "adapter", base=BASE, trained=trained)
    return tmp_path / "adapter", model


def test_adapter_restores_the_trained_model(saved):
    path, trained = saved
    model = plain_model()
    adapter = load_adapter(path, model)
    assert_same(state(model), state(trained))
    assert adapter == read_adapter(path)
    assert (adapter.lora, adapter.base) == (LORA, Base(**BASE))
    with torch.no_grad():
        next(model.parameters()).zero_()
        model.expert.layers[0].attention.qkv.lora_a.zero_()
    load_adapter(path, model)  # over LoRA of the same config
    assert torch.equal(model.expert.layers[0].attention.qkv.lora_a, trained.expert.layers[0].attention.qkv.lora_a)


def test_adapter_holds_only_trained_parameters(saved, tmp_path):
    path, model = saved
    names = {"adapter.json", "adapter.safetensors", "adapter.safetensors.checksums.json"}
    assert {file.name for file in path.iterdir()} == names
    with safe_open(path / "adapter.safetensors", framework="pt") as arrays:
        stored = set(arrays.keys())
    assert stored == {name for name, on in trainable_parameters(model, "lora").items() if on}
    save_adapter(model, tmp_path / "strict", base={**BASE, "sha256": "ab"}, trained=[])
    assert read_adapter(tmp_path / "strict").trained == ()
    half = plain_model(dtype=torch.bfloat16)
    load_adapter(tmp_path / "strict", half)
    assert {p.dtype for n, p in half.named_parameters() if is_lora(n)} == {torch.float32}


def test_existing_folder_is_replaced_only_on_request(saved, tmp_path):
    path, model = saved
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(model, path, base=BASE, trained=[])
    save_adapter(model, path, base=BASE, trained=[], overwrite=True)
    assert read_adapter(path).trained == ()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(model, tmp_path / "other", base=BASE, trained=[], overwrite=True)


def test_saving_without_lora_or_over_a_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no LoRA"):
        save_adapter(plain_model(), tmp_path / "a", base=BASE, trained=[])
    with pytest.raises(ValueError, match=r"that are not in the model: backbone\.nothing"):
        save_adapter(lora_model(), tmp_path / "a", base=BASE, trained=["backbone.nothing"])
    with pytest.raises(ValueError, match="base: Object missing required field `address`"):
        save_adapter(lora_model(), tmp_path / "a", base={}, trained=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"lora": None}, "Expected `object`, got `null` at `lora`"),
        ({"lora": {"backbone_rank": 2}}, "lora lacks backbone_alpha"),
        ({"trained": "vision"}, "Expected `list`, got `str` at `trained`"),
        ({"trained": ["nothing.weight"]}, "trained has names that are not in the model: nothing.weight"),
        ({"base": {"address": 3}}, "Expected `str`, got `int` at `base.address`"),
        ({"base": {"address": "x", "dtype": "int8"}}, "Invalid value 'int8' at `base.dtype`; valid are '"),
        ({"base": {"path": "x"}}, "has unknown fields base.path; known are address, dtype, sha256"),
        ({"extra": 1}, "unknown fields extra"),
    ],
)
def test_wrong_field_of_adapter_json_is_named(saved, change, message):
    path, _ = saved
    document = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(path, plain_model())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_rank", 2.5, "at `lora.expert_rank`"),
        ("expert_alpha", "x", "at `lora.expert_alpha`"),
        ("backbone_rank", 5, r"misshapen: .*backbone.* is \[\d+, 2, 16\], expected \[\d+, 5, 16\]"),
        ("feed_forward", False, "left over: .*feed_forward"),
    ],
)
def test_wrong_field_of_the_lora_is_named(saved, field, value, message):
    path, _ = saved
    document = json.loads((path / "adapter.json").read_text())
    document["lora"][field] = value
    (path / "adapter.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_adapter(path, plain_model())


def test_adapter_that_does_not_fit_or_is_damaged_leaves_the_model_unchanged(saved, tmp_path):
    path, trained = saved
    wider, other = plain_model(sizes(width=32)), lora_model(lora=LoraConfig(backbone_rank=1))
    before = state(other)
    with pytest.raises(ValueError, match=r"misshapen: .*vision.head.weight is \[16, 16\], expected \[32, 16\]"):
        load_adapter(path, wider)
    assert lora_config(wider) is None
    with pytest.raises(ValueError, match="the model has LoraConfig"):
        load_adapter(path, other)
    assert_same(state(other), before)
    weights = path / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = plain_model()
    with pytest.raises(ValueError, match=r"adapter.safetensors is truncated or corrupt"):
        load_adapter(path, model)
    assert lora_config(model) is None
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter.safetensors"):
        load_adapter(path, model)
    with pytest.raises(FileNotFoundError, match=r"adapter.json does not exist"):
        load_adapter(tmp_path, copy.deepcopy(trained))
