"""The folder of a run: begun new, or gone on with."""

import dataclasses
import os
import pathlib

from torchpi.training.config import TrainConfig
from torchpi.training.state import CHECKPOINTS, checkpoints

RECIPE = "train.json"

CHANGEABLE = frozenset(
    {
        *(
            "num_steps",
            "accumulate",
            "checkpointing",
            "compile",
            "parallel",
            "shard_size",
            "workers",
            "image_cache_gb",
            "device",
        ),
        *("holdout_samples", "chunk_samples", "eval_every", "env", "env_tasks", "env_episodes"),
        *("save_every", "keep", "keep_every", "log_every", "trackers"),
    }
)
"""Fields of a recipe that may be others when a run is gone on with: they do not change what its updates compute."""


def resume_config(run: pathlib.Path) -> TrainConfig:
    """The recipe of a run.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    if not checkpoints(run):
        raise FileNotFoundError(f"there is no checkpoint to go on from in {run / CHECKPOINTS}")
    return TrainConfig.from_json(run / RECIPE)


def find_start(config: TrainConfig, run: pathlib.Path, *, resume: bool) -> pathlib.Path | None:
    """The last checkpoint of a run that is gone on with; None: it is new.

    Raises:
        FileNotFoundError: nothing to go on from.
        ValueError: a new run's folder is not empty; the recipe has fields changed that can't be; the run is complete.
    """
    if resume:
        return _check_resume(config, run)
    _check_new(run)
    return None


def write_recipe(config: TrainConfig, run: pathlib.Path) -> None:
    """Make the run's folder, and write its recipe."""
    run.mkdir(parents=True, exist_ok=True)
    # With the end of the schedule as a number: more steps later must not change the steps before.
    recipe = dataclasses.replace(config, decay_steps=config.decay_steps or config.num_steps)
    beside = (run / RECIPE).with_suffix(".tmp")
    beside.write_text(recipe.to_json(), encoding="utf-8")
    os.replace(beside, run / RECIPE)  # without it a run can't be gone on with: a kill must not leave half of one


def _check_new(run: pathlib.Path) -> None:
    if run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} is not empty; choose another folder, or go on with it: torchpi train --resume {run}")


def _check_resume(config: TrainConfig, run: pathlib.Path) -> pathlib.Path:
    before, last = resume_config(run), checkpoints(run)[-1]
    changed = {
        field.name: (getattr(before, field.name), getattr(config, field.name))
        for field in dataclasses.fields(TrainConfig)
        if getattr(before, field.name) != getattr(config, field.name)
    }
    if refused := sorted(set(changed) - CHANGEABLE):
        listed = "; ".join(f"{name} was {changed[name][0]!r}, now {changed[name][1]!r}" for name in refused)
        raise ValueError(
            f"a run is gone on with as it was, and these fields of its recipe differ: {listed}. What may change is "
            f"{', '.join(sorted(CHANGEABLE))}; for anything else begin a new run, with --init {last}/policy"
        )
    if int(last.name) > config.num_steps:
        raise ValueError(f"{run} has {int(last.name)} steps already, more than num_steps {config.num_steps}")
    return last
