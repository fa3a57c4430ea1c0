"""Commands about data sets: stats, sim record."""

import dataclasses
import pathlib
import shlex
from typing import Annotated, Any

import tyro

from torchpi.cli.common import print_json, split_names


def stats(
    dataset: Annotated[str, tyro.conf.Positional],
    embodiment: str,
    out: pathlib.Path | None = None,
    action_horizon: int = 50,
    episodes: str | None = None,
    rename: tuple[str, ...] = (),
    compare: str | None = None,
    json: bool = False,
) -> None:
    """Show the statistics of a data set, and write those that a policy normalizes with.

    They are exact, from all frames, in the model's terms: units converted, actions relative to the state where the
    embodiment says so. Dimensions that hardly move are named, because normalization makes rare values huge there, and
    idle frames are counted. Images are not read.

    Args:
        dataset: a LeRobot data set, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision].
        embodiment: the robot: metaworld, aloha, … or a JSON file.
        out: where openpi's norm_stats.json goes, a file or an existing folder; by default nothing is written.
        action_horizon: actions in a chunk.
        episodes: only these, for example "0:40,57,100:" or "task:open the *"; both: "0:40; task:open the *".
        rename: LeRobot's names where the set has others, OLD=NEW: state=observation.state actions=action. Columns that
            have to be joined: joint_position+gripper_position=observation.state.
        compare: a checkpoint: shows for each of its robots which share of the data is inside of its q01 to q99.
        json: print one JSON document.
    """
    from torchpi.data.rename import parse_rename
    from torchpi.data.stats_report import run_stats

    run_stats(
        dataset,
        embodiment=embodiment,
        out=out,
        action_horizon=action_horizon,
        episodes=episodes,
        rename=parse_rename(rename),
        compare=compare,
        as_json=json,
    )


def sim_record(
    out: pathlib.Path,
    tasks: str,
    episodes: int,
    env: str = "metaworld",
    seed: int = 0,
    noise: float = 0.4,
    noisy_fraction: float = 0.5,
    push_rate: float = 0.02,
    video: bool = False,
    image_size: int | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Record a simulator's scripted experts as a LeRobot data set.

    A part of the episodes is disturbed, and shows how to come back from where the expert alone would not go. Ctrl-C
    keeps the episodes that are complete. The seed decides the data set; the number of workers changes nothing.

    Args:
        out: the data set's folder, new or empty.
        tasks: by name, separated by commas, for example drawer-open,door-open.
        episodes: per task.
        env: the simulator; metaworld has experts.
        seed: of the whole recording; no seed has episodes that `eval` runs.
        noise: standard deviation of the disturbance of the executed actions, which are from -1 to 1.
        noisy_fraction: the part of each task's episodes that is disturbed.
        push_rate: how probable it is at each step of these that the arm is pushed somewhere else, for 5 to 20 steps:
            shows how to begin again after a miss.
        video: write the cameras as video (small, lossy) instead of PNG (exact).
        image_size: height and width of the images; by default the simulator's.
        workers: processes; by default as many as the CPU's cores and the memory allow.
        json: print one JSON document.
    """
    from torchpi.sim.record import record

    options: dict[str, Any] = {
        "seed": seed,
        "noise": noise,
        "noisy_fraction": noisy_fraction,
        "push_rate": push_rate,
        "image_size": image_size,
        "video": video,
    }
    command = _as_command("sim record", {"env": env, "tasks": tasks, "episodes": episodes, "out": out, **options})
    result = record(env, split_names(tasks), episodes, out, workers=workers, command=command, **options)
    if json:
        print_json(dataclasses.asdict(result))
    else:
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
