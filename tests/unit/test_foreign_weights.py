"""Weights from other programs: PEFT adapters, .npz files, names with prefixes, run folders, other dtypes."""

import json
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import torchpi
from torchpi.checkpoints import peft
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.npz import NpzArrays
from torchpi.checkpoints.openpi import JaxArrays, write_params
from torchpi.checkpoints.openpi_torch import EMBEDDING, TIED_EMBEDDING
from torchpi.convert import convert

E, L = f"model.{EMBEDDING}", f"model.{TIED_EMBEDDING}"
EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers"


def assert_same_weights(a, b):
    expected = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.fixture
def base(golden_pi05, tmp_path):
    return shutil.copytree(golden_pi05.root / "lerobot", tmp_path / "base")


def rewrite(root, change):
    arrays = safetensors.torch.load_file(root / "model.safetensors")
    arrays = change(arrays) or arrays
    safetensors.torch.save_file(
        {name: array.contiguous() for name, array in arrays.items()}, root / "model.safetensors"
    )
    return root


# PEFT adapters


class Adapter:
    """PEFT adapter of rank 3 on queries and values of the action expert, and on one projection."""

    def __init__(self, base, root):
        self.base, self.root, random = base, root, torch.Generator().manual_seed(0)
        shapes = {n: a.shape for n, a in safetensors.torch.load_file(base / "model.safetensors").items()}
        self.modules = [f"{EXPERT}.{i}.self_attn.{part}_proj" for i in range(3) for part in "qv"] + [
            "model.action_in_proj"
        ]
        self.arrays = {}
        for module in self.modules:
            out, inputs = shapes[f"{module}.weight"]
            self.arrays[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, inputs, generator=random)
            self.arrays[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 3, generator=random)
        self.config = {
            "peft_type": "LORA", "base_model_name_or_path": str(base), "revision": None, "task_type": None,
            "r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none", "use_rslora": False, "use_dora": False,
            "target_modules": r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|model\.(state_proj|action_in_proj))",
            "modules_to_save": [], "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False,
            "init_lora_weights": True, "inference_mode": True, "layers_to_transform": None, "megatron_config": None,
        }  # fmt: skip

    def write(self, **config):
        self.root.mkdir(exist_ok=True)
        (self.root / "adapter_config.json").write_text(json.dumps(self.config | config))
        safetensors.torch.save_file(self.arrays, self.root / "adapter_model.safetensors")
        for file in self.base.glob("*"):
            if file.is_file() and file.name != "model.safetensors":
                shutil.copyfile(file, self.root / file.name)
        shutil.copytree(self.base / "tokenizer", self.root / "tokenizer", dirs_exist_ok=True)
        return self.root

    def merged(self, target, scales):
        """A checkpoint of the base with the updates merged into its weights."""
        root = shutil.copytree(self.base, target)

        def merge(arrays):
            for module, scale in zip(self.modules, scales, strict=True):
                a, b = (self.arrays[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
                arrays[f"{module}.weight"] = arrays[f"{module}.weight"] + scale * (b @ a)

        return rewrite(root, merge)


@pytest.fixture
def adapter(base, tmp_path):
    return Adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, [2.0] * 7),
        ({"use_rslora": True}, [6 / 3**0.5] * 7),
        (
            {"alpha_pattern": {"action_in_proj": 12, r"layers\.1\.self_attn\..*": 3}},
            [2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 4.0],
        ),
        ({"target_modules": ["q_proj", "v_proj", "action_in_proj"], "exclude_modules": ".*vision.*"}, [2.0] * 7),
        ({"target_modules": "all-linear"}, [2.0] * 7),
        ({"rank_pattern": {"self_attn.q_proj": 3}}, [2.0] * 7),
    ],
)
def test_adapter_is_folded_into_its_base(adapter, golden_pi05, tmp_path, config, scales):
    model = torchpi.load_model(adapter.write(**config), config=golden_pi05.config)
    expected = dict(
        torchpi.load_model(adapter.merged(tmp_path / "whole", scales), config=golden_pi05.config).named_parameters()
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5)
    assert not torch.equal(
        model.expert.layers[0].attention.qkv.weight, golden_pi05.model().expert.layers[0].attention.qkv.weight
    )


def test_modules_to_save_replace_the_bases(adapter, golden_pi05):
    weight, bias = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(32.0)
    saved = "base_model.model.model.action_out_proj."
    adapter.arrays |= {f"{saved}weight": weight, f"{saved}bias": bias}
    model = torchpi.load_model(adapter.write(modules_to_save=["action_out_proj"]), config=golden_pi05.config)
    assert torch.equal(model.action_out_proj.weight, weight)
    assert torch.equal(model.action_out_proj.bias, bias)


def test_policy_of_an_adapter_uses_its_processors_and_converts(adapter, golden_pi05, tmp_path):
    root = adapter.write()
    policy = torchpi.load_policy(root, config=golden_pi05.config)
    assert policy.embodiment.name == "lerobot"
    report = convert(root, tmp_path / "out", "torchpi", config=golden_pi05.config, check=False)
    assert (len(report.folded), report.dtype) == (7, "float32")
    assert_same_weights(torchpi.load_model(tmp_path / "out"), policy.model)


def test_updated_weights_of_a_bfloat16_base_are_float32(adapter, golden_pi05, tmp_path):
    rewrite(adapter.base, lambda arrays: {name: array.bfloat16() for name, array in arrays.items()})
    root = adapter.write()
    report = convert(root, tmp_path / "out", "lerobot", config=golden_pi05.config, check=False)
    assert report.dtype == "bfloat16 and float32"
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {written[f"{module}.weight"].dtype for module in adapter.modules} == {torch.float32}
    assert sum(array.dtype is torch.bfloat16 for array in written.values()) > 100
    expected = torchpi.load_model(root, config=golden_pi05.config)
    assert_same_weights(torchpi.load_model(tmp_path / "out", config=golden_pi05.config), expected)


def test_updates_of_text_heads_are_dropped_with_reason(adapter, golden_pi05):
    for half, shape in (("A", (3, 64)), ("B", (512, 3))):
        name = f"base_model.model.model.paligemma_with_expert.paligemma.lm_head.lora_{half}.weight"
        adapter.arrays[name] = torch.ones(shape)
    checkpoint = open_checkpoint(adapter.write(target_modules="all-linear"), config=golden_pi05.config)
    assert checkpoint.dropped[name] == "they update a text head, which is not read"


def test_base_may_be_next_to_the_adapter_or_named_in_config(adapter, golden_pi05):
    root = adapter.write(base_model_name_or_path="../base")
    assert open_checkpoint(root, config=golden_pi05.config).format == "lerobot"
    document = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(document | {"pretrained_path": "../base"}))
    (root / "adapter_config.json").write_text(json.dumps(adapter.config | {"base_model_name_or_path": None}))
    assert open_checkpoint(root / "adapter_model.safetensors", config=golden_pi05.config).format == "lerobot"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is true; only false is supported: DoRA also scales"),
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"bias": "all"}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa".*merge them with PEFT'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights is "olora"'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"r": None}, "Expected `int`, got `null` at `r`"),
        ({"lora_alpha": "8"}, "Expected `float`, got `str` at `lora_alpha`"),
        ({"use_magic": 1}, "has the unknown field use_magic"),
        ({"base_model_name_or_path": ""}, "does not name the adapter.s base"),
        ({"r": 4}, r"A \[3, .* do not fit rank 4, which adapter_config.json states"),
        ({"rank_pattern": {"q_proj": 8}}, "do not fit rank 8"),
        ({"r": 0}, "A rank or an alpha is 0; expected positive numbers"),
        ({"lora_alpha": float("nan")}, "A rank or an alpha is nan"),
        ({"alpha_pattern": {"q_proj": -1}}, "A rank or an alpha is -1"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"Expected `float`, got `str` at `alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "got `list` at `rank_pattern`"),
        ({"rank_pattern": {"(": 3}}, r"\( can't be matched with the layers: .*missing \)"),
        ({"alpha_pattern": {"(.*)*(.*)*(.*)*!": 3}}, r"can't be matched with the layers: that takes too long"),
        ({"modules_to_save": "time_mlp_in"}, "got `str` at `modules_to_save`"),
        ({"modules_to_save": ["time_mlp_in"]}, r"lacks time_mlp_in, which adapter_config.json names"),
    ],
)
def test_adapter_with_unsupported_settings_is_refused(adapter, golden_pi05, monkeypatch, config, message):
    monkeypatch.setattr(peft, "_MATCH_SECONDS", 0.5)
    with pytest.raises(ValueError, match=message):
        torchpi.load_model(adapter.write(**config), config=golden_pi05.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("base_model.model.model.action_in_proj.lora_B.weight"), r"B \[\] of model.action_in"),
        (lambda a: a.update({"base_model.model.model.action_in_proj.lora_A.weight": torch.zeros(3, 5)}), "fit rank 3"),
        (lambda a: a.update({"base_model.model.x.lora_magnitude_vector": torch.zeros(3)}), "fit none of the base's"),
        (lambda a: a.update({"base_model.model.model.other_proj.weight": torch.zeros(3)}), "fit none of the base's"),
        (lambda a: a.clear(), "has no arrays; get it again"),
        (lambda a: a.update({"base_model.model.model.action_in_proj.lora_A.default.weight": torch.zeros(3, 32)}),
         "lora_A.*weight and a second change of the same array"),
        (lambda a: a.update({"base_model.model.model.action_in_proj.weight": torch.zeros(32, 32)}),
         "action_in_proj.weight and a second change of the same array"),
    ],
)  # fmt: skip
def test_adapter_arrays_that_do_not_fit_are_named(adapter, golden_pi05, change, message):
    change(adapter.arrays)
    with pytest.raises(ValueError, match=message):
        torchpi.load_model(adapter.write(), config=golden_pi05.config)


def test_missing_base_of_an_adapter_is_named(adapter, golden_pi05):
    with pytest.raises(FileNotFoundError, match="is a LoRA adapter for /nowhere/base: There is no checkpoint"):
        torchpi.load_model(adapter.write(base_model_name_or_path="/nowhere/base"), config=golden_pi05.config)


def test_cyclic_bases_are_an_error(adapter, golden_pi05, tmp_path):
    root = adapter.write(base_model_name_or_path=str(tmp_path / "other"))
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(
        json.dumps(adapter.config | {"base_model_name_or_path": str(root)})
    )
    with pytest.raises(ValueError, match="which leads back to this adapter"):
        torchpi.load_model(root, config=golden_pi05.config)


@pytest.mark.parametrize("path", ["~no_such_user/base", "a" * 5000])
def test_invalid_path_does_not_exist(path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        torchpi.load_model(path)


def test_adapter_beside_whole_weights_is_an_error(adapter, golden_pi05):
    root = adapter.write()
    shutil.copyfile(adapter.base / "model.safetensors", root / "model.safetensors")
    with pytest.raises(ValueError, match="holds whole weights and PEFT's adapter"):
        torchpi.load_model(root, config=golden_pi05.config)


# Names with prefixes


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"policy.{name}",
        lambda name: name.replace("gemma_expert.", "gemma_expert._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=["compile", "ddp", "both", "lightning", "attribute", "fsdp"],
)
def test_wrapper_prefixes_are_stripped(base, golden_pi05, rename):
    rewrite(base, lambda arrays: {rename(name): array for name, array in arrays.items()})
    assert_same_weights(torchpi.load_model(base, config=golden_pi05.config), golden_pi05.model())


def test_weights_with_and_without_a_prefix_are_an_error(base, golden_pi05):
    rewrite(base, lambda arrays: {**arrays, f"module.{E}": arrays[E].clone()})
    with pytest.raises(ValueError, match="with and without the prefix of a wrapper"):
        torchpi.load_model(base, config=golden_pi05.config)


# The tied embedding


def test_different_embeddings_require_a_choice(base, golden_pi05):
    other = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    right = safetensors.torch.load_file(base / "model.safetensors")[E]
    rewrite(base, lambda arrays: {**arrays, E: other, L: right})
    with pytest.raises(
        ValueError, match=r'embed_tokens.weight differs from .*lm_head.weight; .*embedding="embed_tokens"'
    ):
        torchpi.load_model(base, config=golden_pi05.config)
    for choice, expected in (("embed_tokens", other), ("lm_head", right)):
        model = torchpi.load_model(base, config=golden_pi05.config, embedding=choice)
        assert torch.equal(model.embedding, expected)
    assert open_checkpoint(base, config=golden_pi05.config, embedding="lm_head").dropped[E] == "lm_head is used"


def test_embedding_choice_for_single_embedding_is_refused(golden_pi05):
    with pytest.raises(ValueError, match="stores the embedding under two names"):
        torchpi.load_model("demo", embedding="lm_head")
    with pytest.raises(ValueError, match="stores the embedding under two names"):
        torchpi.load_model(golden_pi05.root / "jax_ckpt_pure", config=golden_pi05.config, embedding="embed_tokens")


def test_policy_folder_without_its_policy_json_is_named(golden_pi05, tmp_path):
    policy = tmp_path / "policy"
    convert(golden_pi05.root / "lerobot", policy, "torchpi", config=golden_pi05.config, check=False)
    (policy / "policy.json").unlink()
    with pytest.raises(ValueError, match=r"has the weights of a policy folder, but no policy\.json"):
        torchpi.load_model(policy)


# .npz


def flat(arrays, *, prefix="", suffix="", dtype=np.float32, skip="PaliGemma/"):
    """Arrays of a JAX checkpoint with names joined by "/"."""
    read = ((name, arrays.read(name, torch.float32).numpy().astype(dtype)) for name in arrays.shapes)
    return {f"{prefix}{name.replace('.', '/').removeprefix(skip)}{suffix}": array for name, array in read}


def is_paligemmas(name):
    of_expert = name.startswith("PaliGemma.llm.") and any(part.endswith("_1") for part in name.split("."))
    return name.startswith("PaliGemma.") and not of_expert


@pytest.fixture
def jax_arrays(golden):
    return JaxArrays(golden.checkpoint / "params")


@pytest.mark.parametrize(("prefix", "suffix"), [("", ""), ("params/", "/value")])
def test_npz_of_a_whole_model_is_read(golden, jax_arrays, tmp_path, prefix, suffix):
    np.savez(tmp_path / "weights.npz", **flat(jax_arrays, prefix=prefix, suffix=suffix, skip=""))
    assert_same_weights(torchpi.load_model(tmp_path / "weights.npz", config=golden.config), golden.model())
    assert_same_weights(torchpi.load_model(tmp_path, config=golden.config), golden.model())


def test_damaged_array_of_an_npz_is_named(tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, x=np.ones(1000, np.float32))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.npz: x is damaged: .*get the file again"):
        NpzArrays(file).read("x")


@pytest.mark.parametrize(("prefix", "dtype"), [("", np.float32), ("params/", np.float16)])
def test_paligemma_npz_fills_vision_and_backbone_and_draws_the_rest(golden, jax_arrays, tmp_path, prefix, dtype):
    jax_arrays.shapes = {name: shape for name, shape in jax_arrays.shapes.items() if is_paligemmas(name)}
    file = tmp_path / "pt_224.npz"
    np.savez(file, **flat(jax_arrays, prefix=prefix, dtype=dtype))
    with pytest.raises(ValueError, match="is PaliGemma, which has no action expert: choose the model to build from it"):
        torchpi.load_model(file)
    with pytest.warns(UserWarning, match="is PaliGemma: the action expert and the projections are drawn"):
        model = torchpi.load_model(file, config=golden.config)
    assert model.trained_action_dim == 0
    drawn, whole = torchpi.Pi0(model.config), golden.model()
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).detach()
        if name.startswith(("expert.", "suffix.", "action_out_proj.")):
            assert parameter.isfinite().all()
            assert torch.equal(parameter == 0, drawn.get_parameter(name) == 0), name
        else:
            assert torch.equal(parameter, torch.from_numpy(expected.numpy().astype(dtype)).float()), name


def test_bfloat16_in_an_npz_is_read(golden, jax_arrays, tmp_path):
    named = flat(jax_arrays, skip="")
    bits = {name: torch.from_numpy(a).bfloat16().view(torch.uint16).numpy().view("V2") for name, a in named.items()}
    np.savez(tmp_path / "weights.npz", **bits)
    model = torchpi.load_model(tmp_path / "weights.npz", config=golden.config, dtype=torch.bfloat16)
    assert_same_weights(model, golden.model(dtype=torch.bfloat16))


def test_training_from_paligemma_uses_its_seed(golden_pi05, tmp_path):
    from torchpi.training.config import ModelConfig, TrainConfig
    from torchpi.training.weights import build_model, open_init

    arrays = JaxArrays(golden_pi05.checkpoint / "params")
    arrays.shapes = {name: shape for name, shape in arrays.shapes.items() if is_paligemmas(name)}
    np.savez(tmp_path / "pt_224.npz", **flat(arrays))
    model = ModelConfig(init=str(tmp_path / "pt_224.npz"), config=str(golden_pi05.config), dtype="float32")
    config = TrainConfig(model=model, seed=1)
    init = open_init(config)
    built, report = build_model(config, init.config, init, skeleton=False)
    assert "backbone.final_norm.scale" in report.loaded
    assert {name.split(".")[0] for name in report.fresh} == {"expert", "suffix", "action_out_proj"}
    assert torch.equal(built.embedding, golden_pi05.model().embedding)
    assert not torch.equal(built.action_out_proj.weight, init.model().action_out_proj.weight)


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04 half a zip", b""])
def test_damaged_npz_is_named(tmp_path, content):
    (tmp_path / "weights.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.npz is no .npz file, or is damaged"):
        torchpi.load_model(tmp_path / "weights.npz", config="pi05")


def npz_with(file, header, data=b"", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + data)


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("{'descr': (((\n", {}, "EOF in multi-line statement"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }\n", {},
         "x has .* bytes; its header describes"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }\n", {"compression": zipfile.ZIP_LZMA},
         "x is encrypted, or has a compression that NumPy does not use"),
    ],
)  # fmt: skip
def test_npz_with_inconsistent_headers_is_refused_before_reading(tmp_path, header, options, message):
    npz_with(tmp_path / "weights.npz", header, **options)
    with pytest.raises(ValueError, match=f"no .npz file, or is damaged: .*{message}"):
        torchpi.load_model(tmp_path / "weights.npz", config="pi05")


def test_big_endian_npz_is_read(golden, jax_arrays, tmp_path):
    np.savez(tmp_path / "weights.npz", **flat(jax_arrays, skip="", dtype=">f4"))
    assert_same_weights(torchpi.load_model(tmp_path / "weights.npz", config=golden.config), golden.model())


@pytest.mark.parametrize("array", [np.zeros(2, np.int8), np.array([{}], dtype=object), np.zeros(2, np.float64)])
def test_npz_with_unsupported_dtype_is_refused(tmp_path, array):
    np.savez(tmp_path / "weights.npz", x=array)
    with pytest.raises(ValueError, match="weights must be float32, bfloat16 or float16, but x has"):
        torchpi.load_model(tmp_path / "weights.npz", config="pi05")


# Other models and older files


def test_pi0_fast_is_named(golden_pi05, tmp_path):
    arrays = JaxArrays(golden_pi05.checkpoint / "params")
    shapes = {name: shape for name, shape in arrays.shapes.items() if is_paligemmas(name)}
    (tmp_path / "params").mkdir()
    write_params(tmp_path / "params", shapes, lambda name: arrays.read(name, torch.float32))
    with pytest.raises(ValueError, match="has no action expert, like π₀-FAST checkpoints, which are not supported yet"):
        torchpi.load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "normalize_inputs.buffer_observation_state.mean",
        "unnormalize_outputs.buffer_action.std",
        "normalize_targets.x.min",
    ],
)
def test_policy_of_lerobot_before_04_names_the_migration(base, golden_pi05, name):
    (base / "policy_preprocessor.json").unlink()
    rewrite(base, lambda arrays: arrays.update({name: torch.zeros(7)}))
    with pytest.raises(
        ValueError, match=r"before version 0.4, with statistics among the weights .*Migrate it: python -m"
    ):
        torchpi.load_model(base, config=golden_pi05.config)


def test_float16_becomes_float32(base, golden_pi05, tmp_path):
    rewrite(base, lambda arrays: {name: array.half() for name, array in arrays.items()})
    model = torchpi.load_model(base, config=golden_pi05.config)
    assert torch.equal(model.embedding, golden_pi05.model().embedding.half().float())
    report = convert(base, tmp_path / "out", "torchpi", config=golden_pi05.config, check=False)
    assert report.dtype == "float32"
    assert_same_weights(torchpi.load_model(tmp_path / "out"), model)


# Run folders


@pytest.mark.parametrize(
    ("places", "newest"),
    [
        (["checkpoints/000100/pretrained_model", "checkpoints/000020/pretrained_model"], "000100/pretrained_model"),
        (["100", "20"], "100"),
        (["checkpoints/00000002/policy", "checkpoints/00000010/policy"], "00000010/policy"),
    ],
    ids=["lerobot", "openpi", "torchpi"],
)
def test_run_folder_names_its_newest_checkpoint(base, golden_pi05, tmp_path, places, newest):
    run = tmp_path / "run"
    for place in places:
        (run / place).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (run / place / name).hardlink_to(base / name)
    if "checkpoints" in places[0]:
        (run / "checkpoints" / "last").symlink_to(pathlib.Path(places[-1]).parts[1])
    with pytest.raises(
        ValueError,
        match=rf"is not a checkpoint itself; the last one in it is .*{newest}, of",
    ):
        torchpi.load_model(run, config=golden_pi05.config)
    step = run / places[0]
    if step.parent != run:
        with pytest.raises(ValueError, match=rf"the last one in it is {step}"):
            torchpi.load_model(step.parent, config=golden_pi05.config)
