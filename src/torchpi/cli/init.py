"""The init command."""

import dataclasses
import itertools
import math
import os
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
    """Write a shell script of the commands to run, from recording to robot.

    It asks for the dataset, the robot, the initial weights and the training machine. Options answer these questions in
    advance; without a terminal all four are required. It chooses the largest training configuration that fits into
    memory, as estimated by `torchpi train --plan`. Read the script before you run it.
    """

    data: str | None = None
    """LeRobot dataset with the recordings: a folder, or hf://org/name."""
    robot: str | None = None
    """Robot name (so101, aloha, …), embodiment file (JSON), or "own" to draft a file from the dataset."""
    weights: str | None = None
    """Initial weights: pi05_base, pi0_base or another published name, "demo" (small), a folder, hf://… or gs://…."""
    hardware: str | None = None
    """Training machine: "cpu", or the number of GPUs and the memory of each in GB, such as 1x24 or 8x80."""
    num_steps: int | None = None
    """Number of training steps; by default 30000, or 2000 on a CPU."""
    out: pathlib.Path = pathlib.Path("torchpi_commands.sh")
    """Output script; it must not exist yet."""

    def run(self) -> None:
        if self.out.exists():
            raise UsageError(f"{self.out} exists already; choose another file, --out.")
        missing = [f"--{name}" for name in ("data", "robot", "weights", "hardware") if getattr(self, name) is None]
        if missing and not sys.stdin.isatty():
            raise UsageError(f"init needs {', '.join(missing)}: there is no terminal to ask for them.")
        from torchpi.robots import EMBODIMENTS

        data, episodes = self._answer("data", "Dataset (a folder, or hf://org/name)", _read_dataset)
        question = f"Robot ({', '.join(EMBODIMENTS)}, a JSON file, or own)"
        robot = self._answer("robot", question, lambda text: _read_robot(text, data, self.out))
        weights = self._answer("weights", "Weights (pi05_base, pi0_base, demo, a folder or an address)", _read_weights)
        if robot == OWN:
            robot = _draft_robot(data, weights, self.out.with_name("my_robot.json"))
        gpus, memory = self._answer("hardware", "Machine (cpu, or GPUs x GB per GPU: 1x24, 8x80)", _read_hardware)
        steps = self.num_steps or (30_000 if gpus else 2000)
        print("estimating the training memory", file=sys.stderr)
        training = _largest_training(robot, weights, gpus, memory, steps)
        answers = {
            "data": data,
            "robot": robot,
            "weights": weights,
            "hardware": f"{gpus}x{memory:g}" if gpus else "cpu",
            "num_steps": steps,
        }
        lines = [
            "#!/bin/sh",
            f"# From {len(episodes)} recorded episodes of {robot} to a policy on the robot. Written by:",
        ]
        lines += [f"#   {shlex.join(['torchpi', 'init', *_options(answers)])}", "set -eu"]
        for comment, command in _commands(data, robot, weights, episodes, gpus, training):
            lines += ["", f"# {comment}", *([shlex.join(command)] if command else [])]
        replace_text(self.out, "\n".join(lines) + "\n")
        print(f"wrote {self.out}; read it, then run it step by step")

    def _answer(self, name: str, question: str, read: Callable[[str], Any]) -> Any:
        """Read an option, or ask for it until the answer is valid."""
        value = getattr(self, name)
        if value is not None:
            return read(value)
        while True:
            try:
                return read(input(f"{question}: ").strip())
            except EOFError:
                raise UsageError(f"There is no answer; give it as --{name}.") from None
            except (ValueError, KeyError, OSError) as error:
                print(f"  {error}")


def _read_dataset(data: str) -> tuple[str, list[int]]:
    """Check the dataset's metadata; returns its address and the indices of its episodes."""
    from torchpi.data.metadata import open_metadata

    metadata = open_metadata(data)
    info, episodes = metadata.info, [episode.index for episode in metadata.episodes if episode.length]
    count = counted(len(episodes), "episode")
    print(f"{data}: {count} of {info.robot_type or 'an unnamed robot'} at {info.fps:g} Hz")
    if len(episodes) < 2:
        raise UsageError(f"{data} has {count}; training needs at least two, because one is held out.")
    return data, episodes


def _read_robot(text: str, data: str, out: pathlib.Path) -> str:
    """Check that a robot fits the dataset; returns its name or file, or `OWN` if its file must be drafted first."""
    from torchpi.data import LeRobotDataset
    from torchpi.robots import get_embodiment

    if text == OWN:
        file = out.with_name("my_robot.json")
        if not file.exists():
            return OWN
        text = str(file)  # drafted before; the user may have corrected it
    LeRobotDataset(data, action_horizon=1, embodiment=get_embodiment(text), cameras=(), columns=(), prompt="")
    return text


def _draft_robot(data: str, weights: str, file: pathlib.Path) -> str:
    """Draft the robot's file from the dataset, with the action horizon of the weights."""
    from torchpi.cli.data import write_draft
    from torchpi.data.inspect import inspect_dataset
    from torchpi.training.config import TrainConfig
    from torchpi.training.plan import planned_sizes

    horizon = planned_sizes(TrainConfig().replace(init=weights)).require("action_horizon")
    write_draft(inspect_dataset(data, pictures=1), file, horizon=horizon)
    return str(file)


def _read_weights(weights: str) -> str:
    """Check that local weights exist; returns their path or address."""
    from torchpi.checkpoints.address import PUBLISHED, PUBLISHED_NAMES, REMOTE, existing_folder

    if weights in PUBLISHED_NAMES:
        return f"{PUBLISHED}{weights}"
    if not weights.startswith(REMOTE):
        existing_folder(weights)
    return weights


def _read_hardware(text: str) -> tuple[int, float]:
    """Number of GPUs and the memory of each in GB; for the CPU 0 and this machine's memory."""
    import psutil

    if text == "cpu":
        return 0, psutil.virtual_memory().total / 1e9
    match = re.fullmatch(r"([1-9]\d{0,3})x(\d+(?:\.\d+)?)", text)
    if match is None or not float(match[2]):
        raise UsageError(f"The machine is {text!r}; expected cpu, or GPUs x GB per GPU, such as 1x24 or 8x80.")
    return int(match[1]), float(match[2])


def _largest_training(robot: str, weights: str, gpus: int, memory: float, steps: int) -> dict[str, Any]:
    """Options of the first training that fits: full, sharded, LoRA, with smaller micro-batches, LoRA on fewer parts."""
    from torchpi.training.config import TrainConfig
    from torchpi.training.plan import USABLE, plan

    world_size = max(1, gpus)
    per_device = max(1, (32 if gpus else 16) // world_size)  # samples
    common: dict[str, Any] = {"num_steps": steps, "warmup_steps": min(1000, max(1, steps // 10))}
    common |= {"batch_size": world_size * per_device, "device": "cuda" if gpus else "cpu"}
    common |= {"activation_checkpointing": "full"} if gpus else {}
    lora: dict[str, Any] = {"finetune": "lora", "ema_decay": 0.0}
    small = lora | {"grad_accum_steps": per_device // math.gcd(per_device, 4)}
    sharded: list[dict[str, Any]] = [{"parallel": "fsdp"}] if gpus > 1 else []
    needed = math.inf
    for options in ({}, *sharded, lora, small, small | {"finetune": "lora_strict"}):
        config = TrainConfig().replace(init=weights, embodiment=robot, **common, **options)
        needed = min(needed, plan(config, world_size=world_size, local_world_size=world_size).needed / 1e9)
        if needed <= USABLE * memory:
            return common | options
    raise TrainingError(
        f"No training of {weights} fits: the smallest needs {needed:.1f} GB, but only {USABLE:.0%} of {memory:.1f} GB "
        "are usable. Choose a larger machine or smaller weights."
    )


def _options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _commands(
    data: str, robot: str, weights: str, episodes: list[int], gpus: int, training: dict[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """Comment and command of each step. Their output folders are new: training and conversion refuse existing ones."""
    first_test = episodes[-max(1, len(episodes) // 10)] if len(episodes) > 2 else None  # the last tenth is for testing
    train_select = {} if first_test is None else {"select": f"{episodes[0]}:{first_test}"}
    test_select = {} if first_test is None else {"select": f"{first_test}:"}
    suffixes = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    folders = ([f"{name}{suffix}" for name in ("run", "plots", "my_policy")] for suffix in suffixes)
    run, plots, my_policy = next(names for names in folders if not any(map(os.path.lexists, names)))
    policy = f"{run}/checkpoints/{training['num_steps']:08d}/policy"

    compare = ["--compare", weights] if weights.startswith("gs://openpi-assets") else []
    yield (
        "1. Inspect the dataset; problems that would stop the training are listed.",
        ["torchpi", "data", "inspect", data],
    )
    yield (
        f"2. Check units and ranges, as converted for {robot}.",
        ["torchpi", "stats", data, "--embodiment", robot, *compare],
    )

    launcher = ["torchrun", "--nproc-per-node", str(gpus), "-m", "torchpi.cli"] if gpus > 1 else ["torchpi"]
    options = {"dataset": data, **train_select, "embodiment": robot, "init": weights, **training, "out": run}
    yield (
        f"3. Train ({training.get('finetune', 'all weights')}); Ctrl-C stops, torchpi train --resume {run} continues.",
        [*launcher, "train", *_options(options)],
    )
    yield (
        "4. Compare predicted and recorded chunks on held-out episodes."
        if test_select
        else "4. Compare predicted and recorded chunks; with more episodes, some would be held out for this.",
        ["torchpi", "eval", policy, *_options({"dataset": data, **test_select, "out": plots})],
    )

    dtype = ["--dtype", "bfloat16"] if gpus else []
    yield (
        "5. Write one self-contained policy folder.",
        ["torchpi", "convert", policy, my_policy, "--to", "torchpi", *dtype],
    )
    yield "6. Serve it; for other machines, add --host 0.0.0.0 --token SECRET.", ["torchpi", "serve", my_policy]
    client = "python -m torchpi_client ws://HOST:8000 --dry-run --observation observation.npz"
    yield f"7. On the robot's computer, with torchpi-client: {client}\n# then the control loop, docs/control.md", []
