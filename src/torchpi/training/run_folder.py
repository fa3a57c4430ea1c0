"""The folder of a training run: starting and resuming a run, and reading finished or incomplete ones.

train.json      the recipe
run.json        see `torchpi.training.summary.run_document`; "finished" (ISO 8601) once the run has ended
metrics.jsonl   a JSON object per line: "step" and the values measured there; "resumed": true marks the first line after
                a resume
plots           STEP_chunks.png and STEP_errors.png; for further robots of a mixture with the suffix _ROBOT
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
"""New keys in metrics.jsonl, by the keys of earlier versions."""

CHANGEABLE = frozenset(
    {
        *("num_steps", "grad_accum_steps", "activation_checkpointing", "compile", "parallel", "shard_size", "workers"),
        *("image_cache_gb", "device", "holdout_samples", "chunk_samples", "eval_every", "env", "env_tasks"),
        *("tolerance_s", "env_episodes", "save_every", "keep", "keep_every", "log_every", "trackers"),
        *("wandb_project", "wandb_name", "lora_alpha"),
    }
)
"""Options that may change when a run is resumed, because they do not change what its updates compute."""


def resume_config(run: pathlib.Path) -> TrainConfig:
    """Read the recipe of a run to resume."""
    if not (run / RECIPE).is_file():
        parent = next((folder for folder in run.parents if (folder / RECIPE).is_file()), None)
        hint = f" The folder of the run is {parent}." if parent else ""
        raise MissingFileError(f"There is no run to resume in {run}: it has no {RECIPE}.{hint}")
    return TrainConfig.from_json(run / RECIPE)


def find_start(config: TrainConfig, run: pathlib.Path, *, resume: bool) -> pathlib.Path | None:
    """The checkpoint to resume from; None for a new run, or a run that ended before its first checkpoint."""
    if not resume:
        if run.exists() and any(run.iterdir()):
            raise TrainingError(
                f"{run} is not empty; choose another folder, or resume the run: torchpi train --resume {run}."
            )
        return None
    previous, current = resume_config(run).options, config.options
    changed = sorted(name for name in current if current[name] != previous[name] and name not in CHANGEABLE)
    if changed:
        differences = "; ".join(f"{name} was {previous[name]!r}, now {current[name]!r}" for name in changed)
        raise TrainingError(
            f"A run is resumed with its own recipe, but these options differ: {differences}. Options that may change "
            f"are {', '.join(sorted(CHANGEABLE))}; to change others, start a new run, with --init and this run's "
            "policy."
        )
    saved = checkpoints(run)
    if saved and int(saved[-1].name) > config.num_steps:
        raise TrainingError(f"{run} has {int(saved[-1].name)} steps already, more than num_steps {config.num_steps}.")
    return saved[-1] if saved else None


def held_out_episodes(run: pathlib.Path) -> list[list[int]]:
    """The episodes that a run holds out, per dataset. A resumed run must not train on them."""
    try:
        info = read_json(run / RUN, error=TrainingError)
        return [[int(index) for index in dataset["held_out"]] for dataset in info["datasets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / RUN} does not say which episodes the run holds out ({error!r}), so the run can't be resumed: it "
            "might train on episodes that it evaluates. Restore the file, or start a new run with --init and this "
            "run's policy."
        ) from error


def check_resumed(
    config: TrainConfig,
    run: pathlib.Path,
    last: pathlib.Path,
    data: Sequence[SourceData],
    init: InitReport,
    console: Console,
) -> None:
    """Check that data and frozen weights are still those that the run started with."""
    _check_statistics(last, data)
    saved = read_json_object(run / RUN, error=TrainingError).get("init", {})
    saved_sha256 = saved.get("frozen_sha256", saved.get("constant_sha256"))  # the latter in earlier versions
    if saved_sha256 is None:
        console.print(f"{run / RUN} has no SHA-256 of the frozen weights: they are not compared")
    elif init.frozen_sha256 and saved_sha256 != init.frozen_sha256:  # "" for weights on "meta"
        raise TrainingError(
            f"The frozen weights differ from those that the run started with: {config.model.init or 'seed'} gives the "
            f"SHA-256 {init.frozen_sha256[:12]}…, {run / RUN} has {saved_sha256[:12]}…. Restore the original weights, "
            "or start a new run."
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
                    f"{source.config.dataset}: the dataset has changed since {last} was saved: its statistics of {key} "
                    "differ. Resume with the original data, or start a new run with --init and this run's policy."
                )


def begin_run(run: pathlib.Path, config: TrainConfig, info: Mapping[str, Any], first_step: int) -> None:
    """Write the recipe and run.json, and drop metrics logged after the checkpoint that the run resumes from."""
    run.mkdir(parents=True, exist_ok=True)
    # The recipe states the end of the schedule, so that more steps in a resumed run do not change earlier steps.
    recipe = config.replace(decay_steps=config.optim.decay_steps or config.num_steps)
    replace_text(run / RECIPE, recipe.to_json())
    if lines := read_metrics(run / METRICS):
        kept = [line for line in lines if line["step"] <= first_step]
        replace_text(run / METRICS, "".join(f"{json.dumps(line)}\n" for line in kept))
    write_run_info(run, info)


def write_run_info(run: pathlib.Path, info: Mapping[str, Any]) -> None:
    """Write run.json."""
    replace_text(run / RUN, f"{json.dumps(info, indent=2, ensure_ascii=False)}\n")


# ---- reading finished and incomplete runs ----


class Run:
    """The contents of a run folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        metrics = folder / METRICS
        if not metrics.is_file() and not (folder / RECIPE).is_file():
            raise MissingFileError(
                f"{folder} is not the folder of a training run: it has neither train.json nor metrics.jsonl."
            )
        self.folder = folder
        self.notes: list[str] = []
        """Damage of the files."""
        self.recipe: Mapping[str, Any] = flat_options(self._read_json(RECIPE))
        """Options by name; empty if the file is missing."""
        self.info: Mapping[str, Any] = self._read_json(RUN)
        """Contents of run.json; empty if the file is missing."""
        lines, damaged = parse_metrics(_read_text(metrics))
        if damaged:
            count = f"{len(damaged)} lines" if len(damaged) > 1 else "a line"
            self.notes.append(
                f"metrics.jsonl has {count} that cannot be read, first in line {damaged[0]}; skipped here."
            )
        restarts = [line["step"] for previous, line in itertools.pairwise(lines) if line["step"] < previous["step"]]
        self.lines = without_overtaken(lines)
        self.series = series(self.lines)
        self.resumes = sorted({*restarts, *(line["step"] for line in self.lines if line.get("resumed"))})
        """Steps of the first lines after a resume."""
        self.checkpoints = checkpoints(folder)

    def _read_json(self, name: str) -> Mapping[str, Any]:
        """Read a JSON file; if it can't be read (it may be incomplete at this moment), add a note and return {}."""
        if not (path := self.folder / name).is_file():
            return {}
        try:
            return read_json_object(path, error=TrainingError)
        except TrainingError as error:
            self.notes.append(f"{name} {str(error).removeprefix(f'{path} ')}")
            return {}

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        saved = int(self.checkpoints[-1].name) if self.checkpoints else 0
        logged = self.lines[-1]["step"] if self.lines else 0
        return max(0, saved, logged)

    @property
    def num_steps(self) -> int | None:
        """The recipe's number of steps."""
        value = self.recipe.get("num_steps")
        return value if isinstance(value, int) else None

    @property
    def source(self) -> Mapping[str, Any]:
        """The recipe's dataset and embodiment; for a mixture, those of its first entry."""
        mixture = self.recipe.get("mixture")
        return mixture[0] if isinstance(mixture, list) and mixture and isinstance(mixture[0], Mapping) else self.recipe

    @property
    def finished(self) -> bool:
        """True if all steps are done."""
        return self.num_steps is not None and self.step >= self.num_steps

    @property
    def duration(self) -> str | None:
        """Time between start and end; None if unknown."""
        try:
            started, finished = (datetime.datetime.fromisoformat(self.info[name]) for name in ("started", "finished"))
            return format_duration((finished - started).total_seconds())
        except (KeyError, TypeError, ValueError):  # missing, not a date, or only one of them has a time zone
            return None

    def end(self, key: str) -> float | None:
        """The last number logged under a key; None if there is none."""
        return float(self.series[key][1][-1]) if key in self.series else None

    def last_mapping(self, key: str) -> Mapping[str, Any]:
        """The last dictionary logged under a key; empty if there is none."""
        return next((line[key] for line in reversed(self.lines) if isinstance(line.get(key), Mapping)), {})

    def plots(self) -> list[tuple[str, str, pathlib.Path]]:
        """The latest plots: kind ("chunks" or "errors"), robot ("" for the first robot) and path of each."""
        latest: dict[tuple[str, str], tuple[int, pathlib.Path]] = {}
        # Earlier versions wrote the plots to pictures/.
        for path in (*self.folder.glob("plots/*.png"), *self.folder.glob("pictures/*.png")):
            if match := re.fullmatch(r"(\d+)_(chunks|errors)(?:_(.+))?\.png", path.name):
                key = (match[3] or "", match[2])
                latest[key] = max(latest.get(key, (-1, path)), (int(match[1]), path))
        return [(kind, robot, path) for (robot, kind), (_, path) in sorted(latest.items())]


def parse_metrics(text: str) -> tuple[list[Line], list[int]]:
    """Parse the lines of a metrics.jsonl; keys of earlier versions are renamed.

    An incomplete last line is ignored: the process was killed, or is writing it at this moment.

    Returns:
        The lines, and the numbers (from 1) of lines that can't be read.
    """
    lines: list[Line] = []
    damaged = []
    texts = text.split("\n")
    for i, line_text in enumerate(texts, start=1):
        try:
            line = parse_json(line_text, METRICS, error=TrainingError)
        except TrainingError:
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append({_OLD_KEYS.get(key) or key: value for key, value in line.items()})
        elif i < len(texts):
            damaged.append(i)
    return lines, damaged


def read_metrics(path: pathlib.Path) -> list[Line]:
    """Read metrics.jsonl; a missing file has no lines."""
    lines, damaged = parse_metrics(_read_text(path))
    if damaged:
        raise TrainingError(
            f'{path}: line {damaged[0]} is no JSON object with a "step" ({len(damaged)} such lines); remove it to '
            "continue."
        )
    return lines


def _read_text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def without_overtaken(lines: Sequence[Line]) -> list[Line]:
    """Drop lines that a resume has made obsolete: where the step goes back, lines of later steps are replaced."""
    kept: list[Line] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def as_number(value: Any) -> float | None:
    """The value as a float if it is a number (NaN and infinity included), else None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line under flat names, for `Trackers.log`.

    Dictionaries become groups: {"success": {"reach": {"success_rate": 1.0}}} is "success/reach/success_rate". Lists are
    left out: a tracker should not show a curve for each of the fifty steps of a chunk.
    """
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": scalar for inner, scalar in scalars(value).items()}
        elif name != "step" and (scalar := as_number(value)) is not None:
            flat[name] = scalar
    return flat


def series(lines: Sequence[Line]) -> dict[str, Series]:
    """Steps and values of each number in the lines, finite or not, by flat name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in scalars(line).items():
            points.setdefault(key, []).append((line["step"], value))
    return {
        key: (np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64))
        for key, pairs in points.items()
    }
