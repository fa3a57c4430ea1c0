"""`torchpi stats`: a data set's statistics, shown and written for training."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchpi.data.episodes import select_episodes
from torchpi.data.fit import Fit, checkpoint_stats, compare_fit
from torchpi.data.idle import IDLE_SECONDS, IDLE_THRESHOLD, idle_frames
from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.stats import Distribution, distributions
from torchpi.robots import Embodiment, get_embodiment
from torchpi.transforms.normalize import NormStats, narrow_dims, save_norm_stats

_EXPECTED = 0.98
"""Of the data that q01 and q99 were computed from, so much lies between them."""
_COLUMNS = ("mean", "std", "q01", "q99", "min", "max")


def run_stats(
    path: str | Path,
    *,
    embodiment: str | Path | Embodiment,
    out: Path | None = None,
    action_horizon: int = 50,
    episodes: str | None = None,
    compare: str | None = None,
    rename: Mapping[str, str] | None = None,
    as_json: bool = False,
) -> None:
    """Print the statistics of a data set, and write them as openpi's norm_stats.json.

    Args:
        path: the data set's folder or address.
        embodiment: its name, a JSON file, or the embodiment itself.
        out: the file to write, or a folder for norm_stats.json; None: only print.
        action_horizon: H, actions in a chunk.
        episodes: which to read, see `select_episodes`; None: all.
        compare: a checkpoint, see `checkpoint_stats`: how well the data fit each of its robots.
        rename: LeRobot's names for some columns, see `LeRobotDataset`.
        as_json: print one JSON document on stdout, everything else on stderr.
    """
    from rich.console import Console

    robot = get_embodiment(embodiment)
    others = {} if compare is None else checkpoint_stats(compare)
    chosen = None if episodes is None else select_episodes(path, episodes)
    # Neither images nor other columns are read.
    dataset = LeRobotDataset(
        path, action_horizon=action_horizon, episodes=chosen, cameras=(), columns=(), rename=rename
    )
    with Console(stderr=True).status(f"statistics of {path}"):  # shown on a terminal only
        found = distributions(dataset, robot, action_horizon=action_horizon)
        num_idle = int(idle_frames(dataset).sum())
        fits = compare_fit(dataset, robot, others, action_horizon=action_horizon)
    messages = [
        f"{what}: {message}"
        for what, values in found.items()
        for message in narrow_dims(values.norm_stats(), values.names)
    ]
    if out is not None:
        _save(out, {what: values.norm_stats() for what, values in found.items()})
    document = {
        "dataset": str(path),
        "embodiment": robot.name,
        "episodes": len(dataset.episode_lengths),
        "frames": len(dataset),
        "idle_frames": num_idle,
        "idle_share": num_idle / len(dataset),
        "action_horizon": action_horizon,
        "out": None if out is None else str(out),
        **{what: _as_json(values) for what, values in found.items()},
        "warnings": messages,
        "compare": None if compare is None else [fit.to_dict() for fit in fits],
    }
    if as_json:
        print(json.dumps(document))
    else:
        _print_tables(document, found)
        _print_fits(fits, compare)
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def _save(out: Path, stats: Mapping[str, NormStats]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    save_norm_stats(out, stats)


def _as_json(values: Distribution) -> dict[str, Any]:
    return {"names": list(values.names), **{name: getattr(values, name).tolist() for name in _COLUMNS}}


def _print_tables(document: Mapping[str, Any], found: Mapping[str, Distribution]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{document['dataset']}: {document['episodes']} episodes, {document['frames']} frames, "
        f"as {document['embodiment']} sees them; chunks of {document['action_horizon']} actions",
        soft_wrap=True,
    )
    console.print(
        f"{document['idle_frames']} frames ({document['idle_share']:.1%}) are idle: for {IDLE_SECONDS:g} s, nothing "
        f"moves by more than {IDLE_THRESHOLD:.0%} of its range",
        soft_wrap=True,
    )
    for what, values in found.items():
        table = Table(what, *_COLUMNS)
        for i, name in enumerate(values.names):
            table.add_row(name, *(f"{getattr(values, column)[i]:.4g}" for column in _COLUMNS))
        console.print(table)
    if document["out"]:
        console.print(f"written to {document['out']}", soft_wrap=True)


def _print_fits(fits: Sequence[Fit], address: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    if not fits:
        return
    console = Console(highlight=False)
    table = Table("robot", "all", "state", "actions", "farthest outside", title=f"inside of q01..q99 of {address}")
    for fit in fits:
        shares = [_share(fit.keys[what].overall) if what in fit.keys else "none" for what in ("state", "actions")]
        shares_of = [
            (share, f"{what} {name}")
            for what, key in fit.keys.items()
            for name, share in zip(key.names, key.inside, strict=True)
        ]
        worst = ", ".join(f"{name} {_share(share)}" for share, name in sorted(shares_of)[:3] if share < _EXPECTED)
        table.add_row(fit.name, _share(fit.overall), *shares, worst)
    console.print(table)
    for fit in fits:
        for what, key in fit.keys.items():
            if key.dims != key.checkpoint_dims:
                console.print(
                    f"{fit.name}: {what} has {key.checkpoint_dims} dimensions there and {key.dims} here; compared are "
                    f"the first {len(key.names)}",
                    soft_wrap=True,
                )


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
