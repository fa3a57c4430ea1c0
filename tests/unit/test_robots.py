"""Robots in assets/robots: completeness, names, statistics and documentation pages."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import torchpi
from torchpi.config import GemmaConfig, VisionConfig
from torchpi.data.names import order_of
from torchpi.data.observations import to_observation
from torchpi.policy import Policy
from torchpi.robots import get_embodiment
from torchpi.robots.commands import hold_commands
from torchpi.robots.presets import RELEASED, ROBOT_FILES
from torchpi.transforms import Normalization, NormStats

NAMES = (
    *("aloha", "aloha2", "yam", "droid", "droid_joint_position", "franka", "franka_eef", "libero", "so100", "so101"),
    *("bi_so101", "koch", "ur5e", "xarm6", "xarm7", "piper", "arx5", "unitree_g1", "widowx"),
)
SO101 = [
    f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]


@pytest.fixture(scope="module")
def model():
    sizes = {"depth": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    config = torchpi.Pi0Config(
        pi05=True, paligemma_variant=GemmaConfig(width=8, mlp_dim=8, **sizes),
        action_expert_variant=GemmaConfig(width=8, mlp_dim=8, **sizes),
        siglip_variant=VisionConfig(width=8, depth=1, mlp_dim=8, num_heads=1, patch=14),
        action_dim=32, action_horizon=2, max_token_len=None, vocab_size=512, image_size=28,
    )  # fmt: skip
    torch.manual_seed(0)
    return torchpi.Pi0(config).eval()


@pytest.mark.parametrize("name", [*NAMES, *sorted(set(ROBOT_FILES) - set(NAMES))])
def test_robot_is_complete_and_its_example_runs_through_a_policy(name, model, golden_root):
    robot = get_embodiment(name)
    assert (robot.name, robot.control_hz > 0, robot.execute_steps > 0) == (name, True, True)
    robot.check_names()
    if name != "metaworld":  # its units are not stated
        assert all(robot.state_units)
        assert all(action.unit for action in robot.actions)
    assert all(action.command for action in robot.actions)
    for action in robot.actions:
        assert (action.kind == "delta") <= (action.command == "position")  # deltas make sense only for positions
        assert (action.kind == "delta") <= ("gripper" not in action.name and "Hand" not in action.name)
        assert (action.low is None) == (action.high is None)
    # The control loop can hold the robot still, except for grippers controlled by effort.
    holds = zip(robot.actions, hold_commands(robot), strict=True)
    assert [action.name for action, hold in holds if hold is None and action.command != "effort"] == []
    comment = json.loads(ROBOT_FILES[name].read_text("utf-8"))["comment"]
    assert list(comment) == ["title", "interface", "limits", "rate"]
    stats = NormStats(np.zeros(32), np.ones(32), -np.ones(32), np.ones(32))
    policy = Policy(
        model, robot, norm_stats={"state": stats, "actions": stats},
        normalization=dict.fromkeys(("state", "actions"), Normalization("quantile", "openpi")),
        tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
    )  # fmt: skip
    actions = policy.infer(policy.example_observation(), num_steps=1)["actions"]
    assert actions.shape == (2, robot.action_size)
    assert np.isfinite(actions).all()


@pytest.mark.parametrize(
    ("name", "expected", "unit"),
    [
        ("so101", SO101, "deg"),
        ("so100", SO101, "deg"),
        ("so101_normalized", SO101, "-100 to 100 of the calibrated range"),
        ("koch", SO101, "-100 to 100 of the calibrated range"),
        ("koch_degrees", SO101, "deg"),
        ("bi_so101", [f"{side}_{name}" for side in ("left", "right") for name in SO101], "deg"),
        (
            "yam",
            [f"{s}_{j}.pos" for s in ("left", "right") for j in (*(f"joint_{i}" for i in range(6)), "gripper")],
            "rad",
        ),
    ],
)
def test_joint_names_equal_lerobots(name, expected, unit):
    robot = get_embodiment(name)
    assert list(robot.state_names) == list(robot.action_names) == expected
    assert robot.state_units[0] == robot.actions[0].unit == unit


@pytest.mark.parametrize(
    ("robot", "names", "order"),
    [
        ("koch", [f"main_{name.removesuffix('.pos')}" for name in SO101], range(6)),  # LeRobot before 0.3
        ("so101", [SO101[i] for i in (5, 0, 1, 2, 3, 4)], [1, 2, 3, 4, 5, 0]),
        ("yam", [f"{s}_{j}.pos" for s in ("right", "left") for j in (*(f"joint_{i}" for i in range(1, 7)), "gripper")],
         [*range(7, 14), *range(7)]),
        ("ur5e", [*sorted(get_embodiment("ur5e").state_names[:6]), "gripper"], [2, 1, 0, 3, 4, 5, 6]),  # ROS
        ("franka", [*(f"panda_joint{i}" for i in range(1, 8)), "gripper"], range(8)),
        ("piper", [*(f"joint{i}.pos" for i in range(1, 7)), "gripper.pos"], range(7)),
    ],
)  # fmt: skip
def test_dataset_names_map_to_robot_names(robot, names, order):
    assert order_of(names, get_embodiment(robot).state_names) == list(order)


def test_lerobot_frame_is_a_valid_so101_request():
    robot = get_embodiment("so101")
    state = np.array([1.0, -20, 30, -40, 50, 60], np.float32)
    frame = {
        "observation.images.front": np.full((4, 6, 3), 7, np.uint8),
        "observation.state": state,
        "action": np.stack([state + 1, state + 2]),
        "task": "pick it up",
    }
    sample = robot.to_model(to_observation(frame, robot))
    assert sample["image_mask"] == {"base_0_rgb": True, "left_wrist_0_rgb": False, "right_wrist_0_rgb": False}
    np.testing.assert_array_equal(sample["state"], state)
    np.testing.assert_array_equal(sample["actions"], [[1, 1, 1, 1, 1, 61], [2, 2, 2, 2, 2, 62]])
    np.testing.assert_array_equal(robot.from_model(sample["actions"], sample["state"]), frame["action"])


@pytest.mark.parametrize(
    ("name", "asset", "hz", "grippers"),
    [
        ("franka", "franka", 20, [7]),
        ("ur5e", "ur5e", 20, [6]),
        ("ur5e_dual", "ur5e_dual", 20, [6, 13]),
        ("arx5", "arx", 50, [6, 13]),
    ],
)
def test_interface_of_base_statistics_equals_openpis(name, asset, hz, grippers):
    """openpi, docs/norm_stats.md: joints in rad, left arm and gripper, right arm and gripper, 0 open to 1 closed."""
    robot = get_embodiment(name)
    assert (robot.asset_id, robot.control_hz, robot.hook) == (asset, hz, None)
    for i, (unit, action) in enumerate(zip(robot.state_units, robot.actions, strict=True)):
        assert (unit, action.unit, action.command) == (action.unit, unit, "position")
        assert (unit, action.kind) == (("0 open, 1 closed", "absolute") if i in grippers else ("rad", "delta"))
    if len(grippers) == 2:
        assert [name[:4] for name in robot.action_names] == ["left"] * 7 + ["righ"] * 7
    # Nothing is converted: the statistics are in the robot's units.
    state = np.linspace(0.1, 0.9, len(robot.state_names))
    parts = {
        part.key: values
        for part, values in zip(robot.state, np.split(state, [6]) if name == "ur5e" else [state], strict=True)
    }
    image = np.zeros((4, 4, 3), np.uint8)
    sample = robot.to_model({robot.read_cameras[0].key: image, **parts, "prompt": "go"})
    np.testing.assert_array_equal(sample["state"], state)


def test_aloha_and_droid_use_statistics_of_their_interfaces():
    aloha, droid = get_embodiment("pi0_aloha_pen_uncap"), get_embodiment("droid")
    assert (aloha.asset_id, aloha.hook, sum(aloha.action_mask)) == ("trossen", "aloha_pi", 12)
    assert (droid.asset_id, {action.command for action in droid.actions[:7]}) == ("droid", {"velocity"})
    # Other interfaces of the same arms have no statistics.
    for name in ("aloha2", "droid_joint_position", "franka_eef"):
        assert get_embodiment(name).asset_id is None
    # Shoulder and elbow of both arms have the opposite sign.
    state = np.zeros(14)
    state[[1, 2, 8, 9, 3]] = 0.5
    images = {"cam_high": np.zeros((3, 4, 4), np.uint8)}
    converted = aloha.to_model({"state": state, "images": images, "prompt": "go"})["state"]
    np.testing.assert_array_equal(converted[[1, 2, 8, 9, 3]], [-0.5, -0.5, -0.5, -0.5, 0.5])


def test_released_statistics_name_known_robots():
    for asset, entry in RELEASED["statistics"].items():
        assert entry["robot"] in ROBOT_FILES
        assert get_embodiment(entry["robot"]).asset_id in (
            asset,
            None,
        )  # aloha and libero: set by their policies' embodiments


def test_robot_pages_match_the_data():
    script = pathlib.Path(__file__).parents[2] / "scripts/robot_pages.py"
    shown = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, ""), f"{shown.stdout}{shown.stderr}run scripts/robot_pages.py"


def test_copied_robot_file_is_a_valid_embodiment(tmp_path):
    data = json.loads(ROBOT_FILES["so101"].read_text("utf-8"))
    (tmp_path / "mine.json").write_text(json.dumps(data | {"name": "mine"}))
    assert get_embodiment(tmp_path / "mine.json") == dataclasses.replace(get_embodiment("so101"), name="mine")
    (tmp_path / "mine.json").write_text(json.dumps(data | {"rate": 30}))
    with pytest.raises(ValueError, match=r"mine\.json has unknown fields rate; known are name, cameras"):
        get_embodiment(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("found", "nearest"),
    [("so-101", "so101"), ("SO101", "so101"), ("ur5", "ur5e"), ("xarm", "xarm7|xarm6"), ("g1", None)],
)
def test_unknown_name_error_lists_robots_and_the_closest(found, nearest):
    hint = rf"give a JSON file\. Did you mean ({nearest})\?" if nearest else r"give a JSON file\.'?\"?$"
    with pytest.raises(KeyError, match=hint):
        get_embodiment(found)
