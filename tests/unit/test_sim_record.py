"""Recording of demonstrations: content and determinism of the dataset, interruptions."""

import contextlib
import dataclasses
import itertools
import json
import operator
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from process_helpers import interruptible
from sim_helpers import (
    Corridor,
    corridor,  # noqa: F401
    require_simulator,
)

from torchpi import sim
from torchpi.cli import main
from torchpi.config import PRESETS
from torchpi.data import LeRobotDataset, LeRobotWriter
from torchpi.data.inspect import inspect_dataset
from torchpi.evaluation.chunks import sample_new_images
from torchpi.sim import make_environment
from torchpi.sim.environment import environment_seed
from torchpi.sim.record import RECORDING_FILE, record
from torchpi.training.config import TrainConfig
from torchpi.training.setup import open_data


def quiet(out, tasks=("short", "long"), episodes=2, env="corridor", workers=1, push_rate=0, **options):
    return record(env, list(tasks), episodes, out, workers=workers, progress=False, push_rate=push_rate, **options)


def recording(path):
    return json.loads((path / RECORDING_FILE).read_text(encoding="utf-8"))


def frames(path):
    """All frames of a dataset."""
    data = LeRobotDataset(path, action_horizon=1)
    return [data[i] for i in range(len(data))]


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_dataset_contains_the_experts_episodes(corridor, tmp_path):  # noqa: F811
    result = quiet(tmp_path / "set", seed=3, noise=0, command="torchpi sim record")
    seeds = [environment_seed("record", 3, task, index) for task in ("short", "long") for index in range(2)]
    lengths = [5 + seed % 5 + 5 for seed in seeds]
    assert (result.episodes, result.frames, result.failures) == (4, sum(lengths), {"short": 0, "long": 0})
    found = frames(tmp_path / "set")
    assert len(found) == sum(lengths)
    instructions = ["go a short way"] * sum(lengths[:2]) + ["go a long way"] * sum(lengths[2:])
    assert [frame["task"] for frame in found] == instructions
    np.testing.assert_array_equal([frame["action"][0] for frame in found], [[1, 0, 0, -1]] * len(found))
    positions = np.concatenate([np.arange(length) for length in lengths]) / 10
    np.testing.assert_allclose([frame["observation.state"][0] for frame in found], positions, rtol=1e-6)
    assert found[0]["observation.images.base"].shape == (16, 16, 3)
    for frame in (found[0], found[-1]):
        np.testing.assert_array_equal(frame["observation.images.base"] // 2, frame["observation.images.wrist"])
    document = recording(tmp_path / "set")
    assert document["tasks"] == {"short": "go a short way", "long": "go a long way"}
    assert (document["env"], document["seed"], document["noise"]) == ("corridor", 3, 0)
    assert document["command"] == "torchpi sim record"
    assert set(document["versions"]) == {"torchpi", "numpy", "mujoco"}
    assert [(e["task"], e["seed"], e["length"]) for e in document["episodes"]] == [
        (task, seed, length) for task, seed, length in zip(["short"] * 2 + ["long"] * 2, seeds, lengths, strict=True)
    ]
    assert [made.log[-1] for made in corridor] == ["close", "close"]


def test_noise_disturbs_execution_and_label_is_the_experts_action(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "set", tasks=["long"], episodes=10, noise=0.4, noisy_fraction=0.3)
    episodes = recording(tmp_path / "set")["episodes"]
    assert [i for i, episode in enumerate(episodes) if episode["noisy"]] == [3, 6, 9]
    found = frames(tmp_path / "set")
    np.testing.assert_array_equal([frame["action"][0] for frame in found], [[1, 0, 0, -1]] * len(found))
    start = 0
    for episode in episodes:
        position = 10 * np.array([frame["observation.state"][0] for frame in found[start : start + episode["length"]]])
        steps = np.diff(position)
        if episode["noisy"]:
            assert steps.min() < 0.99  # disturbed, and clipped to 1
            assert steps.max() < 1.001
        else:
            np.testing.assert_allclose(steps, 1, rtol=1e-5)
        start += episode["length"]


def test_push_disturbs_execution_and_label_is_the_experts_action(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "set", tasks=["long"], episodes=6, noise=0, noisy_fraction=1, push_rate=0.1)
    lengths, found = [e["length"] for e in recording(tmp_path / "set")["episodes"]], frames(tmp_path / "set")
    np.testing.assert_array_equal([frame["action"][0] for frame in found], [[1, 0, 0, -1]] * len(found))
    state = np.array([frame["observation.state"][0] for frame in found])
    pushes = []
    for episode in np.split(state, np.cumsum(lengths)[:-1]):
        for step, run in itertools.groupby(np.round(10 * np.diff(episode), 4)):
            if step != 1:  # the expert's
                pushes.append((step, len(list(run))))
    assert len(pushes) >= 4
    assert len({step for step, _ in pushes}) > 1
    # A push may be cut by the end of its episode, and one that is clipped to 1 looks like the expert's step.
    assert 5 <= max(length for _, length in pushes) <= 20


def test_disturbance_is_scaled_by_the_simulator(corridor, tmp_path, monkeypatch):  # noqa: F811
    """Noise and pushes are scaled by `Simulator.disturbance`, and not clipped."""
    scaled = dataclasses.replace(sim.simulator("corridor"), disturbance=(0.2, 0, 0, 0.5))
    monkeypatch.setitem(sim._SIMULATORS, "corridor", scaled)
    executed, step = [], Corridor.step
    monkeypatch.setattr(Corridor, "step", lambda self, action: executed.append(action) or step(self, [*action[:3], 0]))
    for push_rate in (0, 1):
        executed.clear()
        quiet(tmp_path / str(push_rate), ["long"], 30, noise=0.5, noisy_fraction=1, push_rate=push_rate)
        difference = np.array(executed) - [1, 0, 0, -1]
        scale = 0.5 if push_rate == 0 else 1
        np.testing.assert_allclose(difference.std(axis=0), scale * np.array(scaled.disturbance), rtol=0.25)
        assert {frame["action"][0][3] for frame in frames(tmp_path / str(push_rate))} == {-1}


@pytest.mark.parametrize(("fraction", "noisy"), [(0, 0), (0.5, 4), (1, 8)])
def test_noisy_fraction_applies_to_each_task(corridor, tmp_path, fraction, noisy):  # noqa: F811
    quiet(tmp_path / "set", episodes=8, noisy_fraction=fraction)
    for task in ("short", "long"):
        episodes = [e for e in recording(tmp_path / "set")["episodes"] if e["task"] == task]
        assert sum(episode["noisy"] for episode in episodes) == noisy


def test_same_seed_gives_same_dataset(corridor, tmp_path):  # noqa: F811
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quiet(tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


# Experts that fail


def failing(seeds, monkeypatch):
    """Let the expert stand still in the episodes with some seeds."""

    def expert_action(self):
        return np.array([0 if seeds(self.seed) else 1, 0, 0, -1], np.float32)

    def reset(self, seed):
        self.seed = seed
        original(self, seed)

    original = Corridor.reset
    monkeypatch.setattr(Corridor, "reset", reset)
    monkeypatch.setattr(Corridor, "expert_action", expert_action)


def test_failed_episodes_are_replaced_and_counted(corridor, tmp_path, monkeypatch):  # noqa: F811
    failing(lambda seed: seed % 6 == 0, monkeypatch)
    result = quiet(tmp_path / "set", episodes=10)
    episodes = recording(tmp_path / "set")["episodes"]
    assert result.episodes == len(episodes) == 20
    assert 0 < sum(result.failures.values()) < 20
    assert recording(tmp_path / "set")["failures"] == result.failures
    assert not any(episode["seed"] % 6 == 0 for episode in episodes)


def test_expert_failing_too_often_is_an_error(corridor, tmp_path, monkeypatch):  # noqa: F811
    failing(lambda seed: seed % 8 != 0, monkeypatch)
    with pytest.raises(ValueError, match=r"The expert of short failed in \d+ of \d+ episodes; record with less noise"):
        quiet(tmp_path / "set", episodes=10)


def test_expert_that_never_succeeds_leaves_no_files(corridor, tmp_path, monkeypatch):  # noqa: F811
    failing(lambda seed: True, monkeypatch)
    with pytest.raises(ValueError, match="episode 0 of short: The expert of short failed in 10 of 10 episodes"):
        quiet(tmp_path / "set")
    assert not (tmp_path / "set").exists()


# Errors and interruptions


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"env": "libero"}, KeyError, "There is no environment 'libero'"),
        ({"env": "aloha_sim", "tasks": ["insertion"]}, ValueError, "aloha_sim has no scripted experts to record"),
        ({"tasks": ["fly"]}, KeyError, "corridor has no task 'fly'"),
        ({"tasks": []}, ValueError, "at least one task"),
        ({"episodes": 0}, ValueError, "at least one episode"),
        ({"noise": -0.1}, ValueError, "noise of at least 0"),
        ({"noisy_fraction": 1.1}, ValueError, "a noisy_fraction and a push_rate from 0 to 1"),
        ({"push_rate": -0.1}, ValueError, "a noisy_fraction and a push_rate from 0 to 1"),
        ({"workers": 0}, ValueError, "workers must be at least 1"),
        ({"image_size": 0}, ValueError, "image_size"),
        ({"image_size": 15, "video": True}, ValueError, "even height and width"),
        ({"seed": -1}, ValueError, "The seed is -1"),
    ],
)
def test_invalid_argument_is_an_error_and_leaves_no_files(corridor, tmp_path, options, error, message):  # noqa: F811
    with pytest.raises(error, match=message):
        quiet(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_folder_with_other_content_is_refused_and_unchanged(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "set")
    before = files(tmp_path / "set")
    for other in ({"seed": 5}, {"tasks": ["long", "short"]}, {"video": True}):
        with pytest.raises(ValueError, match="has 4 episodes that were recorded with other arguments"):
            quiet(tmp_path / "set", **other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("here")
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        quiet(tmp_path / "mine")
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize("ends", [(1,), (3,), (1, 2), (2, 3)])
def test_resumed_recording_equals_an_uninterrupted_one(
    corridor,  # noqa: F811
    tmp_path,
    monkeypatch,
    ends,
):
    quiet(tmp_path / "uninterrupted", noisy_fraction=0.5)
    add_episode = LeRobotWriter.add_episode

    def interrupted(self, episode, task):
        add_episode(self, episode, task)
        if self.num_episodes == after:
            raise KeyboardInterrupt

    for end, begin in zip(ends, (0, *ends), strict=False):
        after = end - begin
        monkeypatch.setattr(LeRobotWriter, "add_episode", interrupted)
        with pytest.raises(KeyboardInterrupt, match=rf"The {end} episodes? that (was|were) complete"):
            quiet(tmp_path / "set", noisy_fraction=0.5)
    monkeypatch.setattr(LeRobotWriter, "add_episode", add_episode)
    result = quiet(tmp_path / "set", noisy_fraction=0.5)
    again = quiet(tmp_path / "set", noisy_fraction=0.5)  # all episodes exist
    assert result.episodes == again.episodes == 4
    assert {path.name for path in tmp_path.iterdir()} == {"uninterrupted", "set"}
    assert recording(tmp_path / "set") == recording(tmp_path / "uninterrupted")
    for frame, expected in zip(frames(tmp_path / "set"), frames(tmp_path / "uninterrupted"), strict=True):
        assert all(np.array_equal(frame[key], expected[key]) for key in expected)


class Killed(BaseException):
    """Simulates the end of the process, before anything else can be written."""


@contextlib.contextmanager
def killing(monkeypatch, **functions):
    """Let a recording end as if its process were killed in one of these functions."""
    with monkeypatch.context() as patch:
        patch.setattr(LeRobotWriter, "__exit__", lambda self, *_: self._recording._release_lock())
        for target, function in functions.items():
            patch.setattr(target, function)
        with pytest.raises(Killed):
            yield


def killed(monkeypatch, out, saved, **options):
    """Record as if the process were killed after saving some episodes."""
    add_frame = LeRobotWriter.add_frame

    def dies(self, frame):
        if self.num_episodes == saved:
            raise Killed
        add_frame(self, frame)

    with killing(monkeypatch, **{"torchpi.data.LeRobotWriter.add_frame": dies}):
        quiet(out, **options)


def test_killed_recording_can_be_resumed(corridor, tmp_path, monkeypatch):  # noqa: F811
    quiet(tmp_path / "uninterrupted")
    for saved in (0, 1, 0, 1):
        killed(monkeypatch, tmp_path / "set", saved)
        assert any(tmp_path.glob("set*/.recording"))
    quiet(tmp_path / "set")
    assert {path.name for path in tmp_path.iterdir()} == {"uninterrupted", "set"}
    assert recording(tmp_path / "set") == recording(tmp_path / "uninterrupted")
    assert len(frames(tmp_path / "set")) == len(frames(tmp_path / "uninterrupted"))


def test_recording_names_all_package_versions_used(corridor, tmp_path, monkeypatch):  # noqa: F811
    out, options = tmp_path / "set", {"tasks": ["short"], "episodes": 2}
    killed(monkeypatch, out, 1, **options)
    document = recording(out)
    present = document["versions"]["mujoco"]
    (out / RECORDING_FILE).write_text(json.dumps(document | {"versions": document["versions"] | {"mujoco": "0.1"}}))
    quiet(out, **options)
    assert recording(out)["versions"] == document["versions"] | {"mujoco": f"0.1, {present}"}
    before = files(out)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    quiet(out, **options)  # all episodes exist
    assert files(out) == before


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        pytest.param("write_json", 1, marks=pytest.mark.slow),
        ("shutil.rmtree", 1),
        pytest.param("shutil.rmtree", 2, marks=pytest.mark.slow),
        ("pathlib.Path.rename", 1),
    ],
)
def test_recording_killed_during_merge_has_each_episode_once(
    corridor,  # noqa: F811
    tmp_path,
    monkeypatch,
    function,
    calls,
):
    out, left, options = tmp_path / "set", [calls], {"tasks": ["short"], "episodes": 3}
    for _ in range(2):
        killed(monkeypatch, out, 1, **options)
    original = operator.attrgetter(function)(sim.record)

    def dies(path, *arguments, **options):
        left[0] -= str(path).startswith(str(out)) and not options
        if left[0] == 0:
            raise Killed
        return original(path, *arguments, **options)

    with killing(monkeypatch, **{f"torchpi.sim.record.{function}": dies}):
        quiet(out, **options)
    assert quiet(out, **options).episodes == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    episodes = recording(out)["episodes"]
    assert [episode["seed"] for episode in episodes] == [environment_seed("record", 0, "short", i) for i in range(3)]
    assert len(frames(out)) == sum(episode["length"] for episode in episodes)


def test_rest_of_a_missing_recording_is_refused(corridor, tmp_path, monkeypatch):  # noqa: F811
    for _ in range(2):
        killed(monkeypatch, tmp_path / "set", 1)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set\.rest continues a recording that is no longer in .*set: move or"):
        quiet(tmp_path / "set", seed=1)


def test_slow_cameras_repeat_and_mark_their_images(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "every", tasks=["long"], noise=0)
    quiet(tmp_path / "set", tasks=["long"], noise=0, render_every=3)
    data = LeRobotDataset(tmp_path / "set", action_horizon=2)
    starts = [rows.start for rows in data.episode_rows]
    expected = [i for rows in data.episode_rows for i in range(rows.start, rows.stop, 3)]
    assert data.new_images.tolist() == expected
    assert [bool(data[i]["images_are_new"]) for i in range(len(data))] == [i in expected for i in range(len(data))]
    every = frames(tmp_path / "every")
    for i in range(len(data)):
        latest = max(new for new in expected if new <= i)
        np.testing.assert_array_equal(data[i]["observation.images.base"], every[latest]["observation.images.base"])
        np.testing.assert_array_equal(data[i]["observation.state"], every[i]["observation.state"])
    assert set(sample_new_images(data, 5)) <= set(expected)
    assert len(starts) == 2


def test_inspection_accepts_marked_repeated_images(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "set", tasks=["long"], noise=0, render_every=3)
    for camera in inspect_dataset(tmp_path / "set").cameras:
        repeated, looked_at = camera.repeated
        assert (repeated, looked_at > 0) == (0, True)


def test_training_samples_begin_at_new_images(corridor, tmp_path):  # noqa: F811
    quiet(tmp_path / "set", render_every=4)
    config = TrainConfig(dataset=str(tmp_path / "set"), embodiment="metaworld", batch_size=2, holdout=0.0)
    (source,) = open_data(config, PRESETS["tiny"])
    np.testing.assert_array_equal(source.frames, source.train.new_images)
    assert len(source.frames) < len(source.train) / 3


class Later(Corridor):
    """A corridor with deferred rendering, in which success may not last."""

    falls = False

    def snapshot(self):
        return self.position

    def observe_snapshot(self, snapshot, *, images=True):
        now, self.position = self.position, snapshot
        observation = self.observe() if images else {"state": np.array([self.position, self.goal, 0, 0]) / 10}
        self.position = now
        return observation

    def step(self, action):
        return super().step(action) and not (self.falls and self.position >= self.goal + 3)


def later(monkeypatch, falls, **fields):
    made = []

    def make(task, *, image_size):
        made.append(Later(task, image_size=image_size))
        made[-1].falls = falls
        return made[-1]

    monkeypatch.setitem(sim._SIMULATORS, "later", dataclasses.replace(sim.simulator("corridor"), make=make, **fields))
    return made


def test_deferred_images_equal_immediate_ones(corridor, tmp_path, monkeypatch):  # noqa: F811
    made = later(monkeypatch, falls=False)
    quiet(tmp_path / "now", noise=0.4, render_every=2)
    quiet(tmp_path / "later", noise=0.4, render_every=2, env="later")
    assert files(tmp_path / "now" / "data") != {}
    # The seeds of an environment do not depend on its name.
    for frame, expected in zip(frames(tmp_path / "later"), frames(tmp_path / "now"), strict=True):
        assert all(np.array_equal(frame[key], expected[key]) for key in expected)
    rendered = sum(entry == "observe" for environment in made for entry in environment.log)
    assert rendered == sum(frame["images_are_new"] for frame in frames(tmp_path / "later"))


def test_success_that_does_not_last_is_not_recorded(corridor, tmp_path, monkeypatch):  # noqa: F811
    later(monkeypatch, falls=True, success_lasts=True, tail=6)
    with pytest.raises(ValueError, match="failed in 10 of 10 episodes"):
        quiet(tmp_path / "set", env="later", noise=0)
    later(monkeypatch, falls=False, success_lasts=True, tail=6)
    quiet(tmp_path / "set", env="later", noise=0)
    lengths = [episode["length"] for episode in recording(tmp_path / "set")["episodes"]]
    assert lengths == [5 + episode["seed"] % 5 + 6 for episode in recording(tmp_path / "set")["episodes"]]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(28, "No space left on device"),
            OSError,
            r"No space left on device\. The 3 episodes that were complete",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^The 3 episodes that were complete are in "),
    ],
)
def test_complete_episodes_are_kept_after_an_error(
    corridor,  # noqa: F811
    tmp_path,
    monkeypatch,
    error,
    kind,
    message,
):
    saved = []
    add_episode = LeRobotWriter.add_episode
    failing(lambda seed: seed == environment_seed("record", 0, "long", 1), monkeypatch)  # the one that is not saved

    def add(self, episode, task):
        if len(saved) == 3:
            raise error
        add_episode(self, episode, task)
        saved.append(task)

    monkeypatch.setattr(LeRobotWriter, "add_episode", add)
    with pytest.raises(kind, match=message):
        quiet(tmp_path / "set")
    assert len(recording(tmp_path / "set")["episodes"]) == 3
    assert recording(tmp_path / "set")["failures"] == {"short": 0, "long": 0}
    assert recording(tmp_path / "set")["tasks"] == {"short": "go a short way", "long": "go a long way"}
    assert len(frames(tmp_path / "set")) == sum(e["length"] for e in recording(tmp_path / "set")["episodes"])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [made.log[-1] for made in corridor] == ["close", "close"]


# Meta-World


@pytest.mark.slow
def test_dataset_does_not_depend_on_the_number_of_workers(tmp_path):
    require_simulator()
    for workers in (1, 2):
        quiet(tmp_path / str(workers), ["button-press-topdown"], 3, "metaworld", image_size=24, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    found = frames(tmp_path / "1")
    assert found[0]["observation.images.wrist"].shape == (24, 24, 3)
    assert found[0]["observation.images.base"].std() > 10
    assert {frame["task"] for frame in found} == {"press the button from the top"}
    # The first frame is what the environment shows at that seed, and the action the expert's.
    environment = make_environment("metaworld", "button-press-topdown", image_size=24)
    environment.reset(recording(tmp_path / "1")["episodes"][0]["seed"])
    observation = environment.observe()
    np.testing.assert_array_equal(observation["base"], found[0]["observation.images.base"])
    np.testing.assert_array_equal(observation["state"].astype(np.float32), found[0]["observation.state"])
    np.testing.assert_array_equal(environment.expert_action(), found[0]["action"][0])
    environment.close()


def test_command_records_and_prints_the_result(tmp_path, capsys):
    require_simulator()
    arguments = ["--tasks", "faucet-open", "--episodes", "1", "--image-size", "24", "--workers", "1"]
    main(["sim", "record", "--out", str(tmp_path / "a"), *arguments])
    captured = capsys.readouterr()
    assert captured.out.startswith("1 episode, ")
    assert "1/1" in captured.err
    main(["sim", "record", "--out", str(tmp_path / "b"), *arguments, "--video", "--json"])
    document = json.loads(capsys.readouterr().out)
    # The noted command repeats the recording.
    command = recording(tmp_path / "a")["command"]
    assert command == (
        f"torchpi sim record --out {tmp_path / 'a'} --episodes 1 --tasks faucet-open --env metaworld "
        "--render-every 1 --seed 0 --noise 0.4 --noisy-fraction 0.5 --push-rate 0.02 --image-size 24 --no-video"
    )
    assert recording(tmp_path / "b")["command"].endswith("--video")
    assert document["path"] == str(tmp_path / "b")
    assert document["failures"] == {"faucet-open": 0}
    assert len(frames(tmp_path / "a")) == len(frames(tmp_path / "b")) == document["frames"]
    assert not list(tmp_path.glob("a/**/*.mp4"))
    assert len(list(tmp_path.glob("b/**/*.mp4"))) == 2


def test_command_prints_one_line_for_an_invalid_argument(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sim", "record", "--out", str(tmp_path / "set"), "--tasks", "fly", "--episodes", "1"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (1, "")
    assert captured.err.startswith("error: metaworld has no task 'fly'; its tasks are assembly")
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_complete_episodes(tmp_path, workers):
    require_simulator()
    out = tmp_path / "set"
    with interruptible(
        "-m", "torchpi.cli", "sim", "record", "--out", out, "--tasks", "faucet-open", "--episodes", 500,
        "--image-size", 24, "--workers", workers,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while len(list((out / ".recording").glob("episode_*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    episodes = recording(out)["episodes"]
    assert 2 <= len(episodes) < 500
    assert stderr.strip().endswith(f"interrupted: The {len(episodes)} episodes that were complete are in {out}.")
    assert len(LeRobotDataset(out, action_horizon=16)) == sum(episode["length"] for episode in episodes)
    assert not (out / ".recording").exists()
