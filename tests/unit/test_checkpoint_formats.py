"""The four checkpoint formats: reading gives the same bits, conversions keep them, damaged files are errors."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

import torchpi
from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.formats import format_of
from torchpi.checkpoints.openpi_torch import EMBEDDING, EXPERT_LM_HEAD, TIED_EMBEDDING, torch_table
from torchpi.cli import main
from torchpi.config import preset
from torchpi.convert import convert

FORMATS = {
    "openpi-jax": "jax_ckpt_pure",
    "openpi-pytorch": "openpi_pytorch",
    "lerobot": "lerobot",
}


def assert_same_weights(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in ours.state_dict().items():
        assert torch.equal(parameter, theirs.state_dict()[name]), name


@pytest.fixture(scope="session")
def robot_file(tmp_path_factory, golden_root):
    """The robot of golden's LeRobot policies, for formats that do not store one."""
    path = tmp_path_factory.mktemp("robots")
    for kind in ("pi05", "pi0"):
        root = golden_root / kind
        policy = torchpi.load_policy(root / "lerobot", config=root / "model_config.json")
        (path / f"{kind}.json").write_text(json.dumps(policy.embodiment.to_dict()))
    return path


# Reading


@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_load_the_same_bits(golden, kind):
    root = golden.root / FORMATS[kind]
    assert format_of(root) == kind
    assert_same_weights(torchpi.load_model(root, config=golden.config), golden.model())


@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_sample_the_original_actions(golden, kind):
    model = torchpi.load_model(golden.root / FORMATS[kind], config=golden.config)
    with torch.no_grad():
        found = model.sample_actions(golden.observation(), noise=golden.inputs["noise"])
    torch.testing.assert_close(found, golden.outputs["sample_actions_10"], atol=2e-5, rtol=0)


def test_folded_lora_weights_equal_the_original(golden):
    root = golden.root.parent / "lora" / golden.kind
    model = torchpi.load_model(root / "jax_ckpt", config=root / "model_config.json", lora_alpha=(8.0, 3.0))
    with np.load(root / "outputs.npz") as outputs, torch.no_grad():
        found = model.sample_actions(golden.observation(), noise=golden.inputs["noise"])
        np.testing.assert_allclose(found.numpy(), outputs["sample_actions_10"], atol=2e-5)
    # For bfloat16 the sum is rounded, not the summands.
    rounded = torchpi.load_model(
        root / "jax_ckpt", config=root / "model_config.json", lora_alpha=(8.0, 3.0), dtype=torch.bfloat16
    )
    assert_same_weights(rounded, model.to(torch.bfloat16))


def test_policy_of_lora_checkpoint_has_folded_weights(golden_pi05, golden_root, robot_file):
    root = golden_root / "lora" / "pi05"
    options = {"config": root / "model_config.json", "lora_alpha": (8.0, 3.0)}
    said = {"embodiment": robot_file / "pi05.json", "tokenizer": golden_root / "tokenizer" / "tiny_spm.model"}
    policy = torchpi.load_policy(root / "jax_ckpt", device="cpu", **options, **said)
    assert_same_weights(policy.model, torchpi.load_model(root / "jax_ckpt", **options))


def test_unused_arrays_are_named_and_not_loaded(golden):
    opened = open_checkpoint(golden.root / "openpi_pytorch", config=str(golden.config))
    assert list(opened.dropped) == [EXPERT_LM_HEAD]
    assert opened.tied == TIED_EMBEDDING
    opened = open_checkpoint(golden.root / "lerobot", config=str(golden.config))
    assert set(opened.dropped) == {f"model.{EXPERT_LM_HEAD}", f"model.{TIED_EMBEDDING}"}
    assert opened.tied == ""


def test_spec_has_what_the_checkpoint_states(golden):
    spec = open_checkpoint(golden.checkpoint).spec()
    assert (spec.embodiment, spec.norm_stats, spec.normalization) == (None, None, None)
    assert list(spec.assets) == ["tiny_robot"]
    assert spec.provenance == {"source": str(golden.checkpoint)}
    spec = open_checkpoint(golden.root / "lerobot", config=golden.config).spec()
    assert (spec.embodiment.name, spec.prompt_format) == ("lerobot", "lerobot")
    assert set(spec.norm_stats) == set(spec.normalization) == {"state", "actions"}


def test_peft_adapter_for_another_format_is_an_error(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "demo", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds an adapter for demo, which is torchpi; expected a base in LeRobot"):
        torchpi.load_model(tmp_path)


def test_overruled_and_adapted_settings_are_notes(golden):
    explicit = torchpi.Pi0Config.from_json(golden.config)
    assert open_checkpoint(golden.root / "lerobot", config=explicit).notes == ()
    shorter = dataclasses.replace(explicit, action_horizon=3)
    (note,) = open_checkpoint(golden.root / "lerobot", config=shorter).notes
    assert f"config= overrides action_horizon {explicit.action_horizon} with 3" in note
    (note,) = open_checkpoint(golden.root / "lerobot", config=shorter, adapt=True).notes
    assert f"was adapted: action_horizon: {explicit.action_horizon} to 3" in note


def test_config_json_sets_fields_that_no_array_determines(golden):
    explicit = torchpi.Pi0Config.from_json(golden.config)
    opened = open_checkpoint(golden.root / "openpi_pytorch", config=golden.config).stored_config
    assert (opened.action_horizon, opened.max_token_len) == (explicit.action_horizon, None)
    opened = open_checkpoint(golden.root / "lerobot", config=golden.config).stored_config
    assert (opened.action_horizon, opened.max_token_len) == (explicit.action_horizon, explicit.max_token_len)
    assert opened.discrete_state_input == (golden.kind == "pi05")


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_table_has_every_array_of_the_full_size_port(golden_root, kind):
    lines = (golden_root / f"keys_fullsize_openpi_pytorch_{kind}.txt").read_text().splitlines()
    stored = {}
    for line in (line for line in lines if not line.startswith("#")):
        name, shape = line.split("  ")[:2]
        stored[name] = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    embedding = stored.pop(EMBEDDING, None) or stored[TIED_EMBEDDING]
    stored.pop(TIED_EMBEDDING, None)
    stored.pop(EXPERT_LM_HEAD, None)
    table = {name: leaf.shape for name, leaf in torch_table(preset(kind)).items()}
    assert table.pop(EMBEDDING) == embedding
    assert table.keys() == stored.keys()
    assert {name: shape for name, shape in table.items() if shape != stored[name] and "action_" not in name} == {}


def test_changing_a_model_does_not_change_its_file(golden_pi05, tmp_path):
    root = shutil.copytree(golden_pi05.root / "lerobot", tmp_path / "policy")
    before = (root / "model.safetensors").read_bytes()
    model = torchpi.load_model(root, config=golden_pi05.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (root / "model.safetensors").read_bytes() == before
    assert_same_weights(torchpi.load_model(root, config=golden_pi05.config), golden_pi05.model())


# LeRobot's processors


def test_lerobot_processors_give_the_same_numbers(golden):
    policy = torchpi.load_policy(golden.root / "lerobot", config=golden.config)
    tasks = json.loads((golden.root / "outputs_lerobot_processors.json").read_text())["tasks"]
    with np.load(golden.root / "outputs_lerobot_processors.npz") as arrays:
        expected = dict(arrays)
    image = np.zeros((3, 224, 224), np.uint8)
    for i, task in enumerate(tasks):
        request = {"observation.images.base_0_rgb": image, "observation.state": expected["raw_state"], "prompt": task}
        _, inputs = policy.prepare(request)
        for ours, theirs in (("state", "state"), ("tokenized_prompt", "tokens"), ("tokenized_prompt_mask", "mask")):
            np.testing.assert_array_equal(inputs[ours], expected[f"task{i}.{theirs}"][0])
    actions = policy.transforms.inverse(expected["model_action"][0], action_size=policy.embodiment.action_size)
    np.testing.assert_array_equal(actions, expected["unnormalized_action"][0])


@pytest.fixture
def lerobot(golden_pi05, tmp_path):
    """A copy of golden's LeRobot policy, and a function that edits one of its JSON files."""
    root = shutil.copytree(golden_pi05.root / "lerobot", tmp_path / "lerobot")

    def edit(name, change):
        document = json.loads((root / name).read_text())
        change(document)
        (root / name).write_text(json.dumps(document))

    return root, edit


def step(document, name):
    return next(step for step in document["steps"] if step["registry_name"] == name)


def load(root, golden):
    return torchpi.load_policy(root, config=golden.config)


def test_lerobot_relative_actions_cameras_and_names(lerobot, golden_pi05):
    root, edit = lerobot
    names = ["shoulder", "Left_Gripper", *(f"joint_{i}" for i in range(30))]

    def relative(document):
        step(document, "relative_actions_processor")["config"] |= {"enabled": True, "action_names": names}
        step(document, "rename_observations_processor")["config"]["rename_map"] = {
            "front": "observation.images.base_0_rgb",
            "joints": "observation.state",
        }

    edit("policy_preprocessor.json", relative)
    edit("policy_postprocessor.json", lambda d: step(d, "absolute_actions_processor")["config"].update(enabled=True))

    def empty(document):
        features = document["input_features"]
        features["observation.images.empty_camera_0"] = features.pop("observation.images.right_wrist_0_rgb")

    edit("config.json", empty)
    policy = load(root, golden_pi05)
    robot = policy.embodiment
    assert [action.name for action in robot.actions] == names
    assert [i for i, action in enumerate(robot.actions) if action.kind == "absolute"] == [1]
    assert [(camera.name, camera.key, camera.presence) for camera in robot.cameras] == [
        ("base_0_rgb", "front", "optional"),
        ("left_wrist_0_rgb", "observation.images.left_wrist_0_rgb", "optional"),
        ("empty_camera_0", None, "masked"),
    ]
    state = np.linspace(-1, 1, 32).astype(np.float32)
    image = np.zeros((3, 224, 224), np.uint8)
    noise = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    here = policy.infer({"front": image, "joints": state, "prompt": "go"}, noise=noise)["actions"]
    for name, which in (("policy_preprocessor.json", "relative"), ("policy_postprocessor.json", "absolute")):
        edit(name, lambda d, which=which: step(d, f"{which}_actions_processor")["config"].update(enabled=False))
    absolute = load(root, golden_pi05).infer({"front": image, "joints": state, "prompt": "go"}, noise=noise)["actions"]
    offset = state.copy()
    offset[1] = 0
    np.testing.assert_allclose(here - absolute, np.broadcast_to(offset, (50, 32)), atol=1e-5)


def test_observation_without_any_image_is_an_error(golden):
    policy = load(golden.root / "lerobot", golden)
    with pytest.raises(KeyError, match="has no image that embodiment 'lerobot' reads"):
        policy.infer({"observation.state": np.zeros(len(policy.embodiment.state_names)), "prompt": "go"})


@pytest.mark.parametrize(
    ("mode", "kind", "bounds"),
    [
        ("MEAN_STD", "z_score", ("q01", "q99")),
        ("MIN_MAX", "quantile", ("min", "max")),
        ("IDENTITY", "identity", None),
    ],
)
def test_lerobot_normalization_modes(lerobot, golden_pi05, mode, kind, bounds):
    root, edit = lerobot
    for name, which in (("policy_preprocessor.json", "normalizer"), ("policy_postprocessor.json", "unnormalizer")):
        edit(
            name,
            lambda d, which=which: step(d, f"{which}_processor")["config"]["norm_map"].update(STATE=mode, ACTION=mode),
        )
    policy = load(root, golden_pi05)
    stored = safetensors.torch.load_file(next(root.glob("*preprocessor_step*")))
    assert policy.transforms.normalization["state"].kind == kind
    state = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    image = np.zeros((3, 224, 224), np.uint8)
    _, inputs = policy.prepare({"observation.images.base_0_rgb": image, "observation.state": state, "prompt": "go"})
    x, get = torch.from_numpy(state), lambda part: stored[f"observation.state.{part}"]
    if mode == "MEAN_STD":
        expected = (x - get("mean")) / (get("std") + 1e-8)
    elif bounds and mode == "MIN_MAX":
        span = get("max") - get("min")
        expected = 2 * (x - get("min")) / torch.where(span == 0, 1e-8, span) - 1
    else:
        expected = x
    np.testing.assert_array_equal(inputs["state"], expected.numpy())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("policy_preprocessor.json", lambda d: d["steps"].append({"registry_name": "magic_processor", "config": {}}), "unknown steps: magic_processor"),  # noqa: E501
        ("policy_preprocessor.json", lambda d: step(d, "normalizer_processor")["config"].update(eps=1e-3), "eps is 0.001"),  # noqa: E501
        ("policy_preprocessor.json", lambda d: step(d, "normalizer_processor")["config"]["norm_map"].update(STATE="LOG"), "normalization LOG is unknown"),  # noqa: E501
        ("policy_preprocessor.json", lambda d: step(d, "normalizer_processor").update(state_file="../x.safetensors"), "only files next to it are read"),  # noqa: E501
        ("policy_preprocessor.json", lambda d: step(d, "tokenizer_processor")["config"].update(max_length=7), "max_length 7"),  # noqa: E501
        ("policy_preprocessor.json", lambda d: d.pop("steps"), "does not have LeRobot's format"),
        ("config.json", lambda d: d.update(type="act"), "type is \"act\"; only \"pi0\" or \"pi05\" is supported"),
        ("config.json", lambda d: d.update(chunk_size=0), "chunk_size must be a positive integer, found 0"),
        ("config.json", lambda d: d.update(image_resolution=[224, 200]), "only square images are supported"),
        ("config.json", lambda d: d["output_features"].pop("action"), "does not have LeRobot's format"),
        ("config.json", lambda d: d["output_features"]["action"].update(shape=[]), "does not have LeRobot's format"),
    ],
)  # fmt: skip
def test_lerobot_policy_with_contradicting_settings_is_refused(lerobot, golden_pi05, name, change, message):
    root, edit = lerobot
    edit(name, change)
    with pytest.raises(ValueError, match=message):
        load(root, golden_pi05)


# Damaged files


@pytest.fixture
def port(golden_pi05, tmp_path):
    """A copy of golden's openpi PyTorch checkpoint."""
    return shutil.copytree(golden_pi05.root / "openpi_pytorch", tmp_path / "port")


def rewrite(root, change):
    arrays = safetensors.torch.load_file(root / "model.safetensors")
    change(arrays)
    safetensors.torch.save_file(arrays, root / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("time_mlp_in.bias"), "missing: time_mlp_in.bias"),
        (lambda a: a.update({"x.lora_a": torch.zeros(2)}), "left over: x.lora_a"),
        (lambda a: a.update({"time_mlp_in.bias": torch.zeros(3)}), r"misshapen: time_mlp_in.bias is \[3\], expected \[32\]"),  # noqa: E501
        (lambda a: a.update({"time_mlp_in.bias": torch.zeros(32, dtype=torch.int8)}), "weights must be float32, bfloat16 or float16, but time_mlp_in.bias has I8"),  # noqa: E501
        (lambda a: a.update({"model.extra": torch.zeros(32)}), "left over: model.extra"),
        (lambda a: [a.update({f"model.{k}": a.pop(k)}) for k in list(a) if k != "time_mlp_in.bias"], "some arrays have the prefix 'model.'"),  # noqa: E501
        (lambda a: a.pop(TIED_EMBEDDING), "There is no array .*embed_tokens"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_named(port, golden_pi05, change, message):
    rewrite(port, change)
    with pytest.raises(ValueError, match=message):
        torchpi.load_model(port, config=golden_pi05.config)


def test_truncated_file_is_an_error(port, golden_pi05):
    content = (port / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(content) // 2):
        (port / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
            torchpi.load_model(port, config=golden_pi05.config)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\x80\x04 a pickle"])
def test_zip_or_pickle_is_refused(port, golden_pi05, content):
    (port / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a zip archive or a pickle, not safetensors; it is not read"):
        torchpi.load_model(port, config=golden_pi05.config)


def test_header_whose_length_looks_like_a_pickle_is_read(port, golden_pi05):
    arrays = safetensors.torch.load_file(port / "model.safetensors")
    for padding in range(0, 2048, 8):
        safetensors.torch.save_file(arrays, port / "model.safetensors", metadata={"x": "x" * padding})
        if (port / "model.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no header of such a length")
    assert_same_weights(torchpi.load_model(port, config=golden_pi05.config), golden_pi05.model())


def test_path_of_a_possible_pickle_is_refused(tmp_path):
    for name in ("model.pt", "pytorch_model.bin", "params.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match="torchpi never unpickles"):
            torchpi.load_model(tmp_path / name)
    with pytest.raises(ValueError, match=r"model.pt, params.pkl, pytorch_model.bin may be a pickle"):
        torchpi.load_model(tmp_path)


def test_unknown_numbers_of_heads_are_an_error(port):
    with pytest.raises(ValueError, match=r"pass config= with siglip.num_heads, paligemma.num_heads"):
        torchpi.load_model(port)


def test_config_json_that_contradicts_the_arrays_is_an_error_without_config(port, golden_pi05):
    document = json.loads((port / "config.json").read_text())
    (port / "config.json").write_text(json.dumps({**document, "action_dim": 7}))
    with pytest.warns(UserWarning, match="config.json contradicts the arrays: action_dim is 7 there, 32 in the arrays"):
        model = torchpi.load_model(port, config=golden_pi05.config)
    assert model.config.action_dim == 32
    (port / "config.json").write_text(json.dumps({**document, "action_horizon": 20}))
    with pytest.warns(UserWarning, match="config= overrides action_horizon 20 with 50"):
        model = torchpi.load_model(port, config=golden_pi05.config)
    assert model.config.action_horizon == 50


def test_two_formats_in_one_folder_are_an_error(port, golden_pi05):
    shutil.copytree(golden_pi05.checkpoint / "params", port / "params")
    with pytest.raises(ValueError, match="in two formats, openpi-pytorch and openpi-jax"):
        torchpi.load_model(port, config=golden_pi05.config)


@pytest.fixture
def shards(golden_pi05, tmp_path):
    """openpi's PyTorch format in three shards, as huggingface_hub writes them."""
    root = tmp_path / "sharded"
    root.mkdir()
    weights = safetensors.torch.load_file(golden_pi05.root / "openpi_pytorch" / "model.safetensors")
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({n: w for n, w in weights.items() if weight_map[n] == file}, root / file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


@pytest.mark.parametrize("to", ["openpi-pytorch", "lerobot"])
def test_other_formats_are_written_as_one_file(to, golden_pi05, tmp_path):
    """LeRobot 0.6 uses random weights if the checkpoint is sharded."""
    convert(golden_pi05.root / "lerobot", tmp_path / "out", to, config=golden_pi05.config, max_shard_bytes=300_000)
    assert [file.name for file in (tmp_path / "out").glob("model*.safetensors")] == ["model.safetensors"]


def test_lerobot_tokenizer_settings_are_transformers(golden_pi05, tmp_path):
    """Settings with which transformers 5.5.4 gave π₀'s tokens for the golden texts."""
    convert(golden_pi05.root / "lerobot", tmp_path / "out", "lerobot", config=golden_pi05.config, check=False)
    settings = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }


def test_pi05_without_state_in_prompt_is_refused_for_lerobot(golden_pi05, tmp_path):
    config = dataclasses.replace(torchpi.Pi0Config.from_json(golden_pi05.config), discrete_state_input=False)
    refused = pytest.raises(ValueError, match="discrete_state_input is False: LeRobot always has the state")
    with pytest.warns(UserWarning, match="overrides discrete_state_input"), refused:
        convert(golden_pi05.root / "lerobot", tmp_path / "out", "lerobot", config=config)
    assert not (tmp_path / "out").exists()


def test_shards_are_read(shards, golden_pi05):
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert_same_weights(torchpi.load_model(shards, config=golden_pi05.config), golden_pi05.model())


def edit_index(root, change):
    path = root / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00002.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"]
)
def test_index_with_paths_outside_its_folder_is_refused(shards, golden_pi05, name):
    edit_index(shards, lambda weight_map: weight_map.update({"time_mlp_in.bias": name}))
    with pytest.raises(ValueError, match="only files next to the index are read"):
        torchpi.load_model(shards, config=golden_pi05.config)


def test_index_and_shards_that_disagree_are_an_error(shards, golden_pi05):
    edit_index(shards, lambda weight_map: weight_map.pop("time_mlp_in.bias"))
    with pytest.raises(ValueError, match=r"the files disagree about time_mlp_in.bias"):
        torchpi.load_model(shards, config=golden_pi05.config)


def test_array_in_two_shards_is_an_error(shards, golden_pi05):
    first, *_, last = sorted(shards.glob("*.safetensors"))
    shutil.copy(first, last)
    with pytest.raises(ValueError, match=rf" twice, in {first.name} and in {last.name}"):
        torchpi.load_model(shards, config=golden_pi05.config)


def test_empty_index_and_index_next_to_whole_weights_are_errors(shards, golden_pi05):
    edit_index(shards, lambda weight_map: weight_map.clear())
    with pytest.raises(ValueError, match="is no index: weight_map is empty"):
        torchpi.load_model(shards, config=golden_pi05.config)
    (shards / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        torchpi.load_model(shards, config=golden_pi05.config)


def test_missing_shard_is_named(shards, golden_pi05):
    next(iter(sorted(shards.glob("*.safetensors")))).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-\d+.safetensors does not exist; the index names it"):
        torchpi.load_model(shards, config=golden_pi05.config)


def test_lora_arrays_without_their_pair_are_an_error(golden_pi05, tmp_path):
    from torchpi.checkpoints.lora import lora_pairs
    from torchpi.checkpoints.openpi import JaxArrays

    root = golden_pi05.root.parent / "lora" / "pi05"
    arrays = JaxArrays(root / "jax_ckpt" / "100" / "params")
    arrays.shapes = {
        name: shape for name, shape in arrays.shapes.items() if name != "PaliGemma.llm.layers.attn.q_einsum.lora_b"
    }
    with pytest.raises(ValueError, match=r"has .*q_einsum.lora_a, but not .*q_einsum.lora_b"):
        lora_pairs(arrays)
    arrays.shapes = {"attn.q_einsum.w": (4, 8), "attn.q_einsum.lora_a": (4, 2), "attn.q_einsum.lora_b": (3, 8)}
    with pytest.raises(ValueError, match=r"q_einsum.lora_a \[4, 2\] and .*lora_b \[3, 8\] do not fit"):
        lora_pairs(arrays)
    arrays.shapes = {"attn.q_einsum.w": (4, 8), "attn.q_einsum.lora_b": (3, 8)}
    with pytest.raises(ValueError, match=r"LoRA arrays without a counterpart: attn\.q_einsum\.lora_b"):
        lora_pairs(arrays)
    with pytest.raises(ValueError, match="belongs to a checkpoint with LoRA weights"):
        torchpi.load_model(golden_pi05.checkpoint, lora_alpha=(16.0, 32.0))


# Conversions


ALL_FORMATS = [*FORMATS, "torchpi"]
RING = set(zip(ALL_FORMATS, ALL_FORMATS[1:] + ALL_FORMATS[:1], strict=True))
"""Each format once as the source and once as the target."""


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, marks=[] if pair in RING else [pytest.mark.slow])
        for pair in itertools.product(ALL_FORMATS, repeat=2)
    ],
)
def test_conversion_keeps_every_bit(golden, tmp_path, robot_file, golden_root, source, target):
    said = {"embodiment": robot_file / f"{golden.kind}.json", "tokenizer": golden_root / "tokenizer" / "tiny_spm.model"}
    if source == "torchpi":
        convert(golden.root / "lerobot", tmp_path / "policy", "torchpi", config=golden.config, check=False)
    root = tmp_path / "policy" if source == "torchpi" else golden.root / FORMATS[source]
    needs = source.startswith("openpi") and not target.startswith("openpi")
    report = convert(root, tmp_path / "out", target, config=golden.config, **(said if needs else {}))
    assert (report.source_format, report.target_format) == (source, target)
    assert report.array_difference == 0
    assert report.action_difference < 2e-5  # actions have a few units; openpi and LeRobot normalize in other precisions
    model = torchpi.load_model(tmp_path / "out", config=golden.config)
    assert_same_weights(model, golden.model())
    # These formats store everything.
    if source in ("torchpi", "lerobot") and target in ("torchpi", "lerobot"):
        ours, theirs = (load(path, golden) for path in (tmp_path / "out", root))
        assert ours.embodiment == theirs.embodiment
        request = ours.example_observation()
        noise = np.zeros((golden.inputs["noise"].shape[1:]), np.float32)
        np.testing.assert_array_equal(
            ours.infer(request, noise=noise)["actions"], theirs.infer(request, noise=noise)["actions"]
        )


def test_conversion_to_lerobot_writes_golden_files(golden, tmp_path):
    convert(golden.root / "lerobot", tmp_path / "out", "lerobot", config=golden.config)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        ours, theirs = (json.loads((root / name).read_text()) for root in (tmp_path / "out", golden.root / "lerobot"))
        step_names = [[step["registry_name"] for step in document["steps"]] for document in (ours, theirs)]
        assert step_names[0] == step_names[1]
        assert [s.get("state_file") for s in ours["steps"]] == [s.get("state_file") for s in theirs["steps"]]
    ours, theirs = (
        json.loads((root / "config.json").read_text()) for root in (tmp_path / "out", golden.root / "lerobot")
    )
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing <= {"action_feature_names"}
    ours, theirs = (
        safetensors.torch.load_file(root / "model.safetensors") for root in (tmp_path / "out", golden.root / "lerobot")
    )
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    for name, array in ours.items():
        assert torch.equal(array, theirs[name]) or name.endswith(EXPERT_LM_HEAD)


def test_conversion_to_openpi_pytorch_writes_arrays_for_strict_loading(golden, tmp_path):
    convert(golden.checkpoint, tmp_path / "out", "openpi-pytorch", config=golden.config)
    ours, theirs = (
        safetensors.torch.load_file(root / "model.safetensors")
        for root in (tmp_path / "out", golden.root / "openpi_pytorch")
    )
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as written:
        assert written.metadata()[EMBEDDING] == TIED_EMBEDDING
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (golden.root / "openpi_pytorch" / "config.json").read_text()
    )
    stats = "assets/tiny_robot/norm_stats.json"
    assert (tmp_path / "out" / stats).read_bytes() == (golden.checkpoint / stats).read_bytes()


def test_metadata_equals_orbax(golden, tmp_path):
    convert(golden.root / "openpi_pytorch", tmp_path / "out", "openpi-jax", config=golden.config)

    def read(root, name):
        return json.loads((root / "params" / name).read_text())

    for name in ("_METADATA", "_sharding"):
        assert read(tmp_path / "out", name) == read(golden.checkpoint, name)
    ours, theirs = (
        read(root, "array_metadatas/process_0")["array_metadatas"] for root in (tmp_path / "out", golden.checkpoint)
    )
    assert sorted(map(str, ours)) == sorted(map(str, theirs))
    assert (
        read(tmp_path / "out", "_CHECKPOINT_METADATA").keys() == read(golden.checkpoint, "_CHECKPOINT_METADATA").keys()
    )


def test_conversion_can_round_to_bfloat16(golden_pi05, tmp_path):
    for target in ("openpi-jax", "openpi-pytorch"):
        report = convert(
            golden_pi05.checkpoint, tmp_path / target, target, config=golden_pi05.config, dtype=torch.bfloat16
        )
        assert (report.dtype, report.array_difference) == ("bfloat16", 0.0)
        model = torchpi.load_model(tmp_path / target, config=golden_pi05.config, dtype=torch.bfloat16)
        assert_same_weights(model, golden_pi05.model(dtype=torch.bfloat16))


def test_converted_policy_folder_states_its_source(golden_pi05, tmp_path):
    convert(golden_pi05.root / "lerobot", tmp_path / "out", "torchpi", config=golden_pi05.config)
    provenance = json.loads((tmp_path / "out" / "policy.json").read_text())["provenance"]
    converted = provenance["converted"]
    assert provenance["torchpi"] == torchpi.__version__
    assert (converted["format"], converted["source"]) == ("lerobot", str(golden_pi05.root / "lerobot"))
    assert len(converted["sha256"]) == 64
    assert converted["date"].startswith("20")


def test_failed_conversion_leaves_no_files(golden_pi05, tmp_path, monkeypatch):
    from torchpi import convert as module

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    shutil.copytree(golden_pi05.root / "openpi_pytorch", tmp_path / "old")
    (tmp_path / "old" / "kept").write_text("kept")
    monkeypatch.setattr(module.openpi, "write_params", full)
    with pytest.raises(OSError, match="No space left"):
        convert(golden_pi05.checkpoint, tmp_path / "old", "openpi-jax", config=golden_pi05.config, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "kept").read_text() == "kept"
    with pytest.raises(ValueError, match="exists already"):
        convert(golden_pi05.checkpoint, tmp_path / "old", "openpi-jax", config=golden_pi05.config)


def test_only_a_checkpoint_is_overwritten(golden_pi05, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(ValueError, match=r"thesis is not a checkpoint, and is not overwritten"):
        convert(golden_pi05.checkpoint, tmp_path / "thesis", "openpi-jax", config=golden_pi05.config, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


def test_folder_named_demo_or_file_of_a_checkpoint_is_not_overwritten(golden_pi05, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as a source, "demo" is the embedded policy, and a file means its folder
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "chapter.tex").write_text("years")
    convert("demo", tmp_path / "policy", "torchpi", check=False)
    before = (tmp_path / "policy" / "policy.json").read_bytes()
    for target in ("demo", "policy/policy.json"):
        with pytest.raises(ValueError, match=rf"{target} is not a checkpoint, and is not overwritten"):
            convert(golden_pi05.checkpoint, target, "openpi-jax", config=golden_pi05.config, overwrite=True)
    assert (tmp_path / "demo" / "chapter.tex").read_text() == "years"
    assert (tmp_path / "policy" / "policy.json").read_bytes() == before


@pytest.mark.parametrize("to", ["torchpi", "openpi-jax"])
def test_unsupported_dtype_is_an_error(tmp_path, to):
    with pytest.raises(ValueError, match="Weights are written in float32 or bfloat16, got float16"):
        convert("demo", tmp_path / "out", to, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("offline")
def test_only_policies_need_a_tokenizer(lerobot, golden_pi05, tmp_path):
    root, _ = lerobot
    shutil.rmtree(root / "tokenizer")
    convert(root, tmp_path / "out", "openpi-jax", config=golden_pi05.config)
    with pytest.raises(FileNotFoundError, match="paligemma_tokenizer"):
        convert(root, tmp_path / "policy", "torchpi", config=golden_pi05.config)


def test_weights_that_read_back_differently_are_reported(golden_pi05, tmp_path, monkeypatch):
    from torchpi import convert as module

    true_write = module.openpi.write_params

    def broken(params, leaves, read):
        def spoilt(name):
            return torch.full_like(read(name), torch.nan) if name == "action_out_proj.bias" else read(name)

        true_write(params, leaves, spoilt)

    monkeypatch.setattr(module.openpi, "write_params", broken)
    report = convert(golden_pi05.checkpoint, tmp_path / "out", "openpi-jax", config=golden_pi05.config)
    assert (report.array_difference, report.action_difference) == (float("inf"), float("inf"))


def test_config_json_that_is_no_json_is_named(port, tmp_path):
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(ValueError, match=r"sizes\.json is not valid JSON"):
        torchpi.load_model(port, config=tmp_path / "sizes.json")
    (port / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, found list"):
        torchpi.load_model(port)


def test_robot_with_hook_cannot_be_converted_to_lerobot(tmp_path, golden_pi05, golden_root):
    with pytest.raises(ValueError, match="converts units with the code 'aloha_pi', for which LeRobot has no step"):
        convert(
            golden_pi05.checkpoint,
            tmp_path / "out",
            "lerobot",
            config=golden_pi05.config,
            embodiment="aloha",
            tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
        )


def test_robot_with_mapped_depth_cannot_be_converted_to_lerobot(tmp_path, golden_pi05, golden_root):
    document = torchpi.robots.get_embodiment("libero").to_dict()
    document["cameras"][1] |= {"dtype": "uint16", "depth": {"near": 0.1, "far": 1.5, "unit": "mm", "colormap": "grey"}}
    (tmp_path / "arm.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="maps the depth of observation/wrist_image to colours, for which LeRobot has"):
        convert(
            golden_pi05.checkpoint,
            tmp_path / "out",
            "lerobot",
            config=golden_pi05.config,
            embodiment=str(tmp_path / "arm.json"),
            tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
        )


def test_convert_command_reports_and_refuses(golden_pi05, tmp_path, capsys):
    arguments = [
        str(golden_pi05.root / "lerobot"),
        str(tmp_path / "out"),
        "--to",
        "openpi-jax",
        "--config",
        str(golden_pi05.config),
    ]
    main(["convert", *arguments])
    printed = capsys.readouterr().out
    assert "mapped: " in printed
    assert f"dropped: model.{EXPERT_LM_HEAD} (the action expert predicts no tokens)" in printed
    assert "read back: arrays differ by at most 0, sampled actions by " in printed
    with pytest.raises(SystemExit):
        main(["convert", *arguments])
    assert "exists already" in capsys.readouterr().err
    main(["convert", *arguments, "--overwrite", "--json"])
    assert json.loads(capsys.readouterr().out)["target_format"] == "openpi-jax"


# Adapting sizes


@pytest.mark.parametrize("width", [4, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_model_is_adapted_only_on_request(golden, kind, width):
    config = dataclasses.replace(
        torchpi.Pi0Config.from_json(golden.config), action_dim=width, action_horizon=5, max_token_len=30
    )
    root = golden.root / FORMATS[kind]
    with pytest.raises(ValueError, match=r"contradicts the checkpoint's arrays: action_dim is \d+ in config"):
        torchpi.load_model(root, config=config)
    with pytest.warns(UserWarning, match=r"was adapted: action_dim: \d+ to \d+.*action_out_proj.bias"):
        model = torchpi.load_model(root, config=config, adapt=True)
    assert model.config == config
    before = golden.model()
    kept = min(width, before.config.action_dim)
    for ours, theirs in (
        (model.suffix.action_in_proj.weight.T, before.suffix.action_in_proj.weight.T),
        (model.action_out_proj.weight, before.action_out_proj.weight),
        (model.action_out_proj.bias, before.action_out_proj.bias),
        *([(model.suffix.state_proj.weight.T, before.suffix.state_proj.weight.T)] if golden.kind == "pi0" else []),
    ):
        assert torch.equal(ours[:kept], theirs[:kept])
        assert not ours[kept:].any()
    batch = golden.observation()
    batch = dataclasses.replace(batch, state=torch.zeros(batch.batch_size, width))
    with torch.no_grad():
        assert model.sample_actions(batch, num_steps=1, generator=torch.Generator().manual_seed(0)).shape == (
            2,
            5,
            width,
        )


def test_extended_model_keeps_predictions_of_old_dimensions(golden):
    old = golden.model()
    config = dataclasses.replace(old.config, action_dim=old.config.action_dim + 3)
    with pytest.warns(UserWarning, match="was adapted"):
        model = torchpi.load_model(golden.checkpoint, config=config, adapt=True)
    batch, noise = golden.observation(), golden.inputs["noise"]
    wide = dataclasses.replace(batch, state=torch.nn.functional.pad(batch.state, (0, 3)))
    with torch.no_grad():
        expected = old.sample_actions(batch, noise=noise)
        found = model.sample_actions(wide, noise=torch.nn.functional.pad(noise, (0, 3)))
    torch.testing.assert_close(found[..., :-3], expected, atol=1e-6, rtol=1e-6)
    assert not found[..., -3:].any()


def test_other_sizes_are_not_adapted(golden_pi05):
    config = dataclasses.replace(torchpi.Pi0Config.from_json(golden_pi05.config), vocab_size=100)
    with pytest.raises(
        ValueError, match=r"adapt=True can change action_dim, .*; the config also differs in vocab_size"
    ):
        torchpi.load_model(golden_pi05.checkpoint, config=config, adapt=True)
    with pytest.raises(ValueError, match="adapt=True needs config="):
        torchpi.load_model(golden_pi05.checkpoint, adapt=True)
