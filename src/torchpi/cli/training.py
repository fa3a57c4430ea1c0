"""The command train, and where its defaults come from."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from torchpi.errors import UsageError
from torchpi.training.config import TrainConfig


def train_command(base: TrainConfig) -> Callable[..., int | None]:
    """The command `train`, whose defaults are those of a recipe."""

    def train(
        out: pathlib.Path | None = None,
        recipe: str | None = None,
        resume: pathlib.Path | None = None,
        plan: bool = False,
        plan_world: int | None = None,
        plan_memory: float | None = None,
        json: bool = False,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = base,
    ) -> int | None:
        """Train a policy on a LeRobot dataset.

        OUT gets train.json (the recipe), metrics.jsonl, curves.png and checkpoints/STEP/policy, a policy folder with
        the averaged weights. Ctrl-C stops after the current step and saves; --resume goes on from there.

        Args:
            out: the run's folder, new or empty.
            recipe: where the defaults below come from: a packaged recipe (metaworld), or a JSON file, such as the
                train.json of another run.
            resume: the folder of a run to go on with, by default as it was; more steps, another number of processes
                and what else does not change its updates may be given.
            plan: do not train, but print the memory that it would take, and what to change where it does not fit; the
                exit status is 1 then. Of the data set only the embodiment is needed.
            plan_world: with --plan: processes that will share the run, by default those that torchrun has started.
            plan_memory: with --plan: each device's memory in GB, by default what this machine has.
            json: with --plan: print one JSON document.
            config: the fields of the recipe.
        """
        if plan:
            from torchpi.training.plan import run_plan

            return run_plan(config, world_size=plan_world, memory_gb=plan_memory, as_json=json)
        if plan_world is not None or plan_memory is not None or json:
            raise UsageError("--plan-world, --plan-memory and --json belong to --plan.")
        from torchpi.training.loop import train

        if resume is not None and (out is not None or recipe is not None):
            raise UsageError("--resume goes on with a run, its recipe and its folder; leave --out and --recipe out.")
        out = out or resume
        needed = {"out": out} | ({} if config.mixture else {"dataset": config.dataset, "embodiment": config.embodiment})
        for name, value in needed.items():
            if not value:
                raise UsageError(
                    f"train needs --{name}, or --resume with the folder of a run; see torchpi train --help."
                )
        assert out is not None
        result = train(config, out, resume=resume is not None)
        if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
            return 0
        if result.interrupted:
            print(f"interrupted after {result.step} steps; go on with: torchpi train --resume {out}")
        print(f"policy: {result.policy}\nreport: {result.report}")
        return None

    return train


def recipe_of(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    """What --recipe or --resume name, which decides the defaults of the other options."""
    for option, read in (("--recipe", TrainConfig.from_json), ("--resume", _resumed)):
        for i, argument in enumerate(args):
            if argument == option and i + 1 < len(args):
                return read(args[i + 1])
            if argument.startswith(f"{option}="):
                return read(argument.removeprefix(f"{option}="))
    return default


def _resumed(run: str) -> TrainConfig:
    from torchpi.training.resume import resume_config

    return resume_config(pathlib.Path(run))
