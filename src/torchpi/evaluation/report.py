"""`torchpi eval POLICY --dataset PATH`: from the addresses of a policy and a data set to a report and pictures."""

import dataclasses
import json
import pathlib
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from torchpi.data import LeRobotDataset
from torchpi.data import format as lerobot
from torchpi.data.observations import camera_keys_of
from torchpi.data.place import open_metadata
from torchpi.evaluation.chunks import Chunks, batches, predict_chunks, sample_frames
from torchpi.evaluation.errors import BASELINES, HOLD, MEAN_ACTION, POLICY, ChunkErrors, errors_of
from torchpi.evaluation.plots import evenly_spaced, plot_chunks, plot_errors
from torchpi.policy import Policy, load_policy
from torchpi.ui.progress import progress_bar

ERRORS_PICTURE, CHUNKS_PICTURE = "errors.png", "chunks.png"
_PICTURED_FRAMES, _PICTURED_DRAWS = 4, 8
_NAMES = {HOLD: "hold", MEAN_ACTION: "mean"}


@dataclasses.dataclass(frozen=True)
class DatasetEvaluation:
    """The result of `evaluate_on_dataset`."""

    policy: str
    dataset: str
    """As they were given."""
    embodiment: str
    episodes: tuple[int, ...]
    """The indices of the episodes that frames were sampled from."""
    frames: int
    """All frames of these."""
    samples: int
    """Those at which a chunk was predicted."""
    seed: int
    num_steps: int
    """Euler steps."""
    draws: int
    """Of noise per frame."""
    seconds: float
    """On the clock, without loading."""
    errors: ChunkErrors
    pictures: tuple[str, ...]
    """Paths."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, see docs/evaluation.md."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        errors = fields.pop("errors")
        return {**fields, **errors.to_dict()}


def evaluate_on_dataset(
    policy: str | pathlib.Path,
    dataset: str | pathlib.Path,
    *,
    samples: int = 256,
    seed: int = 0,
    episodes: Sequence[int] | None = None,
    num_steps: int = 10,
    batch_size: int = 32,
    draws: int = 1,
    rename: Mapping[str, str] | None = None,
    out: pathlib.Path | None = None,
    load: Mapping[str, Any] | None = None,
) -> DatasetEvaluation:
    """Compare what a policy predicts with what was recorded. Progress is shown on stderr.

    Args:
        policy: a policy in any format, see `load_policy`.
        dataset: a LeRobot data set of its robot, a folder or hf://org/name[@revision].
        samples: frames, spread evenly, see `sample_frames`; where there are fewer, all.
        episodes: indices of those to sample from; by default all.
        num_steps, batch_size, draws: see `predict_chunks`.
        rename: LeRobot's names for some columns and cameras, see `LeRobotDataset`.
        out: the folder of the pictures; None: none.
        load: arguments of `load_policy`.
    """
    loaded = load_policy(policy, **(load or {}))
    horizon = loaded.model.config.require("action_horizon")
    cameras = camera_keys_of(loaded.embodiment, open_metadata(dataset, rename=rename).camera_keys)
    data = LeRobotDataset(
        dataset, action_horizon=horizon, episodes=episodes, cameras=cameras, columns=(), rename=rename
    )
    frames = sample_frames(data.episode_lengths, samples, seed=seed)
    start = time.perf_counter()
    chunks = _predict(loaded, data, frames, "chunks", draws, seed=seed, num_steps=num_steps, batch_size=batch_size)
    errors = errors_of(chunks, data.columns[lerobot.ACTION])
    pictures: tuple[pathlib.Path, ...] = ()
    if out is not None:
        few = [frames[i] for i in evenly_spaced(len(frames), _PICTURED_FRAMES)]
        drawn = _predict(
            loaded, data, few, "pictures", _PICTURED_DRAWS, seed=seed, num_steps=num_steps, batch_size=batch_size
        )
        pictures = _draw(out, errors, drawn)
    return DatasetEvaluation(
        str(policy),
        str(dataset),
        loaded.embodiment.name,
        data.episode_indices,
        len(data),
        len(frames),
        seed,
        num_steps,
        draws,
        time.perf_counter() - start,
        errors,
        tuple(map(str, pictures)),
    )


def _predict(
    policy: Policy,
    data: LeRobotDataset,
    frames: Sequence[int],
    what: str,
    draws: int,
    *,
    batch_size: int,
    **options: Any,
) -> Chunks:
    """`predict_chunks` with a progress bar."""
    total = len(batches(frames, batch_size=max(1, batch_size), draws=max(1, draws)))
    with progress_bar(what, total, shown=True) as advance:
        return predict_chunks(
            policy, data, frames, draws=draws, batch_size=batch_size, on_batch=lambda: advance(""), **options
        )


def _draw(out: pathlib.Path, errors: ChunkErrors, chunks: Chunks) -> tuple[pathlib.Path, ...]:
    out.mkdir(parents=True, exist_ok=True)
    figures = {ERRORS_PICTURE: plot_errors(errors), CHUNKS_PICTURE: plot_chunks(chunks)}
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=110)
    return tuple(out / name for name in figures)


def run_dataset_evaluation(policy: str, dataset: str, *, samples: int, as_json: bool, **options: Any) -> None:
    """`evaluate_on_dataset`, printed: tables, or one JSON document on stdout and the rest on stderr."""
    result = evaluate_on_dataset(policy, dataset, samples=samples, **options)
    if result.samples < samples:
        note = f"{dataset} has only {result.frames} frames to sample {samples} from; all of them were used."
        Console(stderr=True, highlight=False).print(Text(note), soft_wrap=True)
    if as_json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        print_dataset_evaluation(result, Console(highlight=False))


def print_dataset_evaluation(result: DatasetEvaluation, console: Console) -> None:
    """The errors per dimension, overall, and over the horizon; and where a baseline does better."""
    errors = result.errors
    console.print(
        f"{result.policy} on {result.dataset}: {result.samples} of {result.frames} frames of {len(result.episodes)} "
        f"episodes, chunks of {len(errors.counts)} actions, {int(errors.counts.sum())} recorded actions, "
        f"{result.seconds:.0f} s",
        soft_wrap=True,
        markup=False,
    )
    console.print(_dimensions(errors))
    console.print(_overall(errors))
    console.print(_horizon(errors))
    console.print(
        "hold: the robot stays where it is. mean: the data set's mean action. Range: 1 % to 99 % quantile of the data "
        "set's actions. n/a: the embodiment doesn't tell how to stay, or the action hardly ever changes.",
        style="dim",
    )
    for baseline in BASELINES:
        worse = [
            d.name for d, is_worse in zip(errors.dimensions, errors.is_worse_than(baseline), strict=True) if is_worse
        ]
        if worse:
            console.print(Text(f"worse than the baseline {_NAMES[baseline]}: {', '.join(worse)}", style="yellow"))
    for picture in result.pictures:
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)


def _dimensions(errors: ChunkErrors) -> Table:
    has_units = any(dimension.unit for dimension in errors.dimensions)
    table = Table(
        Column("action", overflow="fold"),  # the only one that gives way where there is no room
        *([Column("unit", no_wrap=True)] if has_units else []),
        *(Column(name, justify="right", no_wrap=True) for name in ("MAE", "RMSE", "MAE,\nof range")),
        *(Column("MAE of\n" + _NAMES[baseline], justify="right", no_wrap=True) for baseline in BASELINES),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    mae, rmse, scaled = errors.mae(), errors.rmse(), errors.mae() / errors.ranges
    for i, dimension in enumerate(errors.dimensions):
        beside = [
            Text(_number(errors.mae(baseline)[i]), style="yellow" if errors.is_worse_than(baseline)[i] else "")
            for baseline in BASELINES
        ]
        unit = [Text(textwrap.shorten(dimension.unit, 15, placeholder=" …"))] if has_units else []
        table.add_row(Text(dimension.name), *unit, _number(mae[i]), _number(rmse[i]), _percent(scaled[i]), *beside)
    return table


def _overall(errors: ChunkErrors) -> Table:
    """Policy and baselines, each pair on the same dimensions."""
    table = Table(
        Column("MAE, of range", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in ("dimensions", "policy", "baseline")),
        box=box.SIMPLE_HEAD,
    )
    whole = errors.overall()
    table.add_row("all", str(whole.dimensions), _percent(whole.mae_scaled), "")
    for baseline in BASELINES:
        own, policy = errors.overall(baseline), errors.overall(like=baseline)
        percents = _percent(policy.mae_scaled), _percent(own.mae_scaled)
        table.add_row(f"beside {_NAMES[baseline]}", str(own.dimensions), *percents)
    return table


def _horizon(errors: ChunkErrors) -> Table:
    """Of a few steps: the first, the last, and some between them."""
    reached = np.flatnonzero(errors.counts)
    steps = np.unique(np.linspace(0, reached[-1], 6).round().astype(int))
    table = Table(
        Column("MAE, of range, at step", no_wrap=True),
        *(Column(str(step), justify="right", no_wrap=True) for step in steps),
        box=box.SIMPLE_HEAD,
    )
    for of in (POLICY, *BASELINES):
        if errors.overall(of).dimensions:
            partly = errors.overall(of).dimensions < errors.overall().dimensions
            note = f" ({errors.overall(of).dimensions} dimensions)" if partly else ""
            table.add_row(
                f"{_NAMES.get(of, of)}{note}", *(_percent(errors.scaled_per_step(of)[step]) for step in steps)
            )
    return table


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "n/a"


def _percent(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "n/a"
