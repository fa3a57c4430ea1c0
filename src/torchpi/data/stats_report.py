"""`torchpi stats`: a data set's statistics, shown and written for training."""

import json
import sys
from pathlib import Path
from typing import Any

from torchpi.data.lerobot import LeRobotDataset
from torchpi.data.stats import Distribution, distributions, hardly_moving
from torchpi.robots import Embodiment, get_embodiment
from torchpi.transforms.normalize import save_norm_stats

_COLUMNS = ("mean", "std", "q01", "q99", "min", "max")


def run_stats(
    path: str | Path,
    *,
    embodiment: str | Path | Embodiment,
    out: Path | None = None,
    action_horizon: int = 50,
    as_json: bool = False,
) -> None:
    """Print the statistics of a data set, and write them as openpi's norm_stats.json.

    Args:
        path: the data set's folder.
        embodiment: its name, a JSON file, or the embodiment itself.
        out: the file to write, or a folder for norm_stats.json; None: only print.
        action_horizon: H, actions in a chunk.
        as_json: print one JSON document on stdout, everything else on stderr.

    Raises:
        FileNotFoundError, KeyError, ValueError: see `LeRobotDataset`, `get_embodiment` and `compute_norm_stats`.
    """
    from rich.console import Console

    robot = get_embodiment(embodiment)
    errors = Console(stderr=True)
    with errors.status(f"reading {path}"):  # shown on a terminal only
        dataset = LeRobotDataset(path, action_horizon=action_horizon)
        found = distributions(dataset, robot, action_horizon=action_horizon)
    messages = [
        f"{what}: {message}"
        for what, values in found.items()
        for message in hardly_moving(values.norm_stats(), values.names)
    ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_norm_stats(out, {what: values.norm_stats() for what, values in found.items()})
    document = {
        "dataset": str(path),
        "embodiment": robot.name,
        "episodes": len(dataset.episode_lengths),
        "frames": len(dataset),
        "action_horizon": action_horizon,
        "out": None if out is None else str(out),
        **{what: _as_json(values) for what, values in found.items()},
        "warnings": messages,
    }
    if as_json:
        print(json.dumps(document))
    else:
        _print_tables(document, found)
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def _as_json(values: Distribution) -> dict[str, Any]:
    return {"names": list(values.names), **{name: getattr(values, name).tolist() for name in _COLUMNS}}


def _print_tables(document: dict[str, Any], found: dict[str, Distribution]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{document['dataset']}: {document['episodes']} episodes, {document['frames']} frames, "
        f"as {document['embodiment']} sees them; chunks of {document['action_horizon']} actions",
        soft_wrap=True,
    )
    for what, values in found.items():
        table = Table(what, *_COLUMNS)
        for i, name in enumerate(values.names):
            table.add_row(name, *(f"{getattr(values, column)[i]:.4g}" for column in _COLUMNS))
        console.print(table)
    if document["out"]:
        console.print(f"written to {document['out']}", soft_wrap=True)
