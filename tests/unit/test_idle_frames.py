"""Idle frames: found in the middle and at the ends of episodes, by threshold and duration."""

import numpy as np
import pytest

from torchpi.data import LeRobotDataset, idle_frames

FPS = 10
ONE_SECOND = FPS


def frames(state, action, lengths=None):
    """A dataset of one state and one action dimension."""
    columns = {
        "observation.state": np.asarray(state, np.float32).reshape(len(state), -1),
        "action": np.asarray(action, np.float32).reshape(len(action), -1),
    }
    dataset = object.__new__(LeRobotDataset)
    lengths = tuple(lengths or [len(state)])
    vars(dataset).update(columns=columns, episode_lengths=lengths, _ends=np.cumsum(lengths), path="some_set", fps=FPS)
    return dataset


def there_and_wait():
    """Moves for 3 s, rests for 4 s, moves for 3 s."""
    return np.concatenate([np.linspace(0, 1, 30), np.ones(40), np.linspace(1, 0, 30)])


def test_rest_is_idle_until_a_second_before_movement_continues():
    path = there_and_wait()
    idle = idle_frames(frames(path, path))
    assert np.flatnonzero(idle).tolist() == list(range(29, 70 - ONE_SECOND + 2))  # the rest lasts from 29 to 70


def test_a_short_rest_is_not_idle():
    path = np.concatenate([np.linspace(0, 1, 30), np.ones(ONE_SECOND - 3), np.linspace(1, 0, 30)])
    assert not idle_frames(frames(path, path)).any()
    assert idle_frames(frames(path, path), seconds=0.5).any()


def test_a_constant_velocity_is_not_idle():
    """The action is the same in all frames, and the state moves."""
    state = np.linspace(0, 1, 100)
    assert not idle_frames(frames(state, np.full(100, 0.3))).any()
    assert idle_frames(frames(np.zeros(100), np.full(100, 0.3))).all()  # blocked by a wall


def test_an_action_that_changes_is_not_idle():
    """The arm has not begun to follow."""
    assert not idle_frames(frames(np.zeros(100), np.linspace(0, 1, 100))).any()


def test_every_dimension_has_to_rest():
    path = there_and_wait()
    gripper = np.zeros(100)
    gripper[50:] = 1  # closes in the middle of the rest
    idle = idle_frames(frames(np.stack([path, gripper], axis=1), path))
    assert not idle[50 - ONE_SECOND + 1 : 50].any()
    assert idle[30 : 50 - ONE_SECOND].all()
    assert idle[50:60].all()


def test_noise_is_no_movement():
    rng = np.random.default_rng(0)
    path = there_and_wait()
    idle = idle_frames(frames(path + rng.uniform(-0.004, 0.004, 100), path))
    assert idle[31:59].all()
    assert not idle_frames(frames(path + rng.uniform(-0.1, 0.1, 100), path)).any()
    assert idle_frames(frames(path + rng.uniform(-0.1, 0.1, 100), path), threshold=0.3)[31:59].all()


def test_episodes_are_apart_and_their_ends_count():
    """The last second of an episode is judged together; a shorter episode has nothing that could be judged."""
    moving, resting = np.linspace(0, 1, 30), np.zeros(30)
    path = np.concatenate([moving, resting, np.ones(ONE_SECOND - 1)])
    idle = idle_frames(frames(path, path, [30, 30, ONE_SECOND - 1]))
    assert np.array_equal(idle, np.repeat([False, True, False], [30, 30, ONE_SECOND - 1]))


@pytest.mark.parametrize("arguments", [{"threshold": -0.1}, {"seconds": 0.0}])
def test_impossible_arguments_are_errors(arguments):
    with pytest.raises(ValueError, match="Expected threshold ≥ 0 and seconds > 0"):
        idle_frames(frames(np.zeros(3), np.zeros(3)), **arguments)


def test_lerobot_dataset_has_idle_frames(golden_root):
    dataset = LeRobotDataset(golden_root / "datasets/lerobot_v21", action_horizon=1)
    assert idle_frames(dataset).shape == (len(dataset),)
