"""openpi's JAX checkpoints: contents, sizes and damaged files."""

import dataclasses
import json
import re
import shutil

import jaxtyping
import numpy as np
import pytest
import tensorstore
import torch

import torchpi
from torchpi import GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.gemma import rope_table

SIZES = Pi0Config(
    pi05=True,
    paligemma_variant=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=6),
    action_expert_variant=GemmaConfig(width=12, depth=2, mlp_dim=20, num_heads=4, num_kv_heads=1, head_dim=6),
    siglip_variant=VisionConfig(width=24, depth=2, mlp_dim=20, num_heads=3, patch=14),
    action_dim=5,
    action_horizon=None,
    max_token_len=None,
    discrete_state_input=None,
    vocab_size=40,
    image_size=28,
)


def sized(*, num_kv_heads=1, position="learned", **fields):
    """SIZES with changes."""
    gemma = {
        name: dataclasses.replace(getattr(SIZES, name), num_kv_heads=num_kv_heads)
        for name in ("paligemma_variant", "action_expert_variant")
    }
    siglip = dataclasses.replace(SIZES.siglip, position=position)
    return dataclasses.replace(SIZES, **gemma, siglip_variant=siglip, **fields)


def random_arrays(config, seed=0):
    """Shape of every array of an openpi checkpoint by its path: independent of src, taken from openpi's modules."""
    shapes = {"PaliGemma/llm/embedder/input_embedding": (config.vocab_size, config.paligemma.width)}
    vit, expert, dim = config.siglip, config.action_expert, config.action_dim
    img, block, w = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock", vit.width
    shapes |= {
        f"{img}/embedding/kernel": (vit.patch, vit.patch, 3, w),
        f"{img}/embedding/bias": (w,),
        f"{img}/Transformer/encoder_norm/scale": (w,),
        f"{img}/Transformer/encoder_norm/bias": (w,),
        f"{img}/head/kernel": (w, config.paligemma.width),
        f"{img}/head/bias": (config.paligemma.width,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (vit.depth, w, vit.mlp_dim),
        f"{block}/MlpBlock_0/Dense_0/bias": (vit.depth, vit.mlp_dim),
        f"{block}/MlpBlock_0/Dense_1/kernel": (vit.depth, vit.mlp_dim, w),
        f"{block}/MlpBlock_0/Dense_1/bias": (vit.depth, w),
        f"{block}/MultiHeadDotProductAttention_0/out/kernel": (vit.depth, vit.num_heads, w // vit.num_heads, w),
        f"{block}/MultiHeadDotProductAttention_0/out/bias": (vit.depth, w),
    }
    for part in ("query", "key", "value"):
        name, head = f"{block}/MultiHeadDotProductAttention_0/{part}", (vit.num_heads, w // vit.num_heads)
        shapes |= {f"{name}/kernel": (vit.depth, w, *head), f"{name}/bias": (vit.depth, *head)}
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{block}/{norm}/{part}": (vit.depth, w) for part in ("scale", "bias")}
    if vit.position == "learned":
        shapes[f"{img}/pos_embedding"] = (1, config.num_patches, w)
    for gemma, suffix, adaptive in ((config.paligemma, "", False), (expert, "_1", config.pi05)):
        depth, width, head = gemma.depth, gemma.width, gemma.head_dim
        layers, attn = "PaliGemma/llm/layers", "PaliGemma/llm/layers/attn"
        if gemma.num_heads == gemma.num_kv_heads:
            shapes[f"{attn}/qkv_einsum{suffix}/w"] = (depth, 3, gemma.num_heads, width, head)
        else:
            shapes[f"{attn}/q_einsum{suffix}/w"] = (depth, gemma.num_heads, width, head)
            shapes[f"{attn}/kv_einsum{suffix}/w"] = (depth, 2, gemma.num_kv_heads, width, head)
        shapes |= {
            f"{attn}/attn_vec_einsum{suffix}/w": (depth, gemma.num_heads, head, width),
            f"{layers}/mlp{suffix}/gating_einsum": (depth, 2, width, gemma.mlp_dim),
            f"{layers}/mlp{suffix}/linear": (depth, gemma.mlp_dim, width),
        }
        norms = {f"{layers}/{norm}{suffix}": (depth,) for norm in ("pre_attention_norm", "pre_ffw_norm")}
        for norm, stack in (norms | {f"PaliGemma/llm/final_norm{suffix}": ()}).items():
            if adaptive:
                shapes |= {f"{norm}/Dense_0/kernel": (*stack, width, 3 * width)}
                shapes |= {f"{norm}/Dense_0/bias": (*stack, 3 * width)}
            else:
                shapes[f"{norm}/scale"] = (*stack, width)
    d = expert.width
    dense = {"action_in_proj": (dim, d), "action_out_proj": (d, dim)}
    if config.pi05:
        dense |= {"time_mlp_in": (d, d), "time_mlp_out": (d, d)}
    else:
        dense |= {"state_proj": (dim, d), "action_time_mlp_in": (2 * d, d), "action_time_mlp_out": (d, d)}
    for name, (num_in, num_out) in dense.items():
        shapes |= {f"{name}/kernel": (num_in, num_out), f"{name}/bias": (num_out,)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_checkpoint(root, arrays, *, value=False, zarr3=False):
    """Write arrays as orbax does: one OCDBT database, one zarr array per key path, the key paths in _METADATA."""
    params = root / "params"
    params.mkdir(parents=True)
    base = {"driver": "file", "path": f"{params}/", "file_io_sync": False}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 10_000_000}})
    tree, opened = {}, []
    for name, array in arrays.items():
        keys = ("params", *name.split("/"), *(("value",) if value else ()))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(array.shape)},
        }
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        chunks = tensorstore.ChunkLayout(chunk_shape=array.shape)
        opened.append(
            tensorstore.open(
                spec, create=True, dtype=array.dtype, shape=array.shape, chunk_layout=chunks, context=context
            )
        )
    writes = [future.result().write(array) for future, array in zip(opened, arrays.values(), strict=True)]
    for write in writes:
        write.result()
    (params / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_zarr3": zarr3}))
    return root


def drop_array(checkpoint, name):
    """Delete an array's data from the database, but keep its metadata."""
    base = {"driver": "file", "path": f"{checkpoint / 'params'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    prefix = "params." + name.replace("/", ".")
    for key in store.list().result():
        if key.decode().startswith(prefix + "/0") or key.decode().startswith(prefix + "/c"):
            store.write(key, None).result()


@pytest.fixture
def checkpoint(golden_root, tmp_path):
    """A copy of golden's checkpoint for tests that damage it."""
    return shutil.copytree(golden_root / "pi05" / "jax_ckpt_pure", tmp_path / "checkpoint")


def assert_same_weights(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in ours.state_dict().items():
        assert parameter.dtype is theirs.state_dict()[name].dtype
        assert torch.equal(parameter, theirs.state_dict()[name]), name


# Variants of golden's checkpoint


def test_keys_with_and_without_value_give_the_same_bits(golden):
    assert_same_weights(torchpi.load_model(golden.root / "jax_ckpt"), torchpi.load_model(golden.checkpoint))


def test_bfloat16_checkpoint_equals_rounded_float32(golden_pi05):
    rounded = torchpi.load_model(golden_pi05.root / "jax_ckpt_pure_bf16", dtype=torch.bfloat16)
    assert_same_weights(rounded, golden_pi05.model(dtype=torch.bfloat16))
    widened = torchpi.load_model(golden_pi05.root / "jax_ckpt_pure_bf16")
    assert_same_weights(widened, rounded.to(torch.float32))


@pytest.mark.parametrize("inside", ["", "100", "100/params", "100/params/_METADATA", "100/params/manifest.ocdbt"])
def test_training_run_with_one_step_loads_from_any_level(golden, inside):
    model = torchpi.load_model(golden.root / "jax_ckpt" / inside)
    assert torch.equal(model.embedding, golden.model().embedding)


def test_path_may_be_a_string(golden):
    assert torch.equal(torchpi.load_model(str(golden.checkpoint)).embedding, golden.model().embedding)


def test_path_may_have_characters_with_meaning_in_urls(golden_pi05, tmp_path):
    copied = shutil.copytree(golden_pi05.checkpoint, tmp_path / "run #1 50%20 done? ü")
    assert_same_weights(torchpi.load_model(copied), golden_pi05.model())


def test_training_run_with_several_steps_is_an_error_that_lists_them(golden_pi05, tmp_path):
    run = tmp_path / "run"
    for step in (20, 100):
        shutil.copytree(golden_pi05.root / "jax_ckpt" / "100", run / str(step))
    with pytest.raises(
        ValueError,
        match=r"run is not a checkpoint itself; the last one in it is .*/100, of 20, 100",
    ):
        torchpi.load_model(run)
    assert torch.equal(torchpi.load_model(run / "20").embedding, golden_pi05.model().embedding)


def test_model_is_in_eval_mode_with_gradients_enabled(golden):
    model = torchpi.load_model(golden.checkpoint)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_every_parameter_has_the_requested_dtype(golden):
    model = torchpi.load_model(golden.checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.embedding, golden.model().embedding.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; expected torch.float32"),
        ({"dtype": torch.int64}, "dtype is torch.int64; expected torch.float32"),
        ({"device": "cuda:99"}, "There is no device cuda:99"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
    ],
)
def test_invalid_dtype_and_device_are_errors(changes, message, golden_pi05, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who have no type checks
    with pytest.raises(ValueError, match=message):
        torchpi.load_model(golden_pi05.checkpoint, **changes)


# Sizes


def test_without_config_sizes_come_from_arrays_and_others_are_unset(golden):
    config = torchpi.load_model(golden.checkpoint).config
    unset = {"action_horizon": None, "max_token_len": None, "discrete_state_input": None}
    assert config == dataclasses.replace(Pi0Config.from_json(golden.config), **unset)


def test_without_config_the_horizon_follows_the_noise(golden):
    model, inputs = torchpi.load_model(golden.checkpoint), golden.inputs
    noise = inputs["noise"][:, :3].contiguous()
    assert model.sample_actions(golden.observation(), noise=noise, num_steps=1).shape == noise.shape


def test_sampling_without_config_and_noise_is_an_error_that_names_config(golden):
    model = torchpi.load_model(golden.checkpoint)
    with pytest.raises(ValueError, match=r"action_horizon is not set.*config=.*pi0, pi05, tiny"):
        model.sample_actions(golden.observation(), num_steps=1)


def test_config_may_be_a_partial_file_an_object_or_a_dataclass(golden_pi05, tmp_path):
    file = tmp_path / "horizon.json"
    file.write_text('{"action_horizon": 10, "discrete_state_input": false}')
    for config in (file, str(file)):
        found = torchpi.load_model(golden_pi05.checkpoint, config=config).config
        assert (found.action_horizon, found.discrete_state_input, found.max_token_len) == (10, False, None)
        assert found.vocab_size == 512
    whole = Pi0Config.from_json(golden_pi05.config)
    assert torchpi.load_model(golden_pi05.checkpoint, config=whole).config == whole


def test_config_may_be_the_name_of_a_preset(tmp_path):
    tiny = torchpi.config.preset("tiny")
    write_checkpoint(tmp_path / "tiny", random_arrays(tiny))
    model = torchpi.load_model(tmp_path / "tiny", config="tiny")
    assert (model.config, model.config.action_horizon) == (tiny, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 1024}, "contradicts the checkpoint's arrays: vocab_size is 1024 in config, 512 in the"),
        ({"action_dim": 14}, "action_dim is 14 in config, 32 in the checkpoint"),
        ({"image_size": 112}, "image_size is 112 in config, 224 in the checkpoint"),
        ({"pi05": False}, "pi05 is False in config, True in the checkpoint"),
        ({"paligemma": {"mlp_dim": 64}}, "paligemma.mlp_dim is 64 in config, 128 in the checkpoint"),
        ({"siglip": {"position": "sincos2d"}}, "siglip.position is sincos2d in config, learned in the checkpoint"),
    ],
)
def test_config_that_contradicts_the_arrays_is_an_error_with_both_values(golden_pi05, tmp_path, config, message):
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        torchpi.load_model(golden_pi05.checkpoint, config=file)


def test_preset_of_another_size_is_an_error_with_both_values(golden_pi05):
    with pytest.raises(ValueError, match=r"vocab_size is 257152 in config, 512.*paligemma.width is 2048 in config, 64"):
        torchpi.load_model(golden_pi05.checkpoint, config="pi05")


def test_unknown_preset_is_an_error_that_lists_them(golden_pi05):
    with pytest.raises(ValueError, match=r"config='pi06' is neither a file nor a preset; presets are pi0, pi05, tiny"):
        torchpi.load_model(golden_pi05.checkpoint, config="pi06")


def test_missing_config_file_is_an_error(golden_pi05, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*sizes\.json"):
        torchpi.load_model(golden_pi05.checkpoint, config=tmp_path / "sizes.json")


# Other sizes: each layer computes what openpi's einsum computes with the stored arrays

VARIANTS = {
    "pi05": sized(),
    "pi0": sized(pi05=False),
    "two key/value heads": sized(num_kv_heads=2),
    "as many key/value heads as heads": sized(num_kv_heads=4),
    "as many key/value heads as heads, pi0": sized(num_kv_heads=4, pi05=False),
    "a larger image": sized(image_size=112),
}


@pytest.fixture(params=VARIANTS, scope="module")
def written(request, tmp_path_factory):
    """Config and arrays of a random checkpoint in one of the sizes, and the model loaded from it."""
    config = VARIANTS[request.param]
    arrays = random_arrays(config)
    model = torchpi.load_model(write_checkpoint(tmp_path_factory.mktemp("written") / "checkpoint", arrays))
    return config, {name: torch.from_numpy(array) for name, array in arrays.items()}, model


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # values are of magnitude 1 to 30


def test_sizes_follow_the_arrays(written):
    config, arrays, model = written
    assert model.config == config
    assert sum(p.numel() for p in model.parameters()) == sum(array.numel() for array in arrays.values())


@torch.no_grad()
def test_attention_computes_openpis_einsums(written):
    config, arrays, model = written
    generator = torch.Generator().manual_seed(1)
    for stack, gemma, suffix in (
        (model.backbone, config.paligemma, ""),
        (model.expert, config.action_expert, "_1"),
    ):
        x = torch.randn(2, 3, gemma.width, generator=generator)
        still = rope_table(torch.zeros(2, 3, dtype=torch.int64), gemma.head_dim)  # no rotation at position 0
        attn = "PaliGemma/llm/layers/attn"
        for i, layer in enumerate(stack.layers):
            if gemma.num_heads == gemma.num_kv_heads:
                weight = arrays[f"{attn}/qkv_einsum{suffix}/w"][i]
                q, k, v = torch.einsum("bsd,cndh->cbsnh", x, weight)
            else:
                q = torch.einsum("btd,ndh->btnh", x, arrays[f"{attn}/q_einsum{suffix}/w"][i])
                k, v = torch.einsum("bsd,ckdh->cbskh", x, arrays[f"{attn}/kv_einsum{suffix}/w"][i])
            for ours, theirs in zip(layer.attention.project(x, still), (q, k, v), strict=True):
                assert_near(ours, theirs)
            grouped = q.unflatten(2, (gemma.num_kv_heads, -1)) * gemma.head_dim**-0.5  # [B, T, G, Q/G, K]
            probabilities = torch.einsum("btkgh,bskh->bkgts", grouped, k).softmax(dim=-1)
            encoded = torch.einsum("bkgts,bskh->btkgh", probabilities, v).flatten(2, 3)
            out = torch.einsum("btnh,nhd->btd", encoded, arrays[f"{attn}/attn_vec_einsum{suffix}/w"][i])
            assert_near(layer.attention(x, still, None, None)[0], out)


@torch.no_grad()
def test_feed_forward_and_norms_compute_openpis_matmuls(written):
    config, arrays, model = written
    generator = torch.Generator().manual_seed(2)
    layers = "PaliGemma/llm/layers"
    for stack, gemma, suffix in ((model.backbone, config.paligemma, ""), (model.expert, config.action_expert, "_1")):
        x = torch.randn(2, 3, gemma.width, generator=generator)
        cond = torch.randn(2, gemma.width, generator=generator)
        for i, layer in enumerate(stack.layers):
            gate, up = arrays[f"{layers}/mlp{suffix}/gating_einsum"][i]
            hidden = torch.nn.functional.gelu(x @ gate, approximate="tanh") * (x @ up)
            assert_near(layer.feed_forward(x), hidden @ arrays[f"{layers}/mlp{suffix}/linear"][i])
        norms = [
            (norm, i, getattr(layer, norm)) for i, layer in enumerate(stack.layers)
            for norm in ("pre_attention_norm", "pre_ffw_norm")
        ]  # fmt: skip
        for name, i, norm in [*norms, ("final_norm", None, stack.final_norm)]:
            leaf = f"PaliGemma/llm/{'' if i is None else 'layers/'}{name}{suffix}"
            if f"{leaf}/scale" in arrays:
                scale = arrays[f"{leaf}/scale"] if i is None else arrays[f"{leaf}/scale"][i]
                assert torch.equal(norm.scale, scale)
            else:
                kernel, bias = (arrays[f"{leaf}/Dense_0/{part}"] for part in ("kernel", "bias"))
                kernel, bias = (kernel, bias) if i is None else (kernel[i], bias[i])
                assert_near(norm.modulation(cond)[:, 0], cond @ kernel + bias)


@torch.no_grad()
def test_vision_tower_computes_openpis_einsums(written):
    config, arrays, model = written
    vit, img = config.siglip, "PaliGemma/img"
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, config.image_size, config.image_size, 3, generator=generator) * 2 - 1
    side = config.image_size // vit.patch
    cut = image.reshape(1, side, vit.patch, side, vit.patch, 3)
    x = torch.einsum("bipjqc,pqcw->bijw", cut, arrays[f"{img}/embedding/kernel"]).flatten(1, 2)
    x = x + arrays[f"{img}/embedding/bias"]
    assert_near(model.vision.patch_embed(model.vision.patchify(image)), x)
    assert torch.equal(model.vision.pos_embed, arrays[f"{img}/pos_embedding"][0])
    x = torch.randn(1, 5, vit.width, generator=generator)
    leaf = f"{img}/Transformer/encoderblock"
    for i, block in enumerate(model.vision.blocks):
        parts = {name: array[i] for name, array in arrays.items() if name.startswith(leaf)}
        attention = f"{leaf}/MultiHeadDotProductAttention_0"
        for part, ours in zip(("query", "key", "value"), block.qkv(x).chunk(3, dim=-1), strict=True):
            theirs = torch.einsum("bpd,dnh->bpnh", x, parts[f"{attention}/{part}/kernel"])
            assert_near(ours.unflatten(-1, (vit.num_heads, -1)), theirs + parts[f"{attention}/{part}/bias"])
        heads = x.unflatten(-1, (vit.num_heads, -1))
        out = torch.einsum("bpnh,nhd->bpd", heads, parts[f"{attention}/out/kernel"]) + parts[f"{attention}/out/bias"]
        assert_near(block.out(x), out)
        hidden = x @ parts[f"{leaf}/MlpBlock_0/Dense_0/kernel"] + parts[f"{leaf}/MlpBlock_0/Dense_0/bias"]
        assert_near(block.fc1(x), hidden)
        back = hidden @ parts[f"{leaf}/MlpBlock_0/Dense_1/kernel"] + parts[f"{leaf}/MlpBlock_0/Dense_1/bias"]
        assert_near(block.fc2(hidden), back)
        for norm, name in ((block.norm1, "LayerNorm_0"), (block.norm2, "LayerNorm_1")):
            assert torch.equal(norm.weight, parts[f"{leaf}/{name}/scale"])
            assert torch.equal(norm.bias, parts[f"{leaf}/{name}/bias"])
    assert torch.equal(model.vision.norm.weight, arrays[f"{img}/Transformer/encoder_norm/scale"])
    assert torch.equal(model.vision.norm.bias, arrays[f"{img}/Transformer/encoder_norm/bias"])
    assert_near(model.vision.head(x), x @ arrays[f"{img}/head/kernel"] + arrays[f"{img}/head/bias"])


@torch.no_grad()
def test_suffix_projections_compute_openpis_matmuls(written):
    _, arrays, model = written
    generator = torch.Generator().manual_seed(4)
    names = [name.removesuffix("/kernel") for name in arrays if "/" in name and name.count("/") == 1]
    modules = {"action_out_proj": model.action_out_proj, **dict(model.suffix.named_children())}
    assert {name.removesuffix("/bias") for name in names} == set(modules)
    for name, module in modules.items():
        x = torch.randn(2, module.in_features, generator=generator)
        assert_near(module(x), x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"])
    assert torch.equal(model.embedding, arrays["PaliGemma/llm/embedder/input_embedding"])


@pytest.mark.parametrize("options", [{"value": True}, {"zarr3": True}, {"value": True, "zarr3": True}])
def test_all_writer_options_give_the_same_bits(tmp_path, options):
    arrays = random_arrays(SIZES)
    plain = torchpi.load_model(write_checkpoint(tmp_path / "plain", arrays))
    assert_same_weights(torchpi.load_model(write_checkpoint(tmp_path / "other", arrays, **options)), plain)


def test_keys_without_leading_params_are_read(tmp_path):
    arrays = random_arrays(SIZES)
    plain = torchpi.load_model(write_checkpoint(tmp_path / "plain", arrays))
    bare = write_checkpoint(tmp_path / "bare", arrays)
    metadata = json.loads((bare / "params/_METADATA").read_text())
    base = {"driver": "file", "path": f"{bare / 'params'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        store.write(key.decode().removeprefix("params."), store.read(key).result().value).result()
    for entry in metadata["tree_metadata"].values():
        del entry["key_metadata"][0]
    (bare / "params/_METADATA").write_text(json.dumps(metadata))
    assert_same_weights(torchpi.load_model(bare), plain)


def test_missing_position_embedding_is_sinusoidal_with_image_size_from_config(tmp_path):
    fixed = sized(position="sincos2d", image_size=56)
    write_checkpoint(tmp_path / "checkpoint", random_arrays(fixed))
    model = torchpi.load_model(tmp_path / "checkpoint")
    assert (model.config.siglip.position, model.config.image_size) == ("sincos2d", 224)
    assert not hasattr(model.vision, "pos_embed")
    told = torchpi.load_model(tmp_path / "checkpoint", config=fixed)
    assert (told.config.image_size, told.vision.position_embedding().shape) == (56, (16, 24))
    (tmp_path / "size.json").write_text('{"image_size": 56}')
    assert torchpi.load_model(tmp_path / "checkpoint", config=tmp_path / "size.json").config.image_size == 56


# Damaged checkpoints


@pytest.mark.parametrize(
    "name",
    [
        "PaliGemma/llm/embedder/input_embedding",
        "PaliGemma/llm/layers/attn/kv_einsum_1/w",
        "PaliGemma/img/Transformer/encoderblock/LayerNorm_1/bias",
        "PaliGemma/llm/final_norm_1/Dense_0/bias",
        "time_mlp_out/bias",
        "action_in_proj/kernel",
    ],
)
def test_missing_array_is_an_error_that_names_it(tmp_path, name):
    arrays = random_arrays(SIZES)
    del arrays[name]
    write_checkpoint(tmp_path / "checkpoint", arrays)
    with pytest.raises(ValueError, match=rf"(?s)checkpoint/params.*{name.replace('/', '.')}"):
        torchpi.load_model(tmp_path / "checkpoint")


def test_extra_arrays_are_an_error_that_names_all_of_them(tmp_path):
    extra = {"value_head/kernel": np.ones((2, 2), np.float32), "value_head/bias": np.ones(2, np.float32)}
    write_checkpoint(tmp_path / "checkpoint", random_arrays(SIZES) | extra)
    with pytest.raises(ValueError, match=r"left over: value_head\.bias, value_head\.kernel"):
        torchpi.load_model(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("time_mlp_in/bias", (13,), r"misshapen: time_mlp_in.bias is \[13\], expected \[12\]"),
        ("PaliGemma/img/pos_embedding", (1, 5, 24), r"pos_embedding is \[1, 5, 24\], expected \[1, 4, 24\]"),
        ("action_in_proj/kernel", (5,), r"'action_in_proj.kernel' must have 2 dimensions, its shape is \[5\]"),
        ("PaliGemma/llm/layers/mlp_1/gating_einsum", (3, 2, 12, 20), "depth must be equal, got 2 and 3"),
    ],
)
def test_misshapen_array_is_an_error_with_both_shapes(tmp_path, name, shape, message):
    write_checkpoint(tmp_path / "checkpoint", random_arrays(SIZES) | {name: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=rf"(?s)checkpoint/params.*{message}"):
        torchpi.load_model(tmp_path / "checkpoint")


def test_incomplete_lora_checkpoint_names_the_missing_arrays(tmp_path):
    lora = {
        "PaliGemma/llm/layers/attn/q_einsum/lora_a": np.zeros((2, 4, 16, 2), np.float32),
        "PaliGemma/llm/layers/attn/q_einsum/lora_b": np.zeros((2, 4, 2, 6), np.float32),
        "PaliGemma/llm/layers/mlp/gating_einsum_lora_a": np.zeros((2, 2, 16, 2), np.float32),
    }
    write_checkpoint(tmp_path / "checkpoint", random_arrays(SIZES) | lora)
    with pytest.raises(ValueError, match=r"has .*gating_einsum_lora_a, but not .*gating_einsum_lora_b"):
        torchpi.load_model(tmp_path / "checkpoint")


def test_every_truncated_data_file_is_an_error_that_names_the_checkpoint(checkpoint):
    params = checkpoint / "params"
    # Small files hold the manifests' history, which is not read.
    files = [params / "manifest.ocdbt", *(params / "d").iterdir()]
    files += [file for file in (params / "ocdbt.process_0/d").iterdir() if file.stat().st_size > 10_000]
    assert len(files) >= 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        message = rf"{re.escape(str(params))}: array '.*' is .*(truncated|corrupt).*; get the checkpoint again"
        with pytest.raises(ValueError, match=message) as caught:
            torchpi.load_model(checkpoint)
        assert len(str(caught.value)) < 700
        file.write_bytes(whole)
    torchpi.load_model(checkpoint)


def test_missing_data_file_is_an_error(checkpoint):
    for file in (checkpoint / "params/ocdbt.process_0/d").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"array '.*' is .*truncated.*; get the checkpoint again"):
        torchpi.load_model(checkpoint)


def test_missing_data_are_an_error_if_zeros_were_stored(checkpoint):
    """Without that metadata, missing data mean zeros, which the writer may leave out."""
    drop_array(checkpoint, "time_mlp_in/bias")
    with pytest.raises(ValueError, match=r"'time_mlp_in\.bias' is missing"):
        torchpi.load_model(checkpoint)
    metadata = json.loads((checkpoint / "params/_METADATA").read_text())
    metadata["store_array_data_equal_to_fill_value"] = False
    (checkpoint / "params/_METADATA").write_text(json.dumps(metadata))
    assert not torchpi.load_model(checkpoint).suffix.time_mlp_in.bias.any()


def test_missing_manifest_is_an_error_that_names_the_expected_files(checkpoint):
    (checkpoint / "params/manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"no known checkpoint format.*params/_METADATA and params/manifest\.ocdbt"):
        torchpi.load_model(checkpoint)


def broken_metadata(text):
    metadata = json.loads(text)
    first = next(iter(metadata["tree_metadata"].values()))
    without_tree = {key: value for key, value in metadata.items() if key != "tree_metadata"}
    return {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "a list": "[]",
        "no tree": json.dumps(without_tree),
        "a tree that is a list": json.dumps({**metadata, "tree_metadata": []}),
        "an entry without keys": json.dumps({**metadata, "tree_metadata": {"x": {}}}),
        "an entry with no key": json.dumps({**metadata, "tree_metadata": {"x": {**first, "key_metadata": []}}}),
    }


BROKEN_METADATA = [
    "truncated", "empty", "a list", "no tree", "a tree that is a list", "an entry without keys", "an entry with no key",
]  # fmt: skip


@pytest.mark.parametrize("how", BROKEN_METADATA)
def test_corrupt_metadata_is_an_error_that_names_the_file(checkpoint, how):
    file = checkpoint / "params/_METADATA"
    file.write_text(broken_metadata(file.read_text())[how])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is corrupt: .*; get the file again"):
        torchpi.load_model(checkpoint)


def test_metadata_that_is_not_utf8_is_an_error(checkpoint):
    (checkpoint / "params/_METADATA").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="_METADATA is corrupt"):
        torchpi.load_model(checkpoint)


def test_metadata_that_lists_an_array_twice_is_an_error_that_names_it(checkpoint):
    file = checkpoint / "params/_METADATA"
    metadata = json.loads(file.read_text())
    entry = next(entry for key, entry in metadata["tree_metadata"].items() if "time_mlp_in', 'bias" in key)
    again = {**entry, "key_metadata": [*entry["key_metadata"], {"key": "value", "key_type": 2}]}
    metadata["tree_metadata"]["again"] = again
    file.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"holds time_mlp_in\.bias twice"):
        torchpi.load_model(checkpoint)


def test_metadata_without_arrays_is_an_error(checkpoint):
    (checkpoint / "params/_METADATA").write_text('{"tree_metadata": {}}')
    with pytest.raises(ValueError, match=r"no array 'PaliGemma\.img\.embedding\.kernel'|no array .*; found none"):
        torchpi.load_model(checkpoint)


# Other paths


def test_empty_folder_is_an_error_that_names_the_expected_files(tmp_path):
    with pytest.raises(ValueError, match=r"policy folder has policy\.json.*params/_METADATA.*found an empty folder"):
        torchpi.load_model(tmp_path)


def test_unknown_format_is_an_error_that_lists_the_files(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no known checkpoint format.*found \['weights\.pt'\]"):
        torchpi.load_model(tmp_path)


def test_file_that_belongs_to_no_format_is_an_error_that_names_it(checkpoint):
    """The folder of the file is not loaded instead: its weights may be different."""
    (checkpoint / "weights").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights is a file; expected the folder of a checkpoint"):
        torchpi.load_model(checkpoint / "weights")


def test_path_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        torchpi.load_model(tmp_path / "nowhere")


def test_demo_is_the_embedded_model():
    model = torchpi.load_model("demo", dtype=torch.bfloat16)
    assert model.config.to_dict() == torchpi.config.preset("tiny").to_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torchpi.load_model("demo", config="tiny").config.to_dict() == model.config.to_dict()
    with pytest.warns(UserWarning, match="config= overrides"), pytest.raises(ValueError, match=r"model\.safetensors"):
        torchpi.load_model("demo", config="tiny_pi0")
