"""Single episodes: requests to the policy, their observations, and the end of an episode."""

import numpy as np
import pytest
from sim_helpers import Corridor, require_simulator

from torchpi.sim import make_environment
from torchpi.sim.environment import Environment, ShowsHands
from torchpi.sim.rollout import Actor, Rollout, episode_noise, run_episode


class Scripted:
    """A policy that always returns the same chunk, and records its requests."""

    def __init__(self, chunk):
        self.chunk, self.requests = np.asarray(chunk, np.float32), []

    def infer(self, observation, **options):
        self.requests.append((observation, options))
        return {"actions": self.chunk}


def forward(horizon, speed=1.0):
    return Scripted(np.tile([speed, 0, 0, 0], (horizon, 1)))


def test_policy_infers_and_cameras_render_at_chunk_boundaries_only():
    corridor, policy = Corridor(), forward(8)
    outcome = run_episode(policy, corridor, 2, rollout=Rollout(execute_steps=3))  # seven steps to go
    assert (outcome.success, outcome.steps, len(outcome.chunk_ms)) == (True, 7, 3)
    chunk = ["observe", "step", "step", "step"]
    assert corridor.log == ["reset 2", *chunk, *chunk, "observe", "step"]
    assert [options for _, options in policy.requests] == [{}] * 3
    assert min(outcome.chunk_ms) > 0
    assert outcome.seconds > 0


@pytest.mark.parametrize(("horizon", "executed"), [(8, 4), (5, 2), (1, 1)])
def test_half_of_a_chunk_is_executed_by_default(horizon, executed):
    policy = forward(horizon)
    outcome = run_episode(policy, Corridor(), 0)  # five steps to go
    assert len(policy.requests) == len(outcome.chunk_ms) == -(-5 // executed)


@pytest.mark.parametrize(("limit", "steps"), [(None, 40), (7, 7)])
def test_episode_without_success_ends_at_max_steps(limit, steps):
    outcome = run_episode(forward(4, speed=0.01), Corridor(), 0, rollout=Rollout(4, max_steps=limit))
    assert (outcome.success, outcome.steps, outcome.unstable) == (False, steps, False)


def test_success_at_the_last_step_counts():
    outcome = run_episode(forward(4), Corridor(), 0, rollout=Rollout(4, max_steps=5))
    assert (outcome.success, outcome.steps) == (True, 5)


def test_unstable_simulation_fails_the_episode():
    policy = Scripted([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    outcome = run_episode(policy, Corridor(), 0, rollout=Rollout(3))
    assert (outcome.success, outcome.steps, outcome.unstable) == (False, 2, True)


def test_instruction_can_be_replaced():
    policy = forward(8)
    run_episode(policy, Corridor(), 0)
    run_episode(policy, Corridor(), 0, instruction="stay")
    assert [observation["prompt"] for observation, _ in policy.requests] == ["go a short way"] * 2 + ["stay"] * 2


def test_images_can_be_blank():
    policy = forward(8)
    run_episode(policy, Corridor(), 0, rollout=Rollout(blank_images=True))
    for observation, _ in policy.requests:
        assert observation["base"].shape == (16, 16, 3)
        assert not observation["base"].any()
        assert not observation["wrist"].any()
        assert observation["state"].any()


def test_nested_images_can_be_blank():
    require_simulator()
    environment, policy = make_environment("aloha_sim", "insertion"), Scripted(np.zeros((4, 14)))
    run_episode(policy, environment, 0, rollout=Rollout(2, max_steps=2, blank_images=True))
    image = policy.requests[0][0]["images"]["cam_high"]
    assert (image.shape, image.dtype, image.any()) == ((3, 224, 224), np.uint8, np.False_)
    environment.close()


def test_noise_and_num_steps_reach_the_policy():
    policy = forward(8)
    noise = episode_noise(3, "short", 1, (8, 6))
    run_episode(policy, Corridor(), 0, rollout=Rollout(4, num_steps=5), noise=noise)
    for chunk, (_, options) in enumerate(policy.requests):
        assert options["num_steps"] == 5
        np.testing.assert_array_equal(options["noise"], noise(chunk))
    assert len(policy.requests) == 2


def test_num_samples_and_pick_reach_the_policy():
    policy = forward(8)
    run_episode(policy, Corridor(), 0, rollout=Rollout(4, num_samples=3, pick="first"))
    assert [options for _, options in policy.requests] == [{"num_samples": 3, "pick": "first"}] * 2
    with pytest.raises(ValueError, match="pick chooses among several samples"):
        Rollout(pick="first")


def test_noise_depends_on_seed_task_episode_and_chunk():
    noises = {}
    for episode in [(0, "short", 0), (1, "short", 0), (0, "long", 0), (0, "short", 1)]:
        for chunk in (0, 1):
            noise = episode_noise(*episode, (16, 32))(chunk)
            assert (noise.dtype, noise.shape) == (np.float32, (16, 32))
            assert abs(noise.mean()) < 0.2
            assert abs(noise.std() - 1) < 0.2
            np.testing.assert_array_equal(noise, episode_noise(*episode, (16, 32))(chunk))
            noises[(*episode, chunk)] = noise.tobytes()
    assert len(set(noises.values())) == len(noises)


def test_callback_gets_each_chunk_and_each_step():
    calls = []
    run_episode(forward(8), Corridor(), 0, rollout=Rollout(3), callback=calls.append)  # five steps to go
    assert [(call.step, call.executed, call.success, call.last) for call in calls] == [
        (0, 0, False, False),
        (1, 1, False, False),
        (2, 2, False, False),
        (3, 3, False, False),
        (3, 0, False, False),
        (4, 1, False, False),
        (5, 2, True, True),
    ]


@pytest.mark.parametrize("shape", [(4,), (4, 5), (0, 4), (1, 4, 4)])
def test_invalid_chunk_is_an_error(shape):
    with pytest.raises(ValueError, match=r"The policy returned actions \[.*\]; metaworld takes \[H, 4\]"):
        run_episode(Scripted(np.zeros(shape)), Corridor(), 0)


def test_execute_steps_beyond_the_chunk_is_an_error():
    with pytest.raises(ValueError, match="execute_steps is 9, but the policy's chunk has only 8 actions"):
        run_episode(forward(8), Corridor(), 0, rollout=Rollout(9))


@pytest.mark.parametrize("field", ["execute_steps", "num_steps", "max_steps"])
def test_rollout_settings_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        Rollout(**{field: 0})


def test_actor_and_environment_are_protocols():
    assert isinstance(forward(1), Actor)
    assert isinstance(Corridor(), Environment)
    assert not isinstance(Corridor(), ShowsHands)


def test_expert_succeeds_as_a_policy():
    require_simulator()
    environment = make_environment("metaworld", "faucet-open")

    class Expert:
        def infer(self, observation):
            return {"actions": environment.expert_action()[None]}

    outcomes = [run_episode(Expert(), environment, seed) for seed in (3, 4, 3)]
    assert all(outcome.success for outcome in outcomes)
    assert outcomes[0].steps == outcomes[2].steps == len(outcomes[0].chunk_ms)
    environment.close()
