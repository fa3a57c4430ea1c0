"""The dataset commands: `torchpi data …` and `torchpi sim record`."""

import dataclasses
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from torchpi.atomic import replace_text
from torchpi.cli.common import Json, split_names
from torchpi.errors import UsageError, counted
from torchpi.ui.format import print_json
from torchpi.ui.tables import PlainConsole

if TYPE_CHECKING:
    from torchpi.data.inspect import Inspection
    from torchpi.data.rewrite import Edited, Progress

_ADDRESS = tyro.conf.arg(help="LeRobot dataset, format v3.0, v2.1 or v2.0: a folder, or hf://org/name[@revision].")
Dataset = Annotated[str, tyro.conf.Positional, _ADDRESS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InspectCommand:
    dataset: Dataset
    rename: tuple[str, ...] = ()
    """Rename the dataset's columns and cameras to LeRobot's names, as OLD=NEW; see `torchpi stats --help`."""

    def inspect(self, pictures: int) -> "Inspection":
        from torchpi.data.inspect import inspect_dataset
        from torchpi.data.rename import parse_rename

        with PlainConsole(stderr=True).status(f"reading {self.dataset}"):
            return inspect_dataset(self.dataset, rename=parse_rename(self.rename), pictures=pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataInspect(_InspectCommand):
    """Inspect a dataset before describing its robot, and list problems that would stop training.

    It reports cameras, rates, episode lengths, tasks, ranges with guessed units, jumps, and idle and repeated frames.
    Each problem comes with advice. The dataset is not changed. --html writes a page with images and plots.
    """

    html: pathlib.Path | None = None
    """Output file for a self-contained HTML page."""
    json: Json = False

    def run(self) -> None:
        from torchpi.inspect.dataset import print_inspection, render_dataset_page

        inspection = self.inspect(pictures=4)
        if self.html is not None:
            replace_text(self.html, render_dataset_page(inspection))
            print(f"wrote {self.html}", file=sys.stderr)
        if self.json:
            print_json(inspection.to_dict())
        else:
            print_inspection(inspection, PlainConsole())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDraft(_InspectCommand):
    """Draft an embodiment file for a dataset's robot, to be corrected by you and given as --embodiment.

    Names, rate and cameras come from the dataset. Units and commands are suggested where the data indicate them; else a
    unit is empty and a command null. Each uncertain entry has a comment that starts with QUESTION. Comments are ignored
    when the file is read.
    """

    out: pathlib.Path
    """Output file, such as my_arm.json; it must not exist yet."""

    def run(self) -> None:
        if self.out.exists():
            raise UsageError(f"{self.out} exists already and may contain corrections; choose another file.")
        write_draft(self.inspect(pictures=1), self.out)


def write_draft(inspection: "Inspection", file: pathlib.Path, *, horizon: int = 50) -> None:
    """Write a drafted embodiment file for weights with this action horizon, and print its open questions."""
    from torchpi.data.draft import draft_embodiment, questions_of, to_text

    document = draft_embodiment(inspection, file.stem, horizon=horizon)
    replace_text(file, to_text(document))
    print(f"wrote {file}; correct it before you train")
    for question in questions_of(document):
        print(f"question: {question}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EditCommand:
    out: pathlib.Path
    """Folder of the new dataset; it must not exist yet."""
    json: Json = False

    def edit(self, progress: "Progress") -> "list[Edited]":
        raise NotImplementedError

    def run(self) -> None:
        with PlainConsole(stderr=True).status("opening") as status:  # shown on a terminal only
            results = self.edit(lambda done, total: status.update(f"{done} of {total} episodes"))
        if self.json:
            print_json([dataclasses.asdict(result) for result in results])
            return
        for result in results:
            counts = f"{counted(result.episodes, 'episode')}, {counted(result.frames, 'frame')}"
            if result.videos_copied + result.videos_encoded > 0:
                counts += f"; videos: {result.videos_copied} copied, {result.videos_encoded} re-encoded"
            print(f"{result.path}: {counts}")
            for note in result.notes:
                print(f"left out: {note}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMerge(_EditCommand):
    """Merge several datasets into a new one, in the given order.

    The datasets must have the same features, dimension names and rate; otherwise an error names the difference. They
    may have any supported format. The new one has format v3.0, so a single dataset is converted. Videos are copied, and
    re-encoded only where an episode does not start with a keyframe.
    """

    datasets: Annotated[tuple[str, ...], tyro.conf.Positional, _ADDRESS]
    robot_type: str | None = None
    """robot_type of the new dataset, if the datasets state different ones."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import merge_datasets

        return [merge_datasets(self.datasets, self.out, robot_type=self.robot_type, progress=progress)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSplit(_EditCommand):
    """Split a dataset into new ones, OUT/NAME, for example for training and evaluation."""

    dataset: Dataset
    parts: tuple[str, ...]
    """Parts as NAME=EPISODES: train=0:40 val=40:, drawers="task:open the *", or fractions: train=0.8 val=0.2.
    Fractions are consecutive. Episodes in no part are left out."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import split_dataset

        parts = dict(part.partition("=")[::2] for part in self.parts)
        if len(parts) < len(self.parts) or not all(parts.values()):
            raise UsageError(f"The parts are {' '.join(self.parts)}; expected NAME=EPISODES, each name once.")
        return split_dataset(self.dataset, self.out, parts, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDelete(_EditCommand):
    """Write a copy of a dataset without some episodes. The others are renumbered; the original is not changed."""

    dataset: Dataset
    select: str
    """Episodes to leave out, such as "3,57,100:" or "task:open the *"."""
    aliases: ClassVar = {"--episodes": "--select"}

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import delete_episodes

        return [delete_episodes(self.dataset, self.out, self.select, progress=progress)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataResample(_EditCommand):
    """Write a copy of a dataset at a lower rate, keeping the frame nearest to each new time step.

    Positions and efforts are taken from the kept frames. Between two kept frames, increments are summed and velocities
    averaged. Videos are re-encoded.
    """

    dataset: Dataset
    fps: float
    """New rate in frames per second."""
    command: Literal["position", "velocity", "increment", "effort"] | None = None
    """Command type of all action dimensions."""
    embodiment: str | None = None
    """Robot whose description states the command type of each action dimension: a name or a JSON file."""

    def edit(self, progress: "Progress") -> "list[Edited]":
        from torchpi.data.edit import resample_dataset
        from torchpi.robots import get_embodiment

        if (self.command is None) == (self.embodiment is None):
            raise UsageError(
                "Resampling needs the command type of the actions, because increments are summed over dropped frames. "
                "Give either --command, or --embodiment of a robot that states it."
            )
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        commands = self.command or get_embodiment(self.embodiment)
        return [resample_dataset(self.dataset, self.out, fps, commands=commands, progress=progress)]


@dataclasses.dataclass(frozen=True)
class SimRecord:
    """Record a simulator's scripted experts as a LeRobot dataset.

    Some episodes have noisy actions and show how to recover from states that the undisturbed expert would not reach.
    Ctrl-C stops and keeps the complete episodes. The dataset depends on the seed, not on the number of workers.
    """

    out: pathlib.Path
    """Dataset folder: new or empty, or that of an interrupted recording to continue."""
    episodes: int
    """Number of episodes per task."""
    tasks: str | None = None
    """Task names, such as drawer-open,door-open, or 0,1 for libero; by default all tasks that have an expert."""
    env: str = "metaworld"
    """Simulator with scripted experts: metaworld, so101, robosuite or libero."""
    suite: str | None = None
    """Task suite of libero: spatial, object or goal."""
    render_every: int = 1
    """Render every n-th frame and repeat its images in between; saves time in libero and robosuite.
    A column marks the rendered frames; training starts only at these."""
    seed: int = 0
    """Random seed for the whole recording. Whatever the seed, no episode coincides with one of `eval`."""
    noise: float = 0.4
    """Standard deviation of the noise added to executed actions.
    1 is the largest action in metaworld, 4° per joint in so101, 0.4 of the largest hand movement in the others."""
    noisy_fraction: float = 0.5
    """Fraction of each task's episodes that get noise."""
    push_rate: float = 0.02
    """Probability per step of a noisy episode that the arm is pushed away for 5 to 20 steps, to show a recovery."""
    image_size: int | None = None
    """Height and width of the images in pixels; by default the simulator's."""
    video: bool = False
    """Write camera images as video (small, lossy) instead of PNG (lossless)."""
    workers: int | None = None
    """Number of simulator processes; by default limited by CPU cores and memory."""
    json: Json = False

    def run(self) -> None:
        from torchpi.sim import environment_name, simulator
        from torchpi.sim.record import record

        options = {name: value for name, value in vars(self).items() if name not in ("workers", "json")}
        command, env = _command_line("sim record", options), environment_name(self.env, options.pop("suite"))
        sim = simulator(env)
        tasks = (sim.expert_tasks or sim.instructions) if self.tasks is None else split_names(self.tasks)
        result = record(**options | {"env": env, "tasks": tasks}, workers=self.workers, command=command)
        if self.json:
            print_json(dataclasses.asdict(result))
            return
        failures = sum(result.failures.values())
        print(
            f"{counted(result.episodes, 'episode')}, {counted(result.frames, 'frame')} in {result.seconds:.0f} s, "
            f"written to {result.path}; left out {counted(failures, 'episode')} in which the expert failed"
        )


def _command_line(command: str, options: dict[str, Any]) -> str:
    """Command line with these options, except those that are None."""
    words = ["torchpi", *command.split()]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
