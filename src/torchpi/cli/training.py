"""The command train, and the recipe that its defaults come from."""

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
    """The options that replace former ones, with the values that have other names."""
    found = {}
    for old, new in RENAMED.items():
        values = "".join(f", and {before} is {now}" for before, now in RENAMED_VALUES.get(new, {}).items())
        found[f"--{old}".replace("_", "-")] = f"--{new}{values}".replace("_", "-")
    nested = {"augmentation": Augmentation, "lora": LoraConfig}
    names = [(group, field.name) for group, kind in nested.items() for field in dataclasses.fields(kind)]
    return found | {f"--{group}.{name}".replace("_", "-"): f"--{name}".replace("_", "-") for group, name in names}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a policy on a LeRobot dataset.

    OUT gets train.json (the recipe), metrics.jsonl, curves.png and checkpoints/STEP/policy, a policy folder with the
    EMA weights. Ctrl-C stops after the current step and saves; --resume continues from there.
    """

    out: pathlib.Path | None = None
    """The run's folder, new or empty."""
    recipe: str | None = None
    """Source of the defaults below: a packaged recipe (metaworld, so101, libero), or a JSON file, such as train.json of
    another run."""
    resume: pathlib.Path | None = None
    """The folder of a run to continue, by default with its own recipe; more steps, another number of processes and
    other options that do not change its updates may be given."""
    plan: bool = False
    """Print the estimated peak memory of the run in place of training, and what to change where it does not fit; the
    exit status is 1 then. Of the dataset only the embodiment is needed."""
    plan_world: int | None = None
    """With --plan: processes that will share the run, by default those that torchrun has started."""
    plan_memory: float | None = None
    """With --plan: each device's memory in GB, by default this machine's."""
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
            raise UsageError("--resume continues a run with its recipe and its folder; leave --out and --recipe out.")
        out = self.out or self.resume
        needed: dict[str, Any] = {"out": out}
        if not config.data.mixture:
            needed |= {"dataset": config.data.dataset, "embodiment": config.data.embodiment}
        for name, value in needed.items():
            if not value:
                raise UsageError(
                    f"train needs --{name}, or --resume with the folder of a run; see torchpi train --help."
                )
        assert out is not None
        try:
            result = train(config, out, resume=self.resume is not None)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"The device has not enough memory: {str(error).splitlines()[0]} torchpi train --plan, with the same "
                "options, shows what takes it and which options take less."
            ) from error
        if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
            return 0
        if result.interrupted:
            print(f"interrupted after {counted(result.step, 'step')}; continue with: torchpi train --resume {out}")
        print(f"policy: {result.policy}\nreport: {result.report}")
        return None


def recipe_of(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    """The recipe that --recipe or --resume name, which decides the defaults of the other options."""
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
