"""The command init."""

import dataclasses
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torchpi.atomic import replace_text
from torchpi.errors import TrainingError, UsageError, counted

OWN = "own"


@dataclasses.dataclass(frozen=True)
class Init:
    """Write the commands from recordings to a robot that acts: a script to read, to correct and to run.

    Four questions are asked: the recordings, the robot, the weights to begin with, and the machine. Options answer them
    in advance; without a terminal all four are needed. The training is the largest one whose memory is enough, as
    `torchpi train --plan` estimates it.
    """

    data: str | None = None
    """The recordings, a LeRobot dataset: a folder, or hf://org/name."""
    robot: str | None = None
    """A robot by name (so101, aloha, …), its JSON file, or "own": a file is drafted from the recordings."""
    weights: str | None = None
    """pi05_base, pi0_base or another published name, "demo" (small), a folder, hf://… or gs://…."""
    hardware: str | None = None
    """The machine that trains: "cpu", or the GPUs and the memory of each in GB: 1x24, 8x80."""
    num_steps: int | None = None
    """Updates of the training; by default 30000, on a CPU 2000."""
    out: pathlib.Path = pathlib.Path("torchpi_commands.sh")
    """The script; it must not exist."""

    def run(self) -> None:
        if self.out.exists():
            raise UsageError(f"{self.out} exists already; choose another file, --out.")
        missing = [f"--{name}" for name in ("data", "robot", "weights", "hardware") if getattr(self, name) is None]
        if missing and not sys.stdin.isatty():
            raise UsageError(f"init needs {', '.join(missing)}: without a terminal nobody can be asked.")
        from torchpi.robots import EMBODIMENTS

        data, episodes = self._answer("data", "Recordings (a folder, or hf://org/name)", _recordings)
        names = f"Robot ({', '.join(EMBODIMENTS)}, a JSON file, or own)"
        robot = self._answer("robot", names, lambda text: _robot(text, data, self.out))
        weights = self._answer("weights", "Weights (pi05_base, pi0_base, demo, a folder or an address)", _address)
        if robot == OWN:
            robot = _drafted(data, weights, self.out.with_name("my_robot.json"))
        gpus, memory = self._answer("hardware", "Machine (cpu, or GPUs x GB of each: 1x24, 8x80)", _hardware)
        steps = self.num_steps or (30_000 if gpus else 2000)
        print("estimating the memory of the training", file=sys.stderr)
        training = _largest_training(robot, weights, gpus, memory, steps)
        answers = {
            "data": data,
            "robot": robot,
            "weights": weights,
            "hardware": f"{gpus}x{memory:g}" if gpus else "cpu",
            "num_steps": steps,
        }
        lines = ["#!/bin/sh", f"# {len(episodes)} recorded episodes of {robot}, to a robot that acts. Written by:"]
        lines += [f"#   {shlex.join(['torchpi', 'init', *_options(answers)])}", "set -eu"]
        for text, command in _commands(data, robot, weights, episodes, gpus, training):
            lines += ["", f"# {text}", shlex.join(command)] if command else ["", f"# {text}"]
        replace_text(self.out, "\n".join(lines) + "\n")
        print(f"wrote {self.out}; read it, then run it step by step")

    def _answer(self, name: str, question: str, read: Callable[[str], Any]) -> Any:
        """The option as a function reads it, or what is typed; after an error it is asked again."""
        if (given := getattr(self, name)) is not None:
            return read(given)
        while True:
            try:
                return read(input(f"{question}: ").strip())
            except EOFError:
                raise UsageError(f"There is no answer; give it as --{name}.") from None
            except (ValueError, KeyError, OSError) as error:
                print(f"  {error}")


def _recordings(data: str) -> tuple[str, list[int]]:
    from torchpi.data.metadata import open_metadata

    metadata = open_metadata(data)
    info, episodes = metadata.info, [episode.index for episode in metadata.episodes if episode.length]
    count = counted(len(episodes), "episode")
    print(f"{data}: {count} of {info.robot_type or 'a robot without a name'} at {info.fps:g} Hz")
    if len(episodes) < 2:
        raise UsageError(f"{data} has {count}; a training needs two at least, one is held out.")
    return data, episodes


def _robot(text: str, data: str, out: pathlib.Path) -> str:
    """The name or file of the robot, which fits the recordings; `OWN` where that file is to be drafted."""
    from torchpi.data import LeRobotDataset
    from torchpi.robots import get_embodiment

    if text == OWN:
        file = out.with_name("my_robot.json")
        if not file.exists():
            return OWN
        text = str(file)  # it may have been corrected
    LeRobotDataset(data, action_horizon=1, embodiment=get_embodiment(text), cameras=(), columns=(), prompt="")
    return text


def _drafted(data: str, weights: str, file: pathlib.Path) -> str:
    """The robot's file, drafted from the recordings, for weights with chunks of that length."""
    from torchpi.cli.data import write_draft
    from torchpi.data.inspect import inspect_dataset
    from torchpi.training.config import TrainConfig
    from torchpi.training.plan import planned_sizes

    horizon = planned_sizes(TrainConfig().replace(init=weights)).require("action_horizon")
    write_draft(inspect_dataset(data, pictures=1), file, horizon=horizon)
    return str(file)


def _address(weights: str) -> str:
    from torchpi.checkpoints.address import PUBLISHED, PUBLISHED_NAMES, REMOTE, existing_folder

    if weights in PUBLISHED_NAMES:
        return f"{PUBLISHED}{weights}"
    if not weights.startswith(REMOTE):
        existing_folder(weights)
    return weights


def _hardware(text: str) -> tuple[int, float]:
    """Number of GPUs (0: the CPU) and the memory in GB of each, or of this machine."""
    import psutil

    if text == "cpu":
        return 0, psutil.virtual_memory().total / 1e9
    if (found := re.fullmatch(r"([1-9]\d{0,3})x(\d+(?:\.\d+)?)", text)) is None or not float(found[2]):
        raise UsageError(f"The machine is {text!r}; expected cpu, or GPUs x GB of each, such as 1x24 or 8x80.")
    return int(found[1]), float(found[2])


def _largest_training(robot: str, weights: str, gpus: int, memory: float, steps: int) -> dict[str, Any]:
    """The options of the first of these trainings that fits: all weights, LoRA, and with smaller micro-batches."""
    from torchpi.training.config import TrainConfig
    from torchpi.training.plan import USABLE, plan

    world, each = max(1, gpus), max(1, (32 if gpus else 16) // max(1, gpus))  # samples of a process
    common: dict[str, Any] = {"num_steps": steps, "warmup_steps": min(1000, max(1, steps // 10))}
    common |= {"batch_size": world * each, "device": "cuda" if gpus else "cpu"}
    common |= {"activation_checkpointing": "full"} if gpus else {}
    lora: dict[str, Any] = {"finetune": "lora", "ema_decay": 0.0}
    small = lora | {"grad_accum_steps": each // math.gcd(each, 4)}
    sharded: list[dict[str, Any]] = [{"parallel": "fsdp"}] if gpus > 1 else []
    needed = math.inf
    for options in ({}, *sharded, lora, small, small | {"finetune": "lora_strict"}):
        config = TrainConfig().replace(init=weights, embodiment=robot, **common, **options)
        needed = min(needed, plan(config, world_size=world, local_world_size=world).needed / 1e9)
        if needed <= USABLE * memory:
            return common | options
    raise TrainingError(
        f"No training of {weights} fits: the smallest needs {needed:.1f} GB, of {memory:.1f} GB {USABLE:.0%} can be "
        "planned with. Choose a larger machine or smaller weights."
    )


def _options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _commands(
    data: str, robot: str, weights: str, episodes: list[int], gpus: int, training: dict[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """A comment and a command of each step."""
    cut = episodes[-max(1, len(episodes) // 10)] if len(episodes) > 2 else None
    train, test = ({}, {}) if cut is None else ({"select": f"{episodes[0]}:{cut}"}, {"select": f"{cut}:"})
    policy = f"run/checkpoints/{training['num_steps']:08d}/policy"
    released = ["--compare", weights] if weights.startswith("gs://openpi-assets") else []
    start = ["torchrun", "--nproc-per-node", str(gpus), "-m", "torchpi.cli"] if gpus > 1 else ["torchpi"]
    yield "1. Look at the recordings; what training would refuse is listed.", ["torchpi", "data", "inspect", data]
    yield (
        f"2. Ranges in the terms of {robot}: are units and limits right?",
        ["torchpi", "stats", data, "--embodiment", robot, *released],
    )
    yield (
        f"3. Train {training.get('finetune', 'all weights')}; Ctrl-C stops, torchpi train --resume run goes on.",
        [
            *start,
            "train",
            *_options({"dataset": data, **train, "embodiment": robot, "init": weights, **training, "out": "run"}),
        ],
    )
    yield (
        "4. Compare predicted chunks with those of episodes that were not trained on."
        if test
        else "4. Compare predicted chunks with recorded ones; with more episodes, some would be kept for this.",
        ["torchpi", "eval", policy, *_options({"dataset": data, **test, "out": "plots"})],
    )
    half = ["--dtype", "bfloat16"] if gpus else []
    yield "5. One folder with everything.", ["torchpi", "convert", policy, "my_policy", "--to", "torchpi", *half]
    yield "6. Serve it; to a network with --host 0.0.0.0 --token SECRET.", ["torchpi", "serve", "my_policy"]
    client = "python -m torchpi_client ws://HOST:8000 --dry-run --observation observation.npz"
    yield f"7. On the robot's computer, torchpi-client: first {client}\n# then the control loop, docs/control.md", []
