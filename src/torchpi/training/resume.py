"""The folder of a run: new, or resumed."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from torchpi.atomic import replace_text
from torchpi.errors import MissingFileError, TrainingError
from torchpi.training.config import TrainConfig
from torchpi.training.distributed import World
from torchpi.training.setup import ROBOTS, SourceData, robot_names
from torchpi.training.state import checkpoints
from torchpi.training.weights import InitReport
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
        raise MissingFileError(f"There is no run to resume in {run}: it has no {RECIPE}.")
    return TrainConfig.from_json(run / RECIPE)


def find_start(config: TrainConfig, run: pathlib.Path, *, resume: bool) -> pathlib.Path | None:
    """The last checkpoint of a run that is resumed; None: it is new, or ended before its first one."""
    if not resume:
        if run.exists() and any(run.iterdir()):
            raise TrainingError(
                f"{run} is not empty; choose another folder, or resume the run: torchpi train --resume {run}."
            )
        return None
    before, now, found = resume_config(run).options, config.options, checkpoints(run)
    changed = sorted(name for name in now if now[name] != before[name] and name not in CHANGEABLE)
    if changed:
        listed = "; ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise TrainingError(
            f"A run is resumed as it was, and these options differ: {listed}. Options that may change are "
            f"{', '.join(sorted(CHANGEABLE))}; for anything else start a new run, with --init and this one's policy."
        )
    if found and int(found[-1].name) > config.num_steps:
        raise TrainingError(f"{run} has {int(found[-1].name)} steps already, more than num_steps {config.num_steps}.")
    return found[-1] if found else None


def held_out_episodes(run: pathlib.Path) -> list[list[int]]:
    """The episodes that a run holds out, per dataset: it must never train on what it evaluates."""
    try:
        info = json.loads((run / RUN).read_text(encoding="utf-8"))
        return [[int(index) for index in dataset["held_out"]] for dataset in info["datasets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / RUN} does not tell which episodes the run holds out ({error!r}), so it can't be resumed: it might "
            "train on what it evaluates. Restore the file, or start a new run with --init and this policy."
        ) from error


def check_resumed(
    config: TrainConfig,
    run: pathlib.Path,
    last: pathlib.Path,
    data: Sequence[SourceData],
    init: InitReport,
    console: Console,
) -> None:
    """Refuse to resume with other data or other frozen weights than those the run started with."""
    _check_statistics(last, data)
    saved = json.loads((run / RUN).read_text(encoding="utf-8")).get("init", {})
    before = saved.get("frozen_sha256", saved.get("constant_sha256"))  # the latter of earlier versions
    if before is None:
        console.print(f"{run / RUN} has no SHA-256 of the frozen weights: they are not compared")
    elif init.frozen_sha256 and before != init.frozen_sha256:  # "" where they are on "meta"
        raise TrainingError(
            f"The frozen weights are others than when the run started: those of {config.model.init or 'seed'} have the "
            f"SHA-256 {init.frozen_sha256[:12]}…, {run / RUN} has {before[:12]}…. Restore the former ones, or start a "
            "new run."
        )
    complete = ", the last one: nothing to do" if int(last.name) == config.num_steps else ""
    console.print(f"resuming from step {int(last.name)}{complete}")


def _check_statistics(last: pathlib.Path, data: Sequence[SourceData]) -> None:
    policy = last / "policy"
    names = robot_names([source.embodiment for source in data])
    folders = [policy, *(policy / ROBOTS / name for name in names[1:])]
    for folder, source in zip(folders, data, strict=True):
        saved = load_norm_stats(folder)
        for key, stats in source.norm_stats.items():
            ranges = stats.training_range(), saved[key].training_range()
            if not all(np.array_equal(*pair) for pair in zip(*ranges, strict=True)):
                raise TrainingError(
                    f"{source.source.dataset}: the dataset is another one than when {last} was saved: its statistics "
                    f"of {key} differ. Resume with the data as they were, or start a new run with --init and this "
                    "one's policy."
                )


def write_recipe(config: TrainConfig, run: pathlib.Path) -> None:
    """Make the run's folder, and write its recipe."""
    run.mkdir(parents=True, exist_ok=True)
    # With the end of the schedule as a number: more steps later must not change the steps before.
    recipe = config.replace(decay_steps=config.optim.decay_steps or config.num_steps)
    replace_text(run / RECIPE, recipe.to_json())


def write_run_info(run: pathlib.Path, world: World, info: Mapping[str, Any]) -> None:
    """Write run.json."""
    if world.is_main:
        replace_text(run / RUN, f"{json.dumps(info, indent=2, ensure_ascii=False)}\n")
