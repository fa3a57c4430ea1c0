"""The torchpi command line. Each command is a dataclass of its arguments in one of the modules of this package."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import tyro
from rich.console import Console

from torchpi.cli import bench, checkpoints, data, evaluation, hub, init, policy, serving, stats, training, view
from torchpi.cli.arguments import REGISTRY, in_options, options_of, translate
from torchpi.cli.common import Command
from torchpi.data.files import ALLOW_OUTSIDE
from torchpi.errors import UsageError, closest, printable
from torchpi.training.config import TrainConfig
from torchpi.version import __version__

GROUPS: dict[str, dict[str, type[Command]]] = {
    "getting started": {"init": init.Init},
    "policies": {
        "demo": policy.Demo,
        "infer": policy.Infer,
        "serve": serving.Serve,
        "trace": policy.Trace,
        "doctor": checkpoints.Doctor,
        "compare": checkpoints.Compare,
    },
    "datasets": {
        "data inspect": data.DataInspect,
        "data draft": data.DataDraft,
        "data merge": data.DataMerge,
        "data split": data.DataSplit,
        "data delete": data.DataDelete,
        "data resample": data.DataResample,
        "sim record": data.SimRecord,
        "stats": stats.Stats,
        "view": view.View,
    },
    "training and evaluation": {"train": training.Train, "eval": evaluation.Eval},
    "checkpoints": {
        "convert": checkpoints.Convert,
        "quantize": checkpoints.Quantize,
        "push": hub.Push,
        "pull": hub.Pull,
    },
    "benchmarks": {
        "bench": bench.Bench,
        "bench load": bench.BenchLoad,
        "bench data": bench.BenchData,
        "bench serve": bench.BenchServe,
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
_MAX_MESSAGE = 20_000
"""Maximum characters of an error or a warning: names in a user's file may be of any length and number."""


def train_recipe(recipe: TrainConfig) -> None:
    """Run `torchpi train` with a recipe's values as option defaults; for recipes written as Python files."""
    main(["train", *sys.argv[1:]], recipe)


def main(argv: Sequence[str] | None = None, recipe: TrainConfig | None = None) -> None:
    """Run a command. A user error prints one line to stderr and exits with status 1.

    Args:
        argv: command-line arguments; by default `sys.argv[1:]`.
        recipe: defaults of `train`.
    """
    args = _extract_allowed_folders(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"torchpi {__version__}")
        return
    group = " ".join(arg for arg in args if arg not in ("-h", "--help"))  # "": all commands; "data": data …
    if group not in COMMANDS and any(f"{name} ".startswith(f"{group} ".lstrip()) for name in COMMANDS):
        _print_commands(group)
        return
    name = max((name for name in COMMANDS if args[: len(name.split())] == name.split()), key=len, default="")
    options = options_of(COMMANDS[name]) if name else {}
    warnings.showwarning = partial(_show_warning, options)
    try:
        status = _parse(name, args, recipe or TrainConfig()).run()
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, such as `torchpi … | head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's final flush prints an error
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        separator = "\n" if "\n" in str(error) else " "
        message = separator.join(map(str, (error, *getattr(error, "__notes__", ()))))
        print("error:", printable(in_options(message, options), _MAX_MESSAGE, keep="\n\t"), file=sys.stderr)
        raise SystemExit(1) from None
    if status:
        raise SystemExit(status)


def _print_commands(prefix: str) -> None:
    """Print the commands whose names start with a prefix, grouped, each with the start of its help."""
    lines = ["torchpi COMMAND [OPTIONS]: π₀ and π₀.₅ in plain PyTorch"]
    for title, group in GROUPS.items():
        commands = {name: command for name, command in group.items() if name.startswith(prefix)}
        lines += [f"\n[bold]{title}[/bold]"] if commands else []
        for name, command in commands.items():
            summary = re.split(r"[.,:;(]", command.__doc__ or "", maxsplit=1)[0]
            lines.append(f"  [cyan]{name:<13}[/cyan]  {summary}")
    lines += [
        "\ntorchpi COMMAND --help describes it; torchpi --version prints the version.",
        "Dataset links may point only inside the dataset, or into --allow-outside FOLDER.",
        "Shell completion: torchpi --tyro-print-completion bash (or zsh, tcsh)",
    ]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True)


def _extract_allowed_folders(args: Sequence[str]) -> list[str]:
    """Move each `--allow-outside FOLDER` from the arguments to the environment, where worker processes read it too."""
    remaining = list[str]()
    words = iter(args)
    for word in words:
        option, _, folder = word.partition("=")
        if option in ("--allow-outside", "--allow_outside") and (folder := folder or next(words, "")):
            os.environ[ALLOW_OUTSIDE] = os.pathsep.join(filter(None, (os.environ.get(ALLOW_OUTSIDE), folder)))
        else:
            remaining.append(word)
    return remaining


def _parse(name: str, args: list[str], recipe: TrainConfig) -> Command:
    """Parse the arguments of a command; without a name, those of torchpi itself, such as shell completion."""
    if not name:
        if not args[0].startswith("-"):
            is_group = any(command.startswith(f"{args[0]} ") for command in COMMANDS)
            unknown = " ".join(args[: 2 if is_group else 1])
            near = closest(unknown, COMMANDS) or next((c for c in COMMANDS if args[0] in c.split()), None)
            suggestion = f"; did you mean torchpi {near}?" if near else "."
            raise UsageError(f"There is no command {printable(unknown)!r}{suggestion} torchpi --help lists them.")
        commands: dict[str, Callable[..., Command]] = {**COMMANDS}
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="torchpi",
            description="π₀ and π₀.₅ in plain PyTorch. torchpi --version prints the version.",
            args=args,
            sort_subcommands=False,
        )
    command = COMMANDS[name]
    # A shell does not expand the ~ in --out=~/run.
    args = [re.sub(r"(^|=)~(?=/|$)", lambda match: f"{match[1]}{os.path.expanduser('~')}", arg) for arg in args]
    args = translate(args[len(name.split()) :], command, name)
    default: Command | Any = tyro.MISSING_NONPROP
    if command is training.Train:
        default = training.Train(config=training.recipe_of(args, recipe))
    # Parse with this command only: for a mistyped option, tyro would suggest the options of every subcommand.
    return tyro.cli(
        command,
        prog=f"torchpi {name}",
        args=args,
        default=default,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        registry=REGISTRY,
    )


def _show_warning(
    options: Mapping[str, str], message: Warning | str, category: type[Warning], *_: Any, **__: Any
) -> None:
    print("warning:", printable(in_options(str(message), options), _MAX_MESSAGE, keep="\n\t"), file=sys.stderr)
