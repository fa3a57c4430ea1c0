"""Real-time chunking: sign, gradient and weights of the guidance, and the effect of a prefix on a policy's chunks."""

import math
import pathlib

import jaxtyping
import numpy as np
import pytest
import torch

import torchpi
from torchpi.checkpoints.spec import MAX_ACTION_PREFIX
from torchpi.model.rtc import ActionPrefix, Guidance, guidance_strength, prefix_weights
from torchpi.model.suffix import TimeConditioning


def guidance(target: torch.Tensor, weight: torch.Tensor | None = None, maximum: float = 5.0) -> Guidance:
    return Guidance(target, torch.ones_like(target) if weight is None else weight, maximum)


def guided_velocity(velocity, x_t: torch.Tensor, t: float, guided_by: Guidance) -> torch.Tensor:
    """Guided velocity for a velocity that only depends on x_t."""
    time = TimeConditioning(t, torch.zeros(1, 1), None)
    return guided_by.wrap(lambda x, _: velocity(x))(x_t, time)


def test_guidance_weights_equal_the_papers():
    (weights,) = prefix_weights(8, torch.tensor([2]), torch.tensor([3]))
    expected = []
    for i in range(8):
        c = (8 - 3 - i) / (8 - 3 - 2 + 1)
        expected.append(1.0 if i < 2 else c * (math.exp(c) - 1) / (math.e - 1) if i < 5 else 0.0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights[1] > weights[2] > weights[3] > weights[4] > 0


def test_each_sample_has_its_own_delay():
    weights = prefix_weights(6, torch.tensor([0, 4]), torch.tensor([2, 2]))
    assert (weights == 1).sum(dim=1).tolist() == [0, 4]
    assert (weights > 0).sum(dim=1).tolist() == [4, 4]


@pytest.mark.parametrize("t", [1.0, 0.9, 0.5, 0.1])
def test_gradient_equals_finite_differences(t):
    """The gradient is that of minus half the weighted squared distance from the target to the predicted end point."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator)
    target, weight = torch.randn(1, 2, 3, generator=generator), torch.rand(1, 2, 3, generator=generator)
    x = torch.randn(1, 2, 3, generator=generator)

    def velocity(x_t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x_t.flatten() @ matrix).view(1, 2, 3)

    def distance(x_t: torch.Tensor) -> torch.Tensor:
        return (weight * (target - (x_t - t * velocity(x_t))) ** 2).sum() / 2

    gradient = (velocity(x) - guided_velocity(velocity, x, t, guidance(target, weight))) / guidance_strength(t, 5.0)
    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = 1e-3
        step = step.view(1, 2, 3).float()
        slope = (distance(x + step) - distance(x - step)) / 2e-3
        assert float(gradient.flatten()[i]) == pytest.approx(-float(slope), abs=2e-3)


def test_guidance_brings_a_toy_flow_nearer_to_the_target():
    """Flow with v = (x − goal) / t, whose chunks end at its goal for any noise."""
    goal, target = torch.zeros(1, 4, 2), torch.full((1, 4, 2), 3.0)
    ends = []
    for maximum in (0.0, 1.0, 5.0):
        x, num_steps = torch.ones(1, 4, 2), 10
        for step in range(num_steps):
            t = 1 - step / num_steps
            v = guided_velocity(lambda x_t, t=t: 0.3 * x_t - goal, x, t, guidance(target, maximum=maximum))
            x = x - v / num_steps
        ends.append(float((x - target).abs().mean()))
    assert ends[0] > ends[1] > ends[2]


def test_guidance_without_target_is_plain_sampling(golden):
    model, observation = golden.model(), golden.observation()
    noise = golden.inputs["noise"]
    nothing = guidance(torch.zeros_like(noise), torch.zeros_like(noise))
    guided = model.sample_actions(observation, noise=noise, num_steps=2, guidance=nothing)
    torch.testing.assert_close(guided, model.sample_actions(observation, noise=noise, num_steps=2), atol=1e-5, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_guided_chunk_agrees_with_the_previous_one_and_departs_later(golden):
    """For a model with random weights, whose chunks depend on the noise."""
    model, observation, noise = golden.model(), golden.observation(), golden.inputs["noise"]
    horizon = noise.shape[1]
    old = model.sample_actions(observation, noise=noise.flip(0))
    plain = model.sample_actions(observation, noise=noise)
    weight = prefix_weights(horizon, torch.tensor([6, 6]), torch.tensor([horizon - 12] * 2))
    guided = model.sample_actions(observation, noise=noise, guidance=guidance(old, weight[:, :, None].expand_as(old)))
    nearer = (guided - old).abs().mean(dim=(0, 2)) / (plain - old).abs().mean(dim=(0, 2))
    assert nearer[:6].max() < 0.5
    assert nearer[:6].mean() < nearer[6:12].mean() < nearer[12:].mean()


@pytest.fixture(scope="module")
def policy():
    return torchpi.load_policy("demo", device="cpu")


@pytest.fixture(scope="module")
def request_(policy):
    observation = policy.example_observation()
    noise = np.random.default_rng(0).standard_normal((2, 16, policy.model.config.action_dim)).astype(np.float32)
    return observation, noise


def test_short_prefix_guides_only_its_steps(policy, request_):
    """Missing steps are masked, because zeros would pull the chunk to zero."""
    observation, (noise, _) = request_
    old = np.full((2, 4), 0.25, np.float32)
    guided = policy.infer(observation, noise=noise, action_prefix=old, delay=2, execution_horizon=4)["actions"]
    again = policy.infer(
        observation, noise=noise, action_prefix=np.vstack([old, np.zeros((10, 4), np.float32)]), delay=2,
        execution_horizon=4,
    )["actions"]  # fmt: skip
    assert np.abs(guided[:2] - old).max() < np.abs(policy.infer(observation, noise=noise)["actions"][:2] - old).max()
    assert np.abs(guided - again).max() > 1e-3


def test_requests_with_and_without_a_prefix_share_a_batch(policy, request_):
    observation, noise = request_
    old = policy.infer(observation, noise=noise[0])["actions"]
    prefix = torchpi.types.PreviousChunk(old[4:], delay=2)
    together = policy.infer_batch([observation, observation], noise=noise, prefixes=[None, prefix])
    np.testing.assert_allclose(together[0]["actions"], old, atol=1e-4)
    alone = policy.infer(observation, noise=noise[1], action_prefix=old[4:], delay=2)["actions"]
    np.testing.assert_allclose(together[1]["actions"], alone, atol=1e-4)


def test_guidance_works_in_inference_mode(policy, request_):
    observation, noise = request_
    previous = policy.infer(observation, noise=noise[0])["actions"]
    expected = policy.infer(observation, noise=noise[1], action_prefix=previous[4:], delay=2)["actions"]
    with torch.inference_mode():
        actual = policy.infer(observation, noise=noise[1], action_prefix=previous[4:], delay=2)["actions"]
    np.testing.assert_array_equal(actual, expected)


def test_delta_actions_are_anchored_at_the_new_state(policy):
    """Absolute actions do not change when the state moves, so their deltas must be recomputed."""
    robot = torchpi.Embodiment.generic(
        "arm", cameras={"base_0_rgb": "front"}, state=["a", "b", "c", "d"], actions=["a", "b", "c", "d"],
        delta=["a", "b", "c"],
    )  # fmt: skip
    arm = torchpi.load_policy("demo", embodiment=robot, device="cpu")
    observation = arm.example_observation()
    moved = {**observation, "state": np.array([0.1, 0.2, -0.1, 0.0], np.float32)}
    prefix = torchpi.types.PreviousChunk(np.full((3, 4), 0.3, np.float32), delay=3, execution_horizon=0)
    (here,), (there,) = ([arm.prepare({**o, "actions": prefix.actions})[1]["actions"]] for o in (observation, moved))
    back = [arm._to_robot(chunk, o["state"])[0] for chunk, o in ((here, observation), (there, moved))]
    assert np.abs(here - there)[:, :3].max() > 0.01
    np.testing.assert_allclose(back[0], back[1], atol=1e-6)
    np.testing.assert_allclose(back[0], 0.3, atol=1e-6)


def test_guidance_is_normalized_and_applies_only_to_the_prefix(monkeypatch):
    """The target is normalized and relative to the new state; weights after the prefix and in padding are 0."""
    robot = torchpi.Embodiment.generic(
        "arm", cameras={"base_0_rgb": "front"}, state=["a", "b", "c", "d"], actions=["a", "b", "c"], delta=["a", "b"]
    )
    stats = (
        pathlib.Path(torchpi.__file__).parent / "assets" / "demo_policy" / "norm_stats.json"
    )  # statistics of 4 dimensions
    arm = torchpi.load_policy("demo", embodiment=robot, norm_stats=stats, device="cpu")
    observation = {**arm.example_observation(), "state": np.array([0.1, 0.2, -0.1, 0.0], np.float32)}
    sample, seen = arm.model.sample_actions, {}

    def record(*arguments, **options):
        seen.update(options)
        return sample(*arguments, **options)

    monkeypatch.setattr(arm.model, "sample_actions", record)
    prefix = np.full((5, 3), 0.3, np.float32)
    arm.infer(observation, num_steps=1, action_prefix=prefix, delay=2, execution_horizon=8)
    target, weight = (tensor[0].numpy() for tensor in (seen["guidance"].target, seen["guidance"].weight))
    np.testing.assert_allclose(arm._to_robot(target, arm.prepare(observation)[0])[0][:5], prefix, atol=1e-5)
    assert (weight[:2, :3] == 1).all()
    assert (weight[:5, :3] > 0).all()
    assert not weight[5:].any()
    assert not weight[:, 3:].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from PyTorch, while it compiles
def test_other_delay_or_horizon_does_not_recompile(monkeypatch):
    """Delay and horizon are tensor contents, and do not change shapes."""
    # Without the tests' shape checks, which torch.compile cannot trace.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    generator = torch.Generator().manual_seed(0)
    x, old, matrix = (torch.randn(shape, generator=generator) for shape in ((2, 16, 4), (2, 16, 4), (4, 4)))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(delay, executed):
        weight = prefix_weights(16, delay, executed)[:, :, None].expand_as(old)
        return guided_velocity(lambda x_t: torch.tanh(x_t @ matrix), x, 0.5, guidance(old, weight))

    torch._dynamo.reset()
    compiled, counts = torch.compile(step, backend=count), []
    for delay, executed in (([2, 3], [4, 4]), ([3, 0], [4, 8]), ([0, 0], [15, 0])):
        torch.testing.assert_close(
            compiled(torch.tensor(delay), torch.tensor(executed)), step(torch.tensor(delay), torch.tensor(executed))
        )
        counts.append(len(graphs))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 13}, r"needs 0 ≤ delay ≤ H − execution_horizon, got delay 13, execution_horizon 4 and H 16"),
        ({"delay": -1}, "got delay -1"),
        ({"execution_horizon": 17}, "execution_horizon 17"),
        ({"action_prefix": np.zeros((3, 5), np.float32)}, r"Actions have shape \[3, 5\]"),
        ({"action_prefix": np.full((3, 4), np.nan, np.float32)}, "NaN"),
    ],
)
def test_invalid_prefixes_are_refused(policy, request_, options, message):
    observation, noise = request_
    with pytest.raises(ValueError, match=message):
        policy.infer(observation, noise=noise[0], **{"action_prefix": np.zeros((12, 4), np.float32), **options})


# ---- action prefixes, for a model that was trained with them ----


def test_prefix_actions_have_time_zero(golden):
    """A prefix of length 0 changes nothing, and noise within a prefix is ignored."""
    model, observation, noise = golden.model(), golden.observation(), golden.inputs["noise"]
    actions = golden.inputs["actions"]
    time = torch.tensor([0.7, 0.3])
    nothing = model(observation, actions, noise=noise, time=time)
    same = model(observation, actions, noise=noise, time=time, prefix_len=torch.tensor([0, 0]))
    torch.testing.assert_close(nothing, same, atol=1e-6, rtol=1e-5)
    given = model(observation, actions, noise=noise, time=time, prefix_len=torch.tensor([4, 0]))
    assert (given[0] - nothing[0]).abs().max() > 1e-4
    torch.testing.assert_close(given[1], nothing[1], atol=1e-6, rtol=1e-5)
    other = noise.clone()
    other[0, :4] = 9.0
    loss = model(observation, actions, noise=other, time=time, prefix_len=torch.tensor([4, 0]))
    torch.testing.assert_close(loss[0, 4:], given[0, 4:], atol=1e-5, rtol=1e-4)


def test_sampled_chunk_begins_with_action_prefix(golden):
    model, observation, noise = golden.model(), golden.observation(), golden.inputs["noise"]
    actions = golden.inputs["actions"]
    mask = torch.zeros(noise.shape[:2], dtype=torch.bool)
    plain = model.sample_actions(observation, noise=noise, num_steps=3)
    nothing = model.sample_actions(observation, noise=noise, num_steps=3, action_prefix=ActionPrefix(actions, mask))
    torch.testing.assert_close(nothing, plain, atol=1e-5, rtol=0)
    mask[0, :5] = True
    chunk = model.sample_actions(observation, noise=noise, num_steps=3, action_prefix=ActionPrefix(actions, mask))
    assert torch.equal(chunk[0, :5], actions[0, :5])
    assert (chunk[0, 5:] - plain[0, 5:]).abs().max() > 1e-4
    torch.testing.assert_close(chunk[1], plain[1], atol=1e-5, rtol=0)
    # One Euler step from t = 1 by hand, with the velocity that is predicted in training.
    once = model.sample_actions(observation, noise=noise, num_steps=1, action_prefix=ActionPrefix(actions, mask))
    loss = model(observation, actions, noise=noise, time=torch.ones(2), prefix_len=torch.tensor([5, 0]))
    v_t = noise - once
    squares = (v_t - (noise - actions)).square().mean(dim=-1)  # (v − u)²
    torch.testing.assert_close(squares[0, 5:], loss[0, 5:], atol=1e-4, rtol=1e-3)


def test_policy_trained_with_prefixes_keeps_the_prefix(policy, request_):
    observation, (first, second) = request_
    old = policy.infer(observation, noise=first)["actions"]
    trained = torchpi.load_policy("demo", device="cpu")
    trained._metadata[MAX_ACTION_PREFIX] = 4
    chunk = trained.infer(observation, noise=second, action_prefix=old[4:], delay=4)["actions"]
    np.testing.assert_allclose(chunk[:4], old[4:8], atol=1e-5)
    beyond = torchpi.types.PreviousChunk(old[4:], delay=5, method="trained")
    with pytest.raises(ValueError, match="at most 4 actions, not 5"):
        trained.infer_batch([observation], prefixes=[beyond])


def test_policy_loaded_in_inference_mode_has_guidance(policy, request_):
    observation, noise = request_
    with torch.inference_mode():
        loaded = torchpi.load_policy("demo", device="cpu")
        previous = loaded.infer(observation, noise=noise[0])["actions"]
    actual = loaded.infer(observation, noise=noise[1], action_prefix=previous[4:], delay=2)["actions"]
    expected = policy.infer(observation, noise=noise[1], action_prefix=previous[4:], delay=2)["actions"]
    np.testing.assert_array_equal(actual, expected)


def test_guidance_of_the_model_in_inference_mode_is_an_error_with_the_remedy():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"sample under torch\.no_grad instead"):
        guided_velocity(lambda x: x, torch.zeros(1, 2, 3), 0.5, guidance(torch.ones(1, 2, 3)))


@pytest.mark.parametrize("numbers", [{"delay": 2.5}, {"delay": 2, "execution_horizon": 4.0}])
def test_fractions_of_an_action_are_refused(policy, request_, numbers, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in the tests only
    observation, noise = request_
    with pytest.raises(ValueError, match=r"(delay|execution_horizon) must be a whole number of actions"):
        policy.infer(observation, noise=noise[1], action_prefix=np.zeros((8, 4), np.float32), **numbers)
