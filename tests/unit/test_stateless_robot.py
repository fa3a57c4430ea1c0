"""A robot without a state: embodiment, dataset, statistics, training, inference, doctor and recording."""

import dataclasses
import json

import numpy as np
import pytest
from train_helpers import SIZES

import torchpi
from torchpi.cli import main
from torchpi.data import LeRobotDataset, LeRobotWriter, compute_norm_stats, idle_frames, to_observation
from torchpi.data.stats import stats_coverage
from torchpi.inspect.doctor import diagnose
from torchpi.robots import Embodiment
from torchpi.serving.metrics import Metrics
from torchpi.serving.recorder import Recorder
from torchpi.training import loop
from torchpi.training.config import TrainConfig

NAMES = ["a", "b"]
ROBOT = Embodiment.generic(
    "arm", cameras={"base_0_rgb": "front"}, state=[], actions=NAMES, command="velocity", control_hz=10, execute_steps=2
)


def write(path, state_names):
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        path, fps=10, cameras={"front": (32, 32, 3)}, state_names=state_names, action_names=NAMES, video=False
    ) as writer:
        for _ in range(2):
            for _ in range(6):
                frame = {"observation.images.front": np.zeros((32, 32, 3), np.uint8), "action": rng.normal(size=2)}
                writer.add_frame(frame | ({"observation.state": rng.normal(size=2)} if state_names else {}))
            writer.save_episode("push it")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stateless") / "set", None)


@pytest.fixture(scope="module", params=["pi05", pytest.param("pi0", marks=pytest.mark.slow)])
def policy(request, dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    (root / "arm.json").write_text(json.dumps(ROBOT.to_dict()))
    is_pi05 = request.param == "pi05"
    sizes = dataclasses.replace(SIZES, pi05=is_pi05, discrete_state_input=is_pi05)
    (root / "model.json").write_text(json.dumps(sizes.to_dict()))
    config = TrainConfig(
        dataset=str(dataset), embodiment=str(root / "arm.json"), model=str(root / "model.json"), num_steps=2,
        batch_size=2, warmup_steps=0, holdout=0.5 if is_pi05 else 0.0, chunk_samples=2, state_noise=0.1, workers=0,
    )  # fmt: skip
    return torchpi.load_policy(loop.train(config, root / "run").policy)


def test_observation_has_an_empty_state():
    sample = ROBOT.to_model(ROBOT.example_observation(state_dim=0))
    assert sample["state"].shape == (0,)
    assert Embodiment.from_dict(ROBOT.to_dict()) == ROBOT
    with pytest.raises(ValueError, match="the actions a are deltas, but the state has none"):
        Embodiment.generic("arm", cameras={"base_0_rgb": "front"}, state=[], actions=NAMES, delta=["a"])


def test_dataset_without_state_needs_a_stateless_robot(dataset):
    data = LeRobotDataset(dataset, action_horizon=4)
    assert data[0]["observation.state"].shape == (0,)
    assert "observation.state" not in data.features
    assert set(to_observation(data[0], ROBOT)) == {"front", "actions", "prompt"}
    other = Embodiment.generic("other", cameras={"base_0_rgb": "front"}, state=NAMES, actions=NAMES)
    for read in (lambda: to_observation(data[0], other), lambda: compute_norm_stats(data, other, action_horizon=4)):
        with pytest.raises(KeyError, match=r'no observation\.state.*--rename NAME=observation\.state.*"state": \[\]'):
            read()


def test_statistics_cover_only_the_actions(dataset):
    data = LeRobotDataset(dataset, action_horizon=4)
    stats = compute_norm_stats(data, ROBOT, action_horizon=4)
    assert (stats["state"].dim, stats["actions"].dim) == (0, 2)
    (coverage,) = stats_coverage(data, ROBOT, {"itself": stats}, action_horizon=4)
    assert coverage.comparable
    assert coverage.state is None
    assert not idle_frames(data).any()


def test_state_in_the_dataset_is_ignored(tmp_path):
    data = LeRobotDataset(write(tmp_path / "set", NAMES), action_horizon=4, embodiment=ROBOT)
    assert "state" not in to_observation(data[0], ROBOT)
    assert compute_norm_stats(data, ROBOT, action_horizon=4)["state"].dim == 0


def test_trained_policy_runs_and_passes_doctor(policy):
    observation = policy.example_observation()
    assert set(observation) == {"front", "prompt"}
    assert policy.infer(observation)["actions"].shape == (4, 2)
    _, inputs = policy.prepare(observation)
    assert not inputs["state"].any()
    found = diagnose(policy, observation, num_seeds=1, num_steps=1)
    assert found.observation.state == ()
    assert not [finding for finding in found.findings if "state" in finding.about]
    if policy.model.config.pi05:
        assert found.observation.prompt.text == f"Task: {observation['prompt']}, State: ;\nAction: "


def test_trained_policy_is_saved_evaluated_and_recorded(policy, dataset, tmp_path, capsys):
    policy.save(tmp_path / "policy")
    again = torchpi.load_policy(tmp_path / "policy")
    noise = np.zeros(policy.model.config.chunk_shape, np.float32)
    observation = policy.example_observation()
    actions = policy.infer(observation, noise=noise)["actions"]
    assert np.array_equal(again.infer(observation, noise=noise)["actions"], actions)
    main(["eval", str(tmp_path / "policy"), "--dataset", str(dataset), "--samples", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    with Recorder({"arm": tmp_path / "recorded"}, Metrics()) as recorder:
        recorder.keep("arm", 0, policy, observation, actions)
    assert LeRobotDataset(tmp_path / "recorded", action_horizon=1)[0]["action"].shape == (1, 8)
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "policy"), str(tmp_path / "converted"), "--to", "lerobot"])
    assert "arm has no state, but LeRobot's policies need one" in capsys.readouterr().err
