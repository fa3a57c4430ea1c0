"""Runs, recipes and policy folders of earlier versions load, resume and sample the same numbers."""

import dataclasses
import json
import pathlib
import re
import runpy
import shutil
import warnings

import numpy as np
import pytest
import torch

import torchpi
from torchpi.cli import main
from torchpi.training.config import TrainConfig

# The old files state no command for their actions; the warning is tested with the policy folder.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not state the command of each action:UserWarning")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
KEYS = ("loss", "grad_norm", "holdout_loss")
POLICIES = ("policy_pi05_v1", "policy_pi05_v2", "policy_pi0_v1", "policy_pi0_v2")

# Options of earlier versions, and the name that an error must mention if the option is no longer accepted.
OLD_FLAGS = {
    "train --accumulate 2": "grad-accum-steps",
    "train --num-draws 2": "flow-samples-per-obs",
    "train --trained all": "finetune",
    "train --trained lora": "finetune",
    "train --checkpointing layers": "activation-checkpointing",
    "train --learning-rate 1e-4": "lr",
    "train --final-learning-rate 1e-5": "min-lr",
    "train --max-given 2": "max-action-prefix",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads add sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_numbers(actual, expected, arithmetic) -> None:
    """Compare to float32 rounding if PyTorch and the CPU's instruction set are those that computed `expected`."""
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    same = all(str(value) == str(arithmetic[name]) for name, value in here.items())
    np.testing.assert_allclose(actual, expected, rtol=1e-6 if same else 1e-5, atol=2e-7 if same else 1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_folder_samples_same_actions(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        case = dict(arrays)
    observation = {key: case[key] for key in ("front", "wrist", "state")} | {"prompt": str(case["prompt"])}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        policy = torchpi.load_policy(FIXTURES / name, device="cpu")
    assert len(said) <= 1
    actions = policy.infer(observation, noise=case["noise"], num_steps=10)["actions"]
    assert_same_numbers(actions, case["actions"], case)
    if "continued" in case:
        continued = policy.infer(observation, noise=case["noise"], action_prefix=case["actions"][1:], delay=1)
        assert_same_numbers(continued["actions"], case["continued"], case)
    assert policy.embodiment.name == "two_joints"
    assert policy.metadata["robot"] == "left"


def test_run_resumes_with_same_losses(tmp_path, monkeypatch):
    folder = tmp_path / "fixtures"
    shutil.copytree(FIXTURES, folder, ignore=shutil.ignore_patterns("policy_*"))
    monkeypatch.chdir(folder)
    main(["train", "--resume", "run", "--num-steps", "6"])
    lines, expected = (
        [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
        for path in ("run/metrics.jsonl", "resumed_metrics.jsonl")
    )
    resumed = [line for line in lines if line["step"] > 3]
    with np.load("resumed_arithmetic.npz") as arithmetic:
        found = {key: [[line[key] for line in each if key in line] for each in (resumed, expected)] for key in KEYS}
        assert_same_numbers(*found["grad_norm"], arithmetic)
        for key in ("loss", "holdout_loss"):  # earlier versions add the elements in another order
            np.testing.assert_allclose(*found[key], rtol=5e-7)
    assert len([line for line in lines if "loss" in line]) == 6
    policy = torchpi.load_policy("run/checkpoints/00000006/policy", device="cpu")
    assert policy.infer(policy.example_observation(), num_steps=1)["actions"].shape == (4, 4)


def test_policy_of_a_run_loads():
    policy = torchpi.load_policy(FIXTURES / "run" / "checkpoints" / "00000003" / "policy", device="cpu")
    assert policy.infer(policy.example_observation(), num_steps=1)["actions"].shape == (4, 4)


def values_of(config: TrainConfig) -> list:
    """The values of all fields, at any depth."""

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for each in value.values() for leaf in leaves(each)]
        if isinstance(value, list | tuple):
            return [leaf for each in value for leaf in leaves(each)]
        return [value]

    return leaves(dataclasses.asdict(config))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "recipe.json",
            [
                *("dataset", "metaworld", "0:3", "sizes.json", "tokenizer.model", "frozen_vision", "float32", "real"),
                *(6, 4, 0.001, 0.0001, 0.01, 0.9, 3, 0.05, 7, 0.3),
            ],
        ),
        (
            "recipe_mixture.json",
            [
                *("first", "metaworld", 3.0, "second", "droid", 1.0, "0:40,57", "open the drawer", "init:droid"),
                *("joint_position+gripper_position=observation.state", "lora_strict", 8, 16.0, 3e-5),
            ],
        ),
    ],
)
def test_recipe_file_keeps_its_values(name, expected, tmp_path):
    config = TrainConfig.from_json(FIXTURES / name)
    found = values_of(config)
    assert [value for value in expected if value not in found] == []
    (tmp_path / "again.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "again.json") == config


def test_python_recipe_keeps_its_values():
    recipe = runpy.run_path(str(FIXTURES / "recipe.py"))["RECIPE"]
    expected = ["pi05_libero", "gs://openpi-assets/checkpoints/pi05_base", "lora", 30_000, 256, "constant", 5e-5, 0.999]
    assert [value for value in [*expected, 10_000, 5000, 2] if value not in values_of(recipe)] == []


@pytest.mark.parametrize("arguments", OLD_FLAGS)
def test_old_flag_works_or_its_error_names_the_new_flag(arguments, tmp_path, capsys):
    rest = ["--dataset", str(tmp_path / "missing"), "--embodiment", "metaworld", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main([*arguments.split(), *rest])
    if end.value.code != 1:  # 1: the flag is accepted, but the dataset is missing
        assert re.search(rf"--([\w-]+\.)?{OLD_FLAGS[arguments]}\b", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        ("bench --draws 2", "--flow-samples-per-obs"),
        ("bench control --episodes 5", "python benchmarks/control.py"),
        ("bench sim", "python benchmarks/simulation.py"),
        ("bench serve --guided mid", "python benchmarks/guidance.py"),
    ],
)
def test_old_benchmark_error_names_the_new_command(arguments, new, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(arguments.split())
    assert new in capsys.readouterr().err
