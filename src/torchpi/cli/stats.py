"""The stats command."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from torchpi.cli.common import FrameOptions, Frames, Json
from torchpi.errors import counted
from torchpi.ui.format import print_json
from torchpi.ui.tables import Column, PlainConsole, Table

if TYPE_CHECKING:
    from torchpi.data import LeRobotDataset
    from torchpi.robots import Embodiment
    from torchpi.transforms import NormStats


@dataclasses.dataclass(frozen=True)
class Stats:
    """Compute a dataset's normalization statistics, show them, and write them to a file.

    The statistics are exact, over all frames, in the model's representation: with converted units, and with actions
    relative to the state where the embodiment says so. The command warns about dimensions that hardly move, because
    normalization would scale rare values there to extremes. It also counts idle frames. Images are not read.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """LeRobot dataset, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision]."""
    embodiment: str
    """Robot: metaworld, aloha, …, or a JSON file."""
    out: pathlib.Path | None = None
    """Output file in the format of openpi's norm_stats.json, or an existing folder; by default nothing is written."""
    action_horizon: int = 50
    """Number of actions in a chunk."""
    select: str | None = None
    """Use only these episodes, such as "0:40,57,100:", "task:open the *", or both: "0:40; task:open the *"."""
    compare: tuple[str, ...] | None = None
    """Checkpoints or norm_stats.json files whose robots to rank by the fraction of the data inside [q01, q99].
    With no value, rank the robots of the released checkpoints by their descriptions, without a download."""
    json: Json = False
    frames: Frames = FrameOptions()
    aliases: ClassVar = {"--episodes": "--select"}

    def run(self) -> None:
        from torchpi.data import idle_frames
        from torchpi.data.fit import coverage_with_reasons, released_fits, unit_problems
        from torchpi.data.stats import distributions, stats_coverage
        from torchpi.robots import get_embodiment
        from torchpi.transforms.normalize import narrow_dims, save_norm_stats

        robot, horizon = get_embodiment(self.embodiment), self.action_horizon
        compared_stats = _compared_stats(self.compare or ())
        dataset = self._open(robot)
        with PlainConsole(stderr=True).status(f"statistics of {self.dataset}"):  # shown on a terminal only
            quantities = distributions(dataset, robot, action_horizon=horizon)  # state and actions
            num_idle = int(idle_frames(dataset).sum())
            coverage = stats_coverage(dataset, robot, compared_stats, action_horizon=horizon)
        ranking: list[Any] = [
            coverage_with_reasons(entry, quantities, compared_stats[entry.name]) for entry in coverage
        ]
        if self.compare == ():
            ranking = released_fits(robot)
        warnings = [
            f"{key}: {message}"
            for key, values in quantities.items()
            for message in narrow_dims(values.stats, values.names)
        ]
        warnings += unit_problems(dataset, robot)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            save_norm_stats(self.out, {key: values.stats for key, values in quantities.items()})
        document = {
            "dataset": self.dataset,
            "embodiment": robot.name,
            "episodes": len(dataset.episode_lengths),
            "frames": len(dataset),
            "fps": dataset.fps,
            "recorded_fps": dataset.recorded_fps,
            "idle_frames": num_idle,
            "idle_share": num_idle / len(dataset),
            "action_horizon": horizon,
            "out": None if self.out is None else str(self.out),
            **{key: values.to_dict() for key, values in quantities.items()},
            "warnings": warnings,
            "compare": None if self.compare is None else [dataclasses.asdict(entry) for entry in ranking],
        }
        if self.json:
            print_json(document)
        else:
            _print_statistics(document, robot)
            _print_comparison(ranking, self.compare)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)

    def _open(self, robot: "Embodiment") -> "LeRobotDataset":
        """Open the dataset for its states and actions only."""
        from torchpi.data import LeRobotDataset, select_episodes
        from torchpi.data.rate import rate_note

        dataset = LeRobotDataset(
            self.dataset,
            action_horizon=self.action_horizon,
            embodiment=robot,
            episodes=None if self.select is None else select_episodes(self.dataset, self.select),
            cameras=(),
            columns=(),
            prompt="",  # task texts are not read
            **self.frames.dataset_args(),
        )
        if note := rate_note(dataset.fps, dataset.recorded_fps, robot):
            print(f"{self.dataset} is {note}", file=sys.stderr)
        return dataset


def _compared_stats(addresses: Sequence[str]) -> dict[str, dict[str, "NormStats"]]:
    """Statistics by asset ID; with several checkpoints, by "ADDRESS: ID"."""
    by_address = {address: checkpoint_stats(address) for address in addresses}
    if len(by_address) == 1:
        return by_address[addresses[0]]
    return {f"{address}: {name}": stats for address, robots in by_address.items() for name, stats in robots.items()}


def checkpoint_stats(address: str | pathlib.Path) -> dict[str, dict[str, "NormStats"]]:
    """Read the statistics of each robot in a checkpoint, by asset ID.

    Args:
        address: a policy folder, an openpi or LeRobot checkpoint, the `assets` folder of one, a norm_stats.json, or a
            folder that contains one. From an hf:// or gs:// address, only `assets` is downloaded if it exists.
    """
    from torchpi.checkpoints.lerobot import PREPROCESSOR, read_spec
    from torchpi.checkpoints.openpi import find_params, norm_stats_files
    from torchpi.errors import MissingFileError
    from torchpi.schema import read_json_object
    from torchpi.transforms import load_norm_stats

    file = pathlib.Path(address)
    if file.suffix == ".json" and file.is_file() and file.name not in ("policy.json", "config.json"):
        return {file.resolve().parent.name if file.stem == "norm_stats" else file.stem: load_norm_stats(file)}
    root = _folder_with_stats(str(address))
    if (root / PREPROCESSOR).is_file():
        spec = read_spec(root, read_json_object(root / "config.json"))
        spec.require_statistics()
        return {root.name: dict(spec.norm_stats or {})}
    if (root / "norm_stats.json").is_file():
        return {root.name: load_norm_stats(root)}
    params = find_params(root)
    files = norm_stats_files(params.parent if params else root) or {
        file.parent.relative_to(root).as_posix(): file for file in sorted(root.rglob("norm_stats.json"))
    }
    if not files:
        raise MissingFileError(
            f"{root} has no statistics; expected norm_stats.json, assets/<id>/norm_stats.json, or LeRobot's "
            f"{PREPROCESSOR}."
        )
    return {asset_id: load_norm_stats(file) for asset_id, file in files.items()}


def _folder_with_stats(address: str) -> pathlib.Path:
    from torchpi.checkpoints.address import existing_folder

    if address.startswith(("hf://", "gs://")):
        try:
            return existing_folder(f"{address.rstrip('/')}/assets")
        except FileNotFoundError as error:
            if "found nothing" not in str(error):  # another failure, such as a network error
                raise
    return existing_folder(address)


def _print_statistics(document: Mapping[str, Any], robot: "Embodiment") -> None:
    from torchpi.data.idle import IDLE_SECONDS, IDLE_THRESHOLD

    has_units = robot.hook is None  # a hook converts units, so the embodiment's do not apply
    units = {
        "state": [unit if has_units else "" for unit in robot.state_units],
        "actions": [
            ", ".join(filter(None, (action.unit if has_units else "", "delta" if action.kind == "delta" else "")))
            for action in robot.actions
        ],
    }
    print(
        f"{document['dataset']}: {counted(document['episodes'], 'episode')}, {counted(document['frames'], 'frame')}, "
        f"converted for {document['embodiment']}; chunks of {counted(document['action_horizon'], 'action')}\n"
        f"{counted(document['idle_frames'], 'frame is', 'frames are')} idle ({document['idle_share']:.1%}): for "
        f"{IDLE_SECONDS:g} s, nothing moves by more than {IDLE_THRESHOLD:.0%} of its range",
    )
    for key in ("state", "actions"):
        statistics = document[key]  # "names", then one list per statistic
        if not statistics["names"]:
            print("state: none")
            continue
        titles = list(statistics)[1:]
        columns = [Column(key, "name"), Column("unit"), *(Column(title, "number") for title in titles)]
        rows = [
            (name, unit, *(f"{number:.3g}" for number in numbers))
            for unit, (name, *numbers) in zip(units[key], zip(*statistics.values(), strict=True), strict=False)
        ]
        PlainConsole().print(Table(columns, rows).to_rich(), crop=False)
    if document["out"]:
        print(f"written to {document['out']}")


def _print_comparison(ranking: Sequence[Any], addresses: Sequence[str] | None) -> None:
    if addresses:
        rows = [
            (entry.name, *(f"{part.overall:.1%}" if part else "none" for part in (entry, entry.state, entry.actions)))
            for entry in ranking
        ]
        numbers = (Column(title, "number") for title in ("all", "state", "actions"))
        print(f"fraction inside [q01, q99] of {', '.join(addresses)}, best first:")
        PlainConsole().print(Table([Column("robot", "name"), *numbers], rows).to_rich(), crop=False)
    elif ranking:
        print(
            "Robots of the released statistics, most similar description first. Descriptions do not state a joint's "
            "zero position or direction; to compare numbers: --compare gs://openpi-assets/checkpoints/NAME."
        )
    for entry in ranking:
        print("\n    ".join((f"{entry}:", *(entry.reasons or ["fits"]))))
