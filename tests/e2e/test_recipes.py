"""The recipes: their values are openpi's, their help shows them, and they run."""

import pathlib
import re
import runpy
import sys

import numpy as np
import pytest
from commands import SMALL_TRAINING, use_small_weights
from droid_set import RENAME, write_droid_set

import torchpi
from torchpi.checkpoints.address import PUBLISHED, published_name
from torchpi.cli import main
from torchpi.config import preset
from torchpi.data import LeRobotWriter
from torchpi.robots import get_embodiment
from torchpi.training import loop
from torchpi.training.config import TrainConfig
from torchpi.training.optim import learning_rate

FOLDER = pathlib.Path(__file__).parents[2] / "recipes"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))

# Of openpi's training/config.py: steps, batch, average, rates of the first update, of the peak and at the end.
OPENPI = {
    "aloha_sim": (20_000, 32, 0.99, 2.5e-5 / 1001, 2.5e-5, 8.48e-06),
    "droid": (100_000, 256, 0.99, 5e-5 / 1001, 5e-5, 5e-5),
    "generic_robot": (30_000, 32, 0.0, 2.5e-5 / 1001, 2.5e-5, 2.5e-6),
    "libero": (30_000, 256, 0.999, 5e-5 / 10_001, 5e-5, 5e-5),
}


def recipe_of(name: str) -> TrainConfig:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["RECIPE"]


def rate(recipe: TrainConfig, step: int) -> float:
    return learning_rate(step, recipe.optim, recipe.num_steps)


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_are_openpis(name):
    recipe = recipe_of(name)
    steps, batch, ema, first, peak, last = OPENPI[name]
    assert (recipe.num_steps, recipe.batch_size, recipe.optim.ema_decay) == (steps, batch, ema)
    rates = [rate(recipe, step) for step in (0, recipe.optim.warmup_steps, steps)]
    np.testing.assert_allclose(rates, [first, peak, last], rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_weights_model_and_robot_belong_together(name):
    recipe = recipe_of(name)
    base = published_name(recipe.model.init)
    assert base is not None
    for field in ("pi05", "action_dim", "paligemma", "action_expert", "siglip", "vocab_size"):
        assert getattr(preset(recipe.model.config or base), field) == getattr(preset(base), field)
    if recipe.data.embodiment:
        robot = get_embodiment(recipe.data.embodiment)
        assert robot.action_size <= preset(base).action_dim
        assert recipe.data.norm_stats in ("dataset", f"init:{robot.asset_id}")


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_recipes_values(name, monkeypatch, capsys):
    recipe = recipe_of(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for value in (recipe.num_steps, recipe.model.init, recipe.optim.lr, recipe.optim.ema_decay):
        assert f"(default: {value})" in shown


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_the_docstring_are_valid(name, monkeypatch):
    begun = []

    def train(config, *_, **__):
        begun.append(config)
        raise ValueError("this is all")

    monkeypatch.setattr(loop, "train", train)
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    lines = re.findall(rf"^ {{4}}.*recipes/{name}\.py (.+)$", text, re.MULTILINE)
    options = " ".join(re.findall(r"^ {4}(--.+)$", text, re.MULTILINE))
    assert lines
    for line in (*lines, f"{lines[0]} {options}"):
        with pytest.raises(SystemExit, match="1"):  # 2: It is not understood
            main(["train", *line.split()], recipe_of(name))
    assert [config.data.dataset for config in begun] == ["DATASET"] * (len(lines) + 1)
    assert bool(options) == (begun[0] != begun[-1])


@pytest.mark.slow
def test_a_recipe_runs(tmp_path, monkeypatch, golden_root):
    """LIBERO's, on a small dataset, with small weights in place of pi05_base."""
    use_small_weights(monkeypatch, tmp_path / "published", golden_root)
    rng = np.random.default_rng(0)
    names = [f"pose_{i}" for i in range(8)]
    with LeRobotWriter(
        tmp_path / "set",
        fps=10,
        cameras=dict.fromkeys(("image", "wrist_image"), (32, 32, 3)),
        state_names=names,
        action_names=names[:7],
    ) as writer:
        for _ in range(3):
            for _ in range(12):
                image, wrist = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
                frame = {"observation.images.image": image, "observation.images.wrist_image": wrist}
                writer.add_frame({**frame, "observation.state": rng.normal(size=8), "action": rng.normal(size=7)})
            writer.save_episode("put the bowl on the plate")
    arguments = f"--dataset {tmp_path}/set --out {tmp_path}/run --device cpu {SMALL_TRAINING} --num-steps 2"
    monkeypatch.setattr(sys, "argv", ["libero.py", *arguments.split()])
    runpy.run_path(str(FOLDER / "libero.py"), run_name="__main__")
    policy = torchpi.load_policy(tmp_path / "run" / "checkpoints" / "00000002" / "policy")
    assert policy.embodiment.name == "pi05_libero"
    assert (policy.model.config.action_horizon, policy.model.config.discrete_state_input) == (10, False)
    assert policy.provenance["recipe"]["model"]["init"] == f"{PUBLISHED}pi05_base"
    assert policy.infer(policy.example_observation(), num_steps=1)["actions"].shape == (10, 7)


@pytest.mark.slow
def test_droid_recipe_trains_on_a_dataset_of_openpis_converter(tmp_path, monkeypatch, golden_root):
    use_small_weights(monkeypatch, tmp_path / "published", golden_root)
    states = write_droid_set(tmp_path / "set")
    arguments = ["--dataset", f"{tmp_path}/set", "--out", f"{tmp_path}/run", "--device", "cpu", "--rename", *RENAME]
    monkeypatch.setattr(sys, "argv", ["droid.py", *arguments, *SMALL_TRAINING.split(), "--num-steps", "2"])
    runpy.run_path(str(FOLDER / "droid.py"), run_name="__main__")
    policy = torchpi.load_policy(tmp_path / "run" / "checkpoints" / "00000002" / "policy")
    assert policy.provenance["recipe"]["data"]["rename"] == list(RENAME)
    observation = policy.example_observation()
    observation |= {"observation/joint_position": states[0, :7], "observation/gripper_position": states[0, 7:]}
    assert policy.infer(observation, num_steps=1)["actions"].shape == (15, 8)
