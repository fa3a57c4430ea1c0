"""Images, transforms, prompts, robots and policy inputs compared with openpi's results."""

import json
from pathlib import Path

import numpy as np
import pytest

from torchpi.robots import Embodiment, aloha, droid, get_embodiment, libero
from torchpi.robots.aloha import gripper_command_to_angular, gripper_from_angular, gripper_to_angular
from torchpi.robots.keys import nest
from torchpi.transforms import (
    Normalization,
    NormStats,
    Transforms,
    absolute_actions,
    bool_mask,
    delta_actions,
    digitize_state,
    load_norm_stats,
    load_tokenizer,
    normalize,
    pad_to_dim,
    pi05_prompt_text,
    resize_with_pad,
    save_norm_stats,
    to_uint8_hwc,
    tokenize_prompt,
    unnormalize,
    unpad,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def load(path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / path) as arrays:
        return dict(arrays)


IMAGES = load("images/images.npz")
TRANSFORMS = load("transforms/transforms.npz")
PROMPTS = load("tokenizer/tokenizer.npz")
PROMPT_CASES = json.loads((GOLDEN / "tokenizer/tokenizer.json").read_text())
POLICIES = json.loads((GOLDEN / "policy/policy.json").read_text())


def nested(arrays: dict[str, np.ndarray], prefix: str) -> dict:
    """Nest the arrays whose keys have a prefix."""
    return nest({key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)})


def assert_same(ours: dict, theirs: dict, atol: float = 1e-12) -> None:
    """Same keys in the same order for cameras; integers and text exactly, floating point within atol."""
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        if isinstance(expected, dict):
            assert list(ours[key]) == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
            assert_same(ours[key], expected, atol)
        elif np.asarray(expected).dtype.kind == "f":
            np.testing.assert_allclose(ours[key], expected, rtol=0, atol=atol, err_msg=key)
        else:
            np.testing.assert_array_equal(ours[key], expected, err_msg=key)


# Images


@pytest.mark.parametrize("size", ["480x640", "100x37", "224x224", "720x1280"])
def test_resize_equals_openpi_client(size):
    ours = resize_with_pad(IMAGES[f"{size}.input"], 224, 224)
    np.testing.assert_array_equal(ours, IMAGES[f"{size}.client_pil_uint8"])


def test_resize_to_a_rectangle():
    ours = [resize_with_pad(image, 48, 64) for image in IMAGES["batch60x90.input"]]
    np.testing.assert_array_equal(ours, IMAGES["batch60x90.client_pil_uint8_to_48x64"])


def test_float_images_to_uint8():
    ours = to_uint8_hwc(IMAGES["convert_to_uint8.input"], layout="hwc", dtype="float32", camera="c")
    np.testing.assert_array_equal(ours, IMAGES["convert_to_uint8.output"])


# Normalization, deltas, padding

STATS = NormStats(*(TRANSFORMS[f"stats.{name}"] for name in ("mean", "std", "q01", "q99")))
NORMALIZE_CASES = sorted(
    {key.rsplit(".", 1)[0] for key in TRANSFORMS if key.startswith(("normalize.", "unnormalize."))}
)


@pytest.mark.parametrize("case", NORMALIZE_CASES)
def test_normalization(case):
    direction, kind, _, dtype = case.split(".")
    function = {"normalize": normalize, "unnormalize": unnormalize}[direction]
    rule = Normalization({"zscore": "z_score", "quantile": "quantile"}[kind])
    for key in ("state", "actions"):
        x, expected = TRANSFORMS[f"{case}.{key}"], TRANSFORMS[f"{case}.out_{key}"]
        assert x.dtype == dtype
        ours = function(x, STATS, rule)
        assert ours.dtype == expected.dtype
        # Relative, because dividing by 1e-6 where std is 0 gives numbers of 1e7.
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("runs", "case"), [((6, -1), "6_-1"), ((6, -1, 6, -1), "6_-1_6_-1"), ((-2, 3), "-2_3")])
def test_delta_actions(runs, case):
    mask, state, actions, delta, absolute = (
        TRANSFORMS[f"delta.{case}.{name}"] for name in ("mask", "state", "actions", "delta", "absolute")
    )
    np.testing.assert_array_equal(bool_mask(*runs), mask)
    np.testing.assert_array_equal(delta_actions(actions, state, bool_mask(*runs)), delta)
    np.testing.assert_array_equal(absolute_actions(actions, state, bool_mask(*runs)), absolute)


@pytest.mark.parametrize("case", ["pad", "nopad", "wider"])
def test_padding(case):
    dim = int(TRANSFORMS[f"pad.{case}.model_action_dim"])
    for key in ("state", "actions"):
        padded = pad_to_dim(TRANSFORMS[f"pad.{case}.{key}"], dim)
        assert padded.dtype == np.float32
        np.testing.assert_array_equal(padded, TRANSFORMS[f"pad.{case}.out_{key}"])


def test_norm_stats_file(tmp_path):
    stats = load_norm_stats(GOLDEN / "transforms")
    assert list(stats) == ["state", "actions"]
    original = json.loads((GOLDEN / "transforms/norm_stats.json").read_text())
    save_norm_stats(tmp_path, stats)
    assert json.loads((tmp_path / "norm_stats.json").read_text()) == original


# Prompts


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digitize_in_the_states_own_dtype(dtype):
    x = PROMPTS[f"discretize.{dtype}.input"]
    assert x.dtype == dtype
    np.testing.assert_array_equal(digitize_state(x), PROMPTS[f"discretize.{dtype}.output"])


@pytest.mark.parametrize("case", PROMPT_CASES, ids=lambda case: case["name"])
def test_prompt(case):
    name, state = case["name"], PROMPTS.get(f"{case['name']}.state")
    if case["has_state"]:
        assert pi05_prompt_text(case["prompt"], state) == case["encode_calls_text_addbos"][0][0]
    tokens, mask = tokenize_prompt(
        load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model"),
        case["prompt"],
        state,
        discrete_state_input=case["has_state"],
        max_token_len=case["max_len"],
        truncation="original",
        warn=lambda message: None,
    )
    np.testing.assert_array_equal(tokens, PROMPTS[f"{name}.tokens"])
    np.testing.assert_array_equal(mask, PROMPTS[f"{name}.mask"])
    assert mask.sum() == case["n_valid"]


# Robots


def test_aloha_gripper():
    x = TRANSFORMS["aloha.gripper.x"]
    for function, name in (
        (gripper_to_angular, "to_angular"),
        (gripper_from_angular, "from_angular"),
        (gripper_command_to_angular, "from_angular_inv"),
    ):
        np.testing.assert_allclose(function(x), TRANSFORMS[f"aloha.gripper.{name}"], rtol=0, atol=1e-12)


ROBOT_INPUTS = {
    "aloha.inputs.adapt1.all_cams": aloha(delta_actions=False),
    "aloha.inputs.adapt1.sim_float": aloha(delta_actions=False),
    "aloha.inputs.adapt0.all_cams": aloha(adapt_to_pi=False, delta_actions=False),
    "aloha.inputs.adapt0.sim_float": aloha(adapt_to_pi=False, delta_actions=False),
    "droid.inputs.pi0": droid(),
    "droid.inputs.pi05": droid(),
    "droid.inputs.pi05.scalar_gripper_float_chw": droid(layout="chw", dtype="float32"),
    "libero.inputs.pi0": libero(),
    "libero.inputs.pi05": libero(),
}


@pytest.mark.parametrize("case", ROBOT_INPUTS)
def test_robot_inputs(case):
    expected = nested(TRANSFORMS, f"{case}.out.")
    sample = ROBOT_INPUTS[case].to_model(nested(TRANSFORMS, f"{case}.in."))
    assert sample["state"].dtype == expected["state"].dtype
    assert type(sample["prompt"]) is str
    assert_same(sample, expected)


ROBOT_OUTPUTS = {
    "aloha.outputs.adapt1": aloha(delta_actions=False),
    "aloha.outputs.adapt0": aloha(adapt_to_pi=False, delta_actions=False),
    "droid.outputs": droid(),
    "libero.outputs": libero(),
}


@pytest.mark.parametrize("case", ROBOT_OUTPUTS)
def test_robot_outputs(case):
    robot = ROBOT_OUTPUTS[case]
    actions = unpad(TRANSFORMS[f"{case}.in.actions"], robot.action_size)
    ours = robot.from_model(actions, np.zeros(len(robot.state_names)))
    np.testing.assert_allclose(ours, TRANSFORMS[f"{case}.out.actions"], rtol=0, atol=1e-12)


# Whole policies

POLICY_ROBOTS = {"pi05.aloha": "aloha", "pi05.droid": "droid", "pi05.libero": "libero", "pi0.libero7": "libero"}


def policy(name: str) -> tuple[Embodiment, Transforms]:
    """Embodiment and transforms of a golden policy."""
    kind = "quantile" if POLICIES[name]["use_quantiles"] else "z_score"
    pi05 = name.startswith("pi05")
    return get_embodiment(POLICY_ROBOTS[name]), Transforms(
        norm_stats=load_norm_stats(GOLDEN / "policy" / name),
        normalization={"state": Normalization(kind), "actions": Normalization(kind)},
        tokenizer=load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model"),
        discrete_state_input=pi05,
        max_token_len=200 if pi05 else 48,
        action_dim=32 if pi05 else 7,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_policy_inputs(name):
    robot, transforms = policy(name)
    arrays = load(f"policy/{name}/case.npz")
    request = nested(arrays, "obs.")
    untouched = nested({key: value.copy() for key, value in arrays.items()}, "obs.")
    if mask := POLICIES[name]["delta_mask"]:
        assert robot.action_mask == tuple(mask)
    ours = transforms.forward(robot.to_model(request))
    expected = nested(arrays, "model_input.")
    assert_same(ours, expected)
    for key in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
        assert ours[key].dtype == expected[key].dtype
    for key, value in nested(arrays, "obs.").items():
        np.testing.assert_equal(value, untouched[key])


@pytest.mark.parametrize("name", POLICIES)
def test_training_transforms_invert_policy_outputs(name):
    """Golden actions are transformed as in training, then back as in inference."""
    robot, transforms = policy(name)
    arrays = load(f"policy/{name}/case.npz")
    sample = robot.to_model({**nested(arrays, "obs."), "actions": arrays["actions"]})
    chunk = transforms.forward(sample)["actions"]
    assert chunk.shape == (*arrays["actions"].shape[:1], transforms.action_dim)
    actions = robot.from_model(transforms.inverse(chunk, action_size=robot.action_size), sample["state"])
    np.testing.assert_allclose(actions, arrays["actions"], rtol=0, atol=1e-12)
