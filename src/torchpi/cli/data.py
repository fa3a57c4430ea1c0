"""Commands about datasets: stats, sim record."""

import dataclasses
import pathlib
import shlex
from typing import Annotated, Any

import tyro

from torchpi.cli.common import print_json, split_names


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
    """Where openpi's norm_stats.json goes, a file or an existing folder; by default nothing is written."""
    action_horizon: int = 50
    """Actions in a chunk."""
    episodes: str | None = None
    """Only these, for example "0:40,57,100:" or "task:open the *"; both: "0:40; task:open the *"."""
    rename: tuple[str, ...] = ()
    """LeRobot's names for columns that the dataset calls otherwise, OLD=NEW: state=observation.state actions=action.
    Columns that have to be joined: joint_position+gripper_position=observation.state."""
    compare: str | None = None
    """A checkpoint: shows for each of its robots the fraction of the data inside its [q01, q99]."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.data.rename import parse_rename
        from torchpi.data.stats_report import run_stats

        arguments = vars(self) | {"rename": parse_rename(self.rename)}
        run_stats(arguments.pop("dataset"), as_json=arguments.pop("json"), **arguments)


@dataclasses.dataclass(frozen=True)
class SimRecord:
    """Record a simulator's scripted experts as a LeRobot dataset.

    A part of the episodes is disturbed, and shows how to recover from states that the expert alone would not reach.
    Ctrl-C keeps the episodes that are complete. The seed decides the dataset; the number of workers changes nothing.
    """

    out: pathlib.Path
    """The dataset's folder, new or empty."""
    tasks: str
    """Tasks by name, separated by commas, for example drawer-open,door-open."""
    episodes: int
    """Episodes per task."""
    env: str = "metaworld"
    """The simulator; metaworld has experts."""
    seed: int = 0
    """Seed of the whole recording; no seed has episodes that `eval` runs."""
    noise: float = 0.4
    """Standard deviation of the disturbance of the executed actions, which are from -1 to 1."""
    noisy_fraction: float = 0.5
    """The part of each task's episodes that is disturbed."""
    push_rate: float = 0.02
    """Probability per step of a disturbed episode that the arm is pushed somewhere else, for 5 to 20 steps: shows how
    to recover from a miss."""
    video: bool = False
    """Write the cameras as video (small, lossy) instead of PNG (exact)."""
    image_size: int | None = None
    """Height and width of the images; by default the simulator's."""
    workers: int | None = None
    """Processes; by default as many as the CPU's cores and the memory allow."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.sim.record import record

        options = {name: getattr(self, name) for name in ("seed", "noise", "noisy_fraction", "push_rate")}
        options |= {"image_size": self.image_size, "video": self.video}
        recorded = {name: getattr(self, name) for name in ("env", "tasks", "episodes", "out")}
        result = record(
            **recorded | {"tasks": split_names(self.tasks)},
            workers=self.workers,
            command=_as_command("sim record", recorded | options),
            **options,
        )
        if self.json:
            print_json(dataclasses.asdict(result))
            return
        failures = sum(result.failures.values())
        print(
            f"{result.episodes} episodes, {result.frames} frames in {result.seconds:.0f} s, written to {result.path}; "
            f"{failures} in which the expert failed were left out"
        )


def _as_command(name: str, arguments: dict[str, Any]) -> str:
    """A command line with these arguments; those that are None are left out."""
    words = ["torchpi", *name.split()]
    for argument, value in arguments.items():
        flag = argument.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
