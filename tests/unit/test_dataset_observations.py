"""Conversion of a dataset's frame to the robot's observation, for every kind of embodiment."""

import numpy as np
import pytest

from torchpi.data import LeRobotDataset, to_observation
from torchpi.robots import ActionDim, Camera, Embodiment, StateKey, get_embodiment


def some_frame(cameras, s, a, *, horizon=5):
    rng = np.random.default_rng(0)
    return {
        **{f"observation.images.{name}": rng.integers(0, 256, (6, 8, 3), np.uint8) for name in cameras},
        "observation.state": rng.uniform(0, 1, s).astype(np.float32),
        "action": rng.uniform(0, 1, (horizon, a)).astype(np.float32),
        "action_is_pad": np.zeros(horizon, bool),
        "timestamp": np.float32(0.5),
        "task_index": np.int64(1),
        "task": "close the drawer",
    }


ROBOTS = [
    ("metaworld", ["base", "wrist"], 4, 4),
    ("aloha", ["cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low"], 14, 14),
    ("droid", ["exterior_image_1_left", "wrist_image_left"], 8, 8),
    ("libero", ["image", "wrist_image"], 8, 7),
    ("libero", ["image", "wrist_image"], 7, 7),  # only the last part of a state may be shorter
]


@pytest.mark.parametrize(("name", "cameras", "s", "a"), ROBOTS)
def test_observation_is_accepted_by_the_embodiment(name, cameras, s, a):
    embodiment, frame = get_embodiment(name), some_frame(cameras, s, a)
    sample = embodiment.to_model(to_observation(frame, embodiment))
    for camera in embodiment.read_cameras:
        if camera.key is not None:
            key = f"observation.images.{camera.key.replace('/', '.').split('.')[-1]}"
            assert np.array_equal(sample["image"][camera.name], frame[key])
            assert sample["image_mask"][camera.name]
    assert sample["prompt"] == "close the drawer"
    assert sample["state"].shape == (s,)
    assert sample["actions"].shape == (5, a)
    if embodiment.hook is None:
        assert np.array_equal(sample["state"], frame["observation.state"])
        assert sample["state"].dtype == np.float32
        assert np.array_equal(sample["actions"], frame["action"])


def test_observation_has_the_robots_keys_and_layouts():
    embodiment = Embodiment(
        "arm",
        cameras=(
            Camera("base_0_rgb", "images.front", layout="chw", dtype="float32"),
            Camera("left_wrist_0_rgb", "wrist", "optional"),
            Camera("right_wrist_0_rgb", None, "masked"),
            Camera(None, "top", "ignored"),
        ),
        state=(StateKey("arm.joints", ("a", "b")), StateKey("gripper", ("c",))),
        actions=(ActionDim("a"), ActionDim("b")),
    )
    frame = some_frame(["front", "top", "side"], 3, 2)
    observation = to_observation(frame, embodiment)
    assert set(observation) == {"images", "arm", "gripper", "actions", "prompt"}  # no optional camera: left out
    front = observation["images"]["front"]
    assert front.dtype == np.float32
    assert front.shape == (3, 6, 8)
    assert np.array_equal(embodiment.to_model(observation)["image"]["base_0_rgb"], frame["observation.images.front"])
    assert np.array_equal(observation["arm"]["joints"], frame["observation.state"][:2])
    assert np.array_equal(observation["gripper"], frame["observation.state"][2:])
    assert np.array_equal(observation["actions"], frame["action"])


def test_frames_of_a_dataset_become_observations(golden_root):
    dataset = LeRobotDataset(golden_root / "datasets/lerobot_v3_image", action_horizon=3)
    embodiment = get_embodiment("metaworld")
    sample = embodiment.to_model(to_observation(dataset[15], embodiment))
    assert np.array_equal(sample["image"]["base_0_rgb"], dataset[15]["observation.images.base"])
    assert sample["prompt"] == "Press a button from the top"
    assert "actions" not in to_observation({k: v for k, v in dataset[15].items() if k != "action"}, embodiment)


@pytest.mark.parametrize(
    ("cameras", "s", "a", "error", "message"),
    [
        (["base"], 4, 4, KeyError, "no camera for wrist, which embodiment 'metaworld' requires; its cameras are base"),
        ([], 4, 4, KeyError, "its cameras are none"),
        (["base", "wrist"], 5, 4, ValueError, "state has 5 dimensions; embodiment 'metaworld' has 4: hand_x, hand_y"),
        (["base", "wrist"], 4, 3, ValueError, "action has 3 dimensions; embodiment 'metaworld' has 4: delta_x"),
        (["base", "wrist", "left.base"], 4, 4, ValueError, "two cameras that end in base"),
    ],
)
def test_dataset_of_another_robot_is_an_error(cameras, s, a, error, message):
    with pytest.raises(error, match=message):
        to_observation(some_frame(cameras, s, a), get_embodiment("metaworld"))


def test_missing_state_is_an_error():
    frame = some_frame(["base", "wrist"], 4, 4)
    del frame["observation.state"]
    with pytest.raises(KeyError, match=r"no observation\.state; it has .*action"):
        to_observation(frame, get_embodiment("metaworld"))
