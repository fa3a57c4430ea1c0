"""benchmarks/control.py: control modes under a delay, and their measurements."""

import json

import control
import control_episodes
import numpy as np
import pytest
from sim_helpers import HORIZON, corridor, random_policy  # noqa: F401  (corridor is a fixture)

from torchpi.sim import make_environment
from torchpi.sim.environment import environment_seed
from torchpi.sim.rollout import Rollout, run_episode

STEPS = 4  # executed actions before the next chunk is requested


@pytest.fixture
def policy(corridor, monkeypatch):  # noqa: F811
    """Policy with constant actions within a chunk, larger by a tenth of the range (-1 to 1) in each next chunk."""
    policy = random_policy()
    policy.requests = []

    def infer_batch(observations, *, noise=None, prefixes=None, **options):
        policy.requests.append(prefixes[0])
        pace = 0.05 + 0.2 * np.round(float(np.mean(noise)), 3)
        return [{"actions": np.tile(np.float32([pace, 0, 0, 0]), (HORIZON, 1)), "policy_timing": {}}]

    monkeypatch.setattr(policy, "infer_batch", infer_batch)
    monkeypatch.setattr(
        control_episodes, "episode_noise", lambda *_: lambda chunk: np.full((HORIZON, 4), chunk, np.float32)
    )
    return policy


def result(policy, mode, delay, **options):
    options = {"execute_steps": STEPS, "episodes": 1, "seed": 1, "progress": False} | options
    benchmark = control.bench_control(policy, env="corridor", tasks=["short"], delays=[delay], modes=[mode], **options)
    return benchmark.results[0]


def test_sync_without_delay_equals_evaluation(policy):
    environment = make_environment("corridor", "short")
    seed = environment_seed("eval", 1, "short", 0)
    expected = run_episode(
        policy, environment, seed, rollout=Rollout(execute_steps=STEPS), noise=control_episodes.episode_noise(0)
    )
    for mode in ("sync", "async"):
        found = result(policy, mode, 0)
        assert (found.success_rate, found.steps_to_success) == (1.0, expected.steps)
        assert (found.waits, found.holds, found.chunks) == (0, 0, len(expected.chunk_ms))


def test_sync_holds_robot_while_it_waits(policy):
    at_once, later = result(policy, "sync", 0), result(policy, "sync", 3)
    assert later.waits == 3 * later.chunks
    assert later.steps_to_success == at_once.steps_to_success + 3 * (later.chunks - 1)  # no wait before the first chunk
    # The robot stops and starts; within a chunk nothing changes.
    assert later.changes_at_borders.mean > at_once.changes_at_borders.mean
    assert later.changes_inside.mean == 0


def test_async_jumps_at_chunk_borders(policy):
    found = result(policy, "async", 3)
    assert (found.holds, found.late_chunks, found.waits) == (0, 0, 3)
    # Only the first of the four dimensions differs, by a tenth of its range.
    assert found.jumps.count == found.chunks - 1
    assert found.jumps.mean == pytest.approx(0.1 / 4)
    assert found.jumps.dimension_means["delta_x"] == pytest.approx(0.1)
    assert found.jumps.dimension_p95s["delta_y"] == 0
    assert found.changes_at_borders.mean == pytest.approx(0.1 / 4)


def test_episodes_have_equal_weight(policy):
    short, long = np.full((2, 4), 0.2), np.full((10, 4), 0.4)
    short[0] = 0
    found = control._differences([short, long, np.empty((0, 4))], policy)
    assert found.count == 12
    assert found.mean == pytest.approx((0.05 + 0.2) / 2)  # the range is 2
    assert found.p95 == pytest.approx((0.095 + 0.2) / 2)
    assert found.dimension_means["gripper"] == pytest.approx(found.mean)


def test_ensemble_jumps_less_than_async(policy):
    found = result(policy, "ensemble", 1)
    assert found.chunks > result(policy, "async", 1).chunks
    assert 0 < found.jumps.mean < 0.1 / 4


def test_rtc_sends_rest_of_chunk_and_delay(policy):
    result(policy, "rtc", 3)
    # The first two are the loop's warm-up, of which the second has a prefix.
    first, second, *_ = policy.requests[2:]
    assert first is None
    assert (second.delay, second.execution_horizon, second.method) == (3, STEPS, "guidance")
    assert second.actions.shape == (HORIZON - STEPS, 4)


def test_robot_is_held_or_stopped_if_the_old_chunk_ends_too_early(policy):
    held = result(policy, "async", HORIZON - 2)
    assert held.holds > 0
    assert held.late_chunks == held.chunks - 1
    stopped = result(policy, "async", HORIZON - 2, late="stop")
    assert (stopped.stopped, stopped.success_rate) == (1, 0.0)


def test_rtc_trained_runs_only_up_to_the_trained_delay(policy):
    with pytest.raises(ValueError, match="needs a policy that was trained"):
        result(policy, "rtc-trained", 1)
    policy._metadata["max_action_prefix"] = 2
    benchmark = control.bench_control(
        policy, env="corridor", tasks=["short"], delays=[2, 4], episodes=1, execute_steps=STEPS, progress=False
    )
    assert [(r.mode, r.delay) for r in benchmark.results if r.mode.startswith("rtc")] == [
        ("rtc", 2),
        ("rtc", 4),
        ("rtc-trained", 2),
    ]
    assert benchmark.left_out == ("rtc-trained at delays 4: trained for at most 2",)
    assert policy.requests[-1].method == "trained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ["fast"]}, "Unknown mode fast; expected sync, async"),
        ({"delays": [-1]}, "Expected delays of 0 or more"),
        ({"delays": []}, "got none"),
        ({"episodes": 0}, "at least one episode"),
        ({"workers": 2}, "can't be shared"),
        ({"execute_steps": 17}, "its chunk has only 16"),
    ],
)
def test_invalid_options_are_errors_before_anything_runs(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        control.bench_control(policy, **{"env": "corridor", "tasks": ["short"], "episodes": 1} | arguments)


def test_script_prints_one_document_and_writes_plot(corridor, tmp_path, capsys):  # noqa: F811
    options = {"env": "corridor", "tasks": "short,long", "episodes": 1, "delays": "0,9", "modes": "sync,rtc"}
    control.main(**options, workers=1, out=tmp_path / "new", as_json=True)
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [(r["mode"], r["delay"]) for r in document["results"]] == [("sync", 0), ("sync", 9), ("rtc", 0), ("rtc", 9)]
    assert document["results"][0]["episodes"] == 2
    assert json.loads((tmp_path / "new" / "control.json").read_text()) == document
    assert (tmp_path / "new" / "control.png").stat().st_size > 10_000
    assert "rtc" in printed.err
