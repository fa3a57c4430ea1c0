"""How well a data set fits the statistics that a checkpoint was trained with: which of its robots is this one?"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.config import read_json_object
from torchpi.data.stats import Frames, ModelValues
from torchpi.errors import DatasetError, MissingFileError
from torchpi.robots import Embodiment
from torchpi.transforms.normalize import DEVIATIONS, NormStats, load_norm_stats


@dataclasses.dataclass(frozen=True)
class KeyFit:
    """One quantity ("state" or "actions") of a data set beside a robot's statistics of it."""

    dims: int
    """Of the data set."""
    checkpoint_dims: int
    """Of the statistics, without padding."""
    range: str
    """What counts as inside: "q01..q99", or "mean ± 2.326 std" where there are no quantiles."""
    names: tuple[str, ...]
    """Of the dimensions that both have."""
    inside: tuple[float, ...]
    """Share of the data set's values inside of the range, for each of these."""

    @property
    def overall(self) -> float:
        """Share over these dimensions."""
        return sum(self.inside) / len(self.inside)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A data set beside the statistics of one robot."""

    name: str
    """The asset id; of a checkpoint with one robot, its folder."""
    keys: Mapping[str, KeyFit]
    """"state" and "actions", as far as the checkpoint has them."""

    @property
    def comparable(self) -> bool:
        """Whether state and actions have the same number of dimensions."""
        return len(self.keys) == 2 and all(key.dims == key.checkpoint_dims for key in self.keys.values())

    @property
    def overall(self) -> float:
        """Share over all dimensions of state and actions that both have. A perfect fit has 0.98."""
        inside = [share for key in self.keys.values() for share in key.inside]
        return sum(inside) / len(inside)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        keys = {name: {**dataclasses.asdict(key), "overall": key.overall} for name, key in self.keys.items()}
        return {"name": self.name, "comparable": self.comparable, "overall": self.overall, **keys}


def checkpoint_stats(address: str | Path) -> dict[str, dict[str, NormStats]]:
    """The statistics of each robot of a checkpoint, by its asset id.

    Args:
        address: a policy folder, a checkpoint of openpi or LeRobot, the folder `assets` of one, a folder with a
            norm_stats.json; hf://… or gs://…, of which only `assets` is fetched if there is one.
    """
    from torchpi.checkpoints.lerobot import PREPROCESSOR, read_parts  # bring torch
    from torchpi.checkpoints.load import norm_stats_files

    root = _folder_with_stats(str(address))
    if (root / PREPROCESSOR).is_file():
        return {root.name: dict(read_parts(root, read_json_object(root / "config.json")).norm_stats)}
    if (root / "norm_stats.json").is_file():
        return {root.name: load_norm_stats(root)}
    files = norm_stats_files(root) or {
        file.parent.relative_to(root).as_posix(): file for file in sorted(root.rglob("norm_stats.json"))
    }
    if not files:
        raise MissingFileError(
            f"{root} has no statistics; expected norm_stats.json, assets/<id>/norm_stats.json, or LeRobot's "
            f"{PREPROCESSOR}."
        )
    return {asset_id: load_norm_stats(file) for asset_id, file in files.items()}


def compare_fit(
    dataset: Frames, embodiment: Embodiment, robots: Mapping[str, Mapping[str, NormStats]], *, action_horizon: int
) -> list[Fit]:
    """The share of a data set's values inside of each robot's q01 to q99, the best fit first.

    Counted are the values that `compute_norm_stats` describes: in the model's terms, actions over whole chunks. Robots
    with another number of dimensions come last, compared in the dimensions that both have, the first ones.

    Args:
        robots: statistics of "state" and "actions" by the robot's name.
        action_horizon: H, the chunk's length.
    """
    values = ModelValues.of(dataset, embodiment, action_horizon=action_horizon)
    fits = []
    for name, stats in robots.items():
        keys = {what: _key_fit(values, what, stats[what]) for what in values.names if what in stats}
        if not keys:
            raise DatasetError(f"The statistics of {name} have neither state nor actions, but {', '.join(stats)}.")
        fits.append(Fit(name, keys))
    return sorted(fits, key=lambda fit: (not fit.comparable, -fit.overall))


def _folder_with_stats(address: str) -> Path:
    from torchpi.checkpoints.load import existing_folder

    if address.startswith(("hf://", "gs://")):
        try:
            return existing_folder(f"{address.rstrip('/')}/assets")
        except FileNotFoundError as error:
            if "found nothing" not in str(error):  # of another kind, or not to be reached
                raise
    return existing_folder(address)


def _key_fit(values: ModelValues, what: str, stats: NormStats) -> KeyFit:
    dims = len(values.names[what])
    common = min(dims, stats.dim)
    # Published statistics are padded with zeros to the model's width.
    beyond = np.flatnonzero((stats.std != 0) | (stats.mean != 0))
    checkpoint_dims = max(min(dims, stats.dim), int(beyond[-1]) + 1 if beyond.size else 0)
    low, high = stats.training_range()
    kind = f"mean ± {DEVIATIONS} std" if stats.q01 is None else "q01..q99"
    inside = tuple(_share_inside(values, what, i, float(low[i]), float(high[i])) for i in range(common))
    return KeyFit(dims, checkpoint_dims, kind, values.names[what][:common], inside)


def _share_inside(values: ModelValues, what: str, i: int, low: float, high: float) -> float:
    total = inside = 0
    for part, counts in _parts(values, what, i):
        within = (part >= low) & (part <= high)
        total += int(counts.sum()) if counts is not None else len(part)
        inside += int(counts[within].sum()) if counts is not None else int(np.count_nonzero(within))
    return inside / total


def _parts(values: ModelValues, what: str, i: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Values, and how often each counts; None: once."""
    if what == "state":
        yield values.state[:, i], None
    elif values.is_delta[i]:
        for part in values.deltas(i):
            yield part, None
    else:
        yield values.actions[:, i], values.in_chunks
