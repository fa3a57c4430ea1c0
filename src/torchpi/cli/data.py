"""The command `torchpi sim record`."""

import dataclasses
import pathlib
import shlex
from typing import Any

from torchpi.cli.common import split_names
from torchpi.ui.format import print_json


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
    image_size: int | None = None
    """Height and width of the images; by default the simulator's."""
    video: bool = False
    """Write the cameras as video (small, lossy) instead of PNG (exact)."""
    workers: int | None = None
    """Processes; by default as many as the CPU's cores and the memory allow."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.sim.record import record

        options = {name: value for name, value in vars(self).items() if name not in ("workers", "json")}
        command = _as_command("sim record", options)
        result = record(**options | {"tasks": split_names(self.tasks)}, workers=self.workers, command=command)
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
