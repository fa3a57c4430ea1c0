"""A dataset's dimension names against the robot's: reordered or refused, never mixed up."""

import json
import warnings

import numpy as np
import pytest

from torchpi.cli import main
from torchpi.data import LeRobotDataset, LeRobotWriter, compute_norm_stats, to_observation
from torchpi.data.names import dimension_names, order_of
from torchpi.robots import Embodiment

SO = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
JOINTS = ("pan", "lift", "elbow", "gripper")
POSE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")

SAME_ORDER = [
    (SO, SO),
    ([f"{name}.pos" for name in SO], SO),
    ([f"main_{name}" for name in SO], SO),
    ([name.replace("_", "-").upper() for name in SO], SO),
    ([f"motor_{i}" for i in range(6)], SO),  # generic names
    ([str(i) for i in range(6)], SO),
    (list("abcdef"), SO),
    (
        ["left/waist", "left/elbow", "right/waist", "right/elbow"],
        ["left_waist", "left_elbow", "right_waist", "right_elbow"],
    ),
    (["x", "y", "z", "gripper"], ["hand_x", "hand_y", "hand_z", "gripper"]),
    (["dx", "dy", "dz", "gripper"], ["delta_x", "delta_y", "delta_z", "gripper"]),
    # DROID's names, counted from 0 and joined from two columns
    ([*(f"joint_{i}" for i in range(7)), "gripper"], [*(f"joint_{i}_velocity" for i in range(1, 8)), "gripper"]),
    (
        [*(f"joint_position_{i}" for i in range(7)), "gripper_position"],
        [*(f"joint_{i}" for i in range(1, 8)), "gripper"],
    ),
    # LIBERO's names from different converters
    (
        [*POSE[:3], "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"],
        [*POSE, "finger_left", "finger_right"],
    ),
    ([*POSE[:3], "roll", "pitch", "yaw", "pad", "gripper"], [*POSE, "finger_left", "finger_right"]),
]
OTHER_ORDER = [
    (["j3", "j2", "j1", "j0"], ["j0", "j1", "j2", "j3"]),
    ([f"{name}.pos" for name in SO[::-1]], SO),
    (["right_a", "right_b", "left_a", "left_b"], ["left_a", "left_b", "right_a", "right_b"]),
    (["gripper", *(f"joint_{i}" for i in range(7))], [*(f"joint_{i}" for i in range(1, 8)), "gripper"]),
    (["kLeftElbow", "kLeftShoulderPitch"], ["left_shoulder_pitch", "left_elbow"]),
    (["a.vel", "b.vel", "a.pos", "b.pos"], ["a_position", "a_velocity", "b_position", "b_velocity"]),
]
OTHER_JOINTS = [
    ([*SO[:3], "wrist_yaw", *SO[4:]], SO, "index 3 is 'wrist_yaw', not 'wrist_flex'"),
    (
        ["shoulder_pan", "elbow_flex", "shoulder_lift", *SO[3:5], "thumb"],
        SO,
        "has the index 2, not 1, and",
    ),
    ([*POSE[:3], "roll", "pitch", "yaw"], SO, "index 0 is 'x', not 'shoulder_pan'"),
    ([*POSE, "gripper"], [*(f"joint_{i}" for i in range(6)), "gripper"], "'x', not 'joint_0'"),
    (["left_a", "left_b"], ["right_a", "right_b"], "'left_a' is not 'right_a'"),
    (["joint_1.pos", "joint_2.pos"], ["joint_1_velocity", "joint_2_velocity"], "'joint_1.pos' is not"),
    (["y", "x", "roll"], ["delta_x", "delta_y", "delta_axis_angle_x"], "'x' has the index 1, not 0"),
]


@pytest.mark.parametrize(("found", "expected"), SAME_ORDER)
def test_order_is_kept_if_names_agree_or_are_generic(found, expected):
    assert order_of(found, expected) == list(range(len(expected)))


@pytest.mark.parametrize(("found", "expected"), OTHER_ORDER)
def test_same_names_in_another_order_are_reordered(found, expected):
    def letters(name):
        return "".join(c for c in name.lower().removeprefix("k") if c.isalpha())

    order = order_of(found, expected)
    assert sorted(order) == list(range(len(expected)))
    assert order != sorted(order)
    for index, name in zip(order, expected, strict=True):  # an independent, simpler comparison
        assert letters(name).startswith(letters(found[index]).removesuffix("pos").removesuffix("vel"))


@pytest.mark.parametrize(("found", "expected", "message"), OTHER_JOINTS)
def test_names_of_other_joints_are_errors(found, expected, message):
    with pytest.raises(ValueError, match=message):
        order_of(found, expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([["a", "b"]], ("a", "b")),
        ({"motors": ["a", "b"]}, ("a", "b")),
        ({"axes": [["a", "b"]]}, ("a", "b")),
        ({"left": ["a"], "right": ["a"]}, ("left_a", "right_a")),
        ({"b": 1, "a": 0}, ("a", "b")),
        ({"motors": ["a", "b"], "units": ["rad", "m"]}, ("a", "b")),
        (["state"], None),
        (["a", "b", "c"], ("a", "b")),
        (None, None),
        ({}, None),
    ],
)
def test_names_are_read_from_lists_and_groups(names, expected):
    assert dimension_names({"names": names}, 2) == expected


def robot(**fields):
    arguments = {"state": JOINTS, "actions": JOINTS, "delta": JOINTS[:3], "control_hz": 10, **fields}
    return Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, **arguments)


def write_set(path, *, state=JOINTS, action=JOINTS):
    """Write the same motions in any order of names: joint i of frame t is at 10 * t + i, its action is 0.5 more."""
    with LeRobotWriter(path, fps=10, cameras={"front": (4, 4, 3)}, state_names=state, action_names=action) as writer:
        for _ in range(2):
            for t in range(6):
                values = {name: 10 * t + i for i, name in enumerate(JOINTS)}
                frame = {"observation.images.front": np.zeros((4, 4, 3), np.uint8)}
                frame["observation.state"] = np.array([values.get(name, 0) for name in state])
                writer.add_frame({**frame, "action": np.array([values.get(name, 0) + 0.5 for name in action])})
            writer.save_episode("go")
    return path


@pytest.mark.parametrize(
    ("state", "action"),
    [(JOINTS[::-1], JOINTS[::-1]), (JOINTS, ("gripper", "pan", "lift", "elbow")), (JOINTS[::-1], JOINTS)],
)
def test_dataset_is_read_in_robot_order(state, action, tmp_path):
    path = write_set(tmp_path / "set", state=state, action=action)
    with pytest.warns(UserWarning, match=r"embodiment 'arm' has pan, lift, elbow, gripper\. They are put into that"):
        dataset = LeRobotDataset(path, action_horizon=3, embodiment=robot())
    assert dataset.state_names == dataset.action_names == JOINTS
    assert dataset[2]["observation.state"].tolist() == [20, 21, 22, 23]
    assert dataset[2]["action"][1].tolist() == [30.5, 31.5, 32.5, 33.5]
    sample = robot().to_model(to_observation(dataset[2], robot()))
    assert sample["actions"][0].tolist() == [0.5, 0.5, 0.5, 23.5]  # relative to the same joint


def test_reordered_dataset_has_the_same_statistics(tmp_path):
    expected = compute_norm_stats(
        LeRobotDataset(write_set(tmp_path / "set"), action_horizon=3), robot(), action_horizon=3
    )
    plain = LeRobotDataset(write_set(tmp_path / "other", state=JOINTS[::-1], action=JOINTS[::-1]), action_horizon=3)
    assert plain.state_names == JOINTS[::-1]  # without a robot, in the stored order
    with pytest.warns(UserWarning, match="put into that order"):
        found = compute_norm_stats(plain, robot(), action_horizon=3)
    for key, stats in expected.items():
        assert np.array_equal(found[key].mean, stats.mean)
        assert np.array_equal(found[key].q99, stats.q99)


def test_stats_command_warns_once_about_reordering(tmp_path, capsys):
    (tmp_path / "arm.json").write_text(json.dumps(robot().to_dict()))
    path = write_set(tmp_path / "set", state=JOINTS[::-1], action=JOINTS[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside tests
        main(["stats", str(path), "--embodiment", str(tmp_path / "arm.json"), "--action-horizon", "3", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["state"]["mean"] == [25, 26, 27, 28]
    assert err.count("observation.state has gripper, elbow, lift, pan") == 1
    assert err.count("action has gripper") == 1


@pytest.mark.parametrize("silent", [None, ["motor_0", "motor_1", "motor_2", "motor_3"]])
@pytest.mark.parametrize("column", ["observation.state", "action"])
def test_reordering_only_one_of_state_and_action_is_an_error(column, silent, tmp_path):
    path = write_set(tmp_path / "set", state=JOINTS[::-1], action=JOINTS[::-1])
    rename_dimensions(path, {column: silent})
    with (
        pytest.warns(UserWarning, match="put into that order"),
        pytest.raises(ValueError, match=rf"names of {column} \(.*\) don't tell whether it has that order"),
    ):
        LeRobotDataset(path, action_horizon=3, embodiment=robot())
    LeRobotDataset(rename_dimensions(path, dict.fromkeys(["observation.state", "action"], silent)), action_horizon=3)


def test_too_short_list_of_names_can_contradict_the_robot(tmp_path):
    path = write_set(tmp_path / "set")
    LeRobotDataset(rename_dimensions(path, {"action": ["pan", "lift", "elbow"]}), action_horizon=3, embodiment=robot())
    rename_dimensions(path, {"action": ["lift", "pan", "elbow"]})
    with pytest.raises(ValueError, match="'pan' has the index 1, not 0"):
        LeRobotDataset(path, action_horizon=3, embodiment=robot())


def rename_dimensions(path, names):
    info = json.loads((path / "meta" / "info.json").read_text())
    for column, each in names.items():
        info["features"][column]["names"] = each
    (path / "meta" / "info.json").write_text(json.dumps(info))
    return path


def test_other_joints_are_an_error_with_both_lists(tmp_path):
    path = write_set(tmp_path / "set", state=("pan", "lift", "wrist", "gripper"))
    with pytest.raises(ValueError, match=r"state has pan, lift, wrist, gripper; embodiment 'arm' has pan, lift, elbow"):
        LeRobotDataset(path, action_horizon=3, embodiment=robot())


def test_delta_action_relative_to_another_joint_is_an_error(tmp_path):
    path = write_set(tmp_path / "set", action=("gripper", "pan", "lift", "elbow"))
    unnamed = [
        f"motor_{i}" for i in range(4)
    ]  # generic names for the robot; those of the dataset contradict each other
    arm = robot(state=unnamed, actions=unnamed, delta=unnamed[:3])
    with pytest.raises(ValueError, match="actions gripper, pan, lift would be taken relative to the state's pan, lift"):
        LeRobotDataset(path, action_horizon=3, embodiment=arm)
    LeRobotDataset(path, action_horizon=3, embodiment=robot(state=unnamed, actions=unnamed, delta=()))
