"""`Policy` and `load_policy`: inference, batches, prompts, cameras, arguments, and their errors."""

import dataclasses
import json
import re
import shutil

import jaxtyping
import numpy as np
import pytest
import torch

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.checkpoints.spec import PolicySpec
from torchpi.collate import collate
from torchpi.devices import fastest_dtype
from torchpi.errors import TorchpiError
from torchpi.robots import EMBODIMENTS, Camera, get_embodiment
from torchpi.robots.presets import ROBOT_FILES
from torchpi.transforms import Normalization, NormStats, save_norm_stats

HORIZON, ACTION_DIM = 4, 16
# The robots of openpi's clients and of the simulators; test_robots.py tests the others.
ROBOTS = [name for name in EMBODIMENTS if name in ("aloha", "droid", "libero") or name not in ROBOT_FILES]
QUANTILE = {key: Normalization("quantile") for key in ("state", "actions")}
TWO_JOINTS = Embodiment.generic(
    "two_joints",
    cameras={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
    state=["shoulder", "elbow"],
    actions=["shoulder", "elbow"],
)


def small_config(pi05=True, **fields):
    sizes = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    defaults = {
        "paligemma_variant": GemmaConfig(width=16, mlp_dim=32, **sizes),
        "action_expert_variant": GemmaConfig(width=8, mlp_dim=16, **sizes),
        "siglip_variant": VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
        "action_dim": ACTION_DIM,
        "action_horizon": HORIZON,
        "max_token_len": 200,
        "vocab_size": 512,
        "image_size": 28,
    }
    return Pi0Config(pi05=pi05, **(defaults | fields))


def random_model(config):
    """Draw every weight at random, including those that are initialized with 0."""
    model, generator = torchpi.Pi0(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def stats(dim):
    spread = np.linspace(0.1, 0.7, dim)
    return NormStats(spread, spread / 3 + 0.1, -spread - 1, spread + 1)


@pytest.fixture(scope="module")
def tokenizer(golden_root):
    return golden_root / "tokenizer" / "tiny_spm.model"


@pytest.fixture
def make_policy(tokenizer):
    def make(config=None, embodiment=TWO_JOINTS, **fields):
        defaults = {
            "norm_stats": {"state": stats(ACTION_DIM), "actions": stats(ACTION_DIM)},
            "normalization": QUANTILE,
            "tokenizer": tokenizer,
        }
        return Policy(random_model(config or small_config()), get_embodiment(embodiment), **(defaults | fields))

    return make


def noise(seed=0, batch=()):
    return np.random.default_rng(seed).standard_normal((*batch, HORIZON, ACTION_DIM)).astype(np.float32)


def request(policy, seed=0, **changes):
    """Build a valid request with random contents."""
    rng = np.random.default_rng(seed)

    def varied(value):
        if isinstance(value, dict):
            return {key: varied(part) for key, part in value.items()}
        if isinstance(value, np.ndarray) and value.dtype == np.uint8:
            return rng.integers(0, 256, value.shape, np.uint8)
        return rng.uniform(-0.5, 0.5, value.shape) if isinstance(value, np.ndarray) else value

    return varied(policy.example_observation()) | changes


def infer(policy, observation, **arguments):
    return policy.infer(observation, **({"noise": noise(), "num_steps": 2} | arguments))["actions"]


# Requests


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("embodiment", ROBOTS)
def test_example_observation_is_valid_for_every_robot(make_policy, embodiment, pi05):
    policy = make_policy(small_config(pi05), embodiment)
    actions = infer(policy, policy.example_observation(), num_steps=1)
    assert actions.shape == (HORIZON, policy.embodiment.action_size)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("embodiment", ROBOTS)
def test_metadata_is_json_and_describes_a_valid_request(make_policy, embodiment):
    policy = make_policy(embodiment=embodiment, metadata={"checkpoint": "a test"})
    metadata = json.loads(json.dumps(policy.metadata, allow_nan=False))
    assert metadata == policy.metadata
    assert metadata["action_horizon"] == HORIZON
    assert len(metadata["action_names"]) == policy.embodiment.action_size
    assert (metadata["control_hz"], metadata["execute_steps"]) == (
        policy.embodiment.control_hz,
        policy.embodiment.execute_steps,
    )
    assert metadata["checkpoint"] == "a test"
    # A request can be built from the metadata.
    cameras = {
        camera["key"]: np.zeros((8, 10, 3) if camera["layout"] == "hwc" else (3, 8, 10), np.uint8)
        for camera in metadata["observation"]["cameras"]
        if camera["presence"] == "required" and camera["dtype"] in ("uint8", "any")
    }
    state = {part["key"]: np.zeros(len(part["names"])) for part in metadata["observation"]["state"]}
    policy.prepare({**cameras, **state, "prompt": "wave"})
    assert metadata.get("reset_pose") == policy.embodiment.metadata.get("reset_pose")


@pytest.mark.parametrize("pi05", [True, False])
def test_batch_equals_single_requests(make_policy, pi05):
    """Holds for prompts of unequal length and absent cameras, with and without padding."""
    for max_token_len in (200, None):
        policy = make_policy(small_config(pi05, max_token_len=max_token_len), "aloha")
        observations = [request(policy, seed, prompt="pick up the cube " * (seed + 1)) for seed in range(3)]
        del observations[1]["images"]["cam_left_wrist"]
        noises = noise(batch=(3,))
        together = policy.infer_batch(observations, noise=noises, num_steps=2)
        alone = [infer(policy, obs, noise=start) for obs, start in zip(observations, noises, strict=True)]
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours["actions"], theirs, rtol=0, atol=1e-5)
        assert not np.allclose(alone[0], alone[1], atol=1e-2)


def test_infer_does_not_change_the_request(make_policy):
    policy = make_policy(embodiment="aloha")
    observation = request(policy)
    before = json.dumps(observation, default=lambda array: [str(array.dtype), array.tolist()])
    infer(policy, observation)
    assert json.dumps(observation, default=lambda array: [str(array.dtype), array.tolist()]) == before


def test_policy_timing_has_three_stages(make_policy):
    policy = make_policy()
    timing = policy.infer(policy.example_observation(), num_steps=1)["policy_timing"]
    assert sorted(timing) == ["infer_ms", "postprocess_ms", "preprocess_ms"]
    assert all(isinstance(value, float) and value >= 0 for value in timing.values())


def test_noise_is_drawn_from_the_generator(make_policy):
    policy = make_policy()
    observation = request(policy)

    def drawn(seed):
        return infer(policy, observation, noise=None, generator=torch.Generator().manual_seed(seed))

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1), drawn(2))


def test_request_without_prompt_uses_default_prompt(make_policy):
    policy = make_policy(default_prompt="wave at me")
    without = request(policy)
    del without["prompt"]
    expected = infer(policy, without | {"prompt": "wave at me"})
    np.testing.assert_array_equal(infer(policy, without), expected)
    assert not np.array_equal(infer(policy, without | {"prompt": "fold the shirt"}), expected)


def test_default_prompt_of_policy_overrides_the_embodiments(make_policy):
    assert make_policy(embodiment="pi0_aloha_towel").default_prompt == "fold the towel"
    policy = make_policy(embodiment="pi0_aloha_towel", default_prompt="wave at me")
    assert policy.default_prompt == policy.metadata["default_prompt"] == "wave at me"
    without = policy.example_observation()
    del without["prompt"]
    _, inputs = policy.prepare(without)
    _, expected = policy.prepare(without | {"prompt": "wave at me"})
    np.testing.assert_array_equal(inputs["tokenized_prompt"], expected["tokenized_prompt"])


# Absent cameras, absent state


@pytest.mark.parametrize("pi05", [True, False])
def test_pixels_of_masked_camera_are_ignored(make_policy, pi05):
    policy = make_policy(small_config(pi05), "libero")  # its third camera is always masked
    _, sample = policy.prepare(request(policy))
    assert [bool(mask) for mask in sample["image_mask"].values()] == [True, True, False]
    other = dict(sample["image"])
    other["right_wrist_0_rgb"] = np.random.default_rng(1).integers(0, 256, (28, 28, 3), np.uint8)
    start = torch.from_numpy(noise(batch=(1,)))
    chunks = [
        policy.model.sample_actions(collate([{**sample, "image": images}]), noise=start, num_steps=2)
        for images in (sample["image"], other)
    ]
    assert torch.equal(*chunks)
    other["base_0_rgb"] = other["right_wrist_0_rgb"]
    seen = policy.model.sample_actions(collate([{**sample, "image": other}]), noise=start, num_steps=2)
    assert (seen - chunks[0]).abs().max() > 1e-3


def test_absent_optional_camera_equals_masked_camera(make_policy):
    aloha = get_embodiment("aloha")
    cameras = tuple(
        Camera("left_wrist_0_rgb", None, "masked") if camera.name == "left_wrist_0_rgb" else camera
        for camera in aloha.cameras
    )
    without_wrist = dataclasses.replace(aloha, cameras=cameras)
    policy = make_policy(embodiment=aloha)
    observation = request(policy)
    present = infer(policy, observation)
    del observation["images"]["cam_left_wrist"]
    absent = infer(policy, observation)
    np.testing.assert_array_equal(absent, infer(make_policy(embodiment=without_wrist), observation))
    assert np.abs(absent - present).max() > 1e-3


def test_cameras_follow_the_embodiments_order(make_policy):
    policy = make_policy()
    observation = request(policy)
    turned = dict(reversed(observation.items()))
    np.testing.assert_array_equal(infer(policy, turned), infer(policy, observation))


@pytest.mark.parametrize("discrete", [True, False])
def test_pi05_reads_state_only_from_the_prompt(make_policy, discrete):
    policy = make_policy(small_config(discrete_state_input=discrete), "libero")
    observation = request(policy)
    moved = observation | {"observation/state": np.full(8, 0.3)}
    assert np.array_equal(infer(policy, observation), infer(policy, moved)) is not discrete


def test_pi0_reads_state_outside_the_prompt(make_policy):
    policy = make_policy(small_config(pi05=False), "libero")
    observation = request(policy)
    moved = observation | {"observation/state": np.full(8, 0.3)}
    assert not np.array_equal(infer(policy, observation), infer(policy, moved))
    prompts = [policy.prepare(sent)[1]["tokenized_prompt"] for sent in (observation, moved)]
    np.testing.assert_array_equal(*prompts)


# Invalid requests


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": np.zeros(3)}, ValueError, r"State 'state' has shape \[3\].*expects 2 numbers: shoulder, elbow"),
        ({"state": np.zeros((1, 2))}, ValueError, r"State 'state' has shape \[1, 2\]"),
        ({"state": np.array([0, np.nan])}, ValueError, r"NaN or infinity in state 'state', dimension 1 \(elbow\)"),
        ({"state": np.array([-np.inf, 0])}, ValueError, r"NaN or infinity in state 'state', dimension 0 \(shoulder\)"),
        ({"state": np.array(["a", "b"])}, ValueError, "Cannot read state 'state': it has dtype <U1"),
        ({"state": None}, KeyError, "'state' is None, but embodiment 'two_joints' reads it"),
        ({"front": None}, KeyError, r"image 'front' \(camera base_0_rgb\) is None, but .* requires it"),
        ({"top": np.zeros((8, 8, 3), np.uint8)}, KeyError, "'two_joints' has no camera 'top'; its cameras are front"),
        ({"front": np.zeros((3, 8, 8), np.uint8)}, ValueError, r"front\)' sent uint8 \[3, 8, 8\].*transpose"),
        ({"front": np.zeros((8, 8, 3))}, ValueError, r"front\)' sent float64 \[8, 8, 3\]; expected uint8"),
        (
            {"front": [[0, 0, 0]]},
            ValueError,
            r"front\)' sent a value of type list; expected uint8.*Send it as a NumPy array",
        ),
        ({"prompt": None}, ValueError, r"no prompt, and neither the policy nor embodiment 'two_joints' has a default"),
        ({"prompt": 3}, ValueError, "The prompt is of type int; expected a str"),
    ],
)
def test_invalid_request_error_names_the_field(make_policy, changes, error, message):
    policy = make_policy()
    with pytest.raises(error, match=rf"(?s){message}"):
        infer(policy, request(policy, **changes))


def test_batch_that_is_not_a_list_or_is_empty_is_an_error(make_policy):
    policy = make_policy()
    with pytest.raises(ValueError, match="infer_batch got no observations"):
        policy.infer_batch([])
    for batch, found in ((request(policy), "one dict"), ("front", "str"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"infer_batch takes a list of observations, got {found}; infer takes"):
            policy.infer_batch(batch)


def test_state_longer_than_statistics_is_an_error(make_policy):
    policy = make_policy(
        small_config(pi05=False, action_dim=7), "libero", norm_stats={"state": stats(7), "actions": stats(7)}
    )
    assert policy.example_observation()["observation/state"].shape == (7,)
    observation = policy.example_observation() | {"observation/state": np.zeros(8)}
    with pytest.raises(ValueError, match=r"The state has 8 dimensions .*, but this policy expects 7"):
        policy.infer(observation)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((HORIZON + 1, ACTION_DIM)), r"Noise must be \[4, 16\], got float64 \[5, 16\]"),
        (np.zeros((HORIZON, 2), np.float32), r"Noise must be \[4, 16\], got float32 \[4, 2\]"),
        (np.zeros((1, HORIZON, ACTION_DIM)), r"Noise must be \[4, 16\], got float64 \[1, 4, 16\]"),
        (np.zeros(ACTION_DIM), r"Noise must be \[4, 16\], got float64 \[16\]"),
        (np.zeros((HORIZON, ACTION_DIM), np.int64), r"Noise must be floating-point numbers, got int64 \[4, 16\]"),
        (np.full((HORIZON, ACTION_DIM), "x"), r"Noise must be floating-point numbers, got <U1 \[4, 16\]"),
        (np.full((HORIZON, ACTION_DIM), np.nan), "The noise contains NaN or infinity"),
        (np.full((HORIZON, ACTION_DIM), np.inf), "The noise contains NaN or infinity"),
    ],
)
def test_invalid_noise_error_states_the_expected_shape(make_policy, wrong, message):
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        infer(policy, policy.example_observation(), noise=wrong)


def test_noise_of_wrong_batch_size_is_an_error(make_policy):
    policy = make_policy()
    with pytest.raises(ValueError, match=r"Noise must be \[2, 4, 16\], got float32 \[3, 4, 16\]"):
        policy.infer_batch([policy.example_observation()] * 2, noise=noise(batch=(3,)))


def test_float64_noise_is_cast_to_float32(make_policy):
    policy = make_policy()
    observation = policy.example_observation()
    ours = infer(policy, observation, noise=noise().astype(np.float64))
    np.testing.assert_array_equal(ours, infer(policy, observation))


@pytest.mark.parametrize("num_steps", [0, -1])
def test_num_steps_below_one_is_an_error(make_policy, num_steps):
    policy = make_policy()
    with pytest.raises(ValueError, match=f"num_steps must be a positive integer, got {num_steps}"):
        infer(policy, policy.example_observation(), num_steps=num_steps)


def test_unset_horizon_comes_from_the_noise_or_is_an_error(make_policy):
    policy = make_policy(small_config(action_horizon=None, max_token_len=None, discrete_state_input=None))
    observation = policy.example_observation()
    for horizon in (2, 7):
        assert infer(policy, observation, noise=np.zeros((horizon, ACTION_DIM))).shape == (horizon, 2)
    assert policy.metadata["action_horizon"] is None
    with pytest.raises(ValueError, match=r"action_horizon is not set.*config=.*pi05_libero"):
        policy.infer(observation)
    for wrong in (np.zeros((0, ACTION_DIM)), np.zeros(ACTION_DIM)):
        with pytest.raises(ValueError, match="Noise must be"):
            infer(policy, observation, noise=wrong)


# Incompatible parts


@pytest.mark.parametrize("pi05", [True, False])
def test_state_wider_than_action_dim_is_an_error(make_policy, pi05):
    with pytest.raises(ValueError, match=r"'droid' has a state of 8 dimensions, but.*the model's action_dim is 7"):
        make_policy(small_config(pi05, action_dim=7), "droid")


def test_more_actions_than_action_dim_is_an_error(make_policy):
    robot = Embodiment.generic("hand", cameras={"base_0_rgb": "top"}, state=["x"], actions=[f"j{i}" for i in range(17)])
    with pytest.raises(ValueError, match=r"'hand' has 17 action dimensions, the model only 16"):
        make_policy(embodiment=robot)


@pytest.mark.parametrize(
    ("norm_stats", "error", "message"),
    [
        (
            {"state": stats(1), "actions": stats(2)},
            ValueError,
            "has a state of 2 dimensions, but the statistics have 1",
        ),
        (
            {"state": stats(2), "actions": stats(1)},
            ValueError,
            "action statistics have 1 dimension, .*'two_joints'",
        ),
        ({"actions": stats(2)}, KeyError, "no statistics for state; found"),
        ({"state": stats(2), "action": stats(2)}, KeyError, "no statistics for actions; found"),
        (
            {"state": NormStats(np.zeros(2), np.ones(2)), "actions": stats(2)},
            ValueError,
            "Cannot normalize state by quantiles: its statistics have no q01 and q99",
        ),
    ],
)
def test_statistics_of_wrong_size_are_an_error(make_policy, norm_stats, error, message):
    with pytest.raises(error, match=message):
        make_policy(norm_stats=norm_stats)


def test_tokenizer_larger_than_the_embedding_is_an_error(make_policy):
    with pytest.raises(ValueError, match=r"tiny_spm\.model has \d+ tokens, the model's embedding only 100"):
        make_policy(small_config(vocab_size=100))


@pytest.mark.parametrize("is_folder", [True, False])
def test_missing_tokenizer_error_names_the_path(make_policy, tmp_path, is_folder):
    path = tmp_path if is_folder else tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=str(path)):
        make_policy(tokenizer=path)


# load_policy from an openpi checkpoint


@pytest.fixture
def checkpoint(golden_root, tmp_path):
    """Copy of the golden π₀ checkpoint without statistics."""
    root = shutil.copytree(golden_root / "pi0" / "jax_ckpt_pure", tmp_path / "checkpoint")
    shutil.rmtree(root / "assets")
    return root


def add_stats(checkpoint, asset_id, mean=0.0, dim=7):
    folder = checkpoint / "assets" / asset_id
    folder.mkdir(parents=True)
    one = NormStats(np.full(dim, mean), np.ones(dim), np.full(dim, mean - 1), np.full(dim, mean + 1))
    save_norm_stats(folder, {"state": one, "actions": one})


def load(checkpoint, tokenizer, **arguments):
    return torchpi.load_policy(checkpoint, **({"embodiment": "libero", "tokenizer": tokenizer} | arguments))


def test_only_statistics_are_used(checkpoint, tokenizer):
    add_stats(checkpoint, "tiny_robot", 0.5)
    policy = load(checkpoint, tokenizer)
    assert policy.transforms.norm_stats["state"].mean[0] == 0.5
    assert policy.provenance == {"source": str(checkpoint)}


def test_statistics_are_selected_by_asset_id_or_embodiment(checkpoint, tokenizer):
    add_stats(checkpoint, "droid", 0.25)
    add_stats(checkpoint, "physical-intelligence/libero", 0.75)

    def mean(**arguments):
        return load(checkpoint, tokenizer, **arguments).transforms.norm_stats["state"].mean[0]

    assert mean(asset_id="droid") == 0.25
    assert mean(asset_id="physical-intelligence/libero") == 0.75
    assert mean(embodiment="pi0_libero") == 0.75  # its asset_id
    assert mean(embodiment="pi0_libero", asset_id="droid") == 0.25
    assert mean(norm_stats=checkpoint / "assets/droid") == 0.25
    assert mean(norm_stats=checkpoint / "assets/droid/norm_stats.json") == 0.25
    with pytest.raises(ValueError, match=r"several: droid, physical-intelligence/libero; choose with asset_id="):
        mean()
    with pytest.raises(ValueError, match=r"no statistics for asset_id 'franka'; it has droid, physical-intelligence"):
        mean(asset_id="franka")
    with pytest.raises(ValueError, match=r"asset_id='droid' chooses among .*norm_stats= gives a file; leave it out"):
        mean(asset_id="droid", norm_stats=checkpoint / "assets/droid")


def test_missing_statistics_error_names_the_argument(checkpoint, tokenizer):
    with pytest.raises(ValueError, match=r"No normalization statistics are chosen for .*none; pass norm_stats="):
        load(checkpoint, tokenizer)


def test_nan_in_statistics_error_names_file_and_key(checkpoint, tokenizer):
    add_stats(checkpoint, "tiny_robot")
    file = checkpoint / "assets/tiny_robot/norm_stats.json"
    content = json.loads(file.read_text())
    content["norm_stats"]["actions"]["std"][3] = float("nan")
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"norm_stats\.json: \"actions\".*std is NaN or infinite in dimension \[3\]"):
        load(checkpoint, tokenizer)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope", "; expected a folder, hf://ORG/NAME, gs://BUCKET/PATH, or demo, the embedded policy."),
        ("demoo", "; did you mean demo? Expected a folder, hf://ORG/NAME, gs://BUCKET/PATH, or demo,"),
        ("pi05_droid", "; the published one is gs://openpi-assets/checkpoints/pi05_droid."),
        ("pi05-libero", "; did you mean gs://openpi-assets/checkpoints/pi05_libero? Expected a folder"),
        ("pi05", "; expected a folder"),
        ("tiny_pi0", "; expected a folder"),
        ("localhost:8000", "; to evaluate with a server, pass ws://localhost:8000. Expected a folder"),
    ],
)
def test_path_without_checkpoint_error_lists_valid_paths(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"There is no checkpoint at {path}{message}")):
        torchpi.load_policy(path)


@pytest.mark.parametrize("load", [torchpi.load_policy, torchpi.load_model])
def test_path_that_is_not_a_path_is_an_error(load):
    for path in (None, 3, b"demo"):
        with pytest.raises(ValueError, match=rf"path is a string or a Path, got {path!r}; expected a folder, hf://"):
            load(path)


def test_path_of_a_missing_training_step_error_lists_the_steps(tmp_path):
    for step in ("00000500", "00001000"):
        (tmp_path / step / "policy").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=re.escape(f" Steps in {tmp_path}: 00000500, 00001000.")):
        torchpi.load_policy(tmp_path / "00000700/policy")
    with pytest.raises(FileNotFoundError) as raised:
        torchpi.load_policy(tmp_path / "another")  # which is no step
    assert "Steps in" not in str(raised.value)


def test_missing_embodiment_error_lists_the_embodiments(checkpoint, tokenizer):
    with pytest.raises(ValueError, match=r"does not say which robot.*embodiment=, one of aloha, droid, libero"):
        load(checkpoint, tokenizer, embodiment=None)


def test_unknown_embodiment_error_lists_the_embodiments(checkpoint, tokenizer):
    with pytest.raises(KeyError, match="Unknown embodiment 'libro'; known are aloha, droid, libero"):
        load(checkpoint, tokenizer, embodiment="libro")


@pytest.mark.usefixtures("offline")
def test_default_tokenizer_is_downloaded(checkpoint):
    add_stats(checkpoint, "tiny_robot")
    with pytest.raises(FileNotFoundError, match=r"(?s)big_vision/paligemma_tokenizer\.model.*by hand") as caught:
        load(checkpoint, None)
    assert "pass tokenizer= with a file of 512 tokens instead" in caught.value.__notes__[0]


def test_embodiment_that_does_not_fit_the_model_is_an_error(checkpoint, tokenizer):
    add_stats(checkpoint, "tiny_robot", dim=14)
    with pytest.raises(ValueError, match=r"'aloha' has a state of 14 dimensions, but.*action_dim is 7"):
        load(checkpoint, tokenizer, embodiment="aloha")


def test_device_and_dtype_are_applied_to_the_model(checkpoint, tokenizer):
    add_stats(checkpoint, "tiny_robot")
    policy = load(checkpoint, tokenizer, device="cpu", dtype=torch.bfloat16)
    assert policy.model.device == torch.device("cpu")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    default = load(checkpoint, tokenizer, device="cpu")
    assert {parameter.dtype for parameter in default.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "Unknown device 'gpu'; expected for example cpu or cuda"), ("cuda:99", "There is no device cuda:99")],
)
def test_unavailable_device_is_an_error(device, message):
    with pytest.raises(ValueError, match=message):
        torchpi.load_policy("demo", device=device)


def test_config_completes_the_checkpoint(checkpoint, tokenizer, tmp_path):
    add_stats(checkpoint, "tiny_robot")
    (tmp_path / "horizon.json").write_text('{"action_horizon": 3, "max_token_len": 20}')
    policy = load(checkpoint, tokenizer, config=tmp_path / "horizon.json")
    assert policy.metadata["action_horizon"] == 3
    _, inputs = policy.prepare(policy.example_observation())
    assert inputs["tokenized_prompt"].shape == (20,)


@pytest.mark.parametrize(("kind", "rule"), [("z_score", "z_score"), ("quantile", "quantile"), (None, "z_score")])
def test_normalization_defaults_to_the_variants(checkpoint, tokenizer, kind, rule):
    add_stats(checkpoint, "tiny_robot")
    policy = load(checkpoint, tokenizer, normalization=kind)
    assert {entry.kind for entry in policy.transforms.normalization.values()} == {rule}


def test_truncation_shortens_or_cuts_long_prompts(checkpoint, tokenizer, tmp_path):
    add_stats(checkpoint, "tiny_robot")
    (tmp_path / "short.json").write_text('{"max_token_len": 12}')
    tokens = {}
    for truncation in (None, "original"):
        policy = load(checkpoint, tokenizer, config=tmp_path / "short.json", truncation=truncation)
        with pytest.warns(UserWarning, match="max_token_len is 12"):
            _, inputs = policy.prepare(policy.example_observation() | {"prompt": "put the red block " * 5})
        tokens[truncation] = inputs["tokenized_prompt"].tolist()
    newline = policy.transforms.tokenizer.encode("\n", add_bos=False)
    assert newline[-1] in tokens[None]
    assert newline[-1] not in tokens["original"]


# Arguments of infer and infer_batch


@pytest.fixture
def unchecked(monkeypatch):
    """Disable the type checks that only run in tests, as for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


PREFIX = np.full((2, 2), 0.1, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": 1}, "infer got delay 1 and execution_horizon None without an action_prefix"),
        ({"execution_horizon": 2}, "execution_horizon 2 without an action_prefix"),
        ({"action_prefix": PREFIX, "delay": True}, "delay must be a whole number of actions, got True"),
        ({"action_prefix": PREFIX, "delay": None}, "delay must be a whole number of actions, got None"),
        (
            {"action_prefix": PREFIX, "execution_horizon": 2.0},
            "execution_horizon must be a whole number of actions, got 2.0",
        ),
        ({"action_prefix": PREFIX, "delay": 2, "execution_horizon": 3}, "needs 0 ≤ delay ≤ H − execution_horizon"),
        (
            {"action_prefix": PREFIX[:1], "delay": 2, "execution_horizon": 1},
            "prefix has 1 actions; expected at least delay, 2",
        ),
        ({"action_prefix": np.zeros((5, 2))}, "prefix has 5 actions; expected .* at most the 4 that a chunk of 4 has"),
        (
            {"action_prefix": np.zeros((2, 2)), "execution_horizon": 3},
            "at most the 1 that a chunk of 4 has left after 3",
        ),
        ({"action_prefix": np.full((2, 2), 1e300)}, "Cannot read actions: it reaches a magnitude of 1e.300"),
        ({"num_steps": 2.0}, "num_steps must be a positive integer, got 2.0"),
        ({"num_steps": np.float32(2)}, "num_steps must be a positive integer"),
        ({"num_steps": np.True_}, "num_steps must be a positive integer"),
        ({"generator": 0, "noise": None}, "generator is 0; expected a torch.Generator"),
        (
            {"noise": np.full((HORIZON, ACTION_DIM), 1e300)},
            "The noise contains NaN or infinity; it must be finite in float32",
        ),
    ],
)
def test_invalid_arguments_are_errors(make_policy, unchecked, arguments, message):
    policy = make_policy()
    with pytest.raises(TorchpiError, match=message):
        infer(policy, request(policy), **arguments)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numpy_integers_are_accepted(make_policy, kind):
    policy = make_policy()
    one = request(policy)
    np.testing.assert_array_equal(infer(policy, one, num_steps=kind(3)), infer(policy, one, num_steps=3))
    found, expected = (
        infer(policy, one, action_prefix=PREFIX, delay=number(1), execution_horizon=number(2)) for number in (kind, int)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("prefixes", [[], [None], [PREFIX, None], np.stack([PREFIX, PREFIX]), [None] * 3])
def test_batch_needs_one_previous_chunk_per_observation(make_policy, unchecked, prefixes):
    policy = make_policy()
    with pytest.raises(TorchpiError, match=r"prefixes are \[.*\]; expected 2 items, each PreviousChunk or None"):
        policy.infer_batch([request(policy)] * 2, prefixes=prefixes)


def test_unknown_rtc_method_is_an_error(unchecked):
    with pytest.raises(TorchpiError, match="method is 'guided'; expected 'trained', 'guidance' or None"):
        torchpi.types.PreviousChunk(PREFIX, delay=1, method="guided")


@pytest.mark.parametrize("prompt", ["go \ud800", np.array("\udfff"), b"\xff go".decode(errors="surrogateescape")])
def test_lone_surrogate_in_prompt_is_an_error(make_policy, prompt):
    policy = make_policy()
    with pytest.raises(TorchpiError, match=r"The prompt has the code point 0xd.*, which is not a Unicode character"):
        policy.infer_batch([request(policy), request(policy, prompt=prompt)])


def test_code_point_beyond_unicode_in_prompt_is_an_error(make_policy):
    policy = make_policy()
    with pytest.raises(TorchpiError, match="0x110000, which is not a Unicode character"):
        policy.infer(request(policy, prompt=np.array([0x110000], np.uint32).view("U1").reshape(())))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is float64 here")
def test_long_double_error_names_the_field(make_policy):
    policy = make_policy()
    one = request(policy)
    with pytest.raises(TorchpiError, match="Cannot read state 'state': it is float128; expected floats of at most"):
        policy.infer(one | {"state": one["state"].astype(np.longdouble)})
    with pytest.raises(TorchpiError, match="Cannot read actions: it is float128"):
        policy.infer(one, action_prefix=PREFIX.astype(np.longdouble))
    with pytest.raises(TorchpiError, match=r"got float128 .*; at most 64 bits are read"):
        policy.infer(one, noise=noise().astype(np.longdouble))


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, requires_grad=True)])
def test_tensor_unreadable_by_numpy_error_names_the_state(make_policy, tensor):
    policy = make_policy()
    with pytest.raises(TorchpiError, match="Cannot read state 'state': "):
        policy.infer(request(policy, state=tensor))


def test_result_counts_cut_prompt_tokens(make_policy):
    policy = make_policy(small_config(max_token_len=60))
    observations = [request(policy, prompt=prompt) for prompt in ("open it " * 40, "go", "open it " * 40)]
    with pytest.warns(UserWarning, match="max_token_len is 60") as caught:
        long, short, again = policy.infer_batch(observations)
    assert len(caught) == 1
    assert again["prompt_tokens_cut"] == long["prompt_tokens_cut"]
    assert long["prompt_tokens_cut"] > 0
    assert "prompt_tokens_cut" not in short


@pytest.mark.parametrize("number", [2.5, True])
def test_execute_steps_must_be_whole(unchecked, number):
    with pytest.raises(TorchpiError, match=r"execute_steps is .*; expected a positive whole number"):
        dataclasses.replace(TWO_JOINTS, execute_steps=number)


# The demo policy


def test_demo_policy_loads():
    policy = torchpi.load_policy("demo", device="cpu", default_prompt="open the drawer")
    without = policy.example_observation()
    del without["prompt"]
    assert policy.infer(without, num_steps=1)["actions"].shape == (16, 4)


def test_arguments_override_the_demo_policy():
    policy = torchpi.load_policy("demo", device="cpu", normalization="z_score")
    assert {rule.kind for rule in policy.transforms.normalization.values()} == {"z_score"}
    with pytest.raises(ValueError, match="whose state has 4 dimensions; that of embodiment 'aloha' has 14"):
        torchpi.load_policy("demo", embodiment="aloha", device="cpu")


def test_folder_named_demo_needs_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torchpi.load_policy("demo", device="cpu", default_prompt="mine").save("demo")
    assert torchpi.load_policy("./demo", device="cpu").default_prompt == "mine"
    assert torchpi.load_policy("demo", device="cpu").default_prompt is None


def test_metadata_has_action_commands_and_ranges(golden_root):
    """Clients use these to hold the robot still, and to stay within the training range."""
    demo = torchpi.load_policy("demo", device="cpu").metadata
    assert demo["action_commands"] == ["increment", "increment", "increment", "effort"]
    assert demo["action_range"] == {"low": [-1.0] * 4, "high": [1.0] * 4}
    robot = torchpi.Embodiment.generic(
        "arm", cameras={"base_0_rgb": "front"}, state=["a", "b", "c", "d"], actions=["a", "b", "c", "speed"],
        delta=["a"], command={"a": "position", "speed": "velocity"},
    )  # fmt: skip
    arm = torchpi.load_policy("demo", embodiment=robot, device="cpu")
    state = arm.transforms.norm_stats["state"]
    assert arm.metadata["action_commands"] == ["position", None, None, "velocity"]
    assert arm.metadata["action_range"]["high"][0] == pytest.approx(1.0 + state.q99[0])
    assert arm.metadata["action_range"]["low"][1] == -1.0


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gpu_without_bfloat16_uses_float32_and_warns(has_bfloat16, expected, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert fastest_dtype(torch.device("cuda")) is expected
    assert ["Tesla T4 has no bfloat16" in str(warning.message) for warning in recwarn] == [True] * (not has_bfloat16)


def test_policy_ignores_autocast(make_policy):
    policy = make_policy()
    expected = infer(policy, request(policy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = infer(policy, request(policy))
    np.testing.assert_array_equal(found, expected)


def test_unknown_engine_error_lists_the_engines(make_policy, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks run only in tests
    with pytest.raises(ValueError, match=r"Unknown engine 'fast'; expected one of auto, eager, compiled, graph"):
        make_policy().use_engine("fast")


def test_repr_is_one_line(demo_policy):
    assert repr(demo_policy) == (
        "<Policy of metaworld: π₀.₅, 3.754 M parameters, float32 on cpu, chunks of 16 actions of 4 dimensions>"
    )


@pytest.fixture(scope="module")
def demo_policy():
    return torchpi.load_policy("demo", device="cpu")


def test_config_may_be_a_partial_dict(golden_root):
    path = golden_root / "pi05" / "jax_ckpt_pure"
    assert torchpi.load_model(path, config={"action_horizon": 7}).config.action_horizon == 7
    with pytest.raises(ValueError, match=r"unknown fields horizon.*known are pi05"):
        torchpi.load_model(path, config={"horizon": 7})


def test_changed_embodiment_needs_its_own_statistics(tmp_path):
    with pytest.raises(ValueError, match=r"'metaworld', whose state has 4 .* 'two_joints' has 2.* norm_stats="):
        torchpi.load_policy("demo", embodiment=TWO_JOINTS)
    one = NormStats(np.zeros(2), np.ones(2), -np.ones(2), np.ones(2))
    save_norm_stats(tmp_path, {"state": one, "actions": one})
    policy = torchpi.load_policy("demo", embodiment=TWO_JOINTS, norm_stats=tmp_path, device="cpu")
    assert policy.infer(policy.example_observation(), num_steps=1)["actions"].shape == (16, 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Demo", "did you mean demo?"),
        ("PI05_base", "did you mean gs://openpi-assets/checkpoints/pi05_base?"),
        ("pi06", "Published are pi0_base, pi05_base, "),
        ("org/name", "hf://org/name"),
    ],
)
def test_unknown_address_error_suggests_similar_ones(name, hint):
    with pytest.raises(FileNotFoundError, match=re.escape(hint)):
        torchpi.load_policy(name)


def test_example_observation_lies_within_the_training_range(demo_policy, golden_root):
    statistics = demo_policy.transforms.norm_stats["state"]
    low, high = statistics.training_range()
    state = demo_policy.example_observation()["state"]
    assert (low <= state).all()
    assert (state <= high).all()
    # A hook converts the state to the robot's units.
    aloha = get_embodiment("aloha")
    inside = np.linspace(0.1, 0.9, 14)
    sample = aloha.to_model(aloha.example_observation(state=inside))
    np.testing.assert_allclose(sample["state"], inside, atol=1e-12)


def test_packaged_tokenizer_is_chosen_by_vocabulary_size():
    assert PolicySpec("a checkpoint").with_tokenizer(1024).tokenizer.name == "tiny_tokenizer.model"
