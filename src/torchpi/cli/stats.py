"""The command `torchpi stats`."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from torchpi.cli.common import FrameOptions, Frames
from torchpi.errors import counted
from torchpi.ui.format import print_json
from torchpi.ui.tables import Column, PlainConsole, Table

if TYPE_CHECKING:
    from torchpi.data import LeRobotDataset
    from torchpi.robots import Embodiment
    from torchpi.transforms import NormStats


@dataclasses.dataclass(frozen=True)
class Stats:
    """Show the statistics of a dataset, and write those that a policy normalizes with.

    They are exact, from all frames, in the model's terms: units converted, actions relative to the state where the
    embodiment says so. Dimensions that hardly move are named, because normalization makes rare values huge there, and
    idle frames are counted. Images are not read.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """A LeRobot dataset, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision]."""
    embodiment: str
    """The robot: metaworld, aloha, … or a JSON file."""
    out: pathlib.Path | None = None
    """The file for openpi's norm_stats.json, or an existing folder; by default nothing is written."""
    action_horizon: int = 50
    """Actions in a chunk."""
    select: str | None = None
    """Only these episodes, for example "0:40,57,100:" or "task:open the *"; both: "0:40; task:open the *"."""
    compare: tuple[str, ...] | None = None
    """Checkpoints or norm_stats.json files: rank their robots by the fraction of the data inside [q01, q99], with
    reasons. Without any: rank the robots of the released checkpoints by their descriptions; nothing is downloaded."""
    json: bool = False
    """Print one JSON document."""
    frames: Frames = FrameOptions()
    aliases: ClassVar = {"--episodes": "--select"}

    def run(self) -> None:
        from torchpi.data import idle_frames
        from torchpi.data.fit import coverage_with_reasons, released_fits, unit_problems
        from torchpi.data.stats import distributions, stats_coverage
        from torchpi.robots import get_embodiment
        from torchpi.transforms.normalize import narrow_dims, save_norm_stats

        robot, horizon = get_embodiment(self.embodiment), self.action_horizon
        robots = _stats_of_all(self.compare or ())
        dataset = self._open(robot)
        with PlainConsole(stderr=True).status(f"statistics of {self.dataset}"):  # shown on a terminal only
            found = distributions(dataset, robot, action_horizon=horizon)
            num_idle = int(idle_frames(dataset).sum())
            coverage = stats_coverage(dataset, robot, robots, action_horizon=horizon)
        ranked: list[Any] = [coverage_with_reasons(entry, found, robots[entry.name]) for entry in coverage]
        if self.compare == ():
            ranked = released_fits(robot)
        messages = [
            f"{what}: {message}"
            for what, values in found.items()
            for message in narrow_dims(values.stats, values.names)
        ]
        messages += unit_problems(dataset, robot)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            save_norm_stats(self.out, {what: values.stats for what, values in found.items()})
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
            **{what: values.to_dict() for what, values in found.items()},
            "warnings": messages,
            "compare": None if self.compare is None else [dataclasses.asdict(entry) for entry in ranked],
        }
        if self.json:
            print_json(document)
        else:
            _print_statistics(document, robot)
            _print_comparison(ranked, self.compare)
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)

    def _open(self, robot: "Embodiment") -> "LeRobotDataset":
        """The numbers of the dataset; neither images nor other columns are read."""
        from torchpi.data import LeRobotDataset, select_episodes
        from torchpi.data.rate import rate_note

        dataset = LeRobotDataset(
            self.dataset,
            action_horizon=self.action_horizon,
            embodiment=robot,
            episodes=None if self.select is None else select_episodes(self.dataset, self.select),
            cameras=(),
            columns=(),
            prompt="",  # instructions are not read
            **self.frames.reading(),
        )
        if note := rate_note(dataset.fps, dataset.recorded_fps, robot):
            print(f"{self.dataset} is {note}", file=sys.stderr)
        return dataset


def _stats_of_all(addresses: Sequence[str]) -> dict[str, dict[str, "NormStats"]]:
    """The statistics of several checkpoints, by asset id; of several, behind the address."""
    found = {address: checkpoint_stats(address) for address in addresses}
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{address}: {name}": stats for address, robots in found.items() for name, stats in robots.items()}


def checkpoint_stats(address: str | pathlib.Path) -> dict[str, dict[str, "NormStats"]]:
    """Read the statistics of each robot of a checkpoint, by its asset id.

    Args:
        address: a policy folder, a checkpoint of openpi or LeRobot, the folder `assets` of one, a norm_stats.json or
            a folder with one; hf://… or gs://…, of which only `assets` is downloaded if there is one.
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
            if "found nothing" not in str(error):  # of another kind, or not to be reached
                raise
    return existing_folder(address)


def _print_statistics(document: Mapping[str, Any], robot: "Embodiment") -> None:
    from torchpi.data.idle import IDLE_SECONDS, IDLE_THRESHOLD

    stated = robot.hook is None  # a hook converts the units
    notes = {
        "state": [unit if stated else "" for unit in robot.state_units],
        "actions": [
            ", ".join(filter(None, (action.unit if stated else "", "delta" if action.kind == "delta" else "")))
            for action in robot.actions
        ],
    }
    print(
        f"{document['dataset']}: {counted(document['episodes'], 'episode')}, {counted(document['frames'], 'frame')}, "
        f"as {document['embodiment']} sees them; chunks of {counted(document['action_horizon'], 'action')}\n"
        f"{counted(document['idle_frames'], 'frame is', 'frames are')} idle ({document['idle_share']:.1%}): for "
        f"{IDLE_SECONDS:g} s, nothing moves by more than {IDLE_THRESHOLD:.0%} of its range",
    )
    for what in ("state", "actions"):
        if not document[what]["names"]:
            print("state: none")
            continue
        columns = [
            Column(what, "name"),
            Column("unit"),
            *(Column(title, "number") for title in list(document[what])[1:]),
        ]
        rows = zip(notes[what], zip(*document[what].values(), strict=True), strict=False)
        texts = [(name, note, *(f"{number:.3g}" for number in numbers)) for note, (name, *numbers) in rows]
        PlainConsole().print(Table(columns, texts).to_rich(), crop=False)
    if document["out"]:
        print(f"written to {document['out']}")


def _print_comparison(ranked: Sequence[Any], addresses: Sequence[str] | None) -> None:
    if addresses:
        rows = [
            (entry.name, *(f"{part.overall:.1%}" if part else "none" for part in (entry, entry.state, entry.actions)))
            for entry in ranked
        ]
        numbers = (Column(title, "number") for title in ("all", "state", "actions"))
        print(f"fraction inside [q01, q99] of {', '.join(addresses)}, the best first:")
        PlainConsole().print(Table([Column("robot", "name"), *numbers], rows).to_rich(), crop=False)
    elif ranked:
        print(
            "The released statistics by their robots' descriptions, the most similar first. Zero and direction of a "
            "joint are in none: compare with numbers, --compare gs://openpi-assets/checkpoints/NAME."
        )
    for entry in ranked:
        print("\n    ".join((f"{entry}:", *(entry.reasons or ["fits"]))))
