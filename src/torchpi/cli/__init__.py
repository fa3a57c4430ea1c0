"""The command line: the commands by name. Each is a function in one of these modules, its `--help` is its docstring."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from torchpi.cli import bench, checkpoints, data, evaluation, policy, serving, training
from torchpi.cli.common import CheckpointOptions as CheckpointOptions
from torchpi.training.config import TrainConfig

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": policy.demo,
    "trace": policy.trace,
    "bench": bench.bench,
    "bench serve": bench.bench_serve,
    "bench control": bench.bench_control,
    "stats": data.stats,
    "infer": policy.infer,
    "convert": checkpoints.convert,
    "doctor": checkpoints.doctor,
    "compare": checkpoints.compare,
    "train": training.train_command(TrainConfig()),
    "eval": evaluation.evaluate,
    "serve": serving.serve,
    "sim record": data.sim_record,
}


def train_recipe(recipe: TrainConfig) -> None:
    """What a recipe's Python file runs: `torchpi train` with the recipe's values as defaults of its options."""
    main(["train", *sys.argv[1:]], recipe)


def main(argv: Sequence[str] | None = None, recipe: TrainConfig | None = None) -> None:
    """Run a command; a user's mistake ends with one line on stderr and exit status 1.

    Args:
        argv: the command's words; by default the process'.
        recipe: the defaults of `train`.
    """
    warnings.showwarning = _show_warning
    args = list(sys.argv[1:] if argv is None else argv)
    if " ".join(args[:2]) in COMMANDS:  # of two words
        args[:2] = [" ".join(args[:2])]
    commands = dict(COMMANDS)
    try:
        if args[:1] == ["train"]:
            commands["train"] = training.train_command(training.recipe_of(args, recipe or TrainConfig()))
        if args and args[0] in commands:  # alone, or else a mistyped option brings suggestions from the others
            commands = {args[0]: commands[args[0]]}
        status = tyro.extras.subcommand_cli_from_dict(
            commands, prog="torchpi", description="π₀ and π₀.₅ in plain PyTorch.", args=args, sort_subcommands=False
        )
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        # str() of a KeyError quotes its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error:", message, *getattr(error, "__notes__", ()), file=sys.stderr)
        raise SystemExit(1) from None
    if status:
        raise SystemExit(status)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
