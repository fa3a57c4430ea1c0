"""Evaluations that save their outcomes in a folder, and can be resumed."""

import contextlib
import json

import numpy as np
import pytest
import torch
from sim_helpers import (
    corridor,  # noqa: F401
    random_policy,
)

from torchpi.cli import main
from torchpi.serving.server import running_server
from torchpi.serving.settings import ServeSettings
from torchpi.sim.actors import RemotePolicy, fingerprint
from torchpi.sim.evaluate import evaluate
from torchpi.sim.rollout import Rollout


@pytest.fixture
def policy():
    return random_policy()


class RecordedChunks:
    """Records a policy's chunks, and can let one request fail as if a server had ended."""

    def __init__(self, monkeypatch, policy, at=None, error=None):
        self.chunks, infer = [], policy.infer

        def watched(observation, **options):
            if len(self.chunks) == at:
                assert error is not None
                raise error
            answer = infer(observation, **options)
            self.chunks.append(answer["actions"])
            return answer

        monkeypatch.setattr(policy, "infer", watched)


def run(policy, out, **options):
    options = {"episodes": 3, "seed": 2, "rollout": Rollout(6, num_steps=2, max_steps=18), **options}
    return evaluate(policy, "corridor", out=out, resume=out is not None, progress=False, **options)


@pytest.mark.parametrize("error", [ConnectionError("Is the server running?"), KeyboardInterrupt()])
def test_resumed_evaluation_equals_an_uninterrupted_one(corridor, monkeypatch, tmp_path, error):  # noqa: F811
    with monkeypatch.context() as context:
        uninterrupted = RecordedChunks(context, (policy := random_policy()))
        expected = run(policy, None)
    with monkeypatch.context() as context:
        interrupted = RecordedChunks(context, (policy := random_policy()), at=4, error=error)
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            run(policy, tmp_path)
    kept = len(list((tmp_path / "episodes").iterdir()))
    assert 0 < kept < 6
    message = f"{kept} of 6 episodes are in {tmp_path}; run the same command to continue."
    assert str(caught.value).endswith(message if isinstance(error, KeyboardInterrupt) else f"running? {message}")
    with monkeypatch.context() as context:
        resumed = RecordedChunks(context, (policy := random_policy()))
        result = run(policy, tmp_path)
    assert (result.episodes, result.tasks, result.interval) == (expected.episodes, expected.tasks, expected.interval)
    done = sum(episode.num_chunks for episode in expected.episodes[:kept])
    np.testing.assert_array_equal([*interrupted.chunks[:done], *resumed.chunks], uninterrupted.chunks)
    with monkeypatch.context() as context:
        finished = RecordedChunks(context, (policy := random_policy()), at=0)
        assert run(policy, tmp_path).episodes == expected.episodes
    assert finished.chunks == []


def test_resumed_evaluation_adds_episodes_and_tasks(corridor, policy, tmp_path):  # noqa: F811
    expected = run(policy, None, episodes=3)
    run(policy, tmp_path, episodes=1, tasks=["long"])
    (kept,) = (tmp_path / "episodes").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"seconds": 1e6}))  # as from another machine
    result = run(policy, tmp_path, episodes=3)
    assert result.episodes == expected.episodes
    assert result.steps_per_second > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed 2, now 3"),
        ({"rollout": Rollout(5, num_steps=2, max_steps=18)}, "execute_steps 6, now 5"),
        ({"instructions": {"long": "run"}}, r"instructions \{\}, now \{'long': 'run'\}"),
    ],
)
def test_other_settings_are_refused(corridor, policy, tmp_path, changes, message):  # noqa: F811
    run(policy, tmp_path, episodes=1)
    with pytest.raises(ValueError, match=f"{message}: they would be mixed. Choose another folder with --out"):
        run(policy, tmp_path, **changes)


def test_other_policy_is_refused(corridor, policy, tmp_path):  # noqa: F811
    run(policy, tmp_path, episodes=1)
    policy.default_prompt = "go"
    with pytest.raises(ValueError, match="an evaluation with policy"):
        run(policy, tmp_path)
    other = random_policy()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="an evaluation with policy"):
        run(other, tmp_path)


def test_served_fingerprint_ignores_the_engines_warm_up():
    served = RemotePolicy.__new__(RemotePolicy)
    served.metadata = {"embodiment": "so101", "engine": {"mode": "graph", "warm_buckets": []}}
    before = fingerprint(served)
    served.metadata["engine"]["warm_buckets"].append("batch 1")
    assert fingerprint(served) == before
    served.metadata["embodiment"] = "koch"
    assert fingerprint(served) != before


def test_served_fingerprint_depends_on_the_weights():
    fingerprints = []
    for weight in (0.0, 0.0, 1e-3):
        with torch.no_grad():
            next((policy := random_policy()).model.parameters()).view(-1)[0] += weight
        server = running_server({"policy": lambda policy=policy: policy}, ServeSettings(port=0, max_batch=1))
        with server as (url, _), contextlib.closing(RemotePolicy(url)) as remote:
            fingerprints.append(fingerprint(remote))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_episode_with_a_missing_video_runs_again(corridor, policy, tmp_path):  # noqa: F811
    first = run(policy, tmp_path, episodes=2)
    again = run(policy, tmp_path, episodes=2, videos=1)
    assert [(e.task, e.index, e.steps) for e in again.episodes] == [(e.task, e.index, e.steps) for e in first.episodes]
    assert [(tmp_path / f"{task}_0.mp4").is_file() for task in ("short", "long")] == [True, True]


def test_folder_without_settings_is_refused(corridor, policy, tmp_path):  # noqa: F811
    run(policy, tmp_path, episodes=1)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"has episodes, but no evaluation\.json with their settings"):
        run(policy, tmp_path, episodes=1)


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_episode_with_a_damaged_video_runs_again(corridor, policy, tmp_path, damage):  # noqa: F811
    run(policy, tmp_path, episodes=1, videos=1)
    content = (video := tmp_path / "short_0.mp4").read_bytes()
    video.write_bytes(content[:-100] if damage == "cut" else b"")
    run(policy, tmp_path, episodes=1, videos=1)
    assert video.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [None, {"steps": 0}, {"steps": -3}, {"seconds": 0.0}, {"chunk_ms": []}, {"chunk_ms": [1.0, float("nan")]}],
)
def test_damaged_outcome_error_names_its_file(corridor, policy, tmp_path, changes):  # noqa: F811
    first = run(policy, tmp_path, episodes=1)
    outcome = json.loads((file := tmp_path / "episodes" / "short_0.json").read_text())
    file.write_text("" if changes is None else json.dumps(outcome | changes))
    with pytest.raises(ValueError, match=r"short_0\.json.* Delete this file, and the same command runs"):
        run(policy, tmp_path, episodes=1)
    file.unlink()
    assert run(policy, tmp_path, episodes=1).episodes == first.episodes


def test_folder_is_locked_during_an_evaluation(corridor, monkeypatch, policy, tmp_path):  # noqa: F811
    def second(observation, **options):
        return run(random_policy(), tmp_path)

    monkeypatch.setattr(policy, "infer", second)
    with pytest.raises(ValueError, match=r"Another process evaluates into .*; wait for its end, or choose"):
        run(policy, tmp_path)
    assert len(run(random_policy(), tmp_path).episodes) == 6


def test_command_saves_outcomes_and_writes_a_page(corridor, tmp_path, capsys):  # noqa: F811
    arguments = ["eval", "demo", "--env", "corridor", "--episodes", "1", "--max-steps", "2", "--workers", "1"]
    main([*arguments, "--out", str(tmp_path), "--videos", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["success_rate"] == 0
    page = (tmp_path / "index.html").read_text()
    for text in ("0.0%", "go a short way", "95 % interval", 'src="short_0.mp4"', "0 of 2"):
        assert text in page
    assert {path.name for path in (tmp_path / "episodes").iterdir()} == {"short_0.json", "long_0.json"}
