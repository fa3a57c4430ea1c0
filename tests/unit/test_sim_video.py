"""Videos of episodes: files, lengths, and content."""

import av
import numpy as np
import pytest
from sim_helpers import (
    Corridor,
    corridor,  # noqa: F401
    require_simulator,
)

from torchpi.sim import make_environment
from torchpi.sim.evaluate import evaluate
from torchpi.sim.rollout import Rollout, run_episode
from torchpi.sim.video import EVERY, EXECUTED, FAILURE, FPS, PREDICTED, SINGLE_VIEW, SUCCESS, VIEW, record_video


class Forward:
    def __init__(self, action=(1, 0, 0, 0)):
        self.action = action

    def infer(self, observation, **options):
        return {"actions": np.tile(np.asarray(self.action, np.float32), (8, 1))}


def frames_of(path):
    """All frames of a video, [n, h, w, 3]."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == FPS
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def recorded_episode(path, environment, policy, *, seed=0, **rollout):
    """Record an episode; return its outcome, and the frames before encoding."""
    with record_video(path, environment, "go a short way") as callback:
        outcome = run_episode(policy, environment, seed, rollout=Rollout(4, **rollout), callback=callback)
        return outcome, np.stack(list(callback.frames()))


def near(image, colour):
    """Mask of pixels with roughly this colour: lines have smooth edges, and video is lossy."""
    return np.abs(image.astype(int) - colour).sum(axis=-1) < 60


def test_video_has_every_second_step_and_holds_the_last_frame(tmp_path):
    environment = Corridor()
    outcome, drawn = recorded_episode(tmp_path / "new" / "video.mp4", environment, Forward(), seed=2)
    assert outcome.steps == 7
    video = frames_of(tmp_path / "new" / "video.mp4")
    assert video.shape == drawn.shape
    assert np.abs(video.astype(int) - drawn).mean() < 5
    steps = [0, 2, 4, 6, 7]
    assert EVERY == 2
    assert len(video) == len(steps) - 1 + FPS
    assert environment.log.count("render") == len(steps)
    assert video.shape[1] > VIEW
    assert video.shape[2] > 2 * VIEW
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["video.mp4"]


def test_success_and_failure_are_drawn(tmp_path):
    for action, colour, other in (((1, 0, 0, 0), SUCCESS, FAILURE), ((0.01, 0, 0, 0), FAILURE, SUCCESS)):
        recorded_episode(tmp_path / "video.mp4", Corridor(), Forward(action))
        video = frames_of(tmp_path / "video.mp4")
        assert near(video[-1], colour).sum() > 1000
        assert near(video[-1], other).sum() == 0
        assert near(video[0], colour).sum() == 0


def test_executed_and_predicted_actions_are_drawn(tmp_path):
    _, drawn = recorded_episode(tmp_path / "video.mp4", Corridor(), Forward((0.01, 0, 0, 0)))
    lines = [near(drawn[i, VIEW + 40 :], EXECUTED).sum() for i in (0, 5, 15)]
    assert lines[0] < lines[1] < lines[2]
    assert near(drawn[5, VIEW + 40 :], PREDICTED).sum() > 20


def test_failed_episode_leaves_no_video(tmp_path):
    class Failing(Corridor):
        def step(self, action):
            raise ValueError("NaN")

    with pytest.raises(ValueError, match="NaN"):
        recorded_episode(tmp_path / "video.mp4", Failing(), Forward())
    assert list(tmp_path.iterdir()) == []


def test_no_path_gives_no_callback():
    environment = Corridor()
    with record_video(None, environment, "go") as callback:
        assert callback is None


def test_missing_encoder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("torchpi.sim.video._ENCODERS", ("no_such",))
    with pytest.raises(ValueError, match="no video encoder; expected one of no_such"):
        recorded_episode(tmp_path / "video.mp4", Corridor(), Forward())


def test_long_instruction_is_shortened(tmp_path):
    with record_video(tmp_path / "video.mp4", Corridor(), "go a very long way " * 20) as callback:
        run_episode(Forward(), Corridor(), 0, callback=callback)
    assert len(frames_of(tmp_path / "video.mp4"))


def test_first_episodes_of_each_task_are_recorded_as_video(corridor, tmp_path):  # noqa: F811
    policy = Forward()
    result = evaluate(policy, "corridor", episodes=3, videos=2, out=tmp_path / "videos", progress=False)
    names = ["short_0.mp4", "short_1.mp4", "long_0.mp4", "long_1.mp4"]
    assert result.videos == tuple(str(tmp_path / "videos" / name) for name in names)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(names)
    assert [episode.video for episode in result.episodes][2:4] == [None, result.videos[2]]
    without = evaluate(policy, "corridor", episodes=3, progress=False)
    outcomes = [[(e.task, e.seed, e.success, e.steps) for e in r.episodes] for r in (result, without)]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("env", "task", "view"),
    [("metaworld", "drawer-open", VIEW), pytest.param("aloha_sim", "insertion", SINGLE_VIEW, marks=pytest.mark.slow)],
)
def test_hand_paths_are_drawn_without_changing_the_episode(tmp_path, env, task, view):
    require_simulator()
    environment = make_environment(env, task)
    size = environment.embodiment.action_size
    policy = Forward((0.5, 0.5, 0.3, 0) if size == 4 else (0.3, -0.5, 1, 0, 0, 0, 1) * 2)
    outcome, drawn = recorded_episode(tmp_path / "video.mp4", environment, policy, max_steps=24)
    state = environment.observe()["state"]
    assert drawn.shape[2] > drawn.shape[1] * 0.8
    for colour in (EXECUTED, PREDICTED):
        assert near(drawn[-1, 40:view], colour).sum() > 10
    assert run_episode(policy, environment, 0, rollout=Rollout(4, max_steps=24)).steps == outcome.steps == 24
    np.testing.assert_array_equal(environment.observe()["state"], state)
    environment.close()
