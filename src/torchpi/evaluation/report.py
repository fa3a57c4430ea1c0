"""`torchpi eval POLICY --dataset PATH`: errors of a policy on a recorded dataset, as tables and plots."""

import dataclasses
import pathlib
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from torchpi.atomic import make_folder
from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.data.rate import rate_note
from torchpi.errors import counted
from torchpi.evaluation.chunks import open_recorded, predict_chunks, sample_new_images
from torchpi.evaluation.errors import BASELINES, HOLD, MEAN_ACTION, POLICY, ChunkErrors, errors_of
from torchpi.evaluation.plots import plot_chunks, plot_errors, plotted_frames
from torchpi.policy import load_policy
from torchpi.robots import Embodiment
from torchpi.robots.commands import hold_commands
from torchpi.robots.parts import COMMANDS
from torchpi.ui.format import format_number, print_json
from torchpi.ui.plots import save_figure
from torchpi.ui.progress import progress_bar
from torchpi.ui.tables import Cell, Column, PlainConsole, Table

_PLOTTED_NOISE_SAMPLES = 8
_NAMES = {POLICY: "policy", HOLD: "hold", MEAN_ACTION: "mean"}


@dataclasses.dataclass(frozen=True)
class DatasetEvaluation:
    """Arguments and results of `evaluate_on_dataset`."""

    policy: str
    dataset: str
    embodiment: str
    episodes: tuple[int, ...]
    """Indices of the episodes that frames were sampled from."""
    frames: int
    """Number of frames of these episodes."""
    samples: int
    """Number of frames at which chunks were predicted."""
    seed: int
    num_steps: int
    noise_samples: int
    seconds: float
    """Wall-clock time without loading."""
    errors: ChunkErrors
    notes: tuple[str, ...]
    """Dimensions without the baseline "hold" and the reason, and a rate at which the dataset was not recorded."""
    plots: tuple[str, ...]
    """Paths of the plots."""

    def to_dict(self) -> dict[str, Any]:
        """JSON document, see docs/evaluation.md."""
        return {name: value for name, value in vars(self).items() if name != "errors"} | self.errors.to_dict()


def evaluate_on_dataset(
    policy: str | pathlib.Path,
    dataset: str | pathlib.Path,
    *,
    samples: int = 256,
    seed: int = 0,
    num_steps: int | None = None,
    batch_size: int = 32,
    noise_samples: int = 1,
    out: pathlib.Path | None = None,
    load: Mapping[str, Any] | None = None,
    **reading: Any,
) -> DatasetEvaluation:
    """Compare predicted chunks with the recorded ones. Progress is shown on stderr.

    Args:
        policy: a policy in any format, see `load_policy`.
        dataset: a LeRobot dataset of the policy's robot, a folder or hf://org/name[@revision].
        samples: number of frames, spread evenly, see `sample_frames`; all frames if there are fewer.
        num_steps, batch_size, noise_samples: see `predict_chunks`.
        out: folder for plots; None: no plots.
        load: arguments of `load_policy`.
        reading: further arguments of `LeRobotDataset`: episodes, rename, prompt, fps, tolerance_s.
    """
    loaded = load_policy(policy, **(load or {}))
    data = open_recorded(loaded, dataset, **reading)
    frames = sample_new_images(data, samples, seed=seed)
    if out is not None:
        make_folder(out)
    predict = partial(predict_chunks, loaded, data, seed=seed, num_steps=num_steps, batch_size=batch_size)
    start, plots = time.perf_counter(), dict[pathlib.Path, Any]()
    with progress_bar("chunks", len(frames)) as advance:
        chunks = predict(frames, noise_samples=noise_samples, on_batch=lambda count: advance(by=count))
    note = rate_note(data.fps, data.recorded_fps, loaded.embodiment)
    all_episodes = data
    if reading.get("episodes") is not None:  # ranges and the mean action are those of the whole dataset
        options = {**reading, "episodes": None, "cameras": (), "columns": ()}
        all_episodes = LeRobotDataset(dataset, action_horizon=1, embodiment=loaded.embodiment, **options)
    errors = errors_of(chunks, all_episodes.columns[lerobot.ACTION])
    if out is not None:
        plotted = [frames[i] for i in plotted_frames(len(frames))]
        plotted_chunks = predict(plotted, noise_samples=_PLOTTED_NOISE_SAMPLES)
        plots = {out / "errors.png": plot_errors(errors), out / "chunks.png": plot_chunks(plotted_chunks)}
    for path, figure in plots.items():
        save_figure(figure, path)
    return DatasetEvaluation(
        str(policy),
        str(dataset),
        loaded.embodiment.name,
        data.episode_indices,
        len(data),
        len(frames),
        seed,
        loaded.num_steps if num_steps is None else num_steps,
        noise_samples,
        time.perf_counter() - start,
        errors,
        (*_notes_on_hold(loaded.embodiment), *([f"{dataset} is {note}."] if note else [])),
        tuple(map(str, plots)),
    )


def _notes_on_hold(robot: Embodiment) -> Iterator[str]:
    """Notes on the dimensions for which the baseline "hold" is unknown."""
    missing = [action for action, hold in zip(robot.actions, hold_commands(robot), strict=True) if hold is None]
    if unstated := ", ".join(action.name for action in missing if action.command is None):
        yield (
            f"No baseline hold for {unstated}: the embodiment {robot.name} does not state the command of these "
            f'actions. Write "command" for each, one of {", ".join(COMMANDS)}, in policy.json or in the file of '
            "--embodiment (in Python: command= of Embodiment.generic)."
        )
    if others := ", ".join(f"{action.name} ({action.command})" for action in missing if action.command is not None):
        yield (
            f"No baseline hold for {others}: an effort has no hold command, and a position has one only where every "
            "state has it, in the same unit."
        )


def run_dataset_evaluation(policy: str, dataset: str, *, samples: int, as_json: bool, **options: Any) -> None:
    """Print the result of `evaluate_on_dataset`: tables, or one JSON document on stdout with notes on stderr."""
    result = evaluate_on_dataset(policy, dataset, samples=samples, **options)
    if result.samples < samples:
        found = counted(result.samples, "frame")
        if result.samples < result.frames:
            found += " with new images"
        note = f"{dataset} has only {found} to sample {samples} from; all of them were used."
        PlainConsole(stderr=True).print(note, soft_wrap=True)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_tables(result, PlainConsole())


def _print_tables(result: DatasetEvaluation, console: Console) -> None:
    errors = result.errors
    title = (
        f"{result.policy} on {result.dataset}: {result.samples} of {counted(result.frames, 'frame')} of "
        f"{counted(len(result.episodes), 'episode')}, chunks of {counted(len(errors.counts), 'action')}, "
        f"{counted(int(errors.counts.sum()), 'recorded action')}, {result.seconds:.0f} s"
    )
    console.print(title, soft_wrap=True)
    for table in (_dimension_table(errors), _overall_table(errors), _horizon_table(errors)):
        console.print(table.to_rich(), crop=False)
    console.print(
        "hold: the robot stays where it is. mean: the dataset's mean action. Range: 1 % to 99 % quantile of the "
        "dataset's actions. n/a: no hold command is known, or the action hardly ever changes.",
        style="dim",
    )
    for baseline in BASELINES:
        worse = errors.is_worse_than(baseline)
        if worse.any():
            names = ", ".join(np.array([dimension.name for dimension in errors.dimensions])[worse])
            console.print(f"worse than the baseline {_NAMES[baseline]}: {names}", style="yellow")
    for line in (*result.notes, *(f"plot: {path}" for path in result.plots)):
        console.print(line, soft_wrap=True)


def _dimension_table(errors: ChunkErrors) -> Table:
    has_units = any(dimension.unit for dimension in errors.dimensions)
    columns = [Column("action"), *([Column("unit", "name")] if has_units else [])]
    columns += [Column(title, "number") for title in ("MAE", "RMSE", "MAE,\nof range", "MAE of\nhold", "MAE of\nmean")]
    mae, rmse, of_range = errors.mae(), errors.rmse(), errors.mae() / errors.ranges
    rows: list[Sequence[Cell]] = []
    for i, dimension in enumerate(errors.dimensions):
        unit = [textwrap.shorten(dimension.unit, 15, placeholder=" …")] if has_units else []
        baselines = [
            Text(_number(errors.mae(of)[i]), style="yellow" if errors.is_worse_than(of)[i] else "") for of in BASELINES
        ]
        rows.append((dimension.name, *unit, _number(mae[i]), _number(rmse[i]), _percent(of_range[i]), *baselines))
    return Table(columns, rows)


def _overall_table(errors: ChunkErrors) -> Table:
    """Errors of the policy, and compared with each baseline on the same dimensions."""
    columns = (Column("MAE, of range", "name"), *(Column(t, "number") for t in ("dimensions", "policy", "baseline")))
    rows = [("all", str(errors.overall().dimensions), _percent(errors.overall().mae_scaled), "")]
    for of in BASELINES:
        baseline, policy = errors.overall(of), errors.overall(like=of)
        percents = _percent(policy.mae_scaled), _percent(baseline.mae_scaled)
        rows.append((f"compared with {_NAMES[of]}", str(baseline.dimensions), *percents))
    return Table(columns, rows)


def _horizon_table(errors: ChunkErrors) -> Table:
    """Errors at a few steps of the horizon."""
    steps = np.unique(np.linspace(0, np.flatnonzero(errors.counts)[-1], 6).round().astype(int))
    rows: list[Sequence[Cell]] = []
    for of, name in _NAMES.items():
        if dimensions := errors.overall(of).dimensions:
            note = f" ({counted(dimensions, 'dimension')})" if dimensions < errors.overall().dimensions else ""
            rows.append((f"{name}{note}", *map(_percent, errors.scaled_per_step(of)[steps])))
    return Table((Column("MAE, of range, at step", "name"), *(Column(str(step), "number") for step in steps)), rows)


def _percent(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "n/a"


_number = partial(format_number, missing="n/a")
