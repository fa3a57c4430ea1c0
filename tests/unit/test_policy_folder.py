"""Policy folders: saved policies load bit for bit, and damaged ones are errors."""

import contextlib
import dataclasses
import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.spec import FACTS
from torchpi.convert import convert
from torchpi.inspect import diagnose
from torchpi.transforms import Normalization, NormStats
from torchpi.transforms.normalize import save_norm_stats

CHECKSUMS = "model.safetensors.checksums.json"
FILES = ["model.safetensors", CHECKSUMS, "norm_stats.json", "policy.json", "tokenizer.model"]
EMBODIMENT = Embodiment.generic(
    "two_joints",
    cameras={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
    state=["shoulder", "elbow"],
    actions=["shoulder", "elbow"],
    delta=["shoulder"],
    control_hz=20,
    execute_steps=2,
    default_prompt="pick up the cube",
    metadata={"reset_pose": [0.0, 0.5]},
)


def small_config(pi05=True, **fields):
    sizes = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    defaults = {
        "paligemma_variant": GemmaConfig(width=16, mlp_dim=32, **sizes),
        "action_expert_variant": GemmaConfig(width=8, mlp_dim=16, **sizes),
        "siglip_variant": VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
        "action_dim": 3,
        "action_horizon": 4,
        "max_token_len": 120,
        "vocab_size": 512,
        "image_size": 28,
    }
    return Pi0Config(pi05=pi05, **(defaults | fields))


def random_model(config, dtype=torch.float32):
    """Random weights, including those that are initially 0."""
    model, generator = torchpi.Pi0(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.to(dtype).eval()


def stats(dim=2):
    spread = np.linspace(0.1, 0.7, dim)  # values without a short decimal representation
    return NormStats(spread, spread / 3 + 0.1, -spread - 1, spread + 1)


@pytest.fixture
def tokenizer(golden_root):
    return golden_root / "tokenizer" / "tiny_spm.model"


@pytest.fixture
def make_policy(tokenizer):
    def make(config=None, dtype=torch.float32, embodiment=EMBODIMENT, **fields):
        defaults = {
            "norm_stats": {"state": stats(), "actions": stats()},
            "normalization": {"state": Normalization("quantile"), "actions": Normalization("z_score")},
            "tokenizer": tokenizer,
            "truncation": "original",
            "metadata": {"robot": "left"},
            "provenance": {"source": "a test"},
        }
        return Policy(random_model(config or small_config(), dtype), embodiment, **(defaults | fields))

    return make


@pytest.fixture
def folder(make_policy, tmp_path):
    """A valid policy folder for tests that damage it."""
    make_policy().save(tmp_path / "policy")
    return tmp_path / "policy"


def load(path, **arguments):
    return torchpi.load_policy(path, device="cpu", **arguments)


def bits(model):
    return {name: parameter.detach().view(torch.uint8).clone() for name, parameter in model.named_parameters()}


def assert_same_bits(ours, theirs):
    ours, theirs = bits(ours), bits(theirs)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def infer(policy):
    noise = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    return policy.infer(policy.example_observation(), noise=noise, num_steps=2)["actions"]


# Save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pi05", [True, False])
def test_saved_policy_loads_bit_for_bit(make_policy, tmp_path, pi05, dtype):
    saved = make_policy(small_config(pi05), dtype)
    saved.save(tmp_path / "policy")
    loaded = load(tmp_path / "policy", dtype=dtype)
    assert loaded.model.config == saved.model.config
    assert_same_bits(loaded.model, saved.model)
    assert_same_bits(torchpi.load_model(tmp_path / "policy", dtype=dtype), saved.model)
    np.testing.assert_array_equal(infer(loaded), infer(saved))


def test_everything_except_the_weights_is_loaded(make_policy, tmp_path):
    saved = make_policy(default_prompt="wave")
    saved.save(tmp_path / "policy")
    loaded = load(tmp_path / "policy")
    assert loaded.embodiment == saved.embodiment
    assert loaded.default_prompt == "wave"
    assert loaded.metadata == saved.metadata
    assert loaded.metadata["robot"] == "left"
    assert loaded.metadata["reset_pose"] == [0.0, 0.5]
    assert loaded.provenance == {"torchpi": torchpi.__version__, "source": "a test"}
    assert loaded.transforms.truncation == "original"
    assert loaded.transforms.normalization == saved.transforms.normalization
    for key, value in saved.transforms.norm_stats.items():
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(loaded.transforms.norm_stats[key], name), getattr(value, name))


def test_unset_sizes_stay_unset(make_policy, tmp_path):
    config = small_config(action_horizon=None, max_token_len=None, discrete_state_input=None)
    make_policy(config).save(tmp_path / "policy")
    assert load(tmp_path / "policy").model.config == config


def test_loaded_model_is_in_eval_mode_with_gradients_enabled(folder):
    model = torchpi.load_model(folder)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_folder_has_exactly_five_files_and_none_can_run_code(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for file in folder.iterdir():  # neither a pickle nor a zip archive, which is torch.save's format
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
    for name in ("policy.json", "norm_stats.json"):
        assert isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict)


def test_version_1_without_prompt_format_is_read(folder):
    document = json.loads((folder / "policy.json").read_text())
    document["format_version"] = 1
    del document["prompt"]["format"]
    (folder / "policy.json").write_text(json.dumps(document))
    assert load(folder).transforms.prompt_format == "openpi"


def test_earlier_name_of_max_action_prefix_is_read(folder):
    edit(folder, put("metadata", value={"max_given_actions": 4}))
    assert load(folder).metadata["max_action_prefix"] == 4
    assert "max_given_actions" not in load(folder).metadata


def test_headers_are_read_once(folder, monkeypatch):
    from torchpi.checkpoints import checkpoint

    opened, read = [], checkpoint.SafetensorsArrays
    monkeypatch.setattr(checkpoint, "SafetensorsArrays", lambda root, **more: opened.append(root) or read(root, **more))
    load(folder)
    assert opened == [folder]


def test_policy_json_has_the_documented_fields(folder):
    document = json.loads((folder / "policy.json").read_text())
    assert sorted(document) == [
        "embodiment", "format_version", "image_transform", "metadata", "model", "normalization", "prompt", "provenance",
    ]  # fmt: skip
    assert document["format_version"] == 2
    assert document["prompt"] == {"default": "pick up the cube", "format": "openpi", "truncation": "original"}
    assert document["normalization"]["actions"] == {"kind": "z_score", "eps_rule": "openpi"}
    assert document["image_transform"] == {"resize": "pad", "filter": "bilinear_antialiased"}
    assert document["model"]["paligemma"]["width"] == 16
    assert [camera["key"] for camera in document["embodiment"]["cameras"]] == ["front", "wrist"]


def test_tokenizer_json_keeps_its_name(make_policy, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<bos>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "words"))
    make_policy(tokenizer=tmp_path / "words").save(tmp_path / "policy")
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [*FILES[:4], "tokenizer.json"]
    assert load(tmp_path / "policy").transforms.tokenizer.vocab_size == 2


def test_tokenizer_may_be_a_folder(make_policy, folder, tmp_path):
    policy = make_policy(tokenizer=folder)
    policy.save(tmp_path / "other")
    assert (tmp_path / "other/tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_moved_folder_works_and_is_complete(folder, tokenizer, tmp_path):
    before = infer(load(folder))
    moved = tmp_path / "somewhere else" / "ü"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    np.testing.assert_array_equal(infer(load(moved)), before)


def test_policy_can_be_saved_after_its_folder_is_gone(folder, tmp_path):
    policy, before = load(folder), contents(folder)
    shutil.rmtree(folder)
    policy.save(tmp_path / "again")
    assert {path: data for path, data in contents(tmp_path / "again").items() if path.name != "policy.json"} == {
        path: data for path, data in before.items() if path.name != "policy.json"
    }


def test_path_of_a_file_loads_its_folder(folder):
    for name in ("policy.json", "model.safetensors"):
        assert_same_bits(torchpi.load_model(folder / name), torchpi.load_model(folder))


def test_path_of_another_weights_file_is_refused(folder):
    (folder / "old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"old\.safetensors is a file; expected the folder of a checkpoint"):
        torchpi.load_model(folder / "old.safetensors")


# Overwriting, and failures while saving


def test_saving_to_an_existing_path_is_an_error_and_changes_nothing(make_policy, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"policy exists already; choose another path, or pass overwrite=True"):
        make_policy().save(folder)
    assert contents(folder) == before


def test_overwrite_replaces_a_policy_folder_as_a_whole(make_policy, folder, tmp_path):
    (folder / "notes.txt").write_text("of the old one")
    make_policy(default_prompt="new").save(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert load(folder).default_prompt == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_policy_can_overwrite_the_folder_it_was_loaded_from(folder):
    policy = load(folder)
    before = infer(policy)
    policy.save(folder, overwrite=True)
    np.testing.assert_array_equal(infer(load(folder)), before)


@pytest.mark.parametrize("foreign", ["folder", "empty folder", "file"])
def test_overwrite_refuses_other_folders(make_policy, tmp_path, foreign):
    target = tmp_path / "target"
    if foreign == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine") if foreign == "folder" else None
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="target exists and is not a policy folder; it is not overwritten"):
        make_policy().save(target, overwrite=True)
    assert contents(tmp_path) == before
    assert target.exists()


def test_missing_parents_are_created(make_policy, tmp_path):
    make_policy().save(tmp_path / "runs" / "1" / "policy")
    assert sorted(path.name for path in (tmp_path / "runs/1/policy").iterdir()) == FILES


def fail(*_, **__):
    raise OSError("no space left on device")


@contextlib.contextmanager
def no_room_for_more_than(num_bytes):
    """Limit the size of files, as on a disk that becomes full during a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_no_files(make_policy, tmp_path):
    with no_room_for_more_than(100_000), pytest.raises(OSError, match="File too large"):
        make_policy().save(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_failure_after_the_weights_leaves_no_files(make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("torchpi.policy.save_norm_stats", fail)
    with pytest.raises(OSError, match="no space left"):
        make_policy().save(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_folder_intact(make_policy, folder, tmp_path):
    before = contents(tmp_path)
    with no_room_for_more_than(100_000), pytest.raises(OSError, match="File too large"):
        make_policy(default_prompt="new").save(folder, overwrite=True)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_failed_last_rename_restores_the_old_folder(make_policy, folder, tmp_path, monkeypatch):
    from torchpi import atomic as module

    before, rename = contents(tmp_path), module.os.rename

    def fail_onto_target(source, target):
        if target == folder and source.suffix == ".tmp":
            fail()
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", fail_onto_target)
    with pytest.raises(OSError, match="no space left"):
        make_policy(default_prompt="new").save(folder, overwrite=True)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def nested(depth):
    return [nested(depth - 1)] if depth else 0


UNSENDABLE = [
    np.zeros(2),
    {1, 2},
    float("nan"),
    float("-inf"),
    2**70,
    "\ud800",
    nested(40),
    nested(400),
    "x" * 2_000_000,
]


@pytest.mark.parametrize("value", UNSENDABLE, ids=lambda value: f"{type(value).__name__}-{value!a:.8}")
def test_metadata_that_cannot_be_sent_is_an_error(make_policy, tmp_path, value):
    with pytest.raises(ValueError, match=r"of two_joints: metadata.*(can't be written as JSON|expected at most)"):
        make_policy(metadata={"pose": value})
    with pytest.raises(ValueError, match="metadata or provenance of the policy can't be written as JSON"):
        make_policy(provenance={"pose": np.zeros(2)}).save(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["metadata", "embodiment"])
@pytest.mark.parametrize("value", [value for value in UNSENDABLE if isinstance(value, int | float | str | list)])
def test_folder_with_metadata_that_cannot_be_sent_is_an_error(make_policy, tmp_path, place, value):
    make_policy().save(tmp_path / "policy")
    file = tmp_path / "policy/policy.json"
    document = json.loads(file.read_text())
    (document if place == "metadata" else document["embodiment"])["metadata"]["pose"] = value
    file.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=r"policy.*(can't be written as JSON, or sent|expected at most|nested too deeply)"
    ):
        torchpi.load_policy(tmp_path / "policy")


def test_deeply_nested_policy_file_is_an_error(make_policy, tmp_path):
    make_policy().save(tmp_path / "policy")
    file = tmp_path / "policy/policy.json"
    file.write_text(file.read_text().replace('"left"', "[" * 100_000 + "]" * 100_000))
    assert "[" * 100 in file.read_text()
    with pytest.raises(ValueError, match=r"policy\.json is not valid JSON: .* nested too deeply"):
        torchpi.load_policy(tmp_path / "policy")


@pytest.mark.parametrize("key", [*sorted(FACTS), "torchpi/jpeg"])
def test_metadata_can_not_redefine_facts(make_policy, key):
    with pytest.raises(ValueError, match=f"metadata can't have {key}: these keys are reserved"):
        make_policy(metadata={key: None})
    with pytest.raises(ValueError, match=f"metadata can't have {key}: these keys are reserved"):
        make_policy(embodiment=dataclasses.replace(EMBODIMENT, metadata={key: None}))


def test_reserved_metadata_keys_of_a_folder_are_named(make_policy, tmp_path):
    make_policy().save(tmp_path / "policy")
    edit(tmp_path / "policy", lambda document: document["metadata"].update(control_hz=1e9, action_limits=None))
    with pytest.raises(ValueError, match=r"policy: metadata can't have control_hz, action_limits"):
        open_checkpoint(tmp_path / "policy").spec()


def test_all_facts_are_reserved_keys(make_policy):
    policy = make_policy(metadata={})
    assert set(policy.metadata) - set(policy.embodiment.metadata) == FACTS


def test_metadata_must_agree_with_the_embodiments(make_policy):
    assert make_policy(metadata={"reset_pose": [0.0, 0.5]}).metadata["reset_pose"] == [0.0, 0.5]
    with pytest.raises(ValueError, match="metadata can't have reset_pose"):
        make_policy(metadata={"reset_pose": None})


@pytest.mark.parametrize("longest", ["2", -1, True, 1.5, None])
def test_max_action_prefix_must_be_a_number_of_steps(make_policy, longest):
    with pytest.raises(ValueError, match=r"max_action_prefix is .*; expected an integer >= 0"):
        make_policy(metadata={"max_action_prefix": longest})


# Damaged folders


def edit(folder, change):
    """Change the contents of policy.json."""
    file = folder / "policy.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def put(*path, value):
    def change(document):
        *parents, last = path
        for name in parents:
            document = document[name]
        document[last] = value

    return change


def drop(*path):
    def change(document):
        *parents, last = path
        for name in parents:
            document = document[name]
        del document[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=4), "format_version is 4; this torchpi reads 1, 2 and 3. A newer file needs"),
        (put("format_version", value="1"), "format_version is '1'; this torchpi reads 1, 2 and 3"),
        (drop("format_version"), "format_version is None; this torchpi reads 1, 2 and 3"),
        (drop("embodiment"), "Object missing required field `embodiment`"),
        (put("horizon", value=3), "has unknown fields horizon; known are format_version, model, embodiment"),
        (put("model", value=[]), "Expected `object`, got `list` at `model`"),
        (put("metadata", value=None), "Expected `object`, got `null` at `metadata`"),
        (drop("model", "action_horizon"), "lacks model.action_horizon; every field must be stated"),
        (drop("model", "siglip", "position"), "lacks model.siglip.position"),
        (put("model", "siglip", value="so400m/14"), "lacks model.siglip.width"),
        (put("model", "action_dim", value="3"), "model: Expected `int`, got `str` at `action_dim`"),
        (put("model", "sizes", value=3), "model has unknown fields sizes"),
        (put("model", "siglip", "width", value=None), "model: Expected `int`, got `null` at `siglip.width`"),
        (put("image_transform", "resize", value="stretch"), "value 'stretch' at `image_transform.resize`; valid"),
        (drop("prompt", "default"), "Object missing required field `default` at `prompt`"),
        (put("prompt", "style", value="x"), "has unknown fields prompt.style; known are default, format, truncation"),
        (put("prompt", "default", value=3), "Expected `str | null`, got `int` at `prompt.default`"),
        (put("prompt", "truncation", value=None), "Expected `str`, got `null` at `prompt.truncation`"),
        (drop("normalization", "state"), "Object missing required field `state` at `normalization`"),
        (put("normalization", "states", value={}), "has unknown fields normalization.states (did you mean state?)"),
        (put("normalization", "state", value="quantile"), "Expected `object`, got `str` at `normalization.state`"),
        (drop("normalization", "actions", "eps_rule"), "lacks normalization.actions.eps_rule"),
        (drop("normalization", "actions", "kind"), "Object missing required field `kind` at `normalization.actions`"),
        (put("normalization", "actions", "kind", value=1), "Expected `str`, got `int` at `normalization.actions.kind`"),
        (put("normalization", "actions", "kind", value="min_max"), "Unknown normalization kind 'min_max'"),
        (drop("embodiment", "cameras"), "embodiment: Object missing required field `cameras`"),
        (drop("embodiment", "hook"), "embodiment lacks hook; every field must be stated"),
        (drop("embodiment", "actions", 0, "kind"), "embodiment lacks actions.0.kind"),
        (drop("embodiment", "actions", 0, "command"), "embodiment lacks actions.0.command"),
        (put("embodiment", "colour", value="red"), "embodiment has unknown fields colour; known are"),
        (put("embodiment", "cameras", 0, "layout", value="whc"), "layout is 'whc'; expected one of hwc, chw"),
        (put("embodiment", "hook", value="my_robot"), "no hook 'my_robot'; known are ['aloha_pi']"),
    ],
)  # fmt: skip
def test_wrong_field_of_policy_json_is_an_error_that_names_it(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(folder / 'policy.json'))}.*{re.escape(message)}"):
        load(folder)


def test_commands_of_an_older_folder_are_guessed_with_one_warning(folder):
    for action in (0, 1):
        edit(folder, drop("embodiment", "actions", action, "command"))
    with pytest.warns(UserWarning, match="shoulder position, elbow position. State .command.") as caught:
        policy = load(folder)
    assert len(caught) == 1
    assert policy.metadata["action_commands"] == ["position", "position"]


def test_delta_action_named_like_another_state_loads_with_one_warning(folder):
    edit(folder, put("embodiment", "state", 0, "names", value=["elbow", "shoulder"]))
    with pytest.warns(
        UserWarning, match="'shoulder' is a delta at index 0, but .* at index 1 and 'elbow' at 0"
    ) as caught:
        policy = load(folder)
    assert len(caught) == 1
    assert policy.embodiment.state_names == ("elbow", "shoulder")


def test_unstated_commands_stay_unstated(folder):
    assert load(folder).metadata["action_commands"] == [None, None]


def test_unknown_truncation_is_an_error_that_lists_the_known_ones(folder):
    edit(folder, put("prompt", "truncation", value="end"))
    with pytest.raises(ValueError, match="Unknown truncation 'end'; expected one of instruction, original"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format_version": 1, ', r"is not valid JSON: .*\. Correct the file, or get it again\."),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[]", "must hold a JSON object, found list"),
    ],
)
def test_policy_json_that_is_no_object_is_an_error(folder, content, message):
    (folder / "policy.json").write_bytes(content)
    for read in (load, torchpi.load_model):
        with pytest.raises(ValueError, match=rf"policy\.json {message}"):
            read(folder)


def test_missing_statistics_are_an_error(folder):
    (folder / "norm_stats.json").unlink()
    message = r"No normalization statistics at .*policy/norm_stats\.json; .* copy or download the policy again"
    with pytest.raises(FileNotFoundError, match=message):
        load(folder)


@pytest.mark.usefixtures("offline")
def test_missing_tokenizer_is_an_error_and_not_replaced(folder, tmp_path):
    tokenizer = (folder / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    with pytest.raises(FileNotFoundError, match=r"policy has no tokenizer\.model or tokenizer\.json.*pass tokenizer="):
        load(folder)
    assert load(folder, tokenizer=tokenizer).spec.tokenizer == tokenizer


def test_missing_weights_are_an_error(folder):
    (folder / "model.safetensors").unlink()
    for read in (load, torchpi.load_model):
        with pytest.raises(
            FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
        ):
            read(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_weights_are_an_error(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt: .*; get the file again"):
        torchpi.load_model(folder)


def change_weights(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def test_missing_extra_and_misshapen_arrays_are_named_in_one_error(folder):
    def change(weights):
        del weights["suffix.time_mlp_in.bias"], weights["vision.pos_embed"]
        weights["value_head.weight"] = torch.zeros(2)
        weights["embedding"] = torch.zeros(16, 512)

    change_weights(folder, change)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model") as caught:
        torchpi.load_model(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: suffix.time_mlp_in.bias, vision.pos_embed",
        "  left over: value_head.weight",
        "  misshapen: embedding is [16, 512], expected [512, 16]",
    ]


# Arguments that overrule the folder


def test_config_that_differs_from_the_folder_is_reported_and_used(folder, tmp_path):
    (tmp_path / "short.json").write_text('{"action_horizon": 2}')
    with pytest.warns(UserWarning, match="config= overrides action_horizon is 2 in config, 4 in the checkpoint"):
        policy = load(folder, config=tmp_path / "short.json")
    assert policy.model.config.action_horizon == 2
    assert policy.infer(policy.example_observation(), num_steps=1)["actions"].shape == (2, 2)


def test_config_that_equals_the_folder_does_not_warn(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torchpi.load_model(folder, config=small_config()).config == small_config()


def test_config_whose_shapes_do_not_fit_is_an_error(folder, tmp_path):
    (tmp_path / "wide.json").write_text('{"action_dim": 7}')
    with (
        pytest.warns(UserWarning, match="action_dim is 7 in config, 3 in the checkpoint"),
        pytest.raises(ValueError, match=r"suffix\.action_in_proj\.weight is \[8, 3\], expected \[8, 7\]"),
    ):
        load(folder, config=tmp_path / "wide.json")


def test_arguments_overrule_the_folder(folder, tmp_path):
    robot = Embodiment.generic(
        "other", cameras={"base_0_rgb": "top"}, state=["x", "y"], actions=["x", "y"], default_prompt="go"
    )
    policy = load(folder, embodiment=robot, normalization="z_score", truncation="instruction")
    assert (policy.embodiment, policy.default_prompt) == (robot, "go")
    assert {rule.kind for rule in policy.transforms.normalization.values()} == {"z_score"}
    assert policy.transforms.truncation == "instruction"
    assert load(folder, default_prompt="stop").default_prompt == "stop"


def test_asset_id_for_a_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"asset_id='trossen' chooses among.*has statistics of its own"):
        load(folder, asset_id="trossen")


def test_process_killed_while_saving_leaves_the_old_folder_intact(tmp_path):
    target = tmp_path / "policy"
    torchpi.load_policy("demo", device="cpu").save(target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    program = f"""
import os, torchpi
from torchpi.checkpoints import safetensors_files
policy = torchpi.load_policy("demo", device="cpu", default_prompt="another one")
safetensors_files._write_file = lambda *arguments: os._exit(9)
policy.save({str(target)!r}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    torchpi.load_policy("demo", device="cpu", default_prompt="a third one").save(target, overwrite=True)
    assert torchpi.load_policy(target, device="cpu").default_prompt == "a third one"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_memory_mapped(make_policy, tmp_path, dtype):
    """Loading copies no weights, and changing the model does not change the file."""
    folder = tmp_path / "policy"
    make_policy().save(folder, dtype=dtype)
    content = (folder / "model.safetensors").read_bytes()
    model = torchpi.load_model(folder, dtype=dtype)
    maps = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1].startswith(str(folder))]
    assert all(
        any(start <= parameter.data_ptr() < end for start, end in mapped)
        for parameter in model.parameters()
        if parameter.nbytes % 64 == 0
    )
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == content


def test_weights_file_has_the_read_permissions_of_the_other_files(tmp_path):
    torchpi.load_policy("demo", device="cpu").save(tmp_path / "policy")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "policy").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_weights_are_saved_in_the_requested_dtype(tmp_path):
    policy = torchpi.load_policy("demo", device="cpu")
    policy.save(tmp_path / "half", dtype=torch.bfloat16)
    policy.save(tmp_path / "full")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[1] > 1.9 * sizes[0]
    # The demo's weights are bfloat16, so that rounding changes nothing.
    again = torchpi.load_policy(tmp_path / "half", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), again.parameters(), strict=True))


# Untrained actions

WIDE = Embodiment.generic(
    "four_joints", cameras={"base_0_rgb": "front"}, state=list("abcd"), actions=list("abcd"), delta=["d"], control_hz=20
)
UNTRAINED = "This policy's actions d are untrained: the model's output for them is noise"


@pytest.fixture
def wide(folder, tmp_path):
    """A policy whose model was extended from three action dimensions to its robot's four."""
    save_norm_stats(tmp_path / "wide.json", {"state": stats(4), "actions": stats(4)})
    with pytest.warns(UserWarning, match=UNTRAINED):
        report = convert(
            folder, tmp_path / "wide", "torchpi", sizes={"action_dim": 4}, embodiment=WIDE,
            norm_stats=tmp_path / "wide.json",
        )  # fmt: skip
    assert "actions from 3 on, counted from 0, are noise until they are trained" in str(report)
    return tmp_path / "wide"


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_untrained_actions_are_their_mean(kind, wide, tmp_path):
    with pytest.warns(UserWarning, match=UNTRAINED):
        load(wide, normalization=kind).save(tmp_path / "again")
    with pytest.warns(UserWarning, match=UNTRAINED):
        policy = load(tmp_path / "again")
    assert policy.metadata["untrained_actions"] == ["d"]
    (finding,) = [found for found in diagnose(policy).findings if found.about == "actions"]
    assert (finding.level, finding.message[:13]) == ("problem", "untrained: d.")
    observation = policy.example_observation()
    noises = np.random.default_rng(0).standard_normal((2, 4, 4), np.float32)
    first, second = (policy.infer(observation, noise=noise)["actions"] for noise in noises)
    np.testing.assert_allclose(first[:, 3], observation["state"][3] + stats(4).mean[3], rtol=1e-6)  # a delta
    np.testing.assert_array_equal(first[:, 3], second[:, 3])
    assert not np.isclose(first[:, :3], second[:, :3]).any()


def test_untrained_actions_stay_untrained_in_conversions(wide, tmp_path):
    with pytest.warns(UserWarning, match="This policy's actions d are untrained"):
        convert(wide, tmp_path / "wider", "torchpi", sizes={"action_dim": 6})
    assert json.loads((tmp_path / "wider" / "policy.json").read_text())["trained_action_dim"] == 3
    report = convert(tmp_path / "wider", tmp_path / "jax", "openpi-jax")
    assert "note: actions from 3 on, counted from 0, are noise" in str(report)
    with (
        pytest.warns(UserWarning, match=UNTRAINED),
        pytest.raises(ValueError, match="The policy's d are not trained, and LeRobot would send"),
    ):
        convert(wide, tmp_path / "lerobot", "lerobot")
    assert not (tmp_path / "lerobot").exists()
    narrow = {"embodiment": EMBODIMENT, "norm_stats": tmp_path / "wide.json"}  # a robot without the untrained actions
    assert load(wide, **narrow).metadata["untrained_actions"] == []


@pytest.mark.parametrize("value", [-1, 3, 4])
def test_invalid_trained_action_dim_is_an_error(value, folder):
    document = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps({**document, "trained_action_dim": value}))
    with pytest.raises(ValueError, match=f"trained_action_dim is {value}; expected less than action_dim 3"):
        load(folder)
