"""Model configs: defaults, presets, JSON, and errors."""

import dataclasses
import json
import re

import pytest
import torch

import torchpi
from torchpi import GemmaConfig, Pi0Config, VisionConfig
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.config import PRESETS, preset

GEMMA = {"width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(("pi05", "max_token_len"), [(True, 200), (False, 48)])
def test_prompt_length_and_format_follow_the_variant(pi05, max_token_len):
    config = Pi0Config(pi05=pi05)
    assert (config.max_token_len, config.discrete_state_input) == (max_token_len, pi05)
    assert (config.action_dim, config.action_horizon, config.vocab_size, config.image_size) == (32, 50, 257_152, 224)
    assert (config.paligemma.width, config.action_expert.width, config.siglip.width) == (2048, 1024, 1152)
    assert config.num_patches == 256


def test_prompt_length_and_format_override_the_variant():
    config = Pi0Config(pi05=True, max_token_len=48, discrete_state_input=False)
    assert (config.max_token_len, config.discrete_state_input) == (48, False)


def test_required_unset_field_error_names_config_argument():
    config = Pi0Config(action_horizon=None, max_token_len=None, discrete_state_input=None)
    for field in ("action_horizon", "max_token_len", "discrete_state_input"):
        assert getattr(config, field) is None
        with pytest.raises(ValueError, match=rf"{field} is not set.*config=.*pi05_libero"):
            config.require(field)
    assert Pi0Config().require("action_horizon") == 50
    assert Pi0Config().chunk_shape == (50, 32)


@pytest.mark.parametrize(
    ("name", "horizon", "pi05", "discrete"),
    [
        ("pi0", 50, False, False),
        ("pi05", 50, True, True),
        ("pi0_droid", 10, False, False),
        ("pi05_droid", 15, True, True),
        ("pi05_libero", 10, True, False),
        ("tiny", 16, True, True),
    ],
)
def test_presets_complete_the_published_weights(name, horizon, pi05, discrete):
    config = preset(name)
    assert (config.action_horizon, config.pi05, config.discrete_state_input) == (horizon, pi05, discrete)


def test_unknown_preset_error_lists_the_presets():
    with pytest.raises(ValueError, match=r"Unknown preset 'pi06'.*pi0, pi05, tiny.*pi05_libero"):
        preset("pi06")


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_and_from_dict_are_inverse(name):
    written = json.loads(json.dumps(PRESETS[name].to_dict()))
    read = Pi0Config.from_dict(written)
    assert read.to_dict() == written
    assert (read.paligemma, read.action_expert, read.siglip) == (
        PRESETS[name].paligemma,
        PRESETS[name].action_expert,
        PRESETS[name].siglip,
    )


def test_unset_values_survive_json():
    config = Pi0Config(pi05=True, action_horizon=None, max_token_len=None, discrete_state_input=None)
    read = Pi0Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (read.action_horizon, read.max_token_len, read.discrete_state_input) == (None, None, None)


@pytest.mark.parametrize(("pi05", "dim", "horizon", "length"), [(True, 32, 50, 200), (False, 7, 32, 48)])
def test_from_json_reads_the_golden_files(golden_root, pi05, dim, horizon, length):
    config = Pi0Config.from_json(golden_root / ("pi05" if pi05 else "pi0") / "model_config.json")
    assert (config.pi05, config.action_dim, config.action_horizon, config.max_token_len) == (pi05, dim, horizon, length)
    assert config.discrete_state_input == pi05
    assert config.paligemma == GemmaConfig(**GEMMA)
    assert config.action_expert == GemmaConfig(**{**GEMMA, "width": 32, "mlp_dim": 64})
    assert config.siglip == VisionConfig(width=48, depth=2, mlp_dim=96, num_heads=4, patch=14)
    assert (config.vocab_size, config.image_size) == (512, 224)


def test_fields_other_than_sizes_are_ignored(tmp_path):
    """The config file of a LoRA model has such fields."""
    document = {
        "pi05": False, "dtype": "float32", "action_dim": 7, "action_horizon": 32, "max_token_len": 48,
        "vocab_size": 512, "image_size": 224, "num_params": 287607, "num_lora_params": 30336,
        "paligemma": GEMMA, "action_expert": {**GEMMA, "width": 32, "mlp_dim": 64},
        "siglip": {"width": 48, "depth": 2, "mlp_dim": 96, "num_heads": 4, "patch": 14},
        "paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora",
        "lora": {"paligemma": {"rank": 4, "alpha": 8.0, "rslora": False, "applies_to": ["attn", "ffn"]}},
    }  # fmt: skip
    (tmp_path / "model_config.json").write_text(json.dumps(document))
    assert Pi0Config.from_json(tmp_path / "model_config.json").paligemma == GemmaConfig(**GEMMA)


def test_partial_file_is_completed_from_the_defaults(tmp_path):
    (tmp_path / "horizon.json").write_text('{"pi05": true, "action_horizon": 10}')
    assert Pi0Config.from_json(tmp_path / "horizon.json") == Pi0Config(pi05=True, action_horizon=10)


def test_partial_file_is_completed_from_the_base():
    base = preset("tiny")
    assert Pi0Config.from_dict({"action_horizon": 3}, base) == dataclasses.replace(base, action_horizon=3)
    assert Pi0Config.from_dict({"action_expert": {"width": 64}}, base).action_expert == dataclasses.replace(
        base.action_expert, width=64
    )


def test_partial_sizes_are_completed_from_the_variant():
    assert Pi0Config.from_dict({"paligemma": {"width": 512}}).paligemma == dataclasses.replace(
        Pi0Config().paligemma, width=512
    )
    assert Pi0Config.from_dict({"siglip": {"position": "sincos2d"}}).siglip.width == 1152
    assert Pi0Config.from_dict({"siglip": "tiny/16", "image_size": 96}).siglip == preset("tiny").siglip


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"action_horison": 10}, "fields action_horison .did you mean action_horizon[?].; known are .*action_horizon"),
        ({"paligemma": {"depht": 4}}, " has unknown fields paligemma.depht .did you mean depth[?].; known are .*depth"),
        ({"action_horizon": "50"}, "Expected `int | null`, got `str` at `action_horizon`"),
        ({"action_horizon": 50.0}, "Expected `int | null`, got `float` at `action_horizon`"),
        ({"action_horizon": 0}, "action_horizon must be a positive integer, got 0"),
        ({"action_dim": True}, "Expected `int`, got `bool` at `action_dim`"),
        ({"action_dim": None}, "Expected `int`, got `null` at `action_dim`"),
        ({"max_token_len": -1}, "max_token_len must be a positive integer, got -1"),
        ({"vocab_size": [512]}, "Expected `int`, got `list` at `vocab_size`"),
        ({"pi05": "yes"}, "Expected `bool`, got `str` at `pi05`"),
        ({"pi05": 1}, "Expected `bool`, got `int` at `pi05`"),
        ({"pi05": None}, "Expected `bool`, got `null` at `pi05`"),
        ({"discrete_state_input": 0}, "Expected `bool | null`, got `int` at `discrete_state_input`"),
        ({"paligemma": {"width": "64"}}, "Expected `int`, got `str` at `paligemma.width`"),
        ({"paligemma": {"width": None}}, "Expected `int`, got `null` at `paligemma.width`"),
        ({"paligemma": {"width": 0}}, "GemmaConfig.width must be a positive integer, got 0"),
        ({"paligemma": {"depth": 10**6}}, "GemmaConfig.depth must be at most 512, got 1000000"),
        ({"siglip": {"mlp_dim": 10**12}}, "VisionConfig.mlp_dim must be at most 524288, got"),
        ({"action_horizon": 10**9}, "Pi0Config.action_horizon must be at most 4096, got 1000000000"),
        ({"max_token_len": 10**7}, "Pi0Config.max_token_len must be at most 16384"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"action_expert": {"num_heads": None}}, "Expected `int`, got `null` at `action_expert.num_heads`"),
        ({"action_expert": {"head_dim": 8}}, "head_dim must be equal, got 256 and 8"),
        ({"siglip": {"patch": 14.0}}, "Expected `int`, got `float` at `siglip.patch`"),
        ({"siglip": {"position": "rope"}}, "Invalid value 'rope' at `siglip.position`; valid are 'learned'"),
        ({"siglip": 14}, "Expected `object`, got `int` at `siglip`"),
        ({"paligemma": "gemma_9b"}, "paligemma: unknown variant 'gemma_9b'; variants are gemma_2b, gemma_300m"),
        # The Python argument's name, which is ignored only beside the sizes.
        ({"paligemma_variant": "gemma_300m"}, "'paligemma_variant' is not read; write 'paligemma' instead"),
    ],
)  # fmt: skip
def test_invalid_field_error_names_file_and_field(tmp_path, document, message):
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message.replace(' | ', ' . ')}"):
        Pi0Config.from_json(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"pi05": tru', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b'"pi05"', "must hold a JSON object, found str"),
    ],
)
def test_non_json_file_error_names_the_file(tmp_path, content, message):
    (tmp_path / "sizes.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"sizes\.json.*{message}"):
        Pi0Config.from_json(tmp_path / "sizes.json")


def test_missing_file_error_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*sizes\.json"):
        Pi0Config.from_json(tmp_path / "sizes.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, "share keys and values, so depth must be equal, got 3 and 4"),
        ({"num_heads": 2}, "num_heads must be equal, got 4 and 2"),
        ({"num_kv_heads": 2}, "num_kv_heads must be equal, got 1 and 2"),
        ({"head_dim": 8}, "head_dim must be equal, got 16 and 8"),
        ({"width": 33}, "width must be even for the time embedding, got 33"),
    ],
)
def test_expert_incompatible_with_backbone_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Pi0Config(paligemma_variant=GemmaConfig(**GEMMA), action_expert_variant=GemmaConfig(**{**GEMMA, **changes}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GemmaConfig(**{**GEMMA, "head_dim": 15}), "head_dim must be even for RoPE, got 15"),
        (lambda: GemmaConfig(**{**GEMMA, "num_kv_heads": 3}), r"num_heads \(4\) must be a multiple of num_kv_heads"),
        (lambda: VisionConfig(width=50, depth=1, mlp_dim=8, num_heads=4), r"width \(50\) must be a multiple"),
        (
            lambda: VisionConfig(width=6, depth=1, mlp_dim=8, num_heads=2, position="sincos2d"),
            "sincos2d needs a vision width that is a multiple of 4, got 6",
        ),
        (lambda: Pi0Config(image_size=225), r"image_size \(225\) must be a multiple of the patch \(14\)"),
        (lambda: Pi0Config(paligemma_variant="gemma_7b"), "paligemma_variant: unknown variant 'gemma_7b'"),
        (lambda: Pi0Config.from_dict([1]), "model config must be an object, found list"),
    ],
)
def test_contradictory_sizes_are_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("name", "count"), [("pi05", 3_353_433_872), ("pi0", 3_238_048_528)])
def test_full_size_models_have_the_published_parameter_count(name, count):
    model = torchpi.Pi0(preset(name), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_full_size_checkpoint_has_the_published_arrays(golden_root, kind):
    lines = (golden_root / f"keys_fullsize_jax_{kind}.txt").read_text().splitlines()
    published = {
        path.replace("/", "."): tuple(int(size) for size in re.findall(r"\d+", shape))
        for path, shape, _ in (re.split(r"\s{2,}|(?<=\))\s+", line) for line in lines if not line.startswith("#"))
    }
    assert {name: leaf.shape for name, leaf in jax_table(preset(kind)).items()} == published


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_every_full_size_weight_is_mapped_exactly_once(kind):
    config = preset(kind)
    filled: dict[str, int] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    parameters = dict(torchpi.Pi0(config, device="meta").named_parameters())
    for leaf in jax_table(config).values():
        size = torch.Size(leaf.shape).numel() // len(leaf.slices)
        for piece in leaf.slices:
            filled[piece.param] = filled.get(piece.param, 0) + size
            rows.setdefault(piece.param, []).append(piece.rows or (0, parameters[piece.param].shape[0]))
    assert filled == {name: parameter.numel() for name, parameter in parameters.items()}
    for name, spans in rows.items():  # consecutive, without a gap
        ends = [0, *(end for _, end in sorted(spans))]
        assert [start for start, _ in sorted(spans)] == ends[:-1]
        assert ends[-1] == parameters[name].shape[0]
