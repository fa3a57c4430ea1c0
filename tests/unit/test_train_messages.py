"""Warnings and errors of a run about the device, the schedule, constant dimensions and wrong paths."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from train_helpers import small_recipe, write_dataset

from torchpi.cli import main
from torchpi.data import LeRobotWriter
from torchpi.devices import has_bfloat16
from torchpi.robots import get_embodiment
from torchpi.training import loop, summary
from torchpi.training import weights as training_weights
from torchpi.training.run_folder import resume_config


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    dataset = tmp_path_factory.mktemp("data") / "set"
    write_dataset(dataset)
    return small_recipe(dataset, num_steps=1, warmup_steps=0, holdout_samples=4)


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A CPU without bfloat16 instructions."""
    for module in (training_weights, summary):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: False)


@pytest.mark.parametrize(
    ("stated", "used", "message"),
    [
        (None, "float32", "matmuls in float32: this cpu device has no bfloat16 arithmetic"),
        pytest.param(
            *("bfloat16", "bfloat16", "warning: this cpu device has no bfloat16 arithmetic and emulates it"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_matmuls_are_in_float32_where_the_device_has_no_bfloat16(
    recipe, tmp_path, capsys, without_bfloat16, stated, used, message
):
    loop.train(recipe.replace(dtype=stated, holdout=0.0), tmp_path / "run")
    assert message in unwrapped(capsys)
    assert resume_config(tmp_path / "run").model.dtype == used


def test_cpu_flags_show_bfloat16_support(monkeypatch):
    for flags, expected in {
        "flags : fma avx512_bf16 avx2": True, "flags : amx_bf16": True, "Features : asimd bf16 sve": True,
        "flags : fma avx2 avx512f": False, "Features : asimd i8mm": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self, flags=flags: flags)
        assert has_bfloat16(torch.device("cpu")) == expected, flags


def unwrapped(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_missing_tracker_package_raises_error_before_data_is_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchpi\[track\]'"):
        loop.train(recipe.replace(trackers=("wandb",), dataset="nowhere"), tmp_path / "run")


def still_dataset(path):
    """Write episodes in which the gripper is constant, with another value in each; delta_z is constant in all."""
    rng = np.random.default_rng(0)
    names = ["hand_x", "hand_y", "hand_z", "gripper"], ["delta_x", "delta_y", "delta_z", "gripper"]
    cameras = dict.fromkeys(("base", "wrist"), (32, 32, 3))
    with LeRobotWriter(path, fps=80, cameras=cameras, state_names=names[0], action_names=names[1]) as writer:
        for episode in range(4):
            for _ in range(6):
                images = {f"observation.images.{name}": np.zeros((32, 32, 3), np.uint8) for name in cameras}
                action = rng.normal(size=4)
                action[2:] = 0.5, episode
                writer.add_frame({**images, "observation.state": rng.normal(size=4), "action": action})
            writer.save_episode("open the drawer")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_chunk_errors_are_relative_to_the_range_of_the_whole_dataset(recipe, tmp_path, capfd, workers):
    """The gripper has no range within the held-out episode. The dimension that never varies is reported once."""
    still_dataset(tmp_path / "set")
    config = recipe.replace(dataset=str(tmp_path / "set"), chunk_samples=2, workers=workers)
    with pytest.warns(UserWarning, match=r"statistics of actions don't vary in dimension 2 \(delta_z\)") as warned:
        run = loop.train(config, tmp_path / "run").report.parent
    assert len(warned) == 1
    assert "UserWarning" not in capfd.readouterr().err  # of worker processes
    (errors,) = (line["chunk_error_dims"] for line in read_lines(run) if "chunk_error_dims" in line)
    assert {name for name, value in errors.items() if value is None} == {"delta_z"}
    assert "never moving: delta_z" in (run / "report.html").read_text(encoding="utf-8")


def read_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_path_inside_a_run_raises_error_that_names_the_run(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe.replace(holdout=0.0), run)
    with pytest.raises(FileNotFoundError, match=re.escape(f"The folder of the run is {run}.")):
        resume_config(run / "checkpoints" / "00000001")
    with pytest.raises(ValueError, match=r"is not a checkpoint itself; the last one in it is .*/00000001/policy"):
        loop.train(recipe.replace(init=str(run), model=None), run.parent / "next")


def test_steps_after_the_schedules_end_print_note(recipe, tmp_path, capsys):
    loop.train(recipe.replace(num_steps=2, decay_steps=1, ema_decay=0.0, holdout=0.0), tmp_path / "run")
    assert "the learning rate stays at min_lr 2.5e-06 from decay_steps 1 on" in unwrapped(capsys)


def test_gaps_for_the_control_loop_print_warnings_before_training(recipe, tmp_path, capsys):
    robot = get_embodiment("metaworld")
    actions = tuple(dataclasses.replace(action, command=None) for action in robot.actions)
    robot = dataclasses.replace(robot, actions=actions, execute_steps=99)
    (tmp_path / "robot.json").write_text(json.dumps(robot.to_dict()))
    loop.train(recipe.replace(embodiment=str(tmp_path / "robot.json"), num_steps=1), tmp_path / "run")
    shown = unwrapped(capsys)
    assert "warning: embodiment metaworld: execute_steps is 99, but its chunk has only" in shown
    assert "no command is stated for delta_x, delta_y, delta_z, gripper" in shown
    assert re.search(r"steps 1/1, loss [\d.]+, .* samples/s, \d+ % waiting for data", shown)


def test_out_of_memory_error_suggests_the_plan(recipe, tmp_path, capsys, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(loop, "train", out_of_memory)
    with pytest.raises(SystemExit):
        main(["train", "--dataset", recipe.data.dataset, "--embodiment", "metaworld", "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 2.00 GiB. Run torchpi train --plan with the same options" in message
    assert "GPU 0" not in message
