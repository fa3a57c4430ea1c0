"""Trackers: logged values can be read back, and resumed runs continue in them."""

import importlib.util
import json
import math
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from torchpi.training.run_folder import scalars
from torchpi.training.trackers import Trackers

LINE = {
    "step": 20,
    "loss": 0.25,
    "memory": 3,
    "resumed": True,
    "chunk_error_steps": [0.1, 0.2],
    "chunk_error_dims": {"gripper": 0.5},
    "success": {"reach": {"success_rate": 1.0, "interval": [0.5, 1.0], "episodes": 4}},
}


@pytest.fixture
def plot(tmp_path):
    path = tmp_path / "plot.png"
    Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).save(path)
    return path


def test_scalars_flattens_nested_metrics():
    assert scalars(LINE) == {
        "loss": 0.25,
        "memory": 3.0,
        "chunk_error_dims/gripper": 0.5,
        "success/reach/success_rate": 1.0,
        "success/reach/episodes": 4.0,
    }


def test_no_tracker_writes_nothing(tmp_path, plot):
    tracker = Trackers([], tmp_path / "run", {}, 0)
    tracker.log(1, {"loss": 1.0})
    tracker.image(1, "chunks", plot)
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_raises_error_that_lists_known_ones(tmp_path):
    with pytest.raises(ValueError, match="There is no tracker mlflow; choose from tensorboard, wandb"):
        Trackers(["tensorboard", "mlflow"], tmp_path, {}, 0)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("tensorboard", "torch.utils.tensorboard", "data"), ("wandb", "wandb", "track")],
)
def test_missing_package_raises_error_with_install_command(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'torchpi\[{extra}\]'"):
        Trackers([name], tmp_path, {}, 0)


# TensorBoard


def read_events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def points(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_contains_logged_values(tmp_path, plot):
    tracker = Trackers(["tensorboard"], tmp_path, {"learning_rate": 1e-4}, 0)
    tracker.log(10, {"loss": 0.5, "group/error": 0.125})
    tracker.log(20, {"loss": math.nan, "group/error": 7})
    tracker.image(20, "chunks", plot)
    events = read_events(tmp_path)  # before closing, as after a kill
    tracker.close()
    assert points(events, "group/error") == [(10, 0.125), (20, 7.0)]
    (_, first), (step, last) = points(events, "loss")
    assert (first, step) == (0.5, 20)
    assert math.isnan(last)
    (image,) = events.Images("chunks")
    assert (image.step, image.width, image.height) == (20, 6, 4)
    (recipe,) = events.Tensors("recipe/text_summary")
    assert '"learning_rate": 0.0001' in recipe.tensor_proto.string_val[0].decode()


def test_resumed_run_replaces_later_steps_in_tensorboard(tmp_path):
    first = Trackers(["tensorboard"], tmp_path, {}, 0)
    for step in (10, 20, 30):
        first.log(step, {"loss": float(step)})
    first.close()
    second = Trackers(["tensorboard"], tmp_path, {}, 20)
    second.log(30, {"loss": 0.5})
    second.close()
    assert points(read_events(tmp_path), "loss") == [(10, 10.0), (20, 20.0), (30, 0.5)]


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A fake wandb package that records its calls."""
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("define_metric", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    class Error(Exception):
        pass

    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or Run()
    module.Settings = lambda **options: options
    module.Image = lambda path: ("image", path)
    module.errors = types.SimpleNamespace(Error=Error)
    module.calls = calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_logs_the_step_as_a_metric(tmp_path, wandb, plot):
    """wandb's own step cannot go back, but the step of a resumed run does."""
    tracker = Trackers(["wandb"], tmp_path, {"seed": 1}, 0)
    tracker.log(10, {"loss": 0.5})
    tracker.image(10, "chunks", plot)
    tracker.close()
    (_, options), *calls = wandb.calls
    assert (options["project"], options["name"], options["config"]) == ("torchpi", tmp_path.name, {"seed": 1})
    assert (options["dir"], options["resume"]) == (str(tmp_path), "allow")
    assert calls == [
        ("define_metric", "*", "step"),
        ("log", {"step": 10, "loss": 0.5}),
        ("log", {"step": 10, "chunks": ("image", str(plot))}),
        ("finish",),
    ]


def test_wandb_project_and_name_come_from_recipe_environment_or_folder(tmp_path, wandb, monkeypatch):
    recipe = {"wandb_project": "arms", "wandb_name": "third try"}
    Trackers(["wandb"], tmp_path, {}, 0).close()
    monkeypatch.setenv("WANDB_PROJECT", "lab")
    monkeypatch.setenv("WANDB_NAME", "second try")
    Trackers(["wandb"], tmp_path, dict.fromkeys(recipe), 0).close()
    Trackers(["wandb"], tmp_path, recipe, 0).close()
    found = [(call[1]["project"], call[1]["name"]) for call in wandb.calls if call[0] == "init"]
    assert found == [("torchpi", tmp_path.name), ("lab", "second try"), ("arms", "third try")]


def test_wandb_continues_a_resumed_run_and_starts_a_new_one_otherwise(tmp_path, wandb):
    for resume_step in (0, 10, 0):
        Trackers(["wandb"], tmp_path, {}, resume_step).close()
    first, resumed, new = (call[1]["id"] for call in wandb.calls if call[0] == "init")
    assert first == resumed != new


def test_wandb_without_login_raises_error_with_advice(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise wandb.errors.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"No API key configured.*wandb login.*WANDB_MODE=offline"):
        Trackers(["wandb"], tmp_path, {}, 0)


def test_open_trackers_are_closed_if_another_one_fails_to_open(tmp_path, wandb):
    (tmp_path / "tensorboard").touch()  # in place of its folder
    with pytest.raises(FileExistsError):
        Trackers(["wandb", "tensorboard"], tmp_path, {}, 0)
    assert wandb.calls[-1] == ("finish",)


def test_missing_package_opens_no_tracker(tmp_path, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchpi\[data\]'"):
        Trackers(["wandb", "tensorboard"], tmp_path, {}, 0)
    assert not wandb.calls


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("default")
def test_wandb_writes_logged_values_offline(tmp_path, monkeypatch, plot):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    tracker = Trackers(["wandb"], pathlib.Path("run"), {"learning_rate": 0.0625}, 0)
    tracker.log(10, {"loss": 0.40625, "success/reach": 1.0})
    tracker.log(5, {"loss": 0.15625})
    tracker.image(10, "chunks", plot)
    tracker.close()
    importlib.import_module("wandb").teardown()  # waits until its process has written everything
    (written,) = pathlib.Path("run").glob("wandb/offline-run-*/run-*.wandb")
    data = written.read_bytes()
    assert all(json.dumps(value).encode() in data for value in (0.40625, 0.15625, 0.0625))
    assert all(name in data for name in (b"loss", b"success/reach", b"learning_rate", b"chunks"))
