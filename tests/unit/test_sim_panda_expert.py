"""Expert of LIBERO and robosuite: grasps and control law without a simulator, recordings with one."""

import json

import numpy as np
import pytest
from sim_helpers import require_simulator

from torchpi.data import LeRobotDataset
from torchpi.sim import make_environment
from torchpi.sim.panda_expert import Boxes, Grasp, Servo, grasps_of, rotation_vector
from torchpi.sim.record import RECORDING_FILE, record


def box(center, size, yaw=0.0):
    cos, sin = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return Boxes(np.array([center], float), rotation[None], np.array([size], float) / 2)


def best_of(boxes):
    return min(grasps_of(boxes.corners.reshape(-1, 3)), key=lambda item: item[0])[1]


def fingers(grasp):
    """Direction of the line between the fingers."""
    return grasp.rotation[:, 0]


def test_narrow_object_is_held_at_its_middle_near_the_top():
    grasp = best_of(box((0.1, -0.2, 0.07), (0.04, 0.04, 0.14)))
    np.testing.assert_allclose(grasp.position, [0.1, -0.2, 0.14 - 0.026], atol=1e-9)  # the hand reaches no deeper
    np.testing.assert_allclose(fingers(grasp), [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(grasp.rotation[:, 2], [0, 0, -1], atol=1e-9)


def test_flat_object_is_held_above_its_support():
    grasp = best_of(box((0, 0, 0.009), (0.04, 0.07, 0.018)))
    assert grasp.position[2] >= 0.012  # the pads would touch the floor and jam


def test_long_object_is_held_across():
    grasp = best_of(box((0, 0, 0.03), (0.03, 0.2, 0.06)))
    assert abs(np.dot(fingers(grasp), [1, 0, 0])) > 0.85


def test_turned_object_turns_the_gripper():
    grasp = best_of(box((0, 0, 0.03), (0.2, 0.03, 0.06), yaw=np.deg2rad(30)))
    assert np.rad2deg(grasp.yaw) == pytest.approx(30)


def test_wide_object_is_held_by_its_rim():
    angles = np.arange(0, 2 * np.pi, np.pi / 12)
    ring = np.stack([0.053 * np.cos(angles), 0.053 * np.sin(angles), np.full_like(angles, 0.06)], axis=1)
    corners = np.concatenate([ring, ring * [0.5, 0.5, 0]])
    for _, grasp in grasps_of(corners):
        across = grasp.position[:2]
        assert np.linalg.norm(across) == pytest.approx(0.051, abs=2e-3)
        assert abs(np.dot(across / np.linalg.norm(across), fingers(grasp)[:2])) == pytest.approx(1)  # astride the rim


def test_each_retry_goes_deeper():
    corners = box((0, 0, 0.05), (0.04, 0.04, 0.1)).corners.reshape(-1, 3)
    first, second = grasps_of(corners)[0][1], grasps_of(corners, deeper=0.004)[0][1]
    assert first.position[2] - second.position[2] == pytest.approx(0.004)


def test_collisions_of_fingers_and_hand_are_counted():
    grasp = Grasp(np.array([0, 0, 0.1]), yaw=0.0)
    free, next_to, above = (box(center, (0.05,) * 3) for center in ((0.3, 0, 0.1), (0, 0.06, 0.1), (0, 0, 0.17)))
    assert grasp.collisions(free, (0, 0.02)) == 0
    assert grasp.collisions(next_to, (0,)) > 0
    assert grasp.collisions(above, (0,)) > 0
    turned = Grasp(grasp.position, yaw=np.pi / 2)  # the fingers are then along x
    assert turned.collisions(next_to, (0,)) < grasp.collisions(next_to, (0,))


def test_path_rises_over_boxes_near_it():
    boxes = box((0.2, 0.03, 0.1), (0.02, 0.02, 0.2))
    assert boxes.top_along(np.zeros(3), np.array([0.4, 0, 0]), reach=0.05) == pytest.approx(0.2)
    assert boxes.top_along(np.zeros(3), np.array([0.4, 0, 0]), reach=0.01) == -np.inf


def test_servo_keeps_the_direction_and_its_speed():
    action = Servo()(np.array([0.3, -0.1, 0.05]), np.zeros(3), -1.0, speed=0.8)
    np.testing.assert_allclose(action[:3] / action[0], [1, -1 / 3, 1 / 6])
    assert np.abs(action[:3]).max() == pytest.approx(0.8)
    np.testing.assert_array_equal(action[3:], [0, 0, 0, -1])


def test_servo_pushes_harder_against_friction():
    servo, error = Servo(), np.array([0.01, 0, 0])
    pushes = [servo(error, np.zeros(3), 1.0, speed=1.0)[0] for _ in range(20)]
    assert pushes[0] < pushes[3] < pushes[-1]
    assert pushes[-1] == pytest.approx((1.6 * 0.01 + 0.02) / 0.05)  # bounded


def test_servo_turns_slowly_and_ignores_small_angles():
    servo = Servo()
    np.testing.assert_allclose(servo(np.zeros(3), np.array([0, 0, 1.0]), 1.0, speed=1.0)[3:6], [0, 0, 0.25])
    np.testing.assert_array_equal(servo(np.zeros(3), np.array([0, 0, 0.009]), 1.0, speed=1.0)[3:6], 0)


@pytest.mark.parametrize("vector", [(0, 0, 0), (0.3, -0.2, 0.1), (0, 0, 3), (-2, 1, 1)])
def test_rotation_vector_inverts_rodrigues_formula(vector):
    vector = np.array(vector, float)
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    np.testing.assert_allclose(rotation_vector(rotation), vector, atol=1e-9)


# With the simulator


@pytest.mark.slow
def test_replay_equals_the_recorded_episode(tmp_path):
    require_simulator("libero")
    settings = {"render_every": 8, "image_size": 48, "noise": 0, "progress": False}
    record("libero_object", ["1"], 1, tmp_path / "set", workers=1, **settings)
    data = LeRobotDataset(tmp_path / "set", action_horizon=1)
    document = json.loads((tmp_path / "set" / RECORDING_FILE).read_text(encoding="utf-8"))
    environment = make_environment("libero_object", "1", image_size=48)
    environment.reset(document["episodes"][0]["seed"])
    assert environment.distance_to_initial_states() > 0.003  # not an initial state of the evaluation
    done = []
    for i in range(len(data)):
        frame = data.numbers(i)
        if frame["images_are_new"]:
            observation, recorded = environment.observe(), data[i]
            np.testing.assert_array_equal(recorded["observation.images.image"], observation["observation/image"])
            np.testing.assert_array_equal(
                recorded["observation.images.wrist_image"], observation["observation/wrist_image"]
            )
        else:
            observation = environment.observe_snapshot(environment.snapshot(), images=False)
        np.testing.assert_array_equal(frame["observation.state"], observation["observation/state"].astype(np.float32))
        done.append(environment.step(frame["action"][0]))
    assert done[-1]
    assert done.index(True) == len(data) - 26  # afterwards the expert released the object, which stayed in place
    assert observation["observation/state"][6] > 0.035
    environment.close()


@pytest.mark.slow
def test_recording_does_not_depend_on_the_number_of_workers(tmp_path):
    require_simulator("libero")
    for workers in (1, 2):
        settings = {"render_every": 16, "image_size": 32, "workers": workers, "progress": False}
        record("libero_spatial", ["0", "8"], 1, tmp_path / str(workers), **settings)
    one, two = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.parquet")}
        for root in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two


@pytest.mark.slow
def test_task_with_another_goal_has_no_expert():
    require_simulator("libero")
    environment = make_environment("libero_goal", "0", image_size=32)
    environment.reset(0)
    with pytest.raises(ValueError, match="puts one object in or on something; the goal of this task is"):
        environment.expert_action()
    environment.close()
