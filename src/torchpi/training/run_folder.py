"""The folder of a training run: begun, resumed, and read as far as it is there.

train.json      the recipe
run.json        see `torchpi.training.summary.run_document`; "finished" (ISO 8601) once the run has ended
metrics.jsonl   a JSON object per line: "step" and the values measured there; "resumed": true marks the first line after
                a resume
plots           STEP_chunks.png and STEP_errors.png; those of the other robots of a mixture end in _ROBOT
checkpoints     STEP/policy
"""

import datetime
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from torchpi.atomic import replace_text
from torchpi.errors import MissingFileError, TrainingError
from torchpi.schema import parse_json, read_json, read_json_object
from torchpi.training.config import TrainConfig, flat_options
from torchpi.training.setup import ROBOTS, SourceData, robot_names
from torchpi.training.state import checkpoints
from torchpi.training.weights import InitReport
from torchpi.transforms.normalize import load_norm_stats
from torchpi.ui.format import format_duration

RECIPE, RUN, METRICS = "train.json", "run.json", "metrics.jsonl"

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""
Series = tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Steps and values."""
_OLD_KEYS = {"learning_rate": "lr"}
"""Keys of earlier versions in metrics.jsonl."""


CHANGEABLE = frozenset(
    {
        *("num_steps", "grad_accum_steps", "activation_checkpointing", "compile", "parallel", "shard_size", "workers"),
        *("image_cache_gb", "device", "holdout_samples", "chunk_samples", "eval_every", "env", "env_tasks"),
        *("tolerance_s", "env_episodes", "save_every", "keep", "keep_every", "log_every", "trackers"),
        *("wandb_project", "wandb_name", "lora_alpha"),
    }
)
"""Options that may change when a run is resumed: they do not change what its updates compute."""


def resume_config(run: pathlib.Path) -> TrainConfig:
    """The recipe of a run."""
    if not (run / RECIPE).is_file():
        above = next((folder for folder in run.parents if (folder / RECIPE).is_file()), None)
        hint = f" The folder of the run is {above}." if above else ""
        raise MissingFileError(f"There is no run to resume in {run}: it has no {RECIPE}.{hint}")
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
        info = read_json(run / RUN, error=TrainingError)
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
    saved = read_json_object(run / RUN, error=TrainingError).get("init", {})
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


def begin_run(run: pathlib.Path, config: TrainConfig, info: Mapping[str, Any], first_step: int) -> None:
    """Make the run's folder, or prepare it to be resumed from the checkpoint at a step: recipe, run.json, metrics."""
    run.mkdir(parents=True, exist_ok=True)
    # With the end of the schedule as a number: more steps later must not change the steps before.
    recipe = config.replace(decay_steps=config.optim.decay_steps or config.num_steps)
    replace_text(run / RECIPE, recipe.to_json())
    if lines := read_metrics(run / METRICS):
        kept = [line for line in lines if line["step"] <= first_step]
        replace_text(run / METRICS, "".join(f"{json.dumps(line)}\n" for line in kept))
    write_run_info(run, info)


def write_run_info(run: pathlib.Path, info: Mapping[str, Any]) -> None:
    """Write run.json."""
    replace_text(run / RUN, f"{json.dumps(info, indent=2, ensure_ascii=False)}\n")


# ---- read as far as it is there ----


class Run:
    """Contents of a run's folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        metrics = folder / METRICS
        if not metrics.is_file() and not (folder / RECIPE).is_file():
            raise MissingFileError(
                f"{folder} is no folder of a training run: neither train.json nor metrics.jsonl is in it."
            )
        self.folder, self.notes = folder, list[str]()
        """Damage of the files."""
        self.recipe: Mapping[str, Any] = flat_options(self._read_json(RECIPE))
        """Options by name; empty: not there."""
        self.about: Mapping[str, Any] = self._read_json(RUN)
        text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
        lines, broken = parse_metrics(text)
        if broken:
            count = f"{len(broken)} lines" if len(broken) > 1 else "a line"
            self.notes.append(
                f"metrics.jsonl has {count} that cannot be read, first in line {broken[0]}; left out here."
            )
        went_back = [line["step"] for before, line in itertools.pairwise(lines) if line["step"] < before["step"]]
        self.lines = without_overtaken(lines)
        self.series = series(self.lines)
        self.resumes = sorted({*went_back, *(line["step"] for line in self.lines if line.get("resumed"))})
        """Steps of the first lines after a resume."""
        self.checkpoints = checkpoints(folder)

    def _read_json(self, name: str) -> Mapping[str, Any]:
        """The document; empty, with a note, where it cannot be read, for example because it is just being written."""
        if not (path := self.folder / name).is_file():
            return {}
        try:
            return read_json_object(path, error=TrainingError)
        except TrainingError as error:
            self.notes.append(f"{name} {str(error).removeprefix(f'{path} ')}")
            return {}

    @property
    def step(self) -> int:
        """The last step that is logged or saved."""
        return max(
            [0, *(int(path.name) for path in self.checkpoints[-1:]), *(line["step"] for line in self.lines[-1:])]
        )

    @property
    def num_steps(self) -> int | None:
        """The recipe's number of steps."""
        found = self.recipe.get("num_steps")
        return found if isinstance(found, int) else None

    @property
    def source(self) -> Mapping[str, Any]:
        """The recipe's dataset and embodiment; of a mixture, the first ones."""
        mixture = self.recipe.get("mixture")
        return mixture[0] if isinstance(mixture, list) and mixture and isinstance(mixture[0], Mapping) else self.recipe

    @property
    def finished(self) -> bool:
        """True if all steps are done."""
        return self.num_steps is not None and self.step >= self.num_steps

    @property
    def duration(self) -> str | None:
        """Time from start to end; None: one of them is unknown."""
        try:
            started, finished = (datetime.datetime.fromisoformat(self.about[name]) for name in ("started", "finished"))
            return format_duration((finished - started).total_seconds())
        except (KeyError, TypeError, ValueError):  # missing, no date, or with and without a time zone
            return None

    def end(self, key: str) -> float | None:
        """The last number under a key of the metrics; None: there is none."""
        return float(self.series[key][1][-1]) if key in self.series else None

    def last_mapping(self, key: str) -> Mapping[str, Any]:
        """The last value of a key in the metrics, by name; empty: there is none."""
        return next((line[key] for line in reversed(self.lines) if isinstance(line.get(key), Mapping)), {})

    def plots(self) -> list[tuple[str, str, pathlib.Path]]:
        """The plots of the last step: kind (chunks or errors), robot (empty: the first one) and path of each."""
        last: dict[tuple[str, str], tuple[int, pathlib.Path]] = {}
        # Runs of earlier versions have them in pictures/.
        for path in (*self.folder.glob("plots/*.png"), *self.folder.glob("pictures/*.png")):
            if found := re.fullmatch(r"(\d+)_(chunks|errors)(?:_(.+))?\.png", path.name):
                key = (found[3] or "", found[2])
                last[key] = max(last.get(key, (-1, path)), (int(found[1]), path))
        return [(kind, robot, path) for (robot, kind), (_, path) in sorted(last.items())]


def parse_metrics(text: str) -> tuple[list[Line], list[int]]:
    """Parse the lines of a metrics.jsonl, old keys under their present names.

    A last line without its end is left out and not counted: the process was killed, or is just writing it.

    Returns:
        The lines, and the numbers (from 1) of those that can't be read.
    """
    lines: list[Line] = []
    broken = []
    *complete, last = text.split("\n")
    for i, line in enumerate([*complete, last], start=1):
        try:
            found = parse_json(line, METRICS, error=TrainingError)
        except TrainingError:
            found = None
        if isinstance(found, dict) and type(found.get("step")) is int:
            lines.append({_OLD_KEYS.get(key) or key: value for key, value in found.items()})
        elif i <= len(complete):
            broken.append(i)
    return lines, broken


def read_metrics(path: pathlib.Path) -> list[Line]:
    """Read metrics.jsonl; a missing file has no lines."""
    lines, broken = parse_metrics(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    if broken:
        raise TrainingError(
            f'{path}: line {broken[0]} is no JSON object with a "step" ({len(broken)} such lines); remove it to '
            "continue."
        )
    return lines


def without_overtaken(lines: Sequence[Line]) -> list[Line]:
    """The lines that hold: where the steps go back, the run was resumed there, and what it had beyond is void."""
    kept: list[Line] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def number(value: Any) -> float | None:
    """The value where it is a number, NaN and infinity among them."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line under flat names, as `Tracker.log` takes them.

    Mappings become groups: {"success": {"reach": {"success_rate": 1.0}}} is "success/reach/success_rate". Lists are
    left out: fifty curves for the fifty steps of a chunk show nobody anything.
    """
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": found for inner, found in scalars(value).items()}
        elif name != "step" and (found := number(value)) is not None:
            flat[name] = found
    return flat


def series(lines: Sequence[Line]) -> dict[str, Series]:
    """Steps and values of each number in the lines, finite or not, by its flat name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in scalars(line).items():
            points.setdefault(key, []).append((line["step"], value))
    return {
        key: (np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64))
        for key, found in points.items()
    }
