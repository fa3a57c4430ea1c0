"""The commands of datasets: `torchpi data …` and `torchpi sim record`."""

import dataclasses
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from torchpi.atomic import replace_text
from torchpi.cli.common import split_names
from torchpi.errors import UsageError, counted
from torchpi.ui.format import print_json
from torchpi.ui.tables import PlainConsole

if TYPE_CHECKING:
    from torchpi.data.inspect import Inspection
    from torchpi.data.rewrite import Edited, Progress

_ADDRESS = tyro.conf.arg(help="LeRobot dataset, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision].")
Dataset = Annotated[str, tyro.conf.Positional, _ADDRESS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Look:
    dataset: Dataset
    rename: tuple[str, ...] = ()
    """LeRobot's names for columns and cameras that the dataset calls otherwise, OLD=NEW; see `torchpi stats --help`."""

    def inspect(self, pictures: int) -> "Inspection":
        from torchpi.data.inspect import inspect_dataset
        from torchpi.data.rename import parse_rename

        with PlainConsole(stderr=True).status(f"reading {self.dataset}"):
            return inspect_dataset(self.dataset, rename=parse_rename(self.rename), pictures=pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataInspect(_Look):
    """Look at a dataset before it is described: cameras, rates, lengths, tasks, ranges with guessed units, jumps, idle
    and repeated frames, and everything for which training would refuse it, each with how to go on.

    Nothing is changed. A page with pictures and plots is written with --html.
    """

    html: pathlib.Path | None = None
    """The file for a page that needs nothing else."""
    json: bool = False
    """Print one JSON document."""

    def run(self) -> None:
        from torchpi.inspect.dataset import print_inspection, render_dataset_page

        found = self.inspect(pictures=4)
        if self.html is not None:
            replace_text(self.html, render_dataset_page(found))
            print(f"wrote {self.html}", file=sys.stderr)
        if self.json:
            print_json(found.to_dict())
        else:
            print_inspection(found, PlainConsole())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDraft(_Look):
    """Write the description of a dataset's robot, to be corrected: the file for --embodiment.

    Names, rate and cameras are the dataset's, units and commands guessed; what is uncertain is a comment that begins
    with QUESTION. Comments are not read.
    """

    out: pathlib.Path
    """The file, for example my_arm.json; it must not exist."""

    def run(self) -> None:
        if self.out.exists():
            raise UsageError(f"{self.out} exists already; choose another file, because it may have been corrected.")
        write_draft(self.inspect(pictures=1), self.out)


def write_draft(found: "Inspection", file: pathlib.Path, **weights: int) -> None:
    """Write `draft_embodiment`, which takes the weights' horizon, and print its questions."""
    from torchpi.data.draft import draft_embodiment, questions_of, to_text

    document = draft_embodiment(found, file.stem, **weights)
    replace_text(file, to_text(document))
    print(f"wrote {file}; correct it before you train")
    for question in questions_of(document):
        print(f"question: {question}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edit:
    out: pathlib.Path
    """The new dataset's folder, which must not exist."""
    json: bool = False
    """Print one JSON document."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        raise NotImplementedError

    def run(self) -> None:
        with PlainConsole(stderr=True).status("opening") as status:  # shown on a terminal only
            results = self.edit(lambda done, total: status.update(f"{done} of {total} episodes"))
        if self.json:
            print_json([dataclasses.asdict(result) for result in results])
            return
        for result in results:
            videos = f"; videos: {result.videos_copied} copied, {result.videos_encoded} encoded anew"
            has_videos = result.videos_copied + result.videos_encoded > 0
            counts = f"{counted(result.episodes, 'episode')}, {counted(result.frames, 'frame')}"
            print(f"{result.path}: {counts}{videos if has_videos else ''}")
            for note in result.notes:
                print(f"left out: {note}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMerge(_Edit):
    """Write the episodes of several datasets into a new one, one set after the other.

    The sets must have the same features, names of dimensions and rate; the error names what differs. They may have any
    format that is read, the new one has v3.0; so a single set is converted. Videos are copied, and encoded anew only
    where an episode does not begin with a keyframe.
    """

    datasets: Annotated[tuple[str, ...], tyro.conf.Positional, _ADDRESS]
    robot_type: str | None = None
    """The robot_type of the new dataset, where the sets state different ones."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import merge_datasets

        return [merge_datasets(self.datasets, self.out, robot_type=self.robot_type, progress=progress)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSplit(_Edit):
    """Write parts of a dataset into new ones, OUT/NAME, for example to train and to evaluate with."""

    dataset: Dataset
    parts: tuple[str, ...]
    """NAME=EPISODES as often as needed: train=0:40 val=40:, drawers="task:open the *", or fractions that follow each
    other from the first episode on, train=0.8 val=0.2. Episodes in no part are left out."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import split_dataset

        parts = dict(part.partition("=")[::2] for part in self.parts)
        if len(parts) < len(self.parts) or not all(parts.values()):
            raise UsageError(f"The parts are {' '.join(self.parts)}; expected NAME=EPISODES, each name once.")
        return split_dataset(self.dataset, self.out, parts, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDelete(_Edit):
    """Write a dataset without some episodes; the others are numbered anew, and the old dataset stays as it is."""

    dataset: Dataset
    select: str
    """The episodes to leave out, for example "3,57,100:" or "task:open the *"."""
    aliases: ClassVar = {"--episodes": "--select"}

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import delete_episodes

        return [delete_episodes(self.dataset, self.out, self.select, progress=progress)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataResample(_Edit):
    """Write a dataset at a lower rate: of each time of the new rate the nearest frame.

    Positions and efforts are those of these frames; increments are summed, and velocities averaged, up to the next one.
    Videos are encoded anew.
    """

    dataset: Dataset
    fps: float
    """The new rate in frames per second."""
    command: Literal["position", "velocity", "increment", "effort"] | None = None
    """The command of all dimensions: what the robot does with an action."""
    embodiment: str | None = None
    """The robot, a name or a JSON file, whose actions state it for each dimension."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import resample_dataset
        from torchpi.robots import get_embodiment

        if (self.command is None) == (self.embodiment is None):
            raise UsageError(
                "Resampling needs to know what the robot does with an action, because increments are summed over the "
                "frames that are left out: give --command, or --embodiment of a robot that states it, and not both."
            )
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        commands = self.command or get_embodiment(self.embodiment)
        return [resample_dataset(self.dataset, self.out, fps, commands=commands, progress=progress)]


@dataclasses.dataclass(frozen=True)
class SimRecord:
    """Record a simulator's scripted experts as a LeRobot dataset.

    A part of the episodes is disturbed, and shows how to recover from states that the expert alone would not reach.
    Ctrl-C keeps the episodes that are complete. The seed decides the dataset; the number of workers changes nothing.
    """

    out: pathlib.Path
    """The dataset's folder: new or empty; or that of an interrupted recording, which goes on."""
    episodes: int
    """Episodes per task."""
    tasks: str | None = None
    """Tasks by name, separated by commas, for example drawer-open,door-open, with so101 lift,place, with robosuite
    lift,stack, with libero 0,1; by default all that have an expert."""
    env: str = "metaworld"
    """The simulator: metaworld, so101, robosuite or libero, which have experts."""
    suite: str | None = None
    """Of libero: spatial, object or goal."""
    render_every: int = 1
    """Render each n-th frame, and repeat its images in between, which a column says: training begins at new ones alone.
    For libero and robosuite, whose rendering takes most of the time."""
    seed: int = 0
    """Seed of the whole recording; no seed has episodes that `eval` runs."""
    noise: float = 0.4
    """Standard deviation of the disturbance of the executed actions; 1 is the largest action of metaworld, 4° of each
    joint of so101, and 0.4 of the largest movement of libero's and robosuite's hand."""
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
        from torchpi.sim import environment_name, simulator
        from torchpi.sim.record import record

        options = {name: value for name, value in vars(self).items() if name not in ("workers", "json")}
        command, env = _as_command("sim record", options), environment_name(self.env, options.pop("suite"))
        known = simulator(env)
        tasks = (known.expert_tasks or known.instructions) if self.tasks is None else split_names(self.tasks)
        result = record(**options | {"env": env, "tasks": tasks}, workers=self.workers, command=command)
        if self.json:
            print_json(dataclasses.asdict(result))
            return
        failures = sum(result.failures.values())
        print(
            f"{counted(result.episodes, 'episode')}, {counted(result.frames, 'frame')} in {result.seconds:.0f} s, "
            f"written to {result.path}; {failures} in which the expert failed were left out"
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
