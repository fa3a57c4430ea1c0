"""Comparison of a dataset's rate with its robot's in every command, and resampling."""

import contextlib
import json

import numpy as np
import pytest
from numbered_set import FRONT, JOINTS, read_number, write_set
from train_helpers import SIZES

from torchpi.cli import main
from torchpi.data import LeRobotDataset, compute_norm_stats
from torchpi.data.rate import Resampling, rate_note, resampling_for, with_rate
from torchpi.errors import DatasetError, TrainingError
from torchpi.robots import Embodiment
from torchpi.training.config import Source, TrainConfig
from torchpi.training.run_folder import find_start
from torchpi.training.setup import open_data


def robot(hz=None, command="position", **fields):
    joints = {"state": JOINTS, "actions": JOINTS, "delta": JOINTS[:3]} | fields
    return Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, command=command, control_hz=hz, **joints)


@pytest.fixture
def robot_file(tmp_path):
    def write(*args, **fields):
        path = tmp_path / "arm.json"
        path.write_text(json.dumps(robot(*args, **fields).to_dict()))
        return str(path)

    return write


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """30 frames per second, episodes of 31 and 20 frames."""
    return write_set(tmp_path_factory.mktemp("data") / "set", (31, 20), fps=30)


def opened(root, embodiment=None, fps=None):
    return LeRobotDataset(root, action_horizon=4, embodiment=embodiment, fps=fps)


def episodes_of(columns, lengths):
    return np.split(columns, np.cumsum(lengths)[:-1])


# Comparison


@pytest.mark.parametrize(("fps", "hz"), [(30, 30), (30, 30.0), (29.97, 30), (30, 29.97), (30, None)])
def test_equal_rates_change_nothing(fps, hz, thirty):
    assert resampling_for(thirty, fps, robot(hz), None) is None
    assert resampling_for(thirty, fps, robot(hz), fps) is None
    assert rate_note(fps, fps, robot(hz)) is None


@pytest.mark.parametrize(("hz", "fps"), [(10, None), (50, None), (29, None), (10, 20), (30, 10)])
def test_different_rates_are_an_error_with_both(hz, fps, thirty):
    message = rf"30 frames per second.* acts at {hz} Hz \(control_hz\).* times the recorded speed.*fps={hz}, or, if"
    with pytest.raises(DatasetError, match=message):
        opened(thirty, robot(hz), fps)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_errors(fps, thirty):
    with pytest.raises(DatasetError, match="expected a positive number of frames"):
        opened(thirty, robot(), fps)


def test_robot_without_a_rate_gets_the_datasets_rate(thirty):
    assert with_rate(robot(), opened(thirty, robot()).fps).control_hz == 30
    assert with_rate(robot(), opened(thirty, robot(), 12.5).fps).control_hz == 12.5
    assert with_rate(robot(50), 30).control_hz == 50


# Resampling


@pytest.mark.parametrize(("fps", "step"), [(10, 3), (15, 2), (5, 6)])
def test_every_nth_frame_is_read_at_a_divisor_of_the_rate(fps, step, thirty):
    recorded = opened(thirty)
    dataset = opened(thirty, robot(fps), fps)
    kept = [np.arange(0, n, step) for n in (31, 20)]
    assert dataset.episode_lengths == tuple(map(len, kept))
    rows = np.concatenate([kept[0], 31 + kept[1]])
    for name in ("observation.state", "action", "episode_index", "index"):
        assert np.array_equal(dataset.columns[name], recorded.columns[name][rows]), name
    numbers = [1000 * e + f for e in (0, 1) for f in kept[e].tolist()]
    assert [read_number(dataset[i][FRONT]) for i in range(len(dataset))] == numbers
    assert dataset[1]["timestamp"] == pytest.approx(1 / fps)
    assert dataset[1]["frame_index"] == 1
    last = dataset.numbers(len(kept[0]) - 2)
    assert np.array_equal(last["action"], recorded.columns["action"][kept[0][[-2, -1, -1, -1]]])
    assert last["action_is_pad"].tolist() == [False, False, True, True]
    dataset.check_videos()


@pytest.mark.parametrize("fps", [7, 12.5, 20, 29, 45, 50])
def test_frames_are_the_nearest_in_time(fps, thirty):
    dataset = opened(thirty, robot(), fps)
    first = 0
    for episode, (recorded, length) in enumerate(zip((31, 20), dataset.episode_lengths, strict=True)):
        assert (length - 1) / fps <= (recorded - 1) / 30 + 1e-6 < length / fps
        for i in range(length):
            number = read_number(dataset[first + i][FRONT]) - 1000 * episode
            distance = abs(number / 30 - i / fps)
            assert distance <= min(abs(other / 30 - i / fps) for other in range(recorded)) + 1e-9
            assert dataset.numbers(first + i)["index"] == 1000 * episode + number
        first += length


@pytest.mark.parametrize("fps", [10, 12.5, 20, 50])
def test_resampling_preserves_motion(fps, thirty):
    """At any time, the sums of increments and the distances covered by velocities equal the recorded ones."""
    command = dict(zip(JOINTS, ("increment", "velocity", "position", "effort"), strict=True))
    recorded = opened(thirty)
    dataset = opened(thirty, robot(fps, command, delta=()), fps)
    before = episodes_of(recorded.columns["action"].astype(np.float64), (31, 20))
    after = episodes_of(dataset.columns["action"].astype(np.float64), dataset.episode_lengths)
    states = episodes_of(dataset.columns["observation.state"], dataset.episode_lengths)
    for old, new, state in zip(before, after, states, strict=True):
        times = np.minimum(np.arange(1, len(new) + 1) / fps, len(old) / 30)  # the ends of the new steps
        moved = [
            np.interp(times, np.arange(len(old) + 1) / 30, np.concatenate([[0], np.cumsum(old[:, i])])) for i in (0, 1)
        ]
        np.testing.assert_allclose(np.cumsum(new[:, 0]), moved[0], atol=1e-4)
        durations = np.diff(times, prepend=0)
        np.testing.assert_allclose(np.cumsum(new[:, 1] * durations), moved[1] / 30, atol=1e-4)
        np.testing.assert_allclose(new[:, 2:], state[:, 2:] + 0.1, atol=1e-6)  # the values of the nearest frame
    assert rate_note(dataset.fps, dataset.recorded_fps, robot(fps, command, delta=())) == (
        f"read at {fps:g} instead of 30 frames per second: the frames that are nearest in time, with their states and "
        "actions; j1 averaged between them; j0 summed between them"
    )


def test_constant_velocity_is_unchanged(thirty):
    actions = Resampling(30, 12.5, ("velocity", "increment")).actions(np.full((31, 2), 0.25, np.float32))
    np.testing.assert_allclose(actions[:, 0], 0.25, atol=1e-6)
    np.testing.assert_allclose(actions[:-1, 1], 0.6, atol=1e-6)
    whole = Resampling(30, 20, ("increment",)).actions(np.arange(6)[:, None])  # one and a half steps each
    np.testing.assert_allclose(whole[:, 0], [0.5, 2.5, 5, 7][: len(whole)])


def test_resampling_without_commands_is_an_error(thirty):
    with pytest.raises(DatasetError, match=r"doesn't state the command of j0, j1, j2, j3.*State \"command\""):
        opened(thirty, robot(10, None), 10)


def test_resampling_without_a_robot_is_an_error(thirty):
    with pytest.raises(DatasetError, match="give embodiment=, too"):
        opened(thirty, None, 10)


def test_summed_increments_beyond_the_limits_are_an_error(thirty):
    limited = robot(10, "increment", delta=(), limits={"j1": {"low": -1.5, "high": 1.5}})
    with pytest.raises(
        DatasetError, match=r"At 10 frames per second j1, an increment, would be .* takes -1\.5 to 1\.5"
    ):
        opened(thirty, limited, 10)


def test_statistics_are_computed_from_resampled_frames(thirty):
    recorded = opened(thirty)
    dataset = opened(thirty, robot(10), 10)
    state = compute_norm_stats(dataset, robot(10), action_horizon=4)["state"]
    rows = [*range(0, 31, 3), *range(31, 51, 3)]
    np.testing.assert_allclose(state.mean, recorded.columns["observation.state"][rows].mean(axis=0), rtol=1e-5)


# Commands


def run(capsys, *arguments):
    with contextlib.suppress(SystemExit):
        main([str(word) for word in arguments])
    return capsys.readouterr()


@pytest.mark.parametrize(
    "command",
    [
        ["stats"],
        pytest.param(["bench", "data", "--workers", "0", "--batch", "2", "--repeats", "1"], marks=pytest.mark.slow),
    ],
)
def test_commands_compare_and_resample(command, thirty, robot_file, capsys):
    words = [*command, thirty, "--embodiment", robot_file(10)]
    refused = run(capsys, *words).err
    assert "has 30 frames per second, and embodiment 'arm' acts at 10 Hz" in refused
    assert "--fps 10" in refused
    shown = run(capsys, *words, "--fps", "10", "--json")
    assert "is read at 10 instead of 30 frames per second" in shown.err
    json.loads(shown.out)


def test_commands_take_a_tolerance(tmp_path, robot_file, capsys):
    uneven = write_set(tmp_path / "uneven", (12,), kind="image", clock=lambda e, t: t + 0.04 * (t > 0))
    words = ["stats", uneven, "--embodiment", robot_file(10)]
    assert "allow more with --tolerance-s" in run(capsys, *words).err
    assert "12 frames" in run(capsys, *words, "--tolerance-s", "0.05").out


def recipe(path, embodiment, **fields):
    options = {"batch_size": 2, "num_steps": 1, "holdout": 0.0, "trackers": (), "workers": 0} | fields
    return TrainConfig(dataset=str(path), embodiment=embodiment, **options)


def test_training_compares_and_resamples(thirty, robot_file, tmp_path):
    file = robot_file(10)
    with pytest.raises(DatasetError, match=r"30 frames per second.*acts at 10 Hz"):
        open_data(recipe(thirty, file), SIZES)
    (source,) = open_data(recipe(thirty, file, fps=10.0, holdout=0.5), SIZES)
    assert (source.train.fps, source.holdout.fps, source.embodiment.control_hz) == (10, 10, 10)
    (source,) = open_data(recipe(thirty, robot_file()), SIZES)
    assert (source.train.fps, source.embodiment.control_hz) == (30, 30)
    (tmp_path / "run").mkdir()
    config = recipe(thirty, file, fps=10.0)
    (tmp_path / "run/train.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "run/train.json").data.fps == 10
    with pytest.raises(TrainingError, match=r"fps was 10(\.0)?, now None"):
        find_start(config.replace(fps=None), tmp_path / "run", resume=True)


def test_mixture_has_one_rate_per_robot(thirty, tmp_path, robot_file):
    ten = write_set(tmp_path / "ten", (20,), fps=10)
    file = robot_file()

    def mixture(*sources):
        return TrainConfig(mixture=sources, batch_size=2, holdout=0.0, trackers=(), workers=0)

    with pytest.raises(TrainingError, match=r"'arm' acts at 30 Hz in .* and at 10 Hz in .*ten"):
        open_data(mixture(Source(str(thirty), file), Source(str(ten), file)), SIZES)
    data = open_data(mixture(Source(str(thirty), file, fps=10.0), Source(str(ten), file)), SIZES)
    assert [source.train.fps for source in data] == [10, 10]
    with pytest.raises(TrainingError, match="can't also set fps, norm_stats; set them in the mixture's entries"):
        TrainConfig(mixture=(Source(str(ten), file),), fps=10.0, norm_stats="init")
    with pytest.raises(DatasetError, match=r"acts at 10 Hz") as caught:
        open_data(mixture(Source(str(ten), file), Source(str(thirty), robot_file(10))), SIZES)
    note = f"({thirty} is part of a mixture: its options are in its entry in the recipe.)"
    assert caught.value.__notes__ == [note]
