"""The folder of a run: begun new, or gone on with."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from torchpi.errors import MissingFileError, TrainingError
from torchpi.training.config import TrainConfig
from torchpi.training.setup import ROBOTS, SourceData, robot_names
from torchpi.training.state import checkpoints
from torchpi.transforms.normalize import load_norm_stats

RECIPE, RUN = "train.json", "run.json"

CHANGEABLE = frozenset(
    {
        *("num_steps", "grad_accum_steps", "activation_checkpointing", "compile", "parallel", "shard_size", "workers"),
        *("image_cache_gb", "device", "holdout_samples", "chunk_samples", "eval_every", "env", "env_tasks"),
        *("env_episodes", "save_every", "keep", "keep_every", "log_every", "trackers"),
    }
)
"""Options that may change when a run is resumed: they do not change what its updates compute."""


def resume_config(run: pathlib.Path) -> TrainConfig:
    """The recipe of a run."""
    if not (run / RECIPE).is_file():
        raise MissingFileError(f"There is no run to go on with in {run}: it has no {RECIPE}.")
    return TrainConfig.from_json(run / RECIPE)


def find_start(config: TrainConfig, run: pathlib.Path, *, resume: bool) -> pathlib.Path | None:
    """The last checkpoint of a run that is gone on with; None: it is new, or was ended before its first one."""
    if resume:
        return _check_resume(config, run)
    _check_new(run)
    return None


def check_data(last: pathlib.Path, data: Sequence[SourceData]) -> None:
    """Refuse to go on with other data: statistics of the datasets tell."""
    policy = last / "policy"
    names = robot_names([source.embodiment for source in data])
    folders = [policy, *(policy / ROBOTS / name for name in names[1:])]
    for folder, source in zip(folders, data, strict=True):
        saved = load_norm_stats(folder)
        for key, stats in source.norm_stats.items():
            if not all(
                np.array_equal(*pair) for pair in zip(stats.training_range(), saved[key].training_range(), strict=True)
            ):
                raise TrainingError(
                    f"{source.source.dataset}: the dataset is another one than when {last} was saved: its statistics "
                    f"of {key} differ. Go on with the data as they were, or begin a new run with --init and this one's "
                    "policy."
                )


def held_out_episodes(run: pathlib.Path) -> list[list[int]]:
    """The episodes that a run holds out, for each of its datasets: what it measures, it must never have trained on."""
    try:
        about = json.loads((run / RUN).read_text(encoding="utf-8"))
        return [[int(index) for index in dataset["held_out"]] for dataset in about["datasets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / RUN} does not tell which episodes the run holds out ({error!r}), so it can't be gone on with: it "
            "might train on what it measures. Bring the file back, or begin a new run with --init and this policy."
        ) from error


def check_constant(run: pathlib.Path, found: str, init: str | None) -> bool:
    """Refuse to go on with other frozen weights: they are in no checkpoint's state, but come from `init` again.

    Args:
        found: `Beginning.constant` as it is now.

    Returns:
        Whether the run's folder says which they were; one of an earlier version does not.
    """
    about = json.loads((run / RUN).read_text(encoding="utf-8"))
    begun_with = about.get("init", {}).get("constant_sha256")
    if begun_with not in (None, found):
        raise TrainingError(
            f"The weights that this run does not change are others than when it was begun: those of {init or 'seed'} "
            f"have the SHA-256 {found[:12]}…, {run / RUN} has {begun_with[:12]}…. Bring back what was there, or begin "
            "a new run."
        )
    return begun_with is not None


def write_recipe(config: TrainConfig, run: pathlib.Path) -> None:
    """Make the run's folder, and write its recipe."""
    run.mkdir(parents=True, exist_ok=True)
    # With the end of the schedule as a number: more steps later must not change the steps before.
    recipe = config.replace(decay_steps=config.optim.decay_steps or config.num_steps)
    replace_text(run / RECIPE, recipe.to_json())


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file that is complete at any time: a kill leaves the old text or the new one."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _check_new(run: pathlib.Path) -> None:
    if run.exists() and any(run.iterdir()):
        raise TrainingError(
            f"{run} is not empty; choose another folder, or go on with it: torchpi train --resume {run}."
        )


def _check_resume(config: TrainConfig, run: pathlib.Path) -> pathlib.Path | None:
    before, found = resume_config(run), checkpoints(run)
    changed = {
        name: (value, config.options[name]) for name, value in before.options.items() if value != config.options[name]
    }
    if refused := sorted(set(changed) - CHANGEABLE):
        listed = "; ".join(f"{name} was {changed[name][0]!r}, now {changed[name][1]!r}" for name in refused)
        raise TrainingError(
            f"A run is gone on with as it was, and these fields of its recipe differ: {listed}. What may change is "
            f"{', '.join(sorted(CHANGEABLE))}; for anything else begin a new run, with --init and this one's policy."
        )
    if found and int(found[-1].name) > config.num_steps:
        raise TrainingError(f"{run} has {int(found[-1].name)} steps already, more than num_steps {config.num_steps}.")
    return found[-1] if found else None
