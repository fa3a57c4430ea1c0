"""Several action samples per observation: equal to separate calls, the choice among them, their standard deviation."""

import jaxtyping
import numpy as np
import pytest
import torch
from test_engine import ACTION_DIM, BATCH, HORIZON, RTC, conditions, make_model, make_observation

from torchpi.engine import InferenceEngine
from torchpi.policy import load_policy
from torchpi.samples import choose
from torchpi.types import PreviousChunk

SAMPLES, STEPS = 3, 3


def noises(samples=SAMPLES, batch=BATCH):
    return torch.randn(batch, samples, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def policy():
    return load_policy("demo")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The model and the engine


@pytest.mark.parametrize("rtc", RTC, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
def test_samples_equal_separate_calls_with_the_same_noise(pi05, rtc):
    model, observation = make_model(pi05=pi05), make_observation()
    settings = {"num_steps": STEPS, **conditions(rtc)}
    expected = torch.stack(
        [model.sample_actions(observation, noise=noises()[:, i], **settings) for i in range(SAMPLES)], dim=1
    )
    for sampler in (model, InferenceEngine(model, mode="eager")):
        found = sampler.sample_many(observation, noise=noises(), **settings)
        torch.testing.assert_close(found.actions, expected, rtol=1e-5, atol=1e-5)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.1


def test_one_sample_equals_sample_actions_and_more_samples_keep_its_noise():
    model, observation = make_model(), make_observation()
    plain = model.sample_actions(observation, generator=generator(), num_steps=STEPS)
    one = model.sample_many(observation, generator=generator(), num_steps=STEPS)
    assert torch.equal(one.actions[:, 0], plain)
    assert one.residual is None
    few, many = (model.draw_noise(BATCH, generator(), count) for count in (2, 5))
    assert torch.equal(few, many[:, :2])
    assert torch.equal(few[:, :1], model.draw_noise(BATCH, generator()))


@pytest.mark.parametrize("rtc", [(), ("guidance", "action_prefix")], ids=["plain", "rtc"])
def test_residual_is_the_distance_of_velocities_from_the_straight_path(rtc):
    model, observation, noise = make_model(), make_observation(), noises(2)
    settings = conditions(rtc)
    found = model.sample_many(observation, noise=noise, num_steps=STEPS, **settings)
    cache, times = model.prefill(observation), model.step_conditionings(STEPS, action_prefix=bool(rtc))
    for i in range(2):  # Euler steps that keep every velocity
        velocity, steps, start, seen = lambda x_t, time: model.denoise_step(cache, x_t, time), times, noise[:, i], []
        if rtc:
            *steps, at_zero = times
            start = settings["action_prefix"].insert(start)
            velocity = settings["guidance"].wrap(settings["action_prefix"].wrap(velocity, at_zero))
        x_t = start
        for time in steps:
            with torch.no_grad():
                seen.append(velocity(x_t, time))
            x_t = x_t - seen[-1] / STEPS
        expected = torch.stack([(v_t - (start - x_t)).square() for v_t in seen]).mean(dim=0)
        torch.testing.assert_close(found.residual[:, i], expected, rtol=1e-3, atol=1e-4)
    assert found.residual.max() > 0.01


def test_engine_pads_observations_but_not_samples():
    model = make_model()
    engine = InferenceEngine(model, mode="eager", batch_sizes=(2,))
    one = make_observation((17,))
    for samples in (2, 3):
        found = engine.sample_many(one, noise=noises(samples, 1), num_steps=2)
        expected = model.sample_many(one, noise=noises(samples, 1), num_steps=2)
        for ours, plain in zip(found, expected, strict=True):
            assert ours.shape == (1, samples, HORIZON, ACTION_DIM)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert [text.partition("actions ")[2] for text in engine.metadata["warm_buckets"]] == [
        "× 2, 2 steps",
        "× 3, 2 steps",
    ]


def test_sample_many_rejects_noise_of_a_single_sample(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"Noise must be \[3, R, 7, 6\], got \[3, 7, 6\]"):
        make_model().sample_many(make_observation(), noise=noises()[:, 0])


# The policy


def test_policy_samples_equal_single_inferences(policy):
    observation, shape = policy.example_observation(), policy.model.config.chunk_shape
    noise = np.random.default_rng(0).standard_normal((SAMPLES, *shape), np.float32)
    singles = np.stack([policy.infer(observation, noise=each, num_steps=2)["actions"] for each in noise])
    answer = policy.infer(observation, noise=noise, num_samples=SAMPLES, num_steps=2)
    np.testing.assert_allclose(answer["samples"], singles, atol=1e-4)
    assert np.array_equal(answer["actions"], answer["samples"][answer["sample_index"]])
    np.testing.assert_allclose(answer["action_std"], singles.std(axis=0, ddof=1), atol=1e-4)
    both = policy.infer_batch(
        [observation] * 2, noise=np.stack([noise, noise[::-1]]), num_samples=SAMPLES, num_steps=2, pick="first"
    )
    np.testing.assert_allclose(both[1]["samples"][::-1], both[0]["samples"], atol=1e-4)
    assert both[0]["uncertainty"] == pytest.approx(both[1]["uncertainty"], abs=1e-4)


def test_num_samples_1_equals_inference_without_num_samples(policy):
    observation = policy.example_observation()
    plain = policy.infer(observation, generator=generator(), num_steps=2)
    one = policy.infer(observation, generator=generator(), num_steps=2, num_samples=1)
    many = policy.infer(observation, generator=generator(), num_steps=2, num_samples=np.int64(2), pick="first")
    assert set(plain) == {"actions", "policy_timing"}
    assert set(one) == {
        "actions",
        "policy_timing",
        "samples",
        "sample_index",
    }  # a single chunk has no standard deviation
    assert np.array_equal(plain["actions"], one["actions"])
    np.testing.assert_allclose(many["actions"], plain["actions"], atol=1e-5)
    noise = np.zeros(policy.model.config.chunk_shape, np.float32)
    assert policy.infer(observation, noise=noise, num_steps=2, num_samples=1)["samples"].shape[0] == 1


@pytest.mark.parametrize("method", ["guidance", "trained"])
def test_samples_continue_the_previous_chunk_with_both_rtc_methods(policy, method, monkeypatch):
    monkeypatch.setitem(policy._metadata, "max_action_prefix", 4)
    observation, shape = policy.example_observation(), policy.model.config.chunk_shape
    old = policy.infer(observation, generator=generator(), num_steps=2)["actions"]
    previous = PreviousChunk(old[4:], 3, 4, method)
    noise = np.random.default_rng(1).standard_normal((1, 2, *shape), np.float32)
    settings = {"num_steps": 3, "prefixes": [previous]}
    singles = [policy.infer_batch([observation], noise=noise[:, i], **settings)[0]["actions"] for i in range(2)]
    answer = policy.infer_batch([observation], noise=noise, num_samples=2, **settings)[0]
    np.testing.assert_allclose(answer["samples"], np.stack(singles), atol=1e-4)
    if method == "trained":
        np.testing.assert_allclose(answer["samples"][:, :3], np.stack([old[4:7]] * 2), atol=1e-4)
        assert not answer["action_std"][:3].any()


def test_pick_methods_choose_the_expected_sample():
    normalized = np.array([[[0.0, 0.0]], [[1.0, 0.0]], [[0.9, 0.2]], [[-4.0, 0.0]]], np.float32)
    residual = np.array([4.0, 1.0, 0.25, 9.0], np.float32)[:, None, None].repeat(2, axis=2)
    samples, seen = 10 * normalized, []

    def last(samples, observation):
        samples[:] = np.nan  # must change only a copy
        seen.append(observation)
        return np.int64(3)

    def index(pick):
        return choose(pick, samples, normalized, residual, kind="quantile", observation={"prompt": "x"})

    # Sums of distances to the other samples: 0: 5.92, 1: 6.22, 2: 6.05, 3: 13.9.
    assert [index(pick)["sample_index"] for pick in ("consensus", "velocity_residual", "first", last)] == [0, 2, 0, 3]
    assert seen == [{"prompt": "x"}]
    about = index("first")
    np.testing.assert_allclose(about["velocity_residuals"], [2, 1, 0.5, 3])
    np.testing.assert_allclose(about["action_std"], samples.std(axis=0, ddof=1), rtol=1e-6)
    # With quantile normalization the training range has the width 2.
    assert about["uncertainty"] == pytest.approx(normalized.std(axis=0, ddof=1).mean() / 2)


def test_untrained_dimensions_do_not_affect_the_choice(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "trained_action_dim", 2)
    chunks = np.zeros((3, 4, 8), np.float32)
    chunks[0, :, 2:], chunks[1, :, 0] = 1e3, 0.5
    _, _, about = policy._postprocess("consensus", chunks, None, np.zeros(4), {})
    assert about["sample_index"] == 0  # samples 0 and 2 are equal in the trained dimensions
    _, _, about = policy._postprocess("consensus", chunks, np.ones_like(chunks), np.zeros(4), {})
    assert about["uncertainty"] < 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected a positive whole number"),
        ({"num_samples": 2.0}, "num_samples is 2.0"),
        ({"num_samples": True}, "num_samples is True"),
        ({"pick": "first"}, "pick chooses among several samples: pass num_samples="),
        ({"num_samples": 2, "pick": "best"}, "pick is 'best'; expected one of consensus, velocity_residual, first"),
        ({"num_samples": 2, "pick": lambda samples, observation: 2}, "pick returned 2; expected an index from 0 to 1"),
        ({"num_samples": 2, "pick": lambda samples, observation: None}, "pick returned None"),
        ({"num_samples": 2, "num_steps": 1, "pick": "velocity_residual"}, "with one Euler step every path is straight"),
        ({"num_samples": 2, "noise": np.zeros((16, 8))}, r"Noise must be \[2, 16, 8\], got float64 \[16, 8\]"),
        ({"noise": np.zeros((2, 16, 8))}, r"Noise must be \[16, 8\], got float64 \[2, 16, 8\]"),
    ],
)
def test_invalid_arguments_raise_error_that_names_them(policy, wrong, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are checked only in tests
    with pytest.raises(ValueError, match=message):
        policy.infer(policy.example_observation(), **({"num_steps": 2} | wrong))
