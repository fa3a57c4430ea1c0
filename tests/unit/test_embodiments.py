"""Embodiments: conversion of observations and actions, presets, JSON files, and errors."""

import copy
import dataclasses
import json

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchpi.arrays import read_npz
from torchpi.robots import (
    EMBODIMENTS,
    ActionDim,
    Camera,
    Embodiment,
    StateKey,
    aloha,
    droid,
    flatten,
    get_embodiment,
    libero,
)
from torchpi.robots.aloha import gripper_command_to_angular, gripper_from_angular
from torchpi.robots.commands import with_guessed_commands

JOINTS = ["shoulder", "elbow", "wrist"]
PUBLISHED = [name for name in EMBODIMENTS if name.startswith("pi0")]


def my_arm(**fields) -> Embodiment:
    """Build a custom robot."""
    return Embodiment.generic(
        "my_arm",
        cameras={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
        state=[*JOINTS, "gripper"],
        actions=[*JOINTS, "gripper"],
        delta=JOINTS,
        control_hz=30,
        execute_steps=15,
        **fields,
    )


def generic(**fields) -> Embodiment:
    return Embodiment.generic(
        "arm", **{"cameras": {"base_0_rgb": "front"}, "state": ["a", "b"], "actions": ["a", "b"], **fields}
    )


def request(**changes) -> dict:
    image = np.zeros((4, 6, 3), np.uint8)
    return {"wrist": image + 1, "state": np.arange(4.0), "front": image, "prompt": "lift it"} | changes


def without(observation: dict, key: str) -> dict:
    return {k: v for k, v in observation.items() if k != key}


# Custom robots


def test_custom_robot_reads_its_observation():
    sample = my_arm().to_model(request())
    assert (
        list(sample["image"]) == list(sample["image_mask"]) == ["base_0_rgb", "left_wrist_0_rgb"]
    )  # not the dict's order
    assert sample["image"]["left_wrist_0_rgb"][0, 0].tolist() == [1, 1, 1]
    assert sample["prompt"] == "lift it"
    assert sample["state"].tolist() == [0, 1, 2, 3]
    actions = my_arm().from_model(np.ones((2, 4)), sample["state"])
    assert actions.tolist() == [[1, 2, 3, 1]] * 2  # the gripper is absolute


def test_to_model_does_not_change_the_request():
    observation = aloha().example_observation() | {"actions": np.ones((3, 14))}
    before = copy.deepcopy(observation)
    aloha().to_model(observation)
    np.testing.assert_equal(observation, before)


def test_flat_and_nested_requests_give_the_same_sample():
    nested = aloha().example_observation()
    flat = {f"images.{name}": image for name, image in nested["images"].items()} | without(nested, "images")
    np.testing.assert_equal(aloha().to_model(flat), aloha().to_model(nested))


def test_state_dtype_is_kept():
    for dtype in (np.float32, np.float64):
        assert my_arm().to_model(request(state=np.ones(4, dtype)))["state"].dtype == dtype
    assert my_arm().to_model(request(state=[0, 1, 2, 3]))["state"].dtype == np.float64


@pytest.mark.parametrize("name", ["aloha", "droid", "libero", "pi0_aloha_sim", "pi0_libero"])
@settings(deadline=None)
@given(data=st.data())
def test_action_conversion_is_invertible(name, data):
    robot = get_embodiment(name)
    shape = st.tuples(st.integers(1, 3), st.just(robot.action_size))
    actions = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(-3, 3)))
    state = data.draw(hnp.arrays(np.float64, len(robot.state_names), elements=st.floats(0, 1)))
    observation: dict = {"prompt": "", "actions": actions}
    at = 0
    for part in robot.state:
        observation[part.key] = state[at : (at := at + len(part.names))]
    for camera in robot.read_cameras:
        if camera.presence == "required":
            observation[camera.key] = np.zeros((2, 3, 3) if camera.layout == "hwc" else (3, 2, 3), np.uint8)
    sample = robot.to_model(observation)
    np.testing.assert_allclose(robot.from_model(sample["actions"], sample["state"]), actions, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(hnp.arrays(np.float64, 3, elements=st.floats(-2, 2)))
def test_aloha_gripper_commands(x):
    np.testing.assert_allclose(gripper_from_angular(gripper_command_to_angular(x)), x, atol=1e-12)


# Cameras


def test_missing_required_camera_is_an_error():
    with pytest.raises(KeyError, match=r"no image 'wrist' \(camera left_wrist_0_rgb\).*'my_arm'.*front \(required\)"):
        my_arm().to_model(without(request(), "wrist"))
    with pytest.raises(
        KeyError, match=r"image 'wrist' \(camera .*\) is None, but .*set the camera's presence to 'optional'"
    ):
        my_arm().to_model(request(wrist=None))


def test_empty_observation_is_an_error():
    with pytest.raises(KeyError, match=r"no image 'front'.*; found nothing; expected front \(required\), wrist"):
        my_arm().to_model({})
    optional = dataclasses.replace(
        my_arm(), cameras=tuple(dataclasses.replace(camera, presence="optional") for camera in my_arm().cameras)
    )
    with pytest.raises(KeyError, match=r"no image that .* reads; found nothing; expected at least one of front"):
        optional.to_model({})


def test_absent_optional_and_masked_cameras_are_black():
    observation = aloha().example_observation()
    del observation["images"]["cam_left_wrist"]
    sample = aloha().to_model(observation)
    assert sample["image_mask"] == {"base_0_rgb": True, "left_wrist_0_rgb": False, "right_wrist_0_rgb": True}
    assert not sample["image"]["left_wrist_0_rgb"].any()
    sample = droid().to_model(droid().example_observation())
    assert list(sample["image_mask"].values()) == [True, True, False]
    assert not sample["image"]["right_wrist_0_rgb"].any()


def test_ignored_cameras_are_not_read():
    observation = aloha().example_observation()
    observation["images"]["cam_low"] = "not even an image"
    assert list(aloha().to_model(observation)["image"]) == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]


def test_unknown_cameras_are_errors():
    with pytest.raises(KeyError, match=r"no camera 'top'; its cameras are front \(required\), wrist \(required\)"):
        my_arm().to_model(request(top=np.zeros((4, 6, 3), np.uint8)))
    # A key next to other cameras counts as a camera, whatever its value.
    observation = aloha().example_observation()
    observation["images"]["cam_hgih"] = [0]
    with pytest.raises(KeyError, match=r"no camera 'images\.cam_hgih'; its cameras are images\.cam_high \(required\)"):
        aloha().to_model(observation)


def test_unknown_keys_warn_once():
    robot = my_arm()
    with pytest.warns(UserWarning, match="ignores joint_torques of the observation; it reads") as caught:
        _ = [robot.to_model(request(joint_torques=np.zeros(3))) for _ in range(3)]
    assert len(caught) == 1


def test_invalid_image_error_names_the_camera():
    with pytest.raises(
        ValueError, match=r"Camera 'left_wrist_0_rgb \(wrist\)' sent float32 \[4, 6, 3\]; expected uint8"
    ):
        my_arm().to_model(request(wrist=np.zeros((4, 6, 3), np.float32)))
    with pytest.raises(ValueError, match=r"base_0_rgb \(images\.cam_high\).*\[3, height, width\].*layout 'hwc'"):
        aloha().to_model({"images": {"cam_high": np.zeros((4, 6, 3), np.uint8)}, "state": np.zeros(14), "prompt": ""})


def test_any_number_of_cameras_is_supported():
    one = Embodiment.generic("one", cameras={"eye": "eye"}, state=["x"], actions=["x"])
    assert one.to_model(one.example_observation())["image_mask"] == {"eye": True}
    names = [f"c{i}" for i in range(7)]
    seven = Embodiment.generic("seven", cameras={n: f"cams.{n}" for n in names}, state=["x"], actions=["x"])
    assert list(seven.to_model(seven.example_observation())["image"]) == names


def test_observation_of_wrong_type_is_an_error():
    with pytest.raises(ValueError, match="found a value of type list"):
        my_arm().to_model([request()])


# State


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.zeros(3), r"State 'state' has shape \[3\]; embodiment 'my_arm' expects 4 numbers: shoulder, elbow"),
        (np.zeros((1, 4)), r"shape \[1, 4\]"),
        (1.0, r"shape \[\]"),
        (np.array([0, np.nan, 0, np.inf]), r"NaN or infinity in state 'state', dimension 1 \(elbow\), 3 \(gripper\)"),
        (["a", "b", "c", "d"], "dtype <U1; expected numbers"),
        ([[0], [1, 2]], "Cannot read state 'state'"),
    ],
)
def test_invalid_states_are_errors(state, message):
    with pytest.raises(ValueError, match=message):
        my_arm().to_model(request(state=state))


def test_missing_state_is_an_error():
    with pytest.raises(KeyError, match=r"no state 'state'.*found wrist, front, prompt"):
        my_arm().to_model(without(request(), "state"))
    with pytest.raises(KeyError, match=r"The observation's state 'state' is None, but embodiment 'my_arm' reads it"):
        my_arm().to_model(request(state=None))


def test_state_parts_are_concatenated():
    observation = droid().example_observation()
    observation |= {"observation/joint_position": np.arange(7.0), "observation/gripper_position": 0.5}
    assert droid().to_model(observation)["state"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
    observation["observation/gripper_position"] = np.zeros(2)
    with pytest.raises(ValueError, match=r"observation/gripper_position' has shape \[2\].*expects 1 numbers: gripper"):
        droid().to_model(observation)


def test_state_may_be_shorter_by_min_dim():
    observation = libero().example_observation()
    assert list(libero().state_dims) == [7, 8]
    for n in (7, 8):
        observation["observation/state"] = np.zeros(n)
        assert libero().to_model(observation, state_dim=n)["state"].shape == (n,)
        with pytest.raises(ValueError, match=f"state has {n} dimensions .*this policy expects {15 - n}"):
            libero().to_model(observation, state_dim=15 - n)
    observation["observation/state"] = np.zeros(6)
    with pytest.raises(ValueError, match="expects 7 or 8 numbers"):
        libero().to_model(observation)


# Prompt and actions


def test_prompt_types_and_defaults():
    silent = without(request(), "prompt")
    assert my_arm(default_prompt="wait").to_model(silent)["prompt"] == "wait"
    assert my_arm(default_prompt="wait").to_model(silent, default_prompt="go")["prompt"] == "go"
    assert my_arm(default_prompt="wait").to_model(request())["prompt"] == "lift it"
    assert my_arm().to_model(request(prompt=np.array(b"bytes")))["prompt"] == "bytes"
    assert my_arm(default_prompt="wait").to_model(request(prompt=""))["prompt"] == ""
    with pytest.raises(ValueError, match=r"no prompt.*'my_arm'.*default_prompt=, or start .* --default-prompt"):
        my_arm().to_model(silent)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 3)), r"shape \[2, 3\].*expects \[H, 4\]: shoulder"),
        (np.zeros(4), r"shape \[4\]"),
        (np.full((2, 4), np.nan), r"NaN or infinity in actions, dimension 0 \(shoulder\)"),
    ],
)
def test_invalid_actions_are_errors(actions, message):
    with pytest.raises(ValueError, match=message):
        my_arm().to_model(request(actions=actions))


def test_invalid_chunks_are_errors():
    with pytest.raises(ValueError, match=r"expects \[H, 4\]"):
        my_arm().from_model(np.zeros((2, 32)), np.zeros(4))


# Commands of actions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aloha", ["position"] * 14),
        ("droid", ["velocity"] * 7 + ["position"]),
        ("libero", ["increment"] * 6 + ["effort"]),
        ("metaworld", ["increment"] * 3 + ["effort"]),
        *((name, None) for name in PUBLISHED),
    ],
)
def test_presets_state_the_commands_guessed_for_older_files(name, expected):
    robot = get_embodiment(name)
    assert expected in (None, [action.command for action in robot.actions])
    unstated = tuple(dataclasses.replace(action, command=None) for action in robot.actions)
    assert with_guessed_commands(dataclasses.replace(robot, actions=unstated)) == robot


def test_generic_takes_one_command_or_one_per_action():
    assert {action.command for action in my_arm().actions} == {None}
    assert {action.command for action in my_arm(command="position").actions} == {"position"}
    mixed = my_arm(command={"gripper": "effort"})
    assert [action.command for action in mixed.actions] == [None, None, None, "effort"]
    assert Embodiment.from_dict(mixed.to_dict()) == mixed


@pytest.mark.parametrize(
    ("actions", "commands"),
    [
        ((ActionDim("a"), ActionDim("b")), ["position", "effort"]),  # the state has no b
        ((ActionDim("a"), ActionDim("speed")), ["effort", "velocity"]),  # no units, and another action is a motion
        ((ActionDim("a", "rad"), ActionDim("speed")), ["position", "velocity"]),
        ((ActionDim("a", "deg"), ActionDim("x", "m/s")), ["effort", "velocity"]),
        ((ActionDim("x", kind="delta"), ActionDim("delta_a")), ["position", "increment"]),
    ],
)
def test_missing_commands_are_guessed_from_names_and_units(actions, commands):
    robot = dataclasses.replace(my_arm(), state=(StateKey("state", ("a", "c"), units=("rad", "")),), actions=actions)
    assert [action.command for action in with_guessed_commands(robot).actions] == commands


# Presets, and robots as JSON


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_presets(name):
    robot = get_embodiment(name)
    assert robot.name == name
    assert get_embodiment(robot) is robot
    sample = robot.to_model(robot.example_observation())
    cameras = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    assert list(sample["image"]) == (cameras[:2] if name == "metaworld" else cameras)  # its policies are our own
    np.testing.assert_equal(sample, robot.to_model(robot.example_observation()))
    assert len(sample["state"]) == len(robot.state_names)


def test_settings_of_published_policies():
    described = {
        name: (
            robot.hook,
            sum(robot.action_mask),
            robot.default_prompt,
            robot.asset_id,
            robot.metadata,
            robot.control_hz,
        )
        for name in PUBLISHED
        if (robot := get_embodiment(name))
    }
    reset = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
    asset = "physical-intelligence/libero"
    prompts = ["fold the towel", "open the tupperware and put the food on the plate", "uncap the pen"]
    assert described == {
        "pi0_aloha_towel": ("aloha_pi", 12, prompts[0], "trossen", reset, 50),
        "pi0_aloha_tupperware": ("aloha_pi", 12, prompts[1], "trossen", reset, 50),
        "pi0_aloha_pen_uncap": ("aloha_pi", 12, prompts[2], "trossen", reset, 50),
        "pi0_aloha_sim": ("aloha_pi", 0, "Transfer cube", None, {}, 50),
        "pi0_droid": (None, 0, None, "droid", {}, 15),
        "pi05_droid": (None, 0, None, "droid", {}, 15),
        "pi0_libero": (None, 6, None, asset, {}, 10),
        "pi05_libero": (None, 0, None, asset, {}, 10),
    }


@pytest.mark.parametrize("robot", [*(make() for make in EMBODIMENTS.values()), my_arm(metadata={"a": [1, None]})])
def test_json_round_trip(robot, tmp_path):
    file = tmp_path / "robot.json"
    file.write_text(json.dumps(robot.to_dict()))
    assert get_embodiment(file) == robot
    assert get_embodiment(str(file)) == robot
    assert hash(get_embodiment(file)) == hash(robot)


def test_equality_ignores_earlier_warnings():
    robot = my_arm()
    with pytest.warns(UserWarning, match="extra"):
        robot.to_model(request(extra=1))
    assert robot == my_arm()
    assert Embodiment.from_dict(robot.to_dict()) == robot


def changed(path: list, value) -> dict:
    data = my_arm().to_dict()
    node = data
    for step in path[:-1]:
        node = node[step]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "Expected `object`, got `list`"),
        (changed(["colour"], "red"), "has unknown fields colour; known are name, cameras"),
        (changed(["actions"], None), "missing required field `actions`"),
        (changed(["name"], 3), "Expected `str`, got `int` at `name`"),
        (changed(["control_hz"], "fast"), r"Expected `.*float.*`, got `str` at `control_hz`"),
        (changed(["control_hz"], -1), "control_hz is -1; expected a positive"),
        (changed(["metadata"], [1]), "Expected `object`, got `list` at `metadata`"),
        (changed(["cameras"], "front"), "Expected `list`, got `str` at `cameras`"),
        (changed(["cameras", 1, "presence"], "maybe"), "'left_wrist_0_rgb': presence is 'maybe'.*required, optional"),
        (changed(["cameras", 1, "fps"], 30), r"has unknown fields cameras\.1\.fps; known are name, key"),
        (changed(["cameras", 0], "front"), r"Expected `object`, got `str` at `cameras\[0\]`"),
        (changed(["state", 0, "names"], [1, 2]), r"Expected `str`, got `int` at `state\[0\]\.names\[0\]`"),
        (changed(["actions", 2, "kind"], "relative"), "Action 'wrist': kind is 'relative'.*absolute, delta"),
        (changed(["actions", 2, "low"], "0"), r"got `str` at `actions\[2\]\.low`"),
        (changed(["actions", 2, "command"], "torque"), "command is 'torque'; expected one of position, velocity, incr"),
        (changed(["actions", 2, "max_step"], -1), "Action 'wrist': max_step is -1"),
        (changed(["hook"], "nobody"), r"no hook 'nobody'; known are \['aloha_pi'\]"),
    ],
)
def test_invalid_embodiment_files_are_errors(data, message, tmp_path):
    file = tmp_path / "robot.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        get_embodiment(file)
    assert str(file) in str(error.value)


def test_limits_are_saved_in_the_file(tmp_path):
    robot = my_arm(limits={"shoulder": {"low": -1.5, "high": 1.5}, "gripper": {"max_step": 0.1}})
    file = tmp_path / "robot.json"
    file.write_text(json.dumps(robot.to_dict()))
    assert get_embodiment(file) == robot
    assert robot.action_limits == {
        "low": [-1.5, None, None, None],
        "high": [1.5, None, None, None],
        "max_step": [None, None, None, 0.1],
    }
    # Unset limits are left out, as in files from before limits existed.
    assert robot.to_dict()["actions"][1] == {"name": "elbow", "unit": "", "kind": "delta", "command": None}
    assert my_arm().action_limits is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Camera("a", None), "a masked camera has no key, all others need one"),
        (lambda: Camera("a", "b", "masked"), "a masked camera has no key, all others need one"),
        (lambda: Camera(None, "b"), "only an ignored camera has none"),
        (lambda: Camera("a", "b", layout="bgr"), "layout is 'bgr'"),
        (lambda: Camera("a", "b", dtype="float16"), "dtype is 'float16'"),
        (lambda: StateKey("s", ()), "no names"),
        (lambda: StateKey("s", ("a",), units=("m", "m")), "1 names and 2 units"),
        (lambda: StateKey("s", ("a",), min_dim=2), "min_dim 2; expected 1 to 1"),
        (lambda: my_arm(metadata={"x": {1}}).to_dict(), "metadata can't be written as JSON"),
        (lambda: dataclasses.replace(my_arm(), cameras=()), "at least one camera"),
        (
            lambda: dataclasses.replace(my_arm(), cameras=(Camera("a", "x"), Camera("a", "y"))),
            "camera name a occurs more",
        ),
        (lambda: dataclasses.replace(my_arm(), cameras=(Camera("a", "state"),)), "key state occurs more"),
        (lambda: dataclasses.replace(my_arm(), state=(StateKey("s", ("a",)),)), "elbow, wrist are deltas.* only 1 dim"),
        (
            lambda: dataclasses.replace(droid(), state=(StateKey("s", ("a", "b"), 1), StateKey("t", ("c",)))),
            "only the last state may be shorter",
        ),
        (
            lambda: Embodiment.generic("g", cameras={"a": "b"}, state=["x"], actions=["x"], delta=["y"]),
            r"delta names \['y'\]",
        ),
        (lambda: generic(state=["a", "b", "a"]), r"names of state 'state' have a more than once"),
        (lambda: generic(actions=["b", "b", "a"]), r"actions have b more than once; rename all but one"),
        (
            lambda: generic(actions=["b", "a"], delta=["b", "a"]),
            "action 'b' is a delta at index 0, but the state has 'b' at index 1 and 'a' at 0; .*different joints",
        ),
        (lambda: get_embodiment(3), "found a value of type int"),
        (lambda: ActionDim("a", kind="velocity"), "kind is 'velocity'"),
        (lambda: my_arm(command={"ankle": "effort"}), r"command names \['ankle'\]"),
        (lambda: my_arm(command="torque"), "Action 'shoulder': command is 'torque'"),
        (lambda: ActionDim("a", low=1, high=1), "low is 1 and high 1; low must be less than high"),
        (lambda: ActionDim("a", high=float("nan")), "high is nan; expected a finite number"),
        (lambda: ActionDim("a", max_step=0.0), "max_step is 0.0; expected a positive number"),
        (lambda: my_arm(limits={"shoulder": {"low": 0}, "ankle": {"low": 0}}), r"limits names \['ankle'\]"),
        (lambda: my_arm(limits={"shoulder": {"min": 0}}), r"limits have \['min'\]; expected low, high, max_step"),
    ],
)
def test_invalid_embodiments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cameras": ["front"]}, "Expected `object`, got `list` at `cameras`"),
        ({"cameras": {"base_0_rgb": 0}}, "Expected `str`, got `int` at `cameras"),
        ({"state": 7}, "Embodiment 'arm': Expected `list`, got `int` at `state`"),
        ({"state": "a"}, "Expected `list`, got `str` at `state`"),
        ({"actions": [1, 2]}, "Expected `str`, got `int` at `actions"),
        ({"delta": "a"}, "Expected `list`, got `str` at `delta`"),
        ({"delta": True}, "Expected `list`, got `bool` at `delta`"),
        ({"command": ["position"]}, r"Expected `.*str.*`, got `list` at `command`"),
        ({"command": ""}, "command is ''; expected one of position"),
        ({"limits": []}, r"Expected `object.*`, got `list` at `limits`"),
        ({"limits": {"a": {"low": "x"}}}, "Action 'a': low is x; expected a finite number"),
        ({"limits": [(0, 1)]}, r"Expected `object.*`, got `list` at `limits`"),
        ({"limits": {"a": (0, 1)}}, "Expected `object`, got `list` at `limits"),
    ],
)
def test_generic_arguments_of_wrong_type_are_errors(fields, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks run only in tests
    with pytest.raises(ValueError, match=message):
        generic(**fields)


def test_names_in_a_file_are_checked(tmp_path):
    file = tmp_path / "robot.json"
    crossed = dataclasses.replace(generic(delta=["a"]), state=(StateKey("state", ("b", "a")),))
    file.write_text(json.dumps(crossed.to_dict()))
    with pytest.raises(ValueError, match=r"robot\.json: .* 'a' is a delta at index 0, .* 'a' at index 1 and 'b' at 0"):
        get_embodiment(file)


def test_other_delta_names_and_absolute_actions_are_accepted():
    assert generic(actions=["b", "a"]).action_mask == (False, False)
    assert generic(actions=["delta_b", "a"], delta=["delta_b"]).action_mask == (True, False)


def test_unknown_embodiment_names_are_errors(tmp_path):
    with pytest.raises(KeyError, match="Unknown embodiment 'alhoa'; known are aloha, droid, libero, metaworld"):
        get_embodiment("alhoa")
    with pytest.raises(FileNotFoundError, match=r"robot\.json"):
        get_embodiment(tmp_path / "robot.json")


def test_nested_observation_survives_an_npz_file(tmp_path):
    robot = get_embodiment("so101")
    observation, file = robot.example_observation(), tmp_path / "observation.npz"
    np.savez(file, **flatten(observation))
    assert robot.to_model(read_npz(file))["state"].tolist() == robot.to_model(observation)["state"].tolist()
    np.savez(file, **observation)
    with pytest.raises(ValueError, match=r"np\.savez\(PATH, \*\*torchpi\.robots\.flatten"):
        read_npz(file)
