"""The train command, and the recipe that supplies its defaults."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import tyro

from torchpi.config import LoraConfig
from torchpi.errors import TrainingError, UsageError, counted
from torchpi.training.config import RENAMED, RENAMED_VALUES, Augmentation, TrainConfig


def _renamed() -> dict[str, str]:
    """Map former options to the present ones, with the values that were renamed too."""
    renamed = {}
    for old, new in RENAMED.items():
        values = "".join(f", and {old_value} is {value}" for old_value, value in RENAMED_VALUES.get(new, {}).items())
        renamed[old] = new + values
    for group, config in (("augmentation", Augmentation), ("lora", LoraConfig)):
        renamed |= {f"{group}.{field.name}": field.name for field in dataclasses.fields(config)}
    return {f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in renamed.items()}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a policy on a LeRobot dataset.

    The run folder OUT receives train.json (the recipe), metrics.jsonl, curves.png and checkpoints/STEP/policy, a policy
    folder with the EMA weights. Ctrl-C stops after the current step and saves a checkpoint; --resume continues the run.
    """

    out: pathlib.Path | None = None
    """Run folder, new or empty."""
    recipe: str | None = None
    """Recipe that sets the defaults below: metaworld, so101, libero, or a JSON file, such as a run's train.json."""
    resume: pathlib.Path | None = None
    """Run folder to continue, with its own recipe.
    Options that do not change the updates may differ, such as more steps or another number of processes."""
    plan: bool = False
    """Estimate the run's peak memory instead of training. If it does not fit, suggest changes and exit with status 1.
    The plan needs only the embodiment, not the dataset."""
    plan_world: int | None = None
    """With --plan: number of training processes; by default those that torchrun started."""
    plan_memory: float | None = None
    """With --plan: memory per device in GB; by default this machine's."""
    json: bool = False
    """With --plan: print one JSON document."""
    config: Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = TrainConfig()
    renamed: ClassVar[Mapping[str, str]] = _renamed()
    aliases: ClassVar = {"--episodes": "--select"}

    def run(self) -> int | None:
        config = self.config
        if self.plan:
            from torchpi.training.plan import run_plan

            return run_plan(config, world_size=self.plan_world, memory_gb=self.plan_memory, as_json=self.json)
        if self.plan_world is not None or self.plan_memory is not None or self.json:
            raise UsageError("--plan-world, --plan-memory and --json belong to --plan.")
        import torch

        from torchpi.training.loop import train

        if self.resume is not None and (self.out is not None or self.recipe is not None):
            raise UsageError("--resume continues a run with its own recipe and folder; omit --out and --recipe.")
        out = self.out or self.resume
        required: dict[str, Any] = {"out": out}
        if not config.data.mixture:
            required |= {"dataset": config.data.dataset, "embodiment": config.data.embodiment}
        for name, value in required.items():
            if not value:
                raise UsageError(f"train needs --{name}, or --resume with a run folder; see torchpi train --help.")
        assert out is not None
        try:
            result = train(config, out, resume=self.resume is not None)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"The device ran out of memory: {str(error).splitlines()[0]} Run torchpi train --plan with the same "
                "options to see what uses the memory, and which options reduce it."
            ) from error
        if os.environ.get("RANK", "0") != "0":  # only the main process prints
            return 0
        if result.interrupted:
            print(f"interrupted after {counted(result.step, 'step')}; continue with: torchpi train --resume {out}")
        print(f"policy: {result.policy}\nreport: {result.report}")
        return None


def recipe_of(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    """Read the recipe that --recipe or --resume names; it supplies the defaults of the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--recipe", "--resume"):
        parser.add_argument(option, nargs="?")
    named, _ = parser.parse_known_args(args)
    if named.recipe:
        return TrainConfig.from_json(named.recipe)
    if named.resume:
        from torchpi.training.run_folder import resume_config

        return resume_config(pathlib.Path(named.resume))
    return default
