"""Evaluation of a policy on recorded episodes: sampled frames, errors, baselines, plots, and the command."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.cli import main
from torchpi.data import LeRobotDataset, LeRobotWriter, to_observation
from torchpi.evaluation import Chunks, chunk_errors, errors_of, plot_chunks, plot_errors, predict_chunks, sample_frames
from torchpi.evaluation.chunks import Frame
from torchpi.evaluation.report import evaluate_on_dataset, run_dataset_evaluation
from torchpi.robots import ActionDim, StateKey, aloha, droid, libero, metaworld
from torchpi.robots.commands import hold_commands
from torchpi.transforms import Normalization, NormStats, save_norm_stats

HORIZON = 4
LENGTHS = (6, 3, 9)
ARM = Embodiment(
    "arm",
    cameras=Embodiment.generic("", cameras={"base_0_rgb": "front"}, state=["s"], actions=["a"]).cameras,
    state=(StateKey("state", ("elbow", "gripper"), units=("rad", "0 to 1")),),
    actions=(ActionDim("elbow", "rad", "delta", "position"), ActionDim("gripper", "0 to 1", command="position")),
    execute_steps=2,
)
FRONT = "observation.images.front"


def write_set(path, *, camera=FRONT, action_names=("elbow", "gripper")):
    rng = np.random.default_rng(0)
    shapes = {camera.removeprefix("observation.images."): (28, 28, 3)}
    with LeRobotWriter(
        path, fps=10, cameras=shapes, state_names=["elbow", "gripper"], action_names=list(action_names)
    ) as writer:
        for episode, length in enumerate(LENGTHS):
            for _ in range(length):
                image = rng.integers(0, 256, (28, 28, 3), np.uint8)
                state, action = rng.normal(size=2), rng.normal(size=len(action_names))
                writer.add_frame({camera: image, "observation.state": state, "action": action})
            writer.save_episode(f"task {episode}")
    return path


def config(**fields):
    sizes = {"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    defaults = {
        "paligemma_variant": GemmaConfig(width=16, mlp_dim=32, **sizes),
        "action_expert_variant": GemmaConfig(width=8, mlp_dim=16, **sizes),
        "siglip_variant": VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch=14),
        "action_dim": 3,
        "action_horizon": HORIZON,
        "vocab_size": 512,
        "image_size": 28,
    }
    return Pi0Config(pi05=True, **(defaults | fields))


@pytest.fixture(scope="module")
def make_policy(golden_root):
    def make(**fields):
        model, generator = torchpi.Pi0(config(**fields)), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        one = NormStats(np.zeros(2), np.ones(2), np.full(2, -2.0), np.full(2, 2.0))
        return Policy(
            model,
            ARM,
            norm_stats={"state": one, "actions": one},
            normalization={key: Normalization("quantile") for key in ("state", "actions")},
            tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
        )

    return make


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy()


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    policy.save(path := tmp_path_factory.mktemp("policy") / "arm")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def dataset(path):
    return LeRobotDataset(path, action_horizon=HORIZON)


# Frames


def test_sampled_frames_are_spread_over_episodes_and_time():
    lengths = (100, 5, 200)
    frames = sample_frames(lengths, 45, seed=1)
    bounds = [0, 100, 105, 305]
    per_episode = [[f - a for f in frames if a <= f < b] for a, b in itertools.pairwise(bounds)]
    assert [len(part) for part in per_episode] == [20, 5, 20]  # all frames of the short one
    for length, part in zip(lengths, per_episode, strict=True):
        assert [frame * len(part) // length for frame in part] == list(range(len(part)))  # one in each part
    assert frames == sample_frames(lengths, 45, seed=1) != sample_frames(lengths, 45, seed=2)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any), st.integers(1, 60), st.integers(0, 5))
def test_samples_are_distinct_and_as_many_as_possible(lengths, samples, seed):
    frames = sample_frames(lengths, samples, seed=seed)
    assert len(frames) == min(samples, sum(lengths))
    assert frames == sorted(set(frames))
    assert set(frames) <= set(range(sum(lengths)))
    ends = np.cumsum(lengths)
    shares = [sum(end - length <= frame < end for frame in frames) for end, length in zip(ends, lengths, strict=True)]
    for share, length in zip(shares, lengths, strict=True):
        assert share == length or share >= max(shares) - 1


def test_sampling_no_frames_is_an_error():
    with pytest.raises(ValueError, match="no frames to sample: the 2 episodes are empty"):
        sample_frames((0, 0), 4)
    with pytest.raises(ValueError, match="samples is 0"):
        sample_frames((3,), 0)


# Chunks


def test_chunks_equal_policy_infer_on_the_frame(policy, dataset):
    frames = [0, 7, 17]
    chunks = predict_chunks(policy, dataset, frames, seed=5, num_steps=2, noise_samples=2)
    assert chunks.predicted.shape == (3, 2, HORIZON, 2)
    assert [(frame.episode, frame.number, frame.task) for frame in chunks.frames] == [
        (0, 0, "task 0"),
        (1, 1, "task 1"),
        (2, 8, "task 2"),
    ]
    noises = []
    policy_infer = policy.infer_batch

    def spy(observations, *, noise, num_steps):
        noises.append(noise)
        return policy_infer(observations, noise=noise, num_steps=num_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "infer_batch", spy)
        predict_chunks(policy, dataset, frames, seed=5, num_steps=2, noise_samples=2)
    for i, frame in enumerate(frames):
        item = dataset[frame]
        np.testing.assert_array_equal(chunks.recorded[i], item["action"])
        np.testing.assert_array_equal(chunks.is_pad[i], item["action_is_pad"])
        for sample in range(2):
            observation = to_observation(item, ARM)
            single = policy.infer(observation, noise=noises[0][2 * i + sample], num_steps=2)["actions"]
            np.testing.assert_allclose(chunks.predicted[i, sample], single, rtol=0, atol=1e-5)
    assert not np.allclose(noises[0][0], noises[0][1])


def test_predictions_do_not_depend_on_batch_size_or_selected_episodes(policy, dataset, path):
    def predicted(data, frames, **options):
        return predict_chunks(policy, data, frames, num_steps=2, **options).predicted

    expected = predicted(dataset, range(18))
    for batch_size in (1, 7):
        np.testing.assert_allclose(predicted(dataset, range(18), batch_size=batch_size), expected, rtol=0, atol=1e-5)
    last = LeRobotDataset(path, action_horizon=HORIZON, episodes=[2])
    np.testing.assert_allclose(predicted(last, range(9)), expected[9:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(predicted(dataset, range(18), noise_samples=2)[:, :1], expected, rtol=0, atol=1e-5)
    assert not np.allclose(predicted(dataset, range(18), seed=1), expected, atol=1e-2)


def test_evaluation_does_not_change_a_policy_in_training(make_policy, dataset, capsys):
    policy = make_policy()
    policy.model.train()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    rng = torch.get_rng_state()
    chunk_errors(policy, dataset, [0, 5], num_steps=1)
    assert policy.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in policy.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert capsys.readouterr() == ("", "")


# Errors


def two_frames(**fields):
    """Chunks of three steps at two frames; the last step of the second is padding."""
    recorded = np.array([[[0, 1], [1, 1], [2, 1]], [[4, 0], [4, 0], [9, 9]]], np.float32)
    chunks = {
        "embodiment": ARM,
        "frames": (Frame(0, 0, "t"), Frame(1, 0, "t")),
        "predicted": recorded[:, None] + np.array([1, 0], np.float32),
        "recorded": recorded,
        "is_pad": np.array([[False] * 3, [False, False, True]]),
        "state": np.array([[0, 0.5], [4, 0.5]], np.float32),
    }
    return Chunks(**(chunks | fields))


RECORDED = np.array([[0, 1], [1, 1], [2, 1], [4, 0], [4, 0], [8, 0]], np.float32)


def test_errors_are_in_the_robots_units_without_padding():
    errors = errors_of(two_frames(), RECORDED)
    np.testing.assert_array_equal(errors.counts, [2, 2, 1])
    np.testing.assert_allclose(errors.mae(), [1, 0])
    np.testing.assert_allclose(errors.per_step["policy"].mae, [[1, 0]] * 3)
    np.testing.assert_allclose(errors.mae("hold"), [(0 + 1 + 2 + 0 + 0) / 5, 0.5])
    np.testing.assert_allclose(errors.rmse("hold"), [np.sqrt((0 + 1 + 4) / 5), 0.5])
    np.testing.assert_allclose(errors.per_step["hold"].mae[:, 0], [0, 0.5, 2])
    mean = 19 / 6  # of all frames, not only of the sampled ones
    np.testing.assert_allclose(errors.mae("mean_action")[0], np.abs(np.array([0, 1, 2, 4, 4]) - mean).mean())
    np.testing.assert_array_equal(errors.is_worse_than("hold"), [True, False])
    width = np.quantile([0, 1, 2, 4, 4, 8], 0.99) - np.quantile([0, 1, 2, 4, 4, 8], 0.01)
    assert errors.overall().mae_scaled == pytest.approx((1 / width + 0) / 2)
    assert errors.overall().rmse_scaled == pytest.approx(np.sqrt((1 / width**2 + 0) / 2))


def test_errors_of_several_noise_samples_are_averaged():
    recorded = two_frames().recorded
    samples = recorded[:, None] + np.array([[[-1, 0]], [[3, 0]]], np.float32)  # the mean of the chunks is 1 off
    errors = errors_of(two_frames(predicted=samples), RECORDED)
    np.testing.assert_allclose(errors.mae(), [2, 0])
    np.testing.assert_allclose(errors.rmse(), [np.sqrt(5), 0])


def test_constant_action_has_no_range_and_is_excluded_from_the_average():
    errors = errors_of(two_frames(), np.array([[0, 1], [1, 1], [3, 1]], np.float32))
    assert errors.overall().dimensions == 1
    document = json.loads(json.dumps(errors.to_dict(), allow_nan=False))
    assert document["dimensions"][1]["mae"] == 0
    assert document["dimensions"][1]["mae_scaled"] is None
    assert document["overall"]["mae_scaled"] == document["dimensions"][0]["mae_scaled"]


def test_step_that_no_episode_reaches_is_null():
    is_pad = np.array([[False, True, True]] * 2)
    document = errors_of(two_frames(is_pad=is_pad), RECORDED).to_dict()
    json.dumps(document, allow_nan=False)
    assert [step["actions"] for step in document["horizon"]] == [2, 0, 0]
    assert document["horizon"][1]["mae"] == [None, None]
    assert document["dimensions"][0]["mae"] == 1


def texts(robot):
    return [hold.text if hold else None for hold in hold_commands(robot)]


def test_hold_baseline_follows_the_embodiments_commands():
    assert texts(aloha()) == [f"state {name}" for name in aloha().state_names]
    assert texts(aloha(delta_actions=False)) == texts(aloha())
    assert texts(droid()) == ["no motion"] * 7 + ["state gripper"]
    assert texts(libero()) == texts(libero(delta_actions=True)) == ["no motion"] * 6 + [None]
    assert texts(metaworld()) == ["no motion"] * 3 + [None]  # the state has an opening, the action an effort


def test_hold_command_needs_the_same_unit_and_a_required_dimension():
    def robot(state, actions):
        return dataclasses.replace(ARM, state=(state,), actions=actions)

    def position(name, unit="", kind="absolute"):
        return ActionDim(name, unit, kind, "position")

    degrees = robot(StateKey("state", ("a",), units=("deg",)), (position("a", "rad"),))
    assert texts(degrees) == [None]
    assert texts(robot(StateKey("state", ("b", "a")), (position("a"), position("c")))) == ["state a", None]
    assert texts(robot(StateKey("state", ("b", "a"), min_dim=1), (position("a"),))) == [None]
    assert texts(robot(StateKey("state", ("here",)), (position("there", kind="delta"),))) == ["state here"]
    assert texts(robot(StateKey("state", ("a",)), (ActionDim("a", command="velocity"),))) == ["no motion"]
    assert texts(robot(StateKey("state", ("a",)), (ActionDim("a"),))) == [None]  # no command is guessed


# Plots


def test_plots_show_every_dimension_and_frame(dataset, policy):
    chunks = predict_chunks(policy, dataset, [0, 6, 12], num_steps=1, noise_samples=3)
    figure = plot_chunks(chunks)
    assert len(figure.axes) == 2 * 3
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["elbow\nrad", "gripper\n0 to 1"]
    panel = figure.axes[1]  # episode 1 has three frames
    recorded, *predicted = [line.get_ydata() for line in panel.lines]
    np.testing.assert_array_equal(np.isnan(recorded), [False, False, False, True])
    np.testing.assert_array_equal(predicted, chunks.predicted[1, :, :, 0])
    shown = [
        axes.get_title("left")
        for axes in plot_errors(errors_of(chunks, dataset.columns["action"])).axes
        if axes.get_visible()
    ]
    assert shown == ["all dimensions", "elbow", "gripper"]


# The command


def run(arguments, capsys):
    main(["eval", *map(str, arguments), "--device", "cpu"])
    return capsys.readouterr()


def test_command_prints_one_json_document(folder, path, dataset, policy, capsys):
    captured = run([folder, "--dataset", path, "--samples", 9, "--num-steps", 2, "--seed", 3, "--json"], capsys)
    document = json.loads(captured.out)
    assert (document["samples"], document["frames"], document["episodes"]) == (9, 18, [0, 1, 2])
    frames = sample_frames(LENGTHS, 9, seed=3)
    expected = chunk_errors(policy, dataset, frames, seed=3, num_steps=2)
    assert [row["name"] for row in document["dimensions"]] == ["elbow", "gripper"]
    np.testing.assert_allclose([row["mae"] for row in document["dimensions"]], expected.mae(), atol=1e-5)
    row = document["dimensions"][0]
    assert row["unit"] == "rad"
    assert set(row) == {
        "name", "unit", "range", "mae", "rmse", "mae_scaled", "rmse_scaled", "baselines", "worse_than"
    }  # fmt: skip
    assert row["baselines"]["hold"]["action"] == "state elbow"
    assert len(document["horizon"]) == HORIZON
    assert document["overall"]["baselines"]["hold"]["policy_mae_scaled"] == document["overall"]["mae_scaled"]
    assert document["plots"] == []


@pytest.mark.filterwarnings("always")
def test_dataset_in_another_unit_is_reported(policy, path, golden_root, tmp_path, capsys):
    ends = np.array([-90.0, 0]), np.array([90.0, 1])
    degrees = NormStats(np.zeros(2), np.ones(2), *ends)
    Policy(
        policy.model,
        ARM,
        norm_stats={"state": degrees, "actions": degrees},
        tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
    ).save(tmp_path / "degrees")
    captured = run([tmp_path / "degrees", "--dataset", path, "--num-steps", 1, "--samples", 2, "--json"], capsys)
    for what in ("state", "actions"):
        assert f"{what} elbow: looks like radians, but the statistics are in degrees." in captured.err
    json.loads(captured.out)
    limited = dataclasses.replace(ARM, actions=(dataclasses.replace(ARM.actions[0], low=50, high=60), ARM.actions[1]))
    (tmp_path / "limited.json").write_text(json.dumps(limited.to_dict()))
    options = ["--embodiment", tmp_path / "limited.json", "--num-steps", 1, "--samples", 2]
    assert "'arm' takes 50 to 60 (rad)" in run([tmp_path / "degrees", "--dataset", path, *options], capsys).err


def test_ranges_and_mean_do_not_depend_on_selected_episodes(folder, path, capsys):
    options = [folder, "--dataset", path, "--num-steps", 1, "--samples", 2, "--json"]
    all_episodes, selected = (json.loads(run([*options, *more], capsys).out) for more in ([], ["--select", "2"]))
    assert selected["episodes"] == [2]
    for actual, expected in zip(selected["dimensions"], all_episodes["dimensions"], strict=True):
        assert actual["range"] == expected["range"]
        assert actual["baselines"]["mean_action"]["action"] == expected["baselines"]["mean_action"]["action"]


@pytest.mark.filterwarnings("always")
def test_doctor_compares_a_dataset_with_the_statistics(folder, path, tmp_path, capsys):
    def findings(mean, *options) -> list[tuple[str, str]]:
        other = shutil.copytree(folder, tmp_path / f"{mean}")
        shifted = NormStats(np.full(2, mean), np.ones(2), np.full(2, mean - 2), np.full(2, mean + 2))
        save_norm_stats(other / "norm_stats.json", dict.fromkeys(("state", "actions"), shifted))
        with contextlib.suppress(SystemExit):
            main(["doctor", str(other), "--device", "cpu", "--json", *map(str, options)])
        found = json.loads(capsys.readouterr().out)["findings"]
        return [(entry["level"], entry["message"]) for entry in found if entry["about"] == "dataset"]

    assert findings(0.0, "--dataset", path) == []
    assert findings(99.0) == []
    (level, message), _ = findings(1.5, "--dataset", path)
    assert level == "warning"
    assert re.search(r"\d\d\.\d% of the state are outside q01\.\.q99, where 2% are expected, most of", message)
    ((level, message),) = findings(100.0, "--dataset", path, "--select", "0,2")
    assert level == "problem"
    assert "100.0% of the actions are outside" in message
    with pytest.raises(SystemExit):
        run([tmp_path / "100.0", "--dataset", path, "--num-steps", 1, "--samples", 2], capsys)
    assert "Nothing can be trained or evaluated with them" in capsys.readouterr().err


def test_command_names_worse_dimensions_and_writes_plots(folder, path, tmp_path, capsys):
    out = tmp_path / "new" / "plots"
    captured = run([folder, "--dataset", path, "--num-steps", 1, "--out", out], capsys)
    assert "worse than the baseline hold: elbow" in captured.out
    assert "has only 18 frames to sample 256 from; all of them were used" in captured.err
    for name in ("errors.png", "chunks.png"):
        assert str(out / name) in captured.out
        with Image.open(out / name) as image:
            image.verify()


def test_missing_hold_commands_are_named_with_the_reason(folder, path, tmp_path, capsys):
    commands_of = {"unstated": (None, None), "effort": ("position", "effort"), "stated": ("position", "position")}
    for name, commands in commands_of.items():
        actions = (dataclasses.replace(action, command=c) for action, c in zip(ARM.actions, commands, strict=True))
        robot = dataclasses.replace(ARM, actions=tuple(actions))
        (tmp_path / f"{name}.json").write_text(json.dumps(robot.to_dict()))
    options = [folder, "--dataset", path, "--num-steps", 1, "--samples", 3, "--embodiment"]
    unstated = "No baseline hold for elbow, gripper: the embodiment arm does not state the command of these actions."
    captured = run([*options, tmp_path / "unstated.json"], capsys)
    assert f'{unstated} Write "command" for each, one of position, velocity, increment, effort, in policy.json' in (
        captured.out
    )
    document = json.loads(run([*options, tmp_path / "unstated.json", "--json"], capsys).out)
    assert len(document["notes"]) == 1
    assert document["notes"][0].startswith(unstated)
    assert [row["baselines"]["hold"] for row in document["dimensions"]] == [None, None]
    captured = run([*options, tmp_path / "effort.json"], capsys)
    assert "No baseline hold for gripper (effort): an effort has no hold command" in captured.out
    assert "No baseline hold" not in run([*options, tmp_path / "stated.json"], capsys).out


def test_episodes_can_be_selected(folder, path, capsys):
    result = evaluate_on_dataset(folder, path, episodes=[2, 0], num_steps=1, load={"device": "cpu"})
    assert (result.episodes, result.frames, result.samples) == ((0, 2), 15, 15)
    for episodes, message in (([], "episodes= is empty"), ([7], "has no episode 7")):
        with pytest.raises(ValueError, match=message):
            evaluate_on_dataset(folder, path, episodes=episodes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs either --env (a simulator) or --dataset"),
        (["--env", "metaworld", "--dataset", "PATH"], "needs either --env (a simulator) or --dataset"),
        (
            ["--dataset", "PATH", "--episodes", "3", "--blank-images"],
            "--episodes, --blank-images can only be given with",
        ),
        (["--env", "metaworld", "--samples", "3"], "--samples can only be given with --dataset"),
        (["--dataset", "PATH", "--samples", "0"], "samples is 0"),
        (["--dataset", "PATH", "--batch-size", "0"], "batch_size: got 0; expected 1 or more"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--dataset", "PATH", "--embodiment", "droid"], "that of embodiment 'droid' has 8"),
    ],
)
def test_command_prints_one_line_for_an_invalid_argument(folder, path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run([folder, *(path if argument == "PATH" else argument for argument in arguments)], capsys)
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_dataset_of_another_robot_is_an_error(policy, folder, tmp_path):
    others = LeRobotDataset(write_set(tmp_path / "actions", action_names=("x", "y", "z")), action_horizon=HORIZON)
    with pytest.raises(ValueError, match=r"action has 3 dimensions; embodiment 'arm' has 2: elbow, gripper"):
        chunk_errors(policy, others, [0])
    blind = LeRobotDataset(write_set(tmp_path / "cameras", camera="observation.images.side"), action_horizon=HORIZON)
    with pytest.raises(KeyError, match=r"no camera for front.* its cameras are side"):
        chunk_errors(policy, blind, [0])
    with pytest.raises(KeyError, match=r"no camera for front.* its cameras are .*side"):
        evaluate_on_dataset(folder, tmp_path / "cameras")


def test_invalid_arguments_are_errors(policy, make_policy, dataset, path):
    with pytest.raises(ValueError, match="The model's action_horizon is not set"):
        chunk_errors(make_policy(action_horizon=None), dataset, [0])
    with pytest.raises(ValueError, match=r"predicts 4 actions, but .* chunks of 7. Open it with action_horizon=4"):
        chunk_errors(policy, LeRobotDataset(path, action_horizon=7), [0])
    with pytest.raises(ValueError, match="frames: got 0"):
        chunk_errors(policy, dataset, [])
    with pytest.raises(ValueError, match="noise_samples: got 0"):
        chunk_errors(policy, dataset, [0], noise_samples=0)
    with pytest.raises(IndexError, match="no frame 18"):
        chunk_errors(policy, dataset, [18])


def test_note_counts_frames_with_new_images(monkeypatch, capsys):
    """A dataset of slow cameras repeats the images of the other frames."""
    result = types.SimpleNamespace(samples=6, frames=18, to_dict=dict)
    monkeypatch.setattr("torchpi.evaluation.report.evaluate_on_dataset", lambda *_, **__: result)
    run_dataset_evaluation("policy", "set", samples=9, as_json=True)
    assert "set has only 6 frames with new images to sample 9 from; all of them" in capsys.readouterr().err


def test_policy_without_action_horizon_needs_a_config(policy, make_policy, path, tmp_path):
    """An openpi checkpoint does not state it; the error comes before the dataset is read."""
    from torchpi.evaluation import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "load_policy", lambda *_, **__: make_policy(action_horizon=None))
        with pytest.raises(ValueError, match="action_horizon is not set: this checkpoint does not say it"):
            evaluate_on_dataset("checkpoint", path)
